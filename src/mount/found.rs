//! Which registration a mount point belongs to, whether its process is still there, and who uses what it mounted.

use std::path::Path;
use std::time::Duration;

use super::error::TakedownError;
use super::mountinfo;
use super::process::Process;
use super::registration::{MountRecord, RegistrationError, RunDir, RunEntry};
use super::users::Users;

/// How long a process that closes its connections gets to be gone.
const ENDING: Duration = Duration::from_millis(800);
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

/// Whether a process that does not take connections ends in this moment.
pub(super) async fn has_ended(record: &MountRecord) -> bool {
    ends_within(record, ENDING).await.unwrap_or(false)
}

pub(super) async fn ends_within(record: &MountRecord, limit: Duration) -> Result<bool, TakedownError> {
    let held = |source| TakedownError::System {
        action: "look at the process behind the mount",
        source,
    };
    match Process::open(record.pid, record.started).map_err(held)? {
        Some(process) => process.ends_within(limit).await.map_err(held),
        None => Ok(true),
    }
}
