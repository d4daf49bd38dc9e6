//! The budget of the cache: keeps the store within `--cache-size` while spans are written to it.

use std::sync::{Arc, Mutex};

use super::{Scope, evict_to};
use crate::store::Store;

/// Bytes that a process may write near the limit before it looks at the store again. With a larger step, each process
/// may exceed the limit by more. With a smaller one, it looks more often, and a look costs about a microsecond for
/// each layer in the store.
const STEP: u64 = 1 << 20;
/// Part of the room below the limit that a process may write before it looks again, as a divisor. With a larger
/// divisor, it looks more often. With a smaller divisor, each of several processes writes more before it sees what
/// the others wrote.
const SHARE: u64 = 64;
/// Most bytes that a process may write before it looks at the store again. With a larger bound, several processes may
/// exceed the limit by more. With a smaller one, they look more often.
const LONGEST_STEP: u64 = 64 << 20;
/// Part of the limit that an eviction frees beyond what is needed, as a divisor. The next eviction is then not due at
/// once. With a larger divisor, evictions come more often. With a smaller one, they remove more spans than necessary.
const SLACK: u64 = 32;
/// Least bytes that an eviction frees beyond what is needed. A larger bound evicts more from a small cache; a smaller
/// one makes evictions more frequent there.
const LEAST_SLACK: u64 = STEP;
/// Most bytes that an eviction frees beyond what is needed. A larger bound evicts more from a large cache; a smaller
/// one makes evictions more frequent there.
const MOST_SLACK: u64 = 64 << 20;

/// The limit of the store, and how much this process may write before it looks at the store again.
#[derive(Debug)]
pub struct CacheBudget {
    store: Store,
    limit: u64,
    allowance: Mutex<u64>,
}

impl CacheBudget {
    /// Creates a budget that keeps data devices, trees and drafts of `store` within about `limit` bytes on disk.
    pub fn new(store: Store, limit: u64) -> Arc<Self> {
        Arc::new(Self {
            store,
            limit,
            allowance: Mutex::new(0),
        })
    }

    /// Returns the limit in bytes.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Returns whether `bytes` more may be written to the store. If there is no room, evicts the least recently used
    /// spans and trees. The call may take some milliseconds, so make it where blocking is allowed.
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

    /// Returns the bytes below the limit, after evicting if `bytes` would not fit.
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

/// Returns the bytes that may be written until the next look, with `room` bytes left below the limit.
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
