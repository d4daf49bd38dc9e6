//! The bytes of a segment that later segments read.

use super::history::HistoryReader;

/// Number of a segment within its frame. The frame itself begins segment 0.
pub(super) type SegmentNumber = u32;

/// Bytes of a segment, and of the list of its runs, that may be kept at least.
const LEAST_KEPT: usize = 64 << 10;

/// Bytes before a restart that it needs, or that a later one needs.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct SparseWindow {
    /// Where the bytes lie: how far each run ends before the restart, and its length. In order of the output.
    pub(super) runs: Vec<(u64, u64)>,
    /// The bytes of all runs.
    pub(super) bytes: Vec<u8>,
}

/// Bits for the start of a run, and for its length. No segment is longer: it has about 1/64 of a window.
const RUN_BITS: u32 = 28;

/// A run of bytes that later segments read: where it begins in the segment, its length, and how many segments later the
/// last one comes that reads it. There are many runs, so all of it is in one number.
#[derive(Debug, Clone, Copy)]
struct ReadRun(u64);

impl ReadRun {
    /// `None` if the segment is too long.
    #[inline]
    fn new(from: u64, len: u64, last: u8) -> Option<Self> {
        let fits = from < 1 << RUN_BITS && len < 1 << RUN_BITS;
        fits.then_some(Self(from | len << RUN_BITS | u64::from(last) << (2 * RUN_BITS)))
    }

    fn from(self) -> u64 {
        self.0 & ((1 << RUN_BITS) - 1)
    }

    fn len(self) -> usize {
        (self.0 >> RUN_BITS & ((1 << RUN_BITS) - 1)) as usize
    }

    fn last(self) -> SegmentNumber {
        (self.0 >> (2 * RUN_BITS)) as SegmentNumber
    }
}

/// A segment that no later match can read any more.
#[derive(Debug)]
pub(super) struct CountedSegment {
    pub(super) segment: SegmentNumber,
    /// Position of the segment in the frame's output.
    start: u64,
    /// Bytes of the blob for 1000 bytes of the segment.
    density: u64,
    /// Most bytes that `runs` and `bytes` may take.
    most: usize,
    /// Number of bytes that are read by each later segment or by one behind it. The first number is that of the next
    /// segment.
    read: Vec<u64>,
    runs: Vec<ReadRun>,
    /// The bytes of all runs.
    bytes: Vec<u8>,
    /// Whether so much of the segment is read that its bytes are not kept.
    dense: bool,
}

impl CountedSegment {
    /// Makes a segment of `len` bytes at `start`, of which nothing is read yet. It has `stored` bytes in the blob.
    pub(super) fn new(segment: SegmentNumber, start: u64, len: u64, stored: u64) -> Self {
        Self {
            segment,
            start,
            density: (stored * 1000 / len.max(1)).clamp(50, 1000),
            most: Self::most(len).max(LEAST_KEPT),
            read: Vec::new(),
            runs: Vec::new(),
            bytes: Vec::new(),
            dense: false,
        }
    }

    /// Returns the most bytes that are kept of `len` bytes of output. A restart that needs more of them is not worth
    /// its bytes.
    pub(super) fn most(len: u64) -> usize {
        usize::try_from(len).unwrap_or(usize::MAX)
    }

    /// Adds a run behind those so far: `len` bytes at `position` of the output, of which the last reader is the segment
    /// `last` places later.
    #[inline]
    pub(super) fn add(&mut self, position: u64, len: u64, last: u8, history: &mut HistoryReader<'_>) {
        let n = usize::from(last) - 1;
        if self.read.len() <= n {
            self.read.resize(n + 1, 0);
        }
        self.read[n] += len;
        if self.dense {
            return;
        }
        if let Some(run) = ReadRun::new(position - self.start, len, last)
            && self.bytes.len() + len as usize + (self.runs.len() + 1) * size_of::<ReadRun>() <= self.most
        {
            self.runs.push(run);
            history.copy(position, len as usize, &mut self.bytes);
        } else {
            self.dense = true;
            self.drop_bytes();
        }
    }

    /// Ends the segment: all runs were added.
    pub(super) fn finish(&mut self) {
        let mut later = 0;
        for read in self.read.iter_mut().rev() {
            later += *read;
            *read = later;
        }
        if !self.dense {
            self.runs.shrink_to_fit();
            self.bytes.shrink_to_fit();
        }
    }

    /// Returns how many bytes segment `segment` or a later one reads. `segment` comes after this one.
    pub(super) fn read_since(&self, segment: SegmentNumber) -> u64 {
        let first = (segment - self.segment).saturating_sub(1) as usize;
        self.read.get(first).copied().unwrap_or(0)
    }

    /// Returns the bytes of the blob that have about as many bytes of output as segment `segment` or a later one reads.
    /// `None` if the bytes are not kept.
    pub(super) fn stored_since(&self, segment: SegmentNumber) -> Option<u64> {
        let read = self.read_since(segment);
        (!self.dense || read == 0).then_some(read * self.density / 1000)
    }

    /// Forgets the bytes, but not which ones are read.
    pub(super) fn drop_bytes(&mut self) {
        self.bytes = Vec::new();
        if self.dense {
            self.runs = Vec::new();
        }
    }

    /// Returns where the first byte lies that segment `segment` or a later one reads. If the runs are not kept, that is
    /// the start of the segment.
    pub(super) fn first_read_since(&self, segment: SegmentNumber) -> Option<u64> {
        if self.read_since(segment) == 0 {
            return None;
        }
        let first = self.runs_since(segment).next();
        Some(first.map_or(self.start, |(run, _)| self.start + run.from()))
    }

    /// Returns the runs that segment `segment` or a later one reads, and where their bytes begin in `bytes`.
    fn runs_since(&self, segment: SegmentNumber) -> impl Iterator<Item = (ReadRun, usize)> {
        let least = segment - self.segment;
        let mut at = 0;
        self.runs
            .iter()
            .map(move |&run| {
                let from = at;
                at += run.len();
                (run, from)
            })
            .filter(move |(run, _)| run.last() >= least)
    }

    /// Adds the bytes that segment `segment` or a later one reads to the window of the restart at `restart`.
    pub(super) fn collect(&self, segment: SegmentNumber, restart: u64, sparse: &mut SparseWindow) {
        for (run, at) in self.runs_since(segment) {
            let distance = restart - self.start - run.from();
            let len = run.len() as u64;
            match sparse.runs.last_mut() {
                Some((back, before)) if *back == distance => {
                    *back -= len;
                    *before += len;
                }
                _ => sparse.runs.push((distance - len, len)),
            }
            let end = at + run.len();
            sparse
                .bytes
                .extend_from_slice(self.bytes.get(at..end).unwrap_or_default());
        }
    }
}
