//! Store problems that a process works around, for `status`, for as long as they last.

use std::fmt::Display;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::Notify;

/// The present problems with the store.
#[derive(Debug, Default)]
pub struct Health {
    trouble: Mutex<StoreTrouble>,
    /// Whether there is any problem. Every successful write checks this flag, so it needs no lock.
    any: AtomicBool,
    /// Notified when a write to the store fails.
    store_failed: Notify,
}

#[derive(Debug, Default)]
struct StoreTrouble {
    /// A part of the store that cannot be used for as long as this process runs.
    lost: Option<String>,
    /// The error of the last write to the store, if that write failed.
    store: Option<String>,
}

impl Health {
    fn change(&self, change: impl FnOnce(&mut StoreTrouble)) {
        let mut trouble = self.trouble.lock().expect("no panic while locked");
        change(&mut trouble);
        let any = trouble.lost.is_some() || trouble.store.is_some();
        self.any.store(any, Ordering::Relaxed);
    }

    /// Records that a write to the store failed. The first of several failures in a row is logged.
    pub fn store_failed(&self, error: &dyn Display) {
        self.change(|trouble| {
            if trouble.store.is_none() {
                tracing::warn!(%error, "the store cannot be written, going on from memory");
                trouble.store = Some(format!("the store cannot be written, going on from memory: {error}"));
            }
        });
        self.store_failed.notify_one();
    }

    /// Records that a part of the store cannot be used and will not be tried again.
    pub fn store_lost(&self, error: &dyn Display) {
        self.change(|trouble| {
            if trouble.lost.is_none() {
                tracing::warn!(%error, "the store cannot be used, going on from memory");
                trouble.lost = Some(format!("the store cannot be used, going on from memory: {error}"));
            }
        });
    }

    /// Records that a write to the store succeeded.
    pub(crate) fn store_works(&self) {
        if self.any.load(Ordering::Relaxed) {
            self.change(|trouble| {
                if trouble.store.take().is_some() {
                    tracing::warn!("the store can be written again");
                }
            });
        }
    }

    /// Waits until a write to the store fails. Returns at once if the last one failed.
    pub(crate) async fn store_trouble(&self) {
        while self.trouble.lock().expect("no panic while locked").store.is_none() {
            self.store_failed.notified().await;
        }
    }

    /// Describes the problem with the store, if there is one.
    pub fn store_problem(&self) -> Option<String> {
        let trouble = self.trouble.lock().expect("no panic while locked");
        trouble.lost.clone().or_else(|| trouble.store.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trouble_lasts_until_its_own_end() {
        let health = Health::default();
        assert_eq!(health.store_problem(), None);
        health.store_failed(&"disk full");
        assert!(health.store_problem().unwrap().contains("disk full"));
        health.store_works();
        assert_eq!(health.store_problem(), None);
        health.store_lost(&"read-only");
        health.store_works();
        assert!(health.store_problem().unwrap().contains("read-only"));
    }

    #[tokio::test]
    async fn trouble_with_the_store_can_be_waited_for() {
        let health = Health::default();
        health.store_failed(&"disk full");
        health.store_trouble().await;
        health.store_works();
        let waiting = health.store_trouble();
        let mut waiting = std::pin::pin!(waiting);
        assert!(futures::poll!(&mut waiting).is_pending());
        health.store_failed(&"disk full");
        waiting.await;
    }
}
