//! The directories of snapshots with changes.
//!
//! ```text
//! ROOT/snapshots/ID/fs     the changes, the upper directory of an overlay
//!                   work   scratch space of overlayfs
//! ```

use std::collections::HashSet;
use std::fs::{self, DirBuilder, Metadata, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};

use super::error::SnapshotError;
use super::record::DiskUsage;
use crate::os::{gone, on_disk, private};

/// The mode of a root that nothing is below.
const ROOT_MODE: u32 = 0o755;

/// The directories of the snapshots of a root.
#[derive(Debug)]
pub struct SnapshotDirs {
    path: PathBuf,
}

impl SnapshotDirs {
    /// Makes the directory for all of them.
    pub fn open(path: PathBuf) -> Result<Self, SnapshotError> {
        private::directory(&path).map_err(SnapshotError::io(&path))?;
        Ok(Self { path })
    }

    fn directory(&self, id: u64) -> PathBuf {
        self.path.join(id.to_string())
    }

    /// Returns the directory with the changes of a snapshot.
    pub fn changes(&self, id: u64) -> PathBuf {
        self.directory(id).join("fs")
    }

    /// Returns the scratch space of overlayfs for a snapshot.
    pub fn work(&self, id: u64) -> PathBuf {
        self.directory(id).join("work")
    }

    /// Makes the directories of a snapshot. `below` has the attributes of the root of what is below: the root of an
    /// overlay has those of its upper directory.
    pub fn create(&self, id: u64, below: Option<&Metadata>) -> Result<(), SnapshotError> {
        let directory = self.directory(id);
        private::directory(&directory).map_err(SnapshotError::io(&directory))?;
        let (changes, work) = (self.changes(id), self.work(id));
        let make = |path: &Path, mode: u32| DirBuilder::new().mode(mode).create(path);
        make(&work, 0o711).map_err(SnapshotError::io(&work))?;
        let made = make(&changes, 0o700).and_then(|()| match below {
            // Without the right to change owners, overlays of this user show the user as owner anyway.
            Some(below) => {
                chown(&changes, Some(below.uid()), Some(below.gid())).or_else(only_for_root)?;
                fs::set_permissions(&changes, below.permissions())
            }
            None => fs::set_permissions(&changes, Permissions::from_mode(ROOT_MODE)),
        });
        made.map_err(SnapshotError::io(&changes))
    }

    /// Removes the directories of a snapshot, if there are any.
    pub fn remove(&self, id: u64) -> Result<(), SnapshotError> {
        remove_all(&self.directory(id))
    }

    /// Removes the directories of all but the snapshots that `ids` returns, which is asked after the directories were
    /// listed. The others are left by a process that was killed.
    pub fn remove_others(&self, ids: impl FnOnce() -> HashSet<u64>) -> Result<(), SnapshotError> {
        let failed = SnapshotError::io(&self.path);
        let entries = fs::read_dir(&self.path).map_err(&failed)?;
        let found: Vec<fs::DirEntry> = entries.collect::<Result<_, _>>().map_err(&failed)?;
        let ids = ids();
        for entry in found {
            let id = entry.file_name().to_str().and_then(|name| name.parse().ok());
            if id.is_none_or(|id| !ids.contains(&id)) {
                remove_all(&entry.path())?;
            }
        }
        Ok(())
    }

    /// Returns the disk space of the changes of a snapshot.
    pub fn usage(&self, id: u64) -> Result<DiskUsage, SnapshotError> {
        let mut usage = DiskUsage::default();
        let mut seen = HashSet::new();
        let mut todo = vec![self.changes(id)];
        while let Some(path) = todo.pop() {
            let found = match fs::symlink_metadata(&path) {
                // A container that runs deletes files meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                found => found.map_err(SnapshotError::io(&path))?,
            };
            if !seen.insert((found.dev(), found.ino())) {
                continue;
            }
            usage.size += on_disk(&found);
            usage.inodes += 1;
            if !found.is_dir() {
                continue;
            }
            match fs::read_dir(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                entries => {
                    for entry in entries.map_err(SnapshotError::io(&path))? {
                        todo.push(entry.map_err(SnapshotError::io(&path))?.path());
                    }
                }
            }
        }
        Ok(usage)
    }
}

fn only_for_root(error: io::Error) -> io::Result<()> {
    match error.kind() {
        io::ErrorKind::PermissionDenied => Ok(()),
        _ => Err(error),
    }
}

fn remove_all(path: &Path) -> Result<(), SnapshotError> {
    gone(fs::remove_dir_all(path)).map_err(SnapshotError::io(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_looks_like_what_is_below_it() {
        let dir = tempfile::tempdir().unwrap();
        let dirs = SnapshotDirs::open(dir.path().join("snapshots")).unwrap();
        dirs.create(1, None).unwrap();
        let mode = |id| fs::metadata(dirs.changes(id)).unwrap().mode() & 0o7777;
        assert_eq!(mode(1), ROOT_MODE);
        fs::set_permissions(dirs.changes(1), Permissions::from_mode(0o1777)).unwrap();
        let below = fs::metadata(dirs.changes(1)).unwrap();
        dirs.create(2, Some(&below)).unwrap();
        assert_eq!(mode(2), 0o1777);
        assert!(dirs.create(2, None).is_err(), "two snapshots share a directory");
    }

    #[test]
    fn usage_counts_a_file_with_two_names_once() {
        let dir = tempfile::tempdir().unwrap();
        let dirs = SnapshotDirs::open(dir.path().join("snapshots")).unwrap();
        dirs.create(1, None).unwrap();
        let empty = dirs.usage(1).unwrap();
        assert_eq!(empty.inodes, 1);
        fs::write(dirs.changes(1).join("a"), vec![1; 100_000]).unwrap();
        fs::hard_link(dirs.changes(1).join("a"), dirs.changes(1).join("b")).unwrap();
        let usage = dirs.usage(1).unwrap();
        assert_eq!(usage.inodes, 2);
        assert!((100_000..150_000).contains(&(usage.size - empty.size)), "{usage:?}");
    }

    #[test]
    fn what_no_snapshot_has_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let dirs = SnapshotDirs::open(dir.path().join("snapshots")).unwrap();
        for id in 1..=3 {
            dirs.create(id, None).unwrap();
            fs::write(dirs.changes(id).join("a"), "a").unwrap();
        }
        dirs.remove_others(|| [2].into()).unwrap();
        dirs.remove(3).unwrap();
        let left: Vec<_> = fs::read_dir(dir.path().join("snapshots")).unwrap().collect();
        assert_eq!(left.len(), 1);
        assert!(dirs.changes(2).join("a").exists());
    }
}
