//! Which bytes of a window a restart really needs.
//!
//! Decoding from a restart needs those of the 32 KiB before it that a later back-reference reads. References reach at most
//! 32 KiB back, so the first 32 KiB of output after the restart tell all of them. A byte that a reference copied from the
//! window into the output counts once: from then on the output has it. Of real layers about a tenth of a window is read.

use super::HISTORY;

/// Records the references behind one restart while the decoder runs over the next 32 KiB of output.
#[derive(Debug)]
pub(super) struct Tracker {
    /// The 32 KiB before the restart; the last byte is the one right before it.
    window: Vec<u8>,
    /// 0xff for each byte of the window that is read, else 0.
    used: Vec<u8>,
    /// Where the restart lies in the output buffer.
    pub(super) start: usize,
    any: bool,
}

impl Tracker {
    /// Starts at `start` of the output buffer, where `valid..start` is the history a reference may read.
    pub(super) fn new(buf: &[u8], valid: usize, start: usize) -> Self {
        let from = start.saturating_sub(HISTORY).max(valid);
        let mut window = vec![0; HISTORY - (start - from)];
        window.extend_from_slice(&buf[from..start]);
        Self {
            window,
            used: vec![0; HISTORY],
            start,
            any: false,
        }
    }

    /// Notes that `len` bytes from buffer position `src` are read; `src` lies before the restart.
    #[inline]
    pub(super) fn read(&mut self, src: usize, len: usize) {
        let back = self.start - src;
        let first = HISTORY.saturating_sub(back);
        let len = len.min(back);
        self.used[first..first + len].fill(0xff);
        self.any = true;
    }

    /// The window with zeros for the bytes nobody reads, without the zeros at its front. Empty if nothing is read.
    pub(super) fn finish(mut self) -> Vec<u8> {
        if !self.any {
            return Vec::new();
        }
        for (byte, used) in self.window.iter_mut().zip(&self.used) {
            *byte &= used;
        }
        let zeros = self.window.iter().take_while(|&&byte| byte == 0).count();
        self.window.drain(..zeros);
        self.window
    }
}
