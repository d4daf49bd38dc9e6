//! zstd decoder (RFC 8878): frames, decoded by libzstd.
//!
//! # How it works
//! [`ZstdPass`] decodes a blob from its first byte, and finds restarts. Every frame is a restart, and skippable frames
//! count as frames. Inside a frame, every block may become one.
//!
//! libzstd says nothing about what a block takes over from the blocks before it. So a parser of our own follows the
//! blocks beside libzstd: their tables, and where their matches come from (`block`, `sequences`, `fse`, `literals`).
//! It does not decode the literals. It runs in a thread of its own (`worker`). It counts
//! which bytes of the window a restart would need (`coverage`), and chooses restarts where they are few (`planner`).
//!
//! ```text
//! pass thread     blob -> header, block, ... -> libzstd -> output, one block at a time
//!                              |                             |
//!                              +-------- DecodedBlock -------+
//!                                             v
//! planner thread         Follower -> Coverage -> Planner -> Restart -> Series, stored in the index
//! ```
//!
//! [`Zstd`] begins at a restart. A restart inside a frame (`restart`) becomes a dictionary and the header of a frame
//! that has only the remaining blocks. For libzstd that is an ordinary frame.
//!
//! # Invariants
//! - The pass gives libzstd whole blocks. So its output, and the positions of its output, do not depend on the pieces in
//!   which the blob arrives.
//! - What the parser believes can make a span undecodable, but not wrong: spans have digests.

mod block;
mod choice;
mod context;
mod coverage;
mod frame;
mod fse;
mod history;
mod literals;
mod pass;
mod planner;
mod restart;
mod segment;
mod sequences;
mod series;
mod worker;

use super::IndexError;
use super::step::Step;
use crate::memory::OverLimit;
use context::ZstdContext;
use frame::{BLOCK, FRAME_CHECKSUM};
use restart::Beginning;

pub(super) use pass::ZstdPass;
pub(super) use series::RestartChain;

/// Largest window that the decoder accepts, as a binary logarithm, if memory allows it: 2 GiB. `zstd --long=31`
/// writes such windows, and libzstd can read no larger ones.
const WINDOW_LOG_MAX: u32 = 31;
/// Largest window of a compressed archive, as a binary logarithm: 128 MiB, the limit of zstd(1) without `--long=31`.
pub(crate) const ARCHIVE_WINDOW_LOG_MAX: u32 = 27;

/// Bytes of memory that the planner's queues may take before there is any output.
const BESIDE_AT_ONCE: usize = worker::PlannerWorker::MEMORY as usize;

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

/// A decoder from a restart to the end of a blob.
#[derive(Debug)]
pub(super) struct Zstd {
    context: ZstdContext,
    out: Box<[u8]>,
    /// Offset in the blob of the next input byte.
    offset: u64,
    /// The header of the frame in whose middle decoding begins, until libzstd has taken it.
    header: Vec<u8>,
    /// Whether decoding is in the frame in whose middle it began. Afterwards, this many bytes of checksum follow.
    inside: Option<usize>,
    /// Bytes of input to skip.
    skip: usize,
}

impl Zstd {
    /// Makes a decoder at blob offset `offset`: at a frame if `chain` is empty, else at the block of the first restart in
    /// `chain`.
    pub(super) fn resume(offset: u64, chain: &mut RestartChain<'_>, room: Room) -> Result<Self, IndexError> {
        let mut zstd = Self::new(offset, room)?;
        let context = &mut zstd.context;
        let allow = &mut |bytes, later| context.ask_at_once(bytes, later, offset);
        if let Some(beginning) = Beginning::load(chain, allow)? {
            context.load_dictionary(&beginning.dictionary, offset)?;
            zstd.header = beginning.frame_header.to_vec();
            zstd.inside = Some(if beginning.checksum { FRAME_CHECKSUM } else { 0 });
        }
        Ok(zstd)
    }

    /// Makes a decoder at the frame that begins at blob offset `offset`.
    pub(super) fn new(offset: u64, room: Room) -> Result<Self, IndexError> {
        Ok(Self {
            context: ZstdContext::new(offset, room)?,
            out: vec![0; BLOCK].into_boxed_slice(),
            offset,
            header: Vec::new(),
            inside: None,
            skip: 0,
        })
    }

    /// Forgets the frame that was being decoded, and begins at the frame at blob offset `offset`.
    pub(super) fn seek(&mut self, offset: u64) -> Result<(), IndexError> {
        self.context.reset(offset)?;
        if self.inside.take().is_some() {
            self.context.forget_dictionary(offset)?;
        }
        self.header.clear();
        (self.offset, self.skip) = (offset, 0);
        Ok(())
    }

    pub(super) fn step<'a, 'i: 'a>(&'a mut self, input: &mut &'i [u8]) -> Result<Step<'a>, IndexError> {
        while !self.header.is_empty() {
            let decoded = self.context.decode(&self.header, &mut self.out, self.offset)?;
            self.header.drain(..decoded.taken);
        }
        loop {
            let skipped = self.skip.min(input.len());
            *input = &input[skipped..];
            self.offset += skipped as u64;
            self.skip -= skipped;
            let decoded = self.context.decode(input, &mut self.out, self.offset)?;
            self.context.ask_for_room(self.offset)?;
            *input = &input[decoded.taken..];
            self.offset += decoded.taken as u64;
            if decoded.ended {
                self.context.frame_ended();
                if let Some(checksum) = self.inside.take() {
                    self.skip = checksum;
                    self.context.forget_dictionary(self.offset)?;
                }
            }
            if decoded.made > 0 {
                return Ok(Step::Output {
                    bytes: &self.out[..decoded.made],
                    position: super::BitPosition(self.offset * 8),
                });
            }
            // Another round without progress is safe: libzstd reports an error after some rounds.
            if decoded.taken == 0 && input.is_empty() {
                return Ok(Step::Input);
            }
        }
    }
}
