//! Where bytes come from: the traits that every image source implements, and the error type that they share.
//!
//! An [`ImageSource`] answers for one image reference in one place (a registry, an OCI layout directory, a docker
//! archive). It hands out verified documents and [`BlobSource`]s. This module does not know HTTP, tar or the store.
//!
//! Invariants:
//! - The bytes of a document always hash to its digest.
//! - The bytes of a blob are *not* verified here, because a range cannot be. The span index verifies them.

pub mod file;
mod link;
mod retries;
pub(crate) mod retry;

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;

pub use link::{Link, LinkId, Pace};
pub use retries::Retries;
pub(crate) use retries::RetryCounter;

use crate::oci::{Descriptor, Digest};

/// Bytes of a blob in order. The stream ends after the last requested byte, or with the first error.
pub type ByteStream = BoxStream<'static, Result<Bytes, BlobError>>;

/// A manifest, image index or config as received: raw bytes that hash to `digest`.
#[derive(Debug, Clone)]
pub struct Document {
    /// Media type as declared by the source, without parameters. It may be empty or wrong, so look at the body as
    /// well.
    pub media_type: String,
    /// Digest of `bytes`, checked.
    pub digest: Digest,
    /// The exact bytes.
    pub bytes: Bytes,
}

/// One image reference in one place.
#[async_trait]
pub trait ImageSource: Send + Sync + Debug {
    /// Returns the document that the reference names: an image index or a manifest.
    async fn root(&self) -> Result<Document, BlobError>;

    /// Returns a manifest or image index below the root, by descriptor. It is verified and has at most 16 MiB.
    async fn manifest(&self, descriptor: &Descriptor) -> Result<Document, BlobError>;

    /// Returns a small blob (an image config) as a whole. It is verified and has at most 16 MiB.
    async fn config(&self, descriptor: &Descriptor) -> Result<Document, BlobError>;

    /// Returns a handle on a blob. The call is cheap, and uses the network only if it must.
    async fn blob(&self, descriptor: &Descriptor) -> Result<Arc<dyn BlobSource>, BlobError>;

    /// Returns the reference as a person would write it, without secrets.
    fn describe(&self) -> String;

    /// Returns a name that this image has in common with its other versions.
    fn repository(&self) -> String {
        self.describe()
    }
}

/// Content-addressed bytes that can be read by range.
#[async_trait]
pub trait BlobSource: Send + Sync + Debug {
    /// Returns the digest of the whole blob, as claimed by the descriptor.
    fn digest(&self) -> &Digest;

    /// Returns the size in bytes, as claimed by the descriptor.
    fn size(&self) -> u64;

    /// Opens a stream of exactly the bytes `range` (half-open, within the blob).
    ///
    /// The stream resumes by itself after transient failures. It yields one error when it gives up. An empty range is
    /// an empty stream.
    async fn read(&self, range: Range<u64>) -> Result<ByteStream, BlobError>;

    /// Opens a stream like [`BlobSource::read`], over connections of its own where the source has connections. Those
    /// of other reads may hang.
    async fn read_apart(&self, range: Range<u64>) -> Result<ByteStream, BlobError> {
        self.read(range).await
    }

    /// Takes the verdict of a reader that compared bytes of this blob with a digest. From then on, the source reads
    /// those responses in another way that did not say clearly what they contained.
    ///
    /// Returns whether the next bytes come from another place than the wrong ones. Nothing is wrong with that place so far.
    fn judged(&self, _verdict: Verdict) -> bool {
        false
    }

    /// Returns what is known about the link to the bytes.
    fn link(&self) -> Link {
        Link::LOCAL
    }

    /// Returns how often requests for the blob were repeated.
    fn retries(&self) -> Retries {
        Retries::default()
    }
}

/// What a reader found out about bytes of a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The bytes were not the blob's.
    Wrong,
    /// The bytes of parts were not the blob's, but those of the whole blob were.
    OnlyPartsAreWrong,
}

