//! The directory of one layer's files.

use std::fs::{self, File};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use super::{Store, StoreError, clear_way, create_directory, is_at, on_disk, open_or_replace, private};
use crate::oci::Digest;

/// The directory of one layer's files.
#[derive(Debug, Clone)]
pub struct LayerDir {
    path: PathBuf,
}

impl LayerDir {
    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The name of the directory, which says which layer it is about.
    pub(super) fn name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Digest of the layer's blob; none if the directory has another name than a layer's.
    pub fn digest(&self) -> Option<Digest> {
        let name = self.path.file_name()?.to_str()?;
        name.replacen('-', ":", 1).parse().ok()
    }

    /// The span index.
    pub fn spans(&self) -> PathBuf {
        self.path.join("spans")
    }

    /// The table of contents.
    pub fn toc(&self) -> PathBuf {
        self.path.join("toc")
    }

    /// The extent table.
    pub fn extents(&self) -> PathBuf {
        self.path.join("extents")
    }

    /// What the layer's programs need.
    pub fn programs(&self) -> PathBuf {
        self.path.join("programs")
    }

    /// The data device.
    pub fn data(&self) -> PathBuf {
        self.path.join("data")
    }

    /// Opens (and creates) the file whose lock the indexing process holds.
    pub fn lock_file(&self) -> Result<File, StoreError> {
        let path = self.path.join("lock");
        create_directory(&self.path).map_err(|e| StoreError::io("create", &self.path, e))?;
        let opened = open_or_replace(private().create(true).truncate(false), &path);
        opened.map_err(|e| StoreError::io("open", &path, e))
    }

    /// Whether `lock` is (still) the file that [`LayerDir::lock_file`] opens.
    pub fn is_lock_file(&self, lock: &File) -> bool {
        is_at(lock.as_fd(), &self.path.join("lock"))
    }

    /// Removes the span index, without which the layer counts as not indexed.
    pub fn forget(&self) -> Result<(), StoreError> {
        let path = self.spans();
        clear_way(&path).map_err(|e| StoreError::io("remove", &path, e))
    }

    /// Bytes the data device occupies on disk; 0 if there is none.
    pub fn data_usage(&self) -> u64 {
        fs::metadata(self.data()).map_or(0, |m| on_disk(&m))
    }
}

impl Store {
    /// The directory of a layer's files, not created yet.
    pub fn layer(&self, digest: &Digest) -> Option<LayerDir> {
        let root = self.root.as_ref()?;
        let name = format!("{}-{}", digest.algorithm().name(), digest.hex());
        Some(LayerDir {
            path: root.join("layers").join(name),
        })
    }

    /// Directories of all layers the store knows.
    pub fn layers(&self) -> Result<Vec<LayerDir>, StoreError> {
        let entries = self.entries("layers")?;
        let layers = entries.into_iter().map(|entry| LayerDir { path: entry.path() });
        // ocifs makes no directory with another kind of name here.
        Ok(layers.filter(|layer| layer.digest().is_some()).collect())
    }
}
