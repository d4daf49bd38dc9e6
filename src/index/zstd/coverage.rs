//! Which bytes of a frame's output are read again, and from how far.
//!
//! # How it works
//! The output is cut into *segments*. Each begins at a block where decoding could begin again, a candidate. Every
//! [`GRAIN`] bytes of the output have a *mark*: the last segment from which a match reads one of these bytes, if there is
//! one. A candidate needs the bytes before it whose mark is its own segment or a later one.
//!
//! Once no match can reach a segment any more, its marks are counted and removed, and the bytes that later segments read
//! are kept ([`CountedSegment`]). So it takes little time to say how much a candidate needs. The output itself is kept only
//! for a window and one segment ([`History`]), and a ring has its marks.
//!
//! # Invariants
//! - Memory is bounded by what [`Coverage::memory`] says.

use std::collections::VecDeque;
use std::ops::Range;

use super::frame::BLOCK;
use super::history::History;
use super::segment::{CountedSegment, SegmentNumber, SparseWindow};
use super::sequences::Matches;

/// Bytes of output for each mark, as a binary logarithm. More bytes make restarts larger, because they contain bytes
/// that no match reads. Fewer bytes take more time.
const GRAIN_LOG: u32 = 2;
/// Bytes of output for each mark.
const GRAIN: u64 = 1 << GRAIN_LOG;

/// The mark of bytes that no match has read.
const UNREAD: u8 = u8::MAX;

/// Marks by which the ring grows at once.
const GROWTH: usize = 256 << 10;

/// A segment that later matches can read.
#[derive(Debug, Clone, Copy)]
struct OpenSegment {
    segment: SegmentNumber,
    /// Position in the frame's output.
    start: u64,
    /// Offset in the blob.
    offset: u64,
}

/// Marks of one frame's output.
#[derive(Debug)]
pub(super) struct Coverage {
    window: u64,
    /// Most bytes of a segment.
    longest: u64,
    /// Most bytes of the frame's output.
    most: u64,
    history: History,
    /// A ring. The mark of the byte at position `p` of the frame's output is number `p / GRAIN`, modulo the ring's size.
    marks: Vec<u8>,
    /// Size of the ring once it is full, less one. The size is a power of two.
    mask: usize,
    /// Whether the frame is over.
    finished: bool,
    /// Segments that later matches can read. The last one is the present segment.
    segments: VecDeque<OpenSegment>,
    counted: VecDeque<CountedSegment>,
}

impl Coverage {
    /// Begins a frame with this window, of which the first block is at blob offset `offset`. Segments have at least
    /// `spacing` bytes.
    pub(super) fn new(window: u64, content: Option<u64>, spacing: u64, offset: u64) -> Option<Self> {
        Some(Self {
            window,
            longest: longest(window, spacing),
            most: content.unwrap_or(u64::MAX),
            history: History::default(),
            marks: Vec::new(),
            mask: usize::try_from(ring(window, content, spacing)).ok()? - 1,
            finished: false,
            segments: VecDeque::from([OpenSegment {
                segment: 0,
                start: 0,
                offset,
            }]),
            counted: VecDeque::new(),
        })
    }

    /// Returns the smallest distance of candidates for this window. With it, a mark of one byte tells all segments
    /// apart that the ring contains.
    pub(super) fn spacing(window: u64, spacing: u64) -> u64 {
        spacing.max(window / 64)
    }

    /// Returns the bytes of memory that a whole frame takes: a history that may be an eighth longer than the output, the
    /// ring of marks, and the bytes of counted segments of `kept` bytes of output. Free buffers count as part of the
    /// queues.
    pub(super) fn memory(window: u64, content: Option<u64>, spacing: u64, kept: u64) -> u64 {
        let output = reachable(window, content, spacing);
        let segments = CountedSegment::most(content.map_or(kept, |content| content.min(kept)));
        (output / 8)
            .saturating_mul(9)
            .saturating_add(ring(window, content, spacing))
            .saturating_add(segments as u64)
    }

