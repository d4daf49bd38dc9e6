//! Reads that fail, for `status`, as long as that lasts.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// Runs of content that are remembered because reading them fails.
const RUNS: usize = 64;

/// A run of content: position of its layer, and its device address.
type Run = (u32, u64);

/// What readers of an image have trouble with.
#[derive(Debug, Default)]
pub(super) struct Trouble {
    now: Mutex<Now>,
    /// Whether there is any: readers ask this each time.
    any: AtomicBool,
}

#[derive(Debug, Default)]
struct Now {
    /// The last fetch that a reader waited for failed, when so many spans had been fetched.
    fetch: Option<(String, u64)>,
    /// Runs whose own data is wrong, and what is wrong with it.
    runs: BTreeMap<Run, String>,
}

impl Trouble {
    fn change(&self, change: impl FnOnce(&mut Now)) {
        let mut now = self.now.lock().expect("no panic while locked");
        change(&mut now);
        let any = now.fetch.is_some() || !now.runs.is_empty();
        self.any.store(any, Ordering::Relaxed);
    }

    /// Whether there is any.
    pub(super) fn is_any(&self) -> bool {
        self.any.load(Ordering::Relaxed)
    }

    /// A reader of `run` got an error; `own` says that the data is wrong, and not the way to it. `landed` spans have been fetched
    /// so far.
    pub(super) fn read_failed(&self, run: Run, own: bool, error: &dyn Display, landed: u64) {
        tracing::error!(%error, "answering a read with an error");
        let problem = format!("a read failed: {error}");
        self.change(|now| match own {
            true if now.runs.len() < RUNS || now.runs.contains_key(&run) => {
                now.runs.insert(run, problem);
            }
            true => {}
            false => now.fetch = Some((problem, landed)),
        });
    }

    /// A reader of `run` got its data.
    pub(super) fn read_worked(&self, run: Run) {
        if self.is_any() {
            self.change(|now| drop(now.runs.remove(&run)));
        }
    }

    /// All that is wrong, if anything is, now that `landed` spans have been fetched: trouble with fetching ends with the next
    /// one.
    pub(super) fn problem(&self, landed: u64) -> Option<String> {
        let mut problems = Vec::new();
        self.change(|now| {
            now.fetch.take_if(|(_, before)| *before != landed);
            problems.extend(now.fetch.as_ref().map(|(problem, _)| problem.clone()));
            let more = match now.runs.len() {
                0 | 1 => String::new(),
                n => format!(" (and reads of {} more files)", n - 1),
            };
            problems.extend(now.runs.values().next().map(|problem| format!("{problem}{more}")));
        });
        (!problems.is_empty()).then(|| problems.join("; "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trouble_lasts_until_its_own_end() {
        let trouble = Trouble::default();
        assert_eq!(trouble.problem(0), None);
        trouble.read_failed((0, 1), false, &"no answer", 7);
        trouble.read_failed((0, 2), true, &"wrong digest", 7);
        trouble.read_failed((1, 2), true, &"wrong digest", 7);
        let problem = trouble.problem(7).unwrap();
        for part in ["no answer", "wrong digest", "1 more files"] {
            assert!(problem.contains(part), "{problem}");
        }
        trouble.read_worked((1, 2));
        assert_eq!(trouble.problem(8).unwrap(), "a read failed: wrong digest");
        trouble.read_worked((0, 2));
        assert!(!trouble.is_any() && trouble.problem(8).is_none());
        for run in 0..1000 {
            trouble.read_failed((0, run), true, &"wrong digest", 8);
        }
        assert!(trouble.now.lock().unwrap().runs.len() <= RUNS);
    }
}
