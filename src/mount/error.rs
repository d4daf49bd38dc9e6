//! Why mounts do not come about, or do not come down.

use std::io;
use std::path::{Path, PathBuf};

use super::control::ControlError;
use super::kernel::KernelMountError;
use super::overlay::OverlayError;
use super::registration::RegistrationError;
use crate::fs::FsError;
use crate::image::ImageError;

/// Why a mount did not come about.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MountError {
    /// The mount point cannot be used.
    #[error("cannot mount on {}: {reason}", mountpoint.display())]
    Mountpoint {
        /// Where.
        mountpoint: PathBuf,
        /// Why not, and what to do.
        reason: String,
    },
    /// The kernel refused.
    #[error(transparent)]
    Kernel(#[from] KernelMountError),
    /// The overlay failed.
    #[error(transparent)]
    Overlay(#[from] OverlayError),
    /// The run directory failed.
    #[error(transparent)]
    Registration(#[from] RegistrationError),
    /// What a dead process left at the mount point does not go away.
    #[error("cannot clear a dead mount: {0}")]
    Takedown(#[from] TakedownError),
    /// The image could not be prepared.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Nothing useful came for too long.
    #[error(transparent)]
    Stalled(FsError),
    /// Signals, sockets, threads.
    #[error("cannot {action}: {source}")]
    System {
        /// What was tried.
        action: &'static str,
        /// The system's answer.
        source: io::Error,
    },
}

pub(super) fn system(action: &'static str) -> impl Fn(io::Error) -> MountError {
    move |source| MountError::System { action, source }
}

/// Why a mount could not be asked or taken down.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TakedownError {
    /// There is none.
    #[error("{path} is not an ocifs mount of this user (see `ocifs list`)")]
    NotMounted {
        /// What was named.
        path: String,
    },
    /// It is unmounted already, and its process goes on.
    #[error("{path}: {reason}")]
    Detached {
        /// What was named.
        path: String,
        /// Who uses it.
        reason: String,
    },
    /// The run directory failed.
    #[error(transparent)]
    Registration(#[from] RegistrationError),
    /// The process could not be asked.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The kernel refused.
    #[error(transparent)]
    Kernel(#[from] KernelMountError),
    /// The kernel refused an unmount that this process tried because the one behind the mount does not answer.
    #[error("process {pid} behind the mount does not answer{}, and {source}", why.as_deref().unwrap_or_default())]
    Unresponsive {
        /// Who does not answer.
        pid: u32,
        /// Why, if that can be seen.
        why: Option<String>,
        /// What the kernel said.
        source: KernelMountError,
    },
    /// The process refused.
    #[error("{message}")]
    Refused {
        /// What it said.
        message: String,
    },
    /// The system refused.
    #[error("cannot {action}: {source}")]
    System {
        /// What was tried.
        action: &'static str,
        /// The system's answer.
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
