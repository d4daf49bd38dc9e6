//! Merged trees in the store, and what the programs of an image need.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::{IndexName, Store, StoreError, touch};
use crate::oci::Digest;
use crate::os::on_disk;

/// A merged tree in the store.
#[derive(Debug, Clone)]
pub struct StoredTree {
    /// The file.
    pub path: PathBuf,
    /// Bytes on disk.
    pub bytes: u64,
    /// When a mount last used the file.
    pub last_used: SystemTime,
}

impl Store {
    /// Returns the files in `trees`, with the bytes on disk and the last use of each. These are merged trees, and
    /// files that say what programs need.
    pub fn trees(&self) -> Result<Vec<StoredTree>, StoreError> {
        let trees = self.entries("trees")?.into_iter().filter_map(|entry| {
            // A file that was deleted in the meantime takes no bytes.
            let metadata = entry.metadata().ok()?;
            Some(StoredTree {
                path: entry.path(),
                bytes: on_disk(&metadata),
                last_used: metadata.modified().ok()?,
            })
        });
        Ok(trees.collect())
    }

    /// Records that a tree was used. The record is a hint for eviction.
    pub(crate) fn touch_tree(&self, path: &Path) {
        touch(path);
    }

    /// Returns where a merged tree is kept.
    pub(crate) fn tree_path(&self, tree: &TreeName) -> Option<PathBuf> {
        Some(self.root.as_ref()?.join("trees").join(format!("{}.erofs", tree.0)))
    }

    /// Returns where the file is kept that says what the programs of an image need.
    pub(crate) fn programs_path(&self, tree: &TreeName) -> Option<PathBuf> {
        Some(self.root.as_ref()?.join("trees").join(format!("{}.programs", tree.0)))
    }
}

/// Names the merged tree of an image by its manifest and the indexes that it was made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TreeName(String);

impl TreeName {
    /// Returns the name of the tree that is merged from these indexes of the layers, base first.
    pub fn new(manifest: &Digest, layers: &[IndexName]) -> Self {
        let manifest = stem(manifest);
        if layers.iter().all(IndexName::is_of_pass) {
            return Self(manifest);
        }
        let mut hasher = blake3::Hasher::new();
        for layer in layers {
            hasher.update(layer.as_str().as_bytes()).update(b"/");
        }
        Self(format!("{manifest}.{}", &hasher.finalize().to_hex()[..32]))
    }
}

impl StoredTree {
    /// Whether the file belongs to the image with this manifest.
    pub fn is_of(&self, manifest: &Digest) -> bool {
        let name = self.path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.split('.').next() == Some(&stem(manifest))
    }
}

fn stem(manifest: &Digest) -> String {
    format!("{}-{}", manifest.algorithm().name(), manifest.hex())
}
