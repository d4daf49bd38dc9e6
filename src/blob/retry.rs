//! When to retry, and how long to wait first. No other module decides that.
//!
//! A [`Retry`] belongs to one operation. The operation's deadline counts from the last *progress*, not from its
//! start. A slow link that keeps delivering is never cut off; a dead one is given up after [`RetryPolicy::deadline`].
//! Delays double from [`FIRST_DELAY`] to [`LONGEST_DELAY`]. Full jitter on their upper half keeps readers that failed
//! together from coming back together. This module never sleeps; the caller does.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::BlobError;
use super::retries::RetryCounter;

/// First delay. It is about two round trips on a bad link, because a lost connection is usually back at once. A
/// larger delay keeps readers waiting after such a loss; a smaller one retries before the link is back.
pub(crate) const FIRST_DELAY: Duration = Duration::from_millis(200);
/// Longest delay. A reader that waits for a page should notice a recovered registry within seconds. A larger delay
/// notices it later; a smaller one sends more requests to a registry that is down.
pub(crate) const LONGEST_DELAY: Duration = Duration::from_secs(10);
/// Attempts at a host that has never answered. A mistyped or switched-off registry should be reported in a second,
/// not at the deadline. A host that did answer before is worth waiting for. More attempts report the mistake later;
/// fewer give up a host after one lost connection.
pub(crate) const FIRST_CONTACT_ATTEMPTS: u32 = 3;

/// Longest wait for the head of one response, however long the deadline is. A longer wait notices a dead connection
/// later; a shorter one gives up a slow server too early.
pub(crate) const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// How persistent an operation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Time without progress after which the operation fails. With [`Duration::MAX`], the operation never gives up.
    pub deadline: Duration,
}

/// The retry state of one operation.
#[derive(Debug)]
pub struct Retry {
    policy: RetryPolicy,
    started: Instant,
    progress: Instant,
    failures: u32,
    streak: u32,
    counter: Arc<RetryCounter>,
}

impl Retry {
    /// Starts the clock of an operation.
    pub fn new(policy: RetryPolicy) -> Self {
        let now = Instant::now();
        Self {
            policy,
            started: now,
            progress: now,
            failures: 0,
            streak: 0,
            counter: Arc::default(),
        }
    }

    /// Counts the further attempts with `counter`.
    pub(crate) fn counted_by(self, counter: Arc<RetryCounter>) -> Self {
        Self { counter, ..self }
    }

    /// Notes that bytes arrived. The deadline and the delays start over.
    pub(crate) fn progressed(&mut self) {
        self.progress = Instant::now();
        self.streak = 0;
    }

    /// Leaves `time` out of the deadline, because the caller and not the operation took it.
    pub(crate) fn excuse(&mut self, time: Duration) {
        self.progress = (self.progress + time).min(Instant::now());
    }

    /// Returns the time left until the deadline.
    pub fn remaining(&self) -> Duration {
        self.policy.deadline.saturating_sub(self.progress.elapsed())
    }

    /// Returns how long one attempt may wait for the first byte of a response. That is half of the deadline while
    /// more than half is left. A connection that died silently then leaves time for another attempt. It is never more
    /// than [`LONGEST_WAIT`].
    pub(crate) fn attempt_wait(&self) -> Duration {
        let half = self.policy.deadline / 2;
        let remaining = self.remaining();
        let wait = if remaining > half { half } else { remaining };
        wait.min(LONGEST_WAIT)
    }

    /// Takes the failure of an attempt. Returns the delay to sleep before the next attempt, or the error to give up
    /// with. After several attempts, that error says how many there were and how long they took.
    ///
    /// `reached` says whether the host has ever answered; see [`FIRST_CONTACT_ATTEMPTS`].
    pub fn after(&mut self, error: BlobError, reached: bool) -> Result<Duration, BlobError> {
        self.failures += 1;
        self.streak += 1;
        if !error.is_transient() {
            return Err(error);
        }
        let unreachable = matches!(error, BlobError::Unreachable { .. });
        if unreachable && !reached && self.failures >= FIRST_CONTACT_ATTEMPTS {
            return Err(self.give_up(error));
        }
        let remaining = self.remaining();
        // A last attempt in the time left is worth more than keeping to the delays.
        let delay = backoff(self.streak, fastrand::f64()).min(remaining / 2);
        let asked = match &error {
            BlobError::RateLimited { after: Some(after), .. } => *after,
            _ => Duration::ZERO,
        };
        if remaining < FIRST_DELAY || asked >= remaining {
            return Err(self.give_up(error));
        }
        self.counter.count(&error);
        Ok(delay.max(asked))
    }

