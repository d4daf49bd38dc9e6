//! The last output of a frame, in the buffers that it was decoded into.
//!
//! # How it works
//! A block stays in its buffer if it fills enough of it, so nothing is copied. Otherwise it is copied behind the block
//! before it, and only what does not fit there stays.
//!
//! # Invariants
//! - The unused ends of all buffers have at most an eighth as many bytes as the output, and three buffers more.

use std::collections::VecDeque;

use super::frame::BLOCK;

/// Bytes that are copied at once where fewer are wanted.
const SHORT: usize = 32;
/// Free buffers that are kept for later blocks.
const SPARE: usize = 4;

/// A buffer with some output of a frame.
#[derive(Debug)]
struct HistoryBuffer {
    /// Position of its first byte in the frame's output.
    start: u64,
    len: usize,
    bytes: Vec<u8>,
}

/// The output of a frame that can still be read.
#[derive(Debug, Default)]
pub(super) struct History {
    buffers: VecDeque<HistoryBuffer>,
    /// Position behind the last byte.
    end: u64,
    /// Bytes of all buffers behind their output.
    unused: usize,
    /// Buffers that are free.
    spare: Vec<Vec<u8>>,
}

impl History {
    /// Returns the bytes of the frame's output so far.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// Adds the first `len` bytes of `buffer`. Returns false if it does not have as many.
    pub(super) fn push(&mut self, buffer: Vec<u8>, len: usize) -> bool {
        let Some(mut added) = buffer.get(..len) else {
            return false;
        };
        let first = self.buffers.front().map_or(self.end, |first| first.start);
        let most_unused = (self.end - first) as usize / 8 + 2 * BLOCK;
        if let Some(last) = self.buffers.back_mut()
            && self.unused + buffer.len() - len > most_unused
        {
            let head;
            (head, added) = added.split_at(len.min(last.bytes.len() - last.len));
            last.bytes[last.len..last.len + head.len()].copy_from_slice(head);
            last.len += head.len();
            self.unused -= head.len();
            self.end += head.len() as u64;
        }
        let (start, left) = (self.end, added.len());
        self.end += left as u64;
        if left == 0 {
            self.reuse(buffer);
            return true;
        }
        let mut bytes = buffer;
        if left < len {
            // What is left lies at the end of the block.
            bytes.copy_within(len - left..len, 0);
        }
        self.unused += bytes.len() - left;
        self.buffers.push_back(HistoryBuffer {
            start,
            len: left,
            bytes,
        });
        true
    }

    /// Forgets whole buffers of which all bytes lie before `position`.
    pub(super) fn forget(&mut self, position: u64) {
        while let Some(first) = self.buffers.front()
            && first.start + first.len as u64 <= position
            && let Some(buffer) = self.buffers.pop_front()
        {
            self.unused -= buffer.bytes.len() - buffer.len;
            self.reuse(buffer.bytes);
        }
    }

    /// Returns a reader of the output, from its first byte that is not forgotten on.
    pub(super) fn reader(&self) -> HistoryReader<'_> {
        HistoryReader {
            history: self,
            buffer: 0,
        }
    }

    fn reuse(&mut self, buffer: Vec<u8>) {
        if self.spare.len() < SPARE && buffer.len() == BLOCK {
            self.spare.push(buffer);
        }
    }

    /// Returns a free buffer, if there is one.
    pub(super) fn take_spare(&mut self) -> Option<Vec<u8>> {
        self.spare.pop()
    }
}

/// Reads output in the order of its positions.
#[derive(Debug)]
pub(super) struct HistoryReader<'a> {
    history: &'a History,
    /// The buffer that was read last.
    buffer: usize,
}

impl HistoryReader<'_> {
    /// Appends `len` bytes from `start` on to `out`, as far as they are not forgotten. No call may begin before the call
    /// before it.
    #[inline]
    pub(super) fn copy(&mut self, mut start: u64, mut len: usize, out: &mut Vec<u8>) {
        while let Some(buffer) = self.history.buffers.get(self.buffer) {
            let from = start.saturating_sub(buffer.start) as usize;
            // Most runs are short, and copying a fixed number of bytes takes least time.
            if len <= SHORT
                && from + SHORT <= buffer.len
                && let Some(bytes) = buffer.bytes.get(from..).and_then(|bytes| bytes.first_chunk::<SHORT>())
            {
                let end = out.len() + len;
                out.extend_from_slice(bytes);
                out.truncate(end);
                break;
            }
            let taken = len.min(buffer.len.saturating_sub(from));
            out.extend_from_slice(buffer.bytes.get(from..from + taken).unwrap_or_default());
            start += taken as u64;
            len -= taken;
            if len == 0 {
                break;
            }
            self.buffer += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_found_whether_they_were_copied_or_not() {
        let mut rng = fastrand::Rng::with_seed(5);
        let mut history = History::default();
        let mut all = Vec::new();
        for _ in 0..300 {
            let len = match rng.bool() {
                true => rng.usize(0..3000),
                false => rng.usize(0..=BLOCK),
            };
            let mut buffer = history.take_spare().unwrap_or_else(|| vec![0; BLOCK]);
            rng.fill(&mut buffer[..len]);
            all.extend_from_slice(&buffer[..len]);
            assert!(history.push(buffer, len));
            let first = all.len().saturating_sub(1 << 20);
            history.forget(first as u64);
            let held: usize = history.buffers.iter().map(|buffer| buffer.bytes.len()).sum();
            assert!(held <= (1 << 20) / 8 * 9 + 5 * BLOCK);
            let from = rng.usize(first..=all.len());
            let len = rng.usize(0..=all.len() - from);
            let mut copied = Vec::new();
            let mut reader = history.reader();
            reader.copy(from as u64, len / 2, &mut copied);
            reader.copy((from + len / 2) as u64, len - len / 2, &mut copied);
            assert!(copied == all[from..from + len]);
        }
        assert!(!history.push(vec![0; 10], 11));
    }
}
