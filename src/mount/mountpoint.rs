//! The directory to mount on.
//!
//! The process holds it open from the check until the mount stands. Another process may replace the path meanwhile,
//! by a symlink to /etc for example. The mount then still goes to the checked directory, or fails.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;

use super::error::{MountError, system};
use super::kernel::{self, handle};
use super::mountinfo::{self, MountEntry};
use super::registration::RunDir;
use super::socket_table::is_bound;

/// How long a FUSE mount may take to show that it is dead. A dead mount fails at once. So a larger value only
/// delays the refusal of a mount that is alive and slow. On a busy machine, a smaller one may take a dead mount for
/// a live one.
const PATIENCE: Duration = Duration::from_secs(1);

/// An open directory that was checked.
#[derive(Debug)]
pub(super) struct MountPoint {
    path: PathBuf,
    directory: OwnedFd,
}

impl MountPoint {
    /// Opens the directory at an absolute path without symlinks, and checks that it can be mounted on. First
    /// unmounts a dead ocifs mount at the path. That mount has no registration; it may be left after the run
    /// directory was lost.
    pub(super) async fn open(run: &RunDir, path: &Path, nonempty: bool) -> Result<Self, MountError> {
        let refuse = |reason: &str| refuse(path, reason.to_owned());
        let there = mountinfo::at(path).map_err(system("read the mount table"))?;
        if let Some(mount) = there.filter(|mount| run.made(mount)) {
            if !is_dead(run, path, &mount).await {
                return Err(refuse("an ocifs mount is there already (`ocifs umount` takes it down)"));
            }
            kernel::unmount(&mount.standing(), true)?;
        }
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let directory = open(path, flags, Mode::empty()).map_err(|errno| match errno {
            nix::Error::ENOENT => refuse("it does not exist (create the directory first)"),
            nix::Error::ENOTDIR | nix::Error::ELOOP => refuse("it is not a directory"),
            errno => refuse(errno.desc()),
        })?;
        let opened = Self {
            path: path.to_owned(),
            directory,
        };
        if opened.place()? != path {
            return Err(refuse("a directory above it was replaced by a symbolic link"));
        }
        let mut entries = fs::read_dir(opened.handle()).map_err(|e| refuse(&e.to_string()))?;
        match entries.next() {
            Some(_) if !nonempty => Err(refuse("it is not empty (-o nonempty mounts over what is there)")),
            _ => Ok(opened),
        }
    }

    /// Returns the path that the caller gave.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns a path that leads to this directory, even if another directory gets its name. The path is valid as
    /// long as this process holds the directory.
    pub(super) fn handle(&self) -> PathBuf {
        handle(&self.directory)
    }

    /// Returns the present path of the directory.
    pub(super) fn place(&self) -> Result<PathBuf, MountError> {
        fs::read_link(self.handle()).map_err(system("find the mount point"))
    }
}

fn refuse(path: &Path, reason: String) -> MountError {
    MountError::Mountpoint {
        mountpoint: path.to_owned(),
        reason,
    }
}

/// Whether the mount at `path` is dead: no process serves it.
async fn is_dead(run: &RunDir, path: &Path, mount: &MountEntry) -> bool {
    // The kernel's EROFS answers from what it knows. The process behind it would listen at its control socket.
    if let Some(socket) = run.control_of(mount) {
        return !is_bound(&socket);
    }
    let path = path.to_owned();
    let asking = tokio::task::spawn_blocking(move || fs::metadata(path));
    match tokio::time::timeout(PATIENCE, asking).await {
        Ok(Ok(Err(error))) => error.raw_os_error() == Some(nix::libc::ENOTCONN),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_directory_is_held_whatever_gets_its_name() {
        let top = tempfile::tempdir().unwrap();
        let top = top.path().canonicalize().unwrap();
        let run = RunDir::open().unwrap();
        let (path, other) = (top.join("a/m"), top.join("b"));
        fs::create_dir_all(&path).unwrap();
        fs::create_dir(&other).unwrap();
        let opened = MountPoint::open(&run, &path, false).await.unwrap();
        fs::rename(&path, top.join("moved")).unwrap();
        std::os::unix::fs::symlink(&other, &path).unwrap();
        assert_eq!(opened.place().unwrap(), top.join("moved"));
        let error = MountPoint::open(&run, &path, false).await.unwrap_err();
        assert!(error.to_string().contains("not a directory"), "{error}");

        fs::create_dir_all(top.join("b/m")).unwrap();
        fs::remove_dir_all(top.join("a")).unwrap();
        std::os::unix::fs::symlink(&other, top.join("a")).unwrap();
        let error = MountPoint::open(&run, &path, false).await.unwrap_err();
        assert!(error.to_string().contains("symbolic link"), "{error}");
    }
}
