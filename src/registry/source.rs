//! One image reference in a registry, as an [`ImageSource`].

use std::sync::Arc;

use async_trait::async_trait;

use super::blob::{ReadKind, RegistryBlob};
use super::client::RegistryClient;
use super::documents::MAX_CONFIG;
use super::elsewhere::Elsewhere;
use super::places::Places;
use crate::blob::{BlobError, BlobSource, Document, ImageSource};
use crate::oci::{Descriptor, ReferenceSelector};

/// An image in a registry. Cheap to clone. All sources of a client share its connections and tokens.
#[derive(Debug, Clone)]
pub struct RegistrySource {
    client: RegistryClient,
    places: Arc<Places>,
    selector: ReferenceSelector,
}

impl RegistrySource {
    pub(super) fn new(client: RegistryClient, places: Places, selector: ReferenceSelector) -> Result<Self, BlobError> {
        // Reports a malformed tag before any request is sent.
        places.origin().manifest_url(&selector)?;
        Ok(Self {
            client,
            places: Arc::new(places),
            selector,
        })
    }

    /// Returns a blob as a [`RegistryBlob`], which has counters besides the methods of [`BlobSource`].
    pub fn registry_blob(&self, descriptor: &Descriptor) -> Result<RegistryBlob, BlobError> {
        let size = u64::try_from(descriptor.size).map_err(|_| BlobError::Invalid {
            what: format!("the descriptor of {} in {}", descriptor.digest, self.describe()),
            reason: format!("its size is {}", descriptor.size),
        })?;
        let kind = &descriptor.media_type;
        let is_compressed = kind.ends_with("gzip") || kind.ends_with("zstd");
        Ok(RegistryBlob::new(
            self.client.clone(),
            Arc::clone(&self.places),
            descriptor.digest.clone(),
            size,
            descriptor.embedded().map(Into::into),
            ReadKind::Layer { is_compressed },
            Elsewhere::of(descriptor, &self.client.transport().config().foreign_layer_hosts),
        ))
    }
}

#[async_trait]
impl ImageSource for RegistrySource {
    async fn root(&self) -> Result<Document, BlobError> {
        self.client.manifest(&self.places, &self.selector).await
    }

    async fn manifest(&self, descriptor: &Descriptor) -> Result<Document, BlobError> {
        if let Some(document) = inline_document(descriptor) {
            return Ok(document);
        }
        let selector = ReferenceSelector::Digest(descriptor.digest.clone());
        self.client.manifest(&self.places, &selector).await
    }

    async fn config(&self, descriptor: &Descriptor) -> Result<Document, BlobError> {
        if let Some(document) = inline_document(descriptor) {
            return Ok(document);
        }
        if descriptor.size > MAX_CONFIG as i64 {
            return Err(BlobError::Unsupported {
                what: format!("the config of {}", self.describe()),
                reason: format!("its {} bytes are more than the {MAX_CONFIG} allowed", descriptor.size),
            });
        }
        self.client.small_blob(&self.places, &descriptor.digest).await
    }

    async fn blob(&self, descriptor: &Descriptor) -> Result<Arc<dyn BlobSource>, BlobError> {
        Ok(Arc::new(self.registry_blob(descriptor)?))
    }

    fn describe(&self) -> String {
        format!("{}{}", self.places.name(), self.selector)
    }

    fn repository(&self) -> String {
        self.places.name().to_owned()
    }
}

fn inline_document(descriptor: &Descriptor) -> Option<Document> {
    Some(Document {
        media_type: descriptor.media_type.clone(),
        digest: descriptor.digest.clone(),
        bytes: descriptor.embedded()?.into(),
    })
}

impl RegistryClient {
    /// Returns the image `selector` of a repository. `registry` is a host as in references, such as `docker.io` or
    /// `localhost:5000`.
    pub fn source(
        &self,
        registry: &str,
        repository: &str,
        selector: ReferenceSelector,
    ) -> Result<RegistrySource, BlobError> {
        let by_digest = !matches!(selector, ReferenceSelector::Tag { digest: None, .. });
        RegistrySource::new(self.clone(), self.places(registry, repository, by_digest)?, selector)
    }
}
