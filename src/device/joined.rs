//! Content of small files, joined into long writes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use crate::toc::DEVICE_BLOCK;

/// Content of at least this many bytes is written by itself. With a larger value, copying the content would cost more
/// than the system call it saves. With a smaller one, more content takes a system call of its own.
const LONG: usize = 128 << 10;

/// A buffer of at least this many bytes takes no more content. A larger bound costs memory; a smaller one costs
/// system calls.
const LONGEST: usize = 1 << 20;

/// Content that lies together on a device and is not written yet.
///
/// Between two files of a layer there is padding of less than a block, which is zero. The padding is written with the
/// files, so that many small files take one system call. A longer gap stays a hole.
#[derive(Debug, Default)]
pub(super) struct Joined {
    /// Device offset of the first byte of `buffer`.
    start: u64,
    buffer: Vec<u8>,
}

impl Joined {
    /// Returns the bytes on disk that these bytes take, in whole blocks.
    pub(super) fn footprint(&self) -> u64 {
        footprint([(self.start, self.buffer.len() as u64)])
    }

    /// Returns whether content at a device offset joins the content that was added before, or is the first. If not,
    /// [`Joined::add`] writes the earlier content first. Long content never joins, and is written at once.
    pub(super) fn takes(&self, offset: u64, content: &[u8]) -> bool {
        let end = self.start + self.buffer.len() as u64;
        let joins = self.buffer.len() < LONGEST && (end..end + DEVICE_BLOCK).contains(&offset);
        !is_long(content) && (self.buffer.is_empty() || joins)
    }

    /// Adds content at a device offset. Writes the earlier content if the new content does not join it. After an
    /// error, the caller may try again.
    pub(super) fn add(&mut self, file: &File, offset: u64, content: &[u8]) -> io::Result<()> {
        if !self.takes(offset, content) {
            self.write(file)?;
        }
        if is_long(content) {
            return file.write_all_at(content, offset);
        }
        if self.buffer.is_empty() {
            self.start = offset;
        }
        self.buffer.resize((offset - self.start) as usize, 0);
        self.buffer.extend_from_slice(content);
        Ok(())
    }

    /// Writes the content that was added, and forgets it. After an error, the caller may try again.
    pub(super) fn write(&mut self, file: &File) -> io::Result<()> {
        file.write_all_at(&self.buffer, self.start)?;
        self.buffer.clear();
        Ok(())
    }
}

/// Bytes on disk of the blocks that hold some content: ascending pairs of device offset and length. Pieces that are far apart
/// take a block each, however short they are; pieces in one block take it together.
pub(super) fn footprint(pieces: impl IntoIterator<Item = (u64, u64)>) -> u64 {
    let (mut blocks, mut next) = (0, 0);
    for (offset, length) in pieces.into_iter().filter(|&(_, length)| length > 0) {
        let end = (offset + length).div_ceil(DEVICE_BLOCK);
        blocks += end - (offset / DEVICE_BLOCK).max(next).min(end);
        next = end;
    }
    blocks * DEVICE_BLOCK
}

/// Returns whether content is written at once.
pub(super) fn is_long(content: &[u8]) -> bool {
    content.len() >= LONG
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn joined_content_is_what_single_writes_make(pieces in prop::collection::vec((0..3 * DEVICE_BLOCK, prop_oneof![8 => 0..9000_usize, 1 => LONG - 1..LONG + 9]), 0..12)) {
            let [apart, together] = [(); 2].map(|()| tempfile::tempfile().unwrap());
            let (mut at, mut joined) = (0, Joined::default());
            for (number, (gap, length)) in (1_u8..).zip(pieces) {
                at += gap;
                let content = vec![number; length];
                apart.write_all_at(&content, at).unwrap();
                joined.add(&together, at, &content).unwrap();
                at += length as u64;
            }
            joined.write(&together).unwrap();
            for file in [&apart, &together] {
                file.set_len(at).unwrap();
            }
            let [apart, together] = [apart, together].map(|file| {
                let mut bytes = vec![0; at as usize];
                file.read_exact_at(&mut bytes, 0).unwrap();
                bytes
            });
            prop_assert!(apart == together);
        }
    }

    #[test]
    fn little_is_held_and_whole_blocks_are_counted() {
        let file = tempfile::tempfile().unwrap();
        let mut joined = Joined::default();
        for i in 0..1000 {
            joined.add(&file, i * DEVICE_BLOCK, b"x").unwrap();
            assert!(joined.buffer.len() <= LONGEST + LONG);
        }
        assert_eq!(footprint([(5, 0)]), 0);
        assert_eq!(footprint([(DEVICE_BLOCK - 1, 2)]), 2 * DEVICE_BLOCK);
        assert_eq!(footprint([(DEVICE_BLOCK, 1)]), DEVICE_BLOCK);
        assert_eq!(
            footprint([(0, 1), (2, 1), (DEVICE_BLOCK - 1, 2), (9 * DEVICE_BLOCK, 1)]),
            3 * DEVICE_BLOCK
        );
    }

    #[test]
    fn a_long_gap_stays_a_hole() {
        let file = tempfile::tempfile().unwrap();
        let mut joined = Joined::default();
        joined.add(&file, 0, b"a").unwrap();
        let takes = |offset| joined.takes(offset, b"b");
        assert!(takes(DEVICE_BLOCK) && !takes(DEVICE_BLOCK + 1) && !takes(0));
        joined.add(&file, 1 << 30, b"b").unwrap();
        joined.write(&file).unwrap();
        assert_eq!(joined.buffer.len(), 0);
        assert!(file.metadata().unwrap().blocks() * 512 < 1 << 20);
    }
}
