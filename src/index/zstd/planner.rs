//! Chooses the restarts inside frames.
//!
//! # How it works
//! The pass over a layer tells the planner every block. The planner follows them ([`Follower`]) and counts what each
//! candidate would need of the window ([`Coverage`]). A candidate is complete once no later match can read what lies
//! before it.
//!
//! A byte that a restart needs, and that lies before the restart before it, is needed by that restart too. So a restart
//! keeps only bytes behind the restart before it ([`Restart`]), and what it takes in the index depends on that one.
//!
//! The index may take [`BUDGET`] of the blob. So restarts are close together where they need little, and far apart where
//! they need much. As soon as the complete candidates cover [`HORIZON`] bytes of output, the best restarts among them are
//! looked for (`choice`). Those in the first quarter are then decided; the others wait for the next round, which sees
//! further.
//!
//! # Invariants
//! - The restarts depend on nothing but the blob, and on whether there was memory. If there was not, the index says so.
//! - A frame that the planner does not understand gets no further restarts. That is no error: libzstd decides what is
//!   valid.

use std::collections::VecDeque;
use std::mem;

use super::block::{Carried, Follower, LiveTable, TableUse};
use super::choice::{self, CandidateCosts, RestartPlace};
use super::coverage::Coverage;
use super::frame::{BLOCK_HEADER, BlockKind, FrameHeader};
use super::restart::Restart;
use super::segment::SegmentNumber;
use super::sequences::{self, FIRST_REPEATS, PAD, Sequence};
use super::series::SeriesWriter;
use crate::index::{SpanId, step::SpanRestart};

/// Bytes of index that the planner allows, in 1/10000 of the blob's bytes so far. The goal for an index file is 1.5 % of
/// an image, and the table of contents is part of it.
/// The fuzz targets want as many restarts as there can be.
const BUDGET: u64 = if cfg!(fuzzing) { 1 << 40 } else { 115 };
/// How much a byte of the index must save: a byte of the blob for each read of this many times the distance of
/// candidates, in bytes of tar. With less, restarts are chosen early that leave no bytes for better ones later. With more,
/// bytes of the index are left over. The fuzz targets want as many restarts as there can be.
const PRICE: u64 = if cfg!(fuzzing) { 0 } else { 600 };
/// The price is at most this many times the bytes of the frame so far, because there are few reads of a short frame.
const SHORT_FRAME: u64 = 2;
/// Bytes of output of the candidates among which restarts are looked for.
const HORIZON: u64 = 16 << 20;
/// Most memory for following a frame. With more, decoders of frames with long windows would exceed what they may take while
/// the planner gives up; with less, frames with windows that are a little longer than usual get no restarts.
const MOST_MEMORY: u64 = 512 << 20;
/// Bytes of the index for each span.
const SPAN_ENTRY: u64 = 64;
/// Bytes of the index for the tables of a restart.
const TABLES: u64 = 100;
/// Bytes that a restart takes for each 1000 bytes of the blob that have as many bytes of output. The planner begins with
/// this rate. The bytes of a restart are torn out of their context, so they compress less well than in the blob.
const FIRST_RATE: u64 = 1400;
/// Least size of a restart from which the planner learns the rate. Below it, most of a restart is tables.
const TELLING: u64 = 2048;

/// A block that was decoded.
#[derive(Debug)]
pub(super) struct DecodedBlock {
    pub(super) kind: BlockKind,
    /// The content as it is in the blob, behind [`super::sequences::PAD`] other bytes.
    pub(super) content: Vec<u8>,
    /// The block's sequences, if they are decoded already. Otherwise, a buffer for them.
    pub(super) sequences: Vec<Sequence>,
    /// Whether the sequences are decoded already.
    pub(super) are_decoded: bool,
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
    fn place(&self) -> RestartPlace {
        RestartPlace {
            offset: self.offset,
            position: self.position,
        }
    }

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
    /// The three last offsets.
    repeats: [u64; 3],
    /// Sequences of a block.
    sequences: Vec<Sequence>,
    coverage: Coverage,
    candidates: VecDeque<RestartCandidate>,
    /// Position of the last restart in the frame's output, its segment, and its offset in the blob.
    restart_at: u64,
    restart: SegmentNumber,
    restart_offset: u64,
    /// Position of the last candidate.
    candidate_at: u64,
    /// Offset in the blob of the next block.
    offset: u64,
    /// Whether all blocks came.
    finished: bool,
}

