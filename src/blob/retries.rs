//! How often requests were repeated, and why.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use super::BlobError;

/// Numbers of requests that were repeated, by what went wrong with the request before.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retries {
    /// The server limited the rate of requests.
    pub rate_limited: u64,
    /// The response, or more of it, did not come in time.
    pub timed_out: u64,
    /// There was no connection, or it broke.
    pub unreachable: u64,
    /// The server reported an error of its own, or broke the protocol.
    pub server_error: u64,
}

impl std::iter::Sum for Retries {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |a, b| Self {
            rate_limited: a.rate_limited + b.rate_limited,
            timed_out: a.timed_out + b.timed_out,
            unreachable: a.unreachable + b.unreachable,
            server_error: a.server_error + b.server_error,
        })
    }
}

/// Counts repeated requests.
#[derive(Debug, Default)]
pub(crate) struct RetryCounter {
    rate_limited: AtomicU64,
    timed_out: AtomicU64,
    unreachable: AtomicU64,
    server_error: AtomicU64,
}

impl RetryCounter {
    /// Counts the repetition of a request that failed with a transient error.
    pub(super) fn count(&self, error: &BlobError) {
        let counter = match error {
            BlobError::RateLimited { .. } => &self.rate_limited,
            BlobError::Timeout { .. } => &self.timed_out,
            BlobError::Unreachable { .. } => &self.unreachable,
            _ => &self.server_error,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// The present numbers.
    pub(crate) fn snapshot(&self) -> Retries {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Retries {
            rate_limited: of(&self.rate_limited),
            timed_out: of(&self.timed_out),
            unreachable: of(&self.unreachable),
            server_error: of(&self.server_error),
        }
    }
}
