//! The span index file.
//!
//! ```text
//! offset        bytes  all integers little-endian
//! 0             8      magic "ocifspan"
//! 8             4      version, 3
//! 12            2      compression: 0 tar, 1 gzip, 2 zstd
//! 14            2      flags: 1 means that memory was short, so there are fewer restarts than there could be
//! 16            8      size of the blob
//! 24            8      size of the tar
//! 32            8      number of spans, n
//! 40            8      length of the windows, w
//! 48            136    digest of the blob as text, zero-padded
//! 184           136    diffID as text, zero-padded
//! 320           64 n   spans
//! 320 + 64 n    w      windows, each a zstd frame: of gzip the history, of zstd the state of a frame (`zstd::restart`)
//! 320 + 64 n+w  32     BLAKE3 of everything before
//!
//! span: 0       8      offset of its first byte in the tar
//!       8       8      position in the blob, in bits. Restart: where decoding begins. Other span: the end of the bytes
//!                      from which everything before the span is decoded; with zstd, of whole blocks
//!       16      8      offset of its window within the windows
//!       24      4      length of its window; 0 means that it needs none
//!       28      4      flags: 1 means that decoding can begin here
//!       32      32     BLAKE3 of its bytes of the tar
//! ```

use std::io::{self, Write};
use std::ops::Range;

use super::{BitPosition, Compression, IndexError, MAX_SPAN, SpanStart, malformed};
use crate::oci::{DiffId, Digest};

const MAGIC: [u8; 8] = *b"ocifspan";
const VERSION: u32 = 3;
const HEADER: usize = 320;
const ENTRY: usize = 64;
const CHECKSUM: usize = 32;
/// Bytes of a digest as text. The longest, `sha512:` and 128 digits, has 135 bytes.
const DIGEST_TEXT: usize = 136;
const RESTART: u32 = 1;
const SHORT_OF_MEMORY: u16 = 1;

/// The layer that an index describes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Digest of the blob.
    pub blob: Digest,
    /// Size of the blob in bytes.
    pub blob_size: u64,
    /// Digest of the uncompressed tar.
    pub diff_id: DiffId,
}

/// The header of the file, except the counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct IndexHeader {
    pub(super) compression: Compression,
    pub(super) tar_size: u64,
    pub(super) identity: Identity,
    /// Whether there are fewer restarts than there could be, because memory was short.
    pub(super) short_of_memory: bool,
}

/// One span of the index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SpanEntry {
    pub(super) tar_offset: u64,
    pub(super) position: BitPosition,
    /// Range of the compressed window within the windows; empty if the span has no window.
    pub(super) window: Range<u64>,
    pub(super) restart: bool,
    pub(super) digest: [u8; 32],
}

impl SpanEntry {
    pub(super) fn new(start: SpanStart) -> Self {
        Self {
            tar_offset: start.tar_offset,
            position: start.position,
            window: 0..0,
            restart: start.restart,
            digest: [0; 32],
        }
    }
}

/// Writes an index file.
pub(super) fn write(
    header: &IndexHeader,
    entries: &[SpanEntry],
    windows: &[u8],
    out: &mut impl Write,
) -> io::Result<()> {
    let mut hasher = blake3::Hasher::new();
    let mut put = |bytes: &[u8]| {
        hasher.update(bytes);
        out.write_all(bytes)
    };
    put(&header_bytes(header, entries.len(), windows.len()))?;
    for entry in entries {
        put(&entry_bytes(entry))?;
    }
    put(windows)?;
    out.write_all(hasher.finalize().as_bytes())
}

