//! The index of one layer as one file.
//!
//! ```text
//!  0  magic "ocifsidx"
//!  8  version u32 = 1, then u32 = 0
//! 16  size of the blob u64
//! 24  lengths u64 of: spans, table of contents, programs
//! 48  length u8 and text of the digest of the blob, then of the diffID
//!     spans              as crate::index writes them
//!     table of contents  as crate::toc writes it
//!     programs           one zstd frame: what the programs of the layer need, a hint; empty if nobody looked
//!     BLAKE3 of all bytes before, 32 bytes
//! ```
//! All numbers are little-endian. The extents are made from the table. The checksum finds damage on the way; it says
//! nothing about who wrote the file. The file follows from the layer and the version of ocifs alone, byte for byte.

use std::io::Read as _;

use super::PublishedError;
use crate::oci::{DiffId, Digest};

const MAGIC: &[u8; 8] = b"ocifsidx";
const VERSION: u32 = 1;
const HEAD: usize = 48;
const HASH: usize = 32;
/// Most bytes of an unpacked list of programs. [`crate::layer`] notes fewer.
const MOST_PROGRAMS: u64 = 32 << 20;
/// Level of zstd for the programs. They are a few kilobytes, so a high level takes no time.
const LEVEL: i32 = 19;

/// The index of one layer. Its parts are bytes that other modules check when they read them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IndexFile {
    /// Digest of the layer's blob.
    pub layer: Digest,
    /// Size of the blob in bytes.
    pub size: u64,
    /// Digest of the layer's tar.
    pub diff_id: DiffId,
    /// The span index.
    pub spans: Vec<u8>,
    /// The packed table of contents.
    pub toc: Vec<u8>,
    /// What the programs of the layer need, as JSON; empty if nobody looked.
    pub programs: Vec<u8>,
}

impl IndexFile {
    /// Returns the longest file that may be used as the index of a layer of `size` bytes. Real ones have one or two
    /// hundredths of the layer's size, and layers of many empty files have a larger part of it. A longer file is fetched by
    /// no host, because hosts keep the whole file in memory before they believe it.
    pub fn longest(size: u64) -> usize {
        const MORE: u64 = 1 << 20;
        const USUAL: u64 = 64 << 20;
        let part = (size / 100 * 3).clamp(USUAL, Self::MOST);
        usize::try_from(size.saturating_add(MORE).min(part)).unwrap_or(usize::MAX)
    }

    /// The longest file that may be used, whatever the layer.
    pub const MOST: u64 = 256 << 20;

    /// Returns the bytes of the file.
    pub fn encode(&self) -> Vec<u8> {
        let programs = match self.programs.is_empty() {
            true => Vec::new(),
            // Compressing into memory fails only without memory.
            false => zstd::bulk::compress(&self.programs, LEVEL).unwrap_or_default(),
        };
        let mut bytes = Vec::with_capacity(HEAD + self.spans.len() + self.toc.len() + programs.len() + 512);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&self.size.to_le_bytes());
        for part in [&self.spans, &self.toc, &programs] {
            bytes.extend_from_slice(&(part.len() as u64).to_le_bytes());
        }
        for digest in [&self.layer, &self.diff_id.0] {
            let text = digest.to_string();
            // The longest digest has 135 characters.
            bytes.push(text.len() as u8);
            bytes.extend_from_slice(text.as_bytes());
        }
        for part in [&self.spans, &self.toc, &programs] {
            bytes.extend_from_slice(part);
        }
        let hash = blake3::hash(&bytes);
        bytes.extend_from_slice(hash.as_bytes());
        bytes
    }

    /// Reads a file that should be the index of `layer`, a blob of `size` bytes. `name` names the file in errors.
    pub fn decode(name: &str, bytes: &[u8], layer: &Digest, size: u64) -> Result<Self, PublishedError> {
        let wrong = |reason: &str| PublishedError::format(name, reason);
        let head = bytes.first_chunk::<HEAD>().ok_or_else(|| wrong("it is cut short"))?;
        if &head[..8] != MAGIC {
            return Err(wrong("it does not begin like one"));
        }
        let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| head[at + i]));
        let version = number(8);
        if version != u64::from(VERSION) {
            let other = format!("it has version {version}, and this ocifs reads version {VERSION}");
            return Err(wrong(&other));
        }
        let content = bytes.len().checked_sub(HASH).filter(|&end| end >= HEAD);
        let (content, hash) = bytes.split_at(content.ok_or_else(|| wrong("it is cut short"))?);
        if blake3::hash(content).as_bytes() != hash {
            return Err(wrong("its checksum does not match"));
        }
        let mut rest = &content[HEAD..];
        let mut digest = || {
            let (&length, after) = rest.split_first()?;
            let (text, after) = after.split_at_checked(length.into())?;
            rest = after;
            std::str::from_utf8(text).ok()?.parse::<Digest>().ok()
        };
        let (Some(of), Some(diff_id)) = (digest(), digest()) else {
            return Err(wrong("its digests cannot be read"));
        };
        if of != *layer || number(16) != size {
            return Err(wrong("it is of another layer"));
        }
        let mut part = |length: u64| {
            let (part, after) = rest.split_at_checked(usize::try_from(length).ok()?)?;
            rest = after;
            Some(part)
        };
        let parts = [24, 32, 40].map(|at| part(number(at)));
        let [Some(spans), Some(toc), Some(programs)] = parts else {
            return Err(wrong("its parts are longer than the file"));
        };
        if !rest.is_empty() {
            return Err(wrong("it is longer than its parts"));
        }
        Ok(Self {
            layer: of,
            size,
            diff_id: DiffId(diff_id),
            spans: spans.to_vec(),
            toc: toc.to_vec(),
            programs: unpacked(programs).ok_or_else(|| wrong("its list of programs cannot be unpacked"))?,
        })
    }
}

