//! The store: everything ocifs keeps between mounts, as plain files in one directory.
//!
//! ```text
//! STORE/version                      layout of this directory, one line
//! STORE/documents/ALG/HEX            manifests, image indexes, configs: the bytes received
//! STORE/layers/ALG-HEX/spans         span index            } by digest of the layer's blob,
//!                      toc           table of contents     } written once by the pass that
//!                      extents       extent table          } verified the whole layer
//!                      programs      what its programs need, a hint
//!                      data          data device, sparse, and which spans it holds
//!                      lock          held by the process that indexes the layer
//!                      partial       first bytes of a blob that did not come whole
//! STORE/layers/ALG-HEX.AUTHORITY/    the same, from an index that another authority vouches for
//!                      authority     its name, for people
//! STORE/trees/ALG-HEX.erofs          merged tree, by digest of the manifest
//! STORE/trees/ALG-HEX.programs       which of its programs load which files, a hint
//! STORE/trees/ALG-HEX.HASH.*         the same, from indexes of other authorities
//! STORE/profiles/ALG-HEX.LABEL       what starts of an image's program read, a hint
//! STORE/{documents,profiles}/of/     which of them belong to a repository or reference
//! STORE/notes/HASH                   what was so at the time of the file, such as that a place has no index
//! STORE/uppers/ID/                   private upper directories of writable mounts
//! STORE/tmp/OWNER.RANDOM             files being written ("drafts")
//! STORE/eviction.lock                held by the process that makes room
//! ```
//!
//! Invariants:
//! - A file outside `tmp` is complete, because its writer renamed it there. Only `partial` grows in its place, and
//!   its bytes are not believed before they are verified.
//! - Documents are checked against the digest in their name when they are read.
//! - Spans, toc, extents, programs and trees are checked against the seal that they carry (`read_sealed`).
//! - A profile that does not parse counts as none.
//! - `data` follows the rules of [`crate::device`].
//! - Any file except those in `uppers` may be deleted at any time. A deleted index, tree or piece of data is made or
//!   fetched again. A deleted profile is learned again, and a deleted document is missed only while its registry
//!   cannot be reached.
//! - A store that cannot be written is only read. It keeps no new files.
//! - [`Store::unavailable`] replaces a store that cannot even be opened. It remembers nothing, and the mount goes on
//!   from memory.

mod authority;
mod documents;
mod draft;
mod layer_dir;
mod notes;
mod partial;
mod profiles;
mod sealed;
mod trees;

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};

use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use nix::fcntl::FallocateFlags;
use nix::unistd::{AccessFlags, access};

pub use authority::{Authority, IndexName};
pub use documents::NamedRoot;
pub use draft::Draft;
pub use layer_dir::LayerDir;
pub use partial::Partial;
use sealed::SealingWriter;
pub(crate) use sealed::read_sealed;
pub use trees::{StoredTree, TreeName};

use crate::os::{is_denied, is_foreign, on_disk, open_or_replace, open_regular, read_regular};

/// Content of `STORE/version`. It changes whenever an older ocifs could misread the directory.
const VERSION: &str = "ocifs store 1\n";

/// Most bytes of a version file. A longer file in its place counts as damaged.
const LONGEST_VERSION: u64 = 4096;

/// What can go wrong with the store.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// A file or directory could not be read or written.
    #[error("store: cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The directory has another layout.
    #[error("store {} has layout `{found}`, this ocifs reads `{}`: use another --store, or delete it", path.display(), VERSION.trim())]
    Version {
        /// The store directory.
        path: PathBuf,
        /// First line of its version file.
        found: String,
    },
    /// A file is not what was written.
    #[error("store: {} is damaged: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What shows the damage.
        reason: &'static str,
    },
    /// There is no store to write to.
    #[error("no store: nothing is kept")]
    Unavailable,
    /// The store may only be read.
    #[error("store {} is read-only: nothing new is kept", path.display())]
    ReadOnly {
        /// The store directory.
        path: PathBuf,
    },
}

impl StoreError {
    /// Returns whether the store keeps no files by design. Returns false if something failed.
    pub fn is_by_design(&self) -> bool {
        matches!(self, Self::Unavailable | Self::ReadOnly { .. })
    }

    pub(crate) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }
}

/// The store directory, or none.
#[derive(Debug, Clone)]
pub struct Store {
    root: Option<PathBuf>,
    writable: bool,
}

