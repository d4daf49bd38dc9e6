//! The span index against the programs that make and read layers: gzip, pigz, zstd, zlib.

mod writers;

use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::LazyLock;

use ocifs::index::{
    Compression, DecodeSink, Identity, IndexError, LayerDecoder, LayerEnd, MAX_SPAN, SPACING, SpanId, SpanIndex,
    SpanIndexBuilder, SpanStart, sniff,
};
use ocifs::oci::{DiffId, Digest};
use proptest::prelude::*;

/// Some megabytes of what layers are made of: programs, texts, tables.
static CONTENT: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut content = Vec::new();
    for (dir, limit) in [("/usr/bin", 4 << 20), ("/usr/share", 7 << 20), ("/usr/lib", 9 << 20)] {
        collect(Path::new(dir), limit, &mut content);
    }
    assert!(content.len() > 4 << 20, "this machine has no files to make a layer of");
    content
});

fn collect(dir: &Path, limit: usize, content: &mut Vec<u8>) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    for path in paths {
        if content.len() >= limit {
            return;
        }
        let Ok(meta) = path.symlink_metadata() else { continue };
        if meta.is_dir() {
            collect(&path, limit, content);
        } else if meta.is_file() && meta.len() < 1 << 20 {
            content.extend(fs::read(&path).unwrap_or_default());
        }
    }
}

fn random(length: usize, seed: u64) -> Vec<u8> {
    let mut rng = fastrand::Rng::with_seed(seed);
    std::iter::repeat_with(|| rng.u8(..)).take(length).collect()
}

/// Output of a program fed with `input`.
fn filter(program: &str, args: &[&str], input: &[u8]) -> Vec<u8> {
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("these tests need {program}: {error}"));
    let mut stdin = child.stdin.take().unwrap();
    let output = std::thread::scope(|scope| {
        scope.spawn(move || stdin.write_all(input).unwrap());
        child.wait_with_output().unwrap()
    });
    assert!(output.status.success(), "{program} {args:?}");
    output.stdout
}

fn gzip(level: &str, input: &[u8]) -> Vec<u8> {
    filter("gzip", &[level, "-nc"], input)
}

/// A gzip stream as zlib makes it with the flags and strategies other programs do not offer.
fn zlib(strategy: &str, flush: &str, input: &[u8]) -> Vec<u8> {
    let script = format!(
        "import sys,zlib\n\
         data=sys.stdin.buffer.read()\n\
         z=zlib.compressobj(6,zlib.DEFLATED,31,8,zlib.{strategy})\n\
         for i in range(0,len(data),50000):\n\
         \x20 sys.stdout.buffer.write(z.compress(data[i:i+50000])+z.flush(zlib.{flush}))\n\
         sys.stdout.buffer.write(z.flush())"
    );
    filter("python3", &["-c", &script], input)
}

/// What a pass over a blob said.
#[derive(Default)]
struct Pass {
    tar: Vec<u8>,
    spans: Vec<SpanStart>,
    windows: Vec<(SpanId, usize)>,
}

impl DecodeSink for Pass {
    fn span(&mut self, start: SpanStart) {
        assert_eq!(start.tar_offset, self.tar.len() as u64);
        self.spans.push(start);
    }
    fn bytes(&mut self, bytes: &[u8]) {
        assert!(!bytes.is_empty());
        self.tar.extend_from_slice(bytes);
    }
    fn window(&mut self, span: SpanId, window: Vec<u8>) {
        self.windows.push((span, window.len()));
    }
}

struct Both<'a>(&'a mut Pass, &'a mut SpanIndexBuilder);

impl DecodeSink for Both<'_> {
    fn span(&mut self, start: SpanStart) {
        self.0.span(start);
        self.1.span(start);
    }
    fn bytes(&mut self, bytes: &[u8]) {
        self.0.bytes(bytes);
        self.1.bytes(bytes);
    }
    fn window(&mut self, span: SpanId, window: Vec<u8>) {
        self.0.window(span, window.clone());
        self.1.window(span, window);
    }
}

/// How the input is cut into pushes.
fn pieces(blob: &[u8], least: usize, most: usize, seed: u64) -> impl Iterator<Item = &[u8]> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut rest = blob;
    std::iter::from_fn(move || {
        let (head, tail) = rest.split_at(rng.usize(least..=most).min(rest.len()));
        rest = tail;
        (!head.is_empty()).then_some(head)
    })
}