    fn give_up(&self, error: BlobError) -> BlobError {
        if self.failures < 2 {
            return error;
        }
        let elapsed = self.started.elapsed().as_secs_f64();
        annotate(error, &format!(" ({} attempts in {elapsed:.1}s)", self.failures))
    }
}

/// Returns the delay before attempt `failures + 1`: between half of the nominal delay and all of it. `jitter` is in
/// 0..1.
pub(crate) fn backoff(failures: u32, jitter: f64) -> Duration {
    let doublings = failures.saturating_sub(1).min(16);
    let nominal = (FIRST_DELAY * (1 << doublings)).min(LONGEST_DELAY);
    nominal.mul_f64(0.5 + jitter.clamp(0.0, 1.0) / 2.0)
}

/// Appends `note` to the free text of a transient error.
fn annotate(mut error: BlobError, note: &str) -> BlobError {
    match &mut error {
        BlobError::Unreachable { reason, .. } => reason.push_str(note),
        BlobError::Protocol { detail, .. } => detail.push_str(note),
        BlobError::Timeout { what, .. } => what.push_str(note),
        BlobError::RateLimited { host, .. } => host.push_str(note),
        _ => {}
    }
    error
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused() -> BlobError {
        BlobError::Unreachable {
            host: "h".into(),
            reason: "refused".into(),
        }
    }

    fn retry(seconds: u64) -> Retry {
        Retry::new(RetryPolicy {
            deadline: Duration::from_secs(seconds),
        })
    }

    #[test]
    fn delays_double_up_to_the_cap_and_jitter_stays_in_the_upper_half() {
        assert_eq!(backoff(1, 1.0), FIRST_DELAY);
        assert_eq!(backoff(1, 0.0), FIRST_DELAY / 2);
        assert_eq!(backoff(3, 1.0), FIRST_DELAY * 4);
        assert_eq!(backoff(u32::MAX, 1.0), LONGEST_DELAY);
    }

    #[test]
    fn lasting_errors_are_not_retried() {
        let error = BlobError::NotFound {
            what: "x".into(),
            hint: None,
        };
        assert!(matches!(retry(30).after(error, true), Err(BlobError::NotFound { .. })));
    }

    #[test]
    fn a_host_never_reached_is_given_up_early_and_the_error_counts_attempts() {
        let mut state = retry(3600);
        assert!(state.after(refused(), false).is_ok());
        assert!(state.after(refused(), false).is_ok());
        let error = state.after(refused(), false).unwrap_err();
        assert!(error.to_string().contains("3 attempts"), "{error}");
        assert!(retry(3600).after(refused(), true).is_ok());
    }

    #[test]
    fn retry_after_is_obeyed_or_ends_the_operation() {
        let limited = |seconds| BlobError::RateLimited {
            host: "h".into(),
            after: Some(Duration::from_secs(seconds)),
        };
        assert_eq!(retry(30).after(limited(7), true).unwrap(), Duration::from_secs(7));
        assert!(retry(30).after(limited(31), true).is_err());
    }

    #[test]
    fn the_time_left_is_used_and_then_it_ends() {
        let mut state = Retry::new(RetryPolicy {
            deadline: Duration::from_millis(400),
        });
        state.streak = 10;
        assert!(state.after(refused(), true).unwrap() <= Duration::from_millis(200));
        state.policy.deadline = Duration::from_millis(100);
        assert!(state.after(refused(), true).is_err());
    }

    #[test]
    fn an_endless_deadline_does_not_overflow() {
        let mut state = Retry::new(RetryPolicy {
            deadline: Duration::MAX,
        });
        assert!(state.after(refused(), true).is_ok());
        assert_eq!(state.attempt_wait(), LONGEST_WAIT);
    }
}
