//! Chooses the restarts inside frames.
//!
//! # How it works
//! The pass over a layer tells the planner every block. The planner follows them ([`Follower`]) and counts what each
//! candidate would need of the window ([`Coverage`]). Once no later match can read what lies before a candidate, the
//! candidate is decided: it becomes a restart if the index may still grow by the bytes that it takes.
//!
//! A byte that a restart needs, and that lies before the restart before it, is needed by that restart too. So a restart
//! keeps only bytes behind the restart before it ([`Restart`]).
//!
//! The index may take [`BUDGET`] of the blob. So restarts are close together where they need little, and far apart where
//! they need much. A read decodes half of the bytes between two restarts on average, and a stretch twice as long is also
//! read twice as often. So the worth of a restart grows with the square of its distance ([`PRICE`]).
//!
//! # Invariants
//! - The restarts depend on nothing but the blob, and on whether there was memory.
//! - A frame that the planner does not understand gets no further restarts. That is no error: libzstd decides what is
//!   valid.

use std::collections::VecDeque;
use std::mem;

use super::block::{Carried, Follower, LiveTable, TableUse};
use super::coverage::{Coverage, SegmentNumber};
use super::frame::{BlockKind, FrameHeader};
use super::restart::Restart;
use crate::index::{SpanId, step::SpanRestart};

/// Bytes of index that the planner allows, in 1/10000 of the blob's bytes so far. The goal for the whole index is 1.5 %.
/// The fuzz targets want as many restarts as there can be.
const BUDGET: u64 = if cfg!(fuzzing) { 1 << 40 } else { 145 };
/// Most memory for following a frame. With more, decoders of frames with long windows would exceed what they may take while
/// the planner gives up; with less, frames with windows that are a little longer than usual get no restarts.
const MOST_MEMORY: u64 = 512 << 20;
/// Bytes of the index for each span.
const SPAN_ENTRY: u64 = 64;
/// A restart may take about `share * share / PRICE` bytes, where `share` is [`BUDGET`] of the bytes of the blob since the
/// restart before it. With a larger value, cheap restarts are missed; with a smaller one, dear ones close to others use
/// up what is allowed.
const PRICE: u64 = 6000;
/// Least number of needed bytes from which the planner learns how well they compress. Below it, most of a restart is
/// tables.
const TELLING: u64 = 4096;

/// A block that was decoded.
#[derive(Debug)]
pub(super) struct DecodedBlock {
    pub(super) kind: BlockKind,
    /// The content as it is in the blob, behind [`super::sequences::PAD`] other bytes.
    pub(super) content: Vec<u8>,
    /// What the block decodes to, in the first `made` bytes.
    pub(super) output: Vec<u8>,
    pub(super) made: usize,
    /// The span that begins with the block, if decoding could begin there, and the block's offset in the blob.
    pub(super) candidate: Option<(SpanId, u64)>,
}

/// A candidate that is not decided yet.
#[derive(Debug)]
struct RestartCandidate {
    span: SpanId,
    segment: SegmentNumber,
    /// Offset in the blob.
    offset: u64,
    /// Position in the frame's output.
    position: u64,
    carried: Carried,
    /// Tables of one symbol that a later block might use. A dictionary cannot contain such a table.
    at_risk: [bool; 3],
    usable: bool,
}

impl RestartCandidate {
    /// Notes what a block behind the candidate did with its tables.
    fn note(&mut self, uses: TableUse) {
        for n in 0..3 {
            self.usable &= !(self.at_risk[n] && uses.reused[n]);
            self.at_risk[n] &= !uses.replaced[n];
        }
    }
}

/// The frame that is being followed.
#[derive(Debug)]
struct Frame {
    header: FrameHeader,
    follower: Follower,
    coverage: Coverage,
    candidates: VecDeque<RestartCandidate>,
    /// Position of the last restart in the frame's output, its segment, and its offset in the blob.
    restart_at: u64,
    restart: SegmentNumber,
    restart_offset: u64,
    /// Position of the last candidate.
    candidate_at: u64,
}

/// Chooses restarts while blocks come in.
#[derive(Debug)]
pub(super) struct Planner {
    spacing: u64,
    frame: Option<Box<Frame>>,
    /// Bytes that the chosen restarts take in the index.
    spent: u64,
    /// Stored size of the last restart, in 1/1000 of the bytes that it needed of the window.
    rate: u64,
    /// Restarts that nobody has taken yet.
    chosen: Vec<SpanRestart>,
}

impl Planner {
    /// Makes a planner of candidates that are at least `spacing` bytes of tar apart.
    pub(super) fn new(spacing: u64) -> Self {
        Self {
            spacing,
            frame: None,
            spent: 0,
            rate: 500,
            chosen: Vec::new(),
        }
    }

