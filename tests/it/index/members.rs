//! Members and frames, with their headers, trailers and ends.

use ocifs::index::{IndexError, SPACING, SpanId};

use super::{CONTENT, check, filter, gzip, pass};

#[test]
fn many_members() {
    let mut blob = Vec::new();
    let mut tar = Vec::new();
    let mut rest = &CONTENT[..3 << 20];
    let mut rng = fastrand::Rng::with_seed(1);
    while !rest.is_empty() {
        // The members have from no bytes to many spans.
        let length = 1usize << rng.u32(0..20);
        let (head, tail) = rest.split_at(length.min(rest.len()));
        let head = if rng.u8(..) < 30 { &[] } else { head };
        blob.extend(gzip("-6", head));
        tar.extend_from_slice(head);
        rest = tail;
    }
    check(&blob, &tar);
}

/// Returns a gzip member with these optional header fields.
fn member(flags: u8, fields: &[&[u8]], content: &[u8]) -> Vec<u8> {
    let mut blob = vec![0x1f, 0x8b, 8, flags, 1, 2, 3, 4, 0, 3];
    blob.extend(fields.concat());
    if flags & 2 != 0 {
        blob.extend_from_slice(&(crc32fast::hash(&blob) as u16).to_le_bytes());
    }
    blob.extend_from_slice(&gzip("-6", content)[10..]);
    blob
}

#[test]
fn every_header_field() {
    let tar = &CONTENT[..300_000];
    let (extra, empty): (&[u8], &[u8]) = (b"\x07\x00BC\x03\x00xyz", b"\x00\x00");
    for (flags, fields) in [
        (0, vec![]),
        (1, vec![]),
        (2, vec![]),
        (4, vec![extra]),
        (4, vec![empty]),
        (8, vec![b"layer.tar\0".as_slice()]),
        (16, vec![b"\0".as_slice()]),
        (2 | 4 | 8 | 16, vec![extra, b"layer.tar\0", b"a comment\0"]),
    ] {
        let blob = member(flags, &fields, tar);
        let (pass_result, ..) = pass(&blob, SPACING, 1, 3).unwrap();
        assert!(pass_result.tar == tar, "{flags}");
        let twice = [blob.clone(), blob].concat();
        check(&twice, &[tar, tar].concat());
    }
    let mut bad = member(2, &[], tar);
    bad[10] ^= 1;
    assert!(matches!(
        pass(&bad, SPACING, 1, 9),
        Err(IndexError::Gzip { offset: 11, .. })
    ));
    assert!(matches!(
        pass(&member(0x20, &[], tar), SPACING, 1, 9),
        Err(IndexError::Gzip { offset: 3, .. })
    ));
}

#[test]
fn what_may_follow_the_last_member() {
    let tar = &CONTENT[..200_000];
    let blob = gzip("-6", tar);
    let size = blob.len() as u64;
    for (tail, garbage) in [
        (&b""[..], None),
        (b"\0", None),
        (&[0; 5000], None),
        (b"x", Some(size)),
        (b"\x1f", Some(size)),
        (b"\x1fx", Some(size)),
        (b"\0\0xyz\0", Some(size + 2)),
    ] {
        for most in [1, 100_000] {
            let blob = [&blob, tail].concat();
            let (pass, _, end) = pass(&blob, SPACING, 1, most).unwrap();
            assert!(pass.tar == tar);
            assert_eq!(end.trailing_garbage, garbage, "{tail:?}");
        }
    }
    let cut = [&blob[..], &blob[..20]].concat();
    assert!(matches!(pass(&cut, SPACING, 1, 9), Err(IndexError::Truncated { .. })));
}

#[test]
fn truncation_is_an_error() {
    let tar = &CONTENT[..100_000];
    let frames = [filter("zstd", &["-c"], tar), filter("zstd", &["-c"], tar)].concat();
    for (blob, whole) in [(gzip("-6", tar), usize::MAX), (frames.clone(), frames.len() / 2)] {
        for keep in (4..blob.len())
            .rev()
            .step_by(997)
            .chain(blob.len() - 40..blob.len())
            .filter(|&n| n != whole)
        {
            let error = pass(&blob[..keep], SPACING, 1000, 9000).map(drop).unwrap_err();
            let IndexError::Truncated { offset } = error else {
                panic!("{keep}: {error}")
            };
            assert_eq!(offset, keep as u64);
        }
    }
}

#[test]
fn a_wrong_trailer_is_an_error() {
    let blob = gzip("-6", &CONTENT[..100_000]);
    for back in 1..=8 {
        let mut blob = blob.clone();
        let at = blob.len() - back;
        blob[at] ^= 0x10;
        assert!(
            matches!(pass(&blob, SPACING, 1, 9000), Err(IndexError::Gzip { .. })),
            "{back}"
        );
    }
}

#[test]
fn empty_layers() {
    // The two empty layers that are common in registries: 1024 zeros, compressed and plain.
    let zeros = vec![0; 1024];
    check(&gzip("-6", &zeros), &zeros);
    check(&zeros, &zeros);
    for blob in [Vec::new(), gzip("-6", b""), zstd::bulk::compress(b"", 3).unwrap()] {
        let index = check(&blob, b"");
        assert!(index.is_empty());
        assert!(matches!(
            index.decoder(SpanId(0), SpanId(0)),
            Err(IndexError::NoSuchSpans { .. })
        ));
    }
}
