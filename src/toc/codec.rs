//! The table of contents in packed form, in memory and as a file.
//!
//! ```text
//!  0  magic "ocifsTOC"
//!  8  version u32 = 3
//! 12  number of entries u32, of extents u32, of warnings u32
//! 24  device size u64
//! 32  length of the body u64
//! 40  body: one zstd frame, then zeros until the body has at least 1/64 of the unpacked length
//!     BLAKE3 of all bytes before, 32 bytes
//!
//! body    = entry* extent* warning*
//! entry   = kind u8, shared, bytes (path: the first `shared` bytes of the previous path, then these bytes),
//!           mode, uid, gid, signed (mtime), nanoseconds, number of xattrs, xattr*, then by kind:
//!           0 directory, 7 fifo, 8 whiteout, 9 opaque: nothing        3 symlink, 4 hard link: bytes (target)
//!           5 character device, 6 block device: major, minor
//!           1 regular, 10 hidden:  size, and unless it is 0: signed (device offset, from the end of the previous file)
//!           2 regular, 11 hidden, in chunks:  size, chunk bits u8, number of chunks,
//!                        (chunks left out, signed (device offset, from the end of the previous chunk))*
//! xattr   = 0, bytes (name), bytes (value): a new attribute, which gets the next number, from 1 on;
//!           or the number of an earlier attribute
//! extent  = tar offset from the end of the previous extent, device offset likewise, length
//! warning = bytes
//! bytes   = length, that many bytes
//! ```
//! The numbers of the head are little-endian. The numbers of the body are LEB128, and `signed` numbers are zigzag
//! encoded. The usual case takes one byte: a file begins in the device where the previous file ended.
//!
//! A table may come from a registry, so the decoder trusts nothing. The decoder reads the body as a stream, so its
//! memory grows with what it has read, not with what the head claims. The decoder checks every invariant of
//! [`Toc`](super::Toc). The decoder refuses a body that unpacks to more than 64 times its length, so that a few bytes
//! cannot become gigabytes of entries. The zeros at the end of the body keep a table that compresses very well within
//! this ratio; tables of real layers need none.

use std::io::{self, Write};

use super::DEVICE_BLOCK;

mod decode;
mod encode;

pub use decode::{AttributeRef, PackedEntry, TocEntries};
pub(super) use encode::Packer;

const MAGIC: &[u8; 8] = b"ocifsTOC";
const VERSION: u32 = 3;
const HEAD: usize = 40;
const HASH: usize = 32;
const WHAT: &str = "table of contents";
/// Most bytes that one byte of the body may unpack to. Tables of real layers stay below 10.
const RATIO_MAX: u64 = 64;

/// A layer's table of contents as bytes: a [`super::Toc`] in a twentieth of the memory.
#[derive(Clone, PartialEq, Eq)]
pub struct PackedToc {
    head: [u8; HEAD],
    body: Vec<u8>,
}

impl std::fmt::Debug for PackedToc {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PackedToc")
            .field("entries", &self.len())
            .field("bytes", &self.bytes())
            .finish_non_exhaustive()
    }
}

impl PackedToc {
    /// Returns the number of entries.
    pub fn len(&self) -> usize {
        self.count(12) as usize
    }

    /// Whether there are no entries.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the length of the data device in bytes, a multiple of [`DEVICE_BLOCK`].
    pub fn device_size(&self) -> u64 {
        u64::from(self.count(24)) | u64::from(self.count(28)) << 32
    }

    /// Returns the memory that the table takes, in bytes.
    pub fn bytes(&self) -> usize {
        HEAD + self.body.len()
    }

    /// Writes the table in the form that [`PackedToc::open`] reads.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        let hash = blake3::Hasher::new().update(&self.head).update(&self.body).finalize();
        out.write_all(&self.head)?;
        out.write_all(&self.body)?;
        out.write_all(hash.as_bytes())
    }

    fn count(&self, at: usize) -> u32 {
        u32_at(&self.head, at)
    }
}

fn u32_at(head: &[u8; HEAD], at: usize) -> u32 {
    u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]])
}

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

