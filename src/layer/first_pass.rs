//! The first pass: streams a whole layer once, verifies it, and makes everything that later reads need.
//!
//! ```text
//! source ──bytes──▶ decode thread ──batches──▶ table thread
//!   (async)          SHA-256 of the blob         SHA-256 of the tar (diffID)
//!                    inflate, restarts           span digests, TOC, extents
//!                                                data device
//! ```
//! Decoding is the slowest stage, and all other work together takes about the same time. So two threads keep two
//! cores busy, and more stages would only pass bytes around. Both channels are short, so the memory in flight is
//! bounded.
//!
//! Invariants:
//! - No result of the pass is used before both digests match.
//! - Then the device's presence map is written, and then the store's files are published, the span index last.
//! - If the device or the store cannot be written, the pass continues in memory.

mod error;

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use bytes::{Bytes, BytesMut};
use futures::StreamExt as _;
use tokio::sync::mpsc;

pub use self::error::FirstPassError;
use super::arrival::Arrival;
use super::data::LayerContext;
use super::race::Origin;
use crate::blob::{BlobError, ByteStream};
use crate::device::{CacheBudget, DataDevice, DeviceError, DeviceWriter};
use crate::index::{
    Compression, DecodeSink, Identity, LayerDecoder, Room, SPACING, SpanId, SpanIndexBuilder, SpanStart, sniff,
};
use crate::memory::Charge;
use crate::oci::{DiffId, Digest, DigestHasher};
use crate::span::IndexedSpans;
use crate::store::{LayerDir, Partial, Store};
use crate::task::{TaskError, joined};
use crate::toc::{Limits, PackedToc, TarReader};

/// Number of pieces between source and decoder. `PIECE` is the most bytes that one holds: local files come in larger
/// ones.
const QUEUE: usize = 32;
const PIECE: usize = 32 << 10;
/// Bytes that [`sniff`] needs to tell every format: one tar header.
const SNIFF: usize = 512;
/// Decoded bytes per batch. `BATCH_QUEUE` is the number of batches between the two threads.
const BATCH: usize = 512 << 10;
const BATCH_QUEUE: usize = 3;

/// The result of a first pass.
#[derive(Debug)]
pub(super) struct Indexed {
    pub(super) spans: IndexedSpans,
    pub(super) toc: PackedToc,
    /// Memory charges of the spans and of the tables.
    pub(super) charges: [Charge; 2],
    pub(super) device: Option<DataDevice>,
    /// Why there is no device, if there is a store but the device failed.
    pub(super) device_error: Option<DeviceError>,
}

/// Where the data device and the kept bytes of the blob go.
#[derive(Debug)]
pub(super) struct Destination {
    pub(super) store: Store,
    pub(super) dir: LayerDir,
    /// Disk space limit. If the layer's content does not fit, the layer is only indexed.
    pub(super) budget: Arc<CacheBudget>,
    /// The bytes of the blob that were kept, to which further bytes are added.
    pub(super) partial: Option<Partial>,
}

