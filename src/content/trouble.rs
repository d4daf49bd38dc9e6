//! Reading problems that `status` shows for as long as they last.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// Number of runs of wrong content that are remembered.
const RUNS: usize = 64;

/// A run of content: the position of its layer, and the start of the run in the data device.
type ContentRun = (u32, u64);

/// The present problems of readers of an image.
#[derive(Debug, Default)]
pub(super) struct ReadTrouble {
    now: Mutex<Now>,
    /// Whether there is any problem. Every local read checks this flag, so it needs no lock.
    any: AtomicBool,
}

#[derive(Debug, Default)]
struct Now {
    /// The error of the last fetch that failed for a waiting reader, and the number of spans fetched before that.
    fetch: Option<(String, u64)>,
    /// Runs whose own data is wrong, with the error.
    runs: BTreeMap<ContentRun, String>,
}

impl ReadTrouble {
    fn change(&self, change: impl FnOnce(&mut Now)) {
        let mut now = self.now.lock().expect("no panic while locked");
        change(&mut now);
        let any = now.fetch.is_some() || !now.runs.is_empty();
        self.any.store(any, Ordering::Relaxed);
    }

    /// Whether there is any problem.
    pub(super) fn is_any(&self) -> bool {
        self.any.load(Ordering::Relaxed)
    }

    /// Records that a read of `run` failed. `own` is true if the data itself is wrong, and false if fetching it
    /// failed. `landed` is the number of spans fetched so far.
    pub(super) fn read_failed(&self, run: ContentRun, own: bool, error: &dyn Display, landed: u64) {
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

    /// Records that a read of `run` succeeded, which ends a problem with that run's data.
    pub(super) fn read_worked(&self, run: ContentRun) {
        if self.is_any() {
            self.change(|now| drop(now.runs.remove(&run)));
        }
    }

    /// Describes all present problems, if there are any. `landed` is the number of spans fetched so far: a fetch
    /// problem ends with the next fetched span.
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
        let trouble = ReadTrouble::default();
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
