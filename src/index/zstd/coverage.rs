//! Which bytes of a frame's output are read again, and from how far.
//!
//! # How it works
//! The output is cut into *segments*. Each begins at a block where decoding could begin again, a candidate. Every
//! [`GRAIN`] bytes of the output have a *mark*: the last segment from which a match reads one of these bytes. At first
//! that is the segment of the first of them. A candidate needs the bytes before it whose mark is its own segment or a
//! later one.
//!
//! Once no match can reach a segment any more, its marks are counted ([`CountedSegment`]). So it takes little time to
//! say how much a candidate needs.
//!
//! A candidate is known as soon as the output is one window behind it, and it needs bytes of the window before it. So two
//! windows of output are kept ([`History`]), and a ring of their marks.
//!
//! # Invariants
//! - Memory is bounded by what [`Coverage::memory`] says.

use std::collections::VecDeque;

use super::frame::BLOCK;
use super::history::History;
use super::sequences::Matches;

/// Bytes of output for each mark, as a binary logarithm. More bytes make restarts larger, because they contain bytes
/// that no match reads. Fewer bytes take more time.
const GRAIN_LOG: u32 = 2;
/// Bytes of output for each mark.
const GRAIN: u64 = 1 << GRAIN_LOG;

/// Marks by which the ring grows at once.
const GROWTH: usize = 256 << 10;

/// Number of a segment within its frame. The frame itself begins segment 0.
pub(super) type SegmentNumber = u32;

/// A segment that no later match can read.
#[derive(Debug)]
struct CountedSegment {
    segment: SegmentNumber,
    /// Positions of the segment in the frame's output.
    start: u64,
    end: u64,
    /// Bytes that are marked by each later segment. The first number is that of the next segment.
    marked: Vec<u64>,
}

impl CountedSegment {
    /// Returns how many bytes segment `segment` or a later one reads.
    fn read_since(&self, segment: SegmentNumber) -> u64 {
        let first = (segment - self.segment).saturating_sub(1) as usize;
        self.marked.get(first..).unwrap_or_default().iter().sum()
    }
}

/// Bytes before a restart that it needs, or that a later one needs.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct SparseWindow {
    /// Where the bytes lie: how far each run ends before the restart, and its length. In order of the output.
    pub(super) runs: Vec<(u64, u64)>,
    /// The bytes of all runs.
    pub(super) bytes: Vec<u8>,
}

