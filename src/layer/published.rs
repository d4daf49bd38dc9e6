//! Opens a layer with an index that somebody else has made.

use super::data::LayerContext;
use super::opening::{OpenError, Opened, ToOpen, too_much};
use super::stored::{LayerIndex, keep, open_device};
use super::{IndexSource, Layer};
use crate::index::SpanIndex;
use crate::oci::{DiffId, Digest};
use crate::published::{FoundIndex, IndexFile};
use crate::span::IndexedSpans;
use crate::store::{Durability, StoreError};
use crate::task::joined;
use crate::toc::PackedToc;

/// Opens a layer with an index that was found, and keeps the index. None if the index cannot be used: the layer is then
/// streamed.
pub(super) async fn open_found(
    context: &LayerContext,
    to_open: &ToOpen,
    found: FoundIndex,
) -> Result<Option<Opened>, OpenError> {
    let context = context.clone();
    let (blob, diff_id, stats) = (to_open.blob.clone(), to_open.diff_id.clone(), to_open.stats.clone());
    let opening = tokio::task::spawn_blocking(move || {
        let layer = blob.digest().clone();
        let (spans, toc) = match parts(&found.file, &layer, &diff_id) {
            Ok(parts) => parts,
            Err(reason) => {
                tracing::warn!(%layer, place = found.place, reason, "not using an index, streaming the layer");
                return Ok(None);
            }
        };
        let index = LayerIndex::new(&context.store, &layer, found.authority);
        let mut charge = context.tables.charge();
        charge.exactly(spans.memory()).map_err(too_much(&layer))?;
        let mut kept = false;
        if context.store.is_writable()
            && let Some(dir) = &index.dir
        {
            let keeping = || {
                context.store.note_authority(dir, &index.authority)?;
                if !found.file.programs.is_empty() {
                    let programs = &found.file.programs;
                    let write = |out: &mut dyn std::io::Write| out.write_all(programs);
                    context.store.publish_sealed(&dir.programs(), Durability::Lazy, write)?;
                }
                keep(&context.store, dir, &spans, &toc)
            };
            match keeping() {
                Ok(()) => kept = true,
                Err(error @ StoreError::Io { .. }) => context.health.store_failed(&error),
                Err(error) => context.health.store_lost(&error),
            }
        }
        let mut toc_charge = context.tables.charge();
        let layer = match index.dir.as_ref().filter(|_| kept) {
            Some(dir) => open_device(&context, &index, dir, blob, &diff_id, (Box::new(spans), charge), stats),
            None => {
                toc_charge.exactly(toc.bytes() as u64).map_err(too_much(&layer))?;
                let index = LayerIndex { dir: None, ..index };
                Layer::new(
                    index.data(&context, diff_id, (Box::new(spans), charge), None).into(),
                    blob,
                    stats,
                )
            }
        };
        layer.stats().set_source(IndexSource::Location);
        Ok(Some(Opened {
            layer,
            toc: (!kept).then_some((toc, toc_charge)),
        }))
    });
    joined(opening).await?
}

/// Reads the parts of an index, and checks that they belong together and to the layer.
fn parts(file: &IndexFile, layer: &Digest, diff_id: &DiffId) -> Result<(IndexedSpans, PackedToc), String> {
    if file.diff_id != *diff_id {
        return Err("it states another diffID than the image".to_owned());
    }
    let index = SpanIndex::open(file.spans.clone()).map_err(|error| error.to_string())?;
    let same = index.blob_digest() == layer && index.diff_id() == diff_id && index.blob_size() == file.size;
    if !same {
        return Err("its spans are of another layer".to_owned());
    }
    let toc = PackedToc::open(file.toc.clone()).map_err(|error| error.to_string())?;
    let extents = toc.extent_table().map_err(|error| error.to_string())?;
    if extents.tar_end() > index.tar_size() {
        return Err("its table names bytes beyond the end of the layer".to_owned());
    }
    Ok((IndexedSpans::new(index, extents), toc))
}