    /// Returns the memory that following a frame takes at most. `None` if it is not worth following, or if nothing can
    /// be known of it.
    pub(super) fn memory(header: &FrameHeader, spacing: u64) -> Option<u64> {
        let short = header.content.is_some_and(|content| content <= spacing);
        let memory = Coverage::memory(header.window, header.content, spacing);
        (!short && !header.dictionary && memory <= MOST_MEMORY).then_some(memory)
    }

    /// Begins a frame, of which the first block is at blob offset `offset`.
    pub(super) fn begin(&mut self, header: FrameHeader, offset: u64) {
        let coverage = Coverage::new(header.window, header.content, self.spacing);
        self.frame = coverage.map(|coverage| {
            Box::new(Frame {
                header,
                follower: Follower::new(),
                coverage,
                candidates: VecDeque::new(),
                restart_at: 0,
                restart: 0,
                restart_offset: offset,
                candidate_at: 0,
            })
        });
    }

    /// Gives up the frame: it gets no further restarts.
    pub(super) fn give_up(&mut self) {
        self.frame = None;
    }

    /// Ends the frame.
    pub(super) fn end(&mut self) {
        if let Some(frame) = &mut self.frame {
            frame.coverage.finish();
            for candidate in &mut frame.candidates {
                candidate.at_risk = [false; 3];
            }
            self.decide();
        }
        self.frame = None;
    }

    /// Takes a block. Its content remains, and its output is what the next block may use.
    pub(super) fn block(&mut self, block: &mut DecodedBlock) {
        let spacing = self.spacing;
        if let Some(frame) = &mut self.frame
            && frame.follow(block, spacing).is_none()
        {
            self.frame = None;
        }
        self.decide();
    }

    /// Returns the restarts that were chosen since the last call, in the order of their spans.
    pub(super) fn take(&mut self) -> Vec<SpanRestart> {
        mem::take(&mut self.chosen)
    }

    /// Decides the candidates about which everything is known.
    fn decide(&mut self) {
        let Some(frame) = &mut self.frame else { return };
        while let Some(candidate) = frame.candidates.front()
            && frame.coverage.is_complete(candidate.segment)
        {
            let segment = candidate.segment;
            let entries = (u64::from(candidate.span.0) + 1) * SPAN_ENTRY;
            let allowed = budget(candidate.offset).saturating_sub(entries + self.spent);
            let share = budget(candidate.offset.saturating_sub(frame.restart_offset));
            let worth = share.saturating_mul(share) / PRICE;
            let needed = frame.coverage.cost(segment, frame.restart);
            if candidate.usable
                && candidate.at_risk == [false; 3]
                && needed.saturating_mul(self.rate) / 1000 <= allowed.min(worth)
                && let Some(stored) = frame.stored(candidate)
            {
                let len = stored.len() as u64;
                if needed >= TELLING {
                    self.rate = (len * 1000 / needed).clamp(100, 1000);
                }
                if len <= allowed {
                    self.spent += len;
                    self.chosen.push((candidate.span, stored));
                    frame.restart_at = candidate.position;
                    frame.restart = segment;
                    frame.restart_offset = candidate.offset;
                }
            }
            frame.coverage.forget(segment);
            frame.candidates.pop_front();
        }
    }
}

/// Returns [`BUDGET`] of this many bytes of the blob.
fn budget(bytes: u64) -> u64 {
    bytes.saturating_mul(BUDGET) / 10_000
}

impl Frame {
    /// Follows a block. `None` if it is not understood.
    fn follow(&mut self, block: &mut DecodedBlock, spacing: u64) -> Option<()> {
        let position = self.coverage.position();
        if let Some((span, offset)) = block.candidate
            && position - self.candidate_at >= Coverage::spacing(self.header.window, spacing)
        {
            self.candidate_at = position;
            let carried = self.follower.carried().clone();
            let is_single = |table: &LiveTable| *table == LiveTable::Single;
            self.candidates.push_back(RestartCandidate {
                span,
                segment: self.coverage.begin_segment()?,
                offset,
                position,
                at_risk: [&carried.literals, &carried.offset, &carried.matches].map(is_single),
                carried,
                usable: true,
            });
        }
        if block.kind == BlockKind::Compressed {
            let mut matches = self.coverage.matches();
            let (literals, uses) = self.follower.follow(&block.content, &mut matches)?;
            // The last literals follow the last match.
            let last = (block.made as u64).checked_sub(matches.made())?;
            if literals as u64 != matches.literals() + last {
                return None;
            }
            for candidate in &mut self.candidates {
                candidate.note(uses);
            }
        }
        let appended = self.coverage.append(mem::take(&mut block.output), block.made);
        block.output = self.coverage.take_spare().unwrap_or_default();
        appended.then_some(())
    }

    /// Returns the restart of a candidate as the index keeps it.
    fn stored(&self, candidate: &RestartCandidate) -> Option<Vec<u8>> {
        let (sparse, reach) = self.coverage.window_of(candidate.segment, self.restart)?;
        let covers = candidate.position - self.restart_at;
        Restart::new(&candidate.carried, &self.header, reach, covers, sparse)?.store()
    }
}