impl Store {
    /// Opens the store at `root`, and creates it if it is missing. Removes what dead writers left in `tmp`. Only the
    /// owner has access to the directory, because images may be private. A store that is there and may not be written
    /// is only read.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        create_directory(root).map_err(|e| StoreError::io("create", root, e))?;
        let mut writable = true;
        for directory in ["documents", "layers", "profiles", "trees", "uppers", "tmp"] {
            let path = root.join(directory);
            match create_directory(&path) {
                Ok(()) => writable &= access(&path, AccessFlags::W_OK).is_ok(),
                // An older ocifs may have made the store without this directory.
                Err(e) if is_denied(&e) && root.join("version").exists() => writable = false,
                Err(e) => return Err(StoreError::io("create", &path, e)),
            }
        }
        let store = Self {
            root: Some(root.to_owned()),
            writable,
        };
        let version = root.join("version");
        match read_regular(&version, LONGEST_VERSION) {
            Ok(text) if text == VERSION.as_bytes() => {}
            Ok(text) => match other_version(&text) {
                Some(found) => {
                    return Err(StoreError::Version {
                        path: root.to_owned(),
                        found,
                    });
                }
                // The version file is damaged. The store can still be used, because its files are checked when they
                // are read.
                None => store.write_version(&version)?,
            },
            Err(e) if e.kind() == io::ErrorKind::NotFound || is_foreign(&e) => store.write_version(&version)?,
            Err(e) => return Err(StoreError::io("read", &version, e)),
        }
        if store.writable {
            draft::sweep(&root.join("tmp"));
        }
        Ok(store)
    }

    /// Writes the version file whole or not at all, because other processes may be opening the new store at the same
    /// time.
    fn write_version(&self, path: &Path) -> Result<(), StoreError> {
        self.publish(path, Durability::Synced, |file| file.write_all(VERSION.as_bytes()))
    }

    /// Returns a store that keeps nothing.
    pub fn unavailable() -> Self {
        Self {
            root: None,
            writable: false,
        }
    }

    /// Returns whether anything can be kept.
    pub(crate) fn is_writable(&self) -> bool {
        self.writable
    }

    /// Returns the directory, if it can be written.
    fn writable_root(&self) -> Result<&Path, StoreError> {
        let root = self.root.as_deref().ok_or(StoreError::Unavailable)?;
        match self.writable {
            true => Ok(root),
            false => Err(StoreError::ReadOnly { path: root.to_owned() }),
        }
    }

    /// Returns the directory, if there is one.
    pub fn root(&self) -> Option<&Path> {
        self.root.as_deref()
    }

    /// Returns the entries of one of the store's directories. Returns none if the directory does not exist.
    fn entries(&self, directory: &str) -> Result<Vec<fs::DirEntry>, StoreError> {
        let Some(root) = &self.root else {
            return Ok(Vec::new());
        };
        let path = root.join(directory);
        match fs::read_dir(&path) {
            Ok(entries) => Ok(entries.flatten().collect()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(e) => Err(StoreError::io("list", &path, e)),
        }
    }

    /// Tries to reserve `room` bytes in the store, or to write a few bytes if `room` is 0.
    pub fn probe(&self, room: u64) -> Result<(), StoreError> {
        let draft = self.draft()?;
        let length = i64::try_from(room).unwrap_or(i64::MAX);
        let reserved = match room {
            0 => draft.file().write_all(b"probe"),
            _ => nix::fcntl::fallocate(draft.file(), FallocateFlags::empty(), 0, length).map_err(io::Error::from),
        };
        match reserved {
            // Not every file system can reserve space.
            Err(e) if e.kind() == io::ErrorKind::Unsupported => draft.file().write_all(&[0; 4096]),
            reserved => reserved,
        }
        .map_err(|e| StoreError::io("write", &draft.path, e))
    }

    /// Returns the bytes on disk of all data devices, and of the first bytes of layers that did not come whole.
    pub fn data_usage(&self) -> Result<u64, StoreError> {
        let of_layer = |layer: &LayerDir| layer.data_usage() + layer.partial_usage();
        Ok(self.layers()?.iter().map(of_layer).sum())
    }

    /// Returns the bytes on disk of everything that the limit of the cache covers: the bytes of
    /// [`Store::data_usage`], trees, and files being written.
    pub(crate) fn cache_usage(&self) -> Result<u64, StoreError> {
        let trees: u64 = self.trees()?.iter().map(|tree| tree.bytes).sum();
        Ok(self.data_usage()? + trees + self.draft_usage()?)
    }

    /// Returns the bytes on disk of files being written.
    pub(crate) fn draft_usage(&self) -> Result<u64, StoreError> {
        let entries = self.entries("tmp")?;
        let sizes = entries.iter().filter_map(|entry| entry.metadata().ok());
        Ok(sizes.map(|metadata| on_disk(&metadata)).sum())
    }

    /// Opens the file whose lock the evicting process holds. Creates the file if it is missing.
    pub(crate) fn eviction_lock(&self) -> Result<(File, PathBuf), StoreError> {
        let path = self.writable_root()?.join("eviction.lock");
        match open_or_replace(private().create(true).truncate(false), &path) {
            Ok(file) => Ok((file, path)),
            Err(e) => Err(StoreError::io("open", &path, e)),
        }
    }

    /// Returns the path for the private directory of a writable mount.
    pub fn upper_dir(&self, id: &str) -> Result<PathBuf, StoreError> {
        Ok(self.writable_root()?.join("uppers").join(id))
    }

    /// Writes a file under a temporary name, and renames it to `target` when it is complete.
    pub fn publish(
        &self,
        target: &Path,
        durability: Durability,
        write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
    ) -> Result<(), StoreError> {
        let draft = self.draft()?;
        let result = (|| {
            let mut file = BufWriter::with_capacity(1 << 18, draft.file().try_clone()?);
            write(&mut file)?;
            let file = file.into_inner().map_err(io::IntoInnerError::into_error)?;
            if durability == Durability::Synced {
                file.sync_data()?;
            }
            draft.publish(target).map(drop)
        })();
        result.map_err(|e| StoreError::io("write", target, e))
    }

    /// Writes a file like [`Store::publish`], with a seal that [`read_sealed`] checks.
    pub(crate) fn publish_sealed(
        &self,
        target: &Path,
        durability: Durability,
        write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> Result<(), StoreError> {
        self.publish(target, durability, |file| {
            let mut sealing = SealingWriter::new(target, file);
            write(&mut sealing)?;
            sealing.finish()
        })
    }
}

/// Returns the layout that a version file names, if it is not the layout of this program. A text that names no layout
/// counts as damaged, and returns none.
fn other_version(text: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(text).ok()?.strip_suffix('\n')?;
    let number: u32 = text.strip_prefix("ocifs store ")?.parse().ok()?;
    (format!("ocifs store {number}\n") != VERSION).then(|| text.to_owned())
}

/// Records that a file was used just now, as its time of modification. The record is a hint, so a failure does not
/// matter.
fn touch(path: &Path) {
    let opened = open_regular(File::options().read(true), path);
    let touched = opened.and_then(|file| file.set_modified(SystemTime::now()));
    if let Err(error) = touched {
        tracing::debug!(path = %path.display(), %error, "cannot note the use of a file");
    }
}

fn create_parent(target: &Path) -> io::Result<()> {
    target.parent().map_or(Ok(()), create_directory)
}

/// Creates a directory, and those above it that are missing, for this user alone.
fn create_directory(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Returns the options with which files are created and opened for writing: for this user alone.
fn private() -> fs::OpenOptions {
    let mut options = File::options();
    options.write(true).mode(0o600);
    options
}

/// Whether a published file must survive a power cut whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// A reader notices a torn file, because the file is checked as a whole or does not parse.
    Lazy,
    /// A reader may not notice a torn file. The store flushes the file before its name appears.
    Synced,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interrupted_write_publishes_nothing_and_is_swept() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let target = dir.path().join("trees/x");
        let failed = store.publish(&target, Durability::Lazy, |f| {
            f.write_all(b"half")?;
            Err(io::Error::from(io::ErrorKind::StorageFull))
        });
        assert!(failed.is_err() && !target.exists());
        assert_eq!(fs::read_dir(dir.path().join("tmp")).unwrap().count(), 0);
        File::create(dir.path().join("tmp/left")).unwrap();
        Store::open(dir.path()).unwrap();
        assert_eq!(fs::read_dir(dir.path().join("tmp")).unwrap().count(), 0);
    }

    #[test]
    fn another_layout_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("version"), "ocifs store 99\n").unwrap();
        let error = Store::open(dir.path()).unwrap_err();
        assert!(
            matches!(error, StoreError::Version { ref found, .. } if found == "ocifs store 99"),
            "{error}"
        );
    }
}
