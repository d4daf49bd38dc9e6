//! One layer, readable at any address of its data device.
//!
//! A read looks in three places, nearest first: the data device on disk, the spans in memory, the blob's source. A miss
//! becomes one *flight* per span: the first reader starts it, all others of this process wait for the same one, and other
//! processes wait for the span's lock. A flight fetches the compressed bytes from the nearest restart on, decodes, and
//! delivers each span after its digest matched.
//!
//! Invariants: bytes that did not match their span's digest are never returned; at most one flight per span in a process;
//! looking up and starting a flight is one critical section; no lock is held across an await; a flight outlives its readers,
//! so an impatient reader wastes nothing.
//!
//! A group of spans shares one restart (a single-frame zstd layer is one group): decoding it passes over all of them, so a
//! flight always takes the whole group and hands out each span as it passes.

mod first_pass;
mod flight;
mod memory;
mod open;
mod stats;
mod turn;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use tokio::sync::{Semaphore, watch};

pub use first_pass::FirstPassError;
pub use memory::SpanMemory;
pub use open::{Health, LayerContext, OpenError, Opened, open, stored_toc};
pub use stats::{IndexSource, LayerStats, LayerStatus, progress};

use crate::blob::{BlobError, BlobSource};
use crate::device::{CacheBudget, DataDevice, Piece};
use crate::index::{IndexError, SpanId, SpanIndex};
use crate::oci::Digest;
use crate::store::FileBytes;
use crate::toc::{Extent, ExtentTable};

/// Why bytes of a layer cannot be had. Shared by all readers of a flight.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum LayerError {
    /// The blob's source gave up.
    #[error("layer {layer}: {source}")]
    Blob {
        /// Digest of the layer.
        layer: Digest,
        /// Its error.
        source: BlobError,
    },
    /// The bytes do not decode, or decode to something else than was indexed, every time they are fetched.
    #[error("layer {layer}, span {span}: {source}")]
    Corrupt {
        /// Digest of the layer.
        layer: Digest,
        /// The span that failed.
        span: u32,
        /// What is wrong.
        source: Arc<IndexError>,
    },
    /// The process is shutting down.
    #[error("layer {layer}: unmounting")]
    Closed {
        /// Digest of the layer.
        layer: Digest,
    },
}

/// What a flight brings for one span.
#[derive(Debug, Clone)]
enum Landed {
    /// The span's uncompressed bytes, verified.
    Bytes(Arc<[u8]>),
    /// Another process put it on the device meanwhile.
    OnDevice,
}

type Flight = watch::Receiver<Option<Result<Landed, LayerError>>>;

/// A layer with its index, opened for reading.
#[derive(Debug)]
pub struct Layer {
    blob: Arc<dyn BlobSource>,
    index: SpanIndex,
    extents: ExtentTable<FileBytes>,
    device: Option<DataDevice>,
    /// Reading the device failed: from then on it is left alone.
    device_broken: AtomicBool,
    memory: Arc<SpanMemory>,
    budget: Arc<CacheBudget>,
    health: Arc<Health>,
    decodes: Arc<Semaphore>,
    flights: Mutex<HashMap<u32, Flight>>,
    stats: Arc<LayerStats>,
}

impl Layer {
    /// Digest of the layer's blob.
    pub fn digest(&self) -> &Digest {
        self.blob.digest()
    }

    /// Size of the data device in bytes.
    pub fn device_size(&self) -> u64 {
        self.extents.device_size()
    }

    /// The span index.
    pub fn index(&self) -> &SpanIndex {
        &self.index
    }

    /// What the layer did so far.
    pub fn stats(&self) -> &Arc<LayerStats> {
        &self.stats
    }

    /// Spans that need no fetch.
    pub fn local_spans(&self) -> u32 {
        self.device().map_or(0, DataDevice::present_spans)
    }

