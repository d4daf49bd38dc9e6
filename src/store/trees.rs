//! Merged trees in the store, and what the programs of an image need.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::{Store, StoreError, touch};
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

    /// Returns where the merged tree of the image with this manifest is kept.
    pub(crate) fn tree_path(&self, manifest: &Digest) -> Option<PathBuf> {
        let root = self.root.as_ref()?;
        let name = format!("{}-{}.erofs", manifest.algorithm().name(), manifest.hex());
        Some(root.join("trees").join(name))
    }

    /// Returns where the file is kept that says what the programs of an image need.
    pub(crate) fn programs_path(&self, manifest: &Digest) -> Option<PathBuf> {
        Some(self.tree_path(manifest)?.with_extension("programs"))
    }
}
