//! Mounts, registration and private upper directory of the process behind a mount. All of them go when it ends.

use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::{Arc, Mutex};

use nix::fcntl::Flock;

use super::error::{MountError, system};
use super::kernel::{Unmount, UnmountCall};
use super::registration::{AttachPhase, MountRecord, RunEntry};
use super::standing::Standing;
use super::{kernel, mountinfo, overlay};

/// Unmounts that had not returned when they were looked at: the kernel flushes changes, or waits for reads.
#[derive(Debug, Clone, Default)]
pub(super) struct Unfinished(Arc<Mutex<Vec<UnmountCall>>>);

impl Unfinished {
    fn add(&self, call: UnmountCall) {
        self.0.lock().expect("no panic while locked").push(call);
    }

    /// Whether one of them has still not returned.
    pub(super) fn any(&self) -> bool {
        let calls = self.0.lock().expect("no panic while locked");
        calls.iter().any(|call| !call.is_finished())
    }
}

/// Everything that this process has to take down. Dropping it takes down whatever is left.
pub(super) struct Attached {
    pub(super) entry: RunEntry,
    pub(super) record: MountRecord,
    /// The mounts of this process. A later mount lies on the earlier ones.
    mounts: Vec<Standing>,
    unfinished: Unfinished,
    /// Whether the registration still has to be removed.
    registered: bool,
    /// The turn for this mount point ([`RunEntry::turn`]). The process holds it until the mount stands, unless the
    /// record in the registration says that it will mount later.
    turn: Option<File>,
    /// The lock on the directories of the overlay. The process holds it as long as the overlay uses them.
    upper_lock: Option<Flock<File>>,
}

impl Attached {
    /// `turn` is given if this process still has to look at the mount point and to mount there.
    pub(super) fn new(entry: RunEntry, record: MountRecord, turn: Option<File>) -> Self {
        Self {
            entry,
            record,
            mounts: Vec::new(),
            unfinished: Unfinished::default(),
            registered: true,
            turn,
            upper_lock: None,
        }
    }

    /// Writes the record into the registration.
    pub(super) fn write(&self) -> Result<(), MountError> {
        Ok(self.entry.write(&self.record)?)
    }

    /// Records a mount that was just made at `path`. Returns its identity. If another program has already unmounted
    /// it, there is nothing to take down, and this returns `None`.
    pub(super) fn add(&mut self, path: &Path) -> Result<Option<Standing>, MountError> {
        let entry = mountinfo::at(path).map_err(system("read the mount table"))?;
        let Some(entry) = entry else { return Ok(None) };
        let standing = kernel::identify(path, entry.standing());
        self.mounts.push(standing.clone());
        Ok(Some(standing))
    }

    /// Records the mount that was just made at `path`, which is the one that the user sees.
    pub(super) fn show(&mut self, path: &Path) -> Result<(), MountError> {
        self.record.standing = self.add(path)?;
        self.attach()
    }

    /// Writes into the registration that the image is attached.
    pub(super) fn attach(&mut self) -> Result<(), MountError> {
        self.record.phase = AttachPhase::Attached;
        self.write()?;
        self.turn = None;
        Ok(())
    }

    /// Records the mount that the user sees at `path`, and unmounts the mounts that it was made from. `lock` marks the
    /// directories of an overlay as in use.
    pub(super) fn cover(&mut self, path: &Path, lock: Option<Flock<File>>) -> Result<(), MountError> {
        self.upper_lock = lock;
        let below = self.mounts.len();
        self.show(path)?;
        (0..below).try_for_each(|_| self.unmount(0, true))
    }

    /// Forgets the mounts that have no unique id, because another program has unmounted them. Other mounts may have
    /// their numbers by now.
    pub(super) fn forget_mounts(&mut self) {
        self.mounts.retain(|mount| mount.unique.is_some());
    }

    /// Unmounts everything. Without `lazy` it stops with an error at the first mount that is in use, and that mount
    /// stays. The kernel may not have finished ([`Attached::unfinished`]).
    pub(super) fn detach(&mut self, lazy: bool) -> Result<(), MountError> {
        while let Some(last) = self.mounts.len().checked_sub(1) {
            self.unmount(last, lazy)?;
        }
        Ok(())
    }

    /// Unmounts the mount at a position of the list, and takes it off the list.
    fn unmount(&mut self, position: usize, lazy: bool) -> Result<(), MountError> {
        if let Unmount::Unfinished(call) = kernel::unmount(&self.mounts[position], lazy)? {
            self.unfinished.add(call);
        }
        self.mounts.remove(position);
        Ok(())
    }

    /// The unmounts that have not returned.
    pub(super) fn unfinished(&self) -> &Unfinished {
        &self.unfinished
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
