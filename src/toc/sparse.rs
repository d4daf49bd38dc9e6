//! Sparse files: the map of stored fragments, and their places in the data device.
//!
//! A tar stores the fragments of a sparse file back to back. The data device holds the file in equal chunks (the
//! EROFS chunk layout). Only chunks with data get room in the device, one after the other. Fragments in neighbouring
//! chunks therefore stay neighbours. The bytes between two fragments of one chunk are a hole of the device.

use super::number::decimal;
use super::{BLOCK, DEVICE_BLOCK, DataLayout, Extent, FileData};

/// A stored fragment of a sparse file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SparsePiece {
    /// Offset in the file.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
}

/// Appends a fragment to a map. Joins it with the last fragment if the two touch, unless the last one is empty.
///
/// [`check_map`] checks the order and drops empty fragments.
pub(super) fn push_fragment(map: &mut Vec<SparsePiece>, fragment: SparsePiece) {
    match map.last_mut() {
        Some(last) if last.len > 0 && last.offset.checked_add(last.len) == Some(fragment.offset) => {
            // Saturation hides no error: the sum is then larger than every valid logical size.
            last.len = last.len.saturating_add(fragment.len);
        }
        _ => map.push(fragment),
    }
}

/// Checks that the fragments ascend, do not overlap, lie within the file and add up to `stored` bytes. Drops empty
/// fragments.
pub(super) fn check_map(map: &mut Vec<SparsePiece>, size: u64, stored: u64) -> Result<(), &'static str> {
    let (mut end, mut sum) = (0u64, 0u64);
    for fragment in map.iter() {
        if fragment.offset < end {
            return Err("its pieces overlap or are out of order");
        }
        end = fragment
            .offset
            .checked_add(fragment.len)
            .filter(|&end| end <= size)
            .ok_or("a piece ends after the file")?;
        // Fragments do not overlap and end within the file, so the sum is at most the file's size.
        sum += fragment.len;
    }
    if sum != stored {
        return Err("its pieces do not add up to the stored size");
    }
    map.retain(|fragment| fragment.len > 0);
    Ok(())
}

/// Parses the map at the start of the data (pax sparse 1.0): a count, then offset and length of each fragment. Each
/// decimal number has a line of its own. The map is padded to a block.
#[derive(Debug, Default)]
pub(super) struct MapParser {
    digits: Vec<u8>,
    /// Numbers that are still to come; `None` until the count is known.
    left: Option<u64>,
    offset: Option<u64>,
    consumed: u64,
    map: Vec<SparsePiece>,
}

impl MapParser {
    /// Consumes `bytes` until the map and its padding are complete, and returns how many bytes it consumed.
    /// [`Self::is_complete`] says whether the map is complete.
    pub fn push(&mut self, bytes: &[u8], max_pieces: usize) -> Result<usize, &'static str> {
        let mut used = 0;
        while used < bytes.len() && !self.is_complete() {
            if self.left != Some(0) {
                self.byte(bytes[used], max_pieces)?;
            }
            used += 1;
            self.consumed += 1;
        }
        Ok(used)
    }

    /// Whether the map and its padding are complete.
    pub fn is_complete(&self) -> bool {
        self.left == Some(0) && self.consumed.is_multiple_of(BLOCK as u64)
    }

    /// Returns the number of fragments read so far.
    pub fn pieces(&self) -> usize {
        self.map.len()
    }

    /// Returns the fragments read so far.
    pub fn into_map(self) -> Vec<SparsePiece> {
        self.map
    }

    fn byte(&mut self, byte: u8, max_pieces: usize) -> Result<(), &'static str> {
        const NO_NUMBER: &str = "there is no number where one must be";
        if byte != b'\n' {
            // 19 digits hold every i64, and no writer adds leading zeros.
            if self.digits.len() == 19 {
                return Err(NO_NUMBER);
            }
            self.digits.push(byte);
            return Ok(());
        }
        let number = decimal(&self.digits).ok_or(NO_NUMBER)?;
        self.digits.clear();
        match (self.left, self.offset.take()) {
            (None, _) => {
                if number > max_pieces as u64 {
                    return Err("it has too many pieces");
                }
                self.left = Some(number * 2);
                return Ok(());
            }
            (Some(_), None) => self.offset = Some(number),
            (Some(_), Some(offset)) => push_fragment(&mut self.map, SparsePiece { offset, len: number }),
        }
        self.left = self.left.map(|left| left - 1);
        Ok(())
    }
}

/// A file's place in the data device.
#[derive(Debug)]
pub(super) struct Placed {
    pub data: FileData,
    /// Extents of the file, in order.
    pub extents: Vec<Extent>,
    /// First free device offset behind the file, a multiple of [`DEVICE_BLOCK`].
    pub end: u64,
}

/// Places a file of `size` bytes whose content begins at tar offset `tar`. The caller has checked that `device +
/// size` is within the limit.
pub(super) fn place_flat(size: u64, tar: u64, device: u64) -> Placed {
    let end = device + size.next_multiple_of(DEVICE_BLOCK);
    let (device, extents) = if size > 0 {
        (device, vec![Extent { tar, device, len: size }])
    } else {
        (0, Vec::new())
    };
    Placed {
        data: FileData {
            size,
            layout: DataLayout::Flat { device },
        },
        extents,
        end,
    }
}

