//! Which bytes of a frame's output are read again, and from how far.
//!
//! # How it works
//! The output is cut into *segments*. Each begins at a block where decoding could begin again, a candidate. Beside
//! every byte of the output there is a *mark*: the last segment from which a match reads the byte. At first that is the
//! byte's own segment. A candidate needs exactly the bytes before it whose mark is its own segment or a later one.
//!
//! Two rings hold the output and the marks of the last window. Once no match can reach a segment any more, its marked
//! bytes are copied out of the rings ([`KeptSegment`]), and they stay until no candidate needs them.
//!
//! # Invariants
//! - Memory is bounded by what [`Coverage::memory`] says.

use std::collections::VecDeque;

use super::frame::BLOCK;
use super::sequences::Matches;

/// Bytes of bookkeeping for one run of marked bytes.
const RUN: usize = size_of::<KeptRun>();
/// Bytes by which the rings grow at once.
const GROWTH: usize = 4 << 20;

/// Number of a segment within its frame. The frame itself begins segment 0.
pub(super) type SegmentNumber = u32;

/// Marked bytes of a segment that no later match can read.
#[derive(Debug)]
struct KeptSegment {
    segment: SegmentNumber,
    /// Positions of the segment in the frame's output.
    start: u64,
    end: u64,
    runs: Vec<KeptRun>,
    /// The bytes of all runs.
    bytes: Vec<u8>,
    /// Whether more bytes are marked than are worth keeping. No restart can use them then.
    too_many: bool,
}

/// Neighbouring bytes with the same mark.
#[derive(Debug, Clone, Copy)]
struct KeptRun {
    /// Offset of the first byte from the start of the segment.
    offset: u32,
    len: u32,
    mark: SegmentNumber,
}

/// Bytes before a restart that it needs, or that a later one needs.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct SparseWindow {
    /// Where the bytes lie: how far each run ends before the restart, and its length. In order of the output.
    pub(super) runs: Vec<(u64, u64)>,
    /// The bytes of all runs.
    pub(super) bytes: Vec<u8>,
}

/// Neighbouring bytes that a candidate needs.
struct NeededRun<'a> {
    segment: SegmentNumber,
    /// Position in the frame's output.
    start: u64,
    bytes: &'a [u8],
}

/// Marks of one frame's output.
#[derive(Debug)]
pub(super) struct Coverage {
    window: u64,
    /// Most bytes of a segment.
    longest: u64,
    /// Most bytes of the frame's output.
    most: u64,
    /// Size of the rings once they are full.
    capacity: usize,
    output: Vec<u8>,
    marks: Vec<u8>,
    /// Index in the rings of the next byte of output.
    head: usize,
    /// Bytes of output so far.
    position: u64,
    /// Whether the frame is over.
    finished: bool,
    /// Segments whose bytes are in the rings, with their starts. The last one is the present segment.
    segments: VecDeque<(SegmentNumber, u64)>,
    kept: VecDeque<KeptSegment>,
    /// Bytes of memory in `kept`.
    kept_size: usize,
    /// Segments whose candidates are not forgotten, with their starts.
    candidates: VecDeque<(SegmentNumber, u64)>,
}

impl Coverage {
    /// Begins a frame with this window. Segments have at least `spacing` bytes.
    pub(super) fn new(window: u64, content: Option<u64>, spacing: u64) -> Option<Self> {
        Some(Self {
            window,
            longest: longest(window, spacing),
            most: content.unwrap_or(u64::MAX),
            capacity: usize::try_from(ring(window, content, spacing)).ok()?,
            output: Vec::new(),
            marks: Vec::new(),
            head: 0,
            position: 0,
            finished: false,
            segments: VecDeque::from([(0, 0)]),
            kept: VecDeque::new(),
            kept_size: 0,
            candidates: VecDeque::new(),
        })
    }

    /// Returns the smallest distance of candidates for this window. With it, a mark of one byte tells all segments
    /// apart that the rings contain.
    pub(super) fn spacing(window: u64, spacing: u64) -> u64 {
        spacing.max(window / 64)
    }

