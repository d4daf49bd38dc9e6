//! Opening a layer: from the store if it was indexed before, by streaming it once otherwise.

use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::sync::Semaphore;

use super::disk::LayerDisk;
use super::first_pass::{self, Destination, FirstPassError, Indexed};
use super::health::Health;
use super::programs;
use super::race::Origin;
use super::stripes::Ahead;
use super::turn::Turn;
use super::windows::Windows;
use super::{IndexSource, Layer, LayerStats, SpanMemory, Touches};
use crate::blob::retry::backoff;
use crate::blob::{BlobSource, LinkId, Verdict};
use crate::device::{CacheBudget, DataDevice};
use crate::fetch::Lanes;
use crate::index::SpanIndex;
use crate::memory::{Allowance, Charge, OverLimit, TABLES};
use crate::oci::{DiffId, Digest};
use crate::store::{Durability, LayerDir, Partial, Store, StoreError, read_sealed};
use crate::toc::{ExtentTable, PackedToc};

/// Layers streamed side by side. More than the cores need, because many small layers wait for round trips, not for cores.
const PASSES: usize = 8;
/// A patient opening gives a layer up after this many wrong passes, once they have lasted for [`WRONG_TIME`].
const WRONG_PASSES: u32 = 4;
/// Longest fault on the way that a patient opening certainly outlasts. Longer ones delay the error of a layer that is wrong at
/// its source.
const WRONG_TIME: Duration = Duration::from_secs(5);

/// What all layers of a process share.
#[derive(Debug, Clone)]
pub struct LayerContext {
    /// Where indexes and data devices are kept.
    pub store: Store,
    /// Decoded spans in memory.
    pub memory: Arc<SpanMemory>,
    /// What the tables of the image may take beside that.
    pub tables: Arc<Allowance>,
    /// Limit of the data devices.
    pub budget: Arc<CacheBudget>,
    /// What stopped working without stopping the mount.
    pub health: Arc<Health>,
    /// Layers that are streamed are asked for until they come.
    patient: bool,
    passes: Arc<Semaphore>,
    pub(super) windows: Windows,
    pub(super) ahead: Ahead,
    /// Who may send a request now.
    pub lanes: Arc<Lanes>,
}

impl LayerContext {
    /// A context with `memory` bytes for decoded spans and `cache` bytes for data devices.
    pub fn new(store: Store, memory: usize, cache: u64) -> Self {
        let tables = Allowance::new(TABLES + memory as u64);
        Self {
            budget: CacheBudget::new(store.clone(), cache),
            store,
            memory: Arc::new(SpanMemory::new(memory)),
            windows: Windows::new(tables.clone()),
            tables,
            health: Arc::default(),
            patient: false,
            passes: Arc::new(Semaphore::new(PASSES)),
            ahead: Ahead::default(),
            lanes: Arc::default(),
        }
    }

    /// With layers that are streamed asked for until they come, whatever the timeout is: whoever waits for them is told
    /// otherwise when that takes too long.
    pub fn patient(self) -> Self {
        Self { patient: true, ..self }
    }
}

/// Why a layer cannot be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// Streaming it failed.
    #[error(transparent)]
    FirstPass(#[from] FirstPassError),
    /// Its stored table of contents is gone or damaged.
    #[error("layer {layer}: its stored table of contents cannot be read: {reason}")]
    Toc {
        /// Digest of the layer.
        layer: Digest,
        /// What is wrong.
        reason: String,
    },
    /// Its tables take more memory than the image may.
    #[error("layer {layer}: its tables take {source}")]
    TooMuchMemory {
        /// Digest of the layer.
        layer: Digest,
        /// The limit.
        source: OverLimit,
    },
    /// The program is shutting down.
    #[error("interrupted")]
    Interrupted,
}

/// An open layer.
#[derive(Debug)]
pub struct Opened {
    /// The layer.
    pub layer: Arc<Layer>,
    /// Its table of contents and the memory it takes, if the store does not have it ([`stored_toc`]).
    pub toc: Option<(PackedToc, Charge)>,
}

/// Opens a layer. One process at a time streams it; others wait for that one's index.
pub async fn open(
    context: &LayerContext,
    blob: Arc<dyn BlobSource>,
    diff_id: DiffId,
    stats: Arc<LayerStats>,
) -> Result<Opened, OpenError> {
    let opening = open_or_stream(context, blob, diff_id, stats.clone());
    stats.opening(opening).await
}

