//! Until when a read may wait, also when the kernel repeats it.
//!
//! When a read fails, the kernel does not tell the program at once. It asks again: after readahead that failed for the single
//! page, in a page fault up to three times. Other readers of the same page, which waited for the first request, each ask too.
//! If every repetition waited for the whole timeout, the program would wait two or three times as long as it should.
//!
//! So ranges that could not be read are remembered for a moment, with the time when they were first asked for. A request for
//! one of them continues that wait: its deadline counts from the first request, and may be over. After the moment the next
//! request starts anew.
//!
//! ```text
//! first request                         it fails  repetitions fail at once
//!    ├──────────────── timeout ────────────┤│ ││ · · · · · ·┤  a new wait …
//! ```
//! Invariants: from the first request to the last answer it takes no longer than the timeout and the moment; failing again
//! after the deadline does not make the moment longer; the memory is bounded.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::tree::LayerIdx;

/// How long a failed range is remembered. The kernel repeats within milliseconds, but on a busy machine with many readers
/// that takes longer; and a program that tries again should not be refused for long.
const REMEMBERED: Duration = Duration::from_millis(500);
/// Ranges remembered at once: more than the kernel has requests under way.
const MOST: usize = 1024;

/// A range of a layer's data device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) layer: LayerIdx,
    pub(super) device: Range<u64>,
}

impl Place {
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
pub(super) struct Asked(Mutex<VecDeque<Failed>>);

#[derive(Debug)]
struct Failed {
    places: Vec<Place>,
    /// When they were first asked for.
    first: Instant,
    /// Until when a request for the same bytes counts as the same request.
    until: Instant,
}

/// A read that has to wait.
#[derive(Debug)]
pub(super) struct Wait {
    places: Vec<Place>,
    /// When this request came, and when these bytes were first asked for.
    began: Instant,
    first: Instant,
    /// Until when this request may wait.
    pub(super) deadline: Instant,
}

impl Wait {
    /// There is no time left: the kernel repeats a request whose deadline is over.
    pub(super) fn is_over(&self) -> bool {
        self.began >= self.deadline
    }
}

impl Asked {
    /// Begins to wait for these bytes at `now`.
    pub(super) fn wait(&self, places: Vec<Place>, timeout: Duration, now: Instant) -> Wait {
        let mut failed = self.0.lock().expect("no panic while locked");
        failed.retain(|f| f.until > now);
        let overlapping = |f: &&Failed| f.places.iter().any(|a| places.iter().any(|b| a.overlaps(b)));
        let first = failed.iter().filter(overlapping).map(|f| f.first).min();
        let first = first.unwrap_or(now);
        Wait {
            places,
            began: now,
            first,
            deadline: later(first, timeout),
        }
    }

    /// The wait ended at `now` without the bytes.
    pub(super) fn failed(&self, wait: Wait, now: Instant) {
        // The wait is over for good when the deadline is: failing again then is nothing new.
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

/// A time in the future; a long time from now if that is too far.
fn later(now: Instant, time: Duration) -> Instant {
    const LONG: Duration = Duration::from_secs(365 * 24 * 3600);
    now.checked_add(time).unwrap_or_else(|| now + LONG)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(6);

    /// Some bytes of one layer.
    fn place(layer: u32, device: Range<u64>) -> Vec<Place> {
        let layer = LayerIdx(layer);
        vec![Place { layer, device }]
    }

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn the_kernels_repetitions_continue_the_first_wait() {
        let (asked, start) = (Asked::default(), Instant::now());
        let readahead = asked.wait(place(7, 0..131_072), TIMEOUT, start);
        assert_eq!(readahead.deadline, start + TIMEOUT);
        let end = readahead.deadline;
        asked.failed(readahead, end);
        // It asks for the page until it gives up, and others for theirs.
        for i in 1..100 {
            let now = end + ms(i);
            let page = asked.wait(place(7, 4096..8192), TIMEOUT, now);
            assert_eq!(page.deadline, end, "it has no time left");
            asked.failed(page, now);
        }
        // The next access has all the time again, whoever tried meanwhile.
        let again = end + REMEMBERED;
        assert_eq!(asked.wait(place(7, 0..4096), TIMEOUT, again).deadline, again + TIMEOUT);
    }

    #[test]
    fn a_read_that_fails_early_leaves_its_repetition_what_is_left() {
        let (asked, start) = (Asked::default(), Instant::now());
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
        let (asked, start) = (Asked::default(), Instant::now());
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
        let (asked, now) = (Asked::default(), Instant::now());
        for i in 0..3 * MOST as u32 {
            let wait = asked.wait(place(i, 0..1), TIMEOUT, now);
            asked.failed(wait, now);
        }
        assert_eq!(asked.0.lock().unwrap().len(), MOST);
        let _ = asked.wait(place(7, 0..1), Duration::MAX / 2, now + REMEMBERED);
        assert!(asked.0.lock().unwrap().is_empty());
    }
}