/// Chooses restarts while blocks come in.
#[derive(Debug)]
pub(super) struct Planner {
    spacing: u64,
    frame: Option<Box<Frame>>,
    /// What compresses the restarts, once there was one.
    series: Option<SeriesWriter>,
    /// Bytes that the chosen restarts take in the index.
    spent: u64,
    /// Bytes that a restart takes for each 1000 bytes of the blob that have as many bytes of output.
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
            series: None,
            spent: 0,
            rate: FIRST_RATE,
            chosen: Vec::new(),
        }
    }

    /// Returns the memory that following a frame takes at most. `None` if it is not worth following, or if nothing can
    /// be known of it.
    pub(super) fn memory(header: &FrameHeader, spacing: u64) -> Option<u64> {
        let short = header.content.is_some_and(|content| content <= spacing);
        let kept = header.window.saturating_add(HORIZON + spacing);
        let memory =
            Coverage::memory(header.window, header.content, spacing, kept).saturating_add(SeriesWriter::MEMORY);
        (!short && !header.dictionary && memory <= MOST_MEMORY).then_some(memory)
    }

    /// Begins a frame, of which the first block is at blob offset `offset`.
    pub(super) fn begin(&mut self, header: FrameHeader, offset: u64) {
        // Decoding in this frame begins without the restarts of another one.
        if let Some(series) = &mut self.series {
            series.end();
        }
        let coverage = Coverage::new(header.window, header.content, self.spacing, offset);
        self.frame = coverage.map(|coverage| {
            Box::new(Frame {
                header,
                follower: Follower::new(),
                repeats: FIRST_REPEATS,
                sequences: Vec::new(),
                coverage,
                candidates: VecDeque::new(),
                restart_at: 0,
                restart: 0,
                restart_offset: offset,
                candidate_at: 0,
                offset,
                finished: false,
            })
        });
    }

    /// Gives up the frame: it gets no further restarts.
    pub(super) fn give_up(&mut self) {
        self.frame = None;
    }

    /// Ends the frame.
    pub(super) fn end(&mut self) {
        if let Some(mut frame) = self.frame.take() {
            frame.coverage.finish();
            frame.finished = true;
            for candidate in &mut frame.candidates {
                candidate.at_risk = [false; 3];
            }
            self.decide(&mut frame);
        }
    }

    /// Takes a block. Its content remains, and its output is what the next block may use.
    pub(super) fn block(&mut self, block: &mut DecodedBlock) {
        if let Some(mut frame) = self.frame.take()
            && frame.follow(block, self.spacing).is_some()
        {
            self.decide(&mut frame);
            self.frame = Some(frame);
        }
    }

    /// Returns the restarts that were chosen since the last call, in the order of their spans.
    pub(super) fn take(&mut self) -> Vec<SpanRestart> {
        mem::take(&mut self.chosen)
    }

    /// Decides candidates, as long as enough of them are complete.
    fn decide(&mut self, frame: &mut Frame) {
        while let Some(region) = frame.region() {
            let spans = frame.candidates[region.complete - 1].span.0 + 1;
            let end = frame.end_of(&region);
            let most = budget(end.offset).saturating_sub(u64::from(spans) * SPAN_ENTRY);
            let places = frame.places(&region, end);
            let costs = frame.costs(&region, self.rate);
            let price = (PRICE * self.spacing).min(end.position.saturating_mul(SHORT_FRAME));
            let chosen = choice::choose(&places, &costs, price, most.saturating_sub(self.spent));
            let mut before = 0;
            for place in chosen.into_iter().take_while(|&place| place <= region.decided) {
                if self.series.is_none() {
                    self.series = SeriesWriter::new();
                }
                let Some(series) = &mut self.series else { break };
                // The first place is that of the last restart.
                // What a restart takes is known only now, and may be more than was expected.
                let allowed = (most + most / 8).saturating_sub(self.spent);
                let Some(stored) = frame.make_restart(place - 1, allowed, series) else {
                    continue;
                };
                let len = stored.len() as u64;
                let expected = costs[place - 1][mem::replace(&mut before, place)].unwrap_or(0);
                if len.min(expected) >= TELLING {
                    let rate = self.rate * (len - TABLES) / (expected - TABLES);
                    self.rate = ((self.rate * 7 + rate) / 8).clamp(500, 5000);
                }
                self.spent += len;
                self.chosen.push((frame.candidates[place - 1].span, stored));
            }
            frame.forget(region.decided);
        }
    }
}

/// The candidates among which restarts are looked for, the first ones of the frame.
#[derive(Debug)]
struct Region {
    /// Number of candidates.
    complete: usize,
    /// Number of those that are decided now.
    decided: usize,
}

/// Returns [`BUDGET`] of this many bytes of the blob.
fn budget(bytes: u64) -> u64 {
    bytes.saturating_mul(BUDGET) / 10_000
}