    /// The device, if it can be used.
    fn device(&self) -> Option<&DataDevice> {
        let broken = self.device_broken.load(Ordering::Relaxed);
        self.device.as_ref().filter(|_| !broken)
    }

    /// Reads from the device; false if not all `spans` are there.
    fn read_device(&self, spans: Range<u32>, offset: u64, buf: &mut [u8]) -> bool {
        let Some(device) = self.device() else { return false };
        device.read(spans, offset, buf).unwrap_or_else(|error| {
            self.device_broken.store(true, Ordering::Relaxed);
            self.health
                .store_failed(&format!("data device of layer {}: {error}", self.digest()));
            false
        })
    }

    /// Fills `buf` from device offset `offset` if that needs no waiting; false if it does (then `buf` is garbage).
    /// Bytes between extents read as zeros.
    pub fn read_local(&self, offset: u64, buf: &mut [u8]) -> bool {
        let mut first = u32::MAX;
        let mut end = 0;
        for extent in self.extents.pieces_in_device(offset..offset + buf.len() as u64) {
            let spans = self.spans_of(&extent);
            first = first.min(spans.start);
            end = end.max(spans.end);
        }
        if end == 0 {
            buf.fill(0);
            return true;
        }
        let present = self.read_device(first..end, offset, buf);
        if present {
            self.stats.hit(buf.len());
        }
        present
    }

    /// Fills `buf` from device offset `offset`, fetching what is missing. Cancel safe: a dropped read leaves its flights
    /// running.
    pub async fn read(self: &Arc<Self>, offset: u64, buf: &mut [u8]) -> Result<(), LayerError> {
        buf.fill(0);
        let extents: Vec<Extent> = self
            .extents
            .pieces_in_device(offset..offset + buf.len() as u64)
            .collect();
        // Every flight of this read starts before the first is waited for.
        for extent in &extents {
            self.want(self.spans_of(extent));
        }
        for extent in &extents {
            for span in self.spans_of(extent) {
                self.copy_span(span, extent, offset, buf).await?;
            }
        }
        self.stats.miss(buf.len());
        Ok(())
    }

    /// Makes sure that `spans` are on the device (or were delivered, if there is none).
    pub async fn complete(self: &Arc<Self>, spans: Range<u32>) -> Result<(), LayerError> {
        self.want(spans.clone());
        for span in spans {
            let Some(mut flight) = self.want(span..span + 1) else {
                continue;
            };
            // The bytes come first; the flight ends when they are on the device.
            while flight.changed().await.is_ok() {}
            if let Some(Err(error)) = &*flight.borrow() {
                return Err(error.clone());
            }
        }
        Ok(())
    }

    /// Runs of spans that are not local, each of at most `batch` uncompressed bytes (or one span).
    pub fn missing(&self, batch: u64) -> Vec<Range<u32>> {
        self.settle(0..self.index.len() as u32);
        let mut runs: Vec<Range<u32>> = Vec::new();
        let mut bytes = 0;
        for span in self.index.spans().map(|s| s.0).filter(|&s| !self.is_local(s)) {
            let tar = self.index.tar_range(SpanId(span));
            match runs.last_mut() {
                Some(run) if run.end == span && bytes < batch => run.end += 1,
                _ => {
                    runs.push(span..span + 1);
                    bytes = 0;
                }
            }
            bytes += tar.end - tar.start;
        }
        runs
    }

    fn spans_of(&self, extent: &Extent) -> Range<u32> {
        let span = |offset| self.index.span_at(offset).expect("extents lie within the tar").0;
        span(extent.tar)..span(extent.tar + extent.len - 1) + 1
    }