/// Streams the whole blob once, partly with requests ahead. The caller holds the layer's lock, with two exceptions:
/// there is no store, or the caller gave up waiting for another process that has the lock.
pub(super) async fn run(
    origin: Origin,
    diff_id: DiffId,
    context: &LayerContext,
    destination: Option<Destination>,
) -> Result<Indexed, FirstPassError> {
    let layer = origin.blob.digest().clone();
    let (blob_size, stats) = (origin.blob.size(), origin.stats.clone());
    let kept = destination
        .as_ref()
        .and_then(|d| Some((d.partial.clone()?, d.budget.clone())));
    let mut source = Source {
        stream: Arrival::new(origin, context.ahead.clone(), kept).into_stream(),
    };
    let prefix = source.prefix().await?;
    let compression = sniff(&prefix).map_err(|source| FirstPassError::Decode {
        layer: layer.clone(),
        source,
    })?;
    let (chunks, decoder_input) = mpsc::channel(QUEUE);
    let (batches, table_input) = sync_channel(BATCH_QUEUE);
    let decode = {
        let layer = layer.clone();
        // A wait for another layer's decoder does not count as work of this layer. So if the other layer stalls, this
        // one stalls too.
        let room = context.windows.room(Some(stats));
        tokio::task::spawn_blocking(move || decode(&layer, compression, room, decoder_input, batches))
    };
    let table = {
        let layer = layer.clone();
        let diff_id = diff_id.clone();
        let charges = [context.tables.charge(), context.tables.charge()];
        tokio::task::spawn_blocking(move || tabulate(&layer, &diff_id, compression, table_input, destination, charges))
    };
    let fetched = source.feed(prefix, chunks).await;
    let interrupted = |source| FirstPassError::Task {
        layer: layer.clone(),
        source,
    };
    let decoded = joined(decode).await.map_err(interrupted)?;
    let table = joined(table).await.map_err(interrupted)?;
    // A network error starves the decoder, and a decoder error starves the table. The pass returns the cause, not its
    // effects.
    fetched?;
    let (decoded, mut table) = match (decoded, table) {
        (Ok(decoded), Ok(table)) => (decoded, table),
        (Ok(_) | Err(FirstPassError::Task { .. }), Err(cause)) | (Err(cause), _) => return Err(cause),
    };
    if decoded != layer {
        return Err(FirstPassError::BlobDigest {
            expected: layer,
            actual: decoded,
        });
    }
    let tar_digest = table.hasher.take().map_or(decoded, DigestHasher::finish);
    if tar_digest != diff_id.0 {
        return Err(FirstPassError::DiffId {
            layer,
            expected: diff_id,
            actual: tar_digest,
        });
    }
    let identity = Identity {
        blob: layer.clone(),
        blob_size,
        diff_id,
    };
    let finishing = tokio::task::spawn_blocking(move || table.finish(identity));
    joined(finishing).await.map_err(interrupted)?
}

/// The blob as it arrives.
struct Source {
    stream: ByteStream,
}

impl Source {
    async fn next(&mut self) -> Result<Option<Bytes>, BlobError> {
        self.stream.next().await.transpose()
    }

    /// Returns the first bytes, enough to tell the compression. The stream may deliver them in small pieces.
    async fn prefix(&mut self) -> Result<Bytes, BlobError> {
        let mut prefix = BytesMut::new();
        while prefix.len() < SNIFF
            && let Some(bytes) = self.next().await?
        {
            prefix.extend_from_slice(&bytes);
        }
        Ok(prefix.freeze())
    }

    /// Sends the prefix and all further bytes to the decoder.
    async fn feed(mut self, prefix: Bytes, chunks: mpsc::Sender<Bytes>) -> Result<(), BlobError> {
        let mut next = Some(prefix);
        while let Some(mut bytes) = next {
            while !bytes.is_empty() {
                let piece = bytes.split_to(bytes.len().min(PIECE));
                if chunks.send(piece).await.is_err() {
                    // The decoder gave up and returns the reason.
                    return Ok(());
                }
            }
            next = self.next().await?;
        }
        Ok(())
    }
}

/// Decoded bytes, with the events that happened between them.
#[derive(Debug, Default)]
struct Batch {
    bytes: Vec<u8>,
    /// The events, each with its position: it happened before the byte of `bytes` at that position.
    events: Vec<(usize, DecodeEvent)>,
}

#[derive(Debug)]
enum DecodeEvent {
    Span(SpanStart),
    Window(SpanId, Vec<u8>),
    ShortOfMemory,
}

/// Collects the decoder's bytes and events, and passes them on in batches.
struct Batcher {
    batch: Batch,
    batches: SyncSender<Batch>,
    /// Whether the table thread gave up. That thread returns the reason.
    closed: bool,
}

