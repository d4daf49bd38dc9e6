//! Which images can be read lazily: those whose manifest and config ocifs gets from their registry.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use lru::LruCache;

use super::layer::LayerQuestion;
use crate::blob::BlobError;
use crate::image::{Confirm, NamedImage};
use crate::oci::{DiffId, Digest, ImageRef};
use crate::registry::RegistryConfig;
use crate::source;
use crate::store::Store;

/// Images whose layers are remembered while containerd asks for one after the other. With fewer, documents are read from
/// the store again; more only take memory.
const REMEMBERED: std::num::NonZeroUsize = std::num::NonZeroUsize::new(64).expect("64 is not zero");
/// How long an image that could not be opened is left to containerd without another attempt. In a shorter time a pull of
/// many layers would wait again and again; a longer one keeps images from being lazy after their registry has recovered.
const LEFT_ALONE: Duration = Duration::from_secs(60);

/// What is known of an image.
#[derive(Debug, Clone)]
enum Knowledge {
    Lazy(Arc<[DiffId]>),
    /// Not before this time.
    NotUntil(Instant),
}

/// Finds out which images can be read lazily.
#[derive(Debug)]
pub struct LazyImages {
    registry: RegistryConfig,
    store: Store,
    known: Mutex<LruCache<Digest, Knowledge>>,
}

impl LazyImages {
    /// Asks registries with this configuration, and keeps documents in `store`.
    pub fn new(registry: RegistryConfig, store: Store) -> Self {
        Self {
            registry,
            store,
            known: Mutex::new(LruCache::new(REMEMBERED)),
        }
    }

    /// Returns the diffIDs of the image's layers, the lowest first. Returns `None` if the image cannot be read lazily,
    /// which the log explains.
    pub async fn diff_ids(&self, question: &LayerQuestion) -> Option<Arc<[DiffId]>> {
        let known = self.known().get(&question.manifest).cloned();
        match known {
            Some(Knowledge::Lazy(diff_ids)) => return Some(diff_ids),
            Some(Knowledge::NotUntil(time)) if Instant::now() < time => return None,
            _ => {}
        }
        match self.resolve(question).await {
            Ok(diff_ids) => {
                let known = Knowledge::Lazy(diff_ids.clone());
                self.known().put(question.manifest.clone(), known);
                Some(diff_ids)
            }
            Err(error) => {
                self.give_up(question, &error);
                None
            }
        }
    }

    /// Leaves an image to containerd for a while.
    pub fn give_up(&self, question: &LayerQuestion, error: &dyn std::fmt::Display) {
        tracing::warn!(image = %question.reference, %error, "the image is not read lazily, containerd fetches it");
        let until = Knowledge::NotUntil(Instant::now() + LEFT_ALONE);
        self.known().put(question.manifest.clone(), until);
    }

    async fn resolve(&self, question: &LayerQuestion) -> Result<Arc<[DiffId]>, BlobError> {
        let image = ImageRef::Registry(question.reference.clone());
        let named = source::open(&image, self.registry.clone()).await?;
        let opening = NamedImage::new(named, None, self.store.clone(), Confirm::default())
            .resolve()
            .await?;
        Ok(opening.preparation.resolved().diff_ids().into())
    }

    fn known(&self) -> std::sync::MutexGuard<'_, LruCache<Digest, Knowledge>> {
        self.known.lock().expect("no panic while locked")
    }
}
