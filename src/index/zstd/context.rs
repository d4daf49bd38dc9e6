//! libzstd's decoder, and the memory that it uses.

use std::fmt;

use zstd::zstd_safe::{DCtx, DParameter, InBuffer, OutBuffer, ResetDirective, get_error_name};

use super::frame::BLOCK;
use super::{Room, WINDOW_LOG_MAX, WINDOW_TOO_LARGE};
use crate::index::IndexError;
use crate::memory::OverLimit;

/// Step in bytes in which the decoder asks for room.
const ROOM_STEP: usize = 4 << 20;

/// What one call of libzstd did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ZstdProgress {
    /// Bytes of input that were taken.
    pub(super) taken: usize,
    /// Bytes of output that were made.
    pub(super) made: usize,
    /// Whether a frame ended.
    pub(super) ended: bool,
}

/// A decoder of libzstd with its room.
pub(super) struct ZstdContext {
    context: DCtx<'static>,
    room: Room,
    /// Bytes of memory that `room` has allowed, or that need no permission.
    granted: usize,
    /// Bytes of memory that a dictionary takes, beyond what grows with the output.
    fixed: usize,
    /// Bytes of memory that others use beside libzstd while this frame is decoded.
    beside: usize,
    /// Bytes of output of the current frame so far.
    frame_made: usize,
}

impl fmt::Debug for ZstdContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ZstdContext")
            .field("granted", &self.granted)
            .field("frame_made", &self.frame_made)
            .finish_non_exhaustive()
    }
}

impl ZstdContext {
    /// Makes a decoder. `offset` is where in the blob it will begin, for errors.
    pub(super) fn new(offset: u64, room: Room) -> Result<Self, IndexError> {
        let mut context = DCtx::try_create().ok_or(IndexError::OutOfMemory)?;
        // Checking the checksums of frames takes a tenth of the time of decoding, and the digests of the tar and of the spans
        // say more.
        for parameter in [
            DParameter::WindowLogMax(WINDOW_LOG_MAX),
            DParameter::ForceIgnoreChecksum(true),
        ] {
            context.set_parameter(parameter).map_err(|code| failure(code, offset))?;
        }
        Ok(Self {
            granted: context.sizeof(),
            fixed: 0,
            beside: 0,
            frame_made: 0,
            context,
            room,
        })
    }

    /// Decodes some of `input` into `out`. `offset` is that of `input` in the blob.
    pub(super) fn decode(&mut self, input: &[u8], out: &mut [u8], offset: u64) -> Result<ZstdProgress, IndexError> {
        let mut source = InBuffer::around(input);
        let mut sink = OutBuffer::around(out);
        let left = self
            .context
            .decompress_stream(&mut sink, &mut source)
            .map_err(|code| failure(code, offset))?;
        let decoded = ZstdProgress {
            taken: source.pos(),
            made: sink.pos(),
            ended: left == 0,
        };
        self.frame_made += decoded.made;
        Ok(decoded)
    }

    /// Forgets the frame that was being decoded.
    pub(super) fn reset(&mut self, offset: u64) -> Result<(), IndexError> {
        let reset = self.context.reset(ResetDirective::SessionOnly);
        reset.map_err(|code| failure(code, offset))?;
        self.frame_ended();
        Ok(())
    }

    /// Notes that a frame is over.
    pub(super) fn frame_ended(&mut self) {
        self.frame_made = 0;
        self.beside = 0;
    }

    /// Notes that others will use up to `bytes` of memory while this frame is decoded. They use it as output is made.
    pub(super) fn use_beside(&mut self, bytes: u64) {
        self.beside = usize::try_from(bytes).unwrap_or(usize::MAX);
    }

    /// Asks for room for the memory in use. If there is none with what others use beside, but enough without it, the
    /// result is false, and they must give their memory back.
    ///
    /// A frame can declare a window of gigabytes, and libzstd reserves that much. But the system provides memory only
    /// for what is written, and libzstd writes no more than it outputs.
    pub(super) fn ask_for_room(&mut self, offset: u64) -> Result<bool, IndexError> {
        if self.grow(self.beside).is_ok() {
            return Ok(true);
        }
        self.beside = 0;
        let grown = self.grow(0).map(|()| false);
        grown.map_err(|source| IndexError::ZstdMemory {
            offset,
            bytes: self.context.sizeof() as u64,
            source,
        })
    }

    fn grow(&mut self, beside: usize) -> Result<(), OverLimit> {
        let own = self.context.sizeof();
        let reserved = own.saturating_add(beside);
        // What is beside grows two and a half times as fast as the output, and begins with the queues.
        let used = |made: usize| {
            let slack = super::BESIDE_AT_ONCE.saturating_add(made.saturating_mul(5) / 2);
            own.min(self.fixed.saturating_add(made))
                .saturating_add(beside.min(slack))
        };
        if reserved <= self.granted || used(self.frame_made + 4 * BLOCK) <= self.granted {
            return Ok(());
        }
        let wanted = used(self.frame_made + ROOM_STEP).min(reserved);
        (self.room)(wanted as u64, reserved as u64)?;
        self.granted = wanted;
        Ok(())
    }

    /// Asks for `bytes` of memory in all, of which there may be `later` later.
    pub(super) fn ask_at_once(&mut self, bytes: u64, later: u64, offset: u64) -> Result<(), IndexError> {
        let wanted = usize::try_from(bytes).unwrap_or(usize::MAX);
        if wanted <= self.granted {
            return Ok(());
        }
        (self.room)(bytes, later.max(bytes)).map_err(|source| IndexError::ZstdMemory { offset, bytes, source })?;
        self.granted = wanted;
        Ok(())
    }

    /// Loads a dictionary for the next frame, for which there must be room.
    pub(super) fn load_dictionary(&mut self, dictionary: &[u8], offset: u64) -> Result<(), IndexError> {
        self.context
            .load_dictionary(dictionary)
            .map_err(|code| failure(code, offset))?;
        self.fixed = self.context.sizeof();
        Ok(())
    }

    /// Forgets the dictionary.
    pub(super) fn forget_dictionary(&mut self, offset: u64) -> Result<(), IndexError> {
        self.context
            .disable_dictionary()
            .map_err(|code| failure(code, offset))?;
        Ok(())
    }
}

fn failure(code: usize, offset: u64) -> IndexError {
    match get_error_name(code) {
        WINDOW_TOO_LARGE => IndexError::ZstdWindow { offset },
        reason => IndexError::Zstd { offset, reason },
    }
}
