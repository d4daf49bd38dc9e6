//! The spans of a layer by device address: which there are, and how they are fetched, decoded and checked.
//!
//! The modules above layers speak of places in a layer's data device. A [`SpanMap`] says which spans have the bytes
//! of such a place. It also says which bytes of the blob hold a span, and decodes the span from them. A map can come
//! from anywhere. [`IndexedSpans`] has the span index and the extents that a pass over the layer made. It knows
//! offsets in the tar. [`ChunkSpans`] comes from the table that the layer itself carries, and knows no such offsets.
//!
//! ```text
//! device   |── file ──|pad|──── file ────|pad|     addresses of readers
//! spans    ──── 0 ────▶|◀──── 1 ────▶|◀─── 2 ──    each begins at its head
//! blob       ▓▓▓▓▓▓▓▓▓▓  ▓▓▓▓▓▓▓▓▓▓▓  ▓▓▓▓▓▓▓      compressed bytes, from a restart on
//! ```
//! Invariants:
//! - Spans are numbered from 0, in the order of the device and of the blob.
//! - Heads ascend. A span without content has the head of the next span.
//! - A span that a [`DecodeSpans`] delivers has matched the digest that the map has of it.

mod chunks;
mod indexed;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

pub use chunks::ChunkSpans;
pub use indexed::IndexedSpans;

use crate::index::{IndexError, Room};
use crate::oci::Digest;

/// Where one run of a span's content lies: the `len` bytes from `span` on in the span are those from `device` on in
/// the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Offset in the span's decoded bytes.
    pub span: u64,
    /// Offset in the data device.
    pub device: u64,
    /// Length in bytes.
    pub len: u64,
}

/// Decodes spans and checks each of them.
pub trait DecodeSpans: fmt::Debug + Send {
    /// Decodes the next bytes of the blob. Gives every span that they complete to `sink`, whole and verified, in
    /// order.
    ///
    /// Ignores bytes behind the last span. After an error, delivers no more spans.
    fn push(&mut self, compressed: &[u8], sink: &mut dyn FnMut(u32, &[u8])) -> Result<(), IndexError>;

    /// Returns whether all spans are delivered.
    fn is_done(&self) -> bool;
}

/// The spans of one layer.
///
/// # Panics
/// Methods that take numbers of spans panic if the layer has no such span.
pub trait SpanMap: fmt::Debug + Send + Sync {
    /// Returns the digest of the layer's blob.
    fn layer(&self) -> &Digest;

    /// Returns the bytes of the data device, a multiple of its block size.
    fn device_size(&self) -> u64;

    /// Returns each span's head: the device address of its first byte of content.
    fn heads(&self) -> &Arc<[u64]>;

    /// Returns a key that differs from the keys of all maps with other spans, other digests or other places.
    fn key(&self) -> [u8; 32];

    /// Returns the content in a range of the device: from the first byte of a file in it to the end of the last.
    /// Returns none if the range reads as zeros.
    fn content(&self, device: Range<u64>) -> Option<Range<u64>>;

    /// Returns the content around a device address, as far as it continues without a gap. Mostly that is the content
    /// of one file. Returns none in a gap.
    fn run_around(&self, device: u64) -> Option<Range<u64>>;

    /// Returns which of a span's decoded bytes are content, and where each piece goes, in ascending order.
    fn pieces(&self, span: u32) -> Vec<Piece>;

    /// Returns the decoded bytes of a span.
    fn decoded_size(&self, span: u32) -> u64;

    /// Returns the last span at or before `span` at which decoding can begin.
    fn restart_for(&self, span: u32) -> u32;

    /// Returns the spans that share the restart of `span`: from that restart up to the next one. Decoding the last of
    /// them passes over all of them.
    fn group(&self, span: u32) -> Range<u32>;

    /// Returns the bytes of the blob.
    fn blob_size(&self) -> u64;

    /// Returns the range of the blob that holds `spans` (not empty).
    fn blob_range(&self, spans: Range<u32>) -> Range<u64>;

    /// Returns a decoder of `spans` (not empty), the first of which is a restart. The decoder takes the bytes of
    /// [`SpanMap::blob_range`], and asks `room` for memory.
    fn decoder(&self, spans: Range<u32>, room: Room) -> Result<Box<dyn DecodeSpans>, IndexError>;

    /// Returns the device addresses of the content in a range of the layer's tar, in ascending order. Returns none if
    /// the map does not know offsets in the tar.
    fn of_tar(&self, tar: Range<u64>) -> Vec<Range<u64>>;

    /// Returns the content that the writer of the layer recommends to fetch first: the device up to this address.
    fn recommended(&self) -> u64 {
        0
    }

    /// Returns the number of spans.
    fn span_count(&self) -> u32 {
        // No map has more spans than fit into a `u32`.
        self.heads().len() as u32
    }

    /// Returns the span that has the content at a device address. In a gap, returns the span before the address.
    fn span_at(&self, device: u64) -> u32 {
        let behind = self.heads().partition_point(|&head| head <= device);
        behind.saturating_sub(1) as u32
    }

    /// Returns the spans that have the content in a range of the device. Some between the first and the last may have
    /// no content ([`SpanMap::has_content`]).
    fn spans(&self, device: Range<u64>) -> Range<u32> {
        match self.content(device) {
            Some(content) => self.span_at(content.start)..self.span_at(content.end - 1) + 1,
            None => 0..0,
        }
    }

    /// Returns the device addresses of a span: from its head up to the head of the next one.
    fn device_range(&self, span: u32) -> Range<u64> {
        let heads = self.heads();
        let next = heads.get(span as usize + 1).copied().unwrap_or(self.device_size());
        heads[span as usize]..next
    }

    /// Returns whether a span has any content.
    fn has_content(&self, span: u32) -> bool {
        !self.device_range(span).is_empty()
    }
}
