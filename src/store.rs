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
//! STORE/trees/ALG-HEX.erofs          merged tree, by digest of the manifest
//! STORE/trees/ALG-HEX.programs       which of its programs load which files, a hint
//! STORE/profiles/ALG-HEX.LABEL       what starts of an image's program read, a hint
//! STORE/{documents,profiles}/of/     which of them belong to a repository or reference
//! STORE/uppers/ID/                   private upper directories of writable mounts
//! STORE/tmp/OWNER.RANDOM             files being written ("drafts")
//! ```
//!
//! Invariants: a file outside `tmp` is complete, because it was renamed there; only `partial` grows in its place, and is not
//! believed. Documents are checked against the digest in their
//! name, spans, toc and extents against one that they carry, when they are read; a tree was flushed before it got its name; a
//! hint that does not parse counts as none; `data` follows the rules of [`crate::device`]. Deleting any of it but `uppers`, at
//! any time, costs fetches and nothing else. What is in a store that cannot be written is used but for `data`; one that cannot
//! even be opened is replaced by [`Store::unavailable`], which remembers nothing: the mount goes on from memory.

mod draft;
mod partial;
mod sealed;

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use nix::fcntl::FallocateFlags;
use nix::unistd::{AccessFlags, access};

use bytes::Bytes;

pub use draft::Draft;
pub use partial::Partial;
use sealed::SealingWriter;
pub use sealed::read_sealed;

use crate::oci::{Algorithm, Digest};

/// Content of `STORE/version`. Changes whenever an older ocifs could misread the directory.
const VERSION: &str = "ocifs store 1\n";

