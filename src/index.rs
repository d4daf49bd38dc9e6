//! Span index: how to decode a layer from the middle.
//!
//! # How it works
//! A compressed layer can be read only from its first byte on. One full pass over the layer ([`LayerDecoder`]) finds
//! the *restarts*, the places where decoding can begin again. The pass also cuts the tar into *spans*.
//! [`SpanIndexBuilder`] makes a [`SpanIndex`] from both, a small file that is kept beside the layer.
//!
//! With the index, a reader can get any part of the tar. The reader fetches the compressed bytes of a few spans
//! ([`SpanIndex::blob_range`]) and decodes them ([`SpanIndex::decoder`]). The decoder verifies each span by its
//! digest before it delivers the span.
//!
//! ```text
//! first pass   blob bytes -> LayerDecoder --+-- span, bytes, window --> SpanIndexBuilder -> SpanIndex -> file
//! later reads  file -> SpanIndex -> blob_range -> ranged GET -> SpanDecoder -> verified spans
//! ```
//!
//! | layer | restart | what a restart needs |
//! |---|---|---|
//! | uncompressed | every span | nothing |
//! | gzip | a deflate block ([`inflate`]) | its bit position and the *window*: the 32 KiB of tar before it |
//! | zstd | a frame | its byte position |
//! | zstd | a block inside a frame (`zstd`) | its byte position, tables and offsets, and the parts of the window that are read |
//!
//! # Windows are sparse
//! The index keeps only those bytes of a window that the output after the restart reads from it. The other bytes are
//! zero, and the window is compressed. A gzip window then takes about 2 KB instead of 32.
//!
//! A zstd window has 2 to 8 MiB, and some 50 KB of it are read. So inside a zstd frame, not every block where decoding
//! could begin is a restart. The pass chooses those that need little, and as many as keep the index below 1.5 % of the
//! blob. A restart keeps only the bytes behind the restart before it. The others are those of the restarts before it.
//!
//! A sparse window is enough to decode from its restart to the end of the blob, past any number of other restarts. A gzip
//! back-reference reaches at most 32 KiB back, so no reference behind the first 32 KiB of output reads the window.
//! The first pass recorded all window reads of these first 32 KiB. A later reference may read bytes that an earlier
//! one copied from the window. The later reference then reads the output, which is complete.
//!
//! # Invariants
//! - Spans are never empty, follow each other without gaps and are at most [`MAX_SPAN`] long. The first span is a
//!   restart.
//! - No bytes of a blob or an index file make decoding panic.
//! - Memory of decoding is bounded by the decoder's fixed buffers, one span, and the zstd windows that [`Room`]
//!   allows.
//! - The index of a layer depends on nothing but the blob, and on whether there was memory to find zstd restarts.
//! - Everything that [`SpanDecoder`] delivers matches the digest in the index.

mod builder;
mod codec;
mod decoder;
mod format;
mod gzip;
pub mod inflate;
mod layer;
mod member;
mod span_index;
mod step;
mod zstd;

use std::fmt;
use std::ops::Range;

use crate::memory::OverLimit;

pub use builder::SpanIndexBuilder;
pub use decoder::SpanDecoder;
pub use format::Identity;
pub use layer::{DecodeSink, LayerDecoder, LayerEnd, SpanStart};
pub(crate) use member::MemberDecoder;
pub use span_index::SpanIndex;

pub use self::zstd::Room;
pub(crate) use self::zstd::{ARCHIVE_WINDOW_LOG_MAX as ZSTD_WINDOW_LOG_MAX, WINDOW_TOO_LARGE as ZSTD_WINDOW_TOO_LARGE};

/// Default distance of restarts in bytes of tar. A larger distance makes a cold read slower: at 512 KiB it decodes
/// one span in about a millisecond. A smaller distance makes the index larger. The index of a Debian base layer takes
/// 1.06 % of its gzip -6 blob and 1.2 % of its pigz blob. At 384 KiB it takes 1.3 % and 1.6 %.
pub const SPACING: u64 = 512 * 1024;

