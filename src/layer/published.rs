//! Opens a layer with an index that somebody else has made.

use super::data::LayerContext;
use super::opening::{OpenError, Opened, ToOpen};
use super::stored::{LayerIndex, keep, open_device};
use super::{IndexSource, Layer};
use crate::index::SpanIndex;
use crate::memory::Charge;
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
        let unusable = |reason: String| {
            tracing::warn!(%layer, place = found.place, reason, "not using an index");
            Ok(None)
        };
        let mut charge = context.tables.charge();
        let (spans, toc, programs) = match parts(found.file, &layer, &diff_id, context.tables.charge()) {
            Ok(parts) => parts,
            Err(reason) => return unusable(reason),
        };
        let mut toc_charge = context.tables.charge();
        let covered = charge
            .exactly(spans.memory())
            .and_then(|()| toc_charge.exactly(toc.bytes() as u64));
        if let Err(over) = covered {
            return unusable(format!("its tables take {over}"));
        }
        let index = LayerIndex::new(&context.store, &layer, found.authority);
        let mut kept = false;
        if context.store.is_writable()
            && let Some(dir) = &index.dir
        {
            let keeping = || {
                context.store.note_authority(dir, &index.authority)?;
                if !programs.is_empty() {
                    let write = |out: &mut dyn std::io::Write| out.write_all(&programs);
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
        let layer = match index.dir.as_ref().filter(|_| kept) {
            Some(dir) => open_device(&context, &index, dir, blob, &diff_id, (Box::new(spans), charge), stats),
            None => {
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

/// Checks that the parts of an index can be read, and belong together and to the layer with this digest and diffID. Says
/// what is wrong.
pub fn check_index(file: IndexFile, layer: &Digest, diff_id: &DiffId) -> Result<(), String> {
    parts(file, layer, diff_id, Charge::default()).map(|_| ())
}

/// Reads the parts of an index, and checks that they belong together and to the layer. Returns the spans, the table and the
/// bytes of the programs. The memory that only the check takes is charged to `charge`.
fn parts(
    file: IndexFile,
    layer: &Digest,
    diff_id: &DiffId,
    charge: Charge,
) -> Result<(IndexedSpans, PackedToc, Vec<u8>), String> {
    if file.diff_id != *diff_id {
        return Err("it states another diffID than the image".to_owned());
    }
    let index = SpanIndex::open(file.spans).map_err(|error| error.to_string())?;
    let same = index.blob_digest() == layer && index.diff_id() == diff_id && index.blob_size() == file.size;
    if !same {
        return Err("its spans are of another layer".to_owned());
    }
    let toc = PackedToc::open(file.toc).map_err(|error| error.to_string())?;
    let extents = toc.extent_table_within(charge).map_err(|error| error.to_string())?;
    if extents.tar_end() > index.tar_size() {
        return Err("its table names bytes beyond the end of the layer".to_owned());
    }
    Ok((IndexedSpans::new(index, extents), toc, file.programs))
}
