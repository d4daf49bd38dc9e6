//! Mounts, registration and private upper directory of the process behind a mount. All of them go when it ends.

use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use nix::fcntl::Flock;

use super::error::{MountError, system};
use super::registration::{MountRecord, RunEntry};
use super::standing::Standing;
use super::{kernel, mountinfo, overlay};

/// Everything that this process has to take down. Dropping it takes down whatever is left.
pub(super) struct Attached {
    pub(super) entry: RunEntry,
    pub(super) record: MountRecord,
    /// The mounts of this process. A later mount lies on the earlier ones.
    mounts: Vec<Standing>,
    /// Whether the registration still has to be removed.
    registered: bool,
    /// The turn for this mount point ([`RunEntry::turn`]). The process holds it until the mount stands.
    pub(super) turn: Option<File>,
    /// The lock on the directories of the overlay. The process holds it as long as the overlay uses them.
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

    /// Records the mount that was just made at `path`. Writes it into the registration if it is the mount that the
    /// user sees.
    pub(super) fn add(&mut self, path: &Path) -> Result<(), MountError> {
        let entry = mountinfo::at(path).map_err(system("read the mount table"))?;
        // If another program has already unmounted it, there is nothing to take down.
        let Some(entry) = entry else { return Ok(()) };
        let standing = kernel::identify(path, entry.standing());
        self.mounts.push(standing.clone());
        if self.record.lower == self.record.mountpoint || entry.fs_type != "fuse.ocifs" {
            self.record.standing = Some(standing);
            self.entry.write(&self.record)?;
        }
        Ok(())
    }

    /// Records the overlay at `mountpoint` and unmounts the mounts that it was made from. `lock` marks the
    /// directories of the overlay as in use.
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

    /// Forgets the mounts that have no unique id, because another program has unmounted them. Other mounts may have
    /// their numbers by now.
    pub(super) fn forget_mounts(&mut self) {
        self.mounts.retain(|mount| mount.unique.is_some());
    }

    /// Unmounts everything. Without `lazy` it stops with an error at the first mount that is in use, and that mount
    /// stays.
    pub(super) fn detach(&mut self, lazy: bool) -> Result<(), MountError> {
        while let Some(mount) = self.mounts.last() {
            kernel::unmount(mount, lazy)?;
            self.mounts.pop();
        }
        Ok(())
    }

    /// Removes the registration, wherever another process has moved it. After an unmount by another program, the
    /// mount point may already be registered to another process.
    pub(super) fn unregister(&mut self) -> Result<(), MountError> {
        if !self.registered {
            return Ok(());
        }
        self.registered = false;
        // If the turn does not come in time, the removal goes on without it. It may then undo the work of another
        // process here, which will report an error. A registration that stays for ever would be worse.
        let _turn = match self.turn.take() {
            Some(turn) => Some(turn),
            None => self.entry.turn_at_last()?,
        };
        if let Some(entry) = self.entry.of(self.record.pid)? {
            // The log of a background process is its standard error.
            entry.remove(Some(io::stderr().as_fd()))?;
        }
        Ok(())
    }

    /// Deletes the private upper directory. The overlay must have no users any more.
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