fn header_bytes(header: &IndexHeader, spans: usize, windows: usize) -> [u8; HEADER] {
    let IndexHeader {
        compression,
        tar_size,
        identity,
        short_of_memory,
    } = header;
    let mut bytes = [0; HEADER];
    bytes[0..8].copy_from_slice(&MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    let code: u16 = match compression {
        Compression::Tar => 0,
        Compression::Gzip => 1,
        Compression::Zstd => 2,
    };
    bytes[12..14].copy_from_slice(&code.to_le_bytes());
    let flags = if *short_of_memory { SHORT_OF_MEMORY } else { 0 };
    bytes[14..16].copy_from_slice(&flags.to_le_bytes());
    bytes[16..24].copy_from_slice(&identity.blob_size.to_le_bytes());
    bytes[24..32].copy_from_slice(&tar_size.to_le_bytes());
    bytes[32..40].copy_from_slice(&(spans as u64).to_le_bytes());
    bytes[40..48].copy_from_slice(&(windows as u64).to_le_bytes());
    for (text, at) in [
        (identity.blob.to_string(), 48),
        (identity.diff_id.to_string(), 48 + DIGEST_TEXT),
    ] {
        bytes[at..at + text.len()].copy_from_slice(text.as_bytes());
    }
    bytes
}

fn entry_bytes(entry: &SpanEntry) -> [u8; ENTRY] {
    let mut bytes = [0; ENTRY];
    let length = (entry.window.end - entry.window.start) as u32;
    bytes[0..8].copy_from_slice(&entry.tar_offset.to_le_bytes());
    bytes[8..16].copy_from_slice(&entry.position.0.to_le_bytes());
    bytes[16..24].copy_from_slice(&entry.window.start.to_le_bytes());
    bytes[24..28].copy_from_slice(&length.to_le_bytes());
    bytes[28..32].copy_from_slice(&if entry.restart { RESTART } else { 0 }.to_le_bytes());
    bytes[32..64].copy_from_slice(&entry.digest);
    bytes
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().expect("a slice of two bytes"))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("a slice of four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("a slice of eight bytes"))
}

fn digest_at(bytes: &[u8], at: usize) -> Result<Digest, IndexError> {
    let field = &bytes[at..at + DIGEST_TEXT];
    let text = field.split(|&byte| byte == 0).next().unwrap_or(field);
    let digest = std::str::from_utf8(text).ok().and_then(|text| text.parse().ok());
    digest.ok_or(malformed("a digest is invalid"))
}

/// Splits the file into its parts. Checks what it needs for that, and the checksum.
pub(super) fn parse(bytes: &[u8]) -> Result<(IndexHeader, Vec<SpanEntry>, Range<usize>), IndexError> {
    if bytes.len() < HEADER + CHECKSUM {
        return Err(malformed("it is too short"));
    }
    if bytes[0..8] != MAGIC {
        return Err(malformed("it does not begin with the magic"));
    }
    let version = u32_at(bytes, 8);
    if version != VERSION {
        return Err(IndexError::Version {
            found: version,
            known: VERSION,
        });
    }
    let (content, checksum) = bytes.split_at(bytes.len() - CHECKSUM);
    if blake3::hash(content).as_bytes() != checksum {
        return Err(malformed("its checksum does not match"));
    }
    let compression = match u16_at(bytes, 12) {
        0 => Compression::Tar,
        1 => Compression::Gzip,
        2 => Compression::Zstd,
        _ => return Err(malformed("its compression is unknown")),
    };
    let flags = u16_at(bytes, 14);
    if flags & !SHORT_OF_MEMORY != 0 {
        return Err(malformed("it has unknown flags"));
    }
    let room = (content.len() - HEADER) as u64;
    let table = u64_at(bytes, 32)
        .checked_mul(ENTRY as u64)
        .filter(|&table| table <= room);
    let table = table.ok_or(malformed("it has more spans than bytes"))?;
    if room - table != u64_at(bytes, 40) {
        return Err(malformed("its length does not fit its counts"));
    }
    // The table is at most as long as `room`, which is a length in memory.
    let table_end = HEADER + table as usize;
    let entries = content[HEADER..table_end].chunks_exact(ENTRY).map(parse_entry);
    let header = IndexHeader {
        compression,
        tar_size: u64_at(bytes, 24),
        identity: Identity {
            blob: digest_at(bytes, 48)?,
            blob_size: u64_at(bytes, 16),
            diff_id: DiffId(digest_at(bytes, 48 + DIGEST_TEXT)?),
        },
        short_of_memory: flags & SHORT_OF_MEMORY != 0,
    };
    Ok((header, entries.collect::<Result<_, _>>()?, table_end..content.len()))
}

fn parse_entry(bytes: &[u8]) -> Result<SpanEntry, IndexError> {
    let window = u64_at(bytes, 16);
    let window_end = window.checked_add(u64::from(u32_at(bytes, 24)));
    let flags = u32_at(bytes, 28);
    if flags & !RESTART != 0 {
        return Err(malformed("a span has unknown flags"));
    }
    Ok(SpanEntry {
        tar_offset: u64_at(bytes, 0),
        position: BitPosition(u64_at(bytes, 8)),
        window: window..window_end.ok_or(malformed("a window is out of bounds"))?,
        restart: flags & RESTART != 0,
        digest: bytes[32..64].try_into().expect("a slice of 32 bytes"),
    })
}

/// Checks everything on which the methods of [`super::SpanIndex`] rely.
pub(super) fn validate(header: &IndexHeader, entries: &[SpanEntry], windows: u64) -> Result<(), IndexError> {
    if u32::try_from(entries.len()).is_err() {
        return Err(IndexError::TooManySpans);
    }
    if entries.is_empty() != (header.tar_size == 0) {
        return Err(malformed("its spans do not cover the tar"));
    }
    if entries
        .first()
        .is_some_and(|first| first.tar_offset != 0 || !first.restart)
    {
        return Err(malformed("its first span is not at the start"));
    }
    let ends = entries
        .iter()
        .skip(1)
        .map(|next| next.tar_offset)
        .chain([header.tar_size]);
    if entries
        .iter()
        .zip(ends)
        .any(|(entry, end)| end <= entry.tar_offset || end - entry.tar_offset > MAX_SPAN)
    {
        return Err(malformed("a span is empty, too long or out of order"));
    }
    if entries.windows(2).any(|pair| pair[1].position < pair[0].position)
        || entries
            .iter()
            .any(|entry| entry.position.0.div_ceil(8) > header.identity.blob_size)
    {
        return Err(malformed("a position in the blob is out of order or out of bounds"));
    }
    let whole_bytes = header.compression != Compression::Gzip;
    let windowless = header.compression == Compression::Tar;
    for entry in entries {
        if entry.window.end > windows || (!entry.window.is_empty() && (windowless || !entry.restart)) {
            return Err(malformed("a window is out of bounds or out of place"));
        }
        if entry.position.bit_in_byte() != 0 && whole_bytes {
            return Err(malformed("a position is not at a byte"));
        }
        if header.compression == Compression::Tar && (!entry.restart || entry.position.byte() != entry.tar_offset) {
            return Err(malformed("a position in an uncompressed layer is not its offset"));
        }
    }
    if header.compression == Compression::Tar && header.tar_size != header.identity.blob_size {
        return Err(malformed("an uncompressed layer has two sizes"));
    }
    Ok(())
}
