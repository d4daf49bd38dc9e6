//! What a place does not have, and which places are in trouble, remembered for a while.
//!
//! Most mounts are of images that were mounted before, so most questions would have the answer of the last time. At some
//! registries each question counts as a pull.

use std::time::Duration;

use super::IndexPlace;
use crate::store::Store;

/// How long a place is believed not to have a file. With a longer time, a new index is found later; with a shorter one,
/// places are asked more often.
const ABSENT: Duration = Duration::from_secs(600);
/// How long a place in trouble is left alone. With a longer time, a place that is well again is used later; with a
/// shorter one, more mounts wait for a place that does not answer.
const TROUBLE: Duration = Duration::from_secs(60);

/// The memory, which is in the store. Without a store, nothing is remembered.
#[derive(Debug, Clone)]
pub(super) struct Absence(Store);

impl Absence {
    pub(super) fn new(store: Store) -> Self {
        Self(store)
    }

    /// Records that a place does not have a file.
    pub(super) fn lacks(&self, place: &IndexPlace, file: &str) {
        self.note(&absent(place, file), ABSENT);
    }

    /// Whether a place did not have a file when it was asked lately.
    pub(super) fn is_lacking(&self, place: &IndexPlace, file: &str) -> bool {
        self.0.is_noted(&absent(place, file), ABSENT)
    }

    /// Forgets that a place did not have a file.
    pub(super) fn forget(&self, place: &IndexPlace, file: &str) {
        for what in [absent(place, file), trouble(place)] {
            if let Err(error) = self.0.forget_note(&what) {
                tracing::debug!(%error, "cannot forget what a location lacks");
            }
        }
    }

    /// Records that a place is in trouble.
    pub(super) fn fails(&self, place: &IndexPlace) {
        self.note(&trouble(place), TROUBLE);
    }

    /// Whether a place was in trouble lately.
    pub(super) fn is_failing(&self, place: &IndexPlace) -> bool {
        self.0.is_noted(&trouble(place), TROUBLE)
    }

    fn note(&self, what: &str, life: Duration) {
        match self.0.note(what, life) {
            Ok(()) => {}
            Err(error) if error.is_by_design() => {}
            Err(error) => tracing::debug!(%error, "cannot remember what a location lacks"),
        }
    }
}

fn absent(place: &IndexPlace, file: &str) -> String {
    format!("absent\n{place}\n{file}")
}

fn trouble(place: &IndexPlace) -> String {
    format!("trouble\n{place}")
}
