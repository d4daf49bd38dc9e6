//! Notes: what was so at a time, for decisions that are made again after a while.
//!
//! A note is an empty file whose name is the hash of what it says, and whose time of modification is when it was so.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use super::{Durability, Store, StoreError};
use crate::os::gone;

/// Number of notes from which on old ones are removed. More notes take more inodes; with fewer, the directory is listed
/// more often.
const SWEEP_FROM: usize = 1000;

impl Store {
    fn note_path(&self, what: &str) -> Option<PathBuf> {
        let name = &blake3::hash(what.as_bytes()).to_hex()[..32];
        Some(self.root.as_ref()?.join("notes").join(name))
    }

    /// Notes that `what` is so now. Notes older than `life` may be removed.
    pub(crate) fn note(&self, what: &str, life: Duration) -> Result<(), StoreError> {
        let path = self.note_path(what).ok_or(StoreError::Unavailable)?;
        self.publish(&path, Durability::Lazy, |_| Ok(()))?;
        let notes = self.entries("notes")?;
        if notes.len() > SWEEP_FROM {
            for note in notes {
                let old = note
                    .metadata()
                    .and_then(|m| m.modified())
                    .is_ok_and(|time| !is_recent(time, life));
                if old {
                    let path = note.path();
                    gone(std::fs::remove_file(&path)).map_err(|e| StoreError::io("remove", &path, e))?;
                }
            }
        }
        Ok(())
    }

    /// Whether `what` was noted within the last `life`.
    pub(crate) fn is_noted(&self, what: &str, life: Duration) -> bool {
        let path = self.note_path(what);
        let modified = path.and_then(|path| path.metadata().ok()?.modified().ok());
        modified.is_some_and(|time| is_recent(time, life))
    }

    /// Removes a note.
    pub(crate) fn forget_note(&self, what: &str) -> Result<(), StoreError> {
        self.note_path(what).map_or(Ok(()), |path| {
            gone(std::fs::remove_file(&path)).map_err(|e| StoreError::io("remove", &path, e))
        })
    }
}

/// Whether a time is at most `life` ago. A time in the future, from before the clock was set, is not recent.
fn is_recent(time: SystemTime, life: Duration) -> bool {
    time.elapsed().is_ok_and(|age| age < life)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_holds_for_its_life_and_until_it_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let (minute, none) = (Duration::from_secs(60), Duration::ZERO);
        assert!(!store.is_noted("a", minute));
        store.note("a", minute).unwrap();
        assert!(store.is_noted("a", minute) && !store.is_noted("a", none) && !store.is_noted("b", minute));
        store.forget_note("a").unwrap();
        store.forget_note("a").unwrap();
        assert!(!store.is_noted("a", minute));
    }
}