    /// Returns the bytes of memory that a whole frame takes: two rings, and a quarter as much for the bytes that are
    /// kept.
    pub(super) fn memory(window: u64, content: Option<u64>, spacing: u64) -> u64 {
        ring(window, content, spacing).saturating_mul(5) / 2
    }

    /// Returns the bytes of the frame's output so far.
    pub(super) fn position(&self) -> u64 {
        self.position
    }

    fn current(&self) -> (SegmentNumber, u64) {
        self.segments.back().copied().unwrap_or_default()
    }

    /// Begins a segment, and with it a candidate, at the present position. Returns its number, or `None` if the segment
    /// before it is too long for the rings.
    pub(super) fn begin_segment(&mut self) -> Option<SegmentNumber> {
        let (last, start) = self.current();
        if self.position - start > self.longest {
            return None;
        }
        let segment = last + 1;
        self.segments.push_back((segment, self.position));
        self.candidates.push_back((segment, self.position));
        Some(segment)
    }

    /// Whether no later match can read what lies before the candidate of a segment.
    pub(super) fn is_complete(&self, segment: SegmentNumber) -> bool {
        let start = self.start_of(segment);
        self.finished || start.is_none_or(|start| start.saturating_add(self.window) <= self.position)
    }

    fn start_of(&self, segment: SegmentNumber) -> Option<u64> {
        let candidate = self.candidates.iter().find(|candidate| candidate.0 == segment);
        candidate.map(|&(_, start)| start)
    }

    /// Takes the output of a block. Returns false if there is no memory, or if the frame is longer than its header says.
    pub(super) fn append(&mut self, mut bytes: &[u8]) -> bool {
        if bytes.len() as u64 > self.most - self.position {
            return false;
        }
        let mark = self.current().0 as u8;
        while !bytes.is_empty() {
            let (head, tail) = bytes.split_at(bytes.len().min(self.capacity - self.head));
            let end = self.head + head.len();
            if self.output.len() < end {
                let more = end - self.output.len();
                if !grow(&mut self.output, more, self.capacity) || !grow(&mut self.marks, more, self.capacity) {
                    return false;
                }
            }
            self.output[self.head..end].copy_from_slice(head);
            self.marks[self.head..end].fill(mark);
            self.head = if end == self.capacity { 0 } else { end };
            self.position += head.len() as u64;
            bytes = tail;
        }
        while let (Some(&(segment, start)), Some(&(_, end))) = (self.segments.front(), self.segments.get(1))
            && end.saturating_add(self.window) <= self.position
        {
            self.keep(segment, start, end);
        }
        true
    }

    /// Ends the frame: no match follows.
    pub(super) fn finish(&mut self) {
        while let (Some(&(segment, start)), Some(&(_, end))) = (self.segments.front(), self.segments.get(1)) {
            self.keep(segment, start, end);
        }
        self.finished = true;
    }

    /// Copies the marked bytes of the first segment out of the rings.
    fn keep(&mut self, segment: SegmentNumber, start: u64, end: u64) {
        self.segments.pop_front();
        let current = self.current().0;
        let len = (end - start) as usize;
        let mut kept = KeptSegment {
            segment,
            start,
            end,
            runs: Vec::new(),
            bytes: Vec::new(),
            too_many: false,
        };
        let mut done = 0;
        for (from, part) in self.parts(start, len) {
            kept.add(
                done,
                &self.marks[from..from + part],
                &self.output[from..from + part],
                current,
            );
            done += part;
        }
        let most = self.capacity / 2;
        if self.kept_size + kept.size() > most {
            let first = self
                .candidates
                .front()
                .map_or(SegmentNumber::MAX, |&(segment, _)| segment);
            self.kept.iter_mut().for_each(|kept| kept.shrink(first));
            self.kept_size = self.kept.iter().map(KeptSegment::size).sum();
        }
        if self.kept_size + kept.size() > most {
            kept.too_many = true;
            (kept.runs, kept.bytes) = (Vec::new(), Vec::new());
        }
        self.kept_size += kept.size();
        self.kept.push_back(kept);
    }

