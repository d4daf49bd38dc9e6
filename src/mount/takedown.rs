//! Mounts of other processes: listing, asking, taking down, also when the process is dead.

use std::path::Path;

use super::control::{self, ControlError, Request, Response};
use super::kernel::{self, KernelMountError};
use super::mountinfo::{self, MountEntry};
use super::overlay;
use super::registration::{MountRecord, RegistrationError, RunDir, RunEntry};
use super::status::{MountState, MountStatus};
use crate::fetch::Load;
use crate::fs::ReadStatus;

/// Why a mount could not be asked or taken down.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TakedownError {
    /// There is none.
    #[error("{path} is not an ocifs mount of this user (see `ocifs list`)")]
    NotMounted {
        /// What was named.
        path: String,
    },
    /// The run directory failed.
    #[error(transparent)]
    Registration(#[from] RegistrationError),
    /// The process could not be asked.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The kernel refused.
    #[error(transparent)]
    Kernel(#[from] KernelMountError),
    /// The process refused.
    #[error("{message}")]
    Refused {
        /// What it said.
        message: String,
    },
    /// The mount table could not be read.
    #[error("cannot read the mount table: {0}")]
    MountTable(#[from] std::io::Error),
}

/// All mounts of this user, base path order; the dead ones too.
pub async fn list(run: &RunDir) -> Result<Vec<MountStatus>, TakedownError> {
    let mut mounts = Vec::new();
    for (entry, record) in run.records()? {
        mounts.push(ask(&entry, &record).await);
    }
    Ok(mounts)
}

/// The mount at `mountpoint`.
pub async fn status_of(run: &RunDir, mountpoint: &Path) -> Result<MountStatus, TakedownError> {
    let entry = run.entry(mountpoint);
    let record = entry.record()?.ok_or_else(|| not_mounted(mountpoint))?;
    Ok(ask(&entry, &record).await)
}

fn not_mounted(path: &Path) -> TakedownError {
    TakedownError::NotMounted {
        path: path.display().to_string(),
    }
}

/// What the process says, or what is known without it.
async fn ask(entry: &RunEntry, record: &MountRecord) -> MountStatus {
    let problem = if record.is_alive() {
        match control::call(&entry.socket(), &Request::Status).await {
            Ok(Response::Status(status)) => return *status,
            Ok(_) => "the process gave no status".to_owned(),
            Err(error) => error.to_string(),
        }
    } else {
        format!(
            "process {} is dead; `ocifs umount {}` clears what it left",
            record.pid,
            record.mountpoint.display()
        )
    };
    MountStatus {
        pid: record.pid,
        image: record.image.clone(),
        digest: record.digest.clone(),
        unconfirmed: None,
        mountpoint: record.mountpoint.display().to_string(),
        state: if record.is_alive() {
            MountState::Preparing
        } else {
            MountState::Dead
        },
        problem: Some(problem),
        writable: record.writable,
        uptime: 0.0,
        mount_seconds: 0.0,
        ready_seconds: None,
        size: 0,
        fetched: 0,
        rate: None,
        remaining_seconds: None,
        memory: 0,
        used: 0,
        local: 0,
        requests: 0,
        in_flight: Load::default(),
        link: None,
        reads: ReadStatus::default(),
        prefetch: None,
        layers: Vec::new(),
    }
}

/// Takes down the mount at `mountpoint` (an absolute path; it need not be accessible, a dead mount is not).
pub async fn take_down(run: &RunDir, mountpoint: &Path, lazy: bool) -> Result<(), TakedownError> {
    let entry = run.entry(mountpoint);
    match entry.record()? {
        Some(record) if record.is_alive() => match control::call(&entry.socket(), &Request::Unmount { lazy }).await? {
            Response::Unmounted => Ok(()),
            Response::Failed { message } => Err(TakedownError::Refused { message }),
            Response::Status(_) => Err(not_mounted(mountpoint)),
        },
        Some(record) => clear(&entry, &record).await,
        // A mount whose registration was lost (a cleared /run) is still recognised by its type.
        None => match mountinfo::at(mountpoint)? {
            Some(mount) if mount.fs_type == "fuse.ocifs" => Ok(kernel::unmount(mountpoint, lazy)?),
            _ => Err(not_mounted(mountpoint)),
        },
    }
}

/// Takes down what a dead process left. Nothing works there any more, so it goes at once, used or not.
async fn clear(entry: &RunEntry, record: &MountRecord) -> Result<(), TakedownError> {
    let _turn = entry.turn().await?;
    // Another process may have mounted there meanwhile.
    if entry.record()?.as_ref() != Some(record) {
        return Ok(());
    }
    if record.writable {
        detach_if(&record.mountpoint, overlay::is_ours)?;
    }
    detach_if(&record.lower, |mount| mount.fs_type == "fuse.ocifs")?;
    if let Some(scratch) = &record.scratch {
        overlay::discard(scratch);
    }
    Ok(entry.remove(None)?)
}

/// Detaches what is mounted at `path` if it is ours: by now it may be somebody else's.
fn detach_if(path: &Path, ours: impl Fn(&MountEntry) -> bool) -> Result<(), TakedownError> {
    match mountinfo::at(path)? {
        Some(mount) if ours(&mount) => Ok(kernel::unmount(path, true)?),
        _ => Ok(()),
    }
}