fn pass(blob: &[u8], spacing: u64, least: usize, most: usize) -> Result<(Pass, SpanIndex, LayerEnd), IndexError> {
    let compression = sniff(&blob[..blob.len().min(512)])?;
    let mut decoder = LayerDecoder::new(compression, spacing)?;
    let mut pass = Pass::default();
    let mut builder = SpanIndexBuilder::new(compression)?;
    for piece in pieces(blob, least, most, 7) {
        decoder.push(piece, &mut Both(&mut pass, &mut builder))?;
    }
    let end = decoder.finish(&mut Both(&mut pass, &mut builder))?;
    assert_eq!(
        (end.blob_size, end.tar_size),
        (blob.len() as u64, pass.tar.len() as u64)
    );
    let index = builder.finish(Identity {
        blob: Digest::of(blob),
        blob_size: end.blob_size,
        diff_id: DiffId(Digest::of(&pass.tar)),
    })?;
    assert_eq!(index.len(), pass.spans.len());
    Ok((pass, index, end))
}

fn file(index: &SpanIndex) -> Vec<u8> {
    let mut bytes = Vec::new();
    index.write(&mut bytes).unwrap();
    bytes
}

/// Decodes spans from nothing but their range of the blob.
fn read(index: &SpanIndex, blob: &[u8], first: SpanId, last: SpanId, most: usize) -> Result<Vec<u8>, IndexError> {
    let range = index.blob_range(first, last);
    let mut decoder = index.decoder(first, last)?;
    let mut out = Vec::new();
    let mut next = first;
    for piece in pieces(&blob[range.start as usize..range.end as usize], 1, most, 3) {
        decoder.push(piece, &mut |span, bytes: &[u8]| {
            assert_eq!(span, next);
            next.0 += 1;
            out.extend_from_slice(bytes);
            Ok::<_, IndexError>(())
        })?;
    }
    assert!(
        decoder.is_done(),
        "spans {first}..={last}: range {range:?} was not enough"
    );
    Ok(out)
}

/// The whole check of one blob: the pass gives `tar`; every restart, alone and followed by others, gives its part of it.
fn check(blob: &[u8], tar: &[u8]) -> SpanIndex {
    let (pass_result, index, end) = pass(blob, 64 << 10, 1000, 100_000).unwrap();
    assert!(pass_result.tar == tar, "the pass decodes something else");
    assert_eq!(end.trailing_garbage, None);
    let index = SpanIndex::open(file(&index)).unwrap();
    for span in index.spans() {
        let range = index.tar_range(span);
        assert!(!range.is_empty() && range.end - range.start <= MAX_SPAN);
        assert_eq!(index.span_at(range.start), Some(span));
        assert_eq!(index.span_at(range.end - 1), Some(span));
        let restart = index.restart_for(span);
        assert!(restart <= span);
        for last in [span.0, span.0 + 3].map(|last| SpanId(last.min(index.len() as u32 - 1))) {
            let from = index.tar_range(restart).start as usize;
            let to = index.tar_range(last).end as usize;
            let bytes = read(&index, blob, restart, last, 50_000).unwrap();
            assert!(bytes == tar[from..to], "spans {restart}..={last} differ");
        }
    }
    assert_eq!(index.span_at(tar.len() as u64), None);
    index
}

#[test]
fn many_members() {
    let mut blob = Vec::new();
    let mut tar = Vec::new();
    let mut rest = &CONTENT[..3 << 20];
    let mut rng = fastrand::Rng::with_seed(1);
    while !rest.is_empty() {
        // Members from nothing to many spans.
        let length = 1usize << rng.u32(0..20);
        let (head, tail) = rest.split_at(length.min(rest.len()));
        let head = if rng.u8(..) < 30 { &[] } else { head };
        blob.extend(gzip("-6", head));
        tar.extend_from_slice(head);
        rest = tail;
    }
    check(&blob, &tar);
}

#[test]
fn stored_blocks() {
    let tar = random(3 << 20, 5);
    check(&gzip("-6", &tar), &tar);
}

#[test]
fn one_block_longer_than_a_span() {
    let tar = vec![0; 9 << 20];
    let index = check(&gzip("-6", &tar), &tar);
    assert!(index.spans().any(|span| index.restart_for(span) != span));
}

#[test]
fn zlib_strategies_and_flushes() {
    let tar = &CONTENT[..2 << 20];
    for strategy in ["Z_DEFAULT_STRATEGY", "Z_RLE", "Z_HUFFMAN_ONLY", "Z_FIXED", "Z_FILTERED"] {
        for flush in ["Z_NO_FLUSH", "Z_SYNC_FLUSH", "Z_FULL_FLUSH"] {
            check(&zlib(strategy, flush, tar), tar);
        }
    }
}

