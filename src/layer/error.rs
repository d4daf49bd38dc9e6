//! What can go wrong with a read of a layer.

use std::sync::Arc;

use crate::blob::BlobError;
use crate::index::IndexError;
use crate::oci::Digest;
use crate::task::TaskError;

/// Why bytes of a layer cannot be read. All readers of a flight share the error.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum LayerError {
    /// The blob's source gave up.
    #[error("layer {layer}: {source}")]
    Blob {
        /// Digest of the layer.
        layer: Digest,
        /// The error of the source.
        source: BlobError,
    },
    /// Every time the bytes are fetched, they do not decode, or do not decode to what the index says.
    #[error("layer {layer}, span {span}: {source}")]
    Corrupt {
        /// Digest of the layer.
        layer: Digest,
        /// The span that failed.
        span: u32,
        /// What is wrong with the bytes.
        source: Arc<IndexError>,
    },
    /// The task that fetches the bytes ended without a result.
    #[error("layer {layer}: {source}")]
    Task {
        /// Digest of the layer.
        layer: Digest,
        /// Why the task ended.
        source: TaskError,
    },
    /// The process is shutting down.
    #[error("layer {layer}: unmounting")]
    Closed {
        /// Digest of the layer.
        layer: Digest,
    },
}