async fn open_or_stream(
    context: &LayerContext,
    blob: Arc<dyn BlobSource>,
    diff_id: DiffId,
    stats: Arc<LayerStats>,
) -> Result<Opened, OpenError> {
    let dir = context.store.layer(blob.digest());
    if let Some(opened) = from_store(context, &dir, &blob, &diff_id, &stats).await? {
        return Ok(opened);
    }
    let (dir, turn) = match dir.filter(|_| context.store.is_writable()) {
        None => (None, None),
        Some(dir) => match Turn::wait(&dir, &stats).await {
            Ok(turn) => (Some(dir), turn),
            Err(error) => {
                context.health.store_lost(&error);
                (None, None)
            }
        },
    };
    if let Some(opened) = from_store(context, &dir, &blob, &diff_id, &stats).await? {
        return Ok(opened);
    }
    let link = blob.clone();
    let streaming = stream(context, blob, diff_id, dir, stats.clone());
    match turn {
        Some(turn) => turn.take(&stats, || link.link().useful_rate(), streaming).await,
        None => streaming.await,
    }
}

/// Streams the layer once and keeps what that makes.
async fn stream(
    context: &LayerContext,
    blob: Arc<dyn BlobSource>,
    diff_id: DiffId,
    dir: Option<LayerDir>,
    stats: Arc<LayerStats>,
) -> Result<Opened, OpenError> {
    // Not before the layer's lock: whoever waits for another process must not keep this one from its other layers.
    let _permit = stats
        .waiting(context.passes.acquire())
        .await
        .map_err(|_| OpenError::Interrupted)?;
    let origin = Origin {
        blob: blob.clone(),
        lanes: context.lanes.clone(),
        stats: stats.clone(),
        patient: context.patient,
    };
    let mut wrong = Wrong::new(context.patient);
    let (mut indexed, partial) = loop {
        let partial = match &dir {
            // What is on a local disk need not be kept twice.
            Some(dir) if blob.link().id != LinkId::LOCAL => kept(dir, blob.size()).await?,
            _ => None,
        };
        let resumes = partial.as_ref().is_some_and(|partial| partial.start() > 0);
        let destination = dir.clone().map(|dir| Destination {
            store: context.store.clone(),
            dir,
            budget: context.budget.clone(),
            partial: partial.clone(),
        });
        let pass = first_pass::run(origin.clone(), diff_id.clone(), context, destination);
        let error = match pass.await {
            Ok(indexed) => break (indexed, partial),
            Err(error) => error,
        };
        let discarded = match partial {
            Some(partial) if !error.is_resumable() => partial.discard(),
            _ => true,
        };
        if !error.is_corruption() || resumes && !discarded {
            return Err(error.into());
        }
        // Kept bytes may be damaged. That costs one more pass, and says nothing about the bytes that come next.
        let delay = match resumes {
            true => Duration::ZERO,
            false => {
                blob.judged(Verdict::Wrong);
                match wrong.again() {
                    None => return Err(error.into()),
                    Some(delay) => delay,
                }
            }
        };
        tracing::warn!(%error, "streaming the layer once more");
        if !delay.is_zero() {
            stats.set_trouble(Some(error.to_string()));
            stats.waiting(tokio::time::sleep(delay)).await;
        }
    };
    stats.set_trouble(None);
    stats.set_source(IndexSource::Streamed);
    let context = context.clone();
    let keeping = tokio::task::spawn_blocking(move || {
        let mut kept = false;
        if let Some(dir) = &dir {
            match keep(&context.store, dir, &indexed) {
                Ok(()) => kept = true,
                Err(error) => context.health.store_failed(&error),
            }
            match indexed.device_error.take() {
                Some(error) => context.health.store_lost(&error),
                // The layer is larger than the cache may be: it fills with what is read.
                None if indexed.device.is_none() => {
                    let opened = DataDevice::open(&context.store, dir, &indexed.index, &indexed.extents);
                    indexed.device = opened.map_err(|error| context.health.store_lost(&error)).ok();
                }
                None => {}
            }
        }
        if let Some(partial) = partial {
            // It may be large, and nobody needs to wait until the disk has forgotten it.
            tokio::task::spawn_blocking(move || partial.discard());
        }
        let Indexed {
            index,
            toc,
            extents,
            charges,
            device,
            ..
        } = indexed;
        let [mut charge, mut toc_charge] = charges;
        let of_toc = if kept { 0 } else { toc.bytes() };
        let covered = toc_charge
            .exactly(of_toc as u64)
            .and_then(|()| charge.exactly(tables_of(&index, &extents)));
        covered.map_err(too_much(blob.digest()))?;
        let layer = layer(&context, &dir, blob, (index, extents, charge), device, stats);
        if dir.is_some() && layer.keeps() {
            let found = programs::look(&toc, &layer);
            if let Err(error) = programs::keep(&context.store, layer.digest(), found) {
                context.health.store_failed(&error);
            }
        }
        Ok(Opened {
            layer,
            toc: (!kept).then_some((toc, toc_charge)),
        })
    });
    keeping.await.map_err(|_| OpenError::Interrupted)?
}

