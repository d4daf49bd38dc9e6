//! The spans of a layer that a pass has indexed.

use std::ops::Range;
use std::sync::Arc;

use super::{DecodeSpans, Piece, SpanMap};
use crate::index::{self, IndexError, Room, SpanId, SpanIndex};
use crate::oci::Digest;
use crate::toc::ExtentTable;

/// A span index, together with the bytes of its tar that are content.
#[derive(Debug)]
pub struct IndexedSpans {
    index: SpanIndex,
    extents: ExtentTable,
    heads: Arc<[u64]>,
    key: [u8; 32],
}

impl IndexedSpans {
    /// Combines a span index and an extent table. The extents must end within the tar of the index.
    pub fn new(index: SpanIndex, extents: ExtentTable) -> Self {
        let size = extents.device_size();
        let mut hasher = blake3::Hasher::new();
        let mut content = extents.iter().peekable();
        let heads = index.spans().map(|span| {
            let start = index.tar_range(span).start;
            hasher.update(&start.to_le_bytes());
            hasher.update(index.digest(span));
            while content.next_if(|extent| extent.tar + extent.len <= start).is_some() {}
            content
                .peek()
                .map_or(size, |extent| extent.device + start.saturating_sub(extent.tar))
        });
        let heads = heads.collect();
        let key = *hasher.finalize().as_bytes();
        drop(content);
        Self {
            index,
            extents,
            heads,
            key,
        }
    }

    /// Returns the span index.
    pub fn index(&self) -> &SpanIndex {
        &self.index
    }

    /// Returns the extents.
    pub fn extents(&self) -> &ExtentTable {
        &self.extents
    }

    /// Returns the bytes of memory that grow with the number of spans and files.
    pub fn memory(&self) -> u64 {
        self.index.bytes_of_spans() + self.extents.bytes().len() as u64 + size_of_val(&*self.heads) as u64
    }
}

impl SpanMap for IndexedSpans {
    fn layer(&self) -> &Digest {
        self.index.blob_digest()
    }

    fn device_size(&self) -> u64 {
        self.extents.device_size()
    }

    fn heads(&self) -> &Arc<[u64]> {
        &self.heads
    }

    fn key(&self) -> [u8; 32] {
        self.key
    }

    fn content(&self, device: Range<u64>) -> Option<Range<u64>> {
        self.extents.content_in_device(device)
    }

    fn run_around(&self, device: u64) -> Option<Range<u64>> {
        self.extents.run_around(device)
    }

    fn pieces(&self, span: u32) -> Vec<Piece> {
        let tar = self.index.tar_range(SpanId(span));
        let start = tar.start;
        let pieces = self.extents.pieces_in_tar(tar).map(|extent| Piece {
            span: extent.tar - start,
            device: extent.device,
            len: extent.len,
        });
        pieces.collect()
    }

    fn decoded_size(&self, span: u32) -> u64 {
        let tar = self.index.tar_range(SpanId(span));
        tar.end - tar.start
    }

    fn restart_for(&self, span: u32) -> u32 {
        self.index.restart_for(SpanId(span)).0
    }

    fn group(&self, span: u32) -> Range<u32> {
        self.index.group(SpanId(span))
    }

    fn blob_size(&self) -> u64 {
        self.index.blob_size()
    }

    fn blob_range(&self, spans: Range<u32>) -> Range<u64> {
        self.index.blob_range(SpanId(spans.start), SpanId(spans.end - 1))
    }

    fn decoder(&self, spans: Range<u32>, room: Room) -> Result<Box<dyn DecodeSpans>, IndexError> {
        let decoder = self
            .index
            .decoder_with_room(SpanId(spans.start), SpanId(spans.end - 1), room)?;
        Ok(Box::new(decoder))
    }

    fn of_tar(&self, tar: Range<u64>) -> Vec<Range<u64>> {
        let pieces = self.extents.pieces_in_tar(tar);
        pieces.map(|extent| extent.device..extent.device + extent.len).collect()
    }
}

impl DecodeSpans for index::SpanDecoder {
    fn push(&mut self, compressed: &[u8], sink: &mut dyn FnMut(u32, &[u8])) -> Result<(), IndexError> {
        index::SpanDecoder::push(self, compressed, &mut |span, bytes| sink(span.0, bytes))
    }

    fn is_done(&self) -> bool {
        index::SpanDecoder::is_done(self)
    }
}
