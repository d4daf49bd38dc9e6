//! The literals section of a compressed block (RFC 8878, 3.1.1.3.1). Only its sizes and the description of its Huffman
//! table matter here; the literals themselves are not decoded.

use std::ops::Range;

/// What is known of a literals section without decoding it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Literals {
    /// Number of literals that it decodes to.
    pub(super) decoded: usize,
    /// Where the description of a new Huffman table lies in the block.
    pub(super) huffman: Option<Range<usize>>,
    /// Length of the section in bytes.
    pub(super) len: usize,
}

impl Literals {
    /// Reads the section at the front of a block's content.
    pub(super) fn read(block: &[u8]) -> Option<Self> {
        let head = block
            .iter()
            .take(5)
            .rev()
            .fold(0u64, |head, &byte| head << 8 | u64::from(byte));
        let (kind, format) = (head & 3, (head >> 2) & 3);
        let literals = match kind {
            0 | 1 => {
                let (header, decoded) = match format {
                    0 | 2 => (1, (head >> 3) & 0x1f),
                    1 => (2, (head >> 4) & 0xfff),
                    _ => (3, (head >> 4) & 0xf_ffff),
                };
                let decoded = decoded as usize;
                let content = if kind == 0 { decoded } else { 1 };
                Self {
                    decoded,
                    huffman: None,
                    len: header + content,
                }
            }
            _ => {
                let (header, width) = match format {
                    0 | 1 => (3, 10),
                    2 => (4, 14),
                    _ => (5, 18),
                };
                let mask = (1 << width) - 1;
                let decoded = ((head >> 4) & mask) as usize;
                let content = ((head >> (4 + width)) & mask) as usize;
                let len = header + content;
                let huffman = match kind {
                    2 => {
                        let description = huffman_len(*block.get(header)?);
                        (description <= content).then_some(header..header + description)?.into()
                    }
                    _ => None,
                };
                Self { decoded, huffman, len }
            }
        };
        (literals.len <= block.len()).then_some(literals)
    }
}

/// Returns the length of a Huffman table's description from its first byte (RFC 8878, 4.2.1).
pub(super) fn huffman_len(first: u8) -> usize {
    let first = usize::from(first);
    // From 128 on, the byte counts weights of four bits each. Below, it is the number of compressed bytes.
    1 + if first < 128 { first } else { (first - 126) / 2 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_of_every_size() {
        let read = |bytes: &[u8], padding: usize| {
            let mut block = bytes.to_vec();
            block.resize(bytes.len() + padding, 0);
            Literals::read(&block).map(|literals| (literals.decoded, literals.huffman, literals.len))
        };
        assert_eq!(read(&[5 << 3], 5), Some((5, None, 6)));
        assert_eq!(read(&[5 << 3], 4), None);
        assert_eq!(read(&[1 | 31 << 3], 1), Some((31, None, 2)));
        assert_eq!(read(&[1 << 2 | 0x10, 0x02], 33), Some((33, None, 35)));
        assert_eq!(read(&[1 | 3 << 2 | 0xf0, 0xff, 0x01], 1), Some((0x1fff, None, 4)));
        // Twenty literals in ten bytes, with a table of three bytes and without one.
        let head = ((20u32 << 4) | (10 << 14)).to_le_bytes();
        assert_eq!(read(&[head[0] | 2, head[1], head[2], 2], 9), Some((20, Some(3..6), 13)));
        assert_eq!(read(&[head[0] | 3, head[1], head[2], 2], 9), Some((20, None, 13)));
        assert_eq!(read(&[head[0] | 2, head[1], head[2], 10], 9), None);
        assert_eq!(read(&[], 0), None);
    }

    #[test]
    fn lengths_of_descriptions() {
        assert_eq!(
            [0, 1, 127, 128, 129, 130, 255].map(huffman_len),
            [1, 2, 128, 2, 2, 3, 65]
        );
    }
}
