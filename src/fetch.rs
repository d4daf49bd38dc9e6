//! What is fetched when: the decisions about fetching that need neither a blob nor a disk.
//!
//! Round trips make a lazy start slow. The crate therefore requests bytes before a reader needs them, and sends many
//! requests at a time. These early requests must not delay the bytes that a reader waits for.
//!
//! ```text
//!  reads ──miss──▶ demand ────────────────────────────┐
//!    └─first touch of a span─▶ Readahead ──ranges──▶  │  Lanes ──passes──▶ ranged requests
//!  a recorded start ────────▶ plan::runs ──ranges──▶  │
//!  the rest of the image ───────────────────ranges──▶ ┘
//! ```
//! - [`Policy`] turns the measurements of a link into sizes: the size of a request, the gaps to fetch across, and the
//!   bytes that may be in flight.
//! - [`Lanes`] admits requests in the order of their [`Priority`]. Demand goes at once; the others go as far as the
//!   link has room. For bytes that come too slowly, a lane gives a [`Hedge`]: the right to send a second request.
//! - [`Readahead`] predicts from the spans that were read which spans will be read next. It predicts less after wrong
//!   predictions.
//! - [`runs`] turns an ordered list of wanted spans into few requests.
//! - [`Flights`] makes sure that no span is fetched twice at the same time.
//!
//! Invariants:
//! - A demand request waits only for other demand requests.
//! - The bytes in flight for all other priorities are bounded.
//! - A planned run contains no span that is already there.
//! - Everything is synchronous and bounded in memory, except the waits in [`Lanes`]. A caller may drop these waits at
//!   any time.

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
pub use readahead::{Readahead, SpanTouch};

use std::ops::Range;

use crate::span::SpanMap;

/// Why bytes are fetched. An earlier variant goes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    /// A reader waits for the bytes.
    Demand,
    /// A reader is about to need the bytes.
    Readahead,
    /// An earlier run read the bytes, or readers waited for bytes all around them.
    Likely,
    /// The bytes are part of the image. No reader is known to need them.
    Background,
}

/// Where the spans of a layer lie in its blob.
pub trait Spans {
    /// Returns the number of spans.
    fn count(&self) -> u32;

    /// Returns the compressed bytes of a range of spans; 0 for an empty range.
    fn bytes(&self, spans: Range<u32>) -> u64;

    /// Returns the end of the longest range of spans from `first` on that has at most `limit` compressed bytes.
    /// Returns `first` if the first span alone has more.
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
