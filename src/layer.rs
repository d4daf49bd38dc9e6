//! One layer, readable at any address of its data device.
//!
//! A read looks in three places, nearest first: the data device on disk, the spans in memory, the blob's source. A
//! miss starts one *flight* per span. The first reader starts the flight, and all other readers of this process wait
//! for it. Other processes wait for the span's lock. A flight fetches the compressed bytes from the nearest restart
//! on and decodes them. The flight delivers each span after the span's digest matched.
//!
//! Every read is reported to the recorder of the program's start. At the first read of a span, the span counts as
//! used, and readahead decides what to fetch next. A reader waits only for the bytes that it needs.
//!
//! A *group* of spans shares one restart. Groups of gzip layers have one or two spans; groups of zstd layers have more.
//! Decoding a span passes over all earlier spans of its group. So a flight takes them too, and delivers each span as
//! decoding passes the span. If the spans cannot be kept on disk, the flight takes the group from the wanted span on, as
//! far as memory can hold it.
//!
//! Invariants:
//! - Bytes that did not match their span's digest are never returned.
//! - A process has at most one flight per span.
//! - Looking up a flight and starting one happen in one critical section.
//! - No lock is held across an await.
//! - A flight outlives its readers, so a reader that gives up wastes nothing.
//! - A flight without readers claims its spans only when it may start. So a reader never waits for a flight that is
//!   still queued behind others.

mod arrival;
mod carried;
mod data;
mod disk;
mod error;
mod export;
mod first_pass;
mod flight;
mod health;
mod kept;
mod memory;
mod open;
mod opening;
mod prefetch;
mod programs;
mod published;
mod race;
mod regions;
mod rescue;
mod stats;
mod stored;
mod streamed;
mod stripes;
mod touch;
mod turn;
mod windows;

use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

use futures::FutureExt as _;
use tokio::runtime::Handle;

pub use data::LayerContext;
use data::LayerData;
pub use error::LayerError;
pub use export::{ExportError, export};
pub use first_pass::FirstPassError;
use flight::Run;
pub(crate) use flight::{Flown, flown};
pub use health::Health;
pub use kept::{KeptOfLayer, kept_in, kept_of_layer};
pub(crate) use open::open;
pub use opening::OpenError;
pub(crate) use opening::{Opened, ToOpen};
pub(crate) use programs::{LayerPrograms, stored_programs};
pub use published::check_index;
use race::Origin;
use rescue::Rescue;
use stats::FetchPurpose;
pub(crate) use stats::LayerStats;
pub use stats::{FetchedFor, IndexSource, LayerStatus, progress};
pub(crate) use stored::stored_map;
pub use stored::stored_toc;
use touch::Touches;

use crate::blob::{BlobSource, Link};
use crate::fetch::{Board, Claim, Flight, Pass, Policy, Priority, Readahead, Spans as _};
use crate::memory::Charge;
use crate::oci::Digest;
use crate::profile::Recorder;
use crate::span::{Piece, SpanMap};
use crate::store::{Authority, IndexName, LayerDir};
use crate::toc::PackedToc;

/// What a flight delivers for one span.
#[derive(Debug, Clone)]
enum Landed {
    /// The span's uncompressed bytes, verified.
    Bytes(Arc<[u8]>),
    /// No bytes, but the reader should look again: another process put the span on the device, or will do so.
    LookAgain,
}

/// Why a flight delivers no bytes for a span.
#[derive(Debug, Clone)]
struct FlightFailure {
    error: LayerError,
    /// The counters of the view that started the flight, and whose source the flight asked.
    of: Arc<LayerStats>,
    /// When the flight was started.
    began: Instant,
}

type Landing = Result<Landed, Box<FlightFailure>>;

/// A layer as one mount uses it. All mounts of the layer share its data. Each mount has its own source, statistics,
/// recorder and guesses.
#[derive(Debug)]
pub struct Layer {
    data: Arc<LayerData>,
    blob: Arc<dyn BlobSource>,
    touches: Touches,
    readahead: Mutex<Readahead>,
    recorder: OnceLock<(u32, Arc<Recorder>)>,
    /// Runtime of the flights. Reads that need no waiting come from threads that belong to no runtime.
    runtime: Handle,
    stats: Arc<LayerStats>,
    /// The pass in place of this layer's index, if bytes were not what the index says.
    rescue: Rescue,
    /// The table of contents of an index that the store does not have; see [`Layer::hold_toc`].
    toc: OnceLock<(PackedToc, Charge)>,
}

