//! An image source that asks for the indexes of an image's layers while the config is on its way.
//!
//! The manifest names the layers, so the indexes can be asked for as soon as the manifest is known. The config comes at
//! the same time, so an index costs hardly a round trip.

use std::sync::{Arc, Mutex};

use async_trait::async_trait;

use super::indexed::{carried, known_index};
use crate::blob::{BlobError, BlobSource, Document, ImageSource};
use crate::layer::LayerContext;
use crate::oci::{Descriptor, Digest, Manifest};
use crate::profile::Label;
use crate::published::Lookups;
use crate::store::Store;

/// Asks the locations of a context for what an image needs. Passes everything else on.
#[derive(Debug)]
pub(super) struct Expecting {
    inner: Arc<dyn ImageSource>,
    context: LayerContext,
    label: Option<Label>,
    /// The documents that came last, which may be manifests.
    documents: Mutex<Vec<Document>>,
    asked: Mutex<Option<(Digest, Lookups)>>,
}

impl Expecting {
    /// Puts the questions in front of `inner`. With a label, asks for the profile with that label too.
    pub(super) fn new(inner: Arc<dyn ImageSource>, context: LayerContext, label: Option<Label>) -> Self {
        Self {
            inner,
            context,
            label,
            documents: Mutex::default(),
            asked: Mutex::default(),
        }
    }

    /// Returns what was asked for about the image with this manifest.
    pub(super) fn lookups(&self, manifest: &Digest) -> Lookups {
        let asked = self.asked.lock().expect("no panic while locked").take();
        match asked {
            Some((of, lookups)) if of == *manifest => lookups,
            _ => Lookups::default(),
        }
    }

    fn came(&self, document: &Document) {
        let mut documents = self.documents.lock().expect("no panic while locked");
        documents.push(document.clone());
    }

    /// Asks about the image whose config this is.
    fn ask(&self, config: &Descriptor) {
        let documents = std::mem::take(&mut *self.documents.lock().expect("no panic while locked"));
        let manifests = documents.iter().filter_map(|document| {
            let manifest = Manifest::parse(&document.bytes).ok()?;
            (manifest.config.digest == config.digest).then_some((&document.digest, manifest))
        });
        let Some((digest, manifest)) = manifests.last() else {
            return;
        };
        let store = &self.context.store;
        // A layer that carries a table needs no index of somebody else.
        let without_table = manifest.layers.iter().filter(|layer| carried(layer).is_none());
        let unknown = without_table.filter(|layer| {
            let authorities = self.context.authorities();
            known_index(store, &layer.digest, &authorities).is_none()
        });
        let mut layers: Vec<(Digest, u64)> = unknown
            .filter_map(|layer| Some((layer.digest.clone(), u64::try_from(layer.size).ok()?)))
            .collect();
        layers.sort_by(|a, b| a.0.cmp(&b.0));
        layers.dedup();
        let label = self.label.as_ref().filter(|label| !has_profile(store, digest, label));
        let lookups = self.context.locations.ask(digest, layers, label);
        *self.asked.lock().expect("no panic while locked") = Some((digest.clone(), lookups));
    }
}

/// Whether the store has a profile of its own.
fn has_profile(store: &Store, manifest: &Digest, label: &Label) -> bool {
    store
        .profile(manifest, label.as_str())
        .is_some_and(|path| path.exists())
}

#[async_trait]
impl ImageSource for Expecting {
    async fn root(&self) -> Result<Document, BlobError> {
        let document = self.inner.root().await?;
        self.came(&document);
        Ok(document)
    }

    async fn manifest(&self, descriptor: &Descriptor) -> Result<Document, BlobError> {
        let document = self.inner.manifest(descriptor).await?;
        self.came(&document);
        Ok(document)
    }

    async fn config(&self, descriptor: &Descriptor) -> Result<Document, BlobError> {
        self.ask(descriptor);
        self.inner.config(descriptor).await
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
