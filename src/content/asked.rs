//! How long a read may wait, including the kernel's repetitions of it.
//!
//! When a read fails, the kernel does not tell the program at once. After a failed readahead, the kernel asks again
//! for the single page. In a page fault the kernel asks up to three times. Other readers of the same page waited for
//! the first request, and then each of them asks too. If every repetition waited for the whole timeout, the program
//! would wait two or three times as long as it should.
//!
//! So this module remembers each failed range for a moment, with the time of its first request. A request for a
//! remembered range continues that first wait: its deadline counts from the first request, and may have passed. After
//! the moment, the next request starts a new wait.
//!
//! ```text
//! first request                         it fails  repetitions fail at once
//!    ├──────────────── timeout ────────────┤│ ││ · · · · · ·┤  a new wait …
//! ```
//! Invariants:
//! - From the first request to the last answer no more time passes than the timeout and the moment.
//! - A failure after the deadline does not make the moment longer.
//! - The number of remembered ranges is bounded.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::tree::LayerIdx;

/// How long a failed range is remembered. The kernel repeats a read within milliseconds, but a busy machine with many
/// readers needs more time. A larger value refuses a program that tries again for longer.
const REMEMBERED: Duration = Duration::from_millis(500);
/// Number of ranges remembered at once: more than the kernel has requests in flight.
const MOST: usize = 1024;

/// A range of a layer's data device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct DeviceRange {
    pub(super) layer: LayerIdx,
    pub(super) device: Range<u64>,
}

impl DeviceRange {
    pub(super) fn new(layer: LayerIdx, offset: u64, len: usize) -> Self {
        Self {
            layer,
            device: offset..offset.saturating_add(len as u64),
        }
    }

    fn overlaps(&self, other: &Self) -> bool {
        let (a, b) = (&self.device, &other.device);
        self.layer == other.layer && a.start < b.end && b.start < a.end
    }
}

/// Ranges that could not be read lately.
#[derive(Debug, Default)]
pub(super) struct FailedRanges(Mutex<VecDeque<Failed>>);

#[derive(Debug)]
struct Failed {
    places: Vec<DeviceRange>,
    /// When a reader first asked for these places.
    first: Instant,
    /// Until when a request for the same places counts as a repetition.
    until: Instant,
}

/// A read that has to wait.
#[derive(Debug)]
pub(super) struct ReadWait {
    places: Vec<DeviceRange>,
    /// When this request came. `first` is the time of the first request for these places.
    began: Instant,
    first: Instant,
    /// The deadline of this request.
    pub(super) deadline: Instant,
}

impl ReadWait {
    /// Whether the deadline passed before the request began: the kernel repeats a request that timed out.
    pub(super) fn is_over(&self) -> bool {
        self.began >= self.deadline
    }
}

impl FailedRanges {
    /// Begins a wait for these places at `now`. The wait continues an earlier one if that wait failed a moment ago.
    pub(super) fn wait(&self, places: Vec<DeviceRange>, timeout: Duration, now: Instant) -> ReadWait {
        let mut failed = self.0.lock().expect("no panic while locked");
        failed.retain(|f| f.until > now);
        let overlapping = |f: &&Failed| f.places.iter().any(|a| places.iter().any(|b| a.overlaps(b)));
        let first = failed.iter().filter(overlapping).map(|f| f.first).min();
        let first = first.unwrap_or(now);
        ReadWait {
            places,
            began: now,
            first,
            deadline: later(first, timeout),
        }
    }

    /// Remembers that the wait ended at `now` without the bytes.
    pub(super) fn failed(&self, wait: ReadWait, now: Instant) {
        // A request that began after the deadline is only a repetition. Remembering it would prolong the moment.
        if wait.is_over() {
            return;
        }
        let mut failed = self.0.lock().expect("no panic while locked");
        if failed.len() >= MOST {
            failed.pop_front();
        }
        failed.push_back(Failed {
            places: wait.places,
            first: wait.first,
            until: now + REMEMBERED,
        });
    }
}

/// The time `time` after `now`. If `Instant` cannot represent that time, returns a time one year from `now`.
fn later(now: Instant, time: Duration) -> Instant {
    const LONG: Duration = Duration::from_secs(365 * 24 * 3600);
    now.checked_add(time).unwrap_or_else(|| now + LONG)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(6);

    /// A range of one layer's data device.
    fn place(layer: u32, device: Range<u64>) -> Vec<DeviceRange> {
        let layer = LayerIdx(layer);
        vec![DeviceRange { layer, device }]
    }

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn the_kernels_repetitions_continue_the_first_wait() {
        let (asked, start) = (FailedRanges::default(), Instant::now());
        let readahead = asked.wait(place(7, 0..131_072), TIMEOUT, start);
        assert_eq!(readahead.deadline, start + TIMEOUT);
        let end = readahead.deadline;
        asked.failed(readahead, end);
        // The kernel asks for the single page until it gives up; other readers ask for the pages they need.
        for i in 1..100 {
            let now = end + ms(i);
            let page = asked.wait(place(7, 4096..8192), TIMEOUT, now);
            assert_eq!(page.deadline, end, "it has no time left");
            asked.failed(page, now);
        }
        // After the moment, the next access has the whole timeout again, however many repetitions there were.
        let again = end + REMEMBERED;
        assert_eq!(asked.wait(place(7, 0..4096), TIMEOUT, again).deadline, again + TIMEOUT);
    }

    #[test]
    fn a_read_that_fails_early_leaves_its_repetition_what_is_left() {
        let (asked, start) = (FailedRanges::default(), Instant::now());
        let wait = asked.wait(place(7, 0..4096), TIMEOUT, start);
        asked.failed(wait, start + ms(4000));
        let wait = asked.wait(place(7, 0..4096), TIMEOUT, start + ms(4400));
        assert_eq!(wait.deadline, start + TIMEOUT);
        asked.failed(wait, start + ms(4500));
        let wait = asked.wait(place(7, 0..4096), TIMEOUT, start + ms(4999));
        assert_eq!(wait.deadline, start + TIMEOUT, "remembered since the last failure");
        asked.failed(wait, start + ms(6000));
        let anew = start + ms(6501);
        assert_eq!(asked.wait(place(7, 0..4096), TIMEOUT, anew).deadline, anew + TIMEOUT);
    }

    #[test]
    fn other_bytes_and_other_layers_are_not_concerned() {
        let (asked, start) = (FailedRanges::default(), Instant::now());
        let wait = asked.wait(place(7, 4096..8192), TIMEOUT, start);
        let now = wait.deadline;
        asked.failed(wait, now);
        for (layer, bytes) in [(7, 0..4096), (7, 8192..9000), (8, 4096..8192)] {
            assert_eq!(asked.wait(place(layer, bytes), TIMEOUT, now).deadline, now + TIMEOUT);
        }
        assert_eq!(asked.wait(place(7, 0..4097), TIMEOUT, now).deadline, now);
    }

    #[test]
    fn only_so_much_is_remembered() {
        let (asked, now) = (FailedRanges::default(), Instant::now());
        for i in 0..3 * MOST as u32 {
            let wait = asked.wait(place(i, 0..1), TIMEOUT, now);
            asked.failed(wait, now);
        }
        assert_eq!(asked.0.lock().unwrap().len(), MOST);
        let _ = asked.wait(place(7, 0..1), Duration::MAX / 2, now + REMEMBERED);
        assert!(asked.0.lock().unwrap().is_empty());
    }
}
