//! How a reference picks one document of a repository.

use std::fmt;

use super::Digest;

/// A tag, a digest, or a tag pinned to a digest.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ReferenceSelector {
    /// A tag. If there is a digest, the digest decides, and the tag is information for people.
    Tag {
        /// The tag.
        tag: String,
        /// The digest it is pinned to.
        digest: Option<Digest>,
    },
    /// A digest alone.
    Digest(Digest),
}

impl ReferenceSelector {
    /// Selects by tag.
    pub fn tag(tag: impl Into<String>) -> Self {
        Self::Tag {
            tag: tag.into(),
            digest: None,
        }
    }

    /// Selects by digest and keeps the tag for people.
    pub fn tag_with_digest(tag: impl Into<String>, digest: Digest) -> Self {
        Self::Tag {
            tag: tag.into(),
            digest: Some(digest),
        }
    }

    /// Selects by digest.
    pub fn digest(digest: Digest) -> Self {
        Self::Digest(digest)
    }
}

impl From<Digest> for ReferenceSelector {
    fn from(digest: Digest) -> Self {
        Self::Digest(digest)
    }
}

impl From<&Digest> for ReferenceSelector {
    fn from(digest: &Digest) -> Self {
        Self::Digest(digest.clone())
    }
}

impl fmt::Display for ReferenceSelector {
    /// The suffix of a reference: `:tag`, `:tag@digest` or `@digest`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tag { tag, digest: None } => write!(f, ":{tag}"),
            Self::Tag {
                tag,
                digest: Some(digest),
            } => write!(f, ":{tag}@{digest}"),
            Self::Digest(digest) => write!(f, "@{digest}"),
        }
    }
}