impl Batcher {
    fn flush(&mut self) {
        let next = Batch {
            bytes: Vec::with_capacity(BATCH + BATCH / 4),
            events: Vec::new(),
        };
        let full = std::mem::replace(&mut self.batch, next);
        self.closed |= self.batches.send(full).is_err();
    }
}

impl DecodeSink for Batcher {
    fn span(&mut self, start: SpanStart) {
        self.batch
            .events
            .push((self.batch.bytes.len(), DecodeEvent::Span(start)));
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.batch.bytes.extend_from_slice(bytes);
        if self.batch.bytes.len() >= BATCH {
            self.flush();
        }
    }

    fn window(&mut self, span: SpanId, window: Vec<u8>) {
        self.batch
            .events
            .push((self.batch.bytes.len(), DecodeEvent::Window(span, window)));
    }

    fn short_of_memory(&mut self) {
        self.batch
            .events
            .push((self.batch.bytes.len(), DecodeEvent::ShortOfMemory));
    }
}

/// The decode thread: turns compressed bytes into batches. Returns the digest of the blob.
fn decode(
    layer: &Digest,
    compression: Compression,
    room: Room,
    mut input: mpsc::Receiver<Bytes>,
    batches: SyncSender<Batch>,
) -> Result<Digest, FirstPassError> {
    let broken = |source| FirstPassError::Decode {
        layer: layer.clone(),
        source,
    };
    let mut hasher = layer.hasher();
    let mut recorder = Batcher {
        batch: Batch::default(),
        batches,
        closed: false,
    };
    let mut decoder = LayerDecoder::with_room(compression, SPACING, room).map_err(broken)?;
    while let Some(bytes) = input.blocking_recv() {
        hasher.update(&bytes);
        decoder.push(&bytes, &mut recorder).map_err(broken)?;
        if recorder.closed {
            return Err(FirstPassError::Task {
                layer: layer.clone(),
                source: TaskError::Ended,
            });
        }
    }
    let end = decoder.finish(&mut recorder).map_err(broken)?;
    recorder.flush();
    if let Some(offset) = end.trailing_garbage {
        tracing::warn!(%layer, offset, "ignoring bytes behind the compressed data");
    }
    Ok(hasher.finish())
}

/// The tables that the table thread fills.
struct LayerTables {
    /// Hasher of the tar. `None` if the blob is the tar itself, because the decode thread hashes it.
    hasher: Option<DigestHasher>,
    spans: SpanIndexBuilder,
    spans_charge: Charge,
    tar: TarReader,
    device: Option<Filling>,
    device_error: Option<DeviceError>,
}

/// A data device that is being written.
struct Filling {
    budget: Arc<CacheBudget>,
    partial: Option<Partial>,
    writer: DeviceWriter,
}

/// The table thread: fills the tables and the data device from batches.
fn tabulate(
    layer: &Digest,
    diff_id: &DiffId,
    compression: Compression,
    batches: Receiver<Batch>,
    destination: Option<Destination>,
    [spans_charge, tar_charge]: [Charge; 2],
) -> Result<LayerTables, FirstPassError> {
    let (device, device_error) = match destination {
        None => (None, None),
        Some(destination) => match DataDevice::create(&destination.store, &destination.dir) {
            Err(error) => (None, Some(error)),
            Ok(writer) => {
                let filling = Filling {
                    budget: destination.budget,
                    partial: destination.partial,
                    writer,
                };
                (Some(filling), None)
            }
        },
    };
    let mut table = LayerTables {
        hasher: (compression != Compression::Tar || diff_id.0.algorithm() != layer.algorithm())
            .then(|| diff_id.0.hasher()),
        spans: SpanIndexBuilder::new(compression).map_err(|source| FirstPassError::Decode {
            layer: layer.clone(),
            source,
        })?,
        spans_charge,
        tar: TarReader::charged(Limits::default(), tar_charge),
        device,
        device_error,
    };
    for batch in batches {
        if let Some(hasher) = &mut table.hasher {
            hasher.update(&batch.bytes);
        }
        let mut done = 0;
        for (position, event) in batch.events {
            table.content(layer, &batch.bytes[done..position])?;
            done = position;
            match event {
                DecodeEvent::Span(start) => table.span(layer, start)?,
                DecodeEvent::Window(span, window) => table.spans.window(span, window),
                DecodeEvent::ShortOfMemory => table.spans.short_of_memory(),
            }
        }
        table.content(layer, &batch.bytes[done..])?;
    }
    Ok(table)
}

