//! Errors of a first pass, and what they mean for the next pass.

use crate::blob::BlobError;
use crate::index::IndexError;
use crate::memory::OverLimit;
use crate::oci::{DiffId, Digest};
use crate::task::TaskError;
use crate::toc::TocError;

/// Why the first pass over a layer failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FirstPassError {
    /// The blob's source gave up.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// The bytes have another digest than the manifest says.
    #[error("layer {expected} is corrupt: the bytes received hash to {actual}")]
    BlobDigest {
        /// Digest in the manifest.
        expected: Digest,
        /// Digest of the bytes.
        actual: Digest,
    },
    /// The layer decompresses to another tar than the config says.
    #[error("layer {layer} is not what the image config promises: its tar hashes to {actual}, diffID is {expected}")]
    DiffId {
        /// Digest of the layer.
        layer: Digest,
        /// The diffID in the config.
        expected: DiffId,
        /// Digest of the tar.
        actual: Digest,
    },
    /// The compressed stream is broken.
    #[error("layer {layer} cannot be decompressed: {source}")]
    Decode {
        /// Digest of the layer.
        layer: Digest,
        /// What is wrong.
        source: IndexError,
    },
    /// The tar in the layer is broken, or the bytes are no tar.
    #[error("layer {layer} cannot be read: {source}")]
    Tar {
        /// Digest of the layer.
        layer: Digest,
        /// What is wrong.
        source: TocError,
        /// Whether the bytes are the ones that the manifest and the config promise.
        verified: bool,
    },
    /// The index takes more memory than the image is allowed.
    #[error("layer {layer}: the index of its {size} bytes takes {source}")]
    TooMuchMemory {
        /// Digest of the layer.
        layer: Digest,
        /// Uncompressed bytes so far.
        size: u64,
        /// The limit.
        source: OverLimit,
    },
    /// A thread of the pass ended without a result.
    #[error("cannot index layer {layer}: {source}")]
    Task {
        /// Digest of the layer.
        layer: Digest,
        /// Why it ended.
        source: TaskError,
    },
}

impl FirstPassError {
    /// Whether a later pass, perhaps with more memory, can continue with the bytes that have arrived.
    pub fn is_resumable(&self) -> bool {
        !self.is_corruption() && !matches!(self, Self::DiffId { .. } | Self::Tar { .. })
    }

    /// Whether the bytes were wrong, so that another fetch may bring the right ones.
    pub fn is_corruption(&self) -> bool {
        match self {
            Self::Decode {
                source: IndexError::ZstdMemory { .. } | IndexError::ZstdWindow { .. },
                ..
            } => false,
            Self::BlobDigest { .. } | Self::Decode { .. } | Self::Blob(BlobError::Corrupt { .. }) => true,
            Self::Tar { verified, .. } => !verified,
            // A diffID is compared only after the blob has passed its check.
            Self::DiffId { .. } | Self::Blob(_) | Self::TooMuchMemory { .. } | Self::Task { .. } => false,
        }
    }
}
