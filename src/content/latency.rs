//! How long reads take: counters and histograms that any thread adds to without a lock.
//!
//! Each doubling of the time (octave), from a microsecond to over a minute, has eight buckets of equal width. So a
//! quantile is right to within a twelfth. A histogram has 208 counters, and a read costs one addition.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// Buckets per octave. More buckets make quantiles more exact and cost more memory.
const STEPS: usize = 8;
/// Octaves: 2^26 us are 67 seconds. The last bucket counts all longer times too.
const OCTAVES: usize = 26;

/// Counts of durations.
#[derive(Debug)]
struct Histogram([AtomicU64; STEPS * OCTAVES]);

impl Default for Histogram {
    fn default() -> Self {
        Self([const { AtomicU64::new(0) }; STEPS * OCTAVES])
    }
}

impl Histogram {
    fn add(&self, time: Duration) {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX).max(1);
        let octave = micros.ilog2() as usize;
        let step = ((u128::from(micros) * STEPS as u128) >> octave) as usize - STEPS;
        let bucket = (octave * STEPS + step).min(STEPS * OCTAVES - 1);
        self.0[bucket].fetch_add(1, Ordering::Relaxed);
    }

    fn count(&self) -> u64 {
        self.0.iter().map(|bucket| bucket.load(Ordering::Relaxed)).sum()
    }

    /// The middle of the bucket below which `share` of all durations lie, in seconds. `None` if there are no
    /// durations.
    fn quantile(&self, share: f64) -> Option<f64> {
        let rank = (self.count() as f64 * share).ceil().max(1.0) as u64;
        let mut sum = 0;
        let bucket = self.0.iter().position(|bucket| {
            sum += bucket.load(Ordering::Relaxed);
            sum >= rank
        })?;
        let octave = (1u64 << (bucket / STEPS)) as f64;
        Some(octave * (1.0 + ((bucket % STEPS) as f64 + 0.5) / STEPS as f64) / 1e6)
    }
}

/// Counts and times of the reads of one image.
#[derive(Debug, Default)]
pub struct Reads {
    at_once: Histogram,
    waited: Histogram,
    waiting: AtomicUsize,
}

/// Counts and times of reads. Times are in seconds and are measured within the process: reads that the kernel answers
/// from its cache do not count.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ReadStatus {
    /// Number of reads that were answered at once.
    pub at_once: u64,
    /// Number of reads that had to wait and are over.
    pub waited: u64,
    /// Number of reads that are waiting.
    pub waiting: usize,
    /// The median time of all reads.
    pub p50: Option<f64>,
    /// The 99th percentile of the times of all reads.
    pub p99: Option<f64>,
    /// The median time of the reads that had to wait.
    pub waited_p50: Option<f64>,
    /// The 99th percentile of the times of the reads that had to wait.
    pub waited_p99: Option<f64>,
}

impl Reads {
    /// Counts a read that began at `start` and was answered without waiting.
    pub(super) fn at_once(&self, start: Instant) {
        self.at_once.add(start.elapsed());
    }

    /// Counts a read that begins to wait. The read is over when the guard is dropped.
    pub(super) fn wait(&self) -> Waiting<'_> {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        Waiting {
            reads: self,
            start: Instant::now(),
        }
    }

    /// Number of reads that wait.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    /// The present counts and times of all reads.
    pub fn snapshot(&self) -> ReadStatus {
        let all = Histogram::default();
        for (sum, parts) in all.0.iter().zip(self.at_once.0.iter().zip(&self.waited.0)) {
            let part = parts.0.load(Ordering::Relaxed) + parts.1.load(Ordering::Relaxed);
            sum.store(part, Ordering::Relaxed);
        }
        ReadStatus {
            at_once: self.at_once.count(),
            waited: self.waited.count(),
            waiting: self.waiting(),
            p50: all.quantile(0.5),
            p99: all.quantile(0.99),
            waited_p50: self.waited.quantile(0.5),
            waited_p99: self.waited.quantile(0.99),
        }
    }
}

/// Guard of a read that waits. The drop ends the wait and counts its time.
#[derive(Debug)]
pub(super) struct Waiting<'a> {
    reads: &'a Reads,
    start: Instant,
}

impl Waiting<'_> {
    /// Time since the wait began.
    pub(super) fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.reads.waiting.fetch_sub(1, Ordering::Relaxed);
        self.reads.waited.add(self.start.elapsed());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_right_to_within_a_bucket() {
        let histogram = Histogram::default();
        assert_eq!(histogram.quantile(0.5), None);
        for micros in 1..=10_000 {
            histogram.add(Duration::from_micros(micros));
        }
        for (share, exact) in [(0.01, 1e-4), (0.5, 5e-3), (0.99, 9.9e-3)] {
            let found = histogram.quantile(share).unwrap();
            assert!((found / exact - 1.0).abs() < 1.0 / 12.0, "{share}: {found}");
        }
    }

    #[test]
    fn any_duration_has_a_bucket() {
        let histogram = Histogram::default();
        for time in [Duration::ZERO, Duration::from_secs(67), Duration::MAX] {
            histogram.add(time);
        }
        assert_eq!(histogram.count(), 3);
        assert!(histogram.quantile(1.0).unwrap() > 30.0);
    }

    #[test]
    fn those_that_wait_are_counted_while_they_do() {
        let reads = Reads::default();
        let waiting = reads.wait();
        assert_eq!(reads.snapshot().waiting, 1);
        drop(waiting);
        reads.at_once(Instant::now());
        let status = reads.snapshot();
        assert_eq!((status.waiting, status.waited, status.at_once), (0, 1, 1));
    }
}
