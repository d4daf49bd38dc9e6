//! Records which bytes of a window a restart needs.
//!
//! Decoding from a restart needs those bytes of the 32 KiB before it that a later back-reference reads. References
//! reach at most 32 KiB back, so the first 32 KiB of output after the restart contain all of these references. A
//! reference may copy a byte of the window into the output. Later references to that copy read the output, not the
//! window. Of real layers about a tenth of a window is read.

use super::HISTORY;

/// Records the references behind one restart while the decoder decodes the next 32 KiB of output.
#[derive(Debug)]
pub(super) struct Tracker {
    /// The 32 KiB before the restart. The last byte is the one right before the restart.
    window: Vec<u8>,
    /// 0xff for each byte of the window that is read, else 0.
    used: Vec<u8>,
    /// Position of the restart in the output buffer.
    pub(super) start: usize,
    any: bool,
}

impl Tracker {
    /// Begins at position `start` of the output buffer. References may read the history `valid..start`.
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

    /// Records that a reference reads `len` bytes from buffer position `src`, which lies before the restart.
    #[inline]
    pub(super) fn read(&mut self, src: usize, len: usize) {
        let back = self.start - src;
        let first = HISTORY.saturating_sub(back);
        let len = len.min(back);
        self.used[first..first + len].fill(0xff);
        self.any = true;
    }

    /// Returns the window with zeros in place of bytes that no reference reads. Zeros at its front are left out. The
    /// window is empty if no byte is read.
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