impl Frame {
    /// Follows a block. `None` if it is not understood.
    fn follow(&mut self, block: &mut DecodedBlock, spacing: u64) -> Option<()> {
        let position = self.coverage.position();
        self.offset += (BLOCK_HEADER + block.content.len()).saturating_sub(PAD) as u64;
        if let Some((span, offset)) = block.candidate
            && position - self.candidate_at >= Coverage::spacing(self.header.window, spacing)
        {
            self.candidate_at = position;
            let live = self.follower.live().clone();
            let is_single = |table: &LiveTable| *table == LiveTable::Single;
            self.candidates.push_back(RestartCandidate {
                span,
                segment: self.coverage.begin_segment(offset)?,
                offset,
                position,
                at_risk: [&live.literals, &live.offset, &live.matches].map(is_single),
                carried: Carried {
                    live,
                    repeats: self.repeats,
                },
                usable: true,
            });
        }
        if block.kind == BlockKind::Compressed {
            let parts = self.follower.read(&block.content)?;
            let decoded = match block.are_decoded {
                true => &block.sequences,
                false => {
                    self.follower.sequences(&block.content, &parts, &mut self.sequences)?;
                    &self.sequences
                }
            };
            let mut matches = self.coverage.matches();
            sequences::follow(decoded, &mut self.repeats, &mut matches)?;
            // The last literals follow the last match.
            let last = (block.made as u64).checked_sub(matches.made())?;
            if parts.literals as u64 != matches.literals() + last {
                return None;
            }
            for candidate in &mut self.candidates {
                candidate.note(parts.uses);
            }
        }
        let appended = self.coverage.append(mem::take(&mut block.output), block.made);
        block.output = self.coverage.take_spare().unwrap_or_default();
        appended.then_some(())
    }

    /// Returns the candidates among which restarts are looked for, once there are enough.
    fn region(&self) -> Option<Region> {
        let first = self.candidates.front()?.position;
        if self.finished {
            let complete = self.candidates.len();
            return Some(Region {
                complete,
                decided: complete,
            });
        }
        let last = self.candidates.back()?.position;
        if last - first < HORIZON {
            return None;
        }
        let complete = |candidate: &RestartCandidate| self.coverage.is_complete(candidate.segment);
        let complete = self.candidates.partition_point(complete);
        let last = self.candidates.get(complete)?.position;
        if last - first < HORIZON {
            return None;
        }
        let decided = self
            .candidates
            .partition_point(|candidate| candidate.position < first + HORIZON / 4);
        Some(Region { complete, decided })
    }

    /// Returns the end of a region: the next candidate, or the end of the frame.
    fn end_of(&self, region: &Region) -> RestartPlace {
        match self.candidates.get(region.complete) {
            Some(candidate) => candidate.place(),
            None => RestartPlace {
                offset: self.offset,
                position: self.coverage.position(),
            },
        }
    }

    /// Returns the last restart, the candidates of a region and its end.
    fn places(&self, region: &Region, end: RestartPlace) -> Vec<RestartPlace> {
        let restart = RestartPlace {
            offset: self.restart_offset,
            position: self.restart_at,
        };
        let candidates = self.candidates.range(..region.complete).map(RestartCandidate::place);
        [restart].into_iter().chain(candidates).chain([end]).collect()
    }

    /// Returns about how many bytes of the index the candidates of a region take, by the restart before them: first the
    /// last one that there is, then each candidate of the region.
    fn costs(&self, region: &Region, rate: u64) -> Vec<CandidateCosts> {
        let bytes = |needed: Option<u64>| needed.map(|needed| TABLES + needed.saturating_mul(rate) / 1000);
        let first = self.candidates.front().map_or(0, |first| first.segment);
        let cost = |(n, candidate): (usize, &RestartCandidate)| {
            let mut costs = vec![None; n + 1];
            if !candidate.usable || candidate.at_risk != [false; 3] {
                return costs;
            }
            let (mut lowest, mut all) = (n + 1, Some(0));
            self.coverage.costs(candidate.segment, |segment, needed| {
                // Each candidate begins a segment, so those of the region are numbered without gaps.
                let place = match segment.checked_sub(first) {
                    Some(n) => n as usize + 1,
                    None if segment >= self.restart => 0,
                    None => return,
                };
                costs[place] = bytes(needed);
                (lowest, all) = (place, needed);
            });
            // Nothing is needed of the segments before those.
            costs[..lowest].fill(bytes(all));
            costs
        };
        self.candidates.range(..region.complete).enumerate().map(cost).collect()
    }

    /// Makes candidate `n` a restart, and returns what the index keeps of it. `None` if that is more than `allowed`
    /// bytes, or if there can be no restart.
    fn make_restart(&mut self, n: usize, allowed: u64, series: &mut SeriesWriter) -> Option<Vec<u8>> {
        let candidate = self.candidates.get(n)?;
        let (segment, place) = (candidate.segment, candidate.place());
        let (sparse, reach) = self.coverage.window_of(segment, place.position, self.restart);
        let covers = place.position - self.restart_at;
        let restart = Restart::new(&candidate.carried, &self.header, reach, covers, sparse)?;
        let stored = series.add(&restart.store())?;
        if stored.len() as u64 > allowed {
            series.end();
            return None;
        }
        self.restart_at = place.position;
        self.restart = segment;
        self.restart_offset = place.offset;
        Some(stored)
    }

    /// Forgets the first `count` candidates.
    fn forget(&mut self, count: usize) {
        self.candidates.drain(..count);
        let next = self
            .candidates
            .front()
            .map_or(SegmentNumber::MAX, |first| first.segment);
        self.coverage.forget(next, self.restart);
    }
}
