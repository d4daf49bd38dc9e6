//! An image source in front of which the store remembers documents.

use std::sync::Arc;

use async_trait::async_trait;

use crate::blob::{BlobError, BlobSource, Document, ImageSource};
use crate::oci::{Descriptor, Digest};
use crate::store::{Store, StoreError};

/// Answers for manifests and configs from the store where it can, and keeps those it had to ask for.
#[derive(Debug)]
pub struct KeptSource {
    inner: Arc<dyn ImageSource>,
    store: Store,
    /// Digest in the reference itself; then the root document needs no network either.
    pinned: Option<Digest>,
}

impl KeptSource {
    /// Puts the store in front of `inner`, whose reference carries the digest `pinned`, if any.
    pub fn new(inner: Arc<dyn ImageSource>, store: Store, pinned: Option<Digest>) -> Self {
        Self { inner, store, pinned }
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
            Ok(()) | Err(StoreError::Unavailable) => {}
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
        self.inner.root().await.map(|d| self.keep(d))
    }

    async fn manifest(&self, descriptor: &Descriptor) -> Result<Document, BlobError> {
        if let Some(document) = self.recall(&descriptor.digest) {
            return Ok(document);
        }
        self.inner.manifest(descriptor).await.map(|d| self.keep(d))
    }

    async fn config(&self, descriptor: &Descriptor) -> Result<Document, BlobError> {
        if let Some(document) = self.recall(&descriptor.digest) {
            return Ok(document);
        }
        self.inner.config(descriptor).await.map(|d| self.keep(d))
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
