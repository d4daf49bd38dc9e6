//! Trouble that a mount lives with, for `status`, as long as it lasts.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::Notify;

/// Files that are remembered because reading them fails.
const FILES: usize = 64;

/// What does not work at the moment.
#[derive(Debug, Default)]
pub struct Health {
    trouble: Mutex<Trouble>,
    /// Whether there is any: readers ask this each time.
    any: AtomicBool,
    /// Woken when writing to the store fails.
    store_failed: Notify,
}

#[derive(Debug, Default)]
struct Trouble {
    /// Something cannot be kept for as long as this process runs.
    lost: Option<String>,
    /// The last write to the store failed.
    store: Option<String>,
    /// The last fetch that a reader waited for failed.
    fetch: Option<String>,
    /// Files whose own data is wrong, and what is wrong with it.
    files: BTreeMap<u64, String>,
}

impl Health {
    fn change(&self, change: impl FnOnce(&mut Trouble)) {
        let mut trouble = self.trouble.lock().expect("no panic while locked");
        change(&mut trouble);
        self.any.store(trouble.first().is_some(), Ordering::Relaxed);
    }

    /// Something could not be kept on disk. It is logged when it begins.
    pub fn store_failed(&self, error: &dyn Display) {
        self.change(|trouble| {
            if trouble.store.is_none() {
                tracing::warn!(%error, "the store cannot be written, going on from memory");
                trouble.store = Some(format!("the store cannot be written, going on from memory: {error}"));
            }
        });
        self.store_failed.notify_one();
    }

    /// Something cannot be kept, and will not be tried again.
    pub fn store_lost(&self, error: &dyn Display) {
        self.change(|trouble| {
            if trouble.lost.is_none() {
                tracing::warn!(%error, "the store cannot be used, going on from memory");
                trouble.lost = Some(format!("the store cannot be used, going on from memory: {error}"));
            }
        });
    }

    /// Something was kept on disk.
    pub fn store_works(&self) {
        if self.any.load(Ordering::Relaxed) {
            self.change(|trouble| {
                if trouble.store.take().is_some() {
                    tracing::warn!("the store can be written again");
                }
            });
        }
    }

    /// Waits until writing to the store does not work.
    pub async fn store_trouble(&self) {
        while self.trouble.lock().expect("no panic while locked").store.is_none() {
            self.store_failed.notified().await;
        }
    }

    /// A reader of `file` got an error; `own` says that the file's data is wrong, and not the way to it.
    pub fn read_failed(&self, file: u64, own: bool, error: &dyn Display) {
        tracing::error!(%error, "answering a read with an error");
        let problem = format!("a read failed: {error}");
        self.change(|trouble| match own {
            true if trouble.files.len() < FILES || trouble.files.contains_key(&file) => {
                trouble.files.insert(file, problem);
            }
            true => {}
            false => trouble.fetch = Some(problem),
        });
    }

    /// A reader of `file` got its data.
    pub fn read_worked(&self, file: u64) {
        if self.any.load(Ordering::Relaxed) {
            self.change(|trouble| drop(trouble.files.remove(&file)));
        }
    }

    /// Data came and was what it should be.
    pub fn fetched(&self) {
        if self.any.load(Ordering::Relaxed) {
            self.change(|trouble| trouble.fetch = None);
        }
    }

    /// The trouble with the store, if there is any.
    pub fn store_problem(&self) -> Option<String> {
        let trouble = self.trouble.lock().expect("no panic while locked");
        trouble.lost.clone().or_else(|| trouble.store.clone())
    }

    /// All that is wrong, if anything is.
    pub fn problem(&self) -> Option<String> {
        let trouble = self.trouble.lock().expect("no panic while locked");
        let more = match trouble.files.len() {
            0 | 1 => String::new(),
            n => format!(" (and reads of {} more files)", n - 1),
        };
        let file = trouble.files.values().next().map(|problem| format!("{problem}{more}"));
        let store = trouble.lost.clone().or_else(|| trouble.store.clone());
        let problems: Vec<String> = [store, trouble.fetch.clone(), file].into_iter().flatten().collect();
        (!problems.is_empty()).then(|| problems.join("; "))
    }
}

impl Trouble {
    fn first(&self) -> Option<&String> {
        let file = self.files.values().next();
        self.lost
            .as_ref()
            .or(self.store.as_ref())
            .or(self.fetch.as_ref())
            .or(file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trouble_lasts_until_its_own_end() {
        let health = Health::default();
        assert_eq!(health.problem(), None);
        health.store_failed(&"disk full");
        health.read_failed(1, false, &"no answer");
        health.read_failed(2, true, &"wrong digest");
        health.read_failed(3, true, &"wrong digest");
        let problem = health.problem().unwrap();
        for part in ["disk full", "no answer", "wrong digest", "1 more files"] {
            assert!(problem.contains(part), "{problem}");
        }
        health.fetched();
        health.store_works();
        health.read_worked(3);
        assert_eq!(health.problem().unwrap(), "a read failed: wrong digest");
        health.read_worked(2);
        assert_eq!(health.problem(), None);
        health.store_lost(&"read-only");
        health.store_works();
        assert!(health.store_problem().unwrap().contains("read-only"));
        for file in 0..1000 {
            health.read_failed(file, true, &"wrong digest");
        }
        assert!(health.trouble.lock().unwrap().files.len() <= FILES);
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
