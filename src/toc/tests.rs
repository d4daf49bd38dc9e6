//! Tests of the reader on tars made by hand, block by block: what real writers do not write.
//!
//! The integration tests use tars of real writers.

use super::*;
use crate::memory::Allowance;

mod metadata;
mod properties;
mod sparse;

/// Makes a ustar header with a valid checksum; `set` overwrites bytes at offsets.
pub(super) fn header(name: &str, flag: u8, size: u64, set: &[(usize, &[u8])]) -> Vec<u8> {
    let mut block = vec![0; 512];
    let size = format!("{size:011o}\0");
    let fields: [(usize, &[u8]); 8] = [
        (0, name.as_bytes()),
        (100, b"0000644\0"),
        (108, b"0000001\0"),
        (116, b"0000002\0"),
        (124, size.as_bytes()),
        (136, b"00000000003\0"),
        (156, &[flag]),
        (257, b"ustar\x0000"),
    ];
    for (at, bytes) in fields.iter().chain(set) {
        block[*at..at + bytes.len()].copy_from_slice(bytes);
    }
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|&b| u32::from(b)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block
}

pub(super) const GNU: (usize, &[u8]) = (257, b"ustar  \0");

/// Pads data to whole blocks.
pub(super) fn padded(data: &[u8]) -> Vec<u8> {
    let mut data = data.to_vec();
    data.resize(data.len().next_multiple_of(512), 0);
    data
}

pub(super) fn entry(name: &str, flag: u8, data: &[u8], set: &[(usize, &[u8])]) -> Vec<u8> {
    [header(name, flag, data.len() as u64, set), padded(data)].concat()
}

pub(super) fn pax_record(key: &str, value: &[u8]) -> Vec<u8> {
    let body = key.len() + value.len() + 3;
    let len = (1..)
        .map(|digits| body + digits)
        .find(|len| len.to_string().len() + body == *len)
        .unwrap();
    [format!("{len} {key}=").as_bytes(), value, b"\n"].concat()
}

pub(super) fn pax(records: &[(&str, &[u8])]) -> Vec<u8> {
    let payload: Vec<u8> = records.iter().flat_map(|(key, value)| pax_record(key, value)).collect();
    entry("pax", b'x', &payload, &[])
}

/// Runs of content with their device offsets.
type Delivered = Vec<(u64, Vec<u8>)>;

/// Reads a tar in pieces of the lengths that `split` returns. Returns the table and the delivered content.
pub(super) fn read_split(tar: &[u8], mut split: impl FnMut() -> usize) -> Result<(Toc, Delivered), TocError> {
    let mut reader = TarReader::new(Limits::default());
    let mut delivered = Delivered::new();
    let mut rest = tar;
    while !rest.is_empty() {
        let (head, tail) = rest.split_at(split().clamp(1, rest.len()));
        reader.push(head, &mut |at, bytes| match delivered.last_mut() {
            Some((start, run)) if *start + run.len() as u64 == at => run.extend_from_slice(bytes),
            _ => delivered.push((at, bytes.to_vec())),
        })?;
        rest = tail;
    }
    let toc = reader.finish()?.toc;
    Ok((toc.unpack().unwrap(), delivered))
}

pub(super) fn read(parts: &[Vec<u8>]) -> Result<Toc, TocError> {
    let tar = parts.concat();
    let (toc, delivered) = read_split(&tar, || usize::MAX)?;
    for extent in &toc.extents {
        let (start, run) = delivered
            .iter()
            .rev()
            .find(|(start, _)| *start <= extent.device)
            .unwrap();
        let at = (extent.device - start) as usize;
        let expected = &tar[extent.tar as usize..(extent.tar + extent.len) as usize];
        assert_eq!(&run[at..at + extent.len as usize], expected);
    }
    let mut encoded = Vec::new();
    toc.encode(&mut encoded).unwrap();
    assert_eq!(Toc::decode(&encoded).unwrap(), toc);
    Ok(toc)
}

