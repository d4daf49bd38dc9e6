//! What can go wrong with opening an image, and with fetching all of it.

use crate::blob::BlobError;
use crate::device::DeviceError;
use crate::erofs::ErofsError;
use crate::layer::{LayerError, OpenError};
use crate::memory::OverLimit;
use crate::store::StoreError;
use crate::task::TaskError;
use crate::tree::TreeError;

/// Why an image cannot be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// A blob could not be fetched.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// A layer could not be opened.
    #[error(transparent)]
    Layer(#[from] OpenError),
    /// The layers cannot be merged.
    #[error("cannot merge the layers: {0}")]
    Merge(#[from] TreeError),
    /// The tree could not be written or read back.
    #[error("cannot build the tree: {0}")]
    Tree(#[from] ErofsError),
    /// The tree takes more memory than the image is allowed.
    #[error("the tree of the image takes {0}")]
    TooMuchMemory(#[from] OverLimit),
    /// The store could not be read or written.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A data device could not be read.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Opening the image was interrupted.
    #[error("cannot open the image: {0}")]
    Task(#[from] TaskError),
}

/// Why a part of an image is not in the store.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CompleteError {
    /// A span could not be fetched.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// Spans are missing in the store, although no fetch failed.
    #[error("{}", not_kept(*spans, problem.as_deref()))]
    NotKept {
        /// Number of spans that are not in the store.
        spans: usize,
        /// Why the store cannot be written. If it can be written, the image is larger than the store may be.
        problem: Option<String>,
    },
}

fn not_kept(spans: usize, problem: Option<&str>) -> String {
    match problem {
        Some(problem) => format!("{spans} spans could not be kept: {problem}"),
        None => {
            format!("{spans} spans could not be kept, because the image does not fit in the cache: raise --cache-size")
        }
    }
}