/// What can go wrong with the store.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// A file or directory could not be read or written.
    #[error("store: cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// Where.
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
        /// How that shows.
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
    /// Whether nothing can be kept because that is how the store is, and not because something failed.
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
    /// Opens the store at `root`, creating it if need be, and removes what dead writers left in `tmp`. The directory is
    /// for its owner alone: images may be private. A store that is there and may not be written is only read.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        create_directory(root).map_err(|e| StoreError::io("create", root, e))?;
        let mut writable = true;
        for directory in ["documents", "layers", "profiles", "trees", "uppers", "tmp"] {
            let path = root.join(directory);
            match create_directory(&path) {
                Ok(()) => writable &= access(&path, AccessFlags::W_OK).is_ok(),
                // An older ocifs may have made it without this one.
                Err(e) if is_denied(&e) && root.join("version").exists() => writable = false,
                Err(e) => return Err(StoreError::io("create", &path, e)),
            }
        }
        let store = Self {
            root: Some(root.to_owned()),
            writable,
        };
        let version = root.join("version");
        match fs::read_to_string(&version) {
            Ok(text) if text == VERSION => {}
            Ok(text) if text.starts_with("ocifs store ") => {
                return Err(StoreError::Version {
                    path: root.to_owned(),
                    found: text.lines().next().unwrap_or_default().chars().take(80).collect(),
                });
            }
            // Missing, or damaged: whatever is in the store is checked when it is used.
            Ok(_) => store.write_version(&version)?,
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidData) => {
                store.write_version(&version)?;
            }
            Err(e) => return Err(StoreError::io("read", &version, e)),
        }
        if store.writable {
            draft::sweep(&root.join("tmp"));
        }
        Ok(store)
    }

    /// Whole or not at all: others may be opening the new store at the same time.
    fn write_version(&self, path: &Path) -> Result<(), StoreError> {
        self.publish(path, Durability::Synced, |file| file.write_all(VERSION.as_bytes()))
    }

    /// A store that keeps nothing.
    pub fn unavailable() -> Self {
        Self {
            root: None,
            writable: false,
        }
    }

    /// Whether anything can be kept.
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// The directory, if it can be written.
    fn writable_root(&self) -> Result<&Path, StoreError> {
        let root = self.root.as_deref().ok_or(StoreError::Unavailable)?;
        match self.writable {
            true => Ok(root),
            false => Err(StoreError::ReadOnly { path: root.to_owned() }),
        }
    }

    /// The directory, if there is one.
    pub fn root(&self) -> Option<&Path> {
        self.root.as_deref()
    }

    /// Tries to write to the store, so many bytes or at least something.
    pub fn probe(&self, room: u64) -> Result<(), StoreError> {
        let draft = self.draft()?;
        let length = i64::try_from(room).unwrap_or(i64::MAX);
        let reserved = match room {
            0 => draft.file().write_all(b"probe"),
            _ => nix::fcntl::fallocate(draft.file(), FallocateFlags::empty(), 0, length).map_err(io::Error::from),
        };
        match reserved {
            // Not every file system can reserve.
            Err(e) if e.kind() == io::ErrorKind::Unsupported => draft.file().write_all(&[0; 4096]),
            reserved => reserved,
        }
        .map_err(|e| StoreError::io("write", &draft.path, e))
    }

    /// Where a document is kept.
    pub fn document_path(&self, digest: &Digest) -> Option<PathBuf> {
        let root = self.root.as_ref()?;
        Some(
            root.join("documents")
                .join(digest.algorithm().name())
                .join(digest.hex()),
        )
    }

    /// A document kept earlier, verified; a damaged one counts as absent and is removed.
    pub fn document(&self, digest: &Digest) -> Result<Option<Bytes>, StoreError> {
        let Some(path) = self.document_path(digest) else {
            return Ok(None);
        };
        match fs::read(&path) {
            Ok(bytes) if digest.matches(&bytes) => Ok(Some(bytes.into())),
            Ok(_) => {
                tracing::warn!(path = %path.display(), "stored document does not match its digest, removing it");
                fs::remove_file(&path).map_err(|e| StoreError::io("remove", &path, e))?;
                Ok(None)
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(StoreError::io("read", &path, e)),
        }
    }

    /// Digests of all documents.
    pub fn documents(&self) -> Result<Vec<Digest>, StoreError> {
        let Some(root) = &self.root else {
            return Ok(Vec::new());
        };
        let mut digests = Vec::new();
        let documents = root.join("documents");
        for algorithm in Algorithm::ALL {
            let path = documents.join(algorithm.name());
            let entries = match fs::read_dir(&path) {
                Ok(entries) => entries,
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => return Err(StoreError::io("list", &path, e)),
            };
            let names = entries
                .flatten()
                .filter_map(|entry| entry.file_name().into_string().ok());
            digests.extend(names.filter_map(|hex| format!("{}:{hex}", algorithm.name()).parse::<Digest>().ok()));
        }
        Ok(digests)
    }

    /// Keeps a document that was verified against `digest`.
    pub fn put_document(&self, digest: &Digest, bytes: &[u8]) -> Result<(), StoreError> {
        let path = self.document_path(digest).ok_or(StoreError::Unavailable)?;
        if path.exists() {
            return Ok(());
        }
        self.publish(&path, Durability::Lazy, |file| file.write_all(bytes))
    }

    /// Digest of the document that an image's name meant the last time.
    pub fn root_document(&self, name: &str) -> Option<Digest> {
        let path = self.name_path(name)?;
        let text = fs::read_to_string(path).ok()?;
        text.trim_end().parse().ok()
    }

    /// Remembers which document an image's name means.
    pub fn set_root_document(&self, name: &str, digest: &Digest) -> Result<(), StoreError> {
        if self.root_document(name).as_ref() == Some(digest) {
            self.touch_root_document(name);
            return Ok(());
        }
        let path = self.name_path(name).ok_or(StoreError::Unavailable)?;
        self.publish(&path, Durability::Lazy, |file| writeln!(file, "{digest}"))
    }

    /// How long ago it was last said what an image's name means.
    pub fn root_document_age(&self, name: &str) -> Option<Duration> {
        let modified = fs::metadata(self.name_path(name)?).ok()?.modified().ok()?;
        modified.elapsed().ok()
    }

    /// A name that means what it meant before was confirmed now.
    fn touch_root_document(&self, name: &str) {
        let Some(path) = self.name_path(name) else { return };
        let touched = File::open(&path).and_then(|file| file.set_modified(SystemTime::now()));
        if let Err(error) = touched {
            tracing::debug!(path = %path.display(), %error, "cannot note when the image's name was confirmed");
        }
    }

    /// Names have slashes and colons in them, so theirs are hashed.
    fn name_path(&self, name: &str) -> Option<PathBuf> {
        let hash = blake3::hash(name.as_bytes()).to_hex();
        let root = self.root.as_ref()?;
        Some(root.join("documents").join("of").join(&hash[..32]))
    }

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
        let Some(root) = &self.root else {
            return Ok(Vec::new());
        };
        let path = root.join("layers");
        let entries = fs::read_dir(&path).map_err(|e| StoreError::io("list", &path, e))?;
        Ok(entries.flatten().map(|e| LayerDir { path: e.path() }).collect())
    }

    /// The merged trees, with what each takes on disk and when it was last used.
    pub fn trees(&self) -> Result<Vec<StoredTree>, StoreError> {
        let Some(root) = &self.root else {
            return Ok(Vec::new());
        };
        let path = root.join("trees");
        let entries = fs::read_dir(&path).map_err(|e| StoreError::io("list", &path, e))?;
        let trees = entries.flatten().filter_map(|entry| {
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
        let touched = File::open(path).and_then(|file| file.set_modified(SystemTime::now()));
        if let Err(error) = touched {
            tracing::debug!(path = %path.display(), %error, "cannot note the use of a tree");
        }
    }

    /// Bytes on disk of all data devices, and of what is kept of layers that did not come whole.
    pub fn data_usage(&self) -> Result<u64, StoreError> {
        let of_layer = |layer: &LayerDir| layer.data_usage() + layer.partial_usage();
        Ok(self.layers()?.iter().map(of_layer).sum())
    }

    /// Bytes on disk of everything that the limit of the cache is about: data devices, trees, and files being written.
    pub fn cache_usage(&self) -> Result<u64, StoreError> {
        let trees: u64 = self.trees()?.iter().map(|tree| tree.bytes).sum();
        Ok(self.data_usage()? + trees + self.draft_usage()?)
    }

    /// Bytes on disk of files being written.
    pub fn draft_usage(&self) -> Result<u64, StoreError> {
        let Some(root) = &self.root else { return Ok(0) };
        let path = root.join("tmp");
        let entries = fs::read_dir(&path).map_err(|e| StoreError::io("list", &path, e))?;
        let sizes = entries.flatten().filter_map(|entry| entry.metadata().ok());
        Ok(sizes.map(|metadata| on_disk(&metadata)).sum())
    }

    /// Opens (and creates) the file whose lock the evicting process holds.
    pub fn eviction_lock(&self) -> Result<(File, PathBuf), StoreError> {
        let path = self.writable_root()?.join("eviction.lock");
        match private().create(true).truncate(false).open(&path) {
            Ok(file) => Ok((file, path)),
            Err(e) => Err(StoreError::io("open", &path, e)),
        }
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

    /// Where the profile of an image's program is kept.
    pub fn profile(&self, manifest: &Digest, label: &str) -> Option<PathBuf> {
        let root = self.root.as_ref()?;
        Some(root.join("profiles").join(profile_name(manifest, label)))
    }

    /// Labels of the profiles of an image.
    pub fn profile_labels(&self, manifest: &Digest) -> Result<Vec<String>, StoreError> {
        let Some(root) = &self.root else {
            return Ok(Vec::new());
        };
        let path = root.join("profiles");
        let entries = fs::read_dir(&path).map_err(|e| StoreError::io("list", &path, e))?;
        let prefix = profile_name(manifest, "");
        let labels = entries.flatten().filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            name.strip_prefix(&prefix).map(str::to_owned)
        });
        let mut labels: Vec<String> = labels.collect();
        labels.sort();
        Ok(labels)
    }

    /// Remembers that there is a profile of an image of this repository.
    pub fn mark_profile(&self, repository: &str, manifest: &Digest, label: &str) -> Result<(), StoreError> {
        let root = self.root.as_ref().ok_or(StoreError::Unavailable)?;
        let mark = repository_dir(root, repository).join(profile_name(manifest, label));
        // A new file each time: its time is that of the profile.
        self.publish(&mark, Durability::Lazy, |_| Ok(()))
    }

    /// Manifests of a repository of which there may be a profile with this label, newest first, at most `most` of them.
    pub fn profiles_of(&self, repository: &str, label: &str, most: usize) -> Vec<Digest> {
        let Some(root) = &self.root else { return Vec::new() };
        let Ok(entries) = fs::read_dir(repository_dir(root, repository)) else {
            return Vec::new();
        };
        let mut found: Vec<(SystemTime, Digest)> = entries
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                let (manifest, of) = name.split_once('.')?;
                let manifest = manifest.replacen('-', ":", 1).parse().ok()?;
                let modified = entry.metadata().and_then(|m| m.modified()).ok()?;
                (of == label).then_some((modified, manifest))
            })
            .collect();
        found.sort_by(|a, b| b.cmp(a));
        found.into_iter().take(most).map(|(_, manifest)| manifest).collect()
    }

    /// Where the private directory of a writable mount is to be.
    pub fn upper_dir(&self, id: &str) -> Result<PathBuf, StoreError> {
        Ok(self.writable_root()?.join("uppers").join(id))
    }

    /// Writes a file under a temporary name and renames it to `target` when it is complete.
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
    pub fn publish_sealed(
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

/// Bytes that a file takes on disk.
pub fn on_disk(metadata: &fs::Metadata) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    metadata.blocks() * 512
}

