//! Taking down mounts of other processes, whatever state the process is in.
//!
//! A healthy process is asked, and takes down everything itself. If it is dead, or does not answer within a second, this
//! process unmounts. No other process is needed for that, and nothing is lost: what was changed lies in the upper directory.
//! A process that did not answer and has nobody left to serve is ended.

use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::control::{self, ControlError, Request, Response};
use super::kernel::{self, KernelMountError};
use super::mountinfo;
use super::overlay;
use super::process::{Process, standstill};
use super::registration::{MountRecord, RegistrationError, RunDir, RunEntry};
use super::survey::{find, registered, still_used, users};

/// How long a process that closes its connections gets to be gone.
const ENDING: Duration = Duration::from_millis(800);
/// How long a process without a mount gets to end by itself, and after SIGTERM.
const ASKED: Duration = Duration::from_millis(150);
/// How long an unmount takes at most, if the process does not do it.
const LIMIT: Duration = Duration::from_millis(1700);
/// How long a process that says it works gets to end when its mount is gone: a large private upper directory takes time.
const WORKING: Duration = Duration::from_secs(20);

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
    /// It is unmounted already, and its process goes on.
    #[error("{path}: {reason}")]
    Detached {
        /// What was named.
        path: String,
        /// Who uses it.
        reason: String,
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
    /// The kernel refused an unmount that this process tried because the one behind the mount does not answer.
    #[error("process {pid} behind the mount does not answer{}, and {source}", why.as_deref().unwrap_or_default())]
    Unresponsive {
        /// Who does not answer.
        pid: u32,
        /// Why, if that can be seen.
        why: Option<String>,
        /// What the kernel said.
        source: KernelMountError,
    },
    /// The process refused.
    #[error("{message}")]
    Refused {
        /// What it said.
        message: String,
    },
    /// The system refused.
    #[error("cannot {action}: {source}")]
    System {
        /// What was tried.
        action: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The mount table could not be read.
    #[error("cannot read the mount table: {0}")]
    MountTable(#[from] std::io::Error),
}

pub(super) fn not_mounted(path: &Path) -> TakedownError {
    TakedownError::NotMounted {
        path: path.display().to_string(),
    }
}

fn system(action: &'static str) -> impl Fn(std::io::Error) -> TakedownError {
    move |source| TakedownError::System { action, source }
}

/// What is left of a mount that was taken down: nothing, or something that the user should know.
pub type Remainder = Option<String>;

/// Takes down the mount at `mountpoint` (an absolute path; it need not be accessible, a dead mount is not).
pub async fn take_down(run: &RunDir, mountpoint: &Path, lazy: bool) -> Result<Remainder, TakedownError> {
    let Some((entry, record)) = find(run, mountpoint)? else {
        // A mount whose registration was lost (a cleared /run) is still recognised by its type.
        return match mountinfo::at(mountpoint)? {
            Some(mount) if mount.fs_type == "fuse.ocifs" => {
                Ok(kernel::unmount(&mount.standing(), lazy).map(|()| None)?)
            }
            _ => Err(not_mounted(mountpoint)),
        };
    };
    if !record.is_alive() {
        return clear(&entry, &record).await.map(|()| None);
    }
    let until = Instant::now() + LIMIT;
    if let Some((nobody, reason)) = still_used(&entry, &record) {
        // Another unmount may be about to end.
        if nobody && has_ended(&record).await {
            return clear(&entry, &record).await.map(|()| None);
        }
        // A process that stands still does not notice that its last user is gone.
        if nobody && standstill(record.pid).is_some() {
            return force(&entry, &record, lazy, until).await;
        }
        return Err(TakedownError::Detached {
            path: mountpoint.display().to_string(),
            reason,
        });
    }
    // What is left in its socket would be read whenever it goes on.
    if standstill(record.pid).is_some() {
        return force(&entry, &record, lazy, until).await;
    }
    match control::call(&entry.socket(), &Request::Unmount { lazy }).await {
        Ok(Response::Unmounted) => Ok(None),
        Ok(Response::Detached) => Ok(still_used(&entry, &record).map(|(_, reason)| reason)),
        Ok(Response::Failed { message }) => Err(TakedownError::Refused { message }),
        Ok(Response::Status(_) | Response::Working) => Err(not_mounted(mountpoint)),
        Err(ControlError::Slow) => {
            // If it is in the kernel with this very unmount, there is nothing left to do here.
            unmount_all(&entry, &record, lazy)?;
            let limit = match record.scratch {
                Some(_) => WORKING,
                None => until.saturating_duration_since(Instant::now()).max(ASKED),
            };
            match ends_within(&record, limit).await? {
                true => Ok(None),
                false => Ok(Some(format!("process {} has not ended yet", record.pid))),
            }
        }
        Err(ControlError::Silent | ControlError::Json(_)) => force(&entry, &record, lazy, until).await,
        Err(ControlError::Io(_)) => match has_ended(&record).await {
            // Nothing is registered any more if it ended as it should.
            true => clear(&entry, &record).await.map(|()| None),
            false => force(&entry, &record, lazy, until).await,
        },
    }
}

/// Whether a process that does not take connections ends in this moment.
pub(super) async fn has_ended(record: &MountRecord) -> bool {
    ends_within(record, ENDING).await.unwrap_or(false)
}

async fn ends_within(record: &MountRecord, limit: Duration) -> Result<bool, TakedownError> {
    let held = system("look at the process behind the mount");
    match Process::open(record.pid, record.started).map_err(&held)? {
        Some(process) => process.ends_within(limit).await.map_err(held),
        None => Ok(true),
    }
}

/// Takes down a mount whose process is alive and does not answer.
async fn force(entry: &RunEntry, record: &MountRecord, lazy: bool, until: Instant) -> Result<Remainder, TakedownError> {
    let why = standstill(record.pid).map(|why| format!(" ({why})"));
    unmount_all(entry, record, lazy).map_err(|error| match error {
        TakedownError::Kernel(source) => TakedownError::Unresponsive {
            pid: record.pid,
            why: why.clone(),
            source,
        },
        error => error,
    })?;
    let pid = record.pid;
    let why = why.unwrap_or_default();
    if let Some(users) = users(entry, record).filter(|users| !users.is_empty()) {
        return Ok(Some(format!(
            "it is unmounted, but process {pid} does not answer{why} and cannot be ended: {users}"
        )));
    }
    if end(record, until).await? {
        clear(entry, record).await?;
        return Ok(Some(format!("process {pid} did not answer{why} and was ended")));
    }
    Ok(Some(format!(
        "it is unmounted, but process {pid} does not end{why}; it was sent SIGKILL"
    )))
}

/// Ends the process of a mount that is gone: whether it has ended.
async fn end(record: &MountRecord, until: Instant) -> Result<bool, TakedownError> {
    let held = system("end the process behind the mount");
    let Some(process) = Process::open(record.pid, record.started).map_err(&held)? else {
        return Ok(true);
    };
    // The end of its mount may be all it needs. A stopped process takes SIGTERM only when it goes on.
    for signals in [&[][..], &[Signal::TERM, Signal::CONT]] {
        for &signal in signals {
            process.signal(signal).map_err(&held)?;
        }
        if process.ends_within(ASKED).await.map_err(&held)? {
            return Ok(true);
        }
    }
    process.signal(Signal::KILL).map_err(&held)?;
    let left = until.saturating_duration_since(Instant::now()).max(ASKED);
    process.ends_within(left).await.map_err(&held)
}

/// Unmounts what a mount's process attached. Without `lazy` it stops if something is in use.
fn unmount_all(entry: &RunEntry, record: &MountRecord, lazy: bool) -> Result<(), TakedownError> {
    for mount in record.mounts()? {
        // When a mount is gone, another one may get its numbers; that one is registered where it is.
        let own = [&record.mountpoint, &record.lower].contains(&&mount.mountpoint);
        let other = entry.beside(&mount.mountpoint).record()?;
        if own || other.is_none_or(|other| other.pid == record.pid) {
            kernel::unmount(&mount.standing(), lazy)?;
        }
    }
    Ok(())
}

/// Takes down what a dead process left. Nothing works there any more, so it goes at once, used or not.
async fn clear(entry: &RunEntry, record: &MountRecord) -> Result<(), TakedownError> {
    let _turn = entry.turn().await?;
    // Another process may have mounted there meanwhile.
    match registered(entry, record)? {
        true => clear_now(entry, record),
        false => Ok(()),
    }
}

/// The same for whoever has the turn.
pub(super) fn clear_now(entry: &RunEntry, record: &MountRecord) -> Result<(), TakedownError> {
    unmount_all(entry, record, true)?;
    if let Some(scratch) = &record.scratch {
        overlay::discard(scratch);
    }
    Ok(entry.remove(None)?)
}