impl Layer {
    /// A new view of the layer that `data` belongs to.
    fn new(data: Arc<LayerData>, blob: Arc<dyn BlobSource>, stats: Arc<LayerStats>) -> Arc<Self> {
        Arc::new(Self {
            touches: Touches::new(data.spans.span_count() as usize),
            data,
            blob,
            readahead: Mutex::default(),
            recorder: OnceLock::new(),
            runtime: Handle::current(),
            stats,
            rescue: Rescue::default(),
            toc: OnceLock::new(),
        })
    }

    /// Digest of the layer's blob.
    pub fn digest(&self) -> &Digest {
        &self.data.digest
    }

    /// Who vouches for the index that the layer is read with.
    pub fn authority(&self) -> &Authority {
        &self.data.authority
    }

    /// Names the index that the layer is read with.
    pub(crate) fn index(&self) -> &IndexName {
        &self.data.index
    }

    /// The directory of that index, if there is a store.
    pub(crate) fn home(&self) -> Option<&LayerDir> {
        self.data.home.as_ref()
    }

    /// The layer's spans.
    pub fn spans(&self) -> &dyn SpanMap {
        &*self.data.spans
    }

    /// The counters of what this mount did with the layer.
    pub fn stats(&self) -> &Arc<LayerStats> {
        &self.stats
    }

    /// The present counters, and how much of the layer is local.
    pub fn status(&self) -> LayerStatus {
        let (local_spans, local) = self.data.local();
        LayerStatus {
            spans: self.spans().span_count(),
            local_spans,
            local,
            healed: self.data.disk.healed(),
            authority: Some(self.data.authority.to_string()),
            ..self.stats.snapshot(self.digest())
        }
    }

    /// Request sizes that follow from the link to the blob.
    pub fn policy(&self) -> Policy {
        Policy::of(self.blob.link())
    }

    /// The link to the blob.
    pub fn link(&self) -> Link {
        self.blob.link()
    }

    /// Reports all further reads to `recorder`, as reads of the layer at `position`. If there is a recorder already,
    /// it stays.
    pub fn record(&self, position: u32, recorder: Arc<Recorder>) {
        self.recorder.get_or_init(|| (position, recorder));
    }

    /// Whether fetched spans are expected to be kept on disk. The disk may still be full, or become full.
    pub fn keeps(&self) -> bool {
        self.data.keeps()
    }

    /// Whether the span is on the local device, so that a read of it needs no flight.
    pub(crate) fn is_local(&self, span: u32) -> bool {
        self.data.is_local(span)
    }

    /// Bytes of decoded spans that memory may hold.
    pub(crate) fn memory_budget(&self) -> u64 {
        self.data.context.memory.budget() as u64
    }

    /// Where requests for the layer's bytes go.
    fn origin(&self) -> Origin {
        Origin {
            blob: self.blob.clone(),
            lanes: self.data.context.lanes.clone(),
            stats: self.stats.clone(),
            patient: false,
        }
    }

    /// Fills `buf` from device offset `offset` if the device has all the bytes. Otherwise returns false, and the
    /// contents of `buf` are undefined. Bytes between files read as zeros.
    pub fn read_local(self: &Arc<Self>, offset: u64, buf: &mut [u8]) -> bool {
        let Some(content) = self.spans().content(offset..offset + buf.len() as u64) else {
            buf.fill(0);
            return true;
        };
        let present = self.data.read_device(offset, buf);
        if present {
            self.stats.hit(buf.len());
            self.note(&content);
            self.read_ahead_of(self.touch(&content));
        }
        present
    }

    /// Counts a range of the device that a reader has got and keeps. When such readers have got all of a region, tells the
    /// kernel to release the region's pages of the device.
    pub(crate) fn kept_by_reader(&self, device: Range<u64>) {
        for region in self.data.regions.count(device) {
            if let Some(device) = self.data.disk.device() {
                device.release_pages(region);
            }
        }
    }