/// Marks of one frame's output.
#[derive(Debug)]
pub(super) struct Coverage {
    window: u64,
    /// Most bytes of a segment.
    longest: u64,
    /// Most bytes of the frame's output.
    most: u64,
    /// Bytes of output that are kept.
    reachable: u64,
    history: History,
    /// A ring. The mark of the byte at position `p` of the frame's output is number `p / GRAIN`, modulo the ring's size.
    marks: Vec<u8>,
    /// Size of the ring once it is full, less one. The size is a power of two.
    mask: usize,
    /// Whether the frame is over.
    finished: bool,
    /// Segments that later matches can read, with their starts. The last one is the present segment.
    segments: VecDeque<(SegmentNumber, u64)>,
    counted: VecDeque<CountedSegment>,
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
            reachable: reachable(window, content, spacing),
            history: History::default(),
            marks: Vec::new(),
            mask: usize::try_from(ring(window, content, spacing)).ok()? - 1,
            finished: false,
            segments: VecDeque::from([(0, 0)]),
            counted: VecDeque::new(),
            candidates: VecDeque::new(),
        })
    }

    /// Returns the smallest distance of candidates for this window. With it, a mark of one byte tells all segments
    /// apart that the ring contains.
    pub(super) fn spacing(window: u64, spacing: u64) -> u64 {
        spacing.max(window / 64)
    }

    /// Returns the bytes of memory that a whole frame takes: a history that may be an eighth longer than the output, and
    /// the ring of marks. Free buffers count as part of the queues.
    pub(super) fn memory(window: u64, content: Option<u64>, spacing: u64) -> u64 {
        let output = reachable(window, content, spacing);
        (output / 8)
            .saturating_mul(9)
            .saturating_add(ring(window, content, spacing))
    }

    /// Returns the bytes of the frame's output so far.
    pub(super) fn position(&self) -> u64 {
        self.history.end()
    }

    fn current(&self) -> (SegmentNumber, u64) {
        self.segments.back().copied().unwrap_or_default()
    }

    /// Begins a segment, and with it a candidate, at the present position. Returns its number, or `None` if the segment
    /// before it is too long for the rings.
    pub(super) fn begin_segment(&mut self) -> Option<SegmentNumber> {
        let (last, start) = self.current();
        let position = self.position();
        if position - start > self.longest {
            return None;
        }
        let segment = last + 1;
        self.segments.push_back((segment, position));
        self.candidates.push_back((segment, position));
        Some(segment)
    }

    /// Whether no later match can read what lies before the candidate of a segment.
    pub(super) fn is_complete(&self, segment: SegmentNumber) -> bool {
        let start = self.start_of(segment);
        self.finished || start.is_none_or(|start| start.saturating_add(self.window) <= self.position())
    }

    fn start_of(&self, segment: SegmentNumber) -> Option<u64> {
        let candidate = self.candidates.iter().find(|candidate| candidate.0 == segment);
        candidate.map(|&(_, start)| start)
    }

    /// Takes the output of a block: the first `len` bytes of `output`. Returns false if there is no memory, or if the
    /// frame is longer than its header says.
    pub(super) fn append(&mut self, output: Vec<u8>, len: usize) -> bool {
        let from = self.position();
        if len as u64 > self.most - from || !self.history.push(output, len) {
            return false;
        }
        let mark = self.current().0 as u8;
        let mut at = from.div_ceil(GRAIN);
        let end = self.position().div_ceil(GRAIN);
        while at < end {
            let begin = at as usize & self.mask;
            let part = ((end - at) as usize).min(self.mask + 1 - begin);
            if self.marks.len() < begin + part && !grow(&mut self.marks, begin + part, self.mask + 1) {
                return false;
            }
            self.marks[begin..begin + part].fill(mark);
            at += part as u64;
        }
        while let (Some(&(segment, start)), Some(&(_, end))) = (self.segments.front(), self.segments.get(1))
            && end.saturating_add(self.window) <= self.position()
        {
            self.count(segment, start, end);
        }
        self.history.forget(self.position().saturating_sub(self.reachable));
        true
    }

    /// Returns a buffer that is free for the output of another block, if there is one.
    pub(super) fn take_spare(&mut self) -> Option<Vec<u8>> {
        self.history.take_spare()
    }

    /// Ends the frame: no match follows.
    pub(super) fn finish(&mut self) {
        while let (Some(&(segment, start)), Some(&(_, end))) = (self.segments.front(), self.segments.get(1)) {
            self.count(segment, start, end);
        }
        self.finished = true;
    }

    /// Counts the marks of the first segment.
    fn count(&mut self, segment: SegmentNumber, start: u64, end: u64) {
        self.segments.pop_front();
        let mut counted = CountedSegment {
            segment,
            start,
            end,
            marked: Vec::new(),
        };
        let mut marked: Vec<u64> = Vec::new();
        self.runs(&counted, |by, _, len| {
            let n = (by - segment - 1) as usize;
            if marked.len() <= n {
                marked.resize(n + 1, 0);
            }
            marked[n] += len;
        });
        counted.marked = marked;
        self.counted.push_back(counted);
    }

    /// Gives the marked runs of a segment to `take`: the segment that marked the run, the run's position, and its length.
    fn runs(&self, counted: &CountedSegment, mut take: impl FnMut(SegmentNumber, u64, u64)) {
        let &CountedSegment {
            segment, start, end, ..
        } = counted;
        let own = segment as u8;
        let mut at = start / GRAIN;
        let last = end.div_ceil(GRAIN);
        while at < last {
            let begin = at as usize & self.mask;
            let part = ((last - at) as usize).min(self.mask + 1 - begin);
            let marks = self.marks.get(begin..begin + part).unwrap_or_default();
            let mut from = 0;
            loop {
                from += count_same(&marks[from..], own);
                let Some(&mark) = marks.get(from) else { break };
                let len = count_same(&marks[from..], mark);
                let position = |n: usize| ((at + n as u64) * GRAIN).clamp(start, end);
                let (first, behind) = (position(from), position(from + len));
                from += len;
                // Marks are segments modulo 256. Where a segment begins between two marks, the mark there can be that of
                // the segment before it.
                let later = mark.wrapping_sub(own);
                if later != u8::MAX {
                    take(segment + SegmentNumber::from(later), first, behind - first);
                }
            }
            at += part as u64;
        }
    }

    /// Returns the segments before the candidate of `segment`, from segment `since` on.
    fn before(&self, segment: SegmentNumber, since: SegmentNumber) -> impl Iterator<Item = &CountedSegment> {
        let from = self.counted.partition_point(|counted| counted.segment < since);
        let range = self.counted.range(from..);
        range.take_while(move |counted| counted.segment < segment)
    }

    /// Returns how many bytes the candidate of a segment needs that lie in segment `since` or a later one. The candidate
    /// must be complete.
    pub(super) fn cost(&self, segment: SegmentNumber, since: SegmentNumber) -> u64 {
        self.before(segment, since)
            .map(|counted| counted.read_since(segment))
            .sum()
    }

    /// Returns the bytes that the candidate of a segment needs and that lie in segment `since` or a later one. Also
    /// returns how far the bytes that it needs reach back in all. The candidate must be complete.
    pub(super) fn window_of(&self, segment: SegmentNumber, since: SegmentNumber) -> Option<(SparseWindow, u64)> {
        let restart = self.start_of(segment)?;
        let mut sparse = SparseWindow::default();
        let mut reach = 0;
        let first = self.before(segment, 0).find(|counted| counted.read_since(segment) > 0);
        if let Some(counted) = first {
            self.runs(counted, |by, start, _| {
                if by >= segment {
                    reach = reach.max(restart - start);
                }
            });
        }
        for counted in self.before(segment, since) {
            self.runs(counted, |by, start, len| {
                if by < segment {
                    return;
                }
                match sparse.runs.last_mut() {
                    Some((back, before)) if *back == restart - start => {
                        *back -= len;
                        *before += len;
                    }
                    _ => sparse.runs.push((restart - start - len, len)),
                }
                self.history.copy(start, len as usize, &mut sparse.bytes);
            });
        }
        Some((sparse, reach))
    }

    /// Forgets all candidates up to and including that of `segment`, and the segments that only they need.
    pub(super) fn forget(&mut self, segment: SegmentNumber) {
        while self.candidates.front().is_some_and(|candidate| candidate.0 <= segment) {
            self.candidates.pop_front();
        }
        let first = self
            .candidates
            .front()
            .map_or(SegmentNumber::MAX, |candidate| candidate.0);
        while let Some(counted) = self.counted.front()
            && counted.segment <= segment
            && counted.read_since(first.max(counted.segment)) == 0
        {
            self.counted.pop_front();
        }
    }

    /// Returns a receiver for the matches of the next block.
    pub(super) fn matches(&mut self) -> BlockMatches<'_> {
        let (segment, segment_start) = self.current();
        let position = self.position();
        BlockMatches {
            marks: &mut self.marks,
            mask: self.mask,
            mark: segment as u8,
            begin: position,
            position,
            segment_start,
            window: self.window,
            matched: 0,
        }
    }
}