impl LayerTables {
    fn span(&mut self, layer: &Digest, start: SpanStart) -> Result<(), FirstPassError> {
        self.spans.span(start);
        let covered = self.spans_charge.cover(self.spans.bytes_of_spans());
        covered.map_err(|source| FirstPassError::TooMuchMemory {
            layer: layer.clone(),
            size: start.tar_offset,
            source,
        })?;
        if let Some(filling) = &mut self.device {
            filling.writer.span(start.span.0);
        }
        Ok(())
    }

    fn content(&mut self, layer: &Digest, bytes: &[u8]) -> Result<(), FirstPassError> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.spans.bytes(bytes);
        let mut failed = None;
        let pushed = self.tar.push(bytes, &mut |offset, content| {
            let Some(filling) = &mut self.device else { return };
            match filling.insist(|writer, budget| writer.write(offset, content, budget)) {
                Ok(true) => {}
                Ok(false) => self.device = None,
                Err(error) => {
                    failed = Some(error);
                    self.device = None;
                }
            }
        });
        if let Some(error) = failed {
            self.device_error = Some(error);
        }
        pushed.map_err(|source| FirstPassError::Tar {
            layer: layer.clone(),
            source,
            verified: false,
        })
    }

    /// Finishes the index and the data device. The caller has checked that both digests match.
    fn finish(self, identity: Identity) -> Result<Indexed, FirstPassError> {
        let layer = identity.blob.clone();
        let tables = self.tar.finish().map_err(|source| FirstPassError::Tar {
            layer: layer.clone(),
            source,
            verified: true,
        })?;
        for warning in &tables.warnings {
            tracing::warn!(%layer, warning, "odd tar");
        }
        let index = self.spans.finish(identity);
        let index = index.map_err(|source| FirstPassError::Decode { layer, source })?;
        let spans = IndexedSpans::new(index, tables.extents);
        let (device, device_error) = match self.device {
            None => (None, self.device_error),
            Some(filling) => match filling.finish(&spans) {
                Ok(device) => (device, None),
                Err(error) => (None, Some(error)),
            },
        };
        Ok(Indexed {
            spans,
            toc: tables.toc,
            charges: [self.spans_charge, tables.charge],
            device,
            device_error,
        })
    }
}

impl Filling {
    /// Writes to the device. If there is no room, discards the kept bytes of the blob and tries again, because
    /// readers need the content.
    fn insist(
        &mut self,
        write: impl Fn(&mut DeviceWriter, &CacheBudget) -> Result<bool, DeviceError>,
    ) -> Result<bool, DeviceError> {
        match write(&mut self.writer, &self.budget) {
            Ok(false) if self.discard_partial() => write(&mut self.writer, &self.budget),
            Err(error) if error.is_full() && self.discard_partial() => write(&mut self.writer, &self.budget),
            result => result,
        }
    }

    /// Discards the kept bytes of the blob. Returns whether there were any.
    fn discard_partial(&mut self) -> bool {
        self.partial.take().is_some_and(|partial| partial.discard())
    }

    fn finish(mut self, spans: &IndexedSpans) -> Result<Option<DataDevice>, DeviceError> {
        if !self.insist(DeviceWriter::flush)? {
            return Ok(None);
        }
        self.writer.finish(spans, &self.budget)
    }
}