/// Longest span in bytes, which bounds the buffer that holds a span until the span is verified.
pub const MAX_SPAN: u64 = 1024 * 1024;

/// How a layer's tar is stored in its blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Compression {
    /// Uncompressed.
    Tar,
    /// A gzip stream of any number of members (RFC 1952).
    Gzip,
    /// A zstd stream of any number of frames (RFC 8878).
    Zstd,
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tar => "tar",
            Self::Gzip => "tar+gzip",
            Self::Zstd => "tar+zstd",
        })
    }
}

/// Number of a span within its layer, from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpanId(pub u32);

impl fmt::Display for SpanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A position in a blob, in bits from its start. Within a byte the lowest bit comes first, as in deflate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BitPosition(pub u64);

impl BitPosition {
    /// Returns the byte that contains the bit.
    pub fn byte(self) -> u64 {
        self.0 / 8
    }

    /// Returns the position of the bit within its byte; 0 is the lowest bit.
    pub fn bit_in_byte(self) -> u8 {
        (self.0 % 8) as u8
    }

    /// Returns the nearest byte boundary at or after the bit.
    pub fn next_byte(self) -> Self {
        Self(self.0.next_multiple_of(8))
    }
}

/// Why a layer or an index cannot be decoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IndexError {
    /// A blob that is neither gzip nor zstd nor a tar.
    #[error("not a layer: it begins with {prefix}, which is neither gzip nor zstd nor a tar header")]
    UnknownFormat {
        /// The first bytes, in hex.
        prefix: String,
    },
    /// Invalid deflate data.
    #[error("corrupt gzip data near byte {offset}: {source}")]
    Deflate {
        /// Offset in the blob, near the invalid data.
        offset: u64,
        /// What is wrong with the data.
        source: inflate::DeflateError,
    },
    /// An invalid gzip header or trailer.
    #[error("corrupt gzip data at byte {offset}: {reason}")]
    Gzip {
        /// Offset in the blob.
        offset: u64,
        /// What is wrong with the header or trailer.
        reason: &'static str,
    },
    /// Invalid zstd data.
    #[error("corrupt zstd data after byte {offset}: {reason}")]
    Zstd {
        /// Offset in the blob up to which the data was decoded.
        offset: u64,
        /// What libzstd reports.
        reason: &'static str,
    },
    /// A zstd frame whose window is larger than any decoder accepts.
    #[error("zstd frame near byte {offset} needs a window above 2 GiB, which no reader of layers takes")]
    ZstdWindow {
        /// Offset in the blob, in or before the frame.
        offset: u64,
    },
    /// A zstd frame that needs more memory than is allowed.
    #[error("the window of the zstd frame near byte {offset} takes {} MiB, {source}", bytes.div_ceil(1 << 20))]
    ZstdMemory {
        /// Offset in the blob, in or before the frame.
        offset: u64,
        /// Memory in bytes that decoding the frame may take.
        bytes: u64,
        /// The limit.
        source: OverLimit,
    },
    /// There is no memory for the state of libzstd.
    #[error("out of memory for a zstd context")]
    OutOfMemory,
    /// The blob ends in the middle of its content.
    #[error("compressed layer is cut off at byte {offset}")]
    Truncated {
        /// Size of the blob in bytes.
        offset: u64,
    },
    /// More than 2^32 - 1 spans.
    #[error("layer has too many spans: it is larger than an index can describe")]
    TooManySpans,
    /// Events that reached the builder in the wrong order.
    #[error("span events are out of order at tar offset {offset}")]
    OutOfOrder {
        /// Tar bytes that the builder has seen.
        offset: u64,
    },
    /// A span whose decoded bytes do not match its digest.
    #[error("span {span} (tar bytes {}..{}) is corrupt: its content does not match its digest", tar.start, tar.end)]
    SpanCorrupt {
        /// The span.
        span: SpanId,
        /// Range of the span in the tar.
        tar: Range<u64>,
    },
    /// A chunk whose decoded bytes do not match the digest that the layer's own table has of it.
    #[error("span {span} (device bytes {}..{}) is corrupt: its content does not match its digest", device.start, device.end)]
    ChunkCorrupt {
        /// The span that is made of the chunk.
        span: SpanId,
        /// Range of the chunk in the data device.
        device: Range<u64>,
    },
    /// A caller asked to begin decoding at a span that is no restart.
    #[error("decoding cannot begin at span {span}")]
    NotARestart {
        /// The span.
        span: SpanId,
    },
    /// A range of spans that is empty or goes beyond the last span.
    #[error("no spans {first}..={last} in an index of {len} spans")]
    NoSuchSpans {
        /// First span of the range.
        first: SpanId,
        /// Last span of the range.
        last: SpanId,
        /// Number of spans in the index.
        len: usize,
    },
    /// Bytes that are not a valid span index.
    #[error("not a valid span index: {reason}; remove it and it will be made anew")]
    Malformed {
        /// What is wrong with the bytes.
        reason: &'static str,
    },
    /// A span index with another version of the format.
    #[error("span index has format version {found}, this program knows {known}")]
    Version {
        /// Version that the file states.
        found: u32,
        /// Version that this program writes and reads.
        known: u32,
    },
}