fn paths(toc: &Toc) -> Vec<String> {
    toc.entries
        .iter()
        .map(|e| String::from_utf8(e.path.to_vec()).unwrap())
        .collect()
}

fn flat(size: u64, device: u64) -> FileData {
    FileData {
        size,
        layout: DataLayout::Flat { device },
    }
}

#[test]
fn no_tar() {
    for (bytes, kind) in [
        (&b"\x1f\x8b\x08\0"[..], "gzip"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"{\"a\":1}", "JSON"),
        (b"hello", "hello"),
    ] {
        for len in [bytes.len(), 512, 1024] {
            let mut input = bytes.to_vec();
            input.resize(len, 1);
            let Err(TocError::NotTar { seen }) = read(&[input]) else {
                panic!("{kind}")
            };
            assert!(seen.contains(kind), "{seen}");
        }
    }
    let error = read(&[entry("first", b'0', b"", &[]), vec![b'x'; 512]]).unwrap_err();
    assert_eq!(
        error,
        TocError::BadHeader {
            offset: 512,
            after: "`first`".into()
        }
    );
}

#[test]
fn errors_stay() {
    let mut reader = TarReader::new(Limits::default());
    let error = reader.push(&[1; 512], &mut |_, _| ()).unwrap_err();
    assert_eq!(reader.push(&[0; 1024], &mut |_, _| ()), Err(error.clone()));
    assert_eq!(reader.finish().err(), Some(error));
}

#[test]
fn ends_of_tars() {
    let zeros = |n: usize| vec![0; n];
    let file = entry("f", b'0', b"data", &[]);
    for (tail, warnings) in [
        (zeros(0), 0),
        (zeros(1), 0),
        (zeros(512), 0),
        (zeros(700), 0),
        (zeros(1024), 0),
        (zeros(10240), 0),
        ([zeros(1024), vec![7; 3]].concat(), 0),
        ([zeros(1024), file.clone()].concat(), 0),
        ([zeros(512), file.clone()].concat(), 1),
        ([pax(&[("path", b"x")]), zeros(1024)].concat(), 1),
    ] {
        let toc = read(&[file.clone(), tail]).unwrap();
        assert_eq!((paths(&toc), toc.warnings.len()), (vec!["f".into()], warnings));
    }
    for empty in [0, 10, 512, 1024] {
        assert_eq!(read(&[zeros(empty)]).unwrap(), Toc::default());
    }
}

#[test]
fn every_truncation_is_seen() {
    let long = format!("{}/f", "d".repeat(200));
    let parts = [
        pax(&[("path", long.as_bytes())]),
        entry("f", b'0', &[1; 600], &[]),
        entry("dir", b'5', b"", &[]),
        entry("L", b'L', long.as_bytes(), &[GNU]),
        entry("g", b'0', b"x", &[GNU]),
        vec![0; 1024],
    ];
    let tar = parts.concat();
    // Accepted lengths: the content is complete, and only padding or the end marker is missing.
    let (file, dir, last) = (1024 + 512 + 600, 1024 + 512 + 1024 + 512, tar.len() - 1024 - 511);
    let fine =
        |len: usize| len == 0 || (file..=file + 424).contains(&len) || len == dir || (last..=tar.len()).contains(&len);
    for len in 0..=tar.len() {
        let result = read_split(&tar[..len], || usize::MAX);
        assert_eq!(result.is_ok(), fine(len), "{len}: {:?}", result.err());
        if len >= 512 && !fine(len) {
            assert!(matches!(result, Err(TocError::Truncated { .. })));
        }
    }
}

