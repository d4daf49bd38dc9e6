//! The spans of a layer by device address: which there are, where they come from, how they are decoded and checked.
//!
//! Whatever is above layers speaks of places in a layer's data device. A [`SpanMap`] says which spans have the bytes of such a
//! place, which bytes of the blob hold a span, and how to get one from the other. Where the map comes from is its own matter:
//! [`IndexedSpans`] has the span index and the extents that a pass over the layer made here, and knows offsets in the tar; a
//! table of contents from elsewhere has none.
//!
//! ```text
//! device   |── file ──|pad|──── file ────|pad|     addresses of readers
//! spans    ──── 0 ────▶|◀──── 1 ────▶|◀─── 2 ──    each begins at its head
//! blob       ▓▓▓▓▓▓▓▓▓▓  ▓▓▓▓▓▓▓▓▓▓▓  ▓▓▓▓▓▓▓      compressed bytes, from a restart on
//! ```
//! Invariants: spans are numbered from 0 in the order of the device and of the blob. Heads ascend; a span without content has
//! the head of the one behind it. What a [`SpanDecoder`] delivers has matched the digest that the map has of the span.

mod indexed;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

pub use indexed::IndexedSpans;

use crate::index::{IndexError, Room};
use crate::oci::Digest;

/// Where one run of a span's content lies: bytes `span..` of the span are bytes `device..` of the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Offset in the span's decoded bytes.
    pub span: u64,
    /// Offset in the data device.
    pub device: u64,
    /// Bytes.
    pub len: u64,
}

/// Decodes spans, and checks each.
pub trait SpanDecoder: fmt::Debug + Send {
    /// Decodes the next bytes of the blob and gives every span that they complete to `sink`, whole and verified, in order.
    ///
    /// Bytes behind the last span are ignored. After an error nothing more is delivered.
    fn push(&mut self, compressed: &[u8], sink: &mut dyn FnMut(u32, &[u8])) -> Result<(), IndexError>;

    /// Whether all spans are delivered.
    fn is_done(&self) -> bool;
}

/// The spans of one layer.
///
/// # Panics
/// Methods that take numbers of spans panic if the layer has no such span.
pub trait SpanMap: fmt::Debug + Send + Sync {
    /// Digest of the layer's blob.
    fn layer(&self) -> &Digest;

    /// Bytes of the data device, a multiple of its block size.
    fn device_size(&self) -> u64;

    /// For each span the device address of its first byte of content; see the module.
    fn heads(&self) -> &Arc<[u64]>;

    /// Tells this map from all that have other spans, other digests or other places.
    fn key(&self) -> [u8; 32];

    /// The content in a range of the device: from the first byte of a file in it to the end of the last; none if the range
    /// reads as zeros.
    fn content(&self, device: Range<u64>) -> Option<Range<u64>>;

    /// The content around a device address, as far as it goes on without a gap: mostly that of one file. None in a gap.
    fn run_around(&self, device: u64) -> Option<Range<u64>>;

    /// Which of a span's decoded bytes are content, and where it goes. Ascending.
    fn pieces(&self, span: u32) -> Vec<Piece>;

    /// Decoded bytes of a span.
    fn decoded_size(&self, span: u32) -> u64;

    /// The last span at or before `span` at which decoding can begin.
    fn restart_for(&self, span: u32) -> u32;

    /// The spans that share the restart of `span`: from it up to the next one. Decoding the last passes over all of them.
    fn group(&self, span: u32) -> Range<u32>;

    /// Bytes of the blob.
    fn blob_size(&self) -> u64;

    /// The bytes of the blob that hold `spans` (not empty).
    fn blob_range(&self, spans: Range<u32>) -> Range<u64>;

    /// A decoder of `spans` (not empty), the first of which is a restart. It wants the bytes of [`SpanMap::blob_range`], and
    /// asks `room` for memory.
    fn decoder(&self, spans: Range<u32>, room: Room) -> Result<Box<dyn SpanDecoder>, IndexError>;

    /// The device addresses of the content in a range of the layer's tar, ascending; nothing if offsets in the tar are not
    /// known.
    fn of_tar(&self, tar: Range<u64>) -> Vec<Range<u64>>;

    /// Number of spans.
    fn span_count(&self) -> u32 {
        // No map has more.
        self.heads().len() as u32
    }

    /// The span that has the content at a device address, or before it if there is a gap.
    fn span_at(&self, device: u64) -> u32 {
        let behind = self.heads().partition_point(|&head| head <= device);
        behind.saturating_sub(1) as u32
    }

    /// The spans that have the content in a range of the device. Between the first and the last one there may be some without
    /// any ([`SpanMap::has_content`]).
    fn spans(&self, device: Range<u64>) -> Range<u32> {
        match self.content(device) {
            Some(content) => self.span_at(content.start)..self.span_at(content.end - 1) + 1,
            None => 0..0,
        }
    }

    /// Whether a span has any content.
    fn has_content(&self, span: u32) -> bool {
        let heads = self.heads();
        let next = heads.get(span as usize + 1).copied().unwrap_or(self.device_size());
        heads[span as usize] < next
    }
}
