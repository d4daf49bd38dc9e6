//! The mount(2) side of FUSE: attaching /dev/fuse to a directory and detaching it, as root or through fusermount3.
//!
//! Own code rather than fuser's because the descriptor must be mounted long before the session starts, and because an unmount
//! must never hit whatever else is mounted at the path by then (kernel: fs/fuse/inode.c `fuse_parse_param`, libfuse:
//! util/fusermount.c for the helper's protocol).

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::mount::MntFlags;
use nix::sys::socket::{AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, socketpair};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::mountinfo;
use super::options::FuseOptions;

/// Why a directory could not be mounted or unmounted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelMountError {
    /// There is no /dev/fuse, or it may not be opened.
    #[error("cannot open /dev/fuse: {source}{}", hint(source))]
    Device {
        /// The system's answer.
        source: io::Error,
    },
    /// mount(2) refused.
    #[error("cannot mount on {}: {source}", mountpoint.display())]
    Mount {
        /// Where.
        mountpoint: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// fusermount3 is needed (no privilege to mount) and is not there or refused.
    #[error("fusermount3 cannot {action} {}: {message}", mountpoint.display())]
    Helper {
        /// What it was asked to do.
        action: &'static str,
        /// Where.
        mountpoint: PathBuf,
        /// What it said.
        message: String,
    },
    /// Something still uses the mount.
    #[error("{} is busy: a process has a file or its working directory there (see `fuser -vm {}`), or use --lazy", mountpoint.display(), mountpoint.display())]
    Busy {
        /// Where.
        mountpoint: PathBuf,
    },
    /// Another file system was mounted on top.
    #[error("{} is covered by another mount: unmount that one first", mountpoint.display())]
    Covered {
        /// Where.
        mountpoint: PathBuf,
    },
    /// umount(2) refused.
    #[error("cannot unmount {}: {source}", mountpoint.display())]
    Unmount {
        /// Where.
        mountpoint: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

fn hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::NotFound => " (load the fuse module, or give the container /dev/fuse)",
        io::ErrorKind::PermissionDenied => " (it must be readable and writable for this user)",
        _ => "",
    }
}

/// Mounts a new FUSE file system at `mountpoint` and returns the open /dev/fuse that serves it. Nothing is answered yet.
pub(super) fn mount(source: &str, mountpoint: &Path, options: &FuseOptions) -> Result<OwnedFd, KernelMountError> {
    match mount_directly(source, mountpoint, options) {
        Err(KernelMountError::Mount { source: error, .. }) if error.raw_os_error() == Some(Errno::EPERM as i32) => {
            mount_by_helper(source, mountpoint, options)
        }
        result => result,
    }
}

fn mount_directly(source: &str, mountpoint: &Path, options: &FuseOptions) -> Result<OwnedFd, KernelMountError> {
    let device = File::options()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .map_err(|source| KernelMountError::Device { source })?;
    let data = options.kernel_data(device.as_raw_fd());
    nix::mount::mount(
        Some(source),
        mountpoint,
        Some("fuse.ocifs"),
        options.flags(),
        Some(data.as_str()),
    )
    .map_err(|e| KernelMountError::Mount {
        mountpoint: mountpoint.to_owned(),
        source: e.into(),
    })?;
    Ok(device.into())
}

/// fusermount3 mounts with its own privilege and sends the descriptor back over a socket.
fn mount_by_helper(source: &str, mountpoint: &Path, options: &FuseOptions) -> Result<OwnedFd, KernelMountError> {
    let failed = |message: String| KernelMountError::Helper {
        action: "mount on",
        mountpoint: mountpoint.to_owned(),
        message,
    };
    if !nix::unistd::geteuid().is_root() && (options.suid || options.dev) {
        return Err(failed("only root may mount with the options suid and dev".to_owned()));
    }
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC)
        .map_err(|e| failed(e.to_string()))?;
    fcntl(&theirs, FcntlArg::F_SETFD(FdFlag::empty())).map_err(|e| failed(e.to_string()))?;
    let child = Command::new("fusermount3")
        .arg("-o")
        .arg(options.helper_options(source))
        .arg("--")
        .arg(mountpoint)
        .env("_FUSE_COMMFD", theirs.as_raw_fd().to_string())
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| failed(format!("{e} (install the fuse3 package)")))?;
    drop(theirs);
    let received = receive_fd(&ours);
    let output = child.wait_with_output().map_err(|e| failed(e.to_string()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(failed(said.trim().trim_start_matches("fusermount3: ").to_owned()));
    }
    received.map_err(|e| failed(e.to_string()))
}

