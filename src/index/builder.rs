//! Builds a [`SpanIndex`] from the events of a first pass.

use std::fmt;
use std::io;

use super::format::{Identity, IndexHeader, SpanEntry};
use super::span_index::SpanIndex;
use super::{Compression, DecodeSink, IndexError, MAX_SPAN, SpanId, SpanStart};

/// Level of zstd for windows, the fastest of the regular ones. Level 3 makes an index one per cent smaller and takes
/// twice as long.
const WINDOW_LEVEL: i32 = 1;

/// Collects spans, hashes them and compresses their windows.
///
/// The builder hashes neither the blob nor the whole tar. The caller hashes both, and vouches for the [`Identity`]
/// that it gives to [`SpanIndexBuilder::finish`].
pub struct SpanIndexBuilder {
    compression: Compression,
    entries: Vec<SpanEntry>,
    windows: Vec<u8>,
    compressor: zstd::bulk::Compressor<'static>,
    hasher: blake3::Hasher,
    tar_size: u64,
    short_of_memory: bool,
    /// The first error. [`SpanIndexBuilder::finish`] reports it, because the methods of [`DecodeSink`] cannot fail.
    trouble: Option<IndexError>,
}

impl fmt::Debug for SpanIndexBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SpanIndexBuilder")
            .field("compression", &self.compression)
            .field("spans", &self.entries.len())
            .field("tar_size", &self.tar_size)
            .finish_non_exhaustive()
    }
}

impl SpanIndexBuilder {
    /// Makes a builder that has seen no events.
    pub fn new(compression: Compression) -> Result<Self, IndexError> {
        Ok(Self {
            compression,
            entries: Vec::new(),
            windows: Vec::new(),
            compressor: zstd::bulk::Compressor::new(WINDOW_LEVEL).map_err(|_| IndexError::OutOfMemory)?,
            hasher: blake3::Hasher::new(),
            tar_size: 0,
            short_of_memory: false,
            trouble: None,
        })
    }

    /// Returns the memory in bytes that grows with the number of spans.
    pub(crate) fn bytes_of_spans(&self) -> u64 {
        (self.entries.len() * size_of::<SpanEntry>()) as u64
    }

    /// Returns the index of the whole layer. Fails if the events were not those of one [`super::LayerDecoder`].
    pub fn finish(mut self, identity: Identity) -> Result<SpanIndex, IndexError> {
        self.close_span();
        if let Some(trouble) = self.trouble {
            return Err(trouble);
        }
        let header = IndexHeader {
            compression: self.compression,
            tar_size: self.tar_size,
            identity,
            short_of_memory: self.short_of_memory,
        };
        SpanIndex::new(header, self.entries, self.windows)
    }

    fn close_span(&mut self) {
        if let Some(last) = self.entries.last_mut() {
            last.digest = *self.hasher.finalize().as_bytes();
            self.hasher.reset();
        }
    }

    fn out_of_order(&mut self) {
        let offset = self.tar_size;
        self.trouble.get_or_insert(IndexError::OutOfOrder { offset });
    }

    fn compress(&mut self, window: &[u8]) -> io::Result<()> {
        self.windows.extend_from_slice(&self.compressor.compress(window)?);
        Ok(())
    }
}

impl DecodeSink for SpanIndexBuilder {
    fn span(&mut self, start: SpanStart) {
        self.close_span();
        let previous = self.entries.last().map_or(0, |entry| entry.tar_offset);
        if start.tar_offset != self.tar_size
            || usize::try_from(start.span.0) != Ok(self.entries.len())
            || self.tar_size - previous > MAX_SPAN
        {
            self.out_of_order();
        }
        self.entries.push(SpanEntry::new(start));
    }

    fn bytes(&mut self, bytes: &[u8]) {
        if self.entries.is_empty() {
            self.out_of_order();
        }
        self.hasher.update(bytes);
        self.tar_size += bytes.len() as u64;
    }

    fn window(&mut self, span: SpanId, window: Vec<u8>) {
        let from = self.windows.len();
        let becomes_restart = self.compression == Compression::Zstd;
        if becomes_restart {
            // The decoder has compressed it, because it has to know the size.
            self.windows.extend_from_slice(&window);
        } else if self.compress(&window).is_err() {
            self.trouble.get_or_insert(IndexError::OutOfMemory);
        }
        let length = self.windows.len() - from;
        match self.entries.get_mut(span.0 as usize) {
            Some(entry) if (entry.restart != becomes_restart) && entry.window.is_empty() => {
                entry.window = from as u64..(from + length) as u64;
                entry.restart = true;
            }
            _ => self.out_of_order(),
        }
    }
    fn short_of_memory(&mut self) {
        self.short_of_memory = true;
    }
}
