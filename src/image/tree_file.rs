//! The merged tree as an EROFS image in the store (or, without a store, in memory).
//!
//! The file is sealed: it is checked as a whole whenever it is opened, and made again from the layers' tables if it is damaged.

use super::ImageError;
use crate::device::CacheBudget;
use crate::erofs::{self, Reader};
use crate::oci::Digest;
use crate::store::{Durability, Store, read_sealed};
use crate::tree::Tree;

/// The stored tree of a manifest, if there is a good one.
pub(super) fn open(store: &Store, manifest: &Digest, sizes: &[u64]) -> Option<Reader<Vec<u8>>> {
    let path = store.tree_path(manifest)?;
    let unusable = |error: &dyn std::fmt::Display| {
        tracing::warn!(path = %path.display(), %error, "cannot use the stored tree, making it again");
    };
    let image = read_sealed(&path).map_err(|error| unusable(&error)).ok()??;
    let reader = Reader::open(image, sizes).map_err(|error| unusable(&error)).ok()?;
    store.touch_tree(&path);
    Some(reader)
}

/// Writes the tree and opens it. It goes to the store if that can be written, and has room for it.
pub(super) fn build(
    store: &Store,
    budget: &CacheBudget,
    manifest: &Digest,
    tree: &Tree,
    sizes: &[u64],
) -> Result<Reader<Vec<u8>>, ImageError> {
    let mut image = Vec::new();
    erofs::write(tree, sizes, manifest, &mut image)?;
    if let Some(path) = store.tree_path(manifest)
        && budget.reserve(image.len() as u64)
    {
        match store.publish_sealed(&path, Durability::Lazy, |file| file.write_all(&image)) {
            Ok(()) => {}
            Err(error) if error.is_by_design() => {}
            Err(error) => tracing::warn!(%error, "cannot keep the tree, holding it in memory"),
        }
    }
    Ok(Reader::open(image, sizes)?)
}
