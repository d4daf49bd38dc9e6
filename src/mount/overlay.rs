//! Writable roots: an overlay on top of the image.
//!
//! The process first tries overlayfs of the kernel. If the kernel refuses for lack of privilege, the process starts
//! fuse-overlayfs instead.
//!
//! A private upper directory lies in the store, or in the run directory if there is no store for it. The process
//! deletes it at unmount. Not every file system can carry an overlay; that of a container, itself an overlay,
//! cannot. In that case the process mounts a tmpfs on the private upper directory.
//!
//! A process that uses an upper directory holds a lock (flock(2)). The lock is on the private upper directory, or
//! on the work directory that the user gave. It keeps two overlays from sharing these directories. A private upper
//! directory without a lock is left from a process that was killed. The next mount with a private upper directory
//! deletes it.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, fchown};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, MsFlags};

use super::kernel::handle;
use super::kernel_call::KernelCall;
use super::mountinfo::MountEntry;
use super::options::FuseOptions;
use super::privilege::is_system_root;
use crate::os::program;

/// The mount source of overlays that the kernel makes for ocifs.
const SOURCE: &str = "ocifs";

/// Whether ocifs may have made this overlay mount. Another program may have mounted its own overlay in its place.
/// Every fuse-overlayfs mount counts as one of ocifs.
pub(super) fn is_ours(mount: &MountEntry) -> bool {
    match mount.fs_type.as_str() {
        "overlay" => mount.source == SOURCE,
        // fuse-overlayfs gives its mounts no source of their own, and accepts none.
        fs_type => fs_type == "fuse.fuse-overlayfs",
    }
}

/// The directories for the changes to a writable root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Upper {
    /// A directory that ocifs deletes at unmount. The directory above it may contain only other private
    /// directories.
    Private(PathBuf),
    /// The user's directories, which ocifs keeps.
    Kept {
        /// The directory for changed files.
        upper: PathBuf,
        /// The scratch space of overlayfs. It must be on the same file system.
        work: PathBuf,
    },
}

/// Why a writable root could not be mounted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OverlayError {
    /// A directory could not be made, opened, locked or prepared.
    #[error("{}: {source}", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
    /// Another mount uses the directories.
    #[error("{} is in use by another writable mount", work.display())]
    InUse {
        /// The work directory.
        work: PathBuf,
    },
    /// The kernel refused the overlay, or the tmpfs for it.
    #[error(
        "cannot put an overlay with upper {} on {}: {source} (upper and work must be on one file system that is no overlay or FUSE; see dmesg)",
        upper.display(),
        mountpoint.display()
    )]
    Kernel {
        /// The mount point.
        mountpoint: PathBuf,
        /// The upper directory.
        upper: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
    /// This user has no privilege to mount an overlay, and fuse-overlayfs is missing or failed.
    #[error("fuse-overlayfs cannot mount on {}: {message}", mountpoint.display())]
    Helper {
        /// The mount point.
        mountpoint: PathBuf,
        /// The error message of fuse-overlayfs.
        message: String,
    },
}

/// The directories of an overlay. Open descriptors hold the upper and the work directory. So the kernel gets the
/// directories that were checked and locked, even if others get their names meanwhile.
struct OverlayDirs<'a> {
    lower: &'a Path,
    upper: Held,
    work: Held,
}

/// A directory that this process holds open.
struct Held {
    path: PathBuf,
    directory: File,
}

impl Held {
    /// Opens a directory. If it does not exist, makes it first, accessible to its owner alone.
    fn make(path: PathBuf) -> Result<Self, OverlayError> {
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&path);
        let opened = made.and_then(|()| {
            let mut options = File::options();
            options.read(true).custom_flags(nix::libc::O_DIRECTORY);
            options.open(&path)
        });
        match opened {
            Ok(directory) => Ok(Self { path, directory }),
            Err(source) => Err(OverlayError::Directory { path, source }),
        }
    }

    /// Locks the directory. `None` if another process has the lock.
    fn lock(&self) -> Result<Option<Flock<File>>, OverlayError> {
        let failed = |source: io::Error| OverlayError::Directory {
            path: self.path.clone(),
            source,
        };
        let directory = self.directory.try_clone().map_err(failed)?;
        match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Some(lock)),
            Err((_, Errno::EWOULDBLOCK)) => Ok(None),
            Err((_, errno)) => Err(failed(errno.into())),
        }
    }
}

