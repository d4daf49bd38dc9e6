//! What an opening of a layer begins with and ends with.

use std::sync::Arc;

use super::first_pass::FirstPassError;
use super::{Layer, LayerStats};
use crate::blob::BlobSource;
use crate::memory::{Charge, OverLimit};
use crate::oci::{DiffId, Digest};
use crate::published::Lookups;
use crate::store::Authority;
use crate::task::TaskError;
use crate::toc::PackedToc;
use crate::toc::carried::TableRef;

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
    /// The layer's table of contents and its memory charge, if the store does not have the table ([`super::stored_toc`]).
    pub toc: Option<(PackedToc, Charge)>,
}

/// A layer that is to be opened.
#[derive(Debug, Clone)]
pub(crate) struct ToOpen {
    /// Where its bytes are.
    pub(crate) blob: Arc<dyn BlobSource>,
    /// The diffID that the image's config states.
    pub(crate) diff_id: DiffId,
    /// The counters of this opening.
    pub(crate) stats: Arc<LayerStats>,
    /// Who may vouch for an index of the layer, best first.
    pub(crate) authorities: Vec<Authority>,
    /// Questions for indexes that are being asked.
    pub(crate) lookups: Arc<Lookups>,
    /// The table that the layer carries, if the manifest vouches for one.
    pub(crate) table: Option<TableRef>,
}

impl ToOpen {
    /// A layer that only a pass on this host may open.
    pub(crate) fn by_pass(blob: Arc<dyn BlobSource>, diff_id: DiffId, stats: Arc<LayerStats>) -> Self {
        Self {
            blob,
            diff_id,
            stats,
            authorities: vec![Authority::Pass],
            lookups: Arc::default(),
            table: None,
        }
    }
}

pub(super) fn too_much(layer: &Digest) -> impl Fn(OverLimit) -> OpenError {
    let layer = layer.clone();
    move |source| OpenError::TooMuchMemory {
        layer: layer.clone(),
        source,
    }
}