/// Returns the expected device offset of the next file or chunk, after one of `size` bytes at `device`.
fn after(device: u64, size: u64) -> u64 {
    device.wrapping_add(size.checked_next_multiple_of(DEVICE_BLOCK).unwrap_or(size))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::decode::TocDecoder;
    use super::encode::Encoder;
    use super::{HEAD, PackedToc};
    use crate::memory::Allowance;
    use crate::toc::{DataLayout, EntryKind, FileData, Metadata, Toc, TocEntry, TocError};

    fn compressed(raw: &[u8]) -> Vec<u8> {
        zstd::encode_all(raw, 1).unwrap()
    }

    fn unpack(body: &[u8], counts: [u32; 3], device_size: u64) -> Result<Toc, TocError> {
        let mut head = [0; HEAD];
        for (at, count) in [12, 16, 20].into_iter().zip(counts) {
            head[at..at + 4].copy_from_slice(&count.to_le_bytes());
        }
        head[24..32].copy_from_slice(&device_size.to_le_bytes());
        let body = body.to_vec();
        PackedToc { head, body }.unpack()
    }

    #[test]
    fn numbers_of_any_size() {
        let values = [0, 1, 127, 128, 16383, 16384, u64::MAX >> 1, u64::MAX];
        let mut encoder = Encoder::default();
        values.iter().for_each(|&value| encoder.number(value));
        values.iter().for_each(|&value| encoder.signed(value as i64));
        let mut decoder = TocDecoder::new(&encoder.out[..], 0);
        assert_eq!(values.map(|_| decoder.number().unwrap()), values);
        assert_eq!(values.map(|_| decoder.signed().unwrap() as u64), values);
        for bad in [&[0xff; 10][..], &[0x80; 11], &[0x80], &[]] {
            assert!(TocDecoder::new(bad, 0).number().is_err());
        }
    }

    fn file(path: String, number: u64) -> TocEntry {
        TocEntry {
            path: path.into_bytes().into(),
            kind: EntryKind::Regular(FileData {
                size: number % 4096,
                layout: DataLayout::Flat { device: number * 4096 },
            }),
            meta: Metadata {
                mode: 0o644,
                uid: 0,
                gid: 0,
                mtime: 1_700_000_000,
                mtime_nsec: 0,
            },
            xattrs: Vec::new(),
        }
    }

    fn table(entries: Vec<TocEntry>) -> Toc {
        Toc {
            entries,
            device_size: 1 << 40,
            ..Toc::default()
        }
    }

    #[test]
    fn a_typical_entry_is_small() {
        let entries = (0..10_000).map(|i| file(format!("usr/share/doc/package{}/file{i}", i / 10), i));
        let packed = table(entries.collect()).pack().unwrap();
        assert!(packed.bytes() < 10_000 * 8, "{}", packed.bytes());
    }

    #[test]
    fn equal_attributes_are_packed_once() {
        let value = |byte: u8| ((*b"user.a").into(), vec![byte; 60_000].into());
        let entries = (0..2000).map(|i| TocEntry {
            xattrs: vec![value(i as u8 % 2)],
            ..file(format!("f{i}"), i)
        });
        let toc = table(entries.collect());
        let packed = toc.pack().unwrap();
        assert!(packed.bytes() < 40_000, "{}", packed.bytes());
        assert_eq!(packed.unpack(), Ok(toc));
    }

    #[test]
    fn bombs_are_small() {
        // Nine zeros encode an entry, and zeros compress to almost nothing.
        let mut bomb = compressed(&[0; 9 * 100_000]);
        assert!(unpack(&bomb, [100_000, 0, 0], 0).is_err());
        assert!(unpack(&bomb, [10_000_001, 0, 0], 0).is_err());
        bomb.resize((9usize * 100_000).div_ceil(64), 0);
        let toc = unpack(&bomb, [100_000, 0, 0], 0).unwrap();
        assert_eq!(toc.pack().unwrap().unpack(), Ok(toc));
        assert!(unpack(&compressed(b""), [0, 0, 0], 1 << 50).is_err());
        assert!(unpack(&compressed(b"x"), [0, 0, 0], 0).is_err());
        let twice = [compressed(b""), compressed(b"")].concat();
        assert!(unpack(&twice, [0, 0, 0], 0).is_err());
        assert!(unpack(&compressed(b""), [0, 0, 0], 0).is_ok());
    }

    #[test]
    fn memory_is_charged_before_it_is_taken() {
        // Each extent takes three bytes of the body, and sixteen times as much in memory.
        let extents = 1_000_000;
        let mut head = [0; HEAD];
        head[16..20].copy_from_slice(&(extents as u32).to_le_bytes());
        head[24..32].copy_from_slice(&(1u64 << 30).to_le_bytes());
        let mut body = compressed(&[0, 0, 1].repeat(extents));
        body.resize((3 * extents).div_ceil(64), 0);
        let packed = PackedToc { head, body };
        let allowance = Allowance::new(16 << 20);
        let refused = packed.extent_table_within(allowance.charge()).unwrap_err();
        assert!(refused.to_string().contains("memory"), "{refused}");
        assert_eq!(allowance.used(), 0);
        assert!(packed.extent_table_within(Allowance::new(64 << 20).charge()).is_ok());
        head[20..24].copy_from_slice(&2000u32.to_le_bytes());
        let body = compressed(&vec![0; 2000]);
        assert!(PackedToc { head, body }.warnings().is_err());
    }

    proptest! {
        #[test]
        fn any_body_is_survived(raw in prop::collection::vec(0u8..20, 0..200), counts in [0u32..5, 0u32..5, 0u32..5]) {
            if let Ok(toc) = unpack(&compressed(&raw), counts, 1 << 30) {
                prop_assert_eq!(toc.entries.len(), counts[0] as usize);
            }
        }
    }
}
