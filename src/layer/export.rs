//! The index that a pass on this host has made of a layer, as a file for other hosts.

use std::sync::Arc;

use tokio::runtime::Handle;

use super::programs::{LayerPrograms, all_stored_programs, encoded_for_others, look};
use super::{Layer, LayerError, OpenError, stored_toc};
use crate::index::SpanIndex;
use crate::published::IndexFile;
use crate::store::{StoreError, read_sealed};
use crate::task::{TaskError, joined};
use crate::toc::PackedToc;

/// Why there is no index to give to other hosts.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// No pass on this host has made an index of the layer, or none could be kept.
    #[error("layer {layer}: there is no index of a pass on this host in the store")]
    NoPass {
        /// Digest of the layer.
        layer: String,
    },
    /// The index lacks restarts that other hosts find.
    #[error(
        "layer {layer}: memory was short when this host indexed it, so other hosts find more restarts; use a larger --memory and an empty --store"
    )]
    ShortOfMemory {
        /// Digest of the layer.
        layer: String,
    },
    /// A part of the index cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The table of contents cannot be read.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The bytes that tell what the programs need cannot be read.
    #[error(transparent)]
    Read(#[from] LayerError),
    /// The export was interrupted.
    #[error("cannot read an index: {0}")]
    Task(#[from] TaskError),
}

/// Returns the index of an open layer. Fails if a pass on this host did not make it. If it is not known of all programs
/// what they need, reads them, which may fetch bytes.
pub async fn export(layer: Arc<Layer>) -> Result<IndexFile, ExportError> {
    let runtime = Handle::current();
    joined(tokio::task::spawn_blocking(move || from_pass(&layer, &runtime))).await?
}

fn from_pass(layer: &Arc<Layer>, runtime: &Handle) -> Result<IndexFile, ExportError> {
    let none = || ExportError::NoPass {
        layer: layer.digest().to_string(),
    };
    let dir = layer.home().filter(|_| layer.index().is_of_pass()).ok_or_else(none)?;
    let spans = read_sealed(&dir.spans())?.ok_or_else(none)?;
    let is_short = SpanIndex::open(spans.clone()).is_ok_and(|index| index.is_short_of_memory());
    if is_short {
        return Err(ExportError::ShortOfMemory {
            layer: layer.digest().to_string(),
        });
    }
    let toc = stored_toc(layer.digest(), Some(dir))?;
    let programs = match all_stored_programs(dir) {
        Some(programs) => programs,
        None => all_programs(layer, runtime, &toc)?,
    };
    let mut packed = Vec::with_capacity(toc.bytes() + 32);
    toc.write(&mut packed).expect("memory takes all bytes");
    Ok(IndexFile {
        layer: layer.digest().clone(),
        size: layer.spans().blob_size(),
        diff_id: layer.data.diff_id.clone(),
        spans,
        toc: packed,
        programs: encoded_for_others(programs),
    })
}

/// Looks up the programs of a layer, and fetches what that needs.
fn all_programs(layer: &Arc<Layer>, runtime: &Handle, toc: &PackedToc) -> Result<LayerPrograms, LayerError> {
    let mut failed = None;
    let found = look(toc, |offset, buf| {
        buf.fill(0);
        if failed.is_some() || layer.peek(offset, buf) {
            return failed.is_none();
        }
        buf.fill(0);
        let read = runtime.block_on(layer.read(offset, buf));
        failed = read.err();
        failed.is_none()
    });
    match failed {
        Some(error) => Err(error),
        None => Ok(found.programs),
    }
}