/// Decides when to stream a layer again whose bytes were wrong.
///
/// Bytes that were damaged on the way are seldom damaged twice. If they are, the fault may last for a moment, and a patient
/// opening waits until it is over. If the bytes stay wrong, they are wrong at the source, and the layer is given up.
struct Wrong {
    patient: bool,
    passes: u32,
    /// When the first wrong pass ended.
    since: Option<Instant>,
}

impl Wrong {
    fn new(patient: bool) -> Self {
        Self {
            patient,
            passes: 0,
            since: None,
        }
    }

    /// Counts a wrong pass. Returns how long to wait before the next one, or `None` if the layer is given up.
    fn again(&mut self) -> Option<Duration> {
        let since = *self.since.get_or_insert_with(Instant::now);
        self.passes += 1;
        match self.passes {
            1 => Some(Duration::ZERO),
            _ if !self.patient => None,
            passes if passes < WRONG_PASSES || since.elapsed() < WRONG_TIME => {
                Some(backoff(passes - 1, fastrand::f64()))
            }
            _ => None,
        }
    }
}

/// Memory of a layer's tables while it is open.
fn tables_of(index: &SpanIndex, extents: &ExtentTable) -> u64 {
    index.bytes_of_spans() + extents.bytes().len() as u64
}

fn too_much(layer: &Digest) -> impl Fn(OverLimit) -> OpenError {
    let layer = layer.clone();
    move |source| OpenError::TooMuchMemory {
        layer: layer.clone(),
        source,
    }
}

/// Opens the bytes that interrupted passes kept of a layer. None if another process uses them.
async fn kept(dir: &LayerDir, size: u64) -> Result<Option<Partial>, OpenError> {
    let dir = dir.clone();
    let opening = tokio::task::spawn_blocking(move || {
        Partial::open(&dir, size).unwrap_or_else(|error| {
            tracing::warn!(%error, "keeping nothing of this layer before it is whole");
            None
        })
    });
    opening.await.map_err(|_| OpenError::Interrupted)
}

fn layer(
    context: &LayerContext,
    dir: &Option<LayerDir>,
    blob: Arc<dyn BlobSource>,
    (index, extents, charge): (SpanIndex, ExtentTable, Charge),
    device: Option<DataDevice>,
    stats: Arc<LayerStats>,
) -> Arc<Layer> {
    let touches = Touches::new(index.len());
    let (budget, health) = (context.budget.clone(), context.health.clone());
    let disk = LayerDisk::new(blob.digest().clone(), device, budget, health, stats.clone());
    Arc::new(Layer {
        blob,
        index,
        extents,
        disk,
        _charge: charge,
        home: dir.clone().map(|dir| (context.store.clone(), dir)),
        memory: context.memory.clone(),
        health: context.health.clone(),
        lanes: context.lanes.clone(),
        ahead: context.ahead.clone(),
        windows: context.windows.clone(),
        flights: Arc::default(),
        touches,
        readahead: Mutex::default(),
        recorder: OnceLock::new(),
        runtime: Handle::current(),
        stats,
    })
}

