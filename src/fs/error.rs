//! Errors of the file system, and the one place that chooses an errno for them.

use std::time::Duration;

pub use nix::errno::Errno;

use crate::blob::BlobError;
use crate::content::ContentError;
use crate::erofs::ErofsError;
use crate::layer::LayerError;

/// Why an operation failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FsError {
    /// The tree is damaged, or an inode number that it never gave out was used.
    #[error(transparent)]
    Tree(#[from] ErofsError),
    /// Content could not be had, or did not come in time.
    #[error(transparent)]
    Content(#[from] ContentError),
    /// A directory was read as a file.
    #[error("is a directory")]
    IsDirectory,
    /// Something without content was read.
    #[error("is not a regular file")]
    NotAFile,
    /// The image is being prepared, and that does not come on.
    #[error("nothing useful of the image came within {}s", timeout.as_secs_f32())]
    Stalled {
        /// How long one waited.
        timeout: Duration,
    },
    /// A signal ended the wait.
    #[error("interrupted")]
    Interrupted,
    /// The image could not be made readable at all.
    #[error("{reason}")]
    Failed {
        /// What went wrong while it was prepared.
        reason: String,
    },
}

/// What a caller of the kernel sees.
pub trait ToErrno {
    /// The errno for this error.
    fn errno(&self) -> Errno;
}

impl ToErrno for FsError {
    fn errno(&self) -> Errno {
        match self {
            Self::Tree(error) => match error {
                // The kernel knows the types and does not ask a file for an entry.
                ErofsError::WrongType { .. } => Errno::EINVAL,
                _ => Errno::EIO,
            },
            Self::Content(error) => error.errno(),
            // As when an image cannot be prepared at all: for a program it is the same.
            Self::Stalled { .. } => Errno::EIO,
            Self::Interrupted => Errno::EINTR,
            Self::IsDirectory => Errno::EISDIR,
            Self::NotAFile => Errno::EINVAL,
            Self::Failed { .. } => Errno::EIO,
        }
    }
}

impl ToErrno for ContentError {
    fn errno(&self) -> Errno {
        match self {
            Self::Layer(error) => error.errno(),
            Self::Timeout { .. } => Errno::ETIMEDOUT,
        }
    }
}

impl ToErrno for LayerError {
    fn errno(&self) -> Errno {
        match self {
            Self::Blob { source, .. } => match source {
                // POSIX lets read(2) say that the far side did not answer; a program can tell it from a broken disk.
                BlobError::Timeout { .. } => Errno::ETIMEDOUT,
                // EACCES would read as a statement about the file's mode, which it is not.
                _ => Errno::EIO,
            },
            Self::Corrupt { .. } => Errno::EIO,
            Self::Closed { .. } => Errno::ESHUTDOWN,
        }
    }
}
