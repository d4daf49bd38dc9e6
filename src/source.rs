//! Opens the source of an image's blobs by the image's name: a registry, an OCI layout, or an archive.

use std::sync::Arc;

use crate::archive::DockerArchive;
use crate::blob::{BlobError, ImageSource};
use crate::layout::OciLayout;
use crate::oci::{Digest, ImageRef};
use crate::registry::{RegistryClient, RegistryConfig};

/// The source of an image's blobs, and what the image's name says about it.
#[derive(Debug, Clone)]
pub struct NamedSource {
    /// The source.
    pub source: Arc<dyn ImageSource>,
    /// The digest in the name. The image must have this digest, whatever the source says.
    pub pinned: Option<Digest>,
    /// Whether the image is in a local file or directory. Such a source is asked at every opening, because it answers
    /// at once and its names may mean something else each time.
    pub is_local: bool,
}

/// Opens the source that `image` names. Reads local files, but sends no request to a registry yet.
pub async fn open(image: &ImageRef, registry: RegistryConfig) -> Result<NamedSource, BlobError> {
    open_with(image, || RegistryClient::new(registry)).await
}

/// Opens the source that `image` names, with the client that `client` returns if the image is in a registry.
pub async fn open_with(
    image: &ImageRef,
    client: impl FnOnce() -> Result<RegistryClient, BlobError>,
) -> Result<NamedSource, BlobError> {
    let (source, pinned): (Arc<dyn ImageSource>, _) = match image {
        ImageRef::Registry(reference) => {
            let source = client()?.source(&reference.registry, &reference.repository, reference.selector())?;
            (Arc::new(source), reference.digest.clone())
        }
        ImageRef::Layout { dir, image } => (Arc::new(OciLayout::open(dir, image.as_deref()).await?), None),
        ImageRef::LayoutArchive { file, image } => {
            (Arc::new(OciLayout::open_archive(file, image.as_deref()).await?), None)
        }
        ImageRef::Archive { file, image } => (Arc::new(DockerArchive::open(file, image.as_deref()).await?), None),
    };
    Ok(NamedSource {
        source,
        pinned,
        is_local: !matches!(image, ImageRef::Registry(_)),
    })
}
