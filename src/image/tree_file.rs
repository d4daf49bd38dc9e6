//! The merged tree as an EROFS image, in the store or, without a store, in memory.
//!
//! The file is sealed: every opening checks the whole file. A damaged file is made again from the layers' tables.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::ImageError;
use crate::device::CacheBudget;
use crate::erofs::{ErofsError, Planned, Reader};
use crate::memory::Allowance;
use crate::oci::Digest;
use crate::store::{Durability, Store, TreeName, read_sealed};
use crate::tree::Tree;

/// A stored tree whose bytes were read and checked.
#[derive(Debug)]
pub(super) struct Stored {
    path: PathBuf,
    image: Vec<u8>,
}

/// Reads a stored tree. Returns `None` if there is none, or if it is damaged.
pub(super) fn read(store: &Store, tree: &TreeName) -> Option<Stored> {
    let path = store.tree_path(tree)?;
    let image = read_sealed(&path).map_err(|error| unusable(&path, &error)).ok()??;
    Some(Stored { path, image })
}

impl Stored {
    /// Opens the tree over data devices of these sizes. Returns `None` if the tree does not fit them, or if another
    /// version made it.
    pub(super) fn open(self, store: &Store, sizes: &[u64]) -> Option<Reader<Vec<u8>>> {
        let reader = Reader::open(self.image, sizes)
            .map_err(|error| unusable(&self.path, &error))
            .ok()?;
        if !reader.is_current() {
            tracing::debug!(path = %self.path.display(), "another version made the stored tree, making it again");
            return None;
        }
        store.touch_tree(&self.path);
        Some(reader)
    }
}

fn unusable(path: &Path, error: &dyn std::fmt::Display) {
    tracing::warn!(path = %path.display(), %error, "cannot use the stored tree, making it again");
}

/// Makes the tree and opens it. Its image may take as much memory as `tables` allow. The image is written to the
/// store if the store can be written and has room for it.
pub(super) fn make(
    store: &Store,
    budget: &CacheBudget,
    (name, manifest): (&TreeName, &Digest),
    sizes: &[u64],
    tables: &Arc<Allowance>,
    merge: impl Fn() -> Result<Tree, ImageError>,
) -> Result<Reader<Vec<u8>>, ImageError> {
    if let Some(path) = store.tree_path(name) {
        let tree = merge()?;
        let planned = Planned::new(&tree, sizes, tables.limit())?;
        let Some(reserved) = budget.reserve(planned.metadata_bytes()) else {
            return in_memory(&planned, manifest, sizes, tables);
        };
        let written = store.publish_sealed(&path, Durability::Lazy, |file| match planned.write(manifest, file) {
            Ok(_) => Ok(()),
            Err(ErofsError::Io(error)) => Err(error),
            Err(error) => Err(io::Error::other(error)),
        });
        drop(reserved);
        if let Err(error) = written {
            if !error.is_by_design() {
                tracing::warn!(%error, "cannot keep the tree, holding it in memory");
            }
            return in_memory(&planned, manifest, sizes, tables);
        }
        // The tree is dropped first, so that memory never holds both the tree and the image.
        drop(tree);
        if let Some(reader) = read(store, name).and_then(|stored| stored.open(store, sizes)) {
            return Ok(reader);
        }
    }
    // There is no store, or the file that was just written cannot be read back.
    in_memory(
        &Planned::new(&merge()?, sizes, tables.limit())?,
        manifest,
        sizes,
        tables,
    )
}

/// Makes the image in memory, beside the tree. So there must be memory for both.
fn in_memory(
    planned: &Planned<'_>,
    manifest: &Digest,
    sizes: &[u64],
    tables: &Arc<Allowance>,
) -> Result<Reader<Vec<u8>>, ImageError> {
    let bytes = planned.metadata_bytes();
    let mut charge = tables.charge();
    charge.exactly(bytes)?;
    // The size fits in memory, because it was charged.
    let mut image = Vec::with_capacity(bytes as usize);
    planned.write(manifest, &mut image)?;
    Ok(Reader::open(image, sizes)?)
}