#[test]
fn pushes_of_any_size() {
    let tar = &CONTENT[..1 << 20];
    for blob in [gzip("-6", tar), filter("zstd", &["-c"], tar)] {
        for most in [1, 2, 9, 20, 40, 300] {
            let (pass, index, _) = pass(&blob, 64 << 10, 1, most).unwrap();
            assert!(pass.tar == tar);
            let last = SpanId(index.len() as u32 - 1);
            let restart = index.restart_for(last);
            let from = index.tar_range(restart).start as usize;
            assert!(read(&index, &blob, restart, last, most).unwrap() == tar[from..]);
        }
    }
}

#[test]
fn zstd_of_every_kind() {
    let tar = &CONTENT[..];
    let plain = filter("zstd", &["-c"], tar);
    check(&plain, tar);
    check(
        &filter("zstd", &["-19", "--long=27", "-c"], &tar[..3 << 20]),
        &tar[..3 << 20],
    );

    // Frames with content size, and skippable frames between them as pzstd writes them.
    let mut blob = Vec::new();
    for chunk in tar.chunks(700_000) {
        let frame = zstd::bulk::compress(chunk, 3).unwrap();
        blob.extend_from_slice(&0x184d_2a50u32.to_le_bytes());
        blob.extend_from_slice(&4u32.to_le_bytes());
        blob.extend_from_slice(&(frame.len() as u32).to_le_bytes());
        blob.extend(frame);
    }
    assert_eq!(sniff(&blob[..4]).unwrap(), Compression::Zstd);
    let index = check(&blob, tar);
    let restarts = index.spans().filter(|&span| index.restart_for(span) == span).count();
    assert_eq!(restarts, tar.len().div_ceil(700_000));
}

#[test]
fn zstd_windows_above_the_limit_are_refused() {
    let blob = filter("zstd", &["--ultra", "--long=28", "-c"], &CONTENT[..1 << 20]);
    let error = pass(&blob, SPACING, 1, 10_000).map(drop).unwrap_err();
    assert!(matches!(error, IndexError::ZstdWindow { offset: 0 }), "{error}");
}

#[test]
fn uncompressed_layers() {
    let mut tar = tar::Builder::new(Vec::new());
    for (n, chunk) in CONTENT.chunks(900_000).enumerate() {
        let mut header = tar::Header::new_gnu();
        header.set_size(chunk.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, format!("file{n}"), chunk).unwrap();
    }
    let tar = tar.into_inner().unwrap();
    let index = check(&tar, &tar);
    assert_eq!(index.compression(), Compression::Tar);
    assert_eq!(index.len(), tar.len().div_ceil(64 << 10));
    assert_eq!(index.blob_range(SpanId(3), SpanId(4)), (3 * 65536)..(5 * 65536));
}

/// A member with these optional header fields.
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
    // The two empty layers that registries are full of: 1024 zeros, compressed.
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