/// The layer as it was indexed before, if all of that is there. Reads and hashes files, so not on the runtime's threads.
async fn from_store(
    context: &LayerContext,
    dir: &Option<LayerDir>,
    blob: &Arc<dyn BlobSource>,
    diff_id: &DiffId,
    stats: &Arc<LayerStats>,
) -> Result<Option<Opened>, OpenError> {
    let Some(dir) = dir.clone() else { return Ok(None) };
    let (context, blob) = (context.clone(), blob.clone());
    let (diff_id, stats) = (diff_id.clone(), stats.clone());
    let loading = tokio::task::spawn_blocking(move || load(&context, &dir, blob, &diff_id, stats));
    loading.await.map_err(|_| OpenError::Interrupted)?
}

fn load(
    context: &LayerContext,
    dir: &LayerDir,
    blob: Arc<dyn BlobSource>,
    diff_id: &DiffId,
    stats: Arc<LayerStats>,
) -> Result<Option<Opened>, OpenError> {
    let Some((index, extents)) = stored_index(dir, blob.digest()) else {
        return Ok(None);
    };
    if index.diff_id().0.algorithm() != diff_id.0.algorithm() {
        // Nothing can be said without another pass.
        return Ok(None);
    }
    if index.diff_id() != diff_id {
        // What the blob unpacks to is known from a pass that verified it, so this image's config is wrong.
        return Err(OpenError::FirstPass(FirstPassError::DiffId {
            layer: blob.digest().clone(),
            expected: diff_id.clone(),
            actual: index.diff_id().0.clone(),
        }));
    }
    let device = match DataDevice::open(&context.store, dir, &index, &extents) {
        Ok(device) => Some(device),
        Err(error) => {
            context.health.store_lost(&error);
            None
        }
    };
    // A process that was killed right after it had indexed the layer left this.
    if context.store.is_writable()
        && let Err(error) = dir.remove_partial()
    {
        tracing::debug!(%error, "cannot remove what was kept of a layer that is indexed now");
    }
    let mut charge = context.tables.charge();
    charge
        .exactly(tables_of(&index, &extents))
        .map_err(too_much(blob.digest()))?;
    stats.set_source(IndexSource::Store);
    let dir = Some(dir.clone());
    let layer = layer(context, &dir, blob, (index, extents, charge), device, stats);
    Ok(Some(Opened { layer, toc: None }))
}

/// The index of a layer as it is stored, if all of that is there and sound.
pub fn stored_index(dir: &LayerDir, layer: &Digest) -> Option<(SpanIndex, ExtentTable)> {
    let unusable = |what: &str, error: &dyn std::fmt::Display| {
        tracing::warn!(%layer, %error, "cannot use the stored {what}, making it again");
    };
    let read = |path: std::path::PathBuf| {
        let read = read_sealed(&path).map_err(|error| unusable("index", &error));
        read.ok().flatten()
    };
    let index = SpanIndex::open(read(dir.spans())?)
        .map_err(|e| unusable("span index", &e))
        .ok()?;
    let extents = ExtentTable::open(read(dir.extents())?)
        .map_err(|e| unusable("extent table", &e))
        .ok()?;
    // A table of another layer might name bytes that this one does not have.
    let within = extents.tar_end() <= index.tar_size();
    (index.blob_digest() == layer && within && dir.toc().exists()).then_some((index, extents))
}

/// Publishes what a pass made. The span index comes last: it is what [`from_store`] looks for first.
fn keep(store: &Store, dir: &LayerDir, indexed: &Indexed) -> Result<(), StoreError> {
    let lazy = Durability::Lazy;
    store.publish_sealed(&dir.toc(), lazy, |mut file| indexed.toc.write(&mut file))?;
    store.publish_sealed(&dir.extents(), lazy, |mut file| indexed.extents.encode(&mut file))?;
    store.publish_sealed(&dir.spans(), lazy, |mut file| indexed.index.write(&mut file))
}

/// The table of contents of a layer that was indexed before.
pub fn stored_toc(store: &Store, digest: &Digest) -> Result<PackedToc, OpenError> {
    let lost = |reason: String| OpenError::Toc {
        layer: digest.clone(),
        reason,
    };
    let dir = store
        .layer(digest)
        .ok_or_else(|| lost("there is no store".to_owned()))?;
    let bytes = read_sealed(&dir.toc()).map_err(|e| lost(e.to_string()))?;
    let bytes = bytes.ok_or_else(|| lost("it is gone".to_owned()))?;
    PackedToc::open(bytes).map_err(|e| lost(e.to_string()))
}
