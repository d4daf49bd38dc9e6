//! The span index: where spans lie in the tar and in the blob, and how to decode them.

use std::fmt;
use std::io::{self, Write};
use std::ops::Range;

use super::decoder::SpanDecoder;
use super::format::{self, IndexHeader, SpanEntry};
use super::zstd::{Room, room_within};
use super::{Compression, IndexError, SpanId};
use crate::memory::TABLES;
use crate::oci::{DiffId, Digest};

/// Spans, restarts and digests of one layer.
pub struct SpanIndex {
    header: IndexHeader,
    entries: Vec<SpanEntry>,
    /// Range of the windows in `storage`.
    windows: Range<usize>,
    storage: Box<dyn AsRef<[u8]> + Send + Sync>,
}

impl fmt::Debug for SpanIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SpanIndex")
            .field("header", &self.header)
            .field("spans", &self.entries.len())
            .field("windows", &self.windows.len())
            .finish_non_exhaustive()
    }
}

impl SpanIndex {
    /// Makes the index of what a pass has collected. The index lives long, so the room that both lists have left is given
    /// back.
    pub(super) fn new(header: IndexHeader, mut entries: Vec<SpanEntry>, windows: Vec<u8>) -> Result<Self, IndexError> {
        format::validate(&header, &entries, windows.len() as u64)?;
        entries.shrink_to_fit();
        Ok(Self {
            header,
            entries,
            windows: 0..windows.len(),
            storage: Box::new(windows.into_boxed_slice()),
        })
    }

    /// Opens an index file, typically a memory map. The windows stay in the bytes.
    ///
    /// Verifies the checksum and validates everything, so a damaged file is an error here and not later.
    pub fn open(bytes: impl AsRef<[u8]> + Send + Sync + 'static) -> Result<Self, IndexError> {
        let (header, entries, windows) = format::parse(bytes.as_ref())?;
        format::validate(&header, &entries, windows.len() as u64)?;
        Ok(Self {
            header,
            entries,
            windows,
            storage: Box::new(bytes),
        })
    }

    /// Writes the index file.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        format::write(&self.header, &self.entries, self.windows(), out)
    }

    fn windows(&self) -> &[u8] {
        &(*self.storage).as_ref()[self.windows.clone()]
    }

    /// Returns the memory in bytes that grows with the number of spans.
    pub(crate) fn bytes_of_spans(&self) -> u64 {
        size_of_val(&*self.entries) as u64
    }

    /// Returns the compression of the layer.
    pub fn compression(&self) -> Compression {
        self.header.compression
    }

    /// Whether there are fewer restarts than there could be, because memory was short when the layer was indexed. Other
    /// hosts find other restarts then.
    pub fn is_short_of_memory(&self) -> bool {
        self.header.short_of_memory
    }

    /// Returns the digest of the blob.
    pub fn blob_digest(&self) -> &Digest {
        &self.header.identity.blob
    }

    /// Returns the digest of the uncompressed tar.
    pub fn diff_id(&self) -> &DiffId {
        &self.header.identity.diff_id
    }

    /// Returns the size of the blob in bytes.
    pub fn blob_size(&self) -> u64 {
        self.header.identity.blob_size
    }

    /// Returns the size of the tar in bytes.
    pub fn tar_size(&self) -> u64 {
        self.header.tar_size
    }

    /// Returns the number of spans, which is zero only if the tar has no bytes.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether the tar has no bytes.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Returns all spans in order.
    pub fn spans(&self) -> impl DoubleEndedIterator<Item = SpanId> + use<> {
        // `validate` has checked that the count fits.
        (0..self.entries.len() as u32).map(SpanId)
    }

    /// Returns the span that contains the byte at `tar_offset`; `None` at or beyond the end of the tar.
    pub fn span_at(&self, tar_offset: u64) -> Option<SpanId> {
        if tar_offset >= self.tar_size() {
            return None;
        }
        let after = self.entries.partition_point(|entry| entry.tar_offset <= tar_offset);
        Some(SpanId(after as u32 - 1))
    }

    /// Returns the range of tar bytes that `span` contains.
    ///
    /// # Panics
    /// If the index has no such span. The same holds for every method that takes a [`SpanId`] and does not return a
    /// `Result`.
    pub fn tar_range(&self, span: SpanId) -> Range<u64> {
        let end = self
            .entries
            .get(span.0 as usize + 1)
            .map_or(self.tar_size(), |next| next.tar_offset);
        self.entry(span).tar_offset..end
    }

    /// Returns the BLAKE3 hash of the bytes of `span`, to verify cached bytes.
    pub fn digest(&self, span: SpanId) -> &[u8; 32] {
        &self.entry(span).digest
    }

    /// Returns the last restart at or before `span`.
    pub fn restart_for(&self, span: SpanId) -> SpanId {
        let upto = &self.entries[..=span.0 as usize];
        // The first span is always a restart.
        SpanId(upto.iter().rposition(|entry| entry.restart).unwrap_or(0) as u32)
    }

    /// Returns the spans that share the restart of `span`: from that restart up to the next one. Decoding the last of
    /// them passes over all of them.
    pub fn group(&self, span: SpanId) -> Range<u32> {
        let behind = &self.entries[span.0 as usize + 1..];
        let more = behind.iter().position(|entry| entry.restart).unwrap_or(behind.len());
        self.restart_for(span).0..span.0 + 1 + more as u32
    }

    /// Returns the range of blob bytes needed to decode the spans `first..=last`, where `first` is a restart.
    pub fn blob_range(&self, first: SpanId, last: SpanId) -> Range<u64> {
        let end = match self.entries.get(last.0 as usize + 1) {
            Some(next) => next.position.next_byte().byte(),
            None => self.blob_size(),
        };
        self.entry(first).position.byte()..end
    }

    /// Makes a decoder of the spans `first..=last`. The caller feeds it the bytes of [`SpanIndex::blob_range`]. The
    /// decoder's zstd window may take 192 MiB.
    pub fn decoder(&self, first: SpanId, last: SpanId) -> Result<SpanDecoder, IndexError> {
        self.decoder_with_room(first, last, room_within(TABLES))
    }

    /// Makes a decoder like [`SpanIndex::decoder`] that asks `room` for the memory of its zstd window.
    pub fn decoder_with_room(&self, first: SpanId, last: SpanId, room: Room) -> Result<SpanDecoder, IndexError> {
        let (from, to) = (first.0 as usize, last.0 as usize);
        if from > to || to >= self.len() {
            return Err(IndexError::NoSuchSpans {
                first,
                last,
                len: self.len(),
            });
        }
        let entry = &self.entries[from];
        if !entry.restart {
            return Err(IndexError::NotARestart { span: first });
        }
        let spans = (first.0..=last.0)
            .map(SpanId)
            .map(|span| (self.tar_range(span), *self.digest(span)));
        SpanDecoder::new(
            self.compression(),
            first,
            entry.position,
            &mut self.chain(from),
            spans.collect(),
            room,
        )
    }

    fn entry(&self, span: SpanId) -> &SpanEntry {
        &self.entries[span.0 as usize]
    }

    /// Returns the windows of the restart at entry `from` and of the restarts before it, with their offsets in the tar.
    /// Ends at a restart that has none.
    fn chain(&self, from: usize) -> impl Iterator<Item = (u64, &[u8])> {
        let before = self.entries[..=from].iter().rev().filter(|entry| entry.restart);
        let chain = before.take_while(|entry| !entry.window.is_empty());
        chain.map(|entry| {
            let range = entry.window.start as usize..entry.window.end as usize;
            (entry.tar_offset, &self.windows()[range])
        })
    }
}
