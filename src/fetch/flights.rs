//! The single-flight table: which spans are in flight, which claim fetches them, and which readers wait.
//!
//! A caller that misses a span looks at the table. In the same critical section ([`Flights::board`]) it either finds
//! the span's *flight* and waits for it, or *claims* the span. A claim lands every span that it took, whatever
//! happens to its owner. A span that stayed in the table could never be fetched again.
//!
//! ```text
//! absent ──claim──▶ in flight ──announce──▶ announced ──land──▶ absent (from the table)
//!                       └───────────── land, or the claim is dropped ──────▲
//! ```
//! An announced flight answers the waiting readers and stays in the table. No second flight can therefore start
//! before the owner is done with the span.

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use tokio::sync::watch;

use super::sync::{Arc, Mutex, MutexGuard};

/// What one who waits holds.
pub type Flight<T> = watch::Receiver<Option<T>>;

type Table<T> = HashMap<u32, Flight<T>>;

/// Spans in flight; `T` is what a flight brings.
pub struct Flights<T> {
    table: Mutex<Table<T>>,
}

impl<T> Default for Flights<T> {
    fn default() -> Self {
        Self {
            table: Mutex::new(HashMap::new()),
        }
    }
}

impl<T> fmt::Debug for Flights<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Flights").finish_non_exhaustive()
    }
}

impl<T: Clone> Flights<T> {
    /// The table, to look and claim in one critical section.
    pub fn board(self: &Arc<Self>) -> Board<'_, T> {
        Board {
            flights: self,
            table: self.table(),
        }
    }

    fn table(&self) -> MutexGuard<'_, Table<T>> {
        self.table.lock().expect("no panic while locked")
    }
}

/// The locked table.
pub struct Board<'a, T: Clone> {
    flights: &'a Arc<Flights<T>>,
    table: MutexGuard<'a, Table<T>>,
}

impl<T: Clone> fmt::Debug for Board<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Board").finish_non_exhaustive()
    }
}

impl<T: Clone> Board<'_, T> {
    /// The flight of a span, if it is under way.
    pub fn flight(&self, span: u32) -> Option<Flight<T>> {
        self.table.get(&span).cloned()
    }

    /// Whether a span is under way.
    pub fn is_flying(&self, span: u32) -> bool {
        self.table.contains_key(&span)
    }

    /// A claim of no span yet. Those who wait for its spans get `lost` if it is dropped.
    pub fn claim(&self, lost: T) -> Claim<T> {
        Claim {
            flights: self.flights.clone(),
            waiting: BTreeMap::new(),
            lost,
        }
    }

    /// Adds a span that is not under way to a claim.
    pub fn take(&mut self, claim: &mut Claim<T>, span: u32) {
        let (sender, receiver) = watch::channel(None);
        let before = self.table.insert(span, receiver);
        debug_assert!(before.is_none(), "span {span} has a flight");
        claim.waiting.insert(span, sender);
    }
}

/// The duty to land some spans.
pub struct Claim<T: Clone> {
    flights: Arc<Flights<T>>,
    waiting: BTreeMap<u32, watch::Sender<Option<T>>>,
    lost: T,
}

impl<T: Clone> fmt::Debug for Claim<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.waiting.keys()).finish()
    }
}

impl<T: Clone> Claim<T> {
    /// Spans that have not landed, in ascending order.
    pub fn spans(&self) -> impl Iterator<Item = u32> {
        self.waiting.keys().copied()
    }

    /// Whether all have landed.
    pub fn is_done(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Whether a span has still to land.
    pub fn holds(&self, span: u32) -> bool {
        self.waiting.contains_key(&span)
    }

    /// Answers those who wait for a span, which stays in the table.
    pub fn announce(&self, span: u32, what: T) {
        if let Some(sender) = self.waiting.get(&span) {
            sender.send_replace(Some(what));
        }
    }

    /// Ends the flight of a span.
    pub fn land(&mut self, span: u32, what: T) {
        if let Some(sender) = self.waiting.remove(&span) {
            // Out of the table first: who is answered and looks again must not find this flight.
            self.flights.table().remove(&span);
            sender.send_replace(Some(what));
        }
    }

    /// Ends all flights that are left.
    pub fn land_all(&mut self, what: &T) {
        while let Some(span) = self.waiting.keys().next().copied() {
            self.land(span, what.clone());
        }
    }
}

impl<T: Clone> Drop for Claim<T> {
    fn drop(&mut self) {
        let lost = self.lost.clone();
        self.land_all(&lost);
    }
}
