//! Bringing all of an image into the store.

use std::sync::Arc;

use futures::{StreamExt as _, TryStreamExt as _};

use super::Image;
use crate::layer::{Layer, LayerError};

/// Uncompressed bytes asked for at once: large enough for full speed, small enough that readers get their turn.
const BATCH: u64 = 16 << 20;
/// Batches under way at once, over all layers.
const PARALLEL: usize = 4;

impl Image {
    /// Fetches every span that is not on the local devices, and returns how many are not there even so: none, unless the
    /// devices cannot be written or may not grow that large. Without any missing no registry is needed any more.
    pub async fn complete(&self) -> Result<usize, LayerError> {
        let batches: Vec<(Arc<Layer>, std::ops::Range<u32>)> = self
            .layers
            .iter()
            .flat_map(|layer| layer.missing(BATCH).into_iter().map(|spans| (layer.clone(), spans)))
            .collect();
        futures::stream::iter(batches)
            .map(|(layer, spans)| async move { layer.complete(spans).await })
            .buffer_unordered(PARALLEL)
            .try_collect::<()>()
            .await?;
        Ok(self.layers.iter().map(|layer| layer.missing(1).len()).sum())
    }
}
