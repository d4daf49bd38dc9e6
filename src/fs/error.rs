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
    /// The tree is damaged, or the caller used an inode number that the tree never gave out.
    #[error(transparent)]
    Tree(#[from] ErofsError),
    /// The content could not be fetched, or did not come before the deadline.
    #[error(transparent)]
    Content(#[from] ContentError),
    /// The caller read a directory as a file.
    #[error("is a directory")]
    IsDirectory,
    /// The caller read an inode that has no content.
    #[error("is not a regular file")]
    NotAFile,
    /// The image is still being prepared, and the preparation makes no progress.
    #[error("nothing useful of the image came within {}s", timeout.as_secs_f32())]
    Stalled {
        /// How long the request waited for progress.
        timeout: Duration,
    },
    /// A signal ended the wait of the request.
    #[error("interrupted")]
    Interrupted,
    /// The image could not be made readable at all.
    #[error("{reason}")]
    Failed {
        /// Why the preparation failed.
        reason: String,
    },
}

/// Errors with an errno for the program that made the system call.
pub trait ToErrno {
    /// The errno for this error.
    fn errno(&self) -> Errno;
}

impl ToErrno for FsError {
    fn errno(&self) -> Errno {
        match self {
            Self::Tree(error) => match error {
                // The kernel knows the file types and does not look up a name in a regular file.
                ErofsError::WrongType { .. } => Errno::EINVAL,
                _ => Errno::EIO,
            },
            Self::Content(error) => error.errno(),
            // As for content that does not come in time. Whoever tries again may have success.
            Self::Stalled { .. } => Errno::ETIMEDOUT,
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
                // POSIX allows ETIMEDOUT for read(2) when the other side did not answer. A program can tell it from a
                // broken disk.
                BlobError::Timeout { .. } => Errno::ETIMEDOUT,
                // EACCES would look like a statement about the file's mode, but the cause is the registry or the
                // network.
                _ => Errno::EIO,
            },
            Self::Corrupt { .. } | Self::Task { .. } => Errno::EIO,
            Self::Closed { .. } => Errno::ESHUTDOWN,
        }
    }
}
