//! Span index: how to decode a layer from the middle.
//!
//! A compressed layer can be read only from its first byte on. One full pass over it ([`LayerDecoder`]) finds the places where
//! decoding can begin again, the *restarts*, and cuts the tar into *spans*. [`SpanIndexBuilder`] turns that into a
//! [`SpanIndex`], a small file kept beside the layer. With it, any part of the tar is had by fetching the compressed bytes of
//! a few spans ([`SpanIndex::blob_range`]) and decoding these ([`SpanIndex::decoder`]); each span is verified by its digest
//! before it is delivered.
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
//!
//! # Windows are sparse
//! Of a window only those bytes are kept that the 32 KiB of output after the restart read from it; the rest is zero, and the
//! whole is compressed: about 2 KB instead of 32. That is enough for decoding from a restart to the very end of the blob, past
//! any number of other restarts: a reference reaches at most 32 KiB back, so once 32 KiB are decoded none reaches the window
//! any more; and up to there all its reads were recorded when the index was made. A read of what an earlier reference copied
//! out of the window is a read of the output, which is complete.
//!
//! # Invariants
//! Spans are never empty, follow each other without gaps and are at most [`MAX_SPAN`] long; the first one is a restart.
//! Whatever the bytes of a blob or an index file are, decoding them does not panic, and memory is bounded: by the decoder's
//! fixed buffers, one span, and the zstd window limit of 128 MiB. What [`SpanDecoder`] delivers hashes to the digest in the
//! index.

mod builder;
mod codec;
mod decoder;
mod format;
mod gzip;
pub mod inflate;
mod layer;
mod span_index;
mod zstd;

use std::fmt;
use std::ops::Range;

use crate::memory::OverLimit;

pub use builder::{Identity, SpanIndexBuilder};
pub use decoder::SpanDecoder;
pub use layer::{DecodeSink, LayerDecoder, LayerEnd, SpanStart};
pub use span_index::SpanIndex;

pub use self::zstd::Room;
pub(crate) use self::zstd::{ARCHIVE_WINDOW_LOG_MAX as ZSTD_WINDOW_LOG_MAX, WINDOW_TOO_LARGE as ZSTD_WINDOW_TOO_LARGE};

/// Default distance of restarts in bytes of tar. A larger distance makes a cold read slower: at 512 KiB it decodes
/// one span in about a millisecond. A smaller distance makes the index larger. The index of a Debian base layer takes
/// 1.06 % of its gzip -6 blob and 1.2 % of its pigz blob. At 384 KiB it takes 1.3 % and 1.6 %.
pub const SPACING: u64 = 512 * 1024;

/// Longest span: bounds the buffer that holds one until it is verified.
pub const MAX_SPAN: u64 = 1024 * 1024;

/// How a layer's tar is stored in its blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Compression {
    /// Not at all.
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

/// Bits from the start of a blob; within a byte the lowest bit comes first, as in deflate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BitPosition(pub u64);

impl BitPosition {
    /// The byte that the bit lies in.
    pub fn byte(self) -> u64 {
        self.0 / 8
    }

    /// The bit within its byte, 0 being the lowest.
    pub fn bit_in_byte(self) -> u8 {
        (self.0 % 8) as u8
    }

    /// The nearest byte border at or after the bit.
    pub fn next_byte(self) -> Self {
        Self(self.0.next_multiple_of(8))
    }
}

/// Why a layer or an index cannot be decoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IndexError {
    /// Neither gzip nor zstd nor a tar.
    #[error("not a layer: it begins with {prefix}, which is neither gzip nor zstd nor a tar header")]
    UnknownFormat {
        /// The first bytes, in hex.
        prefix: String,
    },
    /// Invalid deflate data.
    #[error("corrupt gzip data near byte {offset}: {source}")]
    Deflate {
        /// Blob offset, near the place.
        offset: u64,
        /// What is wrong.
        source: inflate::DeflateError,
    },
    /// An invalid gzip header or trailer.
    #[error("corrupt gzip data at byte {offset}: {reason}")]
    Gzip {
        /// Blob offset.
        offset: u64,
        /// What is wrong.
        reason: &'static str,
    },
    /// Invalid zstd data.
    #[error("corrupt zstd data after byte {offset}: {reason}")]
    Zstd {
        /// Blob offset up to which the data was decoded.
        offset: u64,
        /// What libzstd says.
        reason: &'static str,
    },
    /// A zstd frame with a window that no decoder takes.
    #[error("zstd frame near byte {offset} needs a window above 2 GiB, which no reader of layers takes")]
    ZstdWindow {
        /// Blob offset in or before the frame.
        offset: u64,
    },
    /// A zstd frame that needs more memory than is allowed.
    #[error("the window of the zstd frame near byte {offset} takes {} MiB, {source}", bytes.div_ceil(1 << 20))]
    ZstdMemory {
        /// Blob offset in or before the frame.
        offset: u64,
        /// What decoding it takes.
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
        /// Bytes there are.
        offset: u64,
    },
    /// More than 2^32 - 1 spans.
    #[error("layer has too many spans: it is larger than an index can describe")]
    TooManySpans,
    /// Events reached the builder out of order.
    #[error("span events are out of order at tar offset {offset}")]
    OutOfOrder {
        /// Tar bytes the builder has seen.
        offset: u64,
    },
    /// The decoded bytes of a span do not hash to its digest.
    #[error("span {span} (tar bytes {}..{}) is corrupt: its content does not match its digest", tar.start, tar.end)]
    SpanCorrupt {
        /// The span.
        span: SpanId,
        /// Its place in the tar.
        tar: Range<u64>,
    },
    /// Decoding was asked to begin at a span that is no restart.
    #[error("decoding cannot begin at span {span}")]
    NotARestart {
        /// The span.
        span: SpanId,
    },
    /// A range of spans that is empty or goes beyond the last one.
    #[error("no spans {first}..={last} in an index of {len} spans")]
    NoSuchSpans {
        /// First span asked for.
        first: SpanId,
        /// Last span asked for.
        last: SpanId,
        /// Spans there are.
        len: usize,
    },
    /// Bytes that are no span index.
    #[error("not a valid span index: {reason}; remove it and it will be made anew")]
    Malformed {
        /// What is wrong.
        reason: &'static str,
    },
    /// A span index of another version of the format.
    #[error("span index has format version {found}, this program knows {known}")]
    Version {
        /// Version in the file.
        found: u32,
        /// Version this program writes and reads.
        known: u32,
    },
}

const GZIP_MAGIC: [u8; 3] = [0x1f, 0x8b, 8];
const ZSTD_MAGIC: u32 = 0xfd2f_b528;
/// The lowest of the sixteen magics of skippable frames (RFC 8878, 3.1.2).
const ZSTD_SKIPPABLE: u32 = 0x184d_2a50;
const TAR_BLOCK: usize = 512;
/// Place of the checksum in a tar header (POSIX pax, ustar).
const TAR_CHECKSUM: Range<usize> = 148..156;

/// Tells a layer's compression from its first bytes. `prefix` should be 512 bytes long, or the whole blob if that is shorter.
///
/// Media types are not asked: layers labelled wrongly are common.
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
    // An empty tar is nothing at all, or zero blocks.
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

/// Whether the checksum of a tar header is right. Old writers summed signed bytes.
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