/// Makes the error of an index with invalid bytes.
fn malformed(reason: &'static str) -> IndexError {
    IndexError::Malformed { reason }
}

const GZIP_MAGIC: [u8; 3] = [0x1f, 0x8b, 8];
const ZSTD_MAGIC: u32 = 0xfd2f_b528;
/// Lowest of the sixteen magic numbers of skippable frames (RFC 8878, 3.1.2).
const ZSTD_SKIPPABLE: u32 = 0x184d_2a50;
const TAR_BLOCK: usize = 512;
/// Bytes of the checksum in a tar header (POSIX pax, ustar).
const TAR_CHECKSUM: Range<usize> = 148..156;

/// Finds out a layer's compression from its first bytes. `prefix` should have 512 bytes, or be the whole blob if that
/// is shorter.
///
/// The media type plays no role, because wrongly labelled layers are common.
pub fn sniff(prefix: &[u8]) -> Result<Compression, IndexError> {
    if prefix.starts_with(&GZIP_MAGIC) {
        return Ok(Compression::Gzip);
    }
    if let Some(magic) = prefix.first_chunk().map(|bytes| u32::from_le_bytes(*bytes))
        && (magic == ZSTD_MAGIC || magic & !0xf == ZSTD_SKIPPABLE)
    {
        return Ok(Compression::Zstd);
    }
    let block = &prefix[..prefix.len().min(TAR_BLOCK)];
    // An empty tar has no bytes at all, or only zero blocks.
    let zeros = block.iter().all(|&byte| byte == 0) && (block.is_empty() || block.len() == TAR_BLOCK);
    if zeros || is_tar_header(block) {
        return Ok(Compression::Tar);
    }
    Err(IndexError::UnknownFormat {
        prefix: if prefix.is_empty() {
            "nothing".into()
        } else {
            hex(&prefix[..prefix.len().min(16)])
        },
    })
}

fn hex(bytes: &[u8]) -> String {
    use fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a String cannot fail");
        text
    })
}

/// Whether the checksum of a tar header is valid. Old writers summed signed bytes, so both sums are valid.
fn is_tar_header(block: &[u8]) -> bool {
    if block.len() < TAR_BLOCK {
        return false;
    }
    let text = block[TAR_CHECKSUM].iter().skip_while(|&&byte| byte == b' ');
    let digits = text.take_while(|byte| (b'0'..=b'7').contains(*byte));
    let Some(checksum) = digits.fold(None, |sum: Option<i64>, digit| {
        Some(sum.unwrap_or(0) * 8 + i64::from(digit - b'0'))
    }) else {
        return false;
    };
    let others = block[..TAR_CHECKSUM.start].iter().chain(&block[TAR_CHECKSUM.end..]);
    // The checksum field itself counts as spaces.
    let spaces = 8 * i64::from(b' ');
    let (unsigned, signed) = others.fold((spaces, spaces), |(unsigned, signed), &byte| {
        (unsigned + i64::from(byte), signed + i64::from(byte as i8))
    });
    checksum == unsigned || checksum == signed
}
