//! How much memory may be taken by what is known of an image's files.
//!
//! The tables of an image (names, owners, attributes, places of content) grow with what the image says, and a few compressed
//! bytes can say a lot. Whatever grows this way is charged to one [`Allowance`], and an image that needs more is refused. A
//! [`Charge`] returns its bytes when it is dropped.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What the tables may take beside the memory for decoded data (`--memory`).
pub const TABLES: u64 = 192 << 20;

/// Charges grow by so much at once, so that counting costs nothing.
const STEP: u64 = 64 << 10;

/// More memory would be needed than is allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("more than {} MiB of memory; a larger --memory allows more", limit >> 20)]
pub struct OverLimit {
    /// Bytes that are allowed.
    pub limit: u64,
}

/// A number of bytes that all tables of a process share.
#[derive(Debug)]
pub struct Allowance {
    limit: u64,
    used: AtomicU64,
}

impl Allowance {
    /// Nothing is used yet.
    pub fn new(limit: u64) -> Arc<Self> {
        Arc::new(Self {
            limit,
            used: AtomicU64::new(0),
        })
    }

    /// Bytes that are allowed.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Bytes that are charged now.
    #[cfg(test)]
    pub(crate) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// A charge of nothing.
    pub fn charge(self: &Arc<Self>) -> Charge {
        Charge {
            allowance: self.clone(),
            bytes: 0,
        }
    }
}

/// Bytes taken from an [`Allowance`].
#[derive(Debug)]
pub struct Charge {
    allowance: Arc<Allowance>,
    bytes: u64,
}

impl Default for Charge {
    /// A charge of nothing, on an allowance of its own without `--memory`.
    fn default() -> Self {
        Allowance::new(TABLES).charge()
    }
}

impl Charge {
    /// Bytes that are allowed in all.
    pub fn limit(&self) -> u64 {
        self.allowance.limit
    }

    /// Whether it has taken that many bytes already.
    pub fn covers(&self, bytes: u64) -> bool {
        bytes <= self.bytes
    }

    /// Returns all that it has taken.
    pub fn clear(&mut self) {
        self.allowance.used.fetch_sub(self.bytes, Ordering::Relaxed);
        self.bytes = 0;
    }

    /// Takes at least `bytes` in all, a little more if it has to grow. If that is too much, nothing changes.
    pub fn cover(&mut self, bytes: u64) -> Result<(), OverLimit> {
        if self.covers(bytes) {
            return Ok(());
        }
        // The steps end at the limit.
        let wanted = bytes
            .saturating_add(STEP)
            .min(self.bytes.max(self.allowance.limit))
            .max(bytes);
        self.exactly(wanted).or_else(|_| self.exactly(bytes))
    }

    /// Takes `bytes` in all, more or less than before. If that is too much, nothing changes.
    pub fn exactly(&mut self, bytes: u64) -> Result<(), OverLimit> {
        let limit = self.allowance.limit;
        if bytes <= self.bytes {
            self.allowance.used.fetch_sub(self.bytes - bytes, Ordering::Relaxed);
        } else {
            let more = bytes - self.bytes;
            let add = |used: u64| used.checked_add(more).filter(|&used| used <= limit);
            let taken = self
                .allowance
                .used
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
            taken.map_err(|_| OverLimit { limit })?;
        }
        self.bytes = bytes;
        Ok(())
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_charged_is_limited_and_returned() {
        let allowance = Allowance::new(1 << 20);
        let mut first = allowance.charge();
        let mut second = allowance.charge();
        first.cover(1000).unwrap();
        assert!((1000..=1000 + STEP).contains(&allowance.used()));
        second.exactly(900_000).unwrap();
        assert_eq!(first.cover(200_000), Err(OverLimit { limit: 1 << 20 }));
        first.cover((1 << 20) - 900_000).unwrap();
        assert_eq!(allowance.used(), 1 << 20);
        assert!(first.cover(u64::MAX).is_err());
        second.exactly(5).unwrap();
        drop(first);
        assert_eq!(allowance.used(), 5);
        drop(second);
        assert_eq!(allowance.used(), 0);
    }
}