#[test]
fn sniffing() {
    let mut header = tar::Header::new_old();
    header.set_path("f\u{e9}").unwrap();
    header.set_size(0);
    header.set_cksum();
    let block = header.as_bytes().to_vec();
    assert_eq!(sniff(&block), Ok(Compression::Tar));
    assert!(sniff(&block[..511]).is_err());
    let mut signed = block.clone();
    // Two bytes above 127 in the name count 256 less each.
    let sum = header.cksum().unwrap() - 512;
    signed[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    assert_eq!(sniff(&signed), Ok(Compression::Tar));
    signed[0] ^= 1;
    assert!(sniff(&signed).is_err());
    let error = sniff(b"BZh9").unwrap_err().to_string();
    assert!(error.contains("425a6839"), "{error}");
}

/// A window holds all that decoding needs, not only up to the next restart.
#[test]
fn every_restart_leads_to_the_end() {
    let (blob, index) = &*READ;
    let last = SpanId(index.len() as u32 - 1);
    for first in index.spans().filter(|&span| index.restart_for(span) == span) {
        let from = index.tar_range(first).start as usize;
        assert!(
            read(index, blob, first, last, 100_000).unwrap() == CONTENT[from..],
            "from span {first}"
        );
    }
}

static READ: LazyLock<(Vec<u8>, SpanIndex)> = LazyLock::new(|| {
    let blob = gzip("-6", &CONTENT);
    let (_, index, _) = pass(&blob, SPACING, 1 << 16, 1 << 16).unwrap();
    (blob, index)
});

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_range_of_the_tar_can_be_read(at: prop::sample::Index, length in 1usize..2_000_000, most in 1usize..100_000) {
        let (blob, index) = &*READ;
        let from = at.index(CONTENT.len());
        let to = (from + length).min(CONTENT.len());
        let first = index.restart_for(index.span_at(from as u64).unwrap());
        let last = index.span_at(to as u64 - 1).unwrap();
        let bytes = read(index, blob, first, last, most).unwrap();
        let skip = from - index.tar_range(first).start as usize;
        prop_assert!(bytes[skip..skip + to - from] == CONTENT[from..to]);
    }

    #[test]
    fn a_flipped_bit_never_delivers_wrong_bytes(at: prop::sample::Index, bit in 0u8..8, zstd: bool) {
        let tar = &CONTENT[..600_000];
        let mut blob = if zstd { zstd::bulk::compress(tar, 3).unwrap() } else { gzip("-6", tar) };
        let (_, index, _) = pass(&blob, 64 << 10, 1 << 16, 1 << 16).unwrap();
        let at = at.index(blob.len());
        blob[at] ^= 1 << bit;
        drop(pass(&blob, 64 << 10, 1 << 16, 1 << 16));
        let last = SpanId(index.len() as u32 - 1);
        for first in index.spans().filter(|&span| index.restart_for(span) == span) {
            let range = index.blob_range(first, last);
            let mut decoder = index.decoder(first, last).unwrap();
            let outcome = decoder.push(&blob[range.start as usize..range.end as usize], &mut |span, bytes: &[u8]| {
                let range = index.tar_range(span);
                assert!(bytes == &tar[range.start as usize..range.end as usize]);
                Ok::<_, IndexError>(())
            });
            prop_assert!(outcome.is_ok() || !decoder.is_done());
        }
    }

    #[test]
    fn a_damaged_index_is_refused(at: prop::sample::Index, byte: u8) {
        let mut bytes = file(&READ.1);
        let at = at.index(bytes.len());
        prop_assume!(bytes[at] != byte);
        bytes[at] = byte;
        prop_assert!(SpanIndex::open(bytes).is_err());
    }

    /// As above, with a correct checksum: whatever is accepted can be used without a panic.
    #[test]
    fn a_forged_index_does_not_panic(edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4)) {
        let mut bytes = file(&READ.1);
        let content = bytes.len() - 32;
        let table = 320 + 64 * READ.1.len();
        for (n, (at, byte)) in edits.into_iter().enumerate() {
            let limit = if n == 0 { table } else { content };
            bytes[at.index(limit)] = byte;
        }
        let checksum = blake3::hash(&bytes[..content]);
        bytes[content..].copy_from_slice(checksum.as_bytes());
        if let Ok(index) = SpanIndex::open(bytes) {
            let blob = &READ.0;
            for span in index.spans() {
                let first = index.restart_for(span);
                let range = index.blob_range(first, span);
                let end = (range.end as usize).min(blob.len());
                if let Ok(mut decoder) = index.decoder(first, span) {
                    let start = (range.start as usize).min(end);
                    drop(decoder.push(&blob[start..end], &mut |_, _: &[u8]| Ok::<_, IndexError>(())));
                }
            }
        }
    }
}

#[test]
fn the_index_survives_its_file() {
    let bytes = file(&READ.1);
    let index = SpanIndex::open(bytes.clone()).unwrap();
    assert!(file(&index) == bytes);
    assert_eq!(*index.blob_digest(), Digest::of(&READ.0));
    assert_eq!(*index.diff_id(), DiffId(Digest::of(&CONTENT)));
    assert_eq!(
        (index.blob_size(), index.tar_size()),
        (READ.0.len() as u64, CONTENT.len() as u64)
    );
    for span in index.spans() {
        let range = index.tar_range(span);
        assert!(index.matches(span, &CONTENT[range.start as usize..range.end as usize]));
    }
    let mut newer = bytes;
    newer[8] = 9;
    assert!(matches!(
        SpanIndex::open(newer),
        Err(IndexError::Version { found: 9, known: 1 })
    ));
}

/// gzip(1) itself is the oracle for the streams it makes; flate2 for the same, through another reader.
#[test]
fn flate2_agrees() {
    let blob = gzip("-6", &CONTENT);
    let mut tar = Vec::new();
    flate2::read::MultiGzDecoder::new(&blob[..])
        .read_to_end(&mut tar)
        .unwrap();
    assert!(pass(&blob, SPACING, 1, 100_000).unwrap().0.tar == tar);
}
