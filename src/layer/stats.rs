//! Counters of one layer, shared with whoever reports them.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use serde::{Deserialize, Serialize};

use crate::oci::Digest;

/// Where a layer's index came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IndexSource {
    /// Not there yet.
    Pending,
    /// Made by this process while streaming the layer.
    Streamed,
    /// Found in the store.
    Store,
}

/// Counters of a layer; all monotonic.
#[derive(Debug)]
pub struct LayerStats {
    /// Compressed size of the layer in bytes.
    pub size: u64,
    fetched: AtomicU64,
    resumed: AtomicU64,
    used: AtomicU64,
    served: AtomicU64,
    hits: AtomicU64,
    misses: AtomicU64,
    requests: AtomicU64,
    hedges: AtomicU64,
    /// Spans that were fetched.
    landed: AtomicU64,
    /// While the layer is opened: tasks that do so, and those of them that wait for somebody else.
    opening: AtomicUsize,
    waiting: AtomicUsize,
    /// Seconds in which another process that streams the layer got on.
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
    /// Compressed bytes that this mount found in the store when it streamed the layer: an earlier try had fetched them.
    #[serde(default)]
    pub resumed: u64,
    /// Compressed bytes of the spans that were read by this mount, wherever they came from.
    pub used: u64,
    /// Bytes served to readers by this mount.
    pub served: u64,
    /// Reads answered without waiting.
    pub hits: u64,
    /// Reads that had to wait.
    pub misses: u64,
    /// Ranged or whole requests made for the blob.
    pub requests: u64,
    /// Requests, of those, that were made because an earlier one was far too slow.
    #[serde(default)]
    pub hedges: u64,
    /// Spans that were damaged on the local device and are there again; a device that was made anew counts as one. All mounts of
    /// the process share the device and the number.
    #[serde(default)]
    pub healed: u64,
    /// Spans in the layer; 0 until the index is there.
    pub spans: u32,
    /// Spans on the local device.
    pub local_spans: u32,
    /// Compressed bytes of those.
    pub local: u64,
    /// Where the index came from.
    pub index_source: IndexSource,
}

/// Compressed bytes that have come in and that are expected, over all layers. What the store has is not expected.
pub fn progress(layers: &[LayerStatus]) -> (u64, u64) {
    let coming = layers
        .iter()
        .filter(|l| l.index_source != IndexSource::Store || l.fetched > 0);
    coming.fold((0, 0), |(done, total), l| {
        (done + l.fetched + l.resumed, total + l.size)
    })
}

impl LayerStats {
    /// Zero counters of a layer of `size` compressed bytes.
    pub fn new(size: u64) -> Self {
        Self {
            size,
            fetched: AtomicU64::new(0),
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

    /// Compressed bytes fetched.
    pub fn fetched(&self) -> u64 {
        self.fetched.load(Ordering::Relaxed)
    }

    /// Requests made.
    pub(super) fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    pub(super) fn fetched_more(&self, bytes: usize) {
        self.fetched.fetch_add(bytes as u64, Ordering::Relaxed);
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

    /// Spans that were fetched and were what they should be.
    pub fn spans_landed(&self) -> u64 {
        self.landed.load(Ordering::Relaxed)
    }

    /// A request is made once more, because it is too slow.
    pub(super) fn hedged(&self) {
        self.request();
        self.hedges.fetch_add(1, Ordering::Relaxed);
    }

    /// Requests made because an earlier one was too slow.
    pub fn hedges(&self) -> u64 {
        self.hedges.load(Ordering::Relaxed)
    }

    /// Opens the layer by `work`.
    pub(super) async fn opening<T>(&self, work: impl Future<Output = T>) -> T {
        let _count = Count::up(&self.opening);
        work.await
    }

    /// Opening the layer needs something from somebody else: bytes, or another process.
    pub(super) async fn waiting<T>(&self, work: impl Future<Output = T>) -> T {
        let _count = Count::up(&self.waiting);
        work.await
    }

    /// Another process that streams the layer has shown that it gets on.
    pub(super) fn beat(&self) {
        self.beats.fetch_add(1, Ordering::Relaxed);
    }

    /// How often another process that streams the layer has shown that it gets on.
    pub fn beats(&self) -> u64 {
        self.beats.load(Ordering::Relaxed)
    }

    /// Why the layer did not come, if it is asked for again.
    pub(super) fn set_trouble(&self, trouble: Option<String>) {
        *self.trouble.lock().expect("no panic while locked") = trouble;
    }

    /// Why the layer did not come, if it is asked for again.
    pub fn trouble(&self) -> Option<String> {
        self.trouble.lock().expect("no panic while locked").clone()
    }

    /// Whether the layer is being opened and waits for nobody: this machine has to do something.
    pub fn is_working(&self) -> bool {
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

    /// Where the index came from.
    pub fn source(&self) -> IndexSource {
        *self.source.lock().expect("no panic while locked")
    }

    /// The counters now, as those of the layer with this digest, of which nothing is known to be here.
    pub fn snapshot(&self, layer: &Digest) -> LayerStatus {
        LayerStatus {
            digest: layer.to_string(),
            size: self.size,
            fetched: self.fetched(),
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
        }
    }
}

/// One more, until dropped.
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
