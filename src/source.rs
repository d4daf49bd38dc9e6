//! From the name of an image to where its blobs come from: a registry, an OCI layout, or an archive.

use std::sync::Arc;

use crate::archive::DockerArchive;
use crate::blob::{BlobError, ImageSource};
use crate::layout::OciLayout;
use crate::oci::{Digest, ImageRef};
use crate::registry::{RegistryClient, RegistryConfig};

/// Where an image's blobs come from, and what its name says of it.
#[derive(Debug, Clone)]
pub struct NamedSource {
    /// The source.
    pub source: Arc<dyn ImageSource>,
    /// The digest in the name: what the image is, whatever the source says.
    pub pinned: Option<Digest>,
    /// Whether the source is the only copy of what it has: a file, of which nobody else can be asked.
    pub is_local: bool,
}

/// Opens the source that `image` names. A registry is not contacted yet; files are read.
pub async fn open(image: &ImageRef, registry: RegistryConfig) -> Result<NamedSource, BlobError> {
    let (source, pinned): (Arc<dyn ImageSource>, _) = match image {
        ImageRef::Registry(reference) => {
            let client = RegistryClient::new(registry)?;
            let source = client.source(&reference.registry, &reference.repository, reference.selector())?;
            (Arc::new(source), reference.digest.clone())
        }
        ImageRef::Layout { dir, image } => (Arc::new(OciLayout::open(dir, image.as_deref()).await?), None),
        ImageRef::Archive { file, image } => (Arc::new(DockerArchive::open(file, image.as_deref()).await?), None),
    };
    Ok(NamedSource {
        source,
        pinned,
        is_local: !matches!(image, ImageRef::Registry(_)),
    })
}