/// Mounts the overlay of `lower` and `upper` on the directory `target`. Error messages name that directory
/// `mountpoint`. Returns the lock that marks the directories as in use.
pub(super) fn mount(
    lower: &Path,
    upper: &Upper,
    target: &Path,
    mountpoint: &Path,
    options: &FuseOptions,
) -> Result<Flock<File>, OverlayError> {
    let (upper, work, scratch) = match upper {
        Upper::Private(scratch) => (scratch.join("upper"), scratch.join("work"), Some(scratch)),
        Upper::Kept { upper, work } => (upper.clone(), work.clone(), None),
    };
    let locked = Held::make(scratch.unwrap_or(&work).clone())?;
    let lock = locked.lock()?;
    let lock = lock.ok_or_else(|| OverlayError::InUse {
        work: locked.path.clone(),
    })?;
    if let Some(scratch) = scratch {
        sweep(scratch);
    }
    let work = match scratch {
        Some(_) => Held::make(work)?,
        None => locked,
    };
    let layers = OverlayDirs::prepare(lower, upper, work)?;
    let refused = |errno: Errno| OverlayError::Kernel {
        mountpoint: mountpoint.to_owned(),
        upper: layers.upper.path.clone(),
        source: errno.into(),
    };
    match (layers.mount_kernel(target, options, scratch.is_some()), scratch) {
        (Ok(()), _) => {}
        (Err(Errno::EPERM), _) => layers.mount_helper(target, mountpoint, options)?,
        (Err(Errno::EINVAL), Some(scratch)) => {
            tracing::warn!(scratch = %scratch.display(), "its file system cannot carry an overlay, using a tmpfs");
            let mounted = nix::mount::mount(
                Some("ocifs"),
                scratch,
                Some("tmpfs"),
                MsFlags::empty(),
                Some("mode=0700"),
            );
            mounted.map_err(refused)?;
            let work = Held::make(scratch.join("work"))?;
            let layers = OverlayDirs::prepare(lower, scratch.join("upper"), work)?;
            layers.mount_kernel(target, options, true).map_err(refused)?;
        }
        (Err(errno), _) => return Err(refused(errno)),
    }
    Ok(lock)
}

impl<'a> OverlayDirs<'a> {
    /// Opens the upper directory. The root of an overlay takes mode and owner from its upper directory. So a new
    /// upper directory gets the mode and owner of the image's root.
    fn prepare(lower: &'a Path, upper: PathBuf, work: Held) -> Result<Self, OverlayError> {
        let fresh = !upper.exists();
        let upper = Held::make(upper)?;
        let alike = || {
            let root = fs::metadata(lower)?;
            // Only root of the machine may change the owner of a file.
            if is_system_root() {
                fchown(&upper.directory, Some(root.uid()), Some(root.gid()))?;
            }
            upper.directory.set_permissions(root.permissions())
        };
        if fresh {
            alike().map_err(|source| OverlayError::Directory {
                path: upper.path.clone(),
                source,
            })?;
        }
        Ok(Self { lower, upper, work })
    }

    /// Returns the overlay options that name the three directories.
    fn options(&self, upper: &Path, work: &Path) -> OsString {
        let mut options = Vec::new();
        for (name, path) in [("lowerdir=", self.lower), (",upperdir=", upper), (",workdir=", work)] {
            options.extend_from_slice(name.as_bytes());
            options.extend_from_slice(&escape(path));
        }
        OsString::from_vec(options)
    }

