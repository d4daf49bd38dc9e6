//! Finds the registration of a mount point, whether its process is still alive, and the users of its mount.

use std::path::Path;
use std::time::Duration;

use super::error::TakedownError;
use super::process::{Process, standstill};
use super::registration::{MountRecord, RegistrationError, RunDir, RunEntry};
use super::socket_table;
use super::users::{Users, namespace};
use super::{kernel, mountinfo};

/// How long a process that refuses connections gets to end. A larger value delays the commands when a control
/// socket is broken. A smaller one reports a process that is about to end as one that does not answer.
const ENDING: Duration = Duration::from_millis(800);
/// Returns the registration of the mount at `mountpoint`. After an unmount it is the registration of the former
/// mount, as long as that one has users.
pub(super) fn find(run: &RunDir, mountpoint: &Path) -> Result<Option<(RunEntry, MountRecord)>, TakedownError> {
    let entry = run.entry(mountpoint);
    let own = entry.record()?;
    let there = mountinfo::at(mountpoint)?.map(|mount| kernel::identify(mountpoint, mount.standing()));
    let is_there = |record: &MountRecord| match (&record.standing, &there) {
        (Some(standing), Some(mount)) => standing.may_be(mount),
        _ => false,
    };
    if own.as_ref().is_some_and(is_there) {
        return Ok(own.map(|record| (entry, record)));
    }
    // Or a mount that was made under another path and is here now, because a parent directory was renamed.
    let mut records = run.records()?;
    let moved = records
        .iter()
        .position(|(_, record)| is_there(record) && record.is_alive() && !has_left(record));
    if let Some(moved) = moved {
        return Ok(Some(records.swap_remove(moved)));
    }
    if let Some(record) = own {
        return Ok(Some((entry, record)));
    }
    // A dead disk and a living one may have a place in common.
    let records = records.into_iter().filter(|(_, record)| record.is_at(mountpoint));
    Ok(records.min_by_key(|(_, record)| !record.is_alive()))
}

/// Whether the process of a record is in this mount namespace, stands still, and has not noticed that its mount is gone from
/// here. A mount with the same numbers is then most likely another one. A process that goes on although its mount is gone
/// has users, so such a mount is a copy.
fn has_left(record: &MountRecord) -> bool {
    let (ours, theirs) = (namespace("self"), namespace(&record.pid.to_string()));
    ours.is_some() && ours == theirs && record.is_detached() && standstill(record.pid).is_some()
}

/// Whether `record` is still the registration of `entry`.
pub(super) fn registered(entry: &RunEntry, record: &MountRecord) -> Result<bool, RegistrationError> {
    Ok(entry
        .record()?
        .is_some_and(|now| now.pid == record.pid && now.started == record.started))
}

/// Returns a message about why the process goes on after its mount was unmounted, and whether no user was found.
/// `None` if the mount is not detached, or its identity is not known.
pub(super) fn still_used(entry: &RunEntry, record: &MountRecord) -> Option<(bool, String)> {
    // The process may have changed its record since the caller read it.
    let now = entry.of(record.pid).ok()?.and_then(|entry| entry.record().ok()?);
    let record = now.as_ref().unwrap_or(record);
    let users = record.is_detached().then(|| users(entry, record)).flatten()?;
    Some((
        users.is_empty(),
        format!("it is unmounted, but process {} goes on: {users}", record.pid),
    ))
}

/// Finds the users of a mount other than its own process. `None` if the record does not identify the mount.
pub(super) fn users(entry: &RunEntry, record: &MountRecord) -> Option<Users> {
    let clients = record.disk.as_ref().map(socket_table::count);
    let Some(standing) = &record.standing else {
        return clients.map(|clients| Users::default().and_clients(clients));
    };
    // The kernel reuses the device number of a file system that is gone. It does so even while the process behind
    // it is stopped and has not noticed the end. If another mount has the number, this one has no users.
    let table = mountinfo::table().unwrap_or_default();
    let others = entry.run().records().unwrap_or_default();
    let mut others = others.iter().filter(|(_, other)| other.pid != record.pid);
    let is_given_away = others.any(|(_, other)| {
        let other = other.standing.as_ref().filter(|other| other.device == standing.device);
        other.is_some_and(|other| table.iter().any(|mount| mount.is(other)))
    });
    let users = match is_given_away {
        true => Users::default(),
        false => Users::of(standing, record.pid),
    };
    Some(users.and_clients(clients.unwrap_or(0)))
}

/// Whether the process behind a mount, which refuses connections, ends within [`ENDING`].
pub(super) async fn has_ended(record: &MountRecord) -> bool {
    ends_within(record, ENDING).await.unwrap_or(false)
}

/// Whether the process behind a mount ends within `limit`. Returns at once if it has ended.
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