    /// Fills `buf`, which must be zeros, from device offset `offset`, and fetches missing spans. If the bytes are not what
    /// an index from elsewhere says, streams the layer and goes on without that index. Cancel safe: a dropped read leaves
    /// its flights running.
    pub async fn read(self: &Arc<Self>, offset: u64, buf: &mut [u8]) -> Result<(), LayerError> {
        match self.read_indexed(offset, buf).await {
            Err(error @ LayerError::Corrupt { .. }) if self.data.authority != Authority::Pass => {
                self.read_by_pass(offset, buf, error).await
            }
            result => result,
        }
    }

    async fn read_indexed(self: &Arc<Self>, offset: u64, buf: &mut [u8]) -> Result<(), LayerError> {
        let began = Instant::now();
        if let Some(content) = self.spans().content(offset..offset + buf.len() as u64) {
            self.note(&content);
            let ahead = self.touch(&content);
            // All flights of this read start before the reader waits for the first one.
            for spans in self.spans_with_content(&content) {
                let until = self.ahead_in_group(&spans, &ahead);
                self.want_until(spans, until);
            }
            self.read_ahead_of(ahead);
            for spans in self.spans_with_content(&content) {
                for span in spans {
                    self.copy_span(span, offset, buf, began).await?;
                }
            }
        }
        self.stats.miss(buf.len());
        Ok(())
    }

    /// Fills `buf` from device offset `offset` if the device has all the bytes. The access counts as no read:
    /// statistics, recorder and readahead do not see it.
    fn peek(&self, offset: u64, buf: &mut [u8]) -> bool {
        self.data.read_device(offset, buf)
    }

    /// Reports a read to the recorder.
    fn note(&self, content: &Range<u64>) {
        if let Some((position, recorder)) = self.recorder.get() {
            recorder.read(*position, content.clone());
        }
    }

    /// The spans with content in a range of the device, as stretches of neighbours. Spans without content are left
    /// out.
    fn spans_with_content(&self, content: &Range<u64>) -> Vec<Range<u32>> {
        let mut stretches: Vec<Range<u32>> = Vec::new();
        for span in self.spans().spans(content.clone()) {
            match stretches.last_mut() {
                _ if !self.spans().has_content(span) => {}
                Some(last) if last.end == span => last.end += 1,
                _ => stretches.push(span..span + 1),
            }
        }
        stretches
    }

    /// Copies the bytes that `span` has of the device from `offset` on to their place in `buf`, for a read that began at
    /// `began`.
    async fn copy_span(
        self: &Arc<Self>,
        span: u32,
        offset: u64,
        buf: &mut [u8],
        began: Instant,
    ) -> Result<(), LayerError> {
        let range = self.spans().device_range(span);
        let (from, to) = (range.start.max(offset), range.end.min(offset + buf.len() as u64));
        if from >= to {
            return Ok(());
        }
        let clip = |piece: Piece| {
            let (start, end) = (piece.device.max(from), (piece.device + piece.len).min(to));
            (start < end).then(|| Piece {
                span: piece.span + (start - piece.device),
                device: start,
                len: end - start,
            })
        };
        let target = &mut buf[(from - offset) as usize..(to - offset) as usize];
        loop {
            // The bytes usually come from the page cache. If they do not, the runtime runs other tasks on other
            // threads.
            if tokio::task::block_in_place(|| self.data.read_device(from, target)) {
                return Ok(());
            }
            match self.wait(span, began).await? {
                Landed::Bytes(bytes) => {
                    // The failed read of the device may have left bytes between the pieces.
                    target.fill(0);
                    for piece in self.spans().pieces(span).into_iter().filter_map(clip) {
                        let source = &bytes[piece.span as usize..][..piece.len as usize];
                        target[(piece.device - from) as usize..][..source.len()].copy_from_slice(source);
                    }
                    return Ok(());
                }
                Landed::LookAgain => {}
            }
        }
    }

