//! Errors of mounting and of taking down.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::control::ControlError;
use super::kernel::KernelMountError;
use super::overlay::OverlayError;
use super::registration::RegistrationError;
use crate::fs::FsError;
use crate::image::ImageError;

/// Why a mount could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MountError {
    /// The mount point cannot be used.
    #[error("cannot mount on {}: {reason}", mountpoint.display())]
    Mountpoint {
        /// The mount point.
        mountpoint: PathBuf,
        /// Why it cannot be used, and what the user can do.
        reason: String,
    },
    /// The kernel refused the mount, or fusermount3 did.
    #[error(transparent)]
    Kernel(#[from] KernelMountError),
    /// The overlay could not be mounted.
    #[error(transparent)]
    Overlay(#[from] OverlayError),
    /// The run directory could not be read or written.
    #[error(transparent)]
    Registration(#[from] RegistrationError),
    /// The mount point has remains of a dead process, and they could not be removed.
    #[error("cannot clear a dead mount: {0}")]
    Takedown(#[from] TakedownError),
    /// The image could not be prepared.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The preparation of the image stalled for longer than the timeout.
    #[error(transparent)]
    Stalled(FsError),
    /// The image could not be prepared, and a disk or EROFS cannot show an error in its place.
    #[error(transparent)]
    Unusable(Arc<FsError>),
    /// EROFS would show the tree to users that the options keep out.
    #[error(
        "EROFS cannot keep other users out, so it serves only mounts of root without noallow_other; use --via fuse"
    )]
    OpenToAll,
    /// No socket could be opened.
    #[error("cannot listen at {address}: {source}")]
    Listen {
        /// The address of the socket.
        address: String,
        /// The error of the system.
        source: io::Error,
    },
    /// The place for metrics cannot be used.
    #[error("cannot give metrics at {place}: {source}")]
    Metrics {
        /// The place.
        place: String,
        /// The error of the system.
        source: io::Error,
    },
    /// Clients are connected to the disk.
    #[error("the disk is in use, clients connected: {clients} (end the virtual machines first, or use --lazy)")]
    Connected {
        /// Number of clients.
        clients: usize,
    },
    /// A system call for signals, sockets, threads, files or the mount table failed.
    #[error("cannot {action}: {source}")]
    System {
        /// What the process tried to do.
        action: &'static str,
        /// The error of the system.
        source: io::Error,
    },
}

pub(super) fn system(action: &'static str) -> impl Fn(io::Error) -> MountError {
    move |source| MountError::System { action, source }
}

/// Why the process behind a mount could not be asked, or the mount could not be taken down.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TakedownError {
    /// There is no such mount.
    #[error("{path} is not an ocifs mount of this user (see `ocifs list`)")]
    NotMounted {
        /// The path that the user gave.
        path: String,
    },
    /// The mount is already unmounted, and its process goes on.
    #[error("{path}: {reason}")]
    Detached {
        /// The path that the user gave.
        path: String,
        /// Which users the mount still has.
        reason: String,
    },
    /// The run directory could not be read or written.
    #[error(transparent)]
    Registration(#[from] RegistrationError),
    /// The process behind the mount gave no answer.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The kernel refused the unmount, or fusermount3 did.
    #[error(transparent)]
    Kernel(#[from] KernelMountError),
    /// The process behind the mount does not answer, so this process tried to unmount, and the kernel refused.
    #[error("process {pid} behind the mount does not answer{}, and {source}", why.as_deref().unwrap_or_default())]
    Unresponsive {
        /// The process that does not answer.
        pid: u32,
        /// Why the process does not answer, if that is visible.
        why: Option<String>,
        /// The error of the kernel.
        source: KernelMountError,
    },
    /// The process behind the mount refused to unmount it.
    #[error("{message}")]
    Refused {
        /// The message of the process.
        message: String,
    },
    /// A system call on the process behind the mount failed.
    #[error("cannot {action}: {source}")]
    System {
        /// What this process tried to do.
        action: &'static str,
        /// The error of the system.
        source: std::io::Error,
    },
    /// The mount table could not be read.
    #[error("cannot read the mount table: {0}")]
    MountTable(#[from] std::io::Error),
}

pub(super) fn not_mounted(path: &Path) -> TakedownError {
    TakedownError::NotMounted {
        path: path.display().to_string(),
    }
}
