//! The status of the mounts of other processes, for `list` and `status`.
//!
//! This process asks all of them at once, and waits for none of them for long.

use std::path::Path;

use super::control::{self, ControlError, Request, Response};
use super::error::{TakedownError, not_mounted};
use super::found::{find, has_ended, registered, still_used};
use super::process::standstill;
use super::registration::{MountRecord, RunDir, RunEntry};
use super::status::{MountState, MountStatus};
use crate::blob::Retries;
use crate::content::ReadStatus;
use crate::device::Evictions;
use crate::fetch::Load;
use crate::layer::FetchedFor;

/// Returns the status of all mounts of this user, in the order of their paths. They include dead mounts, and
/// unmounted ones that still have users.
pub async fn list(run: &RunDir) -> Result<Vec<MountStatus>, TakedownError> {
    let records = run.records()?;
    let asking = records.iter().map(|(entry, record)| ask(entry, record));
    let answers = futures::future::join_all(asking).await;
    Ok(answers.into_iter().flatten().collect())
}

/// Returns the status of the mount at `mountpoint`.
pub async fn status_of(run: &RunDir, mountpoint: &Path) -> Result<MountStatus, TakedownError> {
    let (entry, record) = find(run, mountpoint)?.ok_or_else(|| not_mounted(mountpoint))?;
    ask(&entry, &record).await.ok_or_else(|| not_mounted(mountpoint))
}

/// Returns the status that the process reports, or the known facts if it does not answer. `None` if the process
/// took its mount down meanwhile.
async fn ask(entry: &RunEntry, record: &MountRecord) -> Option<MountStatus> {
    let mut status = match record.is_alive() {
        true => answer(entry, record).await?,
        false => dead(record),
    };
    if matches!(
        status.state,
        MountState::Preparing | MountState::Stalled | MountState::Ready | MountState::Failed | MountState::Unresponsive
    ) && let Some((_, reason)) = still_used(entry, record)
    {
        status.state = MountState::Detached;
        status.problem = Some(match status.problem {
            Some(problem) => format!("{reason}; {problem}"),
            None => reason,
        });
    }
    let log = entry.log();
    status.log = log.exists().then(|| log.display().to_string());
    Some(status)
}

async fn answer(entry: &RunEntry, record: &MountRecord) -> Option<MountStatus> {
    let silent = |why: &str| {
        let problem = format!("process {} does not answer: {why}", record.pid);
        Some(unasked(record, MountState::Unresponsive, problem))
    };
    if let Some(why) = standstill(record.pid) {
        return silent(&why);
    }
    match control::call(&entry.socket(), &Request::Status).await {
        Ok(Response::Status(status)) => Some(*status),
        Ok(_) => silent("it gave no status"),
        Err(ControlError::Io(error)) => {
            if has_ended(record).await {
                // The process may have taken its mount down and ended.
                let left = registered(entry, record).unwrap_or(true);
                return left.then(|| dead(record));
            }
            let socket = entry.socket();
            silent(&format!(
                "its control socket {} cannot be used: {error}",
                socket.display()
            ))
        }
        Err(error) => silent(&error.to_string()),
    }
}

fn dead(record: &MountRecord) -> MountStatus {
    let problem = format!(
        "process {} is dead; `ocifs umount {}` clears what it left",
        record.pid,
        record.mountpoint.display()
    );
    unasked(record, MountState::Dead, problem)
}

/// Returns the status of a mount whose process gave no answer.
fn unasked(record: &MountRecord, state: MountState, problem: String) -> MountStatus {
    MountStatus {
        pid: record.pid,
        image: record.image.clone(),
        digest: record.digest.clone(),
        unconfirmed: None,
        mountpoint: record.mountpoint.display().to_string(),
        mountpoint_base64: record.mountpoint_base64(),
        log: None,
        store: None,
        metrics: None,
        state,
        problem: Some(problem),
        writable: record.writable,
        via: record.carrier,
        disk: record.disk.clone(),
        uptime: 0.0,
        mount_seconds: 0.0,
        ready_seconds: None,
        size: 0,
        fetched: 0,
        fetched_for: FetchedFor::default(),
        rate: None,
        stalled_seconds: None,
        remaining_seconds: None,
        memory: 0,
        resident: None,
        used: 0,
        local: 0,
        requests: 0,
        retries: Retries::default(),
        evicted: Evictions::default(),
        in_flight: Load::default(),
        link: None,
        reads: ReadStatus::default(),
        prefetch: None,
        layers: Vec::new(),
    }
}
