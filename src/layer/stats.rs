//! Counters of one layer, shared with the code that reports them.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use serde::{Deserialize, Serialize};

use crate::fetch::Priority;
use crate::oci::Digest;

/// The origin of a layer's index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IndexSource {
    /// There is no index yet.
    Pending,
    /// This process made the index while it streamed the layer.
    Streamed,
    /// The store has the index.
    Store,
    /// The index came from a location.
    Location,
    /// The layer carries an index, and this process fetched it.
    Carried,
}

/// What compressed bytes are fetched for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FetchPurpose {
    /// Spans with this priority.
    Spans(Priority),
    /// The pass that makes the layer's index.
    Pass,
    /// The table that the layer carries.
    Table,
}

/// Compressed bytes that were fetched, by purpose.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FetchedFor {
    /// A reader waited for them.
    pub demand: u64,
    /// They lay ahead of a reader.
    pub readahead: u64,
    /// An earlier start read them, or readers waited for bytes all around them.
    pub likely: u64,
    /// They were part of the image, and nobody was known to need them.
    pub background: u64,
    /// The index of their layer was made from them.
    pub pass: u64,
    /// They were the table of contents that their layer carries.
    pub table: u64,
}

impl std::iter::Sum for FetchedFor {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |a, b| Self {
            demand: a.demand + b.demand,
            readahead: a.readahead + b.readahead,
            likely: a.likely + b.likely,
            background: a.background + b.background,
            pass: a.pass + b.pass,
            table: a.table + b.table,
        })
    }
}

/// Counters of the fields of [`FetchedFor`].
#[derive(Debug, Default)]
struct FetchCounters {
    demand: AtomicU64,
    readahead: AtomicU64,
    likely: AtomicU64,
    background: AtomicU64,
    pass: AtomicU64,
    table: AtomicU64,
}

impl FetchCounters {
    fn of(&self, purpose: FetchPurpose) -> &AtomicU64 {
        match purpose {
            FetchPurpose::Spans(Priority::Demand) => &self.demand,
            FetchPurpose::Spans(Priority::Readahead) => &self.readahead,
            FetchPurpose::Spans(Priority::Likely) => &self.likely,
            FetchPurpose::Spans(Priority::Background) => &self.background,
            FetchPurpose::Pass => &self.pass,
            FetchPurpose::Table => &self.table,
        }
    }

    fn snapshot(&self) -> FetchedFor {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        FetchedFor {
            demand: of(&self.demand),
            readahead: of(&self.readahead),
            likely: of(&self.likely),
            background: of(&self.background),
            pass: of(&self.pass),
            table: of(&self.table),
        }
    }
}

/// Counters of a layer. All of them only grow, except the numbers of tasks that open the layer or wait.
#[derive(Debug)]
pub struct LayerStats {
    /// Compressed size of the layer in bytes.
    pub size: u64,
    fetched: AtomicU64,
    fetched_for: FetchCounters,
    resumed: AtomicU64,
    used: AtomicU64,
    served: AtomicU64,
    hits: AtomicU64,
    misses: AtomicU64,
    requests: AtomicU64,
    hedges: AtomicU64,
    /// Spans that were fetched and verified.
    landed: AtomicU64,
    /// Number of tasks that are opening the layer. `waiting` counts those of them that wait for bytes or for another
    /// process.
    opening: AtomicUsize,
    waiting: AtomicUsize,
    /// Number of seconds in which another process that streams the layer made progress.
    beats: AtomicU64,
    trouble: Mutex<Option<String>>,
    source: Mutex<IndexSource>,
}

/// A snapshot of a layer's counters.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LayerStatus {
    /// Digest of the layer's blob.
    pub digest: String,
    /// Compressed size in bytes.
    pub size: u64,
    /// Compressed bytes fetched by this mount.
    pub fetched: u64,
    /// What they were fetched for.
    #[serde(default)]
    pub fetched_for: FetchedFor,
    /// Compressed bytes that this mount found in the store when it streamed the layer. An earlier, interrupted pass
    /// had fetched them.
    #[serde(default)]
    pub resumed: u64,
    /// Compressed bytes of the spans that this mount has read, whether they were fetched or local.
    pub used: u64,
    /// Bytes served to readers by this mount.
    pub served: u64,
    /// Number of reads that were answered without waiting.
    pub hits: u64,
    /// Number of reads that had to wait.
    pub misses: u64,
    /// Number of requests for the blob, with and without a range.
    pub requests: u64,
    /// Number of those requests that were made because an earlier one was far too slow.
    #[serde(default)]
    pub hedges: u64,
    /// Number of spans that were damaged on the local device and are there again. A device that was replaced counts
    /// as one. All mounts of the process share the device and this number.
    #[serde(default)]
    pub healed: u64,
    /// Number of spans in the layer; 0 until there is an index.
    pub spans: u32,
    /// Number of spans on the local device.
    pub local_spans: u32,
    /// Compressed bytes of the spans on the local device.
    pub local: u64,
    /// The origin of the index.
    pub index_source: IndexSource,
    /// Who vouches for the index: `pass`, `manifest`, `key NAME` or `location PLACE`. None until there is an index.
    #[serde(default)]
    pub authority: Option<String>,
}

