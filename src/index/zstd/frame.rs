//! Headers of frames and blocks (RFC 8878, 3.1.1).

use crate::index::{ZSTD_MAGIC, ZSTD_SKIPPABLE};

/// Most bytes that a block can decode to, and most bytes of its content.
pub(super) const BLOCK: usize = 128 * 1024;
/// Bytes of a block's header.
pub(super) const BLOCK_HEADER: usize = 3;
/// Bytes of the checksum behind the last block.
pub(super) const FRAME_CHECKSUM: usize = 4;

/// What begins a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FrameStart {
    /// More bytes are needed: this many in all.
    Incomplete(usize),
    /// A frame that decodes to nothing: its header has eight bytes, and this many bytes follow.
    Skippable(u32),
    /// A frame of blocks.
    Frame(FrameHeader),
    /// Something else.
    Unknown,
}

/// The header of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FrameHeader {
    /// Length of the header in bytes, with the magic number.
    pub(super) len: usize,
    /// How far back matches can reach.
    pub(super) window: u64,
    /// Size of what the frame decodes to, if the header states it.
    pub(super) content: Option<u64>,
    /// Whether a checksum follows the last block.
    pub(super) checksum: bool,
    /// Whether decoding needs a dictionary.
    pub(super) dictionary: bool,
}

impl FrameStart {
    /// Reads the header at the front of `bytes`.
    pub(super) fn read(bytes: &[u8]) -> Self {
        let Some(magic) = bytes.first_chunk::<4>() else {
            return Self::Incomplete(5);
        };
        let magic = u32::from_le_bytes(*magic);
        if magic & !0xf == ZSTD_SKIPPABLE {
            return match bytes.get(4..8).and_then(|len| len.try_into().ok()) {
                Some(len) => Self::Skippable(u32::from_le_bytes(len)),
                None => Self::Incomplete(8),
            };
        }
        if magic != ZSTD_MAGIC {
            return Self::Unknown;
        }
        let Some(&descriptor) = bytes.get(4) else {
            return Self::Incomplete(5);
        };
        let single = descriptor & 0x20 != 0;
        let dictionary = [0, 1, 2, 4][usize::from(descriptor & 3)];
        let size = match descriptor >> 6 {
            0 => usize::from(single),
            width => 1 << width,
        };
        let window_at = 5;
        let dictionary_at = window_at + usize::from(!single);
        let size_at = dictionary_at + dictionary;
        let len = size_at + size;
        if bytes.len() < len {
            return Self::Incomplete(len);
        }
        let number = |at: usize, len: usize| {
            let bytes = bytes[at..at + len].iter().rev();
            bytes.fold(0u64, |number, &byte| number << 8 | u64::from(byte))
        };
        let content = (size > 0).then(|| number(size_at, size) + if size == 2 { 256 } else { 0 });
        let window = match single {
            true => content.unwrap_or_default(),
            false => window_size(bytes[window_at]),
        };
        Self::Frame(FrameHeader {
            len,
            window,
            content,
            checksum: descriptor & 4 != 0,
            dictionary: dictionary > 0 && number(dictionary_at, dictionary) != 0,
        })
    }
}

/// Returns the size that a window descriptor states.
pub(super) fn window_size(descriptor: u8) -> u64 {
    let base = 1u64 << (10 + (descriptor >> 3));
    base + base / 8 * u64::from(descriptor & 7)
}

/// Returns the descriptor of the smallest window that has at least `size` bytes.
pub(super) fn window_descriptor(size: u64) -> Option<u8> {
    // The sizes rise with the descriptors.
    (0..=u8::MAX).find(|&descriptor| window_size(descriptor) >= size)
}

/// The header of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BlockHeader {
    pub(super) last: bool,
    pub(super) kind: BlockKind,
    /// Bytes of content that follow the header.
    pub(super) content: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BlockKind {
    Raw,
    Rle,
    Compressed,
}

impl BlockHeader {
    /// Reads a header. `None` if no decoder understands it.
    pub(super) fn read(bytes: [u8; BLOCK_HEADER]) -> Option<Self> {
        let [low, middle, high] = bytes;
        let header = u32::from_le_bytes([low, middle, high, 0]);
        let size = (header >> 3) as usize;
        let (kind, content) = match (header >> 1) & 3 {
            0 => (BlockKind::Raw, size),
            1 => (BlockKind::Rle, 1),
            2 => (BlockKind::Compressed, size),
            _ => return None,
        };
        (size <= BLOCK).then_some(Self {
            last: header & 1 == 1,
            kind,
            content,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn window_descriptors() {
        assert_eq!(window_size(0), 1024);
        assert_eq!(window_size(13 << 3), 8 << 20);
        assert_eq!(window_size(1), 1024 + 128);
        assert_eq!(window_descriptor(8 << 20), Some(13 << 3));
        assert_eq!(window_descriptor((8 << 20) + 1), Some(13 << 3 | 1));
        assert_eq!(window_descriptor(0), Some(0));
        assert_eq!(window_descriptor(u64::MAX), None);
    }

    #[test]
    fn headers_of_frames() {
        let content = vec![7; 70_000];
        let frame = zstd::bulk::compress(&content, 1).unwrap();
        let FrameStart::Frame(header) = FrameStart::read(&frame) else {
            panic!()
        };
        assert_eq!(header.content, Some(70_000));
        assert!(!header.checksum && !header.dictionary);
        for cut in 0..header.len {
            let FrameStart::Incomplete(needed) = FrameStart::read(&frame[..cut]) else {
                panic!()
            };
            assert!(cut < needed && needed <= header.len);
        }
        // A window of 1 KiB, a dictionary number of two bytes, a size of two bytes, a checksum.
        let header = FrameStart::read(&[0x28, 0xb5, 0x2f, 0xfd, 0x40 | 4 | 2, 0, 9, 0, 1, 0]);
        assert_eq!(
            header,
            FrameStart::Frame(FrameHeader {
                len: 10,
                window: 1024,
                content: Some(257),
                checksum: true,
                dictionary: true,
            })
        );
        assert_eq!(
            FrameStart::read(&[0x5f, 0x2a, 0x4d, 0x18, 1, 2, 0, 0]),
            FrameStart::Skippable(513)
        );
        assert_eq!(FrameStart::read(b"BZh9"), FrameStart::Unknown);
    }

    #[test]
    fn headers_of_blocks() {
        assert_eq!(
            BlockHeader::read([1 | 1 << 1 | 5 << 3, 0, 0]),
            Some(BlockHeader {
                last: true,
                kind: BlockKind::Rle,
                content: 1
            })
        );
        assert_eq!(BlockHeader::read([3 << 1, 0, 0]), None);
        assert_eq!(BlockHeader::read([0, 0, 0xff]), None);
    }
}