/// Unpacks the list of programs. None if it cannot be unpacked, or is too long.
fn unpacked(frame: &[u8]) -> Option<Vec<u8>> {
    let mut programs = Vec::new();
    if !frame.is_empty() {
        let mut decoder = zstd::Decoder::with_buffer(frame).ok()?.single_frame();
        decoder.window_log_max(25).ok()?;
        let most = MOST_PROGRAMS.min(1000 * frame.len() as u64);
        decoder.take(most + 1).read_to_end(&mut programs).ok()?;
        if programs.len() as u64 > most {
            return None;
        }
    }
    Some(programs)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample() -> IndexFile {
        IndexFile {
            layer: Digest::of(b"blob"),
            size: 4,
            diff_id: DiffId(Digest::of(b"tar")),
            spans: b"spans".to_vec(),
            toc: b"toc".to_vec(),
            programs: b"{}".to_vec(),
        }
    }

    #[test]
    fn a_file_is_read_as_it_was_written() {
        let file = sample();
        let read = IndexFile::decode("x", &file.encode(), &file.layer, 4);
        assert_eq!(read.unwrap(), file);
    }

    #[test]
    fn every_damaged_byte_is_noticed() {
        let file = sample();
        let bytes = file.encode();
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x20;
            assert!(IndexFile::decode("x", &damaged, &file.layer, 4).is_err(), "{at}");
            assert!(IndexFile::decode("x", &bytes[..at], &file.layer, 4).is_err(), "{at}");
        }
    }

    #[test]
    fn the_index_of_another_layer_is_refused() {
        let file = sample();
        let bytes = file.encode();
        let other = IndexFile::decode("x", &bytes, &Digest::of(b"other"), 4).unwrap_err();
        assert_eq!(other.to_string(), "x is no usable index: it is of another layer");
        assert!(IndexFile::decode("x", &bytes, &file.layer, 5).is_err());
    }

    #[test]
    fn the_longest_file_grows_with_the_layer_up_to_a_bound() {
        assert_eq!(IndexFile::longest(0), 1 << 20);
        assert_eq!(IndexFile::longest(1 << 30), 64 << 20);
        assert_eq!(IndexFile::longest(5000 << 20), 150 << 20);
        assert_eq!(IndexFile::longest(u64::MAX), 256 << 20);
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(tail in prop::collection::vec(any::<u8>(), 0..200), lengths in any::<[u64; 3]>()) {
            let mut bytes = MAGIC.to_vec();
            bytes.extend_from_slice(&[1, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0]);
            lengths.iter().for_each(|length| bytes.extend_from_slice(&length.to_le_bytes()));
            bytes.extend_from_slice(&tail);
            let hash = blake3::hash(&bytes);
            bytes.extend_from_slice(hash.as_bytes());
            prop_assert!(IndexFile::decode("x", &bytes, &Digest::of(b"blob"), 4).is_err());
        }
    }
}