#[test]
fn types() {
    let link = |target: &'static [u8]| (157, target);
    let toc = read(&[
        entry("file", b'0', b"12345", &[]),
        entry("old", 0, b"1", &[]),
        entry("contiguous", b'7', b"1", &[]),
        entry("slash/", b'0', b"1", &[]),
        entry("old-dir/", 0, b"", &[]),
        header("hard", b'1', 12345, &[link(b"./file")]),
        header("soft", b'2', 99, &[link(b"../a//b/.")]),
        header("char", b'3', 99, &[(329, b"0000001\0"), (337, b"0000003\0")]),
        header(
            "block",
            b'4',
            99,
            &[(329, b"\x80\0\0\0\0\0\x01\x2c"), (337, b"\x80\0\0\0\0\x01\x11\x70")],
        ),
        header("dir/", b'5', 99, &[]),
        header("fifo", b'6', 99, &[]),
        entry("dump/", b'D', b"Yfile\0\0", &[GNU]),
        entry("volume", b'V', b"", &[GNU]),
        entry("rest", b'M', b"data", &[GNU]),
        entry("names", b'N', b"data", &[GNU]),
        entry("global", b'g', b"not even records", &[]),
        entry("vendor", b'A', b"data", &[]),
        entry("last", b'0', b"", &[]),
    ])
    .unwrap();
    let kinds: Vec<_> = toc.entries.iter().map(|e| e.kind.clone()).collect();
    let expected = [
        EntryKind::Regular(flat(5, 0)),
        EntryKind::Regular(flat(1, 4096)),
        EntryKind::Regular(flat(1, 8192)),
        EntryKind::Regular(flat(1, 12288)),
        EntryKind::Directory,
        EntryKind::Hardlink((*b"file").into()),
        EntryKind::Symlink((*b"../a//b/.").into()),
        EntryKind::CharDevice(DeviceNumber { major: 1, minor: 3 }),
        EntryKind::BlockDevice(DeviceNumber {
            major: 300,
            minor: 70000,
        }),
        EntryKind::Directory,
        EntryKind::Fifo,
        EntryKind::Directory,
        EntryKind::Regular(flat(0, 0)),
    ];
    assert_eq!(kinds, expected);
    assert_eq!(
        toc.warnings,
        ["entry `vendor` has the unknown type 0x41 and is left out"]
    );
    assert_eq!(toc.device_size, 4 * DEVICE_BLOCK);
    assert_eq!(
        toc.entries[6].meta,
        Metadata {
            mode: 0o777,
            uid: 1,
            gid: 2,
            mtime: 3,
            mtime_nsec: 0
        }
    );
}

#[test]
fn whiteouts_and_odd_names() {
    let toc = read(&[
        entry("./", b'5', b"", &[]),
        entry("/", b'0', b"root?", &[]),
        entry(".", b'2', b"", &[(157, b"x")]),
        entry("d/.wh.gone", b'0', b"content nobody wants", &[]),
        entry("d/.wh.dir/", b'5', b"", &[]),
        entry("d/.wh..wh..opq", b'0', b"", &[]),
        entry(".wh..wh..opq", b'0', b"", &[]),
        entry("d/.wh.", b'0', b"x", &[]),
        entry(".wh..", b'0', b"", &[]),
        entry(".wh...", b'0', b"", &[]),
        entry(".wh..wh.plnk/", b'5', b"", &[]),
        entry(".wh..wh.plnk/1.2", b'0', b"linked", &[]),
        entry(".wh..wh.aufs", b'0', b"", &[]),
        entry("dev", b'3', b"", &[]),
        entry("a/../../up", b'1', b"", &[(157, b"/.wh..wh.plnk/1.2")]),
        entry("empty", b'2', b"", &[]),
        entry("to-root", b'1', b"", &[(157, b"..")]),
    ])
    .unwrap();
    let found: Vec<_> = paths(&toc)
        .into_iter()
        .zip(toc.entries.iter().map(|e| e.kind.clone()))
        .collect();
    let expected = [
        ("", EntryKind::Directory),
        ("d/gone", EntryKind::Whiteout),
        ("d/dir", EntryKind::Whiteout),
        ("d", EntryKind::Opaque),
        ("", EntryKind::Opaque),
        (".wh..wh.plnk/1.2", EntryKind::Hidden(flat(6, 0))),
        (".wh..wh.aufs", EntryKind::Hidden(flat(0, 0))),
        ("dev", EntryKind::CharDevice(DeviceNumber::WHITEOUT)),
        ("up", EntryKind::Hardlink((*b".wh..wh.plnk/1.2").into())),
    ];
    assert_eq!(found, expected.map(|(path, kind)| (path.to_owned(), kind)));
    assert_eq!(toc.warnings.len(), 7, "{:?}", toc.warnings);
    assert_eq!(toc.extents.len(), 1);
}

