//! Keeps the store within `--cache-size` while it is being filled.

use std::sync::{Arc, Mutex};

use super::{Scope, evict_to};
use crate::store::Store;

/// Bytes that a process may write after it has looked at the store, before it looks again. Each process may be that far beyond
/// the limit, and a look costs about a microsecond for each layer in the store.
const STEP: u64 = 1 << 20;
/// While the store is far from its limit, a process may write this share of what is left.
const SHARE: u64 = 64;
const LONGEST_STEP: u64 = 64 << 20;
/// An eviction frees a little more than is needed, so that the next one is not due at once: this share of the limit, within
/// bounds.
const SLACK: u64 = 32;
const LEAST_SLACK: u64 = STEP;
const MOST_SLACK: u64 = 64 << 20;

/// The limit, and how much this process may write before it looks at the store again.
#[derive(Debug)]
pub struct CacheBudget {
    store: Store,
    limit: u64,
    allowance: Mutex<u64>,
}

impl CacheBudget {
    /// Keeps data devices, trees and drafts of `store` within about `limit` bytes on disk.
    pub fn new(store: Store, limit: u64) -> Arc<Self> {
        Arc::new(Self {
            store,
            limit,
            allowance: Mutex::new(0),
        })
    }

    /// The limit in bytes.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Whether `bytes` more may be written to the store. Evicts what was used least recently if there is no room, so it may
    /// take some milliseconds; call it where blocking is allowed.
    pub fn reserve(&self, bytes: u64) -> bool {
        let mut allowance = self.allowance.lock().expect("no panic while locked");
        if let Some(left) = allowance.checked_sub(bytes) {
            *allowance = left;
            return true;
        }
        if bytes > self.limit {
            return false;
        }
        match self.make_room(bytes) {
            Ok(room) => {
                let left = room.checked_sub(bytes);
                *allowance = left.unwrap_or(0).min(step(self.limit, room));
                left.is_some()
            }
            Err(error) => {
                tracing::warn!(%error, "cannot keep the cache within its limit");
                false
            }
        }
    }

    /// Bytes below the limit, after evicting if `bytes` would not fit.
    fn make_room(&self, bytes: u64) -> Result<u64, crate::store::StoreError> {
        let usage = self.store.cache_usage()?;
        let room = self.limit.saturating_sub(usage);
        if room >= bytes {
            return Ok(room);
        }
        let slack = (self.limit / SLACK).clamp(LEAST_SLACK, MOST_SLACK);
        let target = self.limit.saturating_sub(bytes + slack);
        let evicted = evict_to(&self.store, target, Scope::Cache)?;
        tracing::debug!(?evicted, "made room in the cache");
        Ok(self.limit.saturating_sub(evicted.after))
    }
}

/// Bytes that may be written until the next look, with `room` bytes left below the limit.
fn step(limit: u64, room: u64) -> u64 {
    (room / SHARE).clamp(STEP.min(limit / SHARE), LONGEST_STEP)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_short_near_the_limit() {
        assert_eq!(step(10 << 30, 9 << 30), LONGEST_STEP);
        assert_eq!(step(10 << 30, 128 << 20), 2 << 20);
        assert_eq!(step(10 << 30, 0), STEP);
        assert_eq!(step(1 << 20, 1 << 20), 16 << 10);
    }

    #[test]
    fn what_is_there_counts_and_no_more_than_the_limit_is_given() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let draft = store.draft().unwrap();
        let mut written = 0;
        let budget = CacheBudget::new(store, 8 << 20);
        while budget.reserve(100_000) {
            use std::os::unix::fs::FileExt as _;
            draft.file().write_all_at(&vec![1; 100_000], written).unwrap();
            written += 100_000;
            assert!(written <= 9 << 20);
        }
        assert!(written > 7 << 20, "{written}");
        drop(draft);
        assert!(budget.reserve(100_000));
        assert!(!budget.reserve((8 << 20) + 1));
    }
}