    /// Returns the index and the length of the one or two parts of the rings that hold `len` bytes from `start` on.
    fn parts(&self, start: u64, len: usize) -> impl Iterator<Item = (usize, usize)> + use<> {
        let back = (self.position - start) as usize;
        let from = if back <= self.head {
            self.head - back
        } else {
            self.head + self.capacity - back
        };
        let first = len.min(self.capacity - from);
        [(from, first), (0, len - first)]
            .into_iter()
            .filter(|&(_, len)| len > 0)
    }

    /// Returns the runs of bytes that the candidate of a segment needs, each with the positions of its segment. `None`
    /// if they are too many. The candidate must be complete.
    fn runs_of(&self, segment: SegmentNumber) -> Option<impl Iterator<Item = NeededRun<'_>>> {
        let before = || self.kept.iter().take_while(move |kept| kept.segment < segment);
        if before().any(|kept| kept.too_many) {
            return None;
        }
        Some(before().flat_map(move |kept| {
            let mut rest = &kept.bytes[..];
            kept.runs.iter().filter_map(move |run| {
                let bytes;
                (bytes, rest) = rest.split_at(run.len as usize);
                (run.mark >= segment).then(|| NeededRun {
                    segment: kept.segment,
                    start: kept.start + u64::from(run.offset),
                    bytes,
                })
            })
        }))
    }

    /// Returns how many bytes the candidate of a segment needs that lie in segment `since` or a later one.
    pub(super) fn cost(&self, segment: SegmentNumber, since: SegmentNumber) -> Option<u64> {
        let runs = self.runs_of(segment)?.filter(|run| run.segment >= since);
        Some(runs.map(|run| run.bytes.len() as u64).sum())
    }

    /// Returns the bytes that the candidate of a segment needs and that lie in segment `since` or a later one. Also
    /// returns how far the bytes that it needs reach back in all. `None` if they are too many. The candidate must be
    /// complete.
    pub(super) fn window_of(&self, segment: SegmentNumber, since: SegmentNumber) -> Option<(SparseWindow, u64)> {
        let restart = self.start_of(segment)?;
        let mut sparse = SparseWindow::default();
        let mut reach = 0;
        for NeededRun {
            segment: of,
            start,
            bytes,
        } in self.runs_of(segment)?
        {
            reach = reach.max(restart - start);
            if of < since {
                continue;
            }
            let end = start + bytes.len() as u64;
            match sparse.runs.last_mut() {
                Some((back, len)) if *back == restart - start => {
                    *back = restart - end;
                    *len += end - start;
                }
                _ => sparse.runs.push((restart - end, end - start)),
            }
            sparse.bytes.extend_from_slice(bytes);
        }
        Some((sparse, reach))
    }

    /// Forgets all candidates up to and including that of `segment`, and the bytes that only they need.
    pub(super) fn forget(&mut self, segment: SegmentNumber) {
        while self.candidates.front().is_some_and(|candidate| candidate.0 <= segment) {
            self.candidates.pop_front();
        }
        let first = self.candidates.front().copied();
        let needed = |kept: &KeptSegment| {
            first.is_some_and(|(segment, start)| {
                kept.runs.iter().any(|run| run.mark >= segment)
                    || kept.too_many && kept.end > start.saturating_sub(self.window)
            })
        };
        while let Some(front) = self.kept.front()
            && !needed(front)
        {
            self.kept_size -= front.size();
            self.kept.pop_front();
        }
    }

    /// Returns a receiver for the matches of the next block.
    pub(super) fn matches(&mut self) -> BlockMatches<'_> {
        let (segment, segment_start) = self.current();
        BlockMatches {
            marks: &mut self.marks,
            capacity: self.capacity,
            head: self.head,
            mark: segment as u8,
            begin: self.position,
            position: self.position,
            segment_start,
            window: self.window,
            literals: 0,
        }
    }
}

/// Returns the most bytes of a segment. Candidates come every `spacing` bytes and at most one block later, and not every
/// candidate may begin a segment.
fn longest(window: u64, spacing: u64) -> u64 {
    let least = Coverage::spacing(window, spacing);
    least.saturating_add(spacing).saturating_add(2 * BLOCK as u64)
}

