//! From the name of an image to its [`Preparation`].

use std::sync::Arc;

use super::{Confirm, Early, KeptSource, Preparation, Replay, Unconfirmed};
use crate::blob::{BlobError, ImageSource};
use crate::layer::LayerContext;
use crate::oci::{Digest, Platform};
use crate::profile::Label;
use crate::resolve::resolve;
use crate::source::NamedSource;
use crate::store::Store;

/// An image as it was named, of which nothing has been asked for.
#[derive(Debug)]
pub struct NamedImage {
    source: Arc<dyn ImageSource>,
    pinned: Option<Digest>,
    platform: Option<Platform>,
    store: Store,
    confirm: Confirm,
}

/// An image whose manifest and config are known.
#[derive(Debug)]
pub struct Opening {
    /// Opens the layers and the tree.
    pub preparation: Arc<Preparation>,
    /// A replay of the profile that has begun already.
    pub replay: Option<Replay>,
    /// If the image's tag was resolved without its registry: since when, and why.
    pub unconfirmed: Option<Unconfirmed>,
}

impl NamedImage {
    /// The image that `named` has for this platform (none: this machine's). Documents are kept in `store` and taken from there;
    /// `confirm` says when a registry is asked what a tag means.
    pub fn new(named: NamedSource, platform: Option<Platform>, store: Store, confirm: Confirm) -> Self {
        Self {
            source: named.source,
            pinned: named.pinned,
            platform,
            store,
            confirm: if named.is_local { Confirm::Always } else { confirm },
        }
    }

    /// Finds out manifest and config.
    pub async fn resolve(&self) -> Result<Opening, BlobError> {
        let (source, store) = (self.source.clone(), self.store.clone());
        let source = KeptSource::new(source, store, self.pinned.clone(), self.confirm);
        let (preparation, unconfirmed) = self.prepare(Arc::new(source)).await?;
        Ok(Opening {
            preparation: Arc::new(preparation),
            replay: None,
            unconfirmed,
        })
    }

    /// The same for an image that is going to be read. If the store knows what the name meant the last time, that image is opened
    /// while the source is asked, and the profile with this label is replayed, if one is given (see [`Early`]). To be called
    /// on the runtime.
    pub async fn open(&self, context: &LayerContext, replayed: Option<Label>) -> Result<Opening, BlobError> {
        let recalled = self.recall().await;
        let early = recalled.and_then(|recalled| Early::begin(recalled, context, replayed));
        let opening = self.resolve().await?;
        match early.and_then(|early| early.confirm(opening.preparation.resolved())) {
            Some((preparation, replay)) => Ok(Opening {
                preparation,
                replay: Some(replay),
                ..opening
            }),
            None => Ok(opening),
        }
    }

    /// The image as it was the last time, if the store has all of its documents. Nothing is fetched.
    pub async fn recall(&self) -> Option<Preparation> {
        let source = KeptSource::recalled(self.source.clone(), self.store.clone())?;
        let (preparation, _) = self.prepare(Arc::new(source)).await.ok()?;
        Some(preparation)
    }

    async fn prepare(&self, source: Arc<KeptSource>) -> Result<(Preparation, Option<Unconfirmed>), BlobError> {
        let resolved = resolve(&*source, self.platform.as_ref()).await?;
        let unconfirmed = source.unconfirmed().cloned();
        Ok((Preparation::new(source, resolved), unconfirmed))
    }
}
