//! The merged tree as an EROFS image in the store (or, without a store, in memory).

use std::io::{self, Write as _};

use super::ImageError;
use crate::erofs::{self, Reader};
use crate::oci::Digest;
use crate::store::{Durability, FileBytes, Store, StoreError, map_file};
use crate::tree::Tree;

/// The stored tree of a manifest, if there is a good one.
pub(super) fn open(store: &Store, manifest: &Digest, sizes: &[u64]) -> Result<Option<Reader<FileBytes>>, ImageError> {
    let Some(path) = store.tree_path(manifest) else {
        return Ok(None);
    };
    let map = match map_file(&path) {
        Ok(map) => map,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "cannot read the stored tree, making it again");
            return Ok(None);
        }
    };
    match Reader::open(map, sizes) {
        Ok(reader) => Ok(Some(reader)),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "the stored tree is damaged, making it again");
            Ok(None)
        }
    }
}

/// Writes the tree and opens it. It goes to the store if that can be written.
pub(super) fn build(
    store: &Store,
    manifest: &Digest,
    tree: &Tree,
    sizes: &[u64],
) -> Result<Reader<FileBytes>, ImageError> {
    if let Some(path) = store.tree_path(manifest) {
        // Lookups do not check a digest over the whole tree, so it must not be torn by a power cut.
        let written = store.publish(&path, Durability::Synced, |file| {
            erofs::write(tree, sizes, manifest, &mut *file).map_err(io::Error::other)?;
            file.flush()
        });
        match written.and_then(|()| map_file(&path).map_err(|source| StoreError::io("map", &path, source))) {
            Ok(map) => return Ok(Reader::open(map, sizes)?),
            Err(error) => tracing::warn!(%error, "cannot keep the tree, holding it in memory"),
        }
    }
    let mut image = Vec::new();
    erofs::write(tree, sizes, manifest, &mut image)?;
    Ok(Reader::open(FileBytes::Owned(image), sizes)?)
}