    /// Copies the part of `span` that belongs to `extent` to its place in `buf`, which begins at device offset `offset`.
    async fn copy_span(
        self: &Arc<Self>,
        span: u32,
        extent: &Extent,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<(), LayerError> {
        let tar = self.index.tar_range(SpanId(span));
        let from = extent.tar.max(tar.start);
        let to = (extent.tar + extent.len).min(tar.end);
        let device = extent.device + (from - extent.tar);
        let target = &mut buf[(device - offset) as usize..][..(to - from) as usize];
        loop {
            // Usually from the page cache; when it is not, the runtime goes on with other things.
            if tokio::task::block_in_place(|| self.read_device(span..span + 1, device, target)) {
                return Ok(());
            }
            match self.wait(span).await? {
                Landed::Bytes(bytes) => {
                    target.copy_from_slice(&bytes[(from - tar.start) as usize..(to - tar.start) as usize]);
                    return Ok(());
                }
                Landed::OnDevice => {}
            }
        }
    }

    /// Content of `span`: which of its bytes go where in the device.
    fn pieces(&self, span: u32) -> Vec<Piece> {
        let tar = self.index.tar_range(SpanId(span));
        let start = tar.start;
        let extents = self.extents.pieces_in_tar(tar);
        extents
            .map(|e| Piece {
                span: e.tar - start,
                device: e.device,
                len: e.len,
            })
            .collect()
    }

    /// Whether a read of the span needs no flight.
    fn is_local(&self, span: u32) -> bool {
        self.device().is_some_and(|device| device.is_present(span))
    }

    /// Decides about those of `spans` that were not checked since the machine started. Reads them, so not under a lock.
    fn settle(&self, spans: Range<u32>) {
        let Some(device) = self.device() else { return };
        for span in spans.filter(|&span| device.is_unchecked(span)) {
            let checked = tokio::task::block_in_place(|| device.check(span, &self.pieces(span)));
            if let Err(error) = checked {
                tracing::warn!(layer = %self.digest(), span, %error, "cannot check a span after restart");
            }
        }
    }

    /// The uncompressed bytes of a span wherever they are, starting a flight if need be.
    async fn wait(self: &Arc<Self>, span: u32) -> Result<Landed, LayerError> {
        let Some(mut flight) = self.want(span..span + 1) else {
            return match self.memory.get(self.digest(), span) {
                Some(bytes) => Ok(Landed::Bytes(bytes)),
                None => Ok(Landed::OnDevice),
            };
        };
        let closed = || LayerError::Closed {
            layer: self.digest().clone(),
        };
        let landed = flight.wait_for(Option::is_some).await.map_err(|_| closed())?;
        landed.clone().expect("waited for a value")
    }

    /// What a flight for `span` brings: all of its group, since decoding passes over it anyway; without a device only as much
    /// as memory can hold beside what others read, for the rest would be gone before anybody asks for it.
    fn wanted_of_group(&self, span: u32, end: u32) -> Range<u32> {
        let group = self.index.group(SpanId(span));
        if self.device().is_some() {
            return group;
        }
        let start = self.index.tar_range(SpanId(span)).start;
        let room = (self.memory.budget() / 2) as u64;
        let fits = |&other: &u32| other < end || self.index.tar_range(SpanId(other)).end - start <= room;
        span..(span + 1..group.end).take_while(fits).last().unwrap_or(span) + 1
    }

    /// Starts flights for those of `spans` that are neither local nor under way. Returns the flight of the first span,
    /// or nothing if that one is local.
    fn want(self: &Arc<Self>, spans: Range<u32>) -> Option<Flight> {
        self.settle(spans.clone());
        let mut started = Vec::new();
        let first = {
            let mut flights = self.flights.lock().expect("no panic while locked");
            let mut span = spans.start;
            while span < spans.end {
                if flights.contains_key(&span) || self.is_local(span) || self.memory.contains(self.digest(), span) {
                    span += 1;
                    continue;
                }
                let group = self.wanted_of_group(span, spans.end);
                let (run, end) = flight::Run::claim(self, &mut flights, group);
                started.push(run);
                span = end;
            }
            flights.get(&spans.start).cloned()
        };
        for run in flight::join_runs(started) {
            tokio::spawn(flight::fly(run));
        }
        first
    }
}