/// Size of a ring: a window, a segment that is not yet kept, and the blocks that overlap their ends.
fn ring(window: u64, content: Option<u64>, spacing: u64) -> u64 {
    let all = window
        .saturating_add(longest(window, spacing))
        .saturating_add(2 * BLOCK as u64);
    all.min(content.unwrap_or(u64::MAX).saturating_add(BLOCK as u64))
}

/// Lengthens a ring. Returns false if there is no memory.
fn grow(ring: &mut Vec<u8>, more: usize, capacity: usize) -> bool {
    let len = ring.len() + more;
    if ring.capacity() < len {
        let room = len.next_multiple_of(GROWTH).min(capacity).max(len) - ring.len();
        if ring.try_reserve_exact(room).is_err() {
            return false;
        }
    }
    ring.resize(len, 0);
    true
}

impl KeptSegment {
    /// Adds the marked bytes of a part of the segment, which begins `done` bytes behind the segment's start.
    fn add(&mut self, done: usize, marks: &[u8], output: &[u8], current: SegmentNumber) {
        let own = self.segment as u8;
        let mut at = 0;
        loop {
            at += count_same(&marks[at..], own);
            let Some(&mark) = marks.get(at) else { return };
            let len = count_same(&marks[at..], mark);
            self.runs.push(KeptRun {
                offset: (done + at) as u32,
                len: len as u32,
                // Marks are segments modulo 256, and none of them is later than the present one.
                mark: current - SegmentNumber::from((current as u8).wrapping_sub(mark)),
            });
            self.bytes.extend_from_slice(&output[at..at + len]);
            at += len;
        }
    }

    /// Bytes of memory.
    fn size(&self) -> usize {
        self.runs.len() * RUN + self.bytes.len()
    }

    /// Forgets the bytes that only candidates before that of segment `first` need.
    fn shrink(&mut self, first: SegmentNumber) {
        let (mut from, mut to) = (0, 0);
        let bytes = &mut self.bytes;
        self.runs.retain(|run| {
            let end = from + run.len as usize;
            let needed = run.mark >= first;
            if needed {
                bytes.copy_within(from..end, to);
                to += run.len as usize;
            }
            from = end;
            needed
        });
        bytes.truncate(to);
        bytes.shrink_to_fit();
        self.runs.shrink_to_fit();
    }
}

/// Returns how many marks at the front are `mark`.
fn count_same(marks: &[u8], mark: u8) -> usize {
    let eight = [mark; 8];
    let (chunks, _) = marks.as_chunks::<8>();
    let at = 8 * chunks.iter().take_while(|&&chunk| chunk == eight).count();
    at + marks[at..].iter().take_while(|&&other| other == mark).count()
}

/// Marks what the matches of one block read.
#[derive(Debug)]
pub(super) struct BlockMatches<'a> {
    marks: &'a mut [u8],
    capacity: usize,
    head: usize,
    mark: u8,
    /// Position of the block in the frame's output.
    begin: u64,
    /// Position in the frame's output behind the matches so far.
    position: u64,
    segment_start: u64,
    window: u64,
    literals: u64,
}

impl BlockMatches<'_> {
    /// Returns how many literals lie before the matches.
    pub(super) fn literals(&self) -> u64 {
        self.literals
    }

    /// Returns how many bytes the literals between the matches, and the matches, have made.
    pub(super) fn made(&self) -> u64 {
        self.position - self.begin
    }

    /// Marks `len` bytes from `start` on, all before the present segment.
    #[inline(always)]
    fn mark(&mut self, start: u64, len: usize) {
        let back = (self.begin - start) as usize;
        let from = if back <= self.head {
            self.head - back
        } else {
            self.head + self.capacity - back
        };
        let first = len.min(self.capacity - from);
        fill(&mut self.marks[from..from + first], self.mark);
        if first < len {
            fill(&mut self.marks[..len - first], self.mark);
        }
    }
}

/// Fills marks, which are few most of the time.
#[inline(always)]
fn fill(marks: &mut [u8], mark: u8) {
    let eight = [mark; 8];
    if marks.len() > 16 {
        marks.fill(mark);
    } else if let Some((head, _)) = marks.split_first_chunk_mut::<8>() {
        *head = eight;
        // The two parts overlap.
        if let Some((_, tail)) = marks.split_last_chunk_mut::<8>() {
            *tail = eight;
        }
    } else {
        for old in marks {
            *old = mark;
        }
    }
}

