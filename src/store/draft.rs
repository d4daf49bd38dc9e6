//! Drafts: files that are being written and have no name of their own yet.
//!
//! A draft lies in `tmp`, and its writer holds its lock. A draft without a lock was left by a writer that died. Every
//! process that opens the store deletes such drafts. A new draft exists for a moment before it is locked. If another
//! process deletes it in that moment, the writer notices and makes another draft.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

use super::{Store, StoreError, create_parent, private};
use crate::os::{clear_way, gone, is_at, is_foreign, on_disk, open_regular};

/// A file in `tmp`. Dropping the draft deletes the file, unless it was published.
#[derive(Debug)]
pub struct Draft {
    /// The file, until it is published.
    file: Option<Flock<File>>,
    pub(super) path: PathBuf,
}

impl Draft {
    /// Makes a draft in `directory`. Its name begins with `owner`, which says what the draft belongs to.
    pub(super) fn create(directory: &Path, owner: &str) -> Result<Self, StoreError> {
        loop {
            let path = directory.join(format!("{owner}.{:016x}", fastrand::u64(..)));
            let create = private().read(true).create_new(true).open(&path);
            let locked =
                create.and_then(|file| Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, e)| io::Error::from(e)));
            let file = locked.map_err(|e| StoreError::io("write", &path, e))?;
            if is_at(file.as_fd(), &path) {
                return Ok(Self { file: Some(file), path });
            }
        }
    }

    /// Returns the file, for reading and writing.
    pub fn file(&self) -> &File {
        self.file.as_ref().expect("a draft has its file until it is published")
    }

    /// Gives the file its name, in place of anything else with that name.
    pub fn publish(mut self, target: &Path) -> io::Result<File> {
        create_parent(target)?;
        if let Err(error) = fs::rename(&self.path, target) {
            // A directory is in the way.
            if fs::symlink_metadata(target).is_ok_and(|found| found.is_dir()) {
                clear_way(target)?;
                fs::rename(&self.path, target)?;
            } else {
                return Err(error);
            }
        }
        let file = self.file.take().expect("a draft has its file until it is published");
        file.unlock().map_err(|(_, e)| e.into())
    }

    /// Gives the file its name, unless another file has the name already. Then the other file stays.
    pub(crate) fn publish_new(self, target: &Path) -> io::Result<()> {
        create_parent(target)?;
        match fs::hard_link(&self.path, target) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(e),
            _ => Ok(()),
        }
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        // A published draft has left this path already.
        if let Err(error) = gone(fs::remove_file(&self.path)) {
            tracing::warn!(path = %self.path.display(), %error, "an unfinished file stays until the store is opened again");
        }
    }
}

/// Deletes the drafts in `directory` whose writers are dead.
pub(super) fn sweep(directory: &Path) {
    for path in drafts(directory) {
        let file = match open_regular(File::options().read(true), &path) {
            Ok(file) => file,
            Err(error) => {
                // A draft is always a file, so ocifs did not make this one.
                if is_foreign(&error)
                    && let Err(error) = clear_way(&path)
                {
                    tracing::warn!(path = %path.display(), %error, "cannot remove what is no file of the store");
                }
                continue;
            }
        };
        // Hold the lock until the file is gone. Otherwise a writer that has just made the draft could lock it in
        // between, and would find it in its place.
        let Ok(_held) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else {
            continue;
        };
        if let Err(error) = gone(fs::remove_file(&path)) {
            tracing::warn!(path = %path.display(), %error, "cannot remove what a dead process left");
        }
    }
}

/// Returns the bytes on disk of the drafts in `directory` that belong to `owner`.
pub(super) fn usage(directory: &Path, owner: &str) -> u64 {
    let prefix = format!("{owner}.");
    let of_owner = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str());
        name.is_some_and(|name| name.starts_with(&prefix))
    };
    let mine = drafts(directory).filter(of_owner);
    mine.map(|path| fs::metadata(path).map_or(0, |m| on_disk(&m))).sum()
}

fn drafts(directory: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.path())
}

impl Store {
    /// Makes a draft: a file that is being written and has no name of its own yet.
    pub(crate) fn draft(&self) -> Result<Draft, StoreError> {
        self.draft_of("file")
    }

    /// Makes a draft like [`Store::draft`] for a file of a layer. The usage of the layer includes the draft.
    pub(crate) fn layer_draft(&self, layer: &super::LayerDir) -> Result<Draft, StoreError> {
        self.draft_of(&layer.name())
    }

    fn draft_of(&self, owner: &str) -> Result<Draft, StoreError> {
        Draft::create(&self.writable_root()?.join("tmp"), owner)
    }

    /// Returns the bytes on disk of the drafts of a layer.
    pub fn drafts_usage(&self, layer: &super::LayerDir) -> u64 {
        self.root().map_or(0, |root| usage(&root.join("tmp"), &layer.name()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_drafts_of_dead_writers_are_swept() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("left"), b"half").unwrap();
        let draft = Draft::create(dir.path(), "layer").unwrap();
        io::Write::write_all(&mut draft.file(), &[1; 5000]).unwrap();
        sweep(dir.path());
        assert!(drafts(dir.path()).eq([draft.path.clone()]));
        assert_eq!((usage(dir.path(), "layer"), usage(dir.path(), "lay")), (8192, 0));
        drop(draft);
        assert_eq!(drafts(dir.path()).count(), 0);
    }

    #[test]
    fn no_draft_is_lost_to_somebody_who_sweeps() {
        let dir = &tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            let (goes_on, ends) = std::sync::mpsc::channel::<()>();
            // The sweeping thread ends when the other side is gone, also after a panic.
            scope.spawn(move || {
                while ends.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty) {
                    sweep(dir.path());
                }
            });
            let _goes_on = goes_on;
            for i in 0..2000 {
                let draft = Draft::create(dir.path(), "x").unwrap();
                draft
                    .publish(&dir.path().with_extension("published"))
                    .unwrap_or_else(|e| panic!("{i}: {e}"));
            }
        });
        fs::remove_file(dir.path().with_extension("published")).unwrap();
    }
}
