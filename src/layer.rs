//! One layer, readable at any address of its data device.
//!
//! A read looks in three places, nearest first: the data device on disk, the spans in memory, the blob's source. A miss
//! becomes one *flight* per span: the first reader starts it, all others of this process wait for the same one, and other
//! processes wait for the span's lock. A flight fetches the compressed bytes from the nearest restart on, decodes, and
//! delivers each span after its digest matched.
//!
//! The first read of a span is an event of its own: it counts as used, it is told to whoever records the start of the
//! program, and readahead decides what to fetch next. A reader waits for the bytes it needs and no others.
//!
//! Invariants: bytes that did not match their span's digest are never returned; at most one flight per span in a process;
//! looking up and starting a flight is one critical section; no lock is held across an await; a flight outlives its readers,
//! so an impatient reader wastes nothing; spans are claimed for flights nobody waits for only when these may start, so a
//! reader never waits for something that waits itself.
//!
//! A group of spans shares one restart (a single-frame zstd layer is one group): decoding it passes over all of them, so a
//! flight always takes the whole group and hands out each span as it passes.

mod arrival;
mod disk;
mod first_pass;
mod flight;
mod health;
mod kept;
mod memory;
mod open;
mod prefetch;
mod programs;
mod race;
mod stats;
mod stripes;
mod touch;
mod turn;
mod windows;

use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock};

use futures::FutureExt as _;
use tokio::runtime::Handle;

use disk::{LayerDisk, Miss};
pub use first_pass::FirstPassError;
use flight::Run;
pub use flight::{Flown, flown};
pub use health::Health;
pub use kept::{KeptOfLayer, kept_of_layer};
pub use memory::SpanMemory;
pub use open::{LayerContext, OpenError, Opened, open, stored_index, stored_toc};
pub use prefetch::Begun;
pub use programs::{Programs, stored_programs};
use race::Origin;
pub use stats::{IndexSource, LayerStats, LayerStatus, progress};
use stripes::Ahead;
use touch::Touches;
use windows::Windows;

use crate::blob::{BlobError, BlobSource, Link};
use crate::device::{DataDevice, Piece};
use crate::fetch::{Board, Claim, Flight, Flights, Lanes, Pass, Policy, Priority, Readahead, Spans as _};
use crate::index::{IndexError, SpanId, SpanIndex};
use crate::memory::Charge;
use crate::oci::Digest;
use crate::profile::Recorder;
use crate::store::{LayerDir, Store};
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
    /// Nothing, but things have changed: another process put it on the device, or is about to.
    LookAgain,
}

type Landing = Result<Landed, LayerError>;

/// A layer with its index, opened for reading.
#[derive(Debug)]
pub struct Layer {
    blob: Arc<dyn BlobSource>,
    index: SpanIndex,
    extents: ExtentTable,
    /// Memory of index and extents.
    _charge: Charge,
    disk: LayerDisk,
    /// Where the device is kept, to make a new one when it is damaged as a whole.
    home: Option<(Store, LayerDir)>,
    memory: Arc<SpanMemory>,
    health: Arc<Health>,
    lanes: Arc<Lanes>,
    ahead: Ahead,
    windows: Windows,
    flights: Arc<Flights<Landing>>,
    touches: Touches,
    readahead: Mutex<Readahead>,
    recorder: OnceLock<(u32, Arc<Recorder>)>,
    /// Where flights fly; reads that need no waiting come from threads that belong to no runtime.
    runtime: Handle,
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

    /// Sizes that follow from the link to the blob.
    pub fn policy(&self) -> Policy {
        Policy::of(self.blob.link())
    }

    /// The link to the blob.
    pub fn link(&self) -> Link {
        self.blob.link()
    }

    /// From now on reads are told to `recorder`, as those of the layer at `position`. The first recorder stays.
    pub fn record(&self, position: u32, recorder: Arc<Recorder>) {
        self.recorder.get_or_init(|| (position, recorder));
    }

    /// Whether what is fetched is kept on disk, as far as one knows: that may be full, or come to be.
    pub fn keeps(&self) -> bool {
        self.disk.keeps()
    }

    /// Whether there is a disk that what is fetched can be written to, full or not.
    pub fn has_disk(&self) -> bool {
        self.disk.device().is_some_and(|device| device.is_writable())
    }

    /// Spans that need no fetch, and their compressed bytes.
    pub fn local(&self) -> (u32, u64) {
        kept::local(&self.index, &self.disk.present(self.index.count()))
    }

