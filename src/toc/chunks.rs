//! The chunk table: which bytes of a blob hold which content, as the writer of the layer recorded it.
//!
//! A *chunk* is a run of a file's content with a digest of its own. Its bytes are somewhere in the output of one gzip
//! member or zstd frame. Small files may share a member.
//!
//! ```text
//! blob      ──┤ member ├───┤ member          ├───┤ member ├──     what is between is not needed
//!               │              │         │           │
//! chunks        0              1         2           3            each from `inner` on in its member's output
//!               │              │         │           │
//! device    ──┤ file ├─────┤ file ├──┤ file     ┆    ├──          addresses of readers
//! ```
//! A run of zeros may have no chunk at all. The device reads as zeros there.
//!
//! As a file:
//! ```text
//!  0  magic "ocifsCHK"
//!  8  version u32 = 1, compression u32: 1 gzip, 2 zstd
//! 16  number of chunks u64
//! 24  device size u64
//! 32  blob size u64
//! 40  end of the content that the writer recommends to fetch first u64
//! 48  source, 32 bytes: what vouches for the table (see [`TableRef::source`](crate::toc::carried::TableRef::source))
//! 80  chunks, 68 bytes each: device offset u64, first and last + 1 byte of the member in the blob u64 twice,
//!     offset in the member's output u64, length u32, SHA-256 of the content
//!     BLAKE3 of all bytes before, 32 bytes
//! ```
//! All numbers are little-endian.
//!
//! Invariants:
//! - Chunks ascend in the device and in the blob at the same time, and do not overlap in either.
//! - A chunk has 1 to [`MAX_CHUNK`] bytes.
//! - Two chunks have either the same member or members that do not overlap.

use std::io::{self, Write};
use std::ops::Range;

use super::TocError;

const MAGIC: &[u8; 8] = b"ocifsCHK";
const VERSION: u32 = 1;
const HEAD: usize = 80;
const RECORD: usize = 68;
const HASH: usize = 32;
const WHAT: &str = "chunk table";

/// Longest chunk in bytes. Usual writers make chunks of at most 4 MiB. A larger limit takes more memory for a chunk
/// whose digest is not checked yet.
pub const MAX_CHUNK: u64 = 16 << 20;

/// How the members of a blob are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ChunkCodec {
    /// Each member is one of gzip.
    Gzip,
    /// Each member is a frame of zstd.
    Zstd,
}

/// A run of a file's content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// Offset in the data device.
    pub device: u64,
    /// The bytes of the blob that have the chunk's member. Other members may follow in the range.
    pub member: Range<u64>,
    /// Offset in the output of the member.
    pub inner: u64,
    /// Length in bytes, 1 to [`MAX_CHUNK`].
    pub len: u32,
    /// SHA-256 of the content.
    pub digest: [u8; 32],
}

impl Chunk {
    /// Returns the addresses of the chunk in the data device.
    pub fn range(&self) -> Range<u64> {
        self.device..self.device + u64::from(self.len)
    }
}

/// The chunks of one layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChunkTable {
    pub(super) chunks: Vec<Chunk>,
    pub(super) codec: ChunkCodec,
    pub(super) device_size: u64,
    pub(super) blob_size: u64,
    pub(super) first: u64,
    pub(super) source: [u8; 32],
}

impl ChunkTable {
    /// Reads a table that [`ChunkTable::write`] wrote, and checks it.
    pub fn open(bytes: &[u8]) -> Result<Self, TocError> {
        let head = bytes.first_chunk::<HEAD>().ok_or(TocError::Format { what: WHAT })?;
        if &head[..8] != MAGIC || head[8..12] != VERSION.to_le_bytes() {
            return Err(TocError::Format { what: WHAT });
        }
        let corrupt = |reason| TocError::Corrupt { what: WHAT, reason };
        let codec = match u32_at(head, 12) {
            1 => ChunkCodec::Gzip,
            2 => ChunkCodec::Zstd,
            _ => return Err(TocError::Format { what: WHAT }),
        };
        let records = (bytes.len() - HEAD).checked_sub(HASH);
        let records = records.ok_or_else(|| corrupt("it is cut short"))?;
        if records % RECORD != 0 || u64_at(head, 16) != (records / RECORD) as u64 {
            return Err(corrupt("its length does not match the number of chunks"));
        }
        let (content, hash) = bytes.split_at(HEAD + records);
        if blake3::hash(content).as_bytes() != hash {
            return Err(corrupt("its checksum does not match"));
        }
        let mut source = [0; 32];
        source.copy_from_slice(&head[48..]);
        let table = Self {
            chunks: content[HEAD..].chunks_exact(RECORD).map(decode).collect(),
            codec,
            device_size: u64_at(head, 24),
            blob_size: u64_at(head, 32),
            first: u64_at(head, 40),
            source,
        };
        table.check().map_err(corrupt)?;
        Ok(table)
    }

    /// Whether `bytes` begin like a table that [`ChunkTable::write`] wrote.
    pub fn is_table(bytes: &[u8]) -> bool {
        bytes.starts_with(MAGIC)
    }

