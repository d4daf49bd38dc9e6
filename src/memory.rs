//! A limit for the memory of what is known of an image's files.
//!
//! The tables of an image (names, owners, attributes, places of content) grow with what the image says. A few
//! compressed bytes can say a lot. Everything that grows in this way is charged to one [`Allowance`], and an image
//! that needs more is refused. A [`Charge`] returns its bytes when it is dropped.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes that tables may take in addition to `--memory`, the bytes for decoded data. A larger bound lets one image
/// take more memory; a smaller one refuses images with many files.
pub const TABLES: u64 = 192 << 20;

/// Bytes by which a charge grows at once. A larger step takes more bytes than are needed; a smaller one counts more
/// often.
const STEP: u64 = 64 << 10;

/// An image needs more memory than is allowed.
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
    /// Returns an allowance of which no bytes are used.
    pub fn new(limit: u64) -> Arc<Self> {
        Arc::new(Self {
            limit,
            used: AtomicU64::new(0),
        })
    }

    /// Returns the bytes that are allowed.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Returns the bytes that are charged at the moment.
    #[cfg(test)]
    pub(crate) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Returns a charge of no bytes.
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
    /// Returns a charge of no bytes on an allowance of its own, of [`TABLES`] bytes.
    fn default() -> Self {
        Allowance::new(TABLES).charge()
    }
}

impl Charge {
    /// Returns the bytes that all charges together may take.
    pub fn limit(&self) -> u64 {
        self.allowance.limit
    }

    /// Returns whether the charge has taken `bytes` already.
    pub fn covers(&self, bytes: u64) -> bool {
        bytes <= self.bytes
    }

    /// Gives back all bytes that the charge has taken.
    pub fn clear(&mut self) {
        self.allowance.used.fetch_sub(self.bytes, Ordering::Relaxed);
        self.bytes = 0;
    }

    /// Takes at least `bytes` in all, and a little more if the charge has to grow. If that is too much, nothing
    /// changes.
    pub fn cover(&mut self, bytes: u64) -> Result<(), OverLimit> {
        if self.covers(bytes) {
            return Ok(());
        }
        // A step does not go beyond the limit.
        let wanted = bytes
            .saturating_add(STEP)
            .min(self.bytes.max(self.allowance.limit))
            .max(bytes);
        self.exactly(wanted).or_else(|_| self.exactly(bytes))
    }

    /// Takes `more` bytes in addition to those that it has. If that is too much, nothing changes.
    pub fn grow(&mut self, more: u64) -> Result<(), OverLimit> {
        self.exactly(self.bytes.saturating_add(more))
    }

    /// Takes exactly `bytes` in all, which may be more or fewer than before. If that is too much, nothing changes.
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
