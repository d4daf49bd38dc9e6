//! A user namespace of its own for a command that mounts without root (user_namespaces(7)).
//!
//! The user is root there, over what belongs to the user: mounts need no helper, and a kernel since 5.11 mounts an overlay.
//! The mounts are seen in the namespace alone, and end with it.

use std::fs;
use std::io;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{getegid, geteuid};

/// Why there is no namespace.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} (a machine may forbid or restrict user namespaces; root needs none): {source}")]
pub(super) struct NamespaceError {
    action: &'static str,
    source: io::Error,
}

/// Makes this process root of a new user namespace, with a mount namespace of its own. The process must not have started
/// threads yet.
pub(super) fn enter() -> Result<(), NamespaceError> {
    let (uid, gid) = (geteuid(), getegid());
    let failed = |action| move |source: io::Error| NamespaceError { action, source };
    let made = unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS);
    made.map_err(|e| failed("make a user namespace")(e.into()))?;
    let map = |file: &str, map: String| fs::write(file, map).map_err(failed("become root of a user namespace"));
    // The kernel asks for this before it lets a user map the group.
    map("/proc/self/setgroups", "deny".to_owned())?;
    map("/proc/self/uid_map", format!("0 {uid} 1"))?;
    map("/proc/self/gid_map", format!("0 {gid} 1"))?;
    // What others unmount is unmounted here too.
    let flags = MsFlags::MS_REC | MsFlags::MS_SLAVE;
    let slave = mount(None::<&str>, "/", None::<&str>, flags, None::<&str>);
    slave.map_err(|e| failed("mount in a user namespace")(e.into()))
}
