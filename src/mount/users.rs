//! The users that keep a file system alive after it was unmounted in this mount namespace.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, StatxFlags, statx};

use super::mountinfo;
use super::process;
use super::standing::Standing;

/// Number of processes that a message names. It gives only the count of further ones. A larger value makes messages
/// longer; a smaller one names fewer of the users.
const NAMED: usize = 3;

/// What a mount namespace contains of a certain mount.
struct Namespace {
    /// Whether it contains the same file system.
    has_copy: bool,
    /// Whether it contains any mount with the same id. Then the kernel has reused the id, or the mount is not
    /// detached there.
    has_id: bool,
}

impl Namespace {
    fn of(pid: u32, mount: &Standing) -> Self {
        let table = mountinfo::table_of(pid).unwrap_or_default();
        Self {
            has_copy: table.iter().any(|entry| entry.device == mount.device),
            has_id: table.iter().any(|entry| entry.id == mount.id),
        }
    }
}

/// The users of a file system that were found.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Users {
    /// Mount points in this mount namespace that have a copy.
    mountpoints: Vec<PathBuf>,
    /// Processes in other mount namespaces that have a copy.
    namespaces: Vec<u32>,
    /// Processes that have a file of it open, run a program of it, or have their working or root directory in it.
    files: Vec<u32>,
    /// Number of clients that are connected to a socket of a disk.
    clients: usize,
}

impl Users {
    /// Adds clients that are connected to the sockets of a disk.
    pub(super) fn and_clients(self, clients: usize) -> Self {
        Self { clients, ..self }
    }

    /// Finds the users of a mount other than its own process `server`. Reads only /proc, so it never waits for the
    /// file system itself.
    pub(super) fn of(mount: &Standing, server: u32) -> Self {
        let here = mountinfo::table().unwrap_or_default();
        let copies = here.into_iter().filter(|e| e.device == mount.device);
        let mut users = Self {
            mountpoints: copies.map(|e| e.mountpoint).collect(),
            ..Self::default()
        };
        let own = namespace("self");
        let mut known: HashMap<Option<OsString>, Namespace> = HashMap::new();
        for pid in all().filter(|&pid| pid != server && pid != std::process::id()) {
            let name = namespace(&pid.to_string());
            let elsewhere = name != own;
            let namespace = known.entry(name).or_insert_with(|| Namespace::of(pid, mount));
            if namespace.has_copy && elsewhere {
                users.namespaces.push(pid);
            } else if !namespace.has_id && has_open(pid, mount.id) {
                users.files.push(pid);
            }
        }
        users
    }

    /// Whether no user was found.
    pub(super) fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl fmt::Display for Users {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut kinds = Vec::new();
        if let Some(mountpoint) = self.mountpoints.first() {
            kinds.push(format!("a copy is mounted on {}", mountpoint.display()));
        }
        if !self.namespaces.is_empty() {
            kinds.push(format!(
                "another mount namespace has it ({})",
                processes(&self.namespaces)
            ));
        }
        if !self.files.is_empty() {
            kinds.push(format!("files or directories are in use ({})", processes(&self.files)));
        }
        match self.clients {
            0 => {}
            1 => kinds.push("one client is connected to the disk".to_owned()),
            clients => kinds.push(format!("{clients} clients are connected to the disk")),
        }
        match kinds.is_empty() {
            true => f.write_str("it is about to end, or somebody uses the mount who cannot be seen from here"),
            false => f.write_str(&kinds.join(", ")),
        }
    }
}

fn processes(pids: &[u32]) -> String {
    let named = pids.iter().take(NAMED);
    let named: Vec<String> = named.map(|&pid| format!("{pid} {}", process::name(pid))).collect();
    let (word, more) = match pids.len() {
        1 => ("process", String::new()),
        n if n > NAMED => ("processes", format!(" and {} more", n - NAMED)),
        _ => ("processes", String::new()),
    };
    format!("{word} {}{more}", named.join(", "))
}

/// Returns the ids of all processes that this process can see.
pub(super) fn all() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// Returns the name of a process's mount namespace. `None` if this process may not inspect that one, or it has
/// ended.
pub(super) fn namespace(process: &str) -> Option<OsString> {
    namespace_of(process).ok()
}

/// Returns the name of a process's mount namespace. Fails with [`io::ErrorKind::PermissionDenied`] if this process
/// may not inspect that one. Fails for a zombie, which has no namespace.
pub(super) fn namespace_of(process: &str) -> io::Result<OsString> {
    fs::read_link(format!("/proc/{process}/ns/mnt")).map(PathBuf::into_os_string)
}

/// Whether a process uses the mount `id`: it has a file of it open, runs a program of it, or has its working or
/// root directory in it.
fn has_open(pid: u32, id: u64) -> bool {
    let process = PathBuf::from(format!("/proc/{pid}"));
    let directories = ["cwd", "root", "exe"].map(|name| process.join(name));
    if directories.iter().any(|path| mount_of(path) == Some(id)) {
        return true;
    }
    let descriptors = fs::read_dir(process.join("fdinfo")).into_iter().flatten().flatten();
    descriptors
        .filter_map(|entry| fs::read_to_string(entry.path()).ok())
        .any(|info| mount_id(&info) == Some(id))
}

/// Returns the id of the mount in which a path lies. The kernel answers from its own data, without asking the file
/// system.
fn mount_of(path: &Path) -> Option<u64> {
    let found = statx(CWD, path, AtFlags::STATX_DONT_SYNC, StatxFlags::MNT_ID).ok()?;
    let said = StatxFlags::from_bits_retain(found.stx_mask).contains(StatxFlags::MNT_ID);
    said.then_some(found.stx_mnt_id)
}

/// Returns the mount id from the text of a file in /proc/PID/fdinfo.
pub(super) fn mount_id(fdinfo: &str) -> Option<u64> {
    let line = fdinfo.lines().find_map(|line| line.strip_prefix("mnt_id:"))?;
    line.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_told_in_a_sentence() {
        assert!(Users::default().to_string().contains("cannot be seen"));
        let users = Users {
            mountpoints: vec!["/copy".into()],
            namespaces: vec![1],
            files: vec![u32::MAX, u32::MAX, u32::MAX, u32::MAX],
            clients: 2,
        };
        let text = users.to_string();
        assert!(
            text.starts_with("a copy is mounted on /copy, another mount namespace has it (process 1 "),
            "{text}"
        );
        assert!(
            text.ends_with(" and 1 more), 2 clients are connected to the disk"),
            "{text}"
        );
    }

    #[test]
    fn a_mount_is_recognised_without_touching_it() {
        let file = std::fs::File::open("/proc/self/status").unwrap();
        let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap();
        let proc = mountinfo::at(Path::new("/proc")).unwrap().unwrap();
        assert_eq!(mount_id(&info), Some(proc.id));
        assert_eq!(mount_of(Path::new("/proc/self/status")), Some(proc.id));
        assert!(has_open(std::process::id(), proc.id));
    }
}
