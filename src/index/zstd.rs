//! zstd (RFC 8878): frames, decoded by libzstd.
//!
//! Decoding can begin at a frame; skippable frames count as frames.

use std::fmt;

use zstd::zstd_safe::{DCtx, DParameter, InBuffer, OutBuffer, get_error_name};

use super::codec::Step;
use super::{BitPosition, IndexError};

/// The largest window that is decoded: 128 MiB, the limit of zstd(1) without `--long=31` and what `--long=27` writes.
pub(crate) const WINDOW_LOG_MAX: u32 = 27;

/// One block (RFC 8878, 3.1.1.2.4), the least libzstd can flush without keeping some back.
const OUT: usize = 128 * 1024;

/// Name libzstd gives to a window beyond its limit.
pub(crate) const WINDOW_TOO_LARGE: &str = "Frame requires too much memory for decoding";

/// A stream of frames.
pub(super) struct Zstd {
    context: DCtx<'static>,
    out: Box<[u8]>,
    /// Blob offset of the next input byte.
    offset: u64,
    total: u64,
    /// The next byte begins a frame.
    frame_start: bool,
    /// At least one frame is complete.
    complete: bool,
    stop_at: u64,
    stopped: bool,
}

impl fmt::Debug for Zstd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Zstd")
            .field("offset", &self.offset)
            .field("total", &self.total)
            .finish_non_exhaustive()
    }
}

impl Zstd {
    /// At the frame that begins at blob offset `offset`.
    pub(super) fn new(offset: u64) -> Result<Self, IndexError> {
        let fail = |code| IndexError::Zstd {
            offset,
            reason: get_error_name(code),
        };
        let mut context = DCtx::try_create().ok_or(IndexError::OutOfMemory)?;
        context
            .set_parameter(DParameter::WindowLogMax(WINDOW_LOG_MAX))
            .map_err(fail)?;
        Ok(Self {
            context,
            out: vec![0; OUT].into_boxed_slice(),
            offset,
            total: 0,
            frame_start: true,
            complete: false,
            stop_at: u64::MAX,
            stopped: false,
        })
    }

    /// Asks for [`Step::Restart`] at each frame that begins at output position `total` or later.
    pub(super) fn stop_at_frame(&mut self, total: u64) {
        self.stop_at = total;
    }

    pub(super) fn position(&self) -> BitPosition {
        BitPosition(self.offset * 8)
    }

    pub(super) fn step<'a, 'i: 'a>(&'a mut self, input: &mut &'i [u8]) -> Result<Step<'a>, IndexError> {
        loop {
            if self.frame_start {
                if input.is_empty() {
                    return Ok(Step::Input);
                }
                if self.total >= self.stop_at && !self.stopped {
                    self.stopped = true;
                    return Ok(Step::Restart(self.position()));
                }
            }
            let mut source = InBuffer::around(input);
            let mut sink = OutBuffer::around(&mut *self.out);
            let left =
                self.context
                    .decompress_stream(&mut sink, &mut source)
                    .map_err(|code| match get_error_name(code) {
                        WINDOW_TOO_LARGE => IndexError::ZstdWindow { offset: self.offset },
                        reason => IndexError::Zstd {
                            offset: self.offset,
                            reason,
                        },
                    })?;
            let (taken, made) = (source.pos(), sink.pos());
            *input = &input[taken..];
            self.offset += taken as u64;
            self.total += made as u64;
            if left == 0 {
                self.frame_start = true;
                self.complete = true;
                self.stopped = false;
            } else if taken > 0 {
                self.frame_start = false;
            }
            if made > 0 {
                // libzstd does not take the last byte of a frame before all output is fetched, though it needed it.
                let position = BitPosition((self.offset + u64::from(left == 1)) * 8);
                return Ok(Step::Output {
                    bytes: &self.out[..made],
                    position,
                });
            }
            // Going on without progress is an error that libzstd reports after some rounds.
            if taken == 0 && input.is_empty() {
                return Ok(Step::Input);
            }
        }
    }

    /// Checks that the stream may end after `size` bytes.
    pub(super) fn finish(&self, size: u64) -> Result<(), IndexError> {
        if self.frame_start && self.complete {
            Ok(())
        } else {
            Err(IndexError::Truncated { offset: size })
        }
    }
}
