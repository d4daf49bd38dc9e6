//! Opens a layer by the table that the layer itself carries and for which the image's manifest vouches.
//!
//! One or two requests fetch the table. The layer is open then, and none of its content is here. The table is kept in the
//! store like any other index, in the directory of its authority, so it is fetched once.
//!
//! Anything that goes wrong with a table is no error of the layer: the layer is streamed then. That includes a table that
//! does not come in some seconds ([`fetch`]). The log says why.
//!
//! If the bytes of a chunk do not match the table, however often they are fetched, the layer is streamed too
//! ([`super::rescue`]). The index of that pass is used from then on. If the pass fails, the read fails, and the table stays:
//! it may be the source that is wrong.

mod fetch;

use std::sync::Arc;

use fetch::{Unfetched, fetch};

use super::data::LayerContext;
use super::opening::{OpenError, Opened, ToOpen};
use super::stored::{LayerIndex, keep_chunks, open_device, stored_chunks};
use super::{IndexSource, Layer};
use crate::blob::{BlobError, Verdict};
use crate::span::ChunkSpans;
use crate::store::{Authority, LayerDir, StoreError};
use crate::task::joined;
use crate::toc::PackedToc;
use crate::toc::carried::{CarriedError, CarriedTables, TableRef};

/// Why a table is not used.
#[derive(Debug, thiserror::Error)]
enum NoTable {
    #[error(transparent)]
    Carried(#[from] CarriedError),
    #[error("the layer's own table of contents cannot be fetched: {0}")]
    Blob(#[from] BlobError),
}

/// Opens a layer by its table, which is in the store or is fetched. `known` names its index. Returns none if the layer has
/// to be streamed.
pub(super) async fn open(
    context: &LayerContext,
    wanted: &ToOpen,
    known: &LayerIndex,
) -> Result<Option<Opened>, OpenError> {
    let Some(table) = &wanted.table else {
        return Ok(None);
    };
    let layer = wanted.blob.digest();
    if let Some(opened) = from_store(context, wanted, table, known).await? {
        return Ok(Some(opened));
    }
    let mut fetched = fetch(context, wanted, table).await;
    let mut has_retried = false;
    while let Err(Unfetched::Table(NoTable::Carried(error))) = &fetched
        && error.is_damage()
    {
        // Bytes that were damaged on the way are seldom damaged twice, and another place may have others.
        if !wanted.blob.judged(Verdict::Wrong) && std::mem::replace(&mut has_retried, true) {
            break;
        }
        tracing::info!(%layer, %error, "fetching the table once more");
        fetched = fetch(context, wanted, table).await;
    }
    match fetched {
        Ok(tables) => keep(context, wanted, known.clone(), tables).await,
        Err(Unfetched::Open(error)) => Err(error),
        Err(Unfetched::Table(error)) => {
            if matches!(&error, NoTable::Carried(error) if !error.is_damage()) {
                tracing::debug!(%layer, %error, "streaming the layer");
            } else {
                tracing::warn!(%layer, %error, "streaming the layer");
            }
            Ok(None)
        }
    }
}

async fn from_store(
    context: &LayerContext,
    wanted: &ToOpen,
    table: &TableRef,
    known: &LayerIndex,
) -> Result<Option<Opened>, OpenError> {
    let Some(dir) = known.dir.clone().filter(|dir| dir.is_indexed()) else {
        return Ok(None);
    };
    let (context, known, blob) = (context.clone(), known.clone(), wanted.blob.clone());
    let (diff_id, stats, source) = (wanted.diff_id.clone(), wanted.stats.clone(), table.source());
    let loading = tokio::task::spawn_blocking(move || {
        let spans = stored_chunks(&dir, blob.digest())?;
        if *spans.table().source() != source || spans.table().blob_size() != blob.size() {
            return None;
        }
        let mut charge = context.tables.charge();
        charge.exactly(spans.memory()).ok()?;
        let spans = (Box::new(spans) as Box<_>, charge);
        let layer = open_device(&context, &known, &dir, blob, &diff_id, spans, stats);
        layer.stats().set_source(IndexSource::Store);
        Some(Opened { layer, toc: None })
    });
    Ok(joined(loading).await?)
}

/// Keeps the tables in the store and makes the layer.
async fn keep(
    context: &LayerContext,
    wanted: &ToOpen,
    known: LayerIndex,
    tables: CarriedTables,
) -> Result<Option<Opened>, OpenError> {
    let (context, blob) = (context.clone(), wanted.blob.clone());
    let (diff_id, stats) = (wanted.diff_id.clone(), wanted.stats.clone());
    let keeping = tokio::task::spawn_blocking(move || {
        let layer = blob.digest().clone();
        let CarriedTables {
            tables,
            chunks,
            mut charge,
        } = tables;
        for warning in &tables.warnings {
            tracing::warn!(%layer, warning, "odd table of contents");
        }
        let Some(spans) = ChunkSpans::new(layer.clone(), chunks, tables.extents) else {
            tracing::warn!(%layer, "the layer's own table of contents contradicts itself, streaming the layer");
            return None;
        };
        let (toc, mut toc_charge) = (tables.toc, tables.charge);
        if charge.exactly(spans.memory()).is_err() || toc_charge.exactly(toc.bytes() as u64).is_err() {
            tracing::debug!(%layer, "no memory for the layer's own table of contents, streaming the layer");
            return None;
        }
        let dir = known.dir.clone().filter(|_| context.store.is_writable());
        let kept = dir.filter(|dir| match publish(&context, dir, &known.authority, &spans, &toc) {
            Ok(()) => true,
            Err(error) => {
                context.health.store_failed(&error);
                false
            }
        });
        let spans = (Box::new(spans) as Box<_>, charge);
        let (layer, toc) = match kept {
            Some(dir) => (open_device(&context, &known, &dir, blob, &diff_id, spans, stats), None),
            None => {
                let nowhere = LayerIndex { dir: None, ..known };
                let data = nowhere.data(&context, diff_id, spans, None);
                (Layer::new(Arc::new(data), blob, stats), Some((toc, toc_charge)))
            }
        };
        layer.stats().set_source(IndexSource::Carried);
        Some(Opened { layer, toc })
    });
    Ok(joined(keeping).await?)
}

fn publish(
    context: &LayerContext,
    dir: &LayerDir,
    authority: &Authority,
    spans: &ChunkSpans,
    toc: &PackedToc,
) -> Result<(), StoreError> {
    context.store.note_authority(dir, authority)?;
    keep_chunks(&context.store, dir, spans, toc)
}
