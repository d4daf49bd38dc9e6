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

/// What a waiting reader holds. It receives the result of the flight.
pub type Flight<T> = watch::Receiver<Option<T>>;

type FlightTable<T> = HashMap<u32, Flight<T>>;

/// Spans in flight. `T` is the result of a flight.
pub struct Flights<T> {
    table: Mutex<FlightTable<T>>,
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
    /// Locks the table, so that a caller looks and claims in one critical section.
    pub fn board(self: &Arc<Self>) -> Board<'_, T> {
        Board {
            flights: self,
            table: self.table(),
        }
    }

    fn table(&self) -> MutexGuard<'_, FlightTable<T>> {
        self.table.lock().expect("no panic while locked")
    }
}

/// The locked table.
pub struct Board<'a, T: Clone> {
    flights: &'a Arc<Flights<T>>,
    table: MutexGuard<'a, FlightTable<T>>,
}

impl<T: Clone> fmt::Debug for Board<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Board").finish_non_exhaustive()
    }
}

impl<T: Clone> Board<'_, T> {
    /// Returns the flight of a span, if the span is in flight.
    pub fn flight(&self, span: u32) -> Option<Flight<T>> {
        self.table.get(&span).cloned()
    }

    /// Returns whether a span is in flight.
    pub fn is_flying(&self, span: u32) -> bool {
        self.table.contains_key(&span)
    }

    /// Creates a claim that holds no span yet. If the claim is dropped, the readers that wait for its spans receive
    /// `lost`.
    pub fn claim(&self, lost: T) -> Claim<T> {
        Claim {
            flights: self.flights.clone(),
            waiting: BTreeMap::new(),
            lost,
        }
    }

    /// Adds a span to a claim. The span must not be in flight.
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
    /// Returns the spans that have not landed yet, in ascending order.
    pub fn spans(&self) -> impl Iterator<Item = u32> {
        self.waiting.keys().copied()
    }

    /// Returns whether all spans have landed.
    pub fn is_done(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Returns whether a span has yet to land.
    pub fn holds(&self, span: u32) -> bool {
        self.waiting.contains_key(&span)
    }

    /// Answers the readers that wait for a span. The span stays in the table.
    pub fn announce(&self, span: u32, what: T) {
        if let Some(sender) = self.waiting.get(&span) {
            sender.send_replace(Some(what));
        }
    }

    /// Ends the flight of a span and answers the readers that wait for it.
    pub fn land(&mut self, span: u32, what: T) {
        if let Some(sender) = self.waiting.remove(&span) {
            // Take the span out of the table first: a reader that looks again after its answer must not find this
            // flight.
            self.flights.table().remove(&span);
            sender.send_replace(Some(what));
        }
    }

    /// Ends all flights that are left, each with the result `what`.
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
