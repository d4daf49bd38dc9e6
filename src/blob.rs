//! Where bytes come from: the traits every image source implements, and the one error type they share.
//!
//! An [`ImageSource`] answers for one image reference in one place (a registry, an OCI layout directory, a docker archive). It
//! hands out verified documents and [`BlobSource`]s. Nothing here knows HTTP, tar or the store.
//!
//! Invariants: a document's bytes always hash to its digest; a blob's bytes are *not* verified here (a range cannot be), that
//! is the work of the span index above.

pub mod file;
mod link;
pub mod retry;

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;

pub use link::{Link, LinkId, Pace};

use crate::oci::{Descriptor, Digest};

/// Bytes of a blob in order; ends after the last byte asked for, or with the first error.
pub type ByteStream = BoxStream<'static, Result<Bytes, BlobError>>;

/// A manifest, image index or config as received: raw bytes that hash to `digest`.
#[derive(Debug, Clone)]
pub struct Document {
    /// Media type as declared by the source, without parameters; may be empty or wrong, so look at the body as well.
    pub media_type: String,
    /// Digest of `bytes`, checked.
    pub digest: Digest,
    /// The exact bytes.
    pub bytes: Bytes,
}

/// One image reference in one place.
#[async_trait]
pub trait ImageSource: Send + Sync + Debug {
    /// The document the reference names: an image index or a manifest.
    async fn root(&self) -> Result<Document, BlobError>;

    /// A manifest or image index below the root, by descriptor; verified and at most 16 MiB.
    async fn manifest(&self, descriptor: &Descriptor) -> Result<Document, BlobError>;

    /// A small blob (an image config) read whole; verified and at most 16 MiB.
    async fn config(&self, descriptor: &Descriptor) -> Result<Document, BlobError>;

    /// A handle on a blob. Cheap; touches the network only if it must.
    async fn blob(&self, descriptor: &Descriptor) -> Result<Arc<dyn BlobSource>, BlobError>;

    /// The reference as a person would write it, without secrets.
    fn describe(&self) -> String;

    /// What this image has in common with its other versions.
    fn repository(&self) -> String {
        self.describe()
    }
}

/// Content-addressed bytes that can be read by range.
#[async_trait]
pub trait BlobSource: Send + Sync + Debug {
    /// Digest of the whole blob, as claimed by the descriptor.
    fn digest(&self) -> &Digest;

    /// Size in bytes, as claimed by the descriptor.
    fn size(&self) -> u64;

    /// Opens a stream of exactly the bytes `range` (half-open, within the blob).
    ///
    /// The stream resumes by itself after transient failures; it yields an error once when it gives up.
    /// An empty range is an empty stream.
    async fn read(&self, range: Range<u64>) -> Result<ByteStream, BlobError>;

    /// The same over connections of its own, where there are any: those of other reads may hang.
    async fn read_apart(&self, range: Range<u64>) -> Result<ByteStream, BlobError> {
        self.read(range).await
    }

    /// Takes the verdict of a reader who compared bytes of this blob with a digest: answers that did not say clearly what
    /// they brought are read in another way from then on.
    fn judged(&self, _verdict: Verdict) {}

    /// What is known about the way to the bytes.
    fn link(&self) -> Link {
        Link::LOCAL
    }
}

/// What a reader found out about bytes of a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// They were not the blob's.
    Wrong,
    /// Those of parts were not, and those of the whole blob were.
    OnlyPartsAreWrong,
}

/// Why bytes could not be had. Each variant says what a user can do about it; [`BlobError::is_transient`] says if trying again
/// can help.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum BlobError {
    /// 401 after all credentials were tried.
    #[error("{host} wants a login for {what}: {tried}")]
    Unauthorized {
        /// Registry host.
        host: String,
        /// What was asked for (repository, blob).
        what: String,
        /// Which credential sources were tried, and what the server said.
        tried: String,
    },
    /// 403: known but not allowed.
    #[error("{host} denies access to {what}: {message}")]
    Denied {
        /// Registry host.
        host: String,
        /// What was asked for.
        what: String,
        /// The server's message, and which credentials were used.
        message: String,
    },
    /// It is not there.
    #[error("{what} not found{}", hint.as_deref().map(|h| format!(": {h}")).unwrap_or_default())]
    NotFound {
        /// What was asked for, and where.
        what: String,
        /// What exists instead, or what to try.
        hint: Option<String>,
    },
    /// 429 to the end of the retries.
    #[error("{host} limits the rate of requests{}", after.map(|a| format!(", try again in {}s", a.as_secs())).unwrap_or_default())]
    RateLimited {
        /// Registry host.
        host: String,
        /// `Retry-After`, if the server said.
        after: Option<Duration>,
    },
    /// The server cannot serve ranges and the caller cannot do without.
    #[error("{host} does not serve byte ranges of {what}")]
    RangeUnsupported {
        /// Registry host.
        host: String,
        /// What was asked for.
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
    /// No answer in time.
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
    /// The server broke the protocol or answered an unexpected status.
    #[error("{host} answered unexpectedly to {what}: {detail}")]
    Protocol {
        /// Host or file.
        host: String,
        /// What was asked.
        what: String,
        /// What came.
        detail: String,
        /// Whether the status class suggests trying again (5xx).
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
    /// Whether trying the same again later can succeed.
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
