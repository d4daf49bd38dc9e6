//! The mount(2) side of FUSE: attaches /dev/fuse to a directory and detaches it, as root or through fusermount3.
//!
//! ocifs does not use fuser's code for mounting, for two reasons. The descriptor must be mounted long before the
//! session starts. And an unmount must never hit another mount that lies at the path by then. Sources:
//! fs/fuse/inode.c of the kernel (`fuse_parse_param`), and util/fusermount.c of libfuse for the protocol of the
//! helper.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd as _, AsRawFd, FromRawFd as _, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl, open};
use nix::mount::MntFlags;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, socketpair};
use nix::sys::stat::Mode;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use rustix::fs::{AtFlags, StatxFlags, statx};

use super::kernel_call::KernelCall;
use super::mountinfo;
use super::options::FuseOptions;
use super::standing::Standing;
use super::users::mount_id;
use crate::os::program;

/// Flag of statx(2) for the unique id of a mount (kernel: include/uapi/linux/stat.h).
const MNT_ID_UNIQUE: u32 = 0x4000;

/// Why a directory could not be mounted or unmounted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelMountError {
    /// There is no /dev/fuse, or this user may not open it.
    #[error("cannot open /dev/fuse: {source}{}", hint(source))]
    Device {
        /// The error of the system.
        source: io::Error,
    },
    /// The system call mount(2) failed.
    #[error("cannot mount on {}: {source}", mountpoint.display())]
    Mount {
        /// The mount point.
        mountpoint: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
    /// This user has no privilege to mount, and the helper fusermount3 is missing or refused.
    #[error("fusermount3 cannot {action} {}: {message}", mountpoint.display())]
    Helper {
        /// What the helper was asked to do.
        action: &'static str,
        /// The mount point.
        mountpoint: PathBuf,
        /// The error message of the helper.
        message: String,
    },
    /// A process still uses the mount.
    #[error("{} is busy: a process has a file or its working directory there (see `fuser -vm {}`), or use --lazy", mountpoint.display(), mountpoint.display())]
    Busy {
        /// The mount point.
        mountpoint: PathBuf,
    },
    /// Another file system is mounted on top of the mount.
    #[error("{} is covered by another mount: unmount that one first", mountpoint.display())]
    Covered {
        /// The mount point.
        mountpoint: PathBuf,
    },
    /// The system call umount(2) failed, or the mount table could not be read.
    #[error("cannot unmount {}: {source}", mountpoint.display())]
    Unmount {
        /// The mount point.
        mountpoint: PathBuf,
        /// The error of the system.
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

/// Mounts a new FUSE file system on the directory `target` and returns the open /dev/fuse that serves it. Error
/// messages name the directory `mountpoint`. The file system answers no request until a session serves the
/// descriptor.
pub(super) fn mount(
    source: &str,
    target: &Path,
    mountpoint: &Path,
    options: &FuseOptions,
) -> Result<OwnedFd, KernelMountError> {
    match mount_directly(source, target, mountpoint, options) {
        Err(KernelMountError::Mount { source: error, .. }) if error.raw_os_error() == Some(Errno::EPERM as i32) => {
            mount_by_helper(source, target, mountpoint, options)
        }
        result => result,
    }
}

fn mount_directly(
    source: &str,
    target: &Path,
    mountpoint: &Path,
    options: &FuseOptions,
) -> Result<OwnedFd, KernelMountError> {
    let device = File::options()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .map_err(|source| KernelMountError::Device { source })?;
    let data = options.kernel_data(device.as_raw_fd());
    nix::mount::mount(
        Some(source),
        target,
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

/// Mounts through fusermount3, which has the privilege to mount and sends the descriptor back over a socket. The
/// helper starts in the directory `target` and mounts on its working directory. It looks up the name of the
/// directory once more. So the caller has to check where the mount is before using it.
fn mount_by_helper(
    source: &str,
    target: &Path,
    mountpoint: &Path,
    options: &FuseOptions,
) -> Result<OwnedFd, KernelMountError> {
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
    let child = program("fusermount3")
        .arg("-o")
        .arg(options.helper_options(source))
        .args(["--", "."])
        .current_dir(target)
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
            // SAFETY: the kernel has just installed this descriptor for this process, and no other code knows it.
            return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
    Err(io::Error::other("no descriptor came back"))
}

/// Watches for the end of the file system that `fuse` serves.
#[allow(unsafe_code)]
pub(super) fn watch(fuse: &OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // The kernel reports the end of the connection as an error condition.
    let (watched, interest) = (fuse.try_clone()?, Interest::ERROR);
    // SAFETY: an `OwnedFd` names the same open descriptor as long as it lives.
    let registered = unsafe { AsyncFd::register_with_interest(watched, interest) };
    registered.map_err(io::Error::from)
}

/// Whether the file system that `fuse` serves is still mounted somewhere. As long as it is, no other file system has
/// its device number.
pub(super) fn is_mounted(fuse: &OwnedFd) -> bool {
    // The kernel reports the end of the connection as an error condition, whether it is asked for or not.
    let mut polled = [PollFd::new(fuse.as_fd(), PollFlags::empty())];
    match poll(&mut polled, PollTimeout::ZERO) {
        Ok(_) => !polled[0]
            .revents()
            .is_some_and(|events| events.contains(PollFlags::POLLERR)),
        Err(_) => true,
    }
}

/// Waits until the file system is no longer mounted anywhere, whichever program unmounted it.
pub(super) async fn gone(watched: &AsyncFd<OwnedFd>) {
    if watched.ready(Interest::ERROR).await.is_err() {
        // If the descriptor cannot be watched, the session will find the end when it starts.
        std::future::pending().await
    }
}

/// A system call umount2(2).
pub(super) type UnmountCall = KernelCall<nix::Result<()>>;

/// How far an unmount is. In both cases, the mount is gone from the mount table.
#[derive(Debug)]
pub(super) enum Unmount {
    /// The call has returned. The file system may have other users.
    Done,
    /// The call has not returned: the kernel flushes changes, or waits for reads that it began.
    Unfinished(UnmountCall),
}

/// Time after which an unmount that has not returned is looked at. A larger value delays the answer to a program that
/// unmounts; a smaller one looks at unmounts that are about to return.
const UNMOUNT_LOOK: Duration = Duration::from_millis(100);
/// Time within which a mount must be gone from the mount table. A larger value delays the error; a smaller one reports
/// a busy machine.
const UNMOUNT_LIMIT: Duration = Duration::from_secs(1);

/// Time for which a mount that is in use is tried again. Whoever looks at a mount, such as another `ocifs` command, uses it
/// for a moment. A larger value delays the error for a mount that is really in use; a smaller one reports such a moment.
const MOMENT: Duration = Duration::from_millis(250);
/// Longest time in milliseconds between two attempts within [`MOMENT`]. Each time is another one, so attempts do not keep
/// step with a program that looks at regular times.
const AGAIN: u64 = 15;

/// Detaches the mount `mount`, wherever it has been moved, and no other mount. With `lazy`, detaches it at once,
/// even if it is in use. Succeeds if the mount is already gone. A caller that does not care when the kernel has finished
/// may drop the result.
pub(super) fn unmount(mount: &Standing, lazy: bool) -> Result<Unmount, KernelMountError> {
    let until = Instant::now() + MOMENT;
    loop {
        match try_unmount(mount, lazy) {
            Err(KernelMountError::Busy { .. }) if Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(fastrand::u64(1..=AGAIN)));
            }
            result => return result,
        }
    }
}

/// Does the work of [`unmount`] once.
fn try_unmount(mount: &Standing, lazy: bool) -> Result<Unmount, KernelMountError> {
    let unreadable = |source| KernelMountError::Unmount {
        mountpoint: PathBuf::from("/proc/self/mountinfo"),
        source,
    };
    let Some(found) = mountinfo::find(mount).map_err(unreadable)? else {
        return Ok(Unmount::Done);
    };
    let mountpoint = found.mountpoint;
    let failed = |source: io::Error| KernelMountError::Unmount {
        mountpoint: mountpoint.clone(),
        source,
    };
    let (Some(parent), Some(name)) = (mountpoint.parent(), mountpoint.file_name()) else {
        return Err(failed(io::ErrorKind::InvalidInput.into()));
    };
    // The open descriptor holds the directory above the mount. So no part of the path to it can be replaced between
    // the check and the unmount. A descriptor of the mount itself would make the mount busy.
    let parent = hold(parent).map_err(failed)?;
    let place = handle(&parent).join(name);
    let place_of_thread = format!("/proc/thread-self/fd/{}", parent.as_raw_fd());
    let place_of_thread = Path::new(&place_of_thread).join(name);
    let ids = ids_at(&place).map_err(failed)?;
    if ids.id != Some(mount.id) {
        // Another program may have unmounted it in this moment.
        return match mountinfo::find(mount).map_err(unreadable)? {
            Some(_) => Err(KernelMountError::Covered { mountpoint }),
            None => Ok(Unmount::Done),
        };
    }
    if mount
        .unique
        .zip(ids.unique)
        .is_some_and(|(wanted, found)| wanted != found)
    {
        // The mount is gone, and another one has its numbers.
        return Ok(Unmount::Done);
    }
    let flags = if lazy { MntFlags::MNT_DETACH } else { MntFlags::empty() } | MntFlags::UMOUNT_NOFOLLOW;
    let unmount = move || nix::mount::umount2(&place_of_thread, flags);
    let call = KernelCall::start(Some(parent.as_fd()), unmount).map_err(failed)?;
    let deadline = Instant::now() + UNMOUNT_LIMIT;
    let result = loop {
        if let Some(result) = call.wait(UNMOUNT_LOOK).map_err(failed)? {
            break result;
        }
        if !stands(mount).map_err(unreadable)? {
            return Ok(Unmount::Unfinished(call));
        }
        if Instant::now() > deadline {
            return Err(failed(io::ErrorKind::TimedOut.into()));
        }
    };
    match result {
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => Ok(Unmount::Done),
        Err(Errno::EBUSY) => Err(KernelMountError::Busy { mountpoint }),
        Err(Errno::EPERM) => unmount_by_helper(&mountpoint, &handle(&parent), lazy).map(|()| Unmount::Done),
        Err(e) => Err(failed(e.into())),
    }
}

/// Whether a mount is in this mount namespace. Another one that has got its numbers does not count, as far as the kernel
/// tells them apart.
fn stands(mount: &Standing) -> io::Result<bool> {
    let found = mountinfo::find(mount)?;
    Ok(found.is_some_and(|found| mount.may_be(&identify(&found.mountpoint, found.standing()))))
}

/// Returns a path that leads to an open file of this process.
pub(super) fn handle(fd: &impl AsRawFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

/// Opens a path as a mere reference (`O_PATH`), so the file system at the path does not see it.
fn hold(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    Ok(open(path, flags, Mode::empty())?)
}

/// The ids of the mount in which a path lies, as far as the kernel tells them. None if the path does not exist.
#[derive(Debug, Default)]
struct MountIds {
    id: Option<u64>,
    unique: Option<u64>,
}

/// Returns the ids of the mount in which a path lies. Asks the kernel only, and not the file system, which may not
/// answer.
fn ids_at(path: &Path) -> io::Result<MountIds> {
    let held = match hold(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(MountIds::default()),
        held => held?,
    };
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", held.as_raw_fd()))?;
    let wanted = StatxFlags::from_bits_retain(MNT_ID_UNIQUE);
    let found = statx(&held, "", AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC, wanted);
    // Without statx, or without this flag of it, the kernel has no unique ids.
    let found = found.ok().filter(|found| found.stx_mask & MNT_ID_UNIQUE != 0);
    Ok(MountIds {
        id: mount_id(&info),
        unique: found.map(|found| found.stx_mnt_id),
    })
}

/// Returns the identity of the mount at `path` with its unique id. Leaves the unique id out if another mount is there
/// by now, or if the kernel does not tell it.
pub(super) fn identify(path: &Path, mount: Standing) -> Standing {
    let ids = ids_at(path).unwrap_or_default();
    let unique = ids.unique.filter(|_| ids.id == Some(mount.id));
    Standing { unique, ..mount }
}

fn unmount_by_helper(mountpoint: &Path, parent: &Path, lazy: bool) -> Result<(), KernelMountError> {
    let failed = |message: String| KernelMountError::Helper {
        action: "unmount",
        mountpoint: mountpoint.to_owned(),
        message,
    };
    let output = program("fusermount3")
        .arg(if lazy { "-uz" } else { "-u" })
        .arg("--")
        .arg(mountpoint.file_name().unwrap_or_default())
        .current_dir(parent)
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
