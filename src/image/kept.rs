//! An image source in front of which the store remembers documents.

use std::sync::Arc;

use async_trait::async_trait;

use crate::blob::{BlobError, BlobSource, Document, ImageSource};
use crate::oci::{Descriptor, Digest};
use crate::store::Store;

/// Answers for manifests and configs from the store where it can, and keeps those it had to ask for.
#[derive(Debug)]
pub struct KeptSource {
    inner: Arc<dyn ImageSource>,
    store: Store,
    /// Digest in the reference itself; then the root document needs no network either.
    pinned: Option<Digest>,
    /// Whether the inner source is not asked for documents.
    offline: bool,
}

impl KeptSource {
    /// Puts the store in front of `inner`, whose reference carries the digest `pinned`, if any.
    pub fn new(inner: Arc<dyn ImageSource>, store: Store, pinned: Option<Digest>) -> Self {
        Self {
            inner,
            store,
            pinned,
            offline: false,
        }
    }

    /// The image as `inner` named it the last time, with the documents that the store has and no others.
    pub fn recalled(inner: Arc<dyn ImageSource>, store: Store) -> Option<Self> {
        let root = store.root_document(&inner.describe())?;
        Some(Self {
            inner,
            store,
            pinned: Some(root),
            offline: true,
        })
    }

    fn ask(&self) -> Result<&dyn ImageSource, BlobError> {
        if self.offline {
            return Err(BlobError::NotFound {
                what: self.describe(),
                hint: None,
            });
        }
        Ok(&*self.inner)
    }

    fn recall(&self, digest: &Digest) -> Option<Document> {
        match self.store.document(digest) {
            Ok(bytes) => Some(Document {
                media_type: String::new(),
                digest: digest.clone(),
                bytes: bytes?,
            }),
            Err(error) => {
                tracing::warn!(%digest, %error, "cannot read a stored document");
                None
            }
        }
    }

    fn keep(&self, document: Document) -> Document {
        match self.store.put_document(&document.digest, &document.bytes) {
            Ok(()) => {}
            Err(error) if error.is_by_design() => {}
            Err(error) => tracing::warn!(digest = %document.digest, %error, "cannot keep a document"),
        }
        document
    }
}

#[async_trait]
impl ImageSource for KeptSource {
    async fn root(&self) -> Result<Document, BlobError> {
        if let Some(document) = self.pinned.as_ref().and_then(|digest| self.recall(digest)) {
            return Ok(document);
        }
        let document = self.ask()?.root().await.map(|d| self.keep(d))?;
        match self.store.set_root_document(&self.inner.describe(), &document.digest) {
            Ok(()) => {}
            Err(error) if error.is_by_design() => {}
            Err(error) => tracing::warn!(%error, "cannot keep what the image's name means"),
        }
        Ok(document)
    }

    async fn manifest(&self, descriptor: &Descriptor) -> Result<Document, BlobError> {
        if let Some(document) = self.recall(&descriptor.digest) {
            return Ok(document);
        }
        self.ask()?.manifest(descriptor).await.map(|d| self.keep(d))
    }

    async fn config(&self, descriptor: &Descriptor) -> Result<Document, BlobError> {
        if let Some(document) = self.recall(&descriptor.digest) {
            return Ok(document);
        }
        self.ask()?.config(descriptor).await.map(|d| self.keep(d))
    }

    async fn blob(&self, descriptor: &Descriptor) -> Result<Arc<dyn BlobSource>, BlobError> {
        self.inner.blob(descriptor).await
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }

    fn repository(&self) -> String {
        self.inner.repository()
    }
}
