//! Why a table that a layer carries is not used.

use crate::memory::OverLimit;
use crate::oci::Digest;
use crate::toc::TocError;

/// Why a table that a layer carries is not used. The layer is streamed then.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CarriedError {
    /// The layer has no table that could be used.
    #[error("the layer's own table of contents cannot be used: {reason}")]
    Unusable {
        /// Why.
        reason: &'static str,
    },
    /// The table says too little of an entry, or something that cannot be so.
    #[error("the layer's own table of contents cannot be used: entry {entry} {reason}")]
    Entry {
        /// Name of the entry.
        entry: String,
        /// What is the matter with it.
        reason: &'static str,
    },
    /// The bytes are not those for which the manifest vouches.
    #[error("the layer's own table of contents is not the one that the manifest names: {actual} instead of {expected}")]
    Digest {
        /// The digest in the manifest.
        expected: Digest,
        /// The digest of the bytes.
        actual: Digest,
    },
    /// The bytes match their digest but are no table.
    #[error("the layer's own table of contents cannot be read: {reason}")]
    Malformed {
        /// What is wrong.
        reason: String,
    },
    /// The table takes more memory than is allowed.
    #[error("the layer's own table of contents takes {0}")]
    TooMuchMemory(#[from] OverLimit),
    /// An entry that no tar could have either.
    #[error("the layer's own table of contents cannot be used: {0}")]
    Toc(#[from] TocError),
}

impl CarriedError {
    /// Whether something is broken. Otherwise the table just cannot be used.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Digest { .. } | Self::Malformed { .. } => true,
            Self::Unusable { .. } | Self::Entry { .. } | Self::TooMuchMemory(_) | Self::Toc(_) => false,
        }
    }
}
