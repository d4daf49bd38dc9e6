//! What is known of the mounts of other processes: `list` and `status`. All are asked at once, and none for long.

use std::path::Path;

use super::control::{self, ControlError, Request, Response};
use super::mountinfo;
use super::process::standstill;
use super::registration::{MountRecord, RegistrationError, RunDir, RunEntry};
use super::status::{MountState, MountStatus};
use super::takedown::{TakedownError, has_ended, not_mounted};
use super::users::Users;
use crate::content::ReadStatus;
use crate::fetch::Load;

/// All mounts of this user, by path; also the dead ones, and those that are unmounted and still in use.
pub async fn list(run: &RunDir) -> Result<Vec<MountStatus>, TakedownError> {
    let records = run.records()?;
    let asking = records.iter().map(|(entry, record)| ask(entry, record));
    let answers = futures::future::join_all(asking).await;
    Ok(answers.into_iter().flatten().collect())
}

/// The mount at `mountpoint`.
pub async fn status_of(run: &RunDir, mountpoint: &Path) -> Result<MountStatus, TakedownError> {
    let (entry, record) = find(run, mountpoint)?.ok_or_else(|| not_mounted(mountpoint))?;
    ask(&entry, &record).await.ok_or_else(|| not_mounted(mountpoint))
}

/// The registration of what is mounted at `mountpoint`, or was until its unmount if somebody still uses it.
pub(super) fn find(run: &RunDir, mountpoint: &Path) -> Result<Option<(RunEntry, MountRecord)>, TakedownError> {
    let entry = run.entry(mountpoint);
    let own = entry.record()?;
    let there = mountinfo::at(mountpoint)?;
    let is_there = |record: &MountRecord| match (&record.standing, &there) {
        (Some(standing), Some(mount)) => standing.device == mount.device,
        _ => false,
    };
    if own.as_ref().is_some_and(is_there) {
        return Ok(own.map(|record| (entry, record)));
    }
    // A mount that is at this place counts, also if its path had another name when it was mounted.
    let mut records = run.records()?;
    let moved = records
        .iter()
        .position(|(_, record)| is_there(record) && record.is_alive());
    if let Some(moved) = moved {
        return Ok(Some(records.swap_remove(moved)));
    }
    if let Some(record) = own {
        return Ok(Some((entry, record)));
    }
    Ok(records.into_iter().find(|(_, record)| record.mountpoint == mountpoint))
}

/// What the process says, or what is known without it; nothing if it took its mount down meanwhile.
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
                // It may have ended as it should.
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

/// Whether `record` is still what is registered.
pub(super) fn registered(entry: &RunEntry, record: &MountRecord) -> Result<bool, RegistrationError> {
    Ok(entry
        .record()?
        .is_some_and(|now| now.pid == record.pid && now.started == record.started))
}

/// Why the process of a mount that is unmounted goes on; and whether nobody was found who uses it.
pub(super) fn still_used(entry: &RunEntry, record: &MountRecord) -> Option<(bool, String)> {
    let users = record.is_detached().then(|| users(entry, record)).flatten()?;
    Some((
        users.is_empty(),
        format!("it is unmounted, but process {} goes on: {users}", record.pid),
    ))
}

/// Who uses a mount, besides its own process; none if it is not known which mount that is.
pub(super) fn users(entry: &RunEntry, record: &MountRecord) -> Option<Users> {
    let standing = record.standing.as_ref()?;
    // The kernel gives the device number of a file system away again, also while the process behind it is stopped and has not
    // noticed that it is gone. If another mount has the number now, nobody uses this one.
    let table = mountinfo::table().unwrap_or_default();
    let others = entry.run().records().unwrap_or_default();
    let mut others = others.iter().filter(|(_, other)| other.pid != record.pid);
    let is_given_away = others.any(|(_, other)| {
        let other = other.standing.as_ref().filter(|other| other.device == standing.device);
        other.is_some_and(|other| table.iter().any(|mount| mount.is(other)))
    });
    Some(match is_given_away {
        true => Users::default(),
        false => Users::of(standing, record.pid),
    })
}

fn dead(record: &MountRecord) -> MountStatus {
    let problem = format!(
        "process {} is dead; `ocifs umount {}` clears what it left",
        record.pid,
        record.mountpoint.display()
    );
    unasked(record, MountState::Dead, problem)
}

/// The status of a mount whose process could not say anything.
fn unasked(record: &MountRecord, state: MountState, problem: String) -> MountStatus {
    MountStatus {
        pid: record.pid,
        image: record.image.clone(),
        digest: record.digest.clone(),
        unconfirmed: None,
        mountpoint: record.mountpoint.display().to_string(),
        mountpoint_base64: record.mountpoint_base64(),
        log: None,
        state,
        problem: Some(problem),
        writable: record.writable,
        uptime: 0.0,
        mount_seconds: 0.0,
        ready_seconds: None,
        size: 0,
        fetched: 0,
        rate: None,
        stalled_seconds: None,
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