    /// Returns the bytes of the frame's output so far.
    pub(super) fn position(&self) -> u64 {
        self.history.end()
    }

    /// Returns the number of the present segment and its start.
    fn current(&self) -> (SegmentNumber, u64) {
        let last = self.segments.back();
        last.map_or((0, 0), |last| (last.segment, last.start))
    }

    /// Begins a segment, and with it a candidate, at the present position. Returns its number, or `None` if the segment
    /// before it is too long for the rings.
    pub(super) fn begin_segment(&mut self, offset: u64) -> Option<SegmentNumber> {
        let (last, before) = self.current();
        let start = self.position();
        if start - before > self.longest {
            return None;
        }
        let segment = last + 1;
        self.segments.push_back(OpenSegment { segment, start, offset });
        Some(segment)
    }

    /// Whether no later match can read what lies before the candidate of a segment.
    pub(super) fn is_complete(&self, segment: SegmentNumber) -> bool {
        self.finished || self.segments.front().is_some_and(|first| first.segment >= segment)
    }

    /// Takes the output of a block: the first `len` bytes of `output`. Returns false if there is no memory, or if the
    /// frame is longer than its header says.
    pub(super) fn append(&mut self, output: Vec<u8>, len: usize) -> bool {
        let from = self.position();
        if len as u64 > self.most - from || !self.history.push(output, len) {
            return false;
        }
        let marks = usize::try_from(self.position().div_ceil(GRAIN)).unwrap_or(usize::MAX);
        let marks = marks.min(self.mask + 1);
        if self.marks.len() < marks && !grow(&mut self.marks, marks, self.mask + 1) {
            return false;
        }
        while let Some(next) = self.segments.get(1)
            && next.start.saturating_add(self.window) <= self.position()
        {
            self.count();
        }
        if let Some(first) = self.segments.front() {
            self.history.forget(first.start);
        }
        true
    }

    /// Returns a buffer that is free for the output of another block, if there is one.
    pub(super) fn take_spare(&mut self) -> Option<Vec<u8>> {
        self.history.take_spare()
    }

    /// Ends the frame: no match follows.
    pub(super) fn finish(&mut self) {
        while self.segments.len() > 1 {
            self.count();
        }
        self.finished = true;
    }

    /// Counts the marks of the first segment, and keeps the bytes that are read again.
    fn count(&mut self) {
        let Some(OpenSegment { segment, start, offset }) = self.segments.pop_front() else {
            return;
        };
        let end = self.segments.front().map_or(start, |next| next.start);
        let stored = self.segments.front().map_or(0, |next| next.offset - offset);
        let mut counted = CountedSegment::new(segment, start, end - start, stored);
        let mut history = self.history.reader();
        let mut at = start / GRAIN;
        let last = end.div_ceil(GRAIN);
        while at < last {
            let begin = at as usize & self.mask;
            let part = ((last - at) as usize).min(self.mask + 1 - begin);
            let marks = self.marks.get_mut(begin..begin + part).unwrap_or_default();
            each_run(marks, |run, mark| {
                let position = |n: usize| ((at + n as u64) * GRAIN).clamp(start, end);
                let (first, behind) = (position(run.start), position(run.end));
                let later = segments_later(segment, mark);
                // Where a segment begins between two marks, the mark there can be of a match in the segment itself, which
                // reads only the bytes before it.
                if later > 0 {
                    counted.add(first, behind - first, later, &mut history);
                }
            });
            // A mark that the next segment begins in is counted there too, so it stays.
            let own = ((end / GRAIN).saturating_sub(at) as usize).min(part);
            marks[..own].fill(UNREAD);
            at += part as u64;
        }
        counted.finish();
        self.counted.push_back(counted);
    }