/// Returns the compressed bytes that have arrived and the compressed bytes that are expected, over all layers. Layers
/// that were opened with an index count only if bytes of them were fetched.
pub fn progress(layers: &[LayerStatus]) -> (u64, u64) {
    let coming = layers
        .iter()
        .filter(|l| matches!(l.index_source, IndexSource::Pending | IndexSource::Streamed) || l.fetched > 0);
    coming.fold((0, 0), |(done, total), l| {
        // Of a layer that carries its index, only what readers ask for is coming.
        let expected = match l.index_source {
            IndexSource::Carried => l.fetched,
            IndexSource::Pending | IndexSource::Streamed | IndexSource::Store | IndexSource::Location => l.size,
        };
        (done + l.fetched + l.resumed, total + expected)
    })
}

impl LayerStats {
    /// Zero counters of a layer of `size` compressed bytes.
    pub fn new(size: u64) -> Self {
        Self {
            size,
            fetched: AtomicU64::new(0),
            fetched_for: FetchCounters::default(),
            resumed: AtomicU64::new(0),
            used: AtomicU64::new(0),
            served: AtomicU64::new(0),
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            hedges: AtomicU64::new(0),
            landed: AtomicU64::new(0),
            opening: AtomicUsize::new(0),
            waiting: AtomicUsize::new(0),
            beats: AtomicU64::new(0),
            trouble: Mutex::default(),
            source: Mutex::new(IndexSource::Pending),
        }
    }

    /// Compressed bytes fetched so far.
    pub fn fetched(&self) -> u64 {
        self.fetched.load(Ordering::Relaxed)
    }

    /// Number of requests so far.
    pub(super) fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    pub(super) fn fetched_more(&self, bytes: usize, purpose: FetchPurpose) {
        self.fetched.fetch_add(bytes as u64, Ordering::Relaxed);
        self.fetched_for.of(purpose).fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn resumed_more(&self, bytes: usize) {
        self.resumed.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn used_more(&self, bytes: u64) {
        self.used.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn request(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn landed(&self) {
        self.landed.fetch_add(1, Ordering::Relaxed);
    }

    /// Number of spans that were fetched and verified.
    pub(crate) fn spans_landed(&self) -> u64 {
        self.landed.load(Ordering::Relaxed)
    }

    /// Counts a second request, sent because the first one is too slow.
    pub(super) fn hedged(&self) {
        self.request();
        self.hedges.fetch_add(1, Ordering::Relaxed);
    }

    /// Number of requests that were made because an earlier one was too slow.
    pub fn hedges(&self) -> u64 {
        self.hedges.load(Ordering::Relaxed)
    }

    /// Does `work`, which opens the layer, and counts it while it runs.
    pub(super) async fn opening<T>(&self, work: impl Future<Output = T>) -> T {
        let _count = Count::up(&self.opening);
        work.await
    }

    /// Does `work`, which waits for bytes or for another process while the layer is opened.
    pub(super) async fn waiting<T>(&self, work: impl Future<Output = T>) -> T {
        let _count = Count::up(&self.waiting);
        work.await
    }

    /// Records that another process that streams the layer has shown progress.
    pub(super) fn beat(&self) {
        self.beats.fetch_add(1, Ordering::Relaxed);
    }

    /// How often another process that streams the layer has shown progress.
    pub(crate) fn beats(&self) -> u64 {
        self.beats.load(Ordering::Relaxed)
    }

    /// Sets why the last request failed, while the layer is requested again; `None` once bytes arrive.
    pub(super) fn set_trouble(&self, trouble: Option<String>) {
        *self.trouble.lock().expect("no panic while locked") = trouble;
    }

    /// Why the last request failed, while the layer is requested again.
    pub fn trouble(&self) -> Option<String> {
        self.trouble.lock().expect("no panic while locked").clone()
    }

    /// Whether the layer is being opened with no task waiting: this machine has work to do.
    pub(crate) fn is_working(&self) -> bool {
        self.opening.load(Ordering::Relaxed) > 0 && self.waiting.load(Ordering::Relaxed) == 0
    }

    pub(super) fn hit(&self, bytes: usize) {
        self.hits.fetch_add(1, Ordering::Relaxed);
        self.served.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn miss(&self, bytes: usize) {
        self.misses.fetch_add(1, Ordering::Relaxed);
        self.served.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn set_source(&self, source: IndexSource) {
        *self.source.lock().expect("no panic while locked") = source;
    }

    /// The origin of the index.
    pub fn source(&self) -> IndexSource {
        *self.source.lock().expect("no panic while locked")
    }

    /// The present counters, with the digest `layer`. The numbers of local spans are zero.
    pub(crate) fn snapshot(&self, layer: &Digest) -> LayerStatus {
        LayerStatus {
            digest: layer.to_string(),
            size: self.size,
            fetched: self.fetched(),
            fetched_for: self.fetched_for.snapshot(),
            resumed: self.resumed.load(Ordering::Relaxed),
            used: self.used.load(Ordering::Relaxed),
            served: self.served.load(Ordering::Relaxed),
            hits: self.hits.load(Ordering::Relaxed),
            misses: self.misses.load(Ordering::Relaxed),
            requests: self.requests(),
            healed: 0,
            hedges: self.hedges(),
            spans: 0,
            local_spans: 0,
            local: 0,
            index_source: self.source(),
            authority: None,
        }
    }
}

/// Guard that adds one to a counter until it is dropped.
struct Count<'a>(&'a AtomicUsize);

impl<'a> Count<'a> {
    fn up(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Count<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
