//! zstd decoder (RFC 8878): frames, decoded by libzstd.
//!
//! Decoding can begin at a frame. Skippable frames count as frames.

use std::fmt;

use zstd::zstd_safe::{DCtx, DParameter, InBuffer, OutBuffer, ResetDirective, get_error_name};

use super::step::Step;
use super::{BitPosition, IndexError};
use crate::memory::OverLimit;

/// Largest window that the decoder accepts, as a binary logarithm, if memory allows it: 2 GiB. `zstd --long=31`
/// writes such windows, and libzstd can read no larger ones.
const WINDOW_LOG_MAX: u32 = 31;
/// Largest window of a compressed archive, as a binary logarithm: 128 MiB, the limit of zstd(1) without `--long=31`.
pub(crate) const ARCHIVE_WINDOW_LOG_MAX: u32 = 27;

/// Size of the output buffer in bytes: one block (RFC 8878, 3.1.1.2.4). libzstd can flush a whole block into it
/// without keeping some bytes back.
const OUT: usize = 128 * 1024;

/// Step in bytes in which the decoder asks for room.
const ROOM_STEP: usize = 4 << 20;

/// Name of libzstd's error for a window beyond its limit.
pub(crate) const WINDOW_TOO_LARGE: &str = "Frame requires too much memory for decoding";

/// Allows or refuses memory for a decoder's window. The first argument is the number of bytes that the decoder is
/// about to use. The second one is the number of bytes that it may use later. It may
/// wait for memory, if the caller of the decoder made it so.
pub type Room = Box<dyn FnMut(u64, u64) -> Result<(), OverLimit> + Send>;

/// Makes the room of a single decoder that has `limit` bytes to itself.
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
    /// Bytes of memory that `room` has allowed.
    granted: usize,
    /// Bytes of output of the current frame so far.
    frame_made: usize,
    out: Box<[u8]>,
    /// Offset in the blob of the next input byte.
    offset: u64,
    total: u64,
    /// Whether the next byte begins a frame.
    frame_start: bool,
    /// Whether at least one frame is complete.
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
    /// Makes a decoder at the frame that begins at blob offset `offset`.
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

    /// Forgets the frame that was being decoded, and begins at the frame at blob offset `offset`.
    pub(super) fn seek(&mut self, offset: u64) -> Result<(), IndexError> {
        let reset = self.context.reset(ResetDirective::SessionOnly);
        reset.map_err(|code| IndexError::Zstd {
            offset,
            reason: get_error_name(code),
        })?;
        self.offset = offset;
        (self.frame_start, self.stopped, self.frame_made) = (true, false, 0);
        Ok(())
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
                // libzstd needs the last byte of a frame early, but consumes it only after all output is fetched.
                let position = BitPosition((self.offset + u64::from(left == 1)) * 8);
                return Ok(Step::Output {
                    bytes: &self.out[..made],
                    position,
                });
            }
            // Another round without progress is safe: libzstd reports an error after some rounds.
            if taken == 0 && input.is_empty() {
                return Ok(Step::Input);
            }
        }
    }

    /// Asks for room for the memory in use. A frame can declare a window of gigabytes, and libzstd reserves that
    /// much. But the system provides memory only for what is written, and libzstd writes no more than it outputs.
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