    /// Writes the table in the form that [`ChunkTable::open`] reads.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        let mut hasher = blake3::Hasher::new();
        let mut put = |bytes: &[u8]| {
            hasher.update(bytes);
            out.write_all(bytes)
        };
        put(MAGIC)?;
        put(&VERSION.to_le_bytes())?;
        let codec: u32 = match self.codec {
            ChunkCodec::Gzip => 1,
            ChunkCodec::Zstd => 2,
        };
        put(&codec.to_le_bytes())?;
        for number in [self.chunks.len() as u64, self.device_size, self.blob_size, self.first] {
            put(&number.to_le_bytes())?;
        }
        put(&self.source)?;
        for chunk in &self.chunks {
            put(&encode(chunk))?;
        }
        out.write_all(hasher.finalize().as_bytes())
    }

    /// Returns what is wrong with the table, if anything is.
    pub(super) fn check(&self) -> Result<(), &'static str> {
        if u32::try_from(self.chunks.len()).is_err() {
            return Err("it has too many chunks");
        }
        if self.first > self.device_size {
            return Err("it recommends content behind the end of the device");
        }
        let mut before: Option<&Chunk> = None;
        for chunk in &self.chunks {
            let (len, member) = (u64::from(chunk.len), &chunk.member);
            if len == 0 || len > MAX_CHUNK {
                return Err("a chunk is empty or too long");
            }
            let end = chunk.device.checked_add(len);
            if end.is_none_or(|end| end > self.device_size) {
                return Err("a chunk ends behind the device");
            }
            if member.is_empty() || member.end > self.blob_size || chunk.inner.checked_add(len).is_none() {
                return Err("a chunk is outside the blob");
            }
            if let Some(before) = before {
                let same = before.member == *member && chunk.inner >= before.inner + u64::from(before.len);
                if chunk.device < before.range().end || !same && member.start < before.member.end {
                    return Err("its chunks overlap or are out of order");
                }
            }
            before = Some(chunk);
        }
        Ok(())
    }

    /// Returns the chunks in order.
    pub fn chunks(&self) -> &[Chunk] {
        &self.chunks
    }

    /// Returns how the members are compressed.
    pub fn codec(&self) -> ChunkCodec {
        self.codec
    }

    /// Returns the bytes of the data device.
    pub fn device_size(&self) -> u64 {
        self.device_size
    }

    /// Returns the bytes of the blob.
    pub fn blob_size(&self) -> u64 {
        self.blob_size
    }

    /// Returns the content that the writer of the layer recommends to fetch first: the device up to this address.
    pub fn first(&self) -> u64 {
        self.first
    }

    /// Returns the source that vouches for the table (see [`TableRef::source`](crate::toc::carried::TableRef::source)).
    pub fn source(&self) -> &[u8; 32] {
        &self.source
    }

    /// Returns the memory that the table takes, in bytes.
    pub fn bytes(&self) -> u64 {
        size_of_val(&*self.chunks) as u64
    }
}

fn encode(chunk: &Chunk) -> [u8; RECORD] {
    let mut record = [0; RECORD];
    let numbers = [chunk.device, chunk.member.start, chunk.member.end, chunk.inner];
    for (place, number) in record.chunks_exact_mut(8).zip(numbers) {
        place.copy_from_slice(&number.to_le_bytes());
    }
    record[32..36].copy_from_slice(&chunk.len.to_le_bytes());
    record[36..].copy_from_slice(&chunk.digest);
    record
}

fn decode(record: &[u8]) -> Chunk {
    let mut digest = [0; 32];
    digest.copy_from_slice(&record[36..]);
    Chunk {
        device: u64_at(record, 0),
        member: u64_at(record, 8)..u64_at(record, 16),
        inner: u64_at(record, 24),
        len: u32_at(record, 32),
        digest,
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut number = [0; 4];
    number.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(number)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut number = [0; 8];
    number.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(device: u64, member: Range<u64>, inner: u64, len: u32) -> Chunk {
        Chunk {
            device,
            member,
            inner,
            len,
            digest: [len as u8; 32],
        }
    }

    fn table(chunks: Vec<Chunk>) -> ChunkTable {
        ChunkTable {
            chunks,
            codec: ChunkCodec::Zstd,
            device_size: 1 << 20,
            blob_size: 1000,
            first: 4096,
            source: [7; 32],
        }
    }

    #[test]
    fn a_table_survives_its_file_and_damage_is_noticed() {
        let table = table(vec![
            chunk(0, 0..100, 512, 10),
            chunk(4096, 0..100, 522, 10),
            chunk(8192, 200..300, 0, 1 << 16),
        ]);
        let mut file = Vec::new();
        table.write(&mut file).unwrap();
        assert_eq!(ChunkTable::open(&file).unwrap(), table);
        for at in 0..file.len() {
            let mut damaged = file.clone();
            damaged[at] ^= 4;
            assert!(ChunkTable::open(&damaged).is_err(), "{at}");
            assert!(ChunkTable::open(&file[..at]).is_err(), "{at}");
        }
    }

    #[test]
    fn impossible_chunks_are_refused() {
        let good = chunk(4096, 100..200, 0, 4096);
        assert_eq!(table(vec![good.clone()]).check(), Ok(()));
        let cases = [
            vec![chunk(0, 0..10, 0, 0)],
            vec![chunk(0, 0..10, 0, MAX_CHUNK as u32 + 1)],
            vec![chunk(1 << 20, 0..10, 0, 1)],
            vec![chunk(u64::MAX, 0..10, 0, 1)],
            vec![chunk(0, 10..10, 0, 1)],
            vec![chunk(0, 10..1001, 0, 1)],
            vec![chunk(0, 10..20, u64::MAX, 1)],
            vec![good.clone(), chunk(8191, 300..400, 0, 1)],
            vec![good.clone(), chunk(8192, 199..400, 0, 1)],
            vec![good.clone(), chunk(8192, 100..200, 4095, 1)],
            vec![good.clone(), chunk(8192, 100..201, 4096, 1)],
        ];
        for chunks in cases {
            assert!(table(chunks.clone()).check().is_err(), "{chunks:?}");
        }
    }
}
