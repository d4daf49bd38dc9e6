//! Takes down mounts of other processes, whatever state the process behind a mount is in.
//!
//! If that process is healthy, `umount` asks it, and it takes down everything itself. If it is dead, or does not
//! answer within a second, `umount` unmounts on its own and needs no other process. No change to a writable mount
//! is lost by that, because the changes are in the upper directory. The kernel may still flush them, or wait for reads of
//! its own, after `umount` has answered.
//!
//! If the process behind the mount did not answer and its mount has no users left, `umount` ends it.

use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::control::{self, ControlError, Request, Response};
use super::doors::DiskDoors;
use super::error::{TakedownError, not_mounted};
use super::found::{ends_within, find, has_ended, registered, still_used, users};
use super::kernel::{Unmount, UnmountCall};
use super::process::{Process, standstill};
use super::registration::{AttachPhase, MountRecord, RunDir, RunEntry};
use super::socket_file::remove_dead;
use super::socket_table;
use super::summary::RunSummary;
use super::users::Users;
use super::{kernel, mountinfo, overlay};
use crate::os::gone;

/// How long a process without a mount gets to end by itself, and again after SIGTERM. A larger value delays
/// `umount`; with a smaller one, SIGTERM or SIGKILL hits processes that are about to end.
const ASKED: Duration = Duration::from_millis(150);
/// Time for the whole unmount if this process has to do it. A larger value delays `umount`; a smaller one reports
/// more processes that have not ended yet.
const LIMIT: Duration = Duration::from_millis(1700);
/// How long a process that is working gets to end after its mount is gone: deleting a large private upper directory
/// takes time. A larger value delays `umount`; a smaller one reports such a process as not ended yet.
const WORKING: Duration = Duration::from_secs(20);

fn system(action: &'static str) -> impl Fn(std::io::Error) -> TakedownError {
    move |source| TakedownError::System { action, source }
}

/// What is known of a mount that was taken down.
#[derive(Debug, Clone, Default)]
pub struct TakenDown {
    /// What remains of it, as a message for the user.
    pub remainder: Option<String>,
    /// What it has done. None if its process was dead, or did not say.
    pub summary: Option<RunSummary>,
}

impl TakenDown {
    /// A mount whose process said nothing.
    fn silently(remainder: Option<String>) -> Self {
        Self {
            remainder,
            summary: None,
        }
    }
}

/// Takes down the mount at `mountpoint`, an absolute path. The path need not be accessible, because that of a dead
/// mount is not.
pub async fn take_down(run: &RunDir, mountpoint: &Path, lazy: bool) -> Result<TakenDown, TakedownError> {
    let Some((entry, record)) = find(run, mountpoint)? else {
        // If the registration was lost, because /run was cleared for example, the type of the mount still
        // identifies it.
        return match mountinfo::at(mountpoint)? {
            Some(mount) if run.made(&mount) => {
                Ok(kernel::unmount(&mount.standing(), lazy).map(|_| TakenDown::default())?)
            }
            _ => Err(not_mounted(mountpoint)),
        };
    };
    if !record.is_alive() {
        return clear(&entry, &record).await.map(|()| TakenDown::default());
    }
    let until = Instant::now() + LIMIT;
    if let Some((nobody, reason)) = still_used(&entry, &record) {
        // The process may be about to end because of another unmount.
        if nobody && has_ended(&record).await {
            return clear(&entry, &record).await.map(|()| TakenDown::default());
        }
        // A process that stands still does not notice that its last user is gone.
        if nobody && standstill(record.pid).is_some() {
            return force(&entry, &record, lazy, until).await.map(TakenDown::silently);
        }
        return Err(TakedownError::Detached {
            path: mountpoint.display().to_string(),
            reason,
        });
    }
    // The process would read a request in its socket whenever it goes on. So it gets none while it is stopped.
    if standstill(record.pid).is_some() {
        return force(&entry, &record, lazy, until).await.map(TakenDown::silently);
    }
    match control::call(&entry.socket(), &Request::Unmount { lazy }).await {
        Ok(Response::Unmounted { summary }) => Ok(TakenDown {
            remainder: None,
            summary: summary.map(|summary| *summary),
        }),
        Ok(Response::Detached { summary }) => Ok(TakenDown {
            remainder: still_used(&entry, &record).map(|(_, reason)| reason),
            summary: summary.map(|summary| *summary),
        }),
        Ok(Response::Failed { message }) => Err(TakedownError::Refused { message }),
        Ok(Response::Status(_) | Response::Working) => Err(not_mounted(mountpoint)),
        Err(ControlError::Slow) => {
            // If the process is inside the kernel with this very unmount, nothing is left to do here.
            unmount_all(&entry, &record, lazy)?;
            let limit = match record.scratch {
                Some(_) => WORKING,
                None => until.saturating_duration_since(Instant::now()).max(ASKED),
            };
            match ends_within(&record, limit).await? {
                true => Ok(TakenDown::default()),
                false => Ok(TakenDown::silently(Some(format!(
                    "process {} has not ended yet",
                    record.pid
                )))),
            }
        }
        Err(ControlError::Silent | ControlError::Json(_)) => {
            force(&entry, &record, lazy, until).await.map(TakenDown::silently)
        }
        Err(ControlError::Io(_)) => match has_ended(&record).await {
            // If the process ended by itself, there is no registration left to clear.
            true => clear(&entry, &record).await.map(|()| TakenDown::default()),
            false => force(&entry, &record, lazy, until).await.map(TakenDown::silently),
        },
    }
}

