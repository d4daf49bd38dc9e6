//! Which indexes and which tree the store has of an image.

use super::Preparation;
use crate::layer::LayerContext;
use crate::oci::{Descriptor, Digest};
use crate::store::{Authority, IndexName, LayerDir, Store, TreeName};
use crate::toc::carried::TableRef;

/// Returns the directory of the best index of a layer that the store has, and who vouches for it.
pub(super) fn known_index(store: &Store, layer: &Digest, authorities: &[Authority]) -> Option<(Authority, LayerDir)> {
    let mut dirs = authorities.iter().filter_map(|authority| {
        let dir = store.index(&IndexName::new(layer, authority))?;
        Some((authority.clone(), dir))
    });
    dirs.find(|(_, dir)| dir.is_indexed())
}

/// Returns the table that a layer carries and for which its descriptor vouches, if it can be used.
pub(super) fn carried(layer: &Descriptor) -> Option<TableRef> {
    TableRef::of(layer).unwrap_or_else(|error| {
        tracing::debug!(layer = %layer.digest, %error, "streaming the layer");
        None
    })
}

impl Preparation {
    /// Whether the store has the index of every layer and the tree, so that the image will be ready at once.
    pub fn is_in_store(&self, context: &LayerContext) -> bool {
        let tree = self
            .stored_tree(context)
            .and_then(|tree| context.store.tree_path(&tree));
        tree.is_some_and(|path| path.exists())
    }

    /// Who may vouch for an index of a layer, best first.
    pub(super) fn authorities(&self, context: &LayerContext, layer: &Descriptor) -> Vec<Authority> {
        let table = carried(layer).map(|table| Authority::Manifest {
            table: table.digest().clone(),
        });
        // The table may have to be fetched, so all that is in the store comes first.
        context.authorities().into_iter().chain(table).collect()
    }

    /// Returns the directory of the best index of a layer that the store has, and who vouches for it.
    pub fn stored_index(&self, context: &LayerContext, layer: &Descriptor) -> Option<(Authority, LayerDir)> {
        known_index(&context.store, &layer.digest, &self.authorities(context, layer))
    }

    /// Returns the name of the tree that is made of the indexes in the store. None if the store lacks the index of a layer.
    pub(super) fn stored_tree(&self, context: &LayerContext) -> Option<TreeName> {
        let layers = self.resolved.layers().iter();
        let names = layers.map(|layer| {
            let (authority, _) = self.stored_index(context, layer)?;
            Some(IndexName::new(&layer.digest, &authority))
        });
        let layers: Vec<IndexName> = names.collect::<Option<_>>()?;
        Some(TreeName::new(&self.resolved.manifest_document.digest, &layers))
    }
}
