//! How long an opening waits for an index before it begins to stream the layer beside the question.
//!
//! Most answers come within a fraction of a second. A place may also be far away, or hang. After a short time, streaming
//! begins, and whichever is there first is used: the index or the pass. So a place costs an opening a few seconds at most.
//! The two share the link, though. While the indexes come fast enough to be there long before the layers, the opening goes
//! on waiting for a while.

use std::time::Duration;

use tokio::time::Instant;

/// A layer has this many times the bytes of its index.
const LAYER_PER_INDEX: f64 = 50.0;
/// How much sooner the indexes must be there than the layers. A larger value begins to stream earlier beside an index that
/// is on its way; a smaller one waits for an index that saves hardly any time.
const SOONER: f64 = 2.0;
/// Bytes per second assumed of a link that was not measured.
const UNMEASURED: f64 = 1e6;
/// How often the bytes that came are looked at.
const LOOK: Duration = Duration::from_millis(250);

/// The times that an opening waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LookupPatience {
    /// For an answer, whatever the place.
    soon: Duration,
    /// For an answer that comes fast enough.
    longest: Duration,
}

impl Default for LookupPatience {
    fn default() -> Self {
        Self {
            soon: Duration::from_secs(3),
            longest: Duration::from_secs(12),
        }
    }
}

impl LookupPatience {
    /// Returns the times for a command that gives up without progress after `timeout`.
    pub fn within(timeout: Duration) -> Self {
        let usual = Self::default();
        Self {
            soon: usual.soon.min(timeout / 4),
            longest: usual.longest.min(timeout / 2),
        }
    }

    /// Whether indexes of which `came` bytes have come in `elapsed` will be there long before their layers, which come with
    /// `bandwidth` bytes per second.
    pub(super) fn is_fast(elapsed: Duration, came: u64, bandwidth: Option<f64>) -> bool {
        let rate = came as f64 / elapsed.as_secs_f64().max(0.001);
        rate * LAYER_PER_INDEX >= SOONER * bandwidth.unwrap_or(UNMEASURED)
    }

    /// Whether to wait on, `elapsed` after the questions were asked.
    fn lasts(self, elapsed: Duration, came: u64, bandwidth: Option<f64>) -> bool {
        elapsed < self.soon || elapsed < self.longest && Self::is_fast(elapsed, came, bandwidth)
    }

    /// Waits until streaming should begin. `came` returns the bytes of indexes that have come since `began`, and
    /// `bandwidth` what the link to the layers brings.
    pub(super) async fn wait(self, began: Instant, came: impl Fn() -> u64, bandwidth: impl Fn() -> Option<f64>) {
        tokio::time::sleep_until(began + self.soon).await;
        while self.lasts(began.elapsed(), came(), bandwidth()) {
            tokio::time::sleep(LOOK).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_indexes_that_come_in_time_are_waited_for() {
        let waited = |rate: u64, bandwidth| {
            let lasts = |&second: &u64| {
                let elapsed = Duration::from_secs(second);
                LookupPatience::default().lasts(elapsed, rate * second, bandwidth)
            };
            (0..60).take_while(lasts).count()
        };
        assert_eq!(waited(0, None), 3);
        assert_eq!(waited(4000, None), 3);
        assert_eq!(waited(100_000, None), 12);
        assert_eq!(waited(100_000, Some(100e6)), 3);
        assert_eq!(waited(4000, Some(50e3)), 12);
    }

    #[test]
    fn a_short_timeout_leaves_time_to_stream() {
        let patience = LookupPatience::within(Duration::from_secs(4));
        assert_eq!(patience.soon, Duration::from_secs(1));
        assert_eq!(patience.longest, Duration::from_secs(2));
        assert_eq!(LookupPatience::within(Duration::MAX), LookupPatience::default());
    }
}
