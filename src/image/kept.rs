//! An image source that keeps documents in the store and answers from there.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::blob::{BlobError, BlobSource, Document, ImageSource};
use crate::oci::{Descriptor, Digest, DocumentError, DocumentKind, ImageIndex, Manifest, classify};
use crate::store::Store;

/// How long the registry is asked what a tag means if the store knows an earlier answer. A healthy registry takes a
/// few round trips. A smaller value uses an old image more often; a larger one delays the mount when the registry
/// hangs.
const PATIENCE: Duration = Duration::from_secs(10);

/// When to ask the registry what a tag means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Confirm {
    /// At each opening. If the registry cannot be reached, the tag means what it meant the last time.
    #[default]
    IfReachable,
    /// At each opening. Without an answer the image cannot be opened.
    Always,
    /// Only if the store does not know the tag.
    IfUnknown,
    /// Never. A name or document that the store does not have is not found.
    Never,
}

/// A tag was resolved to what it meant the last time, without its registry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unconfirmed {
    /// When the registry last said what the tag means (RFC 3339), if that is known.
    pub since: Option<String>,
    /// Why the registry gave no answer; `None` if it was not to be asked.
    pub reason: Option<String>,
}

/// Answers for manifests and configs from the store if it has them. Otherwise asks `inner` and keeps the answer.
#[derive(Debug)]
pub struct KeptSource {
    inner: Arc<dyn ImageSource>,
    store: Store,
    /// Digest in the reference itself. With it the root document needs no network either.
    pinned: Option<Digest>,
    confirm: Confirm,
    unconfirmed: OnceLock<Unconfirmed>,
}

impl KeptSource {
    /// Puts the store in front of `inner`. `pinned` is the digest in the reference of `inner`, if it has one.
    pub fn new(inner: Arc<dyn ImageSource>, store: Store, pinned: Option<Digest>, confirm: Confirm) -> Self {
        Self {
            inner,
            store,
            pinned,
            confirm,
            unconfirmed: OnceLock::new(),
        }
    }

    /// The image that `inner` named the last time, from the documents in the store alone. `None` if the store does
    /// not know the name.
    pub fn recalled(inner: Arc<dyn ImageSource>, store: Store) -> Option<Self> {
        let root = store.root_document(&inner.describe())?;
        Some(Self::new(inner, store, Some(root), Confirm::Never))
    }

    /// How a tag was resolved without its registry, if it was. Known once the root document has been requested.
    pub fn unconfirmed(&self) -> Option<&Unconfirmed> {
        self.unconfirmed.get()
    }

    fn ask(&self) -> Result<&dyn ImageSource, BlobError> {
        if self.confirm == Confirm::Never {
            return Err(BlobError::NotFound {
                what: self.describe(),
                hint: Some("it is not in the store, and the registry is not to be asked".to_owned()),
            });
        }
        Ok(&*self.inner)
    }

    /// The document that the name meant the last time.
    fn remembered(&self) -> Option<Document> {
        self.recall(&self.store.root_document(&self.inner.describe())?)
    }

    /// Uses the document that the name meant the last time, and records why.
    fn fall_back(&self, remembered: Document, reason: Option<&BlobError>) -> Document {
        let since = self.store.root_document_age(&self.inner.describe());
        let since = since.and_then(|age| SystemTime::now().checked_sub(age));
        // If a value is set already, an earlier request to this source had the same result.
        let _ = self.unconfirmed.set(Unconfirmed {
            since: since.map(|since| humantime::format_rfc3339_seconds(since).to_string()),
            reason: reason.map(ToString::to_string),
        });
        remembered
    }

    /// Asks the source for the root document, and keeps it as the meaning of the name.
    async fn confirmed(&self) -> Result<Document, BlobError> {
        let document = self.ask()?.root().await?;
        if let Err(error) = understood(&document) {
            // A proxy between this host and the registry may have answered instead of the registry.
            return Err(BlobError::Protocol {
                host: self.describe(),
                what: "the image".to_owned(),
                detail: format!("the answer is no manifest or image index: {error}"),
                transient: true,
            });
        }
        let document = self.keep(document);
        match self.store.set_root_document(&self.inner.describe(), &document.digest) {
            Ok(()) => {}
            Err(error) if error.is_by_design() => {}
            Err(error) => tracing::warn!(%error, "cannot keep what the image's name means"),
        }
        Ok(document)
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

/// Whether a name can mean this document. The image may still be one that cannot be mounted.
fn understood(document: &Document) -> Result<(), DocumentError> {
    match classify(&document.media_type, &document.bytes)? {
        DocumentKind::Manifest => Manifest::parse(&document.bytes).map(drop),
        DocumentKind::ImageIndex => ImageIndex::parse(&document.bytes).map(drop),
    }
}

#[async_trait]
impl ImageSource for KeptSource {
    async fn root(&self) -> Result<Document, BlobError> {
        if let Some(document) = self.pinned.as_ref().and_then(|digest| self.recall(digest)) {
            return Ok(document);
        }
        let remembered = match self.confirm {
            Confirm::Always => None,
            Confirm::IfReachable | Confirm::IfUnknown | Confirm::Never => self.remembered(),
        };
        let Some(remembered) = remembered else {
            return self.confirmed().await;
        };
        if self.confirm != Confirm::IfReachable {
            return Ok(self.fall_back(remembered, None));
        }
        let asked = tokio::time::timeout(PATIENCE, self.confirmed()).await;
        let asked = asked.unwrap_or_else(|_| {
            Err(BlobError::Timeout {
                what: self.describe(),
                seconds: PATIENCE.as_secs(),
            })
        });
        match asked {
            Err(error) if error.is_transient() => Ok(self.fall_back(remembered, Some(&error))),
            asked => asked,
        }
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