    /// Calls `take` for the segments before the candidate of `segment`, the last one first: with the segment, and with
    /// what the candidate needs of it and of those behind it. That is given as the bytes of the blob that have about as
    /// many bytes of output. `None` means that not all of these bytes are kept. The candidate must be complete.
    pub(super) fn costs(&self, segment: SegmentNumber, mut take: impl FnMut(SegmentNumber, Option<u64>)) {
        let before = self.counted.partition_point(|counted| counted.segment < segment);
        let mut needed = Some(0);
        for counted in self.counted.range(..before).rev() {
            needed = needed.and_then(|needed| Some(needed + counted.stored_since(segment)?));
            take(counted.segment, needed);
        }
    }

    /// Returns the bytes that the candidate of a segment needs and that lie in segment `since` or a later one. The
    /// candidate is at position `restart`. Also returns how far the bytes that it needs reach back in all. The candidate
    /// must be complete.
    pub(super) fn window_of(&self, segment: SegmentNumber, restart: u64, since: SegmentNumber) -> (SparseWindow, u64) {
        let before = self.counted.partition_point(|counted| counted.segment < segment);
        let before = self.counted.range(..before);
        let first = before.clone().find_map(|counted| counted.first_read_since(segment));
        let mut sparse = SparseWindow::default();
        for counted in before.filter(|counted| counted.segment >= since) {
            counted.collect(segment, restart, &mut sparse);
        }
        (sparse, first.map_or(0, |first| restart - first))
    }

    /// Forgets what only candidates before that of `segment` need, and the bytes before segment `since`.
    pub(super) fn forget(&mut self, segment: SegmentNumber, since: SegmentNumber) {
        while let Some(counted) = self.counted.front()
            && counted.segment < segment
            && counted.read_since(segment) == 0
        {
            self.counted.pop_front();
        }
        let before = self.counted.partition_point(|counted| counted.segment < since);
        for counted in self.counted.range_mut(..before) {
            counted.drop_bytes();
        }
    }

