//! Writable roots: an overlay on top of the image.
//!
//! Root gets the kernel's overlayfs; where the kernel refuses (no privilege), fuse-overlayfs is started instead. A private
//! upper directory lives in the store and is deleted at unmount; if the store's file system cannot carry an overlay (it is
//! one itself, in a container, say), a tmpfs takes its place.
//!
//! Whoever uses an upper directory holds a lock (flock(2)) on it or its work directory: two overlays must not share them, and
//! a private one without a lock was left by a process that was killed, so the next writable mount deletes it.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, fchown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, MsFlags};

use super::mountinfo::MountEntry;
use super::mountpoint::handle;
use super::options::FuseOptions;
use super::privilege::is_system_root;

/// The source that overlays made by the kernel for ocifs carry.
const SOURCE: &str = "ocifs";

/// Whether a mount is an overlay that was made here: others may have put theirs in its place.
pub(super) fn is_ours(mount: &MountEntry) -> bool {
    match mount.fs_type.as_str() {
        "overlay" => mount.source == SOURCE,
        // It names no source, and takes none.
        fs_type => fs_type == "fuse.fuse-overlayfs",
    }
}

/// Where changes go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Upper {
    /// A directory deleted at unmount. Beside it there may be others like it, and nothing else.
    Private(PathBuf),
    /// The user's directories, kept.
    Kept {
        /// Changed files.
        upper: PathBuf,
        /// Scratch space of overlayfs, on the same file system.
        work: PathBuf,
    },
}

/// Why there is no writable root.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OverlayError {
    /// A directory could not be made.
    #[error("{}: {source}", path.display())]
    Directory {
        /// Which.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// Another mount has the directories.
    #[error("{} is in use by another writable mount", work.display())]
    InUse {
        /// The work directory.
        work: PathBuf,
    },
    /// The kernel refused the overlay.
    #[error(
        "cannot put an overlay with upper {} on {}: {source} (upper and work must be on one file system that is no overlay or FUSE; see dmesg)",
        upper.display(),
        mountpoint.display()
    )]
    Kernel {
        /// Where.
        mountpoint: PathBuf,
        /// Upper directory.
        upper: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// This user has no privilege to mount an overlay, and the program fuse-overlayfs failed.
    #[error("fuse-overlayfs cannot mount on {}: {message}", mountpoint.display())]
    Helper {
        /// Where.
        mountpoint: PathBuf,
        /// What it said.
        message: String,
    },
}

/// The directories of an overlay. Upper and work directory are open, so that the kernel uses the directories that were checked
/// and locked, even if others have their names by then.
struct Layers<'a> {
    lower: &'a Path,
    upper: Held,
    work: Held,
}

/// A directory that is held open.
struct Held {
    path: PathBuf,
    directory: File,
}

impl Held {
    /// Opens a directory; makes one that nobody else can look into, if there is none.
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

    /// Locks the directory, unless somebody has.
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

/// Puts the overlay of `lower` and `upper` on the directory `target`, which messages call `mountpoint`. The lock that comes
/// back marks the directories as in use.
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
    let layers = Layers::prepare(lower, upper, work)?;
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
            let layers = Layers::prepare(lower, scratch.join("upper"), work)?;
            layers.mount_kernel(target, options, true).map_err(refused)?;
        }
        (Err(errno), _) => return Err(refused(errno)),
    }
    Ok(lock)
}

impl<'a> Layers<'a> {
    /// The root of an overlay has the mode and owner of its upper directory, so a fresh one is made like the image's root.
    fn prepare(lower: &'a Path, upper: PathBuf, work: Held) -> Result<Self, OverlayError> {
        let fresh = !upper.exists();
        let upper = Held::make(upper)?;
        let alike = || {
            let root = fs::metadata(lower)?;
            // Others cannot give files away.
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

    fn options(&self, upper: &Path, work: &Path) -> OsString {
        let mut options = Vec::new();
        for (name, path) in [("lowerdir=", self.lower), (",upperdir=", upper), (",workdir=", work)] {
            options.extend_from_slice(name.as_bytes());
            options.extend_from_slice(&escape(path));
        }
        OsString::from_vec(options)
    }

    /// A `volatile` overlay does not flush what is thrown away at unmount anyway; kernels before 5.10 do not know it.
    fn mount_kernel(&self, target: &Path, options: &FuseOptions, volatile: bool) -> Result<(), Errno> {
        let mut flags = options.flags();
        flags.remove(MsFlags::MS_RDONLY);
        let mut data = self.options(&handle(&self.upper.directory), &handle(&self.work.directory));
        if !is_system_root() {
            // trusted.* attributes are not for root of a user namespace. Without this the mount succeeds, but what needs an
            // attribute (replacing a directory, say) fails.
            data.push(",userxattr");
        }
        let mount =
            |data: &OsString| nix::mount::mount(Some(SOURCE), target, Some("overlay"), flags, Some(data.as_os_str()));
        if volatile {
            let mut data = data.clone();
            data.push(",volatile");
            match mount(&data) {
                Err(Errno::EINVAL) => {}
                result => return result,
            }
        }
        mount(&data)
    }

    /// Mounts by fuse-overlayfs, which runs as this user and looks the directories up by name.
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
            // To change a file means to copy it, and the copy belongs to this user; then so do the originals.
            list.push(format!(",squash_to_uid={uid},squash_to_gid={gid}"));
        }
        let output = Command::new("fuse-overlayfs")
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

/// Deletes the private directories beside `own` whose processes were killed.
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

/// Deletes a private upper directory (and the tmpfs on it, if there is one).
pub(super) fn discard(scratch: &Path) {
    match nix::mount::umount2(scratch, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        // No tmpfs was needed; others than root cannot have made one.
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT | Errno::EPERM) => {}
        Err(error) => {
            tracing::warn!(path = %scratch.display(), %error, "cannot detach the tmpfs of private changes");
            return;
        }
    }
    let removed = match fs::remove_dir_all(scratch) {
        // Not root, and a directory that was made unwritable, by the user or as fuse-overlayfs makes its work directory.
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

/// Gives the owner of the directories at and below `directory` all rights to them.
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

/// `,` ends an option and `:` a lower directory; both can be escaped (kernel: fs/overlayfs/params.c).
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