#[allow(unsafe_code)]
fn receive_fd(socket: &OwnedFd) -> io::Result<OwnedFd> {
    let mut byte = [0];
    let mut space = nix::cmsg_space!(RawFd);
    let mut slices = [IoSliceMut::new(&mut byte)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut slices, Some(&mut space), flags)?;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control
            && let Some(&fd) = fds.first()
        {
            // SAFETY: the kernel has just installed this descriptor for us and nobody else knows it.
            return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
    Err(io::Error::other("no descriptor came back"))
}

/// Watches for the end of the file system that `fuse` serves.
#[allow(unsafe_code)]
pub(super) fn watch(fuse: &OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // The end of the connection is an error condition.
    let (watched, interest) = (fuse.try_clone()?, Interest::ERROR);
    // SAFETY: an OwnedFd names the same open descriptor as long as it lives.
    let registered = unsafe { AsyncFd::register_with_interest(watched, interest) };
    registered.map_err(io::Error::from)
}

/// Waits until the file system is mounted nowhere any more, whoever took it down; for ever if it is not watched.
pub(super) async fn gone(watched: Option<&AsyncFd<OwnedFd>>) {
    match watched {
        // If it cannot be watched after all, its end shows when the session starts.
        Some(watched) if watched.ready(Interest::ERROR).await.is_ok() => {}
        _ => std::future::pending().await,
    }
}

/// Detaches the mount `id` if it is still at `mountpoint`; whatever else is there by now is left alone.
pub(super) fn unmount_own(mountpoint: &Path, id: u64, lazy: bool) -> Result<(), KernelMountError> {
    let unreadable = |source| KernelMountError::Unmount {
        mountpoint: mountpoint.to_owned(),
        source,
    };
    if mountinfo::at(mountpoint)
        .map_err(unreadable)?
        .is_some_and(|top| top.id == id)
    {
        return unmount(mountpoint, lazy);
    }
    match mountinfo::is_there(mountpoint, id).map_err(unreadable)? {
        true => Err(KernelMountError::Covered {
            mountpoint: mountpoint.to_owned(),
        }),
        false => Ok(()),
    }
}

/// Detaches what is mounted at `mountpoint`. With `lazy`, at once, even if it is in use.
pub(super) fn unmount(mountpoint: &Path, lazy: bool) -> Result<(), KernelMountError> {
    let flags = if lazy { MntFlags::MNT_DETACH } else { MntFlags::empty() } | MntFlags::UMOUNT_NOFOLLOW;
    match nix::mount::umount2(mountpoint, flags) {
        Ok(()) => Ok(()),
        // EINVAL: it is no mount point any more, which is what was wanted.
        Err(Errno::EINVAL | Errno::ENOENT) => Ok(()),
        Err(Errno::EBUSY) => Err(KernelMountError::Busy {
            mountpoint: mountpoint.to_owned(),
        }),
        Err(Errno::EPERM) => unmount_by_helper(mountpoint, lazy),
        Err(e) => Err(KernelMountError::Unmount {
            mountpoint: mountpoint.to_owned(),
            source: e.into(),
        }),
    }
}

fn unmount_by_helper(mountpoint: &Path, lazy: bool) -> Result<(), KernelMountError> {
    let failed = |message: String| KernelMountError::Helper {
        action: "unmount",
        mountpoint: mountpoint.to_owned(),
        message,
    };
    let output = Command::new("fusermount3")
        .arg(if lazy { "-uz" } else { "-u" })
        .arg("--")
        .arg(mountpoint)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| failed(e.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    if said.contains("busy") {
        return Err(KernelMountError::Busy {
            mountpoint: mountpoint.to_owned(),
        });
    }
    Err(failed(said.trim().to_owned()))
}