    /// Returns a receiver for the matches of the next block.
    pub(super) fn matches(&mut self) -> BlockMatches<'_> {
        let (segment, segment_start) = self.current();
        let position = self.position();
        BlockMatches {
            marks: &mut self.marks,
            mask: self.mask,
            mark: mark_of(segment),
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

/// Returns the most bytes of output that matter at a time: a window, and a segment that is not yet counted. Also, the
/// blocks that overlap their ends.
fn reachable(window: u64, content: Option<u64>, spacing: u64) -> u64 {
    let all = window
        .saturating_add(longest(window, spacing))
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
    ring.resize(len, UNREAD);
    true
}

/// Returns the mark of what a segment reads.
fn mark_of(segment: SegmentNumber) -> u8 {
    (segment % SegmentNumber::from(UNREAD)) as u8
}

/// Returns how many segments behind `segment` that of a mark is.
#[inline]
fn segments_later(segment: SegmentNumber, mark: u8) -> u8 {
    let own = mark_of(segment);
    // `UNREAD` is no segment, so the segment before 0 is `UNREAD - 1`.
    mark.checked_sub(own).unwrap_or_else(|| UNREAD - own + mark)
}

/// Calls `take` for each run of equal marks that are not [`UNREAD`], with the run and the mark.
#[inline]
fn each_run(marks: &[u8], mut take: impl FnMut(Range<usize>, u8)) {
    let (mut start, mut mark, mut before) = (0, UNREAD, UNREAD);
    let mut each = |at: usize, mut changes: u64| {
        while changes != 0 {
            let end = at + changes.trailing_zeros() as usize;
            changes &= changes - 1;
            if mark != UNREAD {
                take(start..end, mark);
            }
            (start, mark) = (end, marks[end]);
        }
    };
    // One branch for many marks, because where runs end is hard to predict.
    let (chunks, rest) = marks.as_chunks::<64>();
    for (n, chunk) in chunks.iter().enumerate() {
        each(64 * n, changes(chunk, &mut before));
    }
    let mut last = [rest.last().copied().unwrap_or(before); 64];
    last[..rest.len()].copy_from_slice(rest);
    each(64 * chunks.len(), changes(&last, &mut before));
    if mark != UNREAD {
        take(start..marks.len(), mark);
    }
}

/// Returns which marks are not the mark before them, as bits from the lowest one on. `before` is the mark before the first
/// one, and becomes the last one.
#[inline]
fn changes(marks: &[u8; 64], before: &mut u8) -> u64 {
    const LOW: u64 = 0x7f7f_7f7f_7f7f_7f7f;
    let (words, _) = marks.as_chunks::<8>();
    let mut changes = 0;
    for (n, &word) in words.iter().enumerate() {
        let word = u64::from_le_bytes(word);
        let change = word ^ (word << 8 | u64::from(*before));
        *before = (word >> 56) as u8;
        // The highest bit of each byte that is not zero.
        let bytes = (((change & LOW) + LOW) | change) & !LOW;
        // The multiplication brings these eight bits together.
        let bits = (bytes >> 7).wrapping_mul(0x0102_0408_1020_4080) >> 56;
        changes |= bits << (8 * n);
    }
    changes
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

    #[test]
    fn runs_are_those_of_equal_marks() {
        let mut rng = fastrand::Rng::with_seed(11);
        for len in (0..200).chain([1000, 4096]) {
            let mut marks: Vec<u8> = Vec::new();
            while marks.len() < len {
                let mark = [5, 5, 6, 7, 0x85, 0xff, 0][rng.usize(0..7)];
                marks.extend(std::iter::repeat_n(mark, rng.usize(1..90)));
            }
            marks.truncate(len);
            let mut found = Vec::new();
            each_run(&marks, |run, mark| found.push((run, mark)));
            let mut expected: Vec<(Range<usize>, u8)> = Vec::new();
            let mut at = 0;
            for run in marks.chunk_by(|a, b| a == b) {
                if run[0] != UNREAD {
                    expected.push((at..at + run.len(), run[0]));
                }
                at += run.len();
            }
            assert_eq!(found, expected);
        }
    }

    /// Marks random matches, and compares what each candidate needs with a simple account of it.
    #[test]
    fn candidates_need_what_later_matches_read_before_them() {
        let mut rng = fastrand::Rng::with_seed(3);
        let (window, spacing) = (70_000u64, 5000);
        let mut coverage = Coverage::new(window, Some(1 << 22), spacing, 0).unwrap();
        let mut output: Vec<u8> = Vec::new();
        let mut restarts: Vec<(SegmentNumber, usize)> = Vec::new();
        let mut reads: Vec<(usize, usize, usize)> = Vec::new();
        let mut last = 0;
        for _ in 0..400 {
            if output.len() - last >= spacing as usize {
                last = output.len();
                restarts.push((coverage.begin_segment(last as u64).unwrap(), last));
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
            let all = (coverage.window_of(segment, restart as u64, 0), 0);
            let since = segment.saturating_sub(8);
            let from = starts.get(&since).copied().unwrap_or(0);
            let recent = (coverage.window_of(segment, restart as u64, since), from);
            for (((sparse, reach), from), since) in [(all, 0), (recent, since)] {
                let mut cost = Some(0);
                coverage.costs(segment, |earlier, needed| {
                    if earlier >= since {
                        cost = needed;
                    }
                });
                // Every byte of output has a byte in this blob.
                assert_eq!(cost, Some(sparse.bytes.len() as u64));
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
        let mut coverage = Coverage::new(1000, None, 4000, 0).unwrap();
        assert!(!coverage.matches().take(10, 3, 11));
        assert!(coverage.append(vec![1; 3000], 3000));
        assert!(coverage.matches().take(10, 3, 1000));
        assert!(!coverage.matches().take(10, 3, 1001));
    }
}
