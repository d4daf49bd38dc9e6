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
mod data;
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

pub use data::LayerContext;
use data::LayerData;
pub use first_pass::FirstPassError;
use flight::Run;
pub use flight::{Flown, flown};
pub use health::Health;
pub use kept::{KeptOfLayer, kept_of_layer};
pub use memory::SpanMemory;
pub use open::{OpenError, Opened, open, stored_spans, stored_toc};
pub use prefetch::Begun;
pub use programs::{Programs, stored_programs};
use race::Origin;
pub use stats::{IndexSource, LayerStats, LayerStatus, progress};
use touch::Touches;

use crate::blob::{BlobError, BlobSource, Link};
use crate::fetch::{Board, Claim, Flight, Pass, Policy, Priority, Readahead, Spans as _};
use crate::index::IndexError;
use crate::oci::Digest;
use crate::profile::Recorder;
use crate::span::{Piece, SpanMap};

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

/// A layer as one mount has it: the data that all mounts of it share, and how this one fetches, what it read and guesses.
#[derive(Debug)]
pub struct Layer {
    data: Arc<LayerData>,
    blob: Arc<dyn BlobSource>,
    touches: Touches,
    readahead: Mutex<Readahead>,
    recorder: OnceLock<(u32, Arc<Recorder>)>,
    /// Where flights fly; reads that need no waiting come from threads that belong to no runtime.
    runtime: Handle,
    stats: Arc<LayerStats>,
}

impl Layer {
    /// A view of its own of the layer that `data` is of.
    fn new(data: Arc<LayerData>, blob: Arc<dyn BlobSource>, stats: Arc<LayerStats>) -> Arc<Self> {
        Arc::new(Self {
            touches: Touches::new(data.spans.span_count() as usize),
            data,
            blob,
            readahead: Mutex::default(),
            recorder: OnceLock::new(),
            runtime: Handle::current(),
            stats,
        })
    }

    /// Digest of the layer's blob.
    pub fn digest(&self) -> &Digest {
        &self.data.digest
    }

    /// The layer's spans.
    pub fn spans(&self) -> &dyn SpanMap {
        &*self.data.spans
    }

    /// What this mount did with the layer so far.
    pub fn stats(&self) -> &Arc<LayerStats> {
        &self.stats
    }

    /// The counters now, and what of the layer is here.
    pub fn status(&self) -> LayerStatus {
        let (local_spans, local) = self.data.local();
        LayerStatus {
            spans: self.spans().span_count(),
            local_spans,
            local,
            healed: self.data.disk.healed(),
            ..self.stats.snapshot(self.digest())
        }
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
        self.data.keeps()
    }

    /// Whether there is a disk that what is fetched can be written to, full or not.
    pub fn has_disk(&self) -> bool {
        self.data.disk.device().is_some_and(|device| device.is_writable())
    }

    /// Whether a read of the span needs no flight.
    pub fn is_local(&self, span: u32) -> bool {
        self.data.is_local(span)
    }

    /// Bytes of decoded spans that memory holds.
    pub fn memory_budget(&self) -> u64 {
        self.data.context.memory.budget() as u64
    }

    /// Where the bytes come from.
    fn origin(&self) -> Origin {
        Origin {
            blob: self.blob.clone(),
            lanes: self.data.context.lanes.clone(),
            stats: self.stats.clone(),
            patient: false,
        }
    }

    /// Fills `buf` from device offset `offset` if that needs no waiting; false if it does (then `buf` is garbage).
    /// Bytes between files read as zeros.
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

    /// Fills `buf`, which is zeros, from device offset `offset`, fetching what is missing. Cancel safe: a dropped read leaves its
    /// flights running.
    pub async fn read(self: &Arc<Self>, offset: u64, buf: &mut [u8]) -> Result<(), LayerError> {
        if let Some(content) = self.spans().content(offset..offset + buf.len() as u64) {
            self.note(&content);
            let ahead = self.touch(&content);
            // Every flight of this read starts before the first is waited for.
            for spans in self.spans_with_content(&content) {
                self.want(spans);
            }
            self.read_ahead_of(ahead);
            for spans in self.spans_with_content(&content) {
                for span in spans {
                    self.copy_span(span, offset, buf).await?;
                }
            }
        }
        self.stats.miss(buf.len());
        Ok(())
    }

    /// Fills `buf` from device offset `offset` if that needs no waiting, and nobody is told of it: this is not a reader.
    fn peek(&self, offset: u64, buf: &mut [u8]) -> bool {
        self.data.read_device(offset, buf)
    }

    /// Tells the recorder of a read.
    fn note(&self, content: &Range<u64>) {
        if let Some((position, recorder)) = self.recorder.get() {
            recorder.read(*position, content.clone());
        }
    }

    /// The spans that have the content in a range of the device: stretches without those that have none.
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

    /// Copies what `span` has of the device from `offset` on to its place in `buf`.
    async fn copy_span(self: &Arc<Self>, span: u32, offset: u64, buf: &mut [u8]) -> Result<(), LayerError> {
        let end = offset + buf.len() as u64;
        let clip = |piece: Piece| {
            let (from, to) = (piece.device.max(offset), (piece.device + piece.len).min(end));
            (from < to).then(|| Piece {
                span: piece.span + (from - piece.device),
                device: from,
                len: to - from,
            })
        };
        let pieces: Vec<Piece> = self.spans().pieces(span).into_iter().filter_map(clip).collect();
        let (Some(first), Some(last)) = (pieces.first(), pieces.last()) else {
            return Ok(());
        };
        let (from, to) = (first.device, last.device + last.len);
        let target = &mut buf[(from - offset) as usize..(to - offset) as usize];
        loop {
            // Usually from the page cache; when it is not, the runtime goes on with other things.
            if tokio::task::block_in_place(|| self.data.read_device(from, target)) {
                return Ok(());
            }
            match self.wait(span).await? {
                Landed::Bytes(bytes) => {
                    // A look at the device may have left something of it between the pieces.
                    target.fill(0);
                    for piece in &pieces {
                        let source = &bytes[piece.span as usize..][..piece.len as usize];
                        target[(piece.device - from) as usize..][..source.len()].copy_from_slice(source);
                    }
                    return Ok(());
                }
                Landed::LookAgain => {}
            }
        }
    }

    /// The decoded bytes of a span wherever they are, starting a flight if need be.
    async fn wait(self: &Arc<Self>, span: u32) -> Result<Landed, LayerError> {
        let Some(mut flight) = self.want(span..span + 1) else {
            return match self.data.context.memory.get(self.digest(), span) {
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

    /// Starts flights for those of `spans` that are neither local nor under way. Returns the flight of the first span, or
    /// nothing if that one is local.
    fn want(self: &Arc<Self>, spans: Range<u32>) -> Option<Flight<Landing>> {
        let (runs, first) = {
            let mut board = self.data.flights.board();
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
        let bytes = self.spans().bytes(spans);
        self.data.context.lanes.enter(Priority::Demand, bytes, self.policy())
    }

    /// Claims what is missing of `spans`: a run for each stretch of neighbours.
    fn claim(self: &Arc<Self>, board: &mut Board<'_, Landing>, spans: Range<u32>, purpose: Priority) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        let mut span = spans.start;
        while span < spans.end {
            if !self.data.is_missing(board, span) {
                span += 1;
                continue;
            }
            let group = self.data.wanted_of_group(span, spans.end);
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
        let missing = group.filter(|&span| self.data.is_missing(board, span));
        for span in missing.collect::<Vec<_>>() {
            board.take(&mut run.claim, span);
        }
    }
}
