//! The end of the mount namespace that a mount was made in.
//!
//! The process behind a mount is itself in that namespace and thereby keeps it: without care, a mount that was made inside a
//! container or `unshare --mount` would outlive everybody who can reach it. So the process looks for somebody else who can,
//! waits until that one ends, and looks again. When nobody is left, the mount is over.
//!
//! The namespace of process 1 has no end to wait for. Where the processes of others cannot be seen, nothing is concluded.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::mountinfo;
use super::privilege::is_root_namespace;
use super::process::{self, Process};
use super::users::{all, namespace, namespace_of};

/// How the environment marks the process behind a mount in the background.
pub const SERVE: &str = "OCIFS_SERVE";
/// The process namespace of the machine; its number is fixed (kernel: include/linux/proc_ns.h).
const MACHINE: &str = "pid:[4026531836]";
/// Between two looks that find nobody. A process that starts while /proc is being read can be missed once.
const AGAIN: Duration = Duration::from_millis(250);
/// Between two looks while only a descriptor or a bind mount keeps the namespace. Their ends cannot be waited for.
const HELD: Duration = Duration::from_secs(5);

/// Who can reach the mount.
#[derive(Debug, PartialEq, Eq)]
enum Reach {
    /// This process can.
    Process(u32),
    /// The namespace has a name or is open somewhere: somebody may enter it.
    Held,
    Nobody,
}

/// Returns when nobody can reach the file system `device` any more: no process is in this mount namespace and none in another
/// one that has a copy. A `parent` that looks after this process counts as long as it is its parent.
pub(super) async fn abandoned(device: Option<String>, parent: Option<u32>) {
    if !can_be_seen() {
        return std::future::pending().await;
    }
    let mut found_nobody = false;
    loop {
        let device = device.clone();
        let look = tokio::task::spawn_blocking(move || look(device.as_deref(), parent));
        let Ok(reach) = look.await else {
            return std::future::pending().await;
        };
        match reach {
            Reach::Process(pid) => match Process::any(pid) {
                Ok(Some(process)) => {
                    if process.end().await.is_err() {
                        tokio::time::sleep(HELD).await;
                    }
                }
                // It has just ended.
                Ok(None) => tokio::time::sleep(AGAIN).await,
                // No descriptors of processes in this kernel, or none left.
                Err(_) => tokio::time::sleep(HELD).await,
            },
            Reach::Held => tokio::time::sleep(HELD).await,
            Reach::Nobody if found_nobody => return,
            Reach::Nobody => tokio::time::sleep(AGAIN).await,
        }
        found_nobody = reach == Reach::Nobody;
    }
}

/// Whether this is a namespace that can end, and whether its processes can be seen.
fn can_be_seen() -> bool {
    match (namespace("self"), first()) {
        (Some(own), Some(first)) => own != first,
        // The first process belongs to somebody else. Whoever may mount without being root of the machine made namespaces for
        // that. In a process namespace of its own this process ends with the first one there.
        (Some(_), None) => {
            let processes = fs::read_link("/proc/self/ns/pid").ok();
            let shared = processes.is_some_and(|name| name == Path::new(MACHINE));
            nix::unistd::geteuid().is_root() && !is_root_namespace() && shared
        }
        (None, _) => false,
    }
}

/// The mount namespace of the first process. If that one is not to be looked at, a thread of the kernel is in the same one.
fn first() -> Option<OsString> {
    namespace("1").or_else(|| namespace("2").filter(|_| process::name(2) == "kthreadd"))
}

fn look(device: Option<&str>, parent: Option<u32>) -> Reach {
    let own = namespace("self");
    let me = std::process::id();
    if let Some(parent) = parent
        && nix::unistd::getppid().as_raw().cast_unsigned() == parent
    {
        return match parent {
            // It is in an outer process namespace, and cannot be waited for from here.
            0 => Reach::Held,
            parent => Reach::Process(parent),
        };
    }
    let mut others = Vec::new();
    let machine = is_root_namespace();
    let program = program("self");
    for pid in all().filter(|&pid| pid != me && !serves(pid, program.as_deref())) {
        let theirs = match namespace_of(&pid.to_string()) {
            Ok(theirs) => theirs,
            // One that root may not look at can be anywhere; who is no root does not share its namespaces with such.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied && machine && pid != 1 => {
                match process::process_start(pid) {
                    Some(_) => return Reach::Process(pid),
                    None => continue,
                }
            }
            // It has ended: a zombie is in no namespace any more.
            Err(_) => continue,
        };
        if Some(&theirs) == own.as_ref() {
            return Reach::Process(pid);
        }
        others.push((theirs, pid));
    }
    let name = own.unwrap_or_default();
    let mut held = others.iter().any(|&(_, pid)| holds(pid, &name));
    others.sort();
    others.dedup_by(|a, b| a.0 == b.0);
    for (_, pid) in others {
        let table = mountinfo::table_of(pid).unwrap_or_default();
        if table.iter().any(|entry| Some(entry.device.as_str()) == device) {
            return Reach::Process(pid);
        }
        held |= table
            .iter()
            .any(|entry| entry.fs_type == "nsfs" && OsStr::new(&entry.root) == name);
    }
    match held {
        true => Reach::Held,
        false => Reach::Nobody,
    }
}

/// Whether a process has the namespace `name` open.
fn holds(pid: u32, name: &OsStr) -> bool {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    descriptors
        .filter_map(|entry| fs::read_link(entry.path()).ok())
        .any(|target| target.as_os_str() == name)
}

/// The file that a process runs.
fn program(process: &str) -> Option<PathBuf> {
    fs::read_link(Path::new("/proc").join(process).join("exe")).ok()
}

/// Whether a process only serves a mount, as this one, which runs `own`, does, or for the overlay on it.
fn serves(pid: u32, own: Option<&Path>) -> bool {
    if process::name(pid) == "fuse-overlayfs" {
        return true;
    }
    if program(&pid.to_string()).as_deref() != own {
        return false;
    }
    let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    let mut variables = environment.split(|&b| b == 0);
    variables.any(|variable| variable.starts_with(SERVE.as_bytes()) && variable.get(SERVE.len()) == Some(&b'='))
}