    /// Mounts with overlayfs of the kernel. A `volatile` overlay does not flush changes to disk, which would be
    /// useless if they are deleted at unmount. Kernels before 5.10 do not know the option, so a second attempt
    /// leaves it out.
    fn mount_kernel(&self, target: &Path, options: &FuseOptions, volatile: bool) -> Result<(), Errno> {
        let mut flags = options.flags();
        flags.remove(MsFlags::MS_RDONLY);
        let mut data = self.options(&handle(&self.upper.directory), &handle(&self.work.directory));
        if !is_system_root() {
            // Root of a user namespace may not use trusted.* attributes. Without `userxattr` the mount would
            // succeed, but operations that need an attribute would fail, such as replacing a directory.
            data.push(",userxattr");
        }
        // The kernel reads the root of the image, which this process serves.
        let mount = |data: OsString| {
            let target = target.to_owned();
            let call = move || nix::mount::mount(Some(SOURCE), &target, Some("overlay"), flags, Some(data.as_os_str()));
            let result = KernelCall::start(None, call).and_then(KernelCall::join);
            result.map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(nix::libc::EIO)))?
        };
        if volatile {
            let mut data = data.clone();
            data.push(",volatile");
            match mount(data) {
                Err(Errno::EINVAL) => {}
                result => return result,
            }
        }
        mount(data)
    }

    /// Mounts with fuse-overlayfs, which runs as this user and looks up the directories by name.
    fn mount_helper(&self, target: &Path, mountpoint: &Path, options: &FuseOptions) -> Result<(), OverlayError> {
        let failed = |message: String| OverlayError::Helper {
            mountpoint: mountpoint.to_owned(),
            message,
        };
        let place = fs::read_link(target).map_err(|e| failed(e.to_string()))?;
        let mut list = self.options(&self.upper.path, &self.work.path);
        list.push(options.flag_names());
        if options.allow_other {
            list.push(",allow_other");
        }
        let (uid, gid) = (nix::unistd::geteuid(), nix::unistd::getegid());
        if !uid.is_root() {
            // Changing a file copies it, and the copy belongs to this user. So the overlay shows the originals as
            // files of this user too.
            list.push(format!(",squash_to_uid={uid},squash_to_gid={gid}"));
        }
        let output = program("fuse-overlayfs")
            .arg("-o")
            .arg(list)
            .arg(place)
            .stdin(Stdio::null())
            .output()
            .map_err(|e| failed(format!("{e} (install the fuse-overlayfs package)")))?;
        if output.status.success() {
            return Ok(());
        }
        Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
    }
}

/// Deletes the private directories beside `own` that have no lock: their processes were killed.
fn sweep(own: &Path) {
    let entries = own.parent().and_then(|parent| fs::read_dir(parent).ok());
    for entry in entries.into_iter().flatten().flatten() {
        let path = entry.path();
        if path == own || !path.join("upper").is_dir() {
            continue;
        }
        match Held::make(path.clone()).and_then(|held| held.lock()) {
            Ok(Some(_lock)) => discard(&path),
            Ok(None) => {}
            Err(error) => tracing::warn!(%error, "a private upper directory of an earlier mount"),
        }
    }
}

/// Deletes a private upper directory. Unmounts the tmpfs on it first, if there is one.
pub(super) fn discard(scratch: &Path) {
    match nix::mount::umount2(scratch, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        // There is no tmpfs. A user other than root cannot have mounted one.
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT | Errno::EPERM) => {}
        Err(error) => {
            tracing::warn!(path = %scratch.display(), %error, "cannot detach the tmpfs of private changes");
            return;
        }
    }
    let removed = match fs::remove_dir_all(scratch) {
        // A user other than root may not delete the entries of a directory without write permission. Either the
        // user took the permission away, or fuse-overlayfs made its work directory so.
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
            open_up(scratch).and_then(|()| fs::remove_dir_all(scratch))
        }
        result => result,
    };
    if let Err(error) = removed
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path = %scratch.display(), %error, "cannot delete the private upper directory");
    }
}

/// Gives the owner all rights to `directory` and to all directories below it.
fn open_up(directory: &Path) -> io::Result<()> {
    fs::set_permissions(directory, fs::Permissions::from_mode(0o700))?;
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            open_up(&entry.path())?;
        }
    }
    Ok(())
}

/// Escapes a path for the overlay options. `,` ends an option and `:` ends a lower directory; a backslash escapes
/// both (kernel: fs/overlayfs/params.c).
fn escape(path: &Path) -> Vec<u8> {
    let mut text = Vec::new();
    for &byte in path.as_os_str().as_bytes() {
        if matches!(byte, b'\\' | b',' | b':') {
            text.push(b'\\');
        }
        text.push(byte);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn separators_in_paths_are_escaped() {
        assert_eq!(escape(Path::new("/a:b,c\\d")), b"/a\\:b\\,c\\\\d");
    }

    #[test]
    fn what_is_locked_is_spared_and_the_rest_swept() {
        let uppers = tempfile::tempdir().unwrap();
        for name in ["own", "live", "dead"] {
            Held::make(uppers.path().join(name).join("upper")).unwrap();
        }
        Held::make(uppers.path().join("other")).unwrap();
        let live = Held::make(uppers.path().join("live")).unwrap();
        let _live = live.lock().unwrap().unwrap();
        sweep(&uppers.path().join("own"));
        let mut left: Vec<_> = fs::read_dir(uppers.path())
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        left.sort();
        assert_eq!(left, ["live", "other", "own"]);
    }
}
