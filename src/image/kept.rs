//! An image source in front of which the store remembers documents.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::blob::{BlobError, BlobSource, Document, ImageSource};
use crate::oci::{Descriptor, Digest, DocumentError, DocumentKind, ImageIndex, Manifest, classify};
use crate::store::Store;

/// How long a registry is asked what a tag means when the store knows an answer to fall back on. A healthy one takes a few
/// round trips.
const PATIENCE: Duration = Duration::from_secs(10);

/// When a registry is asked what a tag means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Confirm {
    /// Each time. If it cannot be reached, the tag means what it meant the last time.
    #[default]
    IfReachable,
    /// Each time, and without an answer there is no image.
    Always,
    /// Only if the store does not know the tag.
    IfUnknown,
    /// Never: what the store does not know is not found.
    Never,
}

/// A tag was taken to mean what it meant the last time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unconfirmed {
    /// When the registry last said what it means (RFC 3339), if that is known.
    pub since: Option<String>,
    /// Why the registry could not be asked; nothing if it was not to be asked.
    pub reason: Option<String>,
}

/// Answers for manifests and configs from the store where it can, and keeps those it had to ask for.
#[derive(Debug)]
pub struct KeptSource {
    inner: Arc<dyn ImageSource>,
    store: Store,
    /// Digest in the reference itself; then the root document needs no network either.
    pinned: Option<Digest>,
    confirm: Confirm,
    unconfirmed: OnceLock<Unconfirmed>,
}

impl KeptSource {
    /// Puts the store in front of `inner`, whose reference carries the digest `pinned`, if any.
    pub fn new(inner: Arc<dyn ImageSource>, store: Store, pinned: Option<Digest>, confirm: Confirm) -> Self {
        Self {
            inner,
            store,
            pinned,
            confirm,
            unconfirmed: OnceLock::new(),
        }
    }

    /// The image as `inner` named it the last time, with the documents that the store has and no others.
    pub fn recalled(inner: Arc<dyn ImageSource>, store: Store) -> Option<Self> {
        let root = store.root_document(&inner.describe())?;
        Some(Self::new(inner, store, Some(root), Confirm::Never))
    }

    /// Whether a tag was resolved without its registry; known when the root document was asked for.
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

    /// What the name meant the last time.
    fn remembered(&self) -> Option<Document> {
        self.recall(&self.store.root_document(&self.inner.describe())?)
    }

    /// Goes on with what the name meant the last time.
    fn fall_back(&self, remembered: Document, reason: Option<&BlobError>) -> Document {
        let since = self.store.root_document_age(&self.inner.describe());
        let since = since.and_then(|age| SystemTime::now().checked_sub(age));
        // Whoever asks again gets the same answer for the same reason.
        let _ = self.unconfirmed.set(Unconfirmed {
            since: since.map(|since| humantime::format_rfc3339_seconds(since).to_string()),
            reason: reason.map(ToString::to_string),
        });
        remembered
    }

    /// The root document as the source names it now.
    async fn confirmed(&self) -> Result<Document, BlobError> {
        let document = self.ask()?.root().await?;
        if let Err(error) = understood(&document) {
            // Somebody between here and the registry may have answered in its place.
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

/// Whether a document is one that a name can mean. It may still be of an image that cannot be mounted.
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
