//! Indexes of layers in the store: opening a layer from one, and keeping a new one.

use std::sync::Arc;

use super::data::{LayerContext, LayerData};
use super::disk::LayerDisk;
use super::first_pass::FirstPassError;
use super::opening::{OpenError, Opened, too_much};
use super::regions::Regions;
use super::{IndexSource, Layer, LayerStats};
use crate::blob::BlobSource;
use crate::device::DataDevice;
use crate::index::SpanIndex;
use crate::memory::Charge;
use crate::oci::{DiffId, Digest};
use crate::span::{ChunkSpans, IndexedSpans, SpanMap};
use crate::store::{Authority, Durability, IndexName, LayerDir, Store, StoreError, read_sealed};
use crate::task::joined;
use crate::toc::{ChunkTable, ExtentTable, PackedToc};

/// An index of a layer, and who vouches for it.
#[derive(Debug, Clone)]
pub(super) struct LayerIndex {
    pub(super) authority: Authority,
    pub(super) name: IndexName,
    /// Its directory, if there is a store.
    pub(super) dir: Option<LayerDir>,
}

impl LayerIndex {
    pub(super) fn new(store: &Store, layer: &Digest, authority: Authority) -> Self {
        let name = IndexName::new(layer, &authority);
        Self {
            dir: store.index(&name),
            name,
            authority,
        }
    }

    /// Makes the data of a layer with this index. The charge is for the memory of the spans.
    pub(super) fn data(
        &self,
        context: &LayerContext,
        diff_id: DiffId,
        (spans, charge): (Box<dyn SpanMap>, Charge),
        device: Option<DataDevice>,
    ) -> LayerData {
        let digest = spans.layer().clone();
        LayerData {
            disk: LayerDisk::new(digest.clone(), device, context.budget.clone(), context.health.clone()),
            digest,
            diff_id,
            index: self.name.clone(),
            authority: self.authority.clone(),
            regions: Regions::new(spans.device_size()),
            spans,
            _charge: charge,
            home: self.dir.clone(),
            context: context.clone(),
            flights: Arc::default(),
        }
    }
}

/// Opens a layer from a stored index, if that is complete. Reads and hashes files, so it runs on a blocking thread.
pub(super) async fn from_store(
    context: &LayerContext,
    known: &LayerIndex,
    blob: &Arc<dyn BlobSource>,
    diff_id: &DiffId,
    stats: &Arc<LayerStats>,
) -> Result<Option<Opened>, OpenError> {
    if known.dir.as_ref().is_none_or(|dir| !dir.is_indexed()) {
        return Ok(None);
    }
    let (context, blob, known) = (context.clone(), blob.clone(), known.clone());
    let (diff_id, stats) = (diff_id.clone(), stats.clone());
    let loading = tokio::task::spawn_blocking(move || load(&context, &known, blob, &diff_id, stats));
    joined(loading).await?
}

fn load(
    context: &LayerContext,
    known: &LayerIndex,
    blob: Arc<dyn BlobSource>,
    diff_id: &DiffId,
    stats: Arc<LayerStats>,
) -> Result<Option<Opened>, OpenError> {
    let Some(dir) = &known.dir else { return Ok(None) };
    let Some(spans) = stored_spans(dir, blob.digest()) else {
        return Ok(None);
    };
    let stated = spans.index().diff_id();
    if stated.0.algorithm() != diff_id.0.algorithm() {
        // The diffIDs cannot be compared without another pass.
        return Ok(None);
    }
    if stated != diff_id {
        if known.authority != Authority::Pass {
            tracing::warn!(layer = %blob.digest(), authority = %known.authority, "not using an index that states another diffID than the image");
            return Ok(None);
        }
        // A verified pass found the stored diffID, so this image's config is wrong.
        return Err(OpenError::FirstPass(FirstPassError::DiffId {
            layer: blob.digest().clone(),
            expected: diff_id.clone(),
            actual: stated.0.clone(),
        }));
    }
    let mut charge = context.tables.charge();
    charge.exactly(spans.memory()).map_err(too_much(blob.digest()))?;
    let layer = open_device(context, known, dir, blob, diff_id, (Box::new(spans), charge), stats);
    layer.stats().set_source(IndexSource::Store);
    Ok(Some(Opened { layer, toc: None }))
}

