//! Which layers to stream if the tree of an image cannot be made.
//!
//! An index that no pass on this host made may name files that no tree can have, or too many of them, although the layer
//! itself is sound. So the layers with such indexes are streamed, and the tree is made again. First comes the layer that the
//! error names. If that layer was opened by a pass, a layer below may have misled the merge, so all others follow. If a pass
//! opened all layers, the error is the image's own. A pass outranks all other indexes, so the next mount has no trouble.

use std::sync::Arc;

use super::prefetch::Layers;
use super::{ImageError, Preparation};
use crate::layer::{Layer, LayerContext, OpenError};
use crate::oci::Digest;
use crate::store::Authority;

impl Preparation {
    /// Returns the layers to stream before the tree is made again. Returns none if that cannot help. `layers` are the open
    /// layers, if all of them could be opened.
    pub(super) fn suspects(
        &self,
        context: &LayerContext,
        error: &ImageError,
        layers: Option<Arc<Layers>>,
    ) -> Vec<Digest> {
        let suspects: Vec<(Digest, Authority)> = match (error, layers) {
            (ImageError::Merge(_) | ImageError::Tree(_) | ImageError::TooMuchMemory(_), Some(layers)) => {
                of_open(error, &layers)
            }
            // The layers before this one may have taken the memory.
            (ImageError::Layer(OpenError::TooMuchMemory { .. }), _) => {
                let layers = self.resolved.layers().iter();
                let kept = layers.flat_map(|layer| {
                    let authorities = self.authorities(context, layer).into_iter();
                    authorities.map(|authority| (layer.digest.clone(), authority))
                });
                kept.filter(|(_, authority)| *authority != Authority::Pass).collect()
            }
            _ => Vec::new(),
        };
        for (layer, authority) in &suspects {
            tracing::warn!(%layer, %authority, %error, "not using an index with which the tree cannot be made, streaming the layer");
        }
        suspects.into_iter().map(|(layer, _)| layer).collect()
    }
}

/// Returns the open layers that may be the cause of the error, and who vouches for their indexes.
fn of_open(error: &ImageError, layers: &Layers) -> Vec<(Digest, Authority)> {
    let named = match error {
        ImageError::Merge(error) => Some(error.layer().0 as usize),
        _ => None,
    };
    let of = |layer: &Arc<Layer>| (layer.digest().clone(), layer.authority().clone());
    let is_suspect = |layer: &&Arc<Layer>| *layer.authority() != Authority::Pass;
    match named.and_then(|position| layers.all.get(position)).filter(is_suspect) {
        Some(layer) => vec![of(layer)],
        None => layers.all.iter().filter(is_suspect).map(of).collect(),
    }
}
