//! The directory of one layer's files.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

use super::{Authority, Durability, IndexName, Store, StoreError, create_directory, private};
use crate::oci::Digest;
use crate::os::{clear_way, is_at, on_disk, open_or_replace, read_regular};

/// Size limit in bytes of the file that names an authority. A longer name is not shown.
const LONGEST_AUTHORITY: u64 = 4096;

/// The directory of one layer's files.
#[derive(Debug, Clone)]
pub struct LayerDir {
    path: PathBuf,
}

impl LayerDir {
    /// Returns the path of the directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the name of the directory, which begins with the layer's digest.
    pub fn name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Returns the digest of the layer's blob. Returns none if the directory does not have the name of a layer.
    pub fn digest(&self) -> Option<Digest> {
        let name = self.path.file_name()?.to_str()?;
        let (layer, _) = name.split_once('.').unwrap_or((name, ""));
        layer.replacen('-', ":", 1).parse().ok()
    }

    /// Whether there is an index. Its files may still be damaged.
    pub fn is_indexed(&self) -> bool {
        self.spans().exists()
    }

    /// Returns the path of the file that names the authority of the index, for people. A pass on this host leaves no
    /// such file.
    fn authority_file(&self) -> PathBuf {
        self.path.join("authority")
    }

    /// Returns who vouches for the index, as [`Authority`] names it to people.
    pub fn authority(&self) -> String {
        if !self.name().contains('.') {
            return Authority::Pass.to_string();
        }
        let read = read_regular(&self.authority_file(), LONGEST_AUTHORITY);
        let text = read.ok().and_then(|text| String::from_utf8(text).ok());
        text.unwrap_or_else(|| "unknown".to_owned())
    }

    /// Returns the path of the span index.
    pub fn spans(&self) -> PathBuf {
        self.path.join("spans")
    }

    /// Returns the path of the table of contents.
    pub fn toc(&self) -> PathBuf {
        self.path.join("toc")
    }

    /// Returns the path of the extent table.
    pub fn extents(&self) -> PathBuf {
        self.path.join("extents")
    }

    /// Returns the path of the file that says what the layer's programs need.
    pub fn programs(&self) -> PathBuf {
        self.path.join("programs")
    }

    /// Returns the path of the data device.
    pub fn data(&self) -> PathBuf {
        self.path.join("data")
    }

    /// Opens the file whose lock the indexing process holds. Creates the file if it is missing.
    pub fn lock_file(&self) -> Result<File, StoreError> {
        let path = self.path.join("lock");
        create_directory(&self.path).map_err(|e| StoreError::io("create", &self.path, e))?;
        let opened = open_or_replace(private().create(true).truncate(false), &path);
        opened.map_err(|e| StoreError::io("open", &path, e))
    }

    /// Returns whether `lock` is still the file that [`LayerDir::lock_file`] opens.
    pub(crate) fn is_lock_file(&self, lock: &File) -> bool {
        is_at(lock.as_fd(), &self.path.join("lock"))
    }

    /// Removes the span index. Without it, the layer counts as not indexed.
    pub fn forget(&self) -> Result<(), StoreError> {
        let path = self.spans();
        clear_way(&path).map_err(|e| StoreError::io("remove", &path, e))
    }

    /// Returns the bytes on disk of all files.
    pub fn usage(&self) -> u64 {
        let entries = fs::read_dir(&self.path).into_iter().flatten().flatten();
        entries
            .filter_map(|entry| entry.metadata().ok())
            .map(|m| on_disk(&m))
            .sum()
    }

    /// Removes the directory, and returns the bytes on disk that came free. Returns none, and removes nothing, while another
    /// process holds the lock of the layer.
    pub fn remove(&self) -> Result<Option<u64>, StoreError> {
        let Ok(_lock) = Flock::lock(self.lock_file()?, FlockArg::LockExclusiveNonblock) else {
            return Ok(None);
        };
        let bytes = self.usage();
        fs::remove_dir_all(&self.path).map_err(|e| StoreError::io("remove", &self.path, e))?;
        Ok(Some(bytes))
    }

    /// Returns the bytes on disk of the data device; 0 if there is none.
    pub fn data_usage(&self) -> u64 {
        fs::metadata(self.data()).map_or(0, |m| on_disk(&m))
    }
}

impl Store {
    /// Returns the directory of a layer's files. Does not create it.
    ///
    /// Its index, if there is one, was made by a pass on this host.
    pub fn layer(&self, digest: &Digest) -> Option<LayerDir> {
        self.index(&IndexName::new(digest, &Authority::Pass))
    }

    /// Returns the directory of a layer's files with the index of this name. Does not create it.
    pub fn index(&self, name: &IndexName) -> Option<LayerDir> {
        let root = self.root.as_ref()?;
        Some(LayerDir {
            path: root.join("layers").join(name.as_str()),
        })
    }

    /// Writes down who vouches for the index in a directory of [`Store::index`].
    pub(crate) fn note_authority(&self, dir: &LayerDir, authority: &Authority) -> Result<(), StoreError> {
        self.publish(&dir.authority_file(), Durability::Lazy, |file| {
            write!(file, "{authority}")
        })
    }

    /// Returns the directories of all layers in the store.
    pub fn layers(&self) -> Result<Vec<LayerDir>, StoreError> {
        let entries = self.entries("layers")?;
        let layers = entries.into_iter().map(|entry| LayerDir { path: entry.path() });
        // An entry with any other name does not belong to the store.
        Ok(layers.filter(|layer| layer.digest().is_some()).collect())
    }
}