impl Matches for BlockMatches<'_> {
    #[inline(always)]
    fn take(&mut self, literals: usize, len: usize, offset: u64) -> bool {
        self.position += literals as u64;
        self.literals += literals as u64;
        if offset > self.position || offset > self.window {
            return false;
        }
        let start = self.position - offset;
        if start < self.segment_start {
            self.mark(start, len.min((self.segment_start - start) as usize));
        }
        self.position += len as u64;
        true
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    /// Marks random matches, and compares what each candidate needs with a simple account of it.
    #[test]
    fn candidates_need_what_later_matches_read_before_them() {
        let mut rng = fastrand::Rng::with_seed(3);
        let (window, spacing) = (70_000u64, 5000);
        let mut coverage = Coverage::new(window, Some(1 << 22), spacing).unwrap();
        let mut output: Vec<u8> = Vec::new();
        let mut restarts: Vec<(SegmentNumber, usize)> = Vec::new();
        let mut reads: Vec<(usize, usize, usize)> = Vec::new();
        let mut last = 0;
        for _ in 0..400 {
            if output.len() - last >= spacing as usize {
                last = output.len();
                restarts.push((coverage.begin_segment().unwrap(), last));
            }
            let block = rng.usize(1..3000);
            let mut matches = coverage.matches();
            let (mut at, end) = (output.len(), output.len() + block);
            while at < end {
                let literals = rng.usize(0..=(end - at).min(300));
                at += literals;
                if at == end || at == 0 {
                    break;
                }
                let len = rng.usize(1..=(end - at).min(90));
                let offset = rng.usize(1..=at.min(window as usize));
                assert!(matches.take(literals, len, offset as u64));
                reads.push((at - offset, len, at));
                at += len;
            }
            output.extend(std::iter::repeat_with(|| rng.u8(..)).take(block));
            let from = output.len() - block;
            assert!(coverage.append(&output[from..]));
        }
        coverage.finish();
        assert!(restarts.len() > 60);
        let starts: HashMap<SegmentNumber, usize> = restarts.iter().copied().collect();
        for (segment, restart) in restarts {
            let mut needed = vec![false; restart];
            for &(from, len, to) in &reads {
                if to >= restart {
                    let end = (from + len).min(restart);
                    needed[from.min(end)..end].fill(true);
                }
            }
            let count = |range: std::ops::Range<usize>| needed[range].iter().filter(|&&needed| needed).count() as u64;
            // Once all that it needs, once only what it needs of the last 40,000 bytes or so.
            let all = (coverage.window_of(segment, 0), 0);
            let since = segment.saturating_sub(8);
            let from = starts.get(&since).copied().unwrap_or(0);
            for ((window, from), since) in [(all, 0), ((coverage.window_of(segment, since), from), since)] {
                let (sparse, reach) = window.unwrap();
                assert_eq!(coverage.cost(segment, since), Some(count(from..restart)));
                let first = needed.iter().position(|&needed| needed);
                assert_eq!(reach as usize, first.map_or(0, |first| restart - first));
                let mut bytes = &sparse.bytes[..];
                let mut found = vec![false; restart];
                for (back, len) in sparse.runs {
                    let end = restart - back as usize;
                    let range = end - len as usize..end;
                    let (head, tail) = bytes.split_at(range.len());
                    assert!(head == &output[range.clone()]);
                    found[range].fill(true);
                    bytes = tail;
                }
                assert!(found[from..] == needed[from..] && !found[..from].contains(&true));
            }
        }
    }

    #[test]
    fn matches_beyond_the_window_are_not_taken() {
        let mut coverage = Coverage::new(1000, None, 4000).unwrap();
        assert!(!coverage.matches().take(10, 3, 11));
        assert!(coverage.append(&[1; 3000]));
        assert!(coverage.matches().take(10, 3, 1000));
        assert!(!coverage.matches().take(10, 3, 1001));
    }
}
