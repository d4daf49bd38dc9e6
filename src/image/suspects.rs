//! Which layers to stream if the tree of an image cannot be made.
//!
//! An index that no pass on this host made may name files that no tree can have, or too many of them, although the layer
//! itself is sound. So the layers with such indexes are streamed, and the tree is made again. First comes the layer that the
//! error names. If that layer was opened by a pass, a layer below may have misled the merge, so all others follow. If a pass
//! opened all layers, the error is the image's own.

use super::ImageError;
use super::prefetch::Layers;
use crate::oci::Digest;
use crate::store::Authority;

/// Returns the layers to stream before the tree is made again. Returns none if that cannot help.
pub(super) fn suspects(error: &ImageError, layers: &Layers) -> Vec<Digest> {
    let named = match error {
        ImageError::Merge(error) => Some(error.layer().0 as usize),
        ImageError::Tree(_) | ImageError::TooMuchMemory(_) => None,
        ImageError::Blob(_)
        | ImageError::Layer(_)
        | ImageError::Store(_)
        | ImageError::Device(_)
        | ImageError::Task(_) => return Vec::new(),
    };
    let is_suspect = |position: &usize| *layers.all[*position].authority() != Authority::Pass;
    let named = named.filter(|position| layers.all.get(*position).is_some() && is_suspect(position));
    let chosen: Vec<usize> = match named {
        Some(position) => vec![position],
        None => (0..layers.all.len()).filter(is_suspect).collect(),
    };
    let chosen = chosen.into_iter().map(|position| &layers.all[position]);
    for layer in chosen.clone() {
        tracing::warn!(layer = %layer.digest(), authority = %layer.authority(), %error, "the tree cannot be made with the index of this layer, streaming the layer");
    }
    chosen.map(|layer| layer.digest().clone()).collect()
}
