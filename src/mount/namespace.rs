//! The end of the mount namespace in which a mount was made.
//!
//! The process behind a mount is itself in that namespace and keeps it alive. Without this module, a mount made
//! inside a container or `unshare --mount` would outlive every process that can reach it. So the process looks for
//! another process that can reach the mount, waits for its end, and looks again. When it finds none, the mount is
//! over.
//!
//! The mount namespace of process 1 has no end that a process in it could see. If this process cannot see the
//! processes of others, it concludes nothing and the mount stays.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::mountinfo;
use super::privilege::is_root_namespace;
use super::process::{self, Process};
use super::users::{all, namespace, namespace_of};

/// Name of the environment variable that marks the background process behind a mount.
pub const SERVE: &str = "OCIFS_SERVE";
/// Target of `/proc/PID/ns/pid` for a process in the machine's first PID namespace. The number is fixed (kernel:
/// include/linux/proc_ns.h).
const MACHINE: &str = "pid:[4026531836]";
/// Pause before the second of two looks that must both find no process. One look can miss a process that starts
/// while this process reads /proc. A larger value delays the end of the mount; with a smaller one, both looks may
/// miss a process.
const AGAIN: Duration = Duration::from_millis(250);
/// Pause between two looks if only a descriptor, a bind mount or an outer parent keeps the namespace. The end of
/// these cannot be waited for. A larger value delays the end of the mount; a smaller one reads /proc more often.
const HELD: Duration = Duration::from_secs(5);

/// How the mount can be reached.
#[derive(Debug, PartialEq, Eq)]
enum Reach {
    /// The process with this id can reach it.
    Process(u32),
    /// The namespace is bind-mounted or open in a process, so a process may enter it. Or the parent can reach the
    /// mount, but cannot be waited for.
    Held,
    /// No process was found that can reach it.
    Nobody,
}

/// Waits until no process can reach the file system `device` any more. Every process in this mount namespace can
/// reach it, and in every other one that has a copy of the mount. `parent` counts too, as long as it is the parent
/// of this process. Never returns if the mount namespace cannot end, or its processes cannot be seen.
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
                // The process has just ended.
                Ok(None) => tokio::time::sleep(AGAIN).await,
                // This kernel has no process descriptors (pidfds), or this process has no free descriptor.
                Err(_) => tokio::time::sleep(HELD).await,
            },
            Reach::Held => tokio::time::sleep(HELD).await,
            Reach::Nobody if found_nobody => return,
            Reach::Nobody => tokio::time::sleep(AGAIN).await,
        }
        found_nobody = reach == Reach::Nobody;
    }
}

/// Whether this mount namespace can end and this process can see the processes in it.
fn can_be_seen() -> bool {
    match (namespace("self"), first()) {
        (Some(own), Some(first)) => own != first,
        // Process 1 belongs to another user and cannot be inspected. A user who may mount without being root of the
        // machine has made namespaces for that, and they can end. In a process namespace of its own, this process
        // ends with the first one there, so it need not watch.
        (Some(_), None) => {
            let processes = fs::read_link("/proc/self/ns/pid").ok();
            let shared = processes.is_some_and(|name| name == Path::new(MACHINE));
            nix::unistd::geteuid().is_root() && !is_root_namespace() && shared
        }
        (None, _) => false,
    }
}

/// Returns the mount namespace of process 1. If this process may not inspect process 1, asks the kernel thread
/// kthreadd, which is in the same namespace.
fn first() -> Option<OsString> {
    namespace("1").or_else(|| namespace("2").filter(|_| process::name(2) == "kthreadd"))
}

/// Looks once at all processes, and returns how the file system `device` can be reached.
fn look(device: Option<&str>, parent: Option<u32>) -> Reach {
    let own = namespace("self");
    let me = std::process::id();
    if let Some(parent) = parent
        && nix::unistd::getppid().as_raw().cast_unsigned() == parent
    {
        return match parent {
            // The parent is in an outer process namespace and cannot be waited for from here.
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
            // In the user namespace of the machine, even root may not inspect some processes. Such a process can be
            // in any mount namespace, so it counts. In another user namespace, a process that this one may not
            // inspect does not share its namespaces.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied && machine && pid != 1 => {
                match process::process_start(pid) {
                    Some(_) => return Reach::Process(pid),
                    None => continue,
                }
            }
            // The process has ended. A zombie is in no namespace any more.
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

/// Returns the path of the program that a process runs.
fn program(process: &str) -> Option<PathBuf> {
    fs::read_link(Path::new("/proc").join(process).join("exe")).ok()
}

/// Whether a process only serves a mount, like this process, or only the overlay on it. `own` is the program of
/// this process. A process that serves a mount runs the same program, and its environment contains [`SERVE`].
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
