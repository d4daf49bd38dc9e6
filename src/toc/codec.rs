//! The table of contents as a file.
//!
//! ```text
//!  0  magic "ocifsTOC"
//!  8  version u32 = 1
//! 12  number of entries u32, of extents u32, of warnings u32
//! 24  device size u64
//! 32  length of the body u64
//! 40  body, one zstd frame, and zeros where it would be shorter than 1/64 of what it holds
//!     BLAKE3 of all before, 32 bytes
//!
//! body    = entry* extent* warning*
//! entry   = kind u8, shared, bytes (path: `shared` bytes of the path before, then these),
//!           mode, uid, gid, signed (mtime), nanoseconds, number of xattrs, (bytes, bytes)*, then by kind:
//!           0 directory, 7 fifo, 8 whiteout, 9 opaque: nothing        3 symlink, 4 hardlink: bytes
//!           5 character device, 6 block device: major, minor
//!           1 regular, 10 hidden:  size, and unless that is 0: signed (device offset, from where the file before ends)
//!           2 regular, 11 hidden, in chunks:  size, chunk bits u8, number of chunks,
//!                        (chunks left out, signed (device offset, from where the chunk before ends))*
//! extent  = tar offset from the end of the extent before, device offset likewise, length
//! warning = bytes
//! bytes   = length, that many bytes
//! ```
//! The numbers of the head are little-endian; those of the body are LEB128, `signed` ones in zigzag. What is usual takes one byte:
//! a file's device offset is where the one before ended.
//!
//! Decoding believes nothing: it reads as a stream, allocates what it has read, and checks every invariant of [`Toc`], because a
//! table may come from a registry. The zeros (no real layer needs any) let it refuse whatever unfolds to more than 64 times its
//! size, so that a few bytes cannot become gigabytes of entries.

use super::DEVICE_BLOCK;

mod decode;
mod encode;

const MAGIC: &[u8; 8] = b"ocifsTOC";
const VERSION: u32 = 1;
const HEAD: usize = 40;
const HASH: usize = 32;
const WHAT: &str = "table of contents";
/// Most that a byte of the body may unfold to; tables of real layers stay below 10.
const RATIO_MAX: u64 = 64;

mod tag {
    pub const DIRECTORY: u8 = 0;
    pub const REGULAR: u8 = 1;
    pub const REGULAR_CHUNKED: u8 = 2;
    pub const SYMLINK: u8 = 3;
    pub const HARDLINK: u8 = 4;
    pub const CHAR_DEVICE: u8 = 5;
    pub const BLOCK_DEVICE: u8 = 6;
    pub const FIFO: u8 = 7;
    pub const WHITEOUT: u8 = 8;
    pub const OPAQUE: u8 = 9;
    pub const HIDDEN: u8 = 10;
    pub const HIDDEN_CHUNKED: u8 = 11;
}

/// Where the next device offset is expected, after a file or chunk.
fn after(device: u64, size: u64) -> u64 {
    device.wrapping_add(size.checked_next_multiple_of(DEVICE_BLOCK).unwrap_or(size))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::decode::{Decoder, decode_body};
    use super::encode::Encoder;
    use crate::toc::{DataLayout, EntryKind, FileData, Metadata, Toc, TocEntry};

    fn compressed(raw: &[u8]) -> Vec<u8> {
        zstd::encode_all(raw, 1).unwrap()
    }

    #[test]
    fn numbers_of_any_size() {
        let values = [0, 1, 127, 128, 16383, 16384, u64::MAX >> 1, u64::MAX];
        let mut encoder = Encoder::default();
        values.iter().for_each(|&value| encoder.number(value));
        values.iter().for_each(|&value| encoder.signed(value as i64));
        let mut decoder = Decoder {
            input: &encoder.out[..],
            path: Vec::new(),
            device: 0,
            device_size: 0,
            pieces: 0,
        };
        assert_eq!(values.map(|_| decoder.number().unwrap()), values);
        assert_eq!(values.map(|_| decoder.signed().unwrap() as u64), values);
        for bad in [&[0xff; 10][..], &[0x80; 11], &[0x80], &[]] {
            decoder.input = bad;
            assert!(decoder.number().is_err());
        }
    }

    #[test]
    fn a_typical_entry_is_small() {
        let entries: Vec<_> = (0..10_000u64)
            .map(|i| TocEntry {
                path: format!("usr/share/doc/package{}/file{i}", i / 10).into_bytes().into(),
                kind: EntryKind::Regular(FileData {
                    size: i % 4096,
                    layout: DataLayout::Flat { device: i * 4096 },
                }),
                meta: Metadata {
                    mode: 0o644,
                    uid: 0,
                    gid: 0,
                    mtime: 1_700_000_000,
                    mtime_nsec: 0,
                },
                xattrs: Vec::new(),
            })
            .collect();
        let mut encoded = Vec::new();
        Toc {
            entries,
            ..Toc::default()
        }
        .encode(&mut encoded)
        .unwrap();
        assert!(encoded.len() < 10_000 * 8, "{}", encoded.len());
    }

    #[test]
    fn bombs_are_small() {
        // Every nine zeros are an entry, and they compress to nothing.
        let mut bomb = compressed(&[0; 9 * 100_000]);
        assert!(decode_body(&bomb, [100_000, 0, 0], 0).is_err());
        assert!(decode_body(&bomb, [10_000_001, 0, 0], 0).is_err());
        bomb.resize((9usize * 100_000).div_ceil(64), 0);
        let toc = decode_body(&bomb, [100_000, 0, 0], 0).unwrap();
        let mut encoded = Vec::new();
        toc.encode(&mut encoded).unwrap();
        assert_eq!(Toc::decode(&encoded), Ok(toc));
        assert!(decode_body(&compressed(b""), [0, 0, 0], 1 << 50).is_err());
        assert!(decode_body(&compressed(b"x"), [0, 0, 0], 0).is_err());
        let twice = [compressed(b""), compressed(b"")].concat();
        assert!(decode_body(&twice, [0, 0, 0], 0).is_err());
        assert!(decode_body(&compressed(b""), [0, 0, 0], 0).is_ok());
    }

    proptest! {
        #[test]
        fn any_body_is_survived(raw in prop::collection::vec(0u8..20, 0..200), counts in [0u32..5, 0u32..5, 0u32..5]) {
            if let Ok(toc) = decode_body(&compressed(&raw), counts, 1 << 30) {
                prop_assert_eq!(toc.entries.len(), counts[0] as usize);
            }
        }
    }
}