/// Why bytes cannot be read. Each variant says what a user can do about it. [`BlobError::is_transient`] says whether
/// a retry can help.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum BlobError {
    /// Status 401 after all credentials were tried.
    #[error("{host} wants a login for {what}: {tried}")]
    Unauthorized {
        /// Registry host.
        host: String,
        /// What was requested (repository, blob).
        what: String,
        /// Which credential sources were tried, and what the server said.
        tried: String,
    },
    /// Status 403: the user is known but not allowed.
    #[error("{host} denies access to {what}: {message}")]
    Denied {
        /// Registry host.
        host: String,
        /// What was requested.
        what: String,
        /// The server's message, and which credentials were used.
        message: String,
    },
    /// The requested document or blob is not there.
    #[error("{what} not found{}", hint.as_deref().map(|h| format!(": {h}")).unwrap_or_default())]
    NotFound {
        /// What was requested, and where.
        what: String,
        /// What exists instead, or what to try.
        hint: Option<String>,
    },
    /// Status 429 until the retries ended.
    #[error("{host} limits the rate of requests{}", after.map(|a| format!(", try again in {}s", a.as_secs())).unwrap_or_default())]
    RateLimited {
        /// Registry host.
        host: String,
        /// `Retry-After`, if the server sent it.
        after: Option<Duration>,
    },
    /// The server cannot serve ranges, and the caller needs them.
    #[error("{host} does not serve byte ranges of {what}")]
    RangeUnsupported {
        /// Registry host.
        host: String,
        /// What was requested.
        what: String,
    },
    /// Bytes that do not hash to their digest, or have the wrong length.
    #[error("{what} is corrupt: expected {expected}, got {actual}")]
    Corrupt {
        /// What was received.
        what: String,
        /// Digest or size promised.
        expected: String,
        /// Digest or size received.
        actual: String,
    },
    /// No response within the deadline.
    #[error("{what} did not answer within {seconds}s")]
    Timeout {
        /// Host or blob.
        what: String,
        /// The deadline that passed.
        seconds: u64,
    },
    /// No connection (DNS, routing, refused, reset).
    #[error("cannot reach {host}: {reason}")]
    Unreachable {
        /// Registry host.
        host: String,
        /// The innermost cause.
        reason: String,
    },
    /// TLS handshake or certificate trouble.
    #[error("TLS with {host} failed: {reason}")]
    Tls {
        /// Registry host.
        host: String,
        /// The innermost cause.
        reason: String,
    },
    /// The server broke the protocol, or answered with an unexpected status.
    #[error("{host} answered unexpectedly to {what}: {detail}")]
    Protocol {
        /// Host or file.
        host: String,
        /// What was requested.
        what: String,
        /// What the server sent.
        detail: String,
        /// Whether the status class suggests a retry (5xx).
        transient: bool,
    },
    /// The document is no image ocifs can mount (schema 1, encrypted, Windows, artifact).
    #[error("{what} cannot be mounted: {reason}")]
    Unsupported {
        /// The document or blob.
        what: String,
        /// Why, and what to do.
        reason: String,
    },
    /// A document that does not parse or contradicts itself.
    #[error("{what} is not valid: {reason}")]
    Invalid {
        /// The document.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Local I/O (layouts and archives).
    #[error("{path}: {source}")]
    Io {
        /// File or directory.
        path: String,
        /// The system's answer.
        source: Arc<std::io::Error>,
    },
}

impl BlobError {
    /// Returns whether a later retry can succeed.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::RateLimited { .. } | Self::Timeout { .. } | Self::Unreachable { .. } => true,
            Self::Protocol { transient, .. } => *transient,
            Self::Unauthorized { .. }
            | Self::Denied { .. }
            | Self::NotFound { .. }
            | Self::RangeUnsupported { .. }
            | Self::Corrupt { .. }
            | Self::Tls { .. }
            | Self::Unsupported { .. }
            | Self::Invalid { .. }
            | Self::Io { .. } => false,
        }
    }

    /// Wraps a local I/O error with its path.
    pub fn io(path: impl AsRef<std::path::Path>, source: std::io::Error) -> Self {
        Self::Io {
            path: path.as_ref().display().to_string(),
            source: Arc::new(source),
        }
    }
}