/// Returns the most bytes of a segment. Candidates come every `spacing` bytes and at most one block later, and not every
/// candidate may begin a segment.
fn longest(window: u64, spacing: u64) -> u64 {
    let least = Coverage::spacing(window, spacing);
    least.saturating_add(spacing).saturating_add(2 * BLOCK as u64)
}

/// Returns the most bytes of output that matter at a time: two windows, or one window and a segment that is not yet
/// counted. Also, the blocks that overlap their ends.
fn reachable(window: u64, content: Option<u64>, spacing: u64) -> u64 {
    let all = window
        .saturating_add(window.max(longest(window, spacing)))
        .saturating_add(2 * BLOCK as u64);
    all.min(content.unwrap_or(u64::MAX).saturating_add(BLOCK as u64))
}

/// Returns the number of marks in the ring once it is full.
fn ring(window: u64, content: Option<u64>, spacing: u64) -> u64 {
    (reachable(window, content, spacing) / GRAIN + 2).next_power_of_two()
}

/// Lengthens a ring to `len`. Returns false if there is no memory.
fn grow(ring: &mut Vec<u8>, len: usize, capacity: usize) -> bool {
    if ring.capacity() < len {
        let room = len.next_multiple_of(GROWTH).min(capacity) - ring.len();
        if ring.try_reserve_exact(room).is_err() {
            return false;
        }
    }
    ring.resize(len, 0);
    true
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
    mask: usize,
    mark: u8,
    /// Position of the block in the frame's output.
    begin: u64,
    /// Position in the frame's output behind the matches so far.
    position: u64,
    segment_start: u64,
    window: u64,
    /// Bytes of the matches so far.
    matched: u64,
}

