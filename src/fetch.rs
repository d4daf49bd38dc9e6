//! What is fetched when: everything about fetching that needs neither a blob nor a disk.
//!
//! Waiting for round trips is what makes a lazy start slow, so bytes that will be wanted have to be asked for before they
//! are, many at a time, and without ever being in the way of what is wanted now.
//!
//! ```text
//!  reads ──miss──▶ demand ────────────────────────────┐
//!    └─first touch of a span─▶ Readahead ──ranges──▶  │  Lanes ──passes──▶ ranged requests
//!  a recorded start ────────▶ plan::runs ──ranges──▶  │
//!  the rest of the image ───────────────────ranges──▶ ┘
//! ```
//! - [`Policy`] turns what was measured of the link into sizes: how much to ask for at once, across which gaps, how much may
//!   be under way.
//! - [`Lanes`] lets requests go in the order of their [`Priority`]: demand at once, the others as far as the link has room;
//!   and it gives a [`Hedge`] to what comes too slowly: the right to ask a second time.
//! - [`Readahead`] guesses from the spans that were read which will be read next, and guesses less when it guessed wrong.
//! - [`runs`] turns spans wanted in an order into as few requests as are worth it.
//! - [`Flights`] sees to it that no span is fetched twice at the same time.
//!
//! Invariants: a demand request waits for nothing but other demand requests; bytes under way for everything else are
//! bounded; a planned run has no span that is there already; all of it is synchronous and bounded in memory, except for the
//! wait for a pass, which may be dropped at any time.

mod flights;
mod lanes;
mod plan;
mod policy;
mod readahead;
mod sync;

pub use flights::{Board, Claim, Flight, Flights};
pub use lanes::{Hedge, Lanes, Load, Pass};
pub use plan::{Wanted, runs};
pub use policy::Policy;
pub use readahead::{Readahead, Touch};

use std::ops::Range;

use crate::span::SpanMap;

/// Why bytes are fetched; an earlier one goes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    /// A reader waits for them.
    Demand,
    /// A reader is coming their way.
    Readahead,
    /// An earlier run read them, or readers waited all around them.
    Likely,
    /// They are part of the image.
    Background,
}

/// Where the spans of a layer lie in its blob.
pub trait Spans {
    /// How many there are.
    fn count(&self) -> u32;

    /// Compressed bytes of a range of spans; 0 of an empty one.
    fn bytes(&self, spans: Range<u32>) -> u64;

    /// The end of the longest range of spans from `first` on that has at most `limit` compressed bytes; `first` if even the
    /// first one has more.
    fn reach(&self, first: u32, limit: u64) -> u32 {
        let (mut low, mut high) = (first, self.count());
        while low < high {
            let middle = low + (high - low).div_ceil(2);
            if self.bytes(first..middle) <= limit {
                low = middle;
            } else {
                high = middle - 1;
            }
        }
        low
    }
}

impl Spans for dyn SpanMap + '_ {
    fn count(&self) -> u32 {
        self.span_count()
    }

    fn bytes(&self, spans: Range<u32>) -> u64 {
        if spans.is_empty() {
            return 0;
        }
        let blob = self.blob_range(spans);
        blob.end - blob.start
    }
}

impl<S: Spans + ?Sized> Spans for &S {
    fn count(&self) -> u32 {
        (**self).count()
    }

    fn bytes(&self, spans: Range<u32>) -> u64 {
        (**self).bytes(spans)
    }
}
