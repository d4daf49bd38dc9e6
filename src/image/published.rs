//! Images that cannot be opened with the indexes that somebody else has made.
//!
//! Such an index may say more of a layer than the image may take in memory, or name files that cannot be merged. The layers
//! themselves may be fine. So the indexes are dropped, and the layers are streamed.

use super::{ImageError, Preparation};
use crate::layer::{IndexSource, LayerContext, OpenError};
use crate::store::{IndexName, StoreError};

impl ImageError {
    /// Whether the tables of the layers are what is wrong.
    pub(super) fn is_of_tables(&self) -> bool {
        matches!(
            self,
            Self::Merge(_) | Self::Tree(_) | Self::TooMuchMemory(_) | Self::Layer(OpenError::TooMuchMemory { .. })
        )
    }
}

impl Preparation {
    /// Removes the indexes of the image's layers that somebody else has made from the store. Returns whether the image was
    /// opened with any.
    pub(super) fn forget_published(&self, context: &LayerContext, reason: &ImageError) -> Result<bool, StoreError> {
        let authorities = context.locations.authorities();
        let mut any = false;
        for layer in self.resolved.layers() {
            any |= self.stats[&layer.digest].snapshot(&layer.digest).index_source == IndexSource::Location;
            for authority in &authorities {
                let name = IndexName::new(&layer.digest, authority);
                if context.store.index(&name).is_some_and(|dir| dir.is_indexed()) {
                    tracing::warn!(layer = %layer.digest, %authority, %reason, "not using an index, streaming the layer");
                    context.forget(&name)?;
                    any = true;
                }
            }
        }
        Ok(any)
    }
}