#[test]
fn names_and_targets_that_cannot_be() {
    let file = entry("f", b'0', b"", &[]);
    let bad =
        |key, value: &[u8], entry: &Vec<u8>| read(&[pax(&[(key, value)]), entry.clone()]).unwrap_err().to_string();
    assert!(bad("path", b"a\0b", &file).contains("NUL"));
    assert!(bad("path", &[b'n'; 256], &file).contains("`nnnn"));
    assert!(bad("path", &b"n/".repeat(2100), &file).contains("4096"));
    assert!(bad("linkpath", b"a\0b", &entry("h", b'1', b"", &[])).contains("hard link target"));
    assert!(bad("linkpath", &[b'n'; 4096], &entry("s", b'2', b"", &[])).contains("target"));
    assert!(read(&[pax(&[("linkpath", &[b'n'; 4095])]), entry("s", b'2', b"", &[])]).is_ok());
    assert!(matches!(
        read(&[header("d", b'4', 0, &[(329, b"9999999\0")])]),
        Err(TocError::BadField { .. })
    ));
}

#[test]
fn limits() {
    let big = read(&[header("big", b'L', (1 << 20) + 1, &[GNU])]);
    assert!(matches!(big, Err(TocError::HeaderTooLarge { .. })));
    let huge = read(&[header("huge", b'0', 0, &[(124, b"\x80\0\0\0\x10\0\0\0\0\0\0\0")])]).unwrap_err();
    assert_eq!(
        huge,
        TocError::TooLarge {
            entry: "`huge`".into(),
            size: 1 << 60,
            limit: 8 << 40
        }
    );
    let mut reader = TarReader::new(Limits {
        entries: 2,
        ..Limits::default()
    });
    let tar = ["a", "b", "c"].map(|name| entry(name, b'5', b"", &[])).concat();
    assert_eq!(
        reader.push(&tar, &mut |_, _| ()),
        Err(TocError::TooManyEntries {
            entry: "`c`".into(),
            limit: 2
        })
    );
    let limit = 1 << 20;
    let mut reader = TarReader::charged(Limits::default(), Allowance::new(limit).charge());
    let refused = (0..).find_map(|number| {
        let value = format!("{number:060000}").into_bytes();
        let tar = [pax(&[("SCHILY.xattr.user.a", &value)]), entry("file", b'0', b"", &[])].concat();
        reader.push(&tar, &mut |_, _| ()).err()
    });
    let refused = refused.unwrap();
    assert!(matches!(refused, TocError::TooMuchMemory { source, .. } if source.limit == limit));
    let text = refused.to_string();
    assert!(
        text.contains("`file`") && text.contains("1 MiB") && text.contains("--memory"),
        "{text}"
    );
    // Four blocks far apart take four fragments, four chunks and one entry: more than the limit of 8.
    let pieces: Vec<(u64, u64)> = (0..4).map(|i| (i << 20, 512)).collect();
    for tar in sparse::sparse_styles(4 << 20, &pieces) {
        let mut reader = TarReader::new(Limits {
            entries: 8,
            ..Limits::default()
        });
        let refused = reader.push(&tar, &mut |_, _| ()).unwrap_err();
        assert!(matches!(refused, TocError::TooManyEntries { limit: 8, .. }));
    }
    let warnings: Vec<_> = (0..100).map(|_| entry(".wh.", b'0', b"", &[])).collect();
    let warnings = read(&warnings).unwrap().warnings;
    assert_eq!((warnings.len(), warnings[32].as_str()), (33, "and 68 more warnings"));
}