impl BlockMatches<'_> {
    /// Returns how many literals lie before the matches.
    pub(super) fn literals(&self) -> u64 {
        self.made() - self.matched
    }

    /// Returns how many bytes the literals between the matches, and the matches, have made.
    pub(super) fn made(&self) -> u64 {
        self.position - self.begin
    }

    /// Marks the bytes from `start` to `end`.
    #[inline(always)]
    fn mark(&mut self, start: u64, end: u64) {
        let (first, behind) = (start / GRAIN, end.div_ceil(GRAIN));
        let from = first as usize & self.mask;
        let until = from + (behind - first) as usize;
        match self.marks.get_mut(from..until) {
            Some(marks) => fill(marks, self.mark),
            None => self.mark_singly(first, behind),
        }
    }

    /// Marks across the end of the ring.
    #[cold]
    fn mark_singly(&mut self, first: u64, behind: u64) {
        for at in first..behind {
            if let Some(mark) = self.marks.get_mut(at as usize & self.mask) {
                *mark = self.mark;
            }
        }
    }
}

/// Fills marks, which are few most of the time.
#[inline(always)]
fn fill(marks: &mut [u8], mark: u8) {
    if marks.len() > 16 {
        marks.fill(mark);
    } else if marks.len() >= 8 {
        fill_overlapping::<8>(marks, mark);
    } else if marks.len() >= 4 {
        fill_overlapping::<4>(marks, mark);
    } else {
        for old in marks {
            *old = mark;
        }
    }
}

/// Fills `N` to `2 * N` marks with two writes, which may overlap.
#[inline(always)]
fn fill_overlapping<const N: usize>(marks: &mut [u8], mark: u8) {
    if let Some(head) = marks.first_chunk_mut::<N>() {
        *head = [mark; N];
    }
    if let Some(tail) = marks.last_chunk_mut::<N>() {
        *tail = [mark; N];
    }
}

impl Matches for BlockMatches<'_> {
    #[inline(always)]
    fn take(&mut self, literals: usize, len: usize, offset: u64) -> bool {
        self.position += literals as u64;
        if offset > self.position.min(self.window) {
            return false;
        }
        let start = self.position - offset;
        if start < self.segment_start {
            self.mark(start, (start + len as u64).min(self.segment_start));
        }
        self.position += len as u64;
        self.matched += len as u64;
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
            assert!(coverage.append(output[from..].to_vec(), block));
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
            // The restart has whole grains.
            let grain = GRAIN as usize;
            let mut allowed = vec![false; restart];
            allowed[restart / grain * grain..].fill(true);
            for (grain, needed) in allowed.chunks_mut(grain).zip(needed.chunks(grain)) {
                if needed.contains(&true) {
                    grain.fill(true);
                }
            }
            // Once all that it needs, once only what it needs of the last 40,000 bytes or so.
            let all = (coverage.window_of(segment, 0), 0);
            let since = segment.saturating_sub(8);
            let from = starts.get(&since).copied().unwrap_or(0);
            for ((window, from), since) in [(all, 0), ((coverage.window_of(segment, since), from), since)] {
                let (sparse, reach) = window.unwrap();
                assert_eq!(coverage.cost(segment, since), sparse.bytes.len() as u64);
                let first = needed.iter().position(|&needed| needed).unwrap_or(restart);
                assert!((0..grain).contains(&(reach as usize + first - restart)));
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
                assert!(!found[..from].contains(&true));
                for at in from..restart {
                    assert!(needed[at] <= found[at] && found[at] <= allowed[at]);
                }
            }
        }
    }

    #[test]
    fn matches_beyond_the_window_are_not_taken() {
        let mut coverage = Coverage::new(1000, None, 4000).unwrap();
        assert!(!coverage.matches().take(10, 3, 11));
        assert!(coverage.append(vec![1; 3000], 3000));
        assert!(coverage.matches().take(10, 3, 1000));
        assert!(!coverage.matches().take(10, 3, 1001));
    }
}
