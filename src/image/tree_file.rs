//! The merged tree as an EROFS image in the store (or, without a store, in memory).
//!
//! The file is sealed: it is checked as a whole whenever it is opened, and made again from the layers' tables if it is damaged.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::ImageError;
use crate::device::CacheBudget;
use crate::erofs::{ErofsError, Planned, Reader};
use crate::memory::Allowance;
use crate::oci::Digest;
use crate::store::{Durability, Store, read_sealed};
use crate::tree::Tree;

/// A stored tree, as it was read.
#[derive(Debug)]
pub(super) struct Stored {
    path: PathBuf,
    image: Vec<u8>,
}

/// Reads the stored tree of a manifest; none if there is none, or it is damaged.
pub(super) fn read(store: &Store, manifest: &Digest) -> Option<Stored> {
    let path = store.tree_path(manifest)?;
    let image = read_sealed(&path).map_err(|error| unusable(&path, &error)).ok()??;
    Some(Stored { path, image })
}

impl Stored {
    /// Opens the tree over data devices of these sizes; none if it does not fit.
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

/// Makes the tree, whose image may take what `tables` allow, and opens it. It goes to the store if that can be written, and has room
/// for it.
pub(super) fn make(
    store: &Store,
    budget: &CacheBudget,
    manifest: &Digest,
    sizes: &[u64],
    tables: &Arc<Allowance>,
    merge: impl Fn() -> Result<Tree, ImageError>,
) -> Result<Reader<Vec<u8>>, ImageError> {
    if let Some(path) = store.tree_path(manifest) {
        let tree = merge()?;
        let planned = Planned::new(&tree, sizes, tables.limit())?;
        if !budget.reserve(planned.metadata_bytes()) {
            return in_memory(&planned, manifest, sizes, tables);
        }
        let written = store.publish_sealed(&path, Durability::Lazy, |file| match planned.write(manifest, file) {
            Ok(_) => Ok(()),
            Err(ErofsError::Io(error)) => Err(error),
            Err(error) => Err(io::Error::other(error)),
        });
        if let Err(error) = written {
            if !error.is_by_design() {
                tracing::warn!(%error, "cannot keep the tree, holding it in memory");
            }
            return in_memory(&planned, manifest, sizes, tables);
        }
        // The image is not to be in memory beside what it was made of.
        drop(tree);
        if let Some(reader) = read(store, manifest).and_then(|stored| stored.open(store, sizes)) {
            return Ok(reader);
        }
    }
    // There is no store, or somebody has emptied it this moment.
    in_memory(
        &Planned::new(&merge()?, sizes, tables.limit())?,
        manifest,
        sizes,
        tables,
    )
}

/// Makes the image beside the tree, so there must be memory for both.
fn in_memory(
    planned: &Planned<'_>,
    manifest: &Digest,
    sizes: &[u64],
    tables: &Arc<Allowance>,
) -> Result<Reader<Vec<u8>>, ImageError> {
    let bytes = planned.metadata_bytes();
    let mut charge = tables.charge();
    charge.exactly(bytes)?;
    // Fits in memory, as it was charged.
    let mut image = Vec::with_capacity(bytes as usize);
    planned.write(manifest, &mut image)?;
    Ok(Reader::open(image, sizes)?)
}
