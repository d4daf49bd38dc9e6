//! Opens a layer: from the store if the layer was indexed before, otherwise by streaming the layer once.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::data::{LayerContext, LayerData};
use super::disk::LayerDisk;
use super::first_pass::{self, Destination, FirstPassError, Indexed};
use super::programs;
use super::race::Origin;
use super::regions::Regions;
use super::turn::Turn;
use super::{IndexSource, Layer, LayerStats};
use crate::blob::retry::backoff;
use crate::blob::{BlobSource, LinkId, Verdict};
use crate::device::DataDevice;
use crate::index::SpanIndex;
use crate::memory::{Charge, OverLimit};
use crate::oci::{DiffId, Digest};
use crate::span::{IndexedSpans, SpanMap};
use crate::store::{Durability, LayerDir, Partial, Store, StoreError, read_sealed};
use crate::task::{TaskError, joined};
use crate::toc::{ExtentTable, PackedToc};

/// A patient opening gives a layer up after this many wrong passes, if they also took at least [`WRONG_TIME`].
const WRONG_PASSES: u32 = 4;
/// See [`WRONG_PASSES`].
const WRONG_TIME: Duration = Duration::from_secs(5);

/// Why a layer cannot be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The first pass over the layer failed.
    #[error(transparent)]
    FirstPass(#[from] FirstPassError),
    /// The layer's stored table of contents is gone or damaged.
    #[error("layer {layer}: its stored table of contents cannot be read: {reason}")]
    Toc {
        /// Digest of the layer.
        layer: Digest,
        /// What is wrong with the table.
        reason: String,
    },
    /// The layer's tables take more memory than the image is allowed.
    #[error("layer {layer}: its tables take {source}")]
    TooMuchMemory {
        /// Digest of the layer.
        layer: Digest,
        /// The limit.
        source: OverLimit,
    },
    /// Opening the layer was interrupted.
    #[error("cannot open a layer: {0}")]
    Task(#[from] TaskError),
}

/// An open layer.
#[derive(Debug)]
pub struct Opened {
    /// The layer.
    pub layer: Arc<Layer>,
    /// The layer's table of contents and its memory charge, if the store does not have the table ([`stored_toc`]).
    pub toc: Option<(PackedToc, Charge)>,
}

/// Opens a layer. One process at a time streams it; other processes wait for the index that this process makes.
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
    if let Some(data) = context.shared.get(blob.digest())
        && data.diff_id == diff_id
    {
        stats.set_source(IndexSource::Store);
        return Ok(Opened {
            layer: Layer::new(data, blob, stats),
            toc: None,
        });
    }
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

/// Streams the layer once, and keeps its index and data device.
async fn stream(
    context: &LayerContext,
    blob: Arc<dyn BlobSource>,
    diff_id: DiffId,
    dir: Option<LayerDir>,
    stats: Arc<LayerStats>,
) -> Result<Opened, OpenError> {
    // The permit is taken after the layer's lock. Otherwise a layer that waits for another process would keep this
    // process from its other layers.
    let _permit = stats
        .waiting(context.passes.acquire())
        .await
        .expect("no code closes the semaphore");
    let origin = Origin {
        blob: blob.clone(),
        lanes: context.lanes.clone(),
        stats: stats.clone(),
        patient: context.patient,
    };
    let mut wrong = Wrong::new(context.patient);
    let (mut indexed, partial) = loop {
        let partial = match &dir {
            // A blob on a local disk need not be kept a second time.
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
        // Kept bytes may be damaged. That costs one more pass and says nothing about the bytes that come next.
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
                // The content does not fit into the cache. The device fills with the spans that are read.
                None if indexed.device.is_none() => {
                    let opened = DataDevice::open(&context.store, dir, &indexed.spans);
                    indexed.device = opened.map_err(|error| context.health.store_lost(&error)).ok();
                }
                None => {}
            }
        }
        if let Some(partial) = partial {
            // Deleting a large file takes time, which the opening does not wait for.
            tokio::task::spawn_blocking(move || partial.discard());
        }
        let Indexed {
            spans,
            toc,
            charges,
            device,
            ..
        } = indexed;
        let [mut charge, mut toc_charge] = charges;
        let of_toc = if kept { 0 } else { toc.bytes() };
        let covered = toc_charge
            .exactly(of_toc as u64)
            .and_then(|()| charge.exactly(spans.memory()));
        covered.map_err(too_much(blob.digest()))?;
        let diff_id = spans.index().diff_id().clone();
        let data = data(&context, &dir, diff_id, (Box::new(spans), charge), device);
        let layer = Layer::new(
            if kept {
                context.shared.share(data)
            } else {
                Arc::new(data)
            },
            blob,
            stats,
        );
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
    joined(keeping).await?
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

fn too_much(layer: &Digest) -> impl Fn(OverLimit) -> OpenError {
    let layer = layer.clone();
    move |source| OpenError::TooMuchMemory {
        layer: layer.clone(),
        source,
    }
}

/// Opens the bytes of a layer that interrupted passes kept, unless another process uses them.
async fn kept(dir: &LayerDir, size: u64) -> Result<Option<Partial>, OpenError> {
    let dir = dir.clone();
    let opening = tokio::task::spawn_blocking(move || {
        Partial::open(&dir, size).unwrap_or_else(|error| {
            tracing::warn!(%error, "keeping nothing of this layer before it is whole");
            None
        })
    });
    Ok(joined(opening).await?)
}

fn data(
    context: &LayerContext,
    dir: &Option<LayerDir>,
    diff_id: DiffId,
    (spans, charge): (Box<dyn SpanMap>, Charge),
    device: Option<DataDevice>,
) -> LayerData {
    let digest = spans.layer().clone();
    LayerData {
        disk: LayerDisk::new(digest.clone(), device, context.budget.clone(), context.health.clone()),
        digest,
        diff_id,
        regions: Regions::new(spans.device_size()),
        spans,
        _charge: charge,
        home: dir.clone(),
        context: context.clone(),
        flights: Arc::default(),
    }
}

/// Opens the layer from its stored index, if that is complete. Reads and hashes files, so it runs on a blocking
/// thread.
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
    joined(loading).await?
}

fn load(
    context: &LayerContext,
    dir: &LayerDir,
    blob: Arc<dyn BlobSource>,
    diff_id: &DiffId,
    stats: Arc<LayerStats>,
) -> Result<Option<Opened>, OpenError> {
    let Some(spans) = stored_spans(dir, blob.digest()) else {
        return Ok(None);
    };
    let known = spans.index().diff_id();
    if known.0.algorithm() != diff_id.0.algorithm() {
        // The diffIDs cannot be compared without another pass.
        return Ok(None);
    }
    if known != diff_id {
        // A verified pass found the stored diffID, so this image's config is wrong.
        return Err(OpenError::FirstPass(FirstPassError::DiffId {
            layer: blob.digest().clone(),
            expected: diff_id.clone(),
            actual: known.0.clone(),
        }));
    }
    let device = match DataDevice::open(&context.store, dir, &spans) {
        Ok(device) => Some(device),
        Err(error) => {
            context.health.store_lost(&error);
            None
        }
    };
    // The partial remains if a process was killed right after it had indexed the layer.
    if context.store.is_writable()
        && let Err(error) = dir.remove_partial()
    {
        tracing::debug!(%error, "cannot remove what was kept of a layer that is indexed now");
    }
    let mut charge = context.tables.charge();
    charge.exactly(spans.memory()).map_err(too_much(blob.digest()))?;
    stats.set_source(IndexSource::Store);
    let data = data(
        context,
        &Some(dir.clone()),
        diff_id.clone(),
        (Box::new(spans), charge),
        device,
    );
    let layer = Layer::new(context.shared.share(data), blob, stats);
    Ok(Some(Opened { layer, toc: None }))
}

/// Reads the stored spans of a layer. `None` if a part of the index is missing or damaged.
pub(crate) fn stored_spans(dir: &LayerDir, layer: &Digest) -> Option<IndexedSpans> {
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
    // A table of another layer might name bytes beyond the end of this layer.
    let within = extents.tar_end() <= index.tar_size();
    (index.blob_digest() == layer && within && dir.toc().exists()).then(|| IndexedSpans::new(index, extents))
}

/// Publishes the index that a pass made. The span index comes last, because [`from_store`] looks for it first.
fn keep(store: &Store, dir: &LayerDir, indexed: &Indexed) -> Result<(), StoreError> {
    let lazy = Durability::Lazy;
    store.publish_sealed(&dir.toc(), lazy, |mut file| indexed.toc.write(&mut file))?;
    store.publish_sealed(&dir.extents(), lazy, |mut file| {
        indexed.spans.extents().encode(&mut file)
    })?;
    store.publish_sealed(&dir.spans(), lazy, |mut file| indexed.spans.index().write(&mut file))
}

/// Reads the stored table of contents of a layer.
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
