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
    /// When a mount opened it last.
    pub last_used: SystemTime,
}

impl Store {
    /// The merged trees, with what each takes on disk and when it was last used.
    pub fn trees(&self) -> Result<Vec<StoredTree>, StoreError> {
        let trees = self.entries("trees")?.into_iter().filter_map(|entry| {
            // One that went in the meantime takes nothing.
            let metadata = entry.metadata().ok()?;
            Some(StoredTree {
                path: entry.path(),
                bytes: on_disk(&metadata),
                last_used: metadata.modified().ok()?,
            })
        });
        Ok(trees.collect())
    }

    /// Takes note that a tree was used; a hint for eviction.
    pub fn touch_tree(&self, path: &Path) {
        touch(path);
    }

    /// Where the merged tree of the image with this manifest is kept.
    pub fn tree_path(&self, manifest: &Digest) -> Option<PathBuf> {
        let root = self.root.as_ref()?;
        let name = format!("{}-{}.erofs", manifest.algorithm().name(), manifest.hex());
        Some(root.join("trees").join(name))
    }

    /// Where is kept what the programs of an image need.
    pub fn programs_path(&self, manifest: &Digest) -> Option<PathBuf> {
        Some(self.tree_path(manifest)?.with_extension("programs"))
    }
}
