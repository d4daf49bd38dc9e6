//! How published files are named.

use std::fmt;

use crate::oci::Digest;
use crate::profile::Label;

/// The name of a published file. The same in every place.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum FileName {
    /// The index of a layer.
    Index {
        /// Digest of the layer's blob.
        layer: Digest,
    },
    /// What the start of an image's program reads.
    Profile {
        /// Digest of the image's manifest.
        manifest: Digest,
        /// Which program.
        label: Label,
    },
}

impl FileName {
    /// Returns the name of the file with the signature.
    pub fn signature(&self) -> String {
        format!("{self}.minisig")
    }

    /// Returns the tag in a repository under which a file is listed that belongs to this layer or manifest.
    pub(super) fn tag(digest: &Digest) -> String {
        format!("ocifs1-{}-{}", digest.algorithm().name(), digest.hex())
    }
}

impl fmt::Display for FileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digest = |digest: &Digest| format!("{}-{}", digest.algorithm().name(), digest.hex());
        match self {
            Self::Index { layer } => write!(f, "{}.ocifs", digest(layer)),
            Self::Profile { manifest, label } => write!(f, "{}.{label}.profile", digest(manifest)),
        }
    }
}

impl FileName {
    /// Reads the name of a profile of the image with this manifest. None if it is no such name.
    pub fn profile_of(manifest: &Digest, name: &str) -> Option<Self> {
        let rest = name.strip_prefix(&format!("{}-{}.", manifest.algorithm().name(), manifest.hex()))?;
        Some(Self::Profile {
            manifest: manifest.clone(),
            label: rest.strip_suffix(".profile")?.parse().ok()?,
        })
    }
}
