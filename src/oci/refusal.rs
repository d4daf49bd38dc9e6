//! Well-formed documents that are no mountable image: what they are, and what a user can do.

use super::{Digest, media_type, shown};

/// Why a well-formed document is no image that can be mounted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// Docker image manifest version 2, schema 1.
    #[error("it is a Docker schema 1 manifest, obsolete since 2017: push the image again with a current tool")]
    Schema1,
    /// A media type from before OCI 1.0.
    #[error("it uses media types from before OCI 1.0: push the image again with a current tool")]
    PreOci,
    /// A layer is encrypted.
    #[error(
        "layer {digest} is encrypted (media type `{}`): decrypt the image, for example with `skopeo copy --decryption-key`",
        shown(media_type)
    )]
    Encrypted {
        /// The layer.
        digest: Digest,
        /// Its media type.
        media_type: String,
    },
    /// Made for Windows.
    #[error(
        "it is a Windows image: only Linux root file systems can be mounted, so choose another with --platform linux/ARCH"
    )]
    Windows,
    /// A Docker engine plugin.
    #[error("it is a Docker engine plugin, not an image: install it with `docker plugin install`")]
    DockerPlugin,
    /// A nydus image, which has no ordinary layers.
    #[error("it is a nydus (RAFS) image without ordinary layers: use the original image it was converted from")]
    Nydus,
    /// Another artifact that a registry keeps.
    #[error(
        "it is {name} (`{}`), not an image: fetch it with the tool that made it, or with `oras pull`",
        shown(artifact_type)
    )]
    Artifact {
        /// What it is, for people.
        name: &'static str,
        /// The media type that says so.
        artifact_type: String,
    },
    /// A layer that cannot be a tar.
    #[error("layer {digest} is no file system layer (media type `{}`)", shown(media_type))]
    NotALayer {
        /// The layer.
        digest: Digest,
        /// Its media type.
        media_type: String,
    },
}

impl Refusal {
    pub(super) fn artifact(artifact_type: &str) -> Self {
        Self::Artifact {
            name: media_type::artifact_name(artifact_type).unwrap_or("an OCI artifact"),
            artifact_type: artifact_type.to_owned(),
        }
    }
}