    /// Where the bytes come from.
    fn origin(&self) -> Origin {
        Origin {
            blob: self.blob.clone(),
            lanes: self.lanes.clone(),
            stats: self.stats.clone(),
            patient: false,
        }
    }

    /// Whether a range of the device has any content.
    fn has_content(&self, range: Range<u64>) -> bool {
        self.extents.pieces_in_device(range).next().is_some()
    }

    /// The spans that have content in a range of the device.
    fn spans_in(&self, range: Range<u64>) -> Range<u32> {
        let pieces = self.extents.pieces_in_device(range);
        pieces.fold(0..0, |spans, piece| {
            let of_piece = self.spans_of(&piece);
            match spans.is_empty() {
                true => of_piece,
                false => spans.start..of_piece.end,
            }
        })
    }

    /// Reads checked bytes from the device; false if not all of them are there. What is damaged there is dropped, so that it
    /// is fetched again.
    fn read_device(&self, offset: u64, buf: &mut [u8]) -> bool {
        let read = self.disk.read(offset, buf, |range| self.has_content(range));
        let damaged = match read {
            Ok(()) => return true,
            Err(Miss::Absent) => return false,
            Err(Miss::Lost(device)) => {
                self.replace_device(&device);
                return false;
            }
            Err(Miss::Damaged(span)) => span..span + 1,
            Err(Miss::Unreadable) => self.spans_in(offset..offset + buf.len() as u64),
        };
        for span in damaged {
            // A span that is being fetched is about to be written, and its lock is not to be taken by anybody else here.
            let board = self.flights.board();
            if !board.is_flying(span) {
                self.disk.drop_span(span);
            }
        }
        false
    }

    /// Makes an empty device in place of one that is damaged as a whole.
    fn replace_device(&self, damaged: &Arc<DataDevice>) {
        let Some((store, dir)) = &self.home else { return };
        self.disk.replace(damaged, || {
            let opened = DataDevice::open(store, dir, &self.index, &self.extents);
            opened.map_err(|error| self.health.store_lost(&error)).ok()
        });
    }

    /// Fills `buf` from device offset `offset` if that needs no waiting; false if it does (then `buf` is garbage).
    /// Bytes between extents read as zeros.
    pub fn read_local(self: &Arc<Self>, offset: u64, buf: &mut [u8]) -> bool {
        let range = offset..offset + buf.len() as u64;
        if !self.has_content(range.clone()) {
            buf.fill(0);
            return true;
        }
        let present = self.read_device(offset, buf);
        if present {
            self.stats.hit(buf.len());
            for extent in self.extents.pieces_in_device(range) {
                self.note(&extent);
                self.read_ahead_of(self.touch(&extent));
            }
        }
        present
    }

    /// Fills `buf`, which is zeros, from device offset `offset`, fetching what is missing. Cancel safe: a dropped read leaves its
    /// flights running.
    pub async fn read(self: &Arc<Self>, offset: u64, buf: &mut [u8]) -> Result<(), LayerError> {
        let extents: Vec<Extent> = self
            .extents
            .pieces_in_device(offset..offset + buf.len() as u64)
            .collect();
        // Every flight of this read starts before the first is waited for.
        for extent in &extents {
            self.note(extent);
            let ahead = self.touch(extent);
            self.want(self.spans_of(extent));
            self.read_ahead_of(ahead);
        }
        for extent in &extents {
            for span in self.spans_of(extent) {
                self.copy_span(span, extent, offset, buf).await?;
            }
        }
        self.stats.miss(buf.len());
        Ok(())
    }

    /// Fills `buf` from device offset `offset` if that needs no waiting, and nobody is told of it: this is not a reader.
    fn peek(&self, offset: u64, buf: &mut [u8]) -> bool {
        self.read_device(offset, buf)
    }

    /// Tells the recorder of a read.
    fn note(&self, extent: &Extent) {
        if let Some((position, recorder)) = self.recorder.get() {
            recorder.read(*position, extent.tar..extent.tar + extent.len);
        }
    }

    /// The spans that hold a range of the layer's tar; none beyond its end.
    pub fn spans_at(&self, tar: Range<u64>) -> Range<u32> {
        let end = tar.end.min(self.index.tar_size());
        match (self.index.span_at(tar.start), end.checked_sub(1)) {
            (Some(first), Some(last)) if tar.start < end => {
                first.0..self.index.span_at(last).map_or(first.0, |last| last.0 + 1)
            }
            _ => 0..0,
        }
    }

