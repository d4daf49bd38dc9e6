//! zstd (RFC 8878): frames, decoded by libzstd.
//!
//! Decoding can begin at a frame; skippable frames count as frames.

use std::fmt;

use zstd::zstd_safe::{DCtx, DParameter, InBuffer, OutBuffer, get_error_name};

use super::step::Step;
use super::{BitPosition, IndexError};
use crate::memory::OverLimit;

/// The largest window that is decoded, if memory allows it: 2 GiB, what `zstd --long=31` writes and libzstd can read.
const WINDOW_LOG_MAX: u32 = 31;
/// The largest window of a compressed archive: 128 MiB, the limit of zstd(1) without `--long=31`.
pub(crate) const ARCHIVE_WINDOW_LOG_MAX: u32 = 27;

/// One block (RFC 8878, 3.1.1.2.4), the least libzstd can flush without keeping some back.
const OUT: usize = 128 * 1024;

/// Room is asked for in steps of this size.
const ROOM_STEP: usize = 4 << 20;

/// Name libzstd gives to a window beyond its limit.
pub(crate) const WINDOW_TOO_LARGE: &str = "Frame requires too much memory for decoding";

/// Asked before a decoder uses so many bytes of memory for its window, of the second number of bytes that it may come to use;
/// may wait.
pub type Room = Box<dyn FnMut(u64, u64) -> Result<(), OverLimit> + Send>;

/// Room for a single decoder that has `limit` bytes to itself.
pub(super) fn room_within(limit: u64) -> Room {
    Box::new(move |bytes, _| match bytes <= limit {
        true => Ok(()),
        false => Err(OverLimit { limit }),
    })
}

/// A stream of frames.
pub(super) struct Zstd {
    context: DCtx<'static>,
    room: Room,
    /// Bytes of memory that there is room for.
    granted: usize,
    /// Bytes of output of the frame so far.
    frame_made: usize,
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
    pub(super) fn new(offset: u64, room: Room) -> Result<Self, IndexError> {
        let fail = |code| IndexError::Zstd {
            offset,
            reason: get_error_name(code),
        };
        let mut context = DCtx::try_create().ok_or(IndexError::OutOfMemory)?;
        context
            .set_parameter(DParameter::WindowLogMax(WINDOW_LOG_MAX))
            .map_err(fail)?;
        Ok(Self {
            granted: context.sizeof(),
            frame_made: 0,
            context,
            room,
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
            self.frame_made += made;
            self.ask_for_room()?;
            *input = &input[taken..];
            self.offset += taken as u64;
            self.total += made as u64;
            if left == 0 {
                self.frame_start = true;
                self.complete = true;
                self.stopped = false;
                self.frame_made = 0;
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

    /// Asks for the memory that is used. A frame can name a window of gigabytes, and libzstd reserves that; but the system
    /// gives it only what was written, and that is no more than what came out.
    fn ask_for_room(&mut self) -> Result<(), IndexError> {
        let reserved = self.context.sizeof();
        if reserved <= self.granted || self.granted > self.frame_made + 4 * OUT {
            return Ok(());
        }
        let wanted = reserved.min(self.frame_made + ROOM_STEP);
        (self.room)(wanted as u64, reserved as u64).map_err(|source| IndexError::ZstdMemory {
            offset: self.offset,
            bytes: reserved as u64,
            source,
        })?;
        self.granted = wanted;
        Ok(())
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
