//! From the name of an image to its [`Preparation`].

use std::sync::Arc;

use super::expecting::Expecting;
use super::{Confirm, Early, KeptSource, Preparation, Replay, Unconfirmed};
use crate::blob::{BlobError, ImageSource};
use crate::layer::LayerContext;
use crate::oci::{Digest, Platform};
use crate::profile::Label;
use crate::resolve::{ResolvedImage, resolve};
use crate::source::NamedSource;
use crate::store::Store;

/// The name of an image, before anything was requested.
#[derive(Debug)]
pub struct NamedImage {
    source: Arc<dyn ImageSource>,
    pinned: Option<Digest>,
    platform: Option<Platform>,
    store: Store,
    confirm: Confirm,
    /// How many of the image's layers are wanted, if not all.
    layers: Option<usize>,
}

/// An image whose manifest and config are known.
#[derive(Debug)]
pub struct Opening {
    /// Opens the layers and the tree.
    pub preparation: Arc<Preparation>,
    /// A replay of the profile that has already begun.
    pub replay: Option<Replay>,
    /// When and why the image's tag was resolved without its registry, if it was.
    pub unconfirmed: Option<Unconfirmed>,
}

impl NamedImage {
    /// The image of `named` for this platform; `None` is this machine's platform. Documents are kept in `store` and
    /// taken from there. `confirm` says when to ask a registry what a tag means.
    pub fn new(named: NamedSource, platform: Option<Platform>, store: Store, confirm: Confirm) -> Self {
        Self {
            source: named.source,
            pinned: named.pinned,
            platform,
            store,
            confirm: if named.is_local { Confirm::Always } else { confirm },
            layers: None,
        }
    }

    /// Names the image of the lowest `count` layers.
    pub fn with_lowest_layers(mut self, count: usize) -> Self {
        self.layers = Some(count);
        self
    }

    /// Leaves out the layers that are not wanted.
    fn wanted(&self, image: ResolvedImage) -> Result<ResolvedImage, BlobError> {
        let (Some(wanted), layers) = (self.layers, image.layers().len()) else {
            return Ok(image);
        };
        image.lowest(wanted).ok_or_else(|| BlobError::NotFound {
            what: format!("layer {wanted} of {}", self.source.describe()),
            hint: Some(format!("its layers are numbered from 1 to {layers}")),
        })
    }

    /// Finds manifest and config.
    pub async fn resolve(&self) -> Result<Opening, BlobError> {
        let source = Arc::new(self.kept());
        let (preparation, unconfirmed) = self.prepare(source).await?;
        Ok(Opening {
            preparation: Arc::new(preparation),
            replay: None,
            unconfirmed,
        })
    }

    /// Finds manifest and config like [`NamedImage::resolve`], and asks the locations of `context` for the indexes of the
    /// layers meanwhile. With a label, asks for the profile with that label too, and replays it. Must be called on the
    /// runtime.
    pub async fn resolve_expecting(&self, context: &LayerContext, label: Option<Label>) -> Result<Opening, BlobError> {
        if context.locations.is_empty() {
            return self.resolve().await;
        }
        let kept = Arc::new(self.kept());
        let source = Arc::new(Expecting::new(kept.clone(), context.clone(), label.clone()));
        let resolved = resolve(&*source, self.platform.as_ref()).await?;
        let lookups = source.lookups(&resolved.manifest_document.digest);
        let wanted = self.wanted(resolved)?;
        let preparation = Arc::new(Preparation::new(kept.clone(), wanted).with_lookups(lookups));
        let replay = label.map(|label| Replay::published(&preparation, context, label));
        Ok(Opening {
            preparation,
            replay,
            unconfirmed: kept.unconfirmed().cloned(),
        })
    }

    fn kept(&self) -> KeptSource {
        let (source, store) = (self.source.clone(), self.store.clone());
        KeptSource::new(source, store, self.pinned.clone(), self.confirm)
    }

    /// Finds manifest and config of an image that is going to be read. If the store knows what the name meant the
    /// last time, that image is opened while the source is asked. If a label is given, the profile with that label is
    /// replayed early as well. Must be called on the runtime.
    pub async fn open(&self, context: &LayerContext, replayed: Option<Label>) -> Result<Opening, BlobError> {
        let recalled = self.recall().await;
        let early = recalled.and_then(|recalled| Early::begin(recalled, context, replayed.clone()));
        if early.is_none() {
            context.locations.warm_up();
        }
        let opening = self.resolve_expecting(context, replayed).await?;
        match early.and_then(|early| early.confirm(opening.preparation.resolved())) {
            Some((preparation, replay)) => Ok(Opening {
                preparation,
                replay: Some(replay),
                ..opening
            }),
            None => Ok(opening),
        }
    }

    /// The image that the name meant the last time, if the store has all of its documents. Fetches nothing.
    pub async fn recall(&self) -> Option<Preparation> {
        let source = KeptSource::recalled(self.source.clone(), self.store.clone())?;
        let (preparation, _) = self.prepare(Arc::new(source)).await.ok()?;
        Some(preparation)
    }

    async fn prepare(&self, source: Arc<KeptSource>) -> Result<(Preparation, Option<Unconfirmed>), BlobError> {
        let resolved = self.wanted(resolve(&*source, self.platform.as_ref()).await?)?;
        let unconfirmed = source.unconfirmed().cloned();
        Ok((Preparation::new(source, resolved), unconfirmed))
    }
}