/// Places a sparse file by its checked map; `None` if the file would end after `limit`. `size` is at most `limit`.
pub(super) fn place_sparse(size: u64, map: &[SparsePiece], tar: u64, device: u64, limit: u64) -> Option<Placed> {
    let chunk_bits = chunk_bits(size, map.len());
    let chunk = DEVICE_BLOCK << chunk_bits;
    let whole = size.next_multiple_of(DEVICE_BLOCK);
    let mut chunks: Vec<(u32, u64)> = Vec::new();
    let mut extents: Vec<Extent> = Vec::new();
    let (mut tar, mut end) = (tar, device);
    for fragment in map {
        let last = (fragment.offset + fragment.len - 1) / chunk;
        // The fragment shares at most one chunk with the fragment before.
        let known = chunks.last().map_or(0, |&(number, _)| u64::from(number) + 1);
        for number in known.max(fragment.offset / chunk)..=last {
            chunks.push((u32::try_from(number).ok()?, end));
            end += chunk.min(whole - number * chunk);
            if end > limit {
                return None;
            }
        }
        // The chunks of a fragment follow each other in the file and in the device, so the fragment is one run in the
        // device too. The last chunk of the fragment is always the newest one, also if the loop added no chunk.
        let &(number, start) = chunks.last()?;
        let device = start + fragment.offset - u64::from(number) * chunk;
        extents.push(Extent {
            tar,
            device,
            len: fragment.len,
        });
        tar += fragment.len;
    }
    Some(Placed {
        data: FileData {
            size,
            layout: DataLayout::Chunked { chunk_bits, chunks },
        },
        extents,
        end,
    })
}

/// Returns the smallest chunk size that keeps two lists small: the list of stored chunks, and the EROFS array of all
/// chunks, holes included.
///
/// The number of fragments in the tar limits the length of the array. Otherwise a tar of a few bytes could demand
/// gigabytes of metadata. Larger chunks cost only device addresses.
fn chunk_bits(size: u64, pieces: usize) -> u8 {
    let max_chunks = (pieces as u64).saturating_mul(64).clamp(1024, 65536);
    let mut bits = 0;
    while size.div_ceil(DEVICE_BLOCK << bits) > max_chunks {
        bits += 1;
    }
    bits
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(list: &[(u64, u64)]) -> Vec<SparsePiece> {
        list.iter().map(|&(offset, len)| SparsePiece { offset, len }).collect()
    }

    #[test]
    fn maps_are_checked() {
        let ok = |list: &[(u64, u64)], size, stored| check_map(&mut map(list), size, stored).is_ok();
        assert!(ok(&[], 0, 0));
        assert!(ok(&[], 10, 0));
        assert!(ok(&[(0, 3), (5, 5), (10, 0)], 10, 8));
        assert!(!ok(&[(0, 3), (5, 5)], 10, 7));
        assert!(!ok(&[(0, 3), (2, 5)], 10, 8));
        assert!(!ok(&[(5, 1), (0, 1)], 10, 2));
        assert!(!ok(&[(5, 6)], 10, 6));
        assert!(!ok(&[(u64::MAX, 1)], u64::MAX, 1));
        let mut list = map(&[(0, 0), (4, 4), (10, 0)]);
        check_map(&mut list, 10, 4).unwrap();
        assert_eq!(list, map(&[(4, 4)]));
        let mut joined = Vec::new();
        map(&[(0, 0), (0, 4), (4, 4), (9, 1)])
            .into_iter()
            .for_each(|f| push_fragment(&mut joined, f));
        assert_eq!(joined, map(&[(0, 0), (0, 8), (9, 1)]));
    }

    #[test]
    fn map_in_data() {
        let mut bytes = b"2\n0\n3\n10\n5\n".to_vec();
        bytes.resize(512, 0);
        bytes.extend_from_slice(b"content");
        for step in [1, 7, 1000] {
            let mut parser = MapParser::default();
            let mut used = 0;
            while !parser.is_complete() {
                used += parser.push(&bytes[used..(used + step).min(bytes.len())], 10).unwrap();
            }
            assert_eq!((used, parser.into_map()), (512, map(&[(0, 3), (10, 5)])));
        }
        let parse = |text: &str| MapParser::default().push(text.as_bytes(), 1000).map(|_| ());
        assert!(parse("\n").is_err());
        assert!(parse("1001\n").is_err());
        assert!(parse("x\n").is_err());
        assert!(parse("1\n-1\n").is_err());
        assert!(parse("1\n00000000000000000001\n").is_err());
    }

    #[test]
    fn chunks_follow_the_map() {
        let placed = place_sparse(
            40_000,
            &map(&[(5000, 100), (7000, 8000), (39_999, 1)]),
            512,
            8192,
            1 << 40,
        )
        .unwrap();
        // Chunks 1, 2, 3 and 9 hold data.
        let chunks = vec![(1, 8192), (2, 12288), (3, 16384), (9, 20480)];
        assert_eq!(
            placed.data,
            FileData {
                size: 40_000,
                layout: DataLayout::Chunked { chunk_bits: 0, chunks }
            }
        );
        assert_eq!(
            placed.extents,
            [
                Extent {
                    tar: 512,
                    device: 8192 + 904,
                    len: 100
                },
                Extent {
                    tar: 612,
                    device: 8192 + 2904,
                    len: 8000
                },
                Extent {
                    tar: 8612,
                    device: 20480 + 3135,
                    len: 1
                },
            ]
        );
        assert_eq!(placed.end, 24576);
        assert!(place_sparse(40_000, &map(&[(39_999, 1)]), 0, 8192, 8192).is_none());
    }

    #[test]
    fn chunk_sizes() {
        assert_eq!(chunk_bits(0, 0), 0);
        assert_eq!(chunk_bits(4 << 20, 1), 0);
        assert_eq!(chunk_bits((4 << 20) + 1, 1), 1);
        assert_eq!(chunk_bits(256 << 20, 1 << 20), 0);
        assert_eq!(chunk_bits(8 << 40, 1), 21);
        assert_eq!(chunk_bits(8 << 40, usize::MAX), 15);
    }
}