/// The outcome of a removal, for whoever wants the thing gone and does not mind that it was not there.
pub fn gone(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Whether `path` is a name of the open file.
pub fn is_at(file: BorrowedFd<'_>, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    let open = file.try_clone_to_owned().and_then(|fd| File::from(fd).metadata());
    matches!((open, fs::metadata(path)), (Ok(open), Ok(named)) if open.ino() == named.ino() && open.dev() == named.dev())
}

/// File name of the profile of an image's program, or of the mark of one.
fn profile_name(manifest: &Digest, label: &str) -> String {
    format!("{}-{}.{label}", manifest.algorithm().name(), manifest.hex())
}

/// Marks of the profiles of a repository. Repositories have slashes in their names, so theirs is hashed.
fn repository_dir(root: &Path, repository: &str) -> PathBuf {
    let hash = blake3::hash(repository.as_bytes()).to_hex();
    root.join("profiles").join("of").join(&hash[..32])
}

fn create_parent(target: &Path) -> io::Result<()> {
    target.parent().map_or(Ok(()), create_directory)
}

/// Creates a directory, and those above it, for this user alone.
fn create_directory(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Whether something may not be written.
pub fn is_denied(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied
    )
}

/// How files are created and opened for writing: for this user alone.
fn private() -> fs::OpenOptions {
    let mut options = File::options();
    options.write(true).mode(0o600);
    options
}

/// Whether a published file must survive a power cut whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// A torn file is found whenever it is read: it is checked as a whole, or does not parse.
    Lazy,
    /// The file is not checked as a whole: flush it before its name appears.
    Synced,
}

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
    fn name(&self) -> String {
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
        private()
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(|e| StoreError::io("open", &path, e))
    }

    /// Whether `lock` is (still) the file that [`LayerDir::lock_file`] opens.
    pub fn is_lock_file(&self, lock: &File) -> bool {
        is_at(lock.as_fd(), &self.path.join("lock"))
    }

    /// Removes the span index, without which the layer counts as not indexed.
    pub fn forget(&self) -> Result<(), StoreError> {
        let path = self.spans();
        gone(fs::remove_file(&path)).map_err(|e| StoreError::io("remove", &path, e))
    }

    /// Bytes the data device occupies on disk; 0 if there is none.
    pub fn data_usage(&self) -> u64 {
        fs::metadata(self.data()).map_or(0, |m| on_disk(&m))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_survive_and_damage_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let digest = Digest::of(b"{}");
        assert!(store.document(&digest).unwrap().is_none());
        store.put_document(&digest, b"{}").unwrap();
        assert_eq!(store.document(&digest).unwrap().unwrap(), &b"{}"[..]);
        fs::write(store.document_path(&digest).unwrap(), b"[]").unwrap();
        assert!(store.document(&digest).unwrap().is_none());
        assert!(!store.document_path(&digest).unwrap().exists());
    }

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