    /// Bytes of a span's part of the tar.
    pub fn span_size(&self, span: u32) -> u64 {
        let tar = self.index.tar_range(SpanId(span));
        tar.end - tar.start
    }

    /// Bytes of decoded spans that memory holds.
    pub fn memory_budget(&self) -> u64 {
        self.memory.budget() as u64
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
            if tokio::task::block_in_place(|| self.read_device(device, target)) {
                return Ok(());
            }
            match self.wait(span).await? {
                Landed::Bytes(bytes) => {
                    target.copy_from_slice(&bytes[(from - tar.start) as usize..(to - tar.start) as usize]);
                    return Ok(());
                }
                Landed::LookAgain => {}
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
    pub fn is_local(&self, span: u32) -> bool {
        self.disk.is_present(span)
    }

    /// The uncompressed bytes of a span wherever they are, starting a flight if need be.
    async fn wait(self: &Arc<Self>, span: u32) -> Result<Landed, LayerError> {
        let Some(mut flight) = self.want(span..span + 1) else {
            return match self.memory.get(self.digest(), span) {
                Some(bytes) => Ok(Landed::Bytes(bytes)),
                None => Ok(Landed::LookAgain),
            };
        };
        let landed = flight.wait_for(Option::is_some).await.map_err(|_| self.closed())?;
        landed.clone().expect("waited for a value")
    }

    fn closed(&self) -> LayerError {
        LayerError::Closed {
            layer: self.digest().clone(),
        }
    }

    /// What a flight for `span` brings: all of its group, since decoding passes over it anyway; if it cannot be kept only as
    /// much as memory can hold beside what others read, for the rest would be gone before anybody asks for it.
    fn wanted_of_group(&self, span: u32, end: u32) -> Range<u32> {
        let group = self.index.group(SpanId(span));
        if self.keeps() {
            return group;
        }
        let start = self.index.tar_range(SpanId(span)).start;
        let room = (self.memory.budget() / 2) as u64;
        let fits = |&other: &u32| other < end || self.index.tar_range(SpanId(other)).end - start <= room;
        span..(span + 1..group.end).take_while(fits).last().unwrap_or(span) + 1
    }

    /// Starts flights for those of `spans` that are neither local nor under way. Returns the flight of the first span, or
    /// nothing if that one is local.
    fn want(self: &Arc<Self>, spans: Range<u32>) -> Option<Flight<Landing>> {
        let (runs, first) = {
            let mut board = self.flights.board();
            let runs = self.claim(&mut board, spans.clone(), Priority::Demand);
            (runs, board.flight(spans.start))
        };
        for run in runs {
            // In line at once, before what is fetched ahead of this reader.
            let pass = self.line_up(run.spans.clone());
            flight::start(run, pass.map(Arc::new));
        }
        first
    }

    /// Lines up for a request that a reader waits for.
    fn line_up(&self, spans: Range<u32>) -> impl Future<Output = Pass> + Send + use<> {
        let bytes = self.index.bytes(spans);
        self.lanes.enter(Priority::Demand, bytes, self.policy())
    }

    /// Claims what is missing of `spans`: a run for each stretch of neighbours.
    fn claim(self: &Arc<Self>, board: &mut Board<'_, Landing>, spans: Range<u32>, purpose: Priority) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        let mut span = spans.start;
        while span < spans.end {
            if !self.is_missing(board, span) {
                span += 1;
                continue;
            }
            let group = self.wanted_of_group(span, spans.end);
            let run = match runs.last_mut() {
                Some(run) if run.spans.end == group.start => run,
                _ => {
                    let lost = Err(self.closed());
                    runs.push(Run::new(self.clone(), group.start, board.claim(lost)));
                    runs.last_mut().expect("just added")
                }
            };
            self.take(board, run, group.clone());
            if purpose == Priority::Demand {
                run.needed.push(span..group.end.min(spans.end));
            }
            span = group.end;
        }
        runs
    }

    fn take(&self, board: &mut Board<'_, Landing>, run: &mut Run, group: Range<u32>) {
        run.spans.end = group.end;
        for span in group.filter(|&span| self.is_missing(board, span)).collect::<Vec<_>>() {
            board.take(&mut run.claim, span);
        }
    }

    /// Whether nobody has the span or is about to.
    fn is_missing(&self, board: &Board<'_, Landing>, span: u32) -> bool {
        !board.is_flying(span) && !self.is_local(span) && !self.memory.contains(self.digest(), span)
    }
}
