//! What a mount's process attached: mounts, registration, private upper directory. It all goes, one way or another.

use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use nix::fcntl::Flock;

use super::registration::{MountRecord, RunEntry, Standing};
use super::error::{MountError, system};
use super::{kernel, mountinfo, overlay};

/// What this process attached and has to take down, at the latest when this is dropped.
pub(super) struct Attached {
    pub(super) entry: RunEntry,
    pub(super) record: MountRecord,
    /// The later ones lie on the earlier ones.
    mounts: Vec<Standing>,
    registered: bool,
    /// Held until the mount stands; see [`RunEntry::turn`].
    pub(super) turn: Option<File>,
    /// Held as long as the directories of the overlay are used.
    upper_lock: Option<Flock<File>>,
}

impl Attached {
    pub(super) fn new(entry: RunEntry, record: MountRecord, turn: File) -> Self {
        Self {
            entry,
            record,
            mounts: Vec::new(),
            registered: true,
            turn: Some(turn),
            upper_lock: None,
        }
    }

    /// Remembers what was just mounted at `path`. The mount that the user sees is written into the registration.
    pub(super) fn add(&mut self, path: &Path) -> Result<(), MountError> {
        let entry = mountinfo::at(path).map_err(system("read the mount table"))?;
        // If it is gone by now, there is nothing to take down.
        let Some(entry) = entry else { return Ok(()) };
        self.mounts.push(entry.standing());
        if self.record.lower == self.record.mountpoint || entry.fs_type != "fuse.ocifs" {
            self.record.standing = Some(entry.standing());
            self.entry.write(&self.record)?;
        }
        Ok(())
    }

    /// Remembers an overlay, and takes away the mounts that it was made from. `lock` marks its directories as in use.
    pub(super) fn cover(&mut self, mountpoint: PathBuf, lock: Flock<File>) -> Result<(), MountError> {
        self.upper_lock = Some(lock);
        let below = self.mounts.len();
        self.add(&mountpoint)?;
        for _ in 0..below {
            kernel::unmount(&self.mounts[0], true)?;
            self.mounts.remove(0);
        }
        Ok(())
    }

    /// Whoever took the mounts down, they are gone.
    pub(super) fn forget_mounts(&mut self) {
        self.mounts.clear();
    }

    /// Unmounts everything. Without `lazy` it stops, with everything standing, if something is in use.
    pub(super) fn detach(&mut self, lazy: bool) -> Result<(), MountError> {
        while let Some(mount) = self.mounts.last() {
            kernel::unmount(mount, lazy)?;
            self.mounts.pop();
        }
        Ok(())
    }

    /// Removes the registration, wherever it is by now. After an unmount by somebody else, the mount point may be registered
    /// to another process already.
    pub(super) fn unregister(&mut self) -> Result<(), MountError> {
        if !self.registered {
            return Ok(());
        }
        self.registered = false;
        // Without the turn, what another process is about to do may be undone here; it will say so. Staying is worse.
        let _turn = match self.turn.take() {
            Some(turn) => Some(turn),
            None => self.entry.turn_at_last()?,
        };
        if let Some(entry) = self.entry.of(self.record.pid)? {
            // The log of a process in the background is its standard error.
            entry.remove(Some(io::stderr().as_fd()))?;
        }
        Ok(())
    }

    /// Deletes the private upper directory, when nobody uses the overlay any more.
    pub(super) fn discard(&mut self) {
        if let Some(scratch) = self.record.scratch.take() {
            overlay::discard(&scratch);
        }
        self.upper_lock = None;
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        for result in [self.detach(true), self.unregister()] {
            if let Err(error) = result {
                tracing::error!(%error, "cannot take the mount down");
            }
        }
        self.discard();
    }
}
