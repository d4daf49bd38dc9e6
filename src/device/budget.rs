//! The budget of the cache: keeps the store within `--cache-size` while spans are written to it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use serde::{Deserialize, Serialize};

use super::{Scope, evict_to};
use crate::store::{Store, StoreError};

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
    state: Mutex<BudgetState>,
    evicted: EvictionCounters,
}

/// What a process has evicted to make room for what it wrote.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evictions {
    /// Number of spans.
    pub spans: u64,
    /// Number of trees.
    pub trees: u64,
    /// Bytes on disk that came free.
    pub bytes: u64,
}

#[derive(Debug, Default)]
struct EvictionCounters {
    spans: AtomicU64,
    trees: AtomicU64,
    bytes: AtomicU64,
}

#[derive(Debug, Default)]
struct BudgetState {
    /// Bytes that may be reserved before the next look at the store.
    allowance: u64,
    /// Bytes that are reserved and perhaps not yet written, so that a look at the store may not see them.
    pending: u64,
}

/// Permission to write some bytes to the store. Must be kept until they are written.
#[derive(Debug)]
#[must_use]
pub struct Reserved<'b> {
    budget: &'b CacheBudget,
    bytes: u64,
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        self.budget.state().pending -= self.bytes;
    }
}

impl CacheBudget {
    /// Creates a budget that keeps data devices, trees and drafts of `store` within about `limit` bytes on disk.
    pub fn new(store: Store, limit: u64) -> Arc<Self> {
        Arc::new(Self {
            store,
            limit,
            state: Mutex::default(),
            evicted: EvictionCounters::default(),
        })
    }

    /// Returns the limit in bytes.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Returns what this process has evicted.
    pub fn evictions(&self) -> Evictions {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Evictions {
            spans: of(&self.evicted.spans),
            trees: of(&self.evicted.trees),
            bytes: of(&self.evicted.bytes),
        }
    }

    fn state(&self) -> MutexGuard<'_, BudgetState> {
        self.state.lock().expect("no panic while locked")
    }

    /// Reserves `bytes` of the store, for a write that follows at once. If there is no room, evicts the least recently
    /// used spans and trees. Returns none if that is not enough. The call may take some milliseconds, so make it where
    /// blocking is allowed.
    pub fn reserve(&self, bytes: u64) -> Option<Reserved<'_>> {
        let mut state = self.state();
        match state.allowance.checked_sub(bytes) {
            Some(left) => state.allowance = left,
            None if bytes > self.limit => return None,
            None => match self.make_room(state.pending, bytes) {
                Ok(room) => {
                    let left = room.checked_sub(bytes);
                    state.allowance = left.unwrap_or(0).min(step(self.limit, room));
                    left?;
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot keep the cache within its limit");
                    return None;
                }
            },
        }
        state.pending += bytes;
        drop(state);
        Some(Reserved { budget: self, bytes })
    }

    /// Returns the bytes below the limit besides `pending` ones, after evicting if `bytes` would not fit.
    fn make_room(&self, pending: u64, bytes: u64) -> Result<u64, StoreError> {
        let limit = self.limit.saturating_sub(pending);
        let room = limit.saturating_sub(self.store.cache_usage()?);
        if room >= bytes {
            return Ok(room);
        }
        let slack = (self.limit / SLACK).clamp(LEAST_SLACK, MOST_SLACK);
        let target = limit.saturating_sub(bytes + slack);
        let evicted = evict_to(&self.store, target, Scope::Cache)?;
        tracing::debug!(?evicted, "made room in the cache");
        for (counter, more) in [
            (&self.evicted.spans, evicted.spans),
            (&self.evicted.trees, evicted.trees),
            (&self.evicted.bytes, evicted.freed()),
        ] {
            counter.fetch_add(more, Ordering::Relaxed);
        }
        Ok(limit.saturating_sub(evicted.after))
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
        while budget.reserve(100_000).is_some() {
            use std::os::unix::fs::FileExt as _;
            draft.file().write_all_at(&vec![1; 100_000], written).unwrap();
            written += 100_000;
            assert!(written <= 9 << 20);
        }
        assert!(written > 7 << 20, "{written}");
        drop(draft);
        assert!(budget.reserve(100_000).is_some());
        assert!(budget.reserve((8 << 20) + 1).is_none());
    }

    #[test]
    fn what_is_about_to_be_written_counts() {
        let dir = tempfile::tempdir().unwrap();
        let budget = CacheBudget::new(Store::open(dir.path()).unwrap(), 8 << 20);
        let reserved: Vec<_> = std::iter::from_fn(|| budget.reserve(100_000)).collect();
        assert!((60..=83).contains(&reserved.len()), "{}", reserved.len());
        drop(reserved);
        assert!(budget.reserve(100_000).is_some());
    }
}