/// Takes down a mount whose process is alive and does not answer.
async fn force(
    entry: &RunEntry,
    record: &MountRecord,
    lazy: bool,
    until: Instant,
) -> Result<Option<String>, TakedownError> {
    let why = standstill(record.pid).map(|why| format!(" ({why})"));
    if let Some(doors) = &record.disk {
        let clients = socket_table::count(doors);
        if clients > 0 && !lazy {
            let (pid, why) = (record.pid, why.unwrap_or_default());
            return Err(TakedownError::Refused {
                message: format!("process {pid} does not answer{why}, and clients are connected to it: {clients}"),
            });
        }
    }
    let calls = unmount_all(entry, record, lazy).map_err(|error| match error {
        TakedownError::Kernel(source) => TakedownError::Unresponsive {
            pid: record.pid,
            why: why.clone(),
            source,
        },
        error => error,
    })?;
    // Before it attaches and after it detaches, the process has no sockets. What is in their places then is another's.
    let sockets = record.disk.iter().filter(|_| record.phase == AttachPhase::Attached);
    for socket in sockets.flat_map(DiskDoors::socket_files) {
        gone(std::fs::remove_file(socket)).map_err(system("remove the socket of a disk"))?;
    }
    let pid = record.pid;
    let why = why.unwrap_or_default();
    // A call that is still in the kernel holds the last reference to its file system, so nobody uses that. Whoever seems to
    // use it uses another one that has got its numbers. Only the end of the process lets the call return.
    let users = match calls.iter().any(|call| !call.is_finished()) {
        true => record
            .disk
            .as_ref()
            .map(|doors| Users::default().and_clients(socket_table::count(doors))),
        false => users(entry, record),
    };
    if let Some(users) = users.filter(|users| !users.is_empty()) {
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

/// Ends the process of a mount that is gone. Returns whether it has ended.
async fn end(record: &MountRecord, until: Instant) -> Result<bool, TakedownError> {
    let held = system("end the process behind the mount");
    let Some(process) = Process::open(record.pid, record.started).map_err(&held)? else {
        return Ok(true);
    };
    // The end of the mount may suffice to end the process. A stopped process handles SIGTERM only after SIGCONT.
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

/// Unmounts everything that a mount's process attached. Without `lazy` it stops at the first mount that is in use. Returns
/// the calls that the kernel has not finished: it flushes changes, or waits for reads that the end of the process fails.
fn unmount_all(entry: &RunEntry, record: &MountRecord, lazy: bool) -> Result<Vec<UnmountCall>, TakedownError> {
    let mut calls = Vec::new();
    for mount in record.mounts()? {
        // If a mount is gone, the kernel may give its numbers to a mount of another process. That mount is
        // registered at its own mount point, and has another unique id if the kernel has such ids.
        let own = [&record.mountpoint, &record.lower].contains(&&mount.mountpoint);
        let other = entry.beside(&mount.mountpoint).record()?;
        if own || other.is_none_or(|other| other.pid == record.pid) {
            let known = record.standing.as_ref().filter(|standing| mount.is(standing));
            let standing = known.cloned().unwrap_or_else(|| mount.standing());
            if let Unmount::Unfinished(call) = kernel::unmount(&standing, lazy)? {
                calls.push(call);
            }
        }
    }
    Ok(calls)
}

/// Takes down everything that a dead process left. Nothing works there any more, so it unmounts at once, even if
/// the mount is in use.
async fn clear(entry: &RunEntry, record: &MountRecord) -> Result<(), TakedownError> {
    let _turn = entry.turn().await?;
    // Another process may have mounted there meanwhile.
    match registered(entry, record)? {
        true => clear_now(entry, record),
        false => Ok(()),
    }
}

/// Does the work of [`clear`] for a caller that has the turn.
pub(super) fn clear_now(entry: &RunEntry, record: &MountRecord) -> Result<(), TakedownError> {
    unmount_all(entry, record, true)?;
    if let Some(scratch) = &record.scratch {
        overlay::discard(scratch);
    }
    for socket in record.disk.iter().flat_map(DiskDoors::socket_files) {
        remove_dead(socket).map_err(system("remove the socket of a dead disk"))?;
    }
    Ok(entry.remove(None)?)
}
