//! How long reads take: counters and a histogram that any thread adds to without a lock.
//!
//! Buckets grow by an eighth of an octave's first value each, from a microsecond to over a minute, so a quantile is right to
//! within a twelfth. That is 208 counters, and one addition for a read.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// Buckets for each doubling.
const STEPS: usize = 8;
/// Doublings: 2^26 us are 67 seconds.
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

    /// The middle of the bucket below which `share` of all durations lie, in seconds; nothing if there are none.
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

/// Reads of one image.
#[derive(Debug, Default)]
pub struct Reads {
    at_once: Histogram,
    waited: Histogram,
    waiting: AtomicUsize,
}

/// What is known about reads. Times in seconds, within the process: what the kernel answers from its cache is not seen.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ReadStatus {
    /// Reads answered at once.
    pub at_once: u64,
    /// Reads that had to wait, and are over.
    pub waited: u64,
    /// Reads that wait now.
    pub waiting: usize,
    /// The median of all reads.
    pub p50: Option<f64>,
    /// The 99th percentile of all reads.
    pub p99: Option<f64>,
    /// The same of those that had to wait.
    pub waited_p50: Option<f64>,
    /// The same of those that had to wait.
    pub waited_p99: Option<f64>,
}

impl Reads {
    /// A read that began then was answered without waiting.
    pub(super) fn at_once(&self, start: Instant) {
        self.at_once.add(start.elapsed());
    }

    /// A read begins to wait.
    pub(super) fn wait(&self) -> Waiting<'_> {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        Waiting {
            reads: self,
            start: Instant::now(),
        }
    }

    /// All of it now.
    pub fn snapshot(&self) -> ReadStatus {
        let all = Histogram::default();
        for (sum, parts) in all.0.iter().zip(self.at_once.0.iter().zip(&self.waited.0)) {
            let part = parts.0.load(Ordering::Relaxed) + parts.1.load(Ordering::Relaxed);
            sum.store(part, Ordering::Relaxed);
        }
        ReadStatus {
            at_once: self.at_once.count(),
            waited: self.waited.count(),
            waiting: self.waiting.load(Ordering::Relaxed),
            p50: all.quantile(0.5),
            p99: all.quantile(0.99),
            waited_p50: self.waited.quantile(0.5),
            waited_p99: self.waited.quantile(0.99),
        }
    }
}

/// A read that waits, until it is dropped.
#[derive(Debug)]
pub(super) struct Waiting<'a> {
    reads: &'a Reads,
    start: Instant,
}

impl Waiting<'_> {
    /// Since it began.
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