/// Opens the device of a layer whose index is in the store, and shares the layer. The charge is for the memory of the
/// spans.
pub(super) fn open_device(
    context: &LayerContext,
    known: &LayerIndex,
    dir: &LayerDir,
    blob: Arc<dyn BlobSource>,
    diff_id: &DiffId,
    (spans, charge): (Box<dyn SpanMap>, Charge),
    stats: Arc<LayerStats>,
) -> Arc<Layer> {
    let device = match DataDevice::open(&context.store, dir, &*spans) {
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
    let data = known.data(context, diff_id.clone(), (spans, charge), device);
    Layer::new(context.shared.share(data), blob, stats)
}

/// Reads the stored spans of a layer. `None` if a part of the index is missing or damaged.
pub(super) fn stored_spans(dir: &LayerDir, layer: &Digest) -> Option<IndexedSpans> {
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

/// Reads the stored spans of a layer, whichever kind of index they come from. `None` if a part of the index is missing or
/// damaged.
pub(crate) fn stored_map(dir: &LayerDir, layer: &Digest) -> Option<Box<dyn SpanMap>> {
    if let Some(spans) = stored_chunks(dir, layer) {
        return Some(Box::new(spans));
    }
    Some(Box::new(stored_spans(dir, layer)?))
}

/// Reads the stored chunks of a layer that carries a table. `None` if there is no such index, or a part of it is missing
/// or damaged.
pub(super) fn stored_chunks(dir: &LayerDir, layer: &Digest) -> Option<ChunkSpans> {
    let unusable = |error: &dyn std::fmt::Display| {
        tracing::warn!(%layer, %error, "cannot use the stored chunk table, making it again");
    };
    let read = |path: std::path::PathBuf| read_sealed(&path).map_err(|error| unusable(&error)).ok().flatten();
    let bytes = read(dir.spans()).filter(|bytes| ChunkTable::is_table(bytes))?;
    let table = ChunkTable::open(&bytes).map_err(|error| unusable(&error)).ok()?;
    let extents = ExtentTable::open(read(dir.extents())?);
    let extents = extents.map_err(|error| unusable(&error)).ok()?;
    let spans = ChunkSpans::new(layer.clone(), table, extents);
    if spans.is_none() {
        unusable(&"its extents are of another layer");
    }
    spans.filter(|_| dir.toc().exists())
}

/// Publishes an index that is a chunk table. The chunk table comes last, because [`from_store`] looks for it first.
pub(super) fn keep_chunks(
    store: &Store,
    dir: &LayerDir,
    spans: &ChunkSpans,
    toc: &PackedToc,
) -> Result<(), StoreError> {
    let lazy = Durability::Lazy;
    store.publish_sealed(&dir.toc(), lazy, |mut file| toc.write(&mut file))?;
    store.publish_sealed(&dir.extents(), lazy, |mut file| spans.extents().encode(&mut file))?;
    store.publish_sealed(&dir.spans(), lazy, |mut file| spans.table().write(&mut file))
}

/// Publishes an index. The span index comes last, because [`from_store`] looks for it first.
pub(super) fn keep(store: &Store, dir: &LayerDir, spans: &IndexedSpans, toc: &PackedToc) -> Result<(), StoreError> {
    let lazy = Durability::Lazy;
    store.publish_sealed(&dir.toc(), lazy, |mut file| toc.write(&mut file))?;
    store.publish_sealed(&dir.extents(), lazy, |mut file| spans.extents().encode(&mut file))?;
    store.publish_sealed(&dir.spans(), lazy, |mut file| spans.index().write(&mut file))
}

/// Reads the stored table of contents of a layer from the directory of an index. Fails if there is no store.
pub fn stored_toc(layer: &Digest, dir: Option<&LayerDir>) -> Result<PackedToc, OpenError> {
    let lost = |reason: String| OpenError::Toc {
        layer: layer.clone(),
        reason,
    };
    let dir = dir.ok_or_else(|| lost("there is no store".to_owned()))?;
    let bytes = read_sealed(&dir.toc()).map_err(|e| lost(e.to_string()))?;
    let bytes = bytes.ok_or_else(|| lost("it is gone".to_owned()))?;
    PackedToc::open(bytes).map_err(|e| lost(e.to_string()))
}