    /// Returns the decoded bytes of a span from memory or from its flight, and starts a flight if there is none. `began` is
    /// when the read began.
    async fn wait(self: &Arc<Self>, span: u32, began: Instant) -> Result<Landed, LayerError> {
        let Some(mut flight) = self.want(span..span + 1) else {
            return match self.data.context.memory.get(&self.data.index, span) {
                Some(bytes) => Ok(Landed::Bytes(bytes)),
                None => Ok(Landed::LookAgain),
            };
        };
        let landed = flight.wait_for(Option::is_some).await.map_err(|_| self.closed())?;
        let landing = landed.clone().expect("waited for a value");
        self.landed(landing, began)
    }

    /// Returns what a flight delivered to a read that began at `began`. Some failures are no answer to the read, which then
    /// looks again, and asks the source itself:
    /// - A failure of another image's flight says nothing about the source of this image.
    /// - A flight that began before the read gives up earlier than the read may.
    fn landed(&self, landing: Landing, began: Instant) -> Result<Landed, LayerError> {
        match landing {
            Ok(landed) => Ok(landed),
            Err(failure) if Arc::ptr_eq(&failure.of, &self.stats) && failure.began >= began => Err(failure.error),
            Err(_) => Ok(Landed::LookAgain),
        }
    }

    /// Makes the landing of spans whose flight, started by this view at `began`, failed.
    fn failed(&self, error: LayerError, began: Instant) -> Landing {
        Err(Box::new(FlightFailure {
            error,
            of: self.stats.clone(),
            began,
        }))
    }

    fn closed(&self) -> LayerError {
        LayerError::Closed {
            layer: self.digest().clone(),
        }
    }

    /// Starts flights for those of `spans` that are neither local nor in flight. Returns the flight of the first
    /// span, or `None` if that span is local.
    fn want(self: &Arc<Self>, spans: Range<u32>) -> Option<Flight<Landing>> {
        let until = spans.end;
        self.want_until(spans, until)
    }

    /// Starts flights like [`Layer::want`]. If the last one decodes a group, it goes on up to span `until`, although the
    /// reader does not wait for that.
    fn want_until(self: &Arc<Self>, spans: Range<u32>, until: u32) -> Option<Flight<Landing>> {
        let (runs, first) = {
            let mut board = self.data.flights.board();
            let runs = self.claim(&mut board, spans.clone(), until, Priority::Demand);
            (runs, board.flight(spans.start))
        };
        for run in runs {
            // The run queues for its pass at once, before the requests that are fetched ahead of this reader.
            let pass = self.line_up(run.spans.clone());
            flight::start(run, pass.map(Arc::new));
        }
        first
    }

    /// Queues for a pass for a request that a reader waits for.
    fn line_up(&self, spans: Range<u32>) -> impl Future<Output = Pass> + Send + use<> {
        let bytes = self.spans().bytes(spans);
        self.data.context.lanes.enter(Priority::Demand, bytes, self.policy())
    }

    /// Returns the end of what readahead wants in the group of the last of `spans`. A flight of its own would have to decode
    /// the group from its beginning again.
    fn ahead_in_group(&self, spans: &Range<u32>, ahead: &[(Range<u32>, Priority)]) -> u32 {
        let group = self.spans().group(spans.end - 1);
        let in_group = ahead
            .iter()
            .map(|(ahead, _)| ahead.start.max(spans.end)..ahead.end.min(group.end));
        let ends = in_group.filter(|ahead| !ahead.is_empty()).map(|ahead| ahead.end);
        ends.max().unwrap_or(spans.end)
    }

    /// Claims the missing spans of `spans`, and those behind them up to span `until` that share the last group. Returns a run
    /// for each stretch of neighbours.
    fn claim(
        self: &Arc<Self>,
        board: &mut Board<'_, Landing>,
        spans: Range<u32>,
        until: u32,
        purpose: Priority,
    ) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        let mut span = spans.start;
        while span < spans.end {
            if !self.data.is_missing(board, span) {
                span += 1;
                continue;
            }
            let group = self.data.wanted_of_group(span, until);
            let run = match runs.last_mut() {
                Some(run) if run.spans.end == group.start => run,
                _ => {
                    let lost = self.failed(self.closed(), Instant::now());
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
        let missing = group.filter(|&span| self.data.is_missing(board, span));
        for span in missing.collect::<Vec<_>>() {
            board.take(&mut run.claim, span);
        }
    }
}
