//! Opening an image before the registry has answered.
//!
//! A tag most probably means the image that it meant the last time. While ocifs asks the registry, it opens that
//! image and replays its profile. The store must have the image and its layers' indexes. When the registry confirms
//! the tag, the bytes are already coming. If the tag means another image, the early work ends.
//!
//! Nothing is served before the tag is confirmed. Early bytes are content of layers like any other, so they are
//! verified and kept. A wrong guess costs only bandwidth.

use std::sync::Arc;

use tokio::task::JoinHandle;

use super::{Image, Learning, Preparation, learning};
use crate::layer::{LayerContext, LayerError};
use crate::profile::Label;
use crate::resolve::ResolvedImage;
use crate::task::joined;

/// An image that is being opened and replayed. The work ends when this is dropped.
#[derive(Debug)]
pub struct Early {
    preparation: Arc<Preparation>,
    replay: Replay,
}

/// A profile that is being replayed. The replay ends when this is dropped.
#[derive(Debug)]
pub struct Replay(JoinHandle<Result<bool, LayerError>>);

impl Early {
    /// Begins with an image that the store knows. Returns `None` if a layer would have to be streamed. Replays the
    /// profile with this label, if one is given. Must be called on the runtime.
    pub fn begin(preparation: Preparation, context: &LayerContext, label: Option<Label>) -> Option<Self> {
        preparation.stored_tree(context)?;
        let preparation = Arc::new(preparation);
        let (opening, context) = (preparation.clone(), context.clone());
        let replay = tokio::spawn(async move {
            let profile = label.map(|label| {
                let learning = Learning::find(&context.store, opening.resolved(), &opening.repository(), &label);
                learning.profile().clone()
            });
            // The replay begins as soon as the layers are open, while the tree is still being read. The replay is a
            // separate task, because it reads the devices.
            let unknown = profile.clone().filter(|profile| profile.touches.is_empty());
            let early = profile.filter(|profile| !profile.touches.is_empty()).map(|profile| {
                let opening = opening.clone();
                Replay(tokio::spawn(async move {
                    opening.layers().await.replay(&profile).await.map(|()| true)
                }))
            });
            let image = match opening.finish(&context).await {
                Ok(image) => image,
                Err(error) => {
                    // The caller that finishes the preparation later gets the error.
                    tracing::debug!(%error, "cannot open the image early");
                    return Ok(false);
                }
            };
            if let Some(nothing) = unknown {
                image.replay(&nothing).await?;
            }
            match early {
                Some(early) => early.end().await,
                None => Ok(true),
            }
        });
        Some(Self {
            preparation,
            replay: Replay(replay),
        })
    }

    /// Continues the early work if the registry named this image. Otherwise ends it and returns `None`.
    pub fn confirm(self, resolved: &ResolvedImage) -> Option<(Arc<Preparation>, Replay)> {
        let digest = |image: &ResolvedImage| image.manifest_document.digest.clone();
        (digest(self.preparation.resolved()) == digest(resolved)).then_some((self.preparation, self.replay))
    }
}

impl Replay {
    /// Replays the profile that the locations have for an image, as soon as it is there and the layers are open. Keeps the
    /// profile. Must be called on the runtime.
    pub(super) fn published(preparation: &Arc<Preparation>, context: &LayerContext, label: Label) -> Self {
        let (preparation, store) = (preparation.clone(), context.store.clone());
        Self(tokio::spawn(async move {
            while let Some(bytes) = preparation.lookups.profile().await {
                let (image, repository) = (preparation.resolved().clone(), preparation.repository());
                let (store, label) = (store.clone(), label.clone());
                let keeping =
                    tokio::task::spawn_blocking(move || learning::adopt(&store, &image, &repository, &label, &bytes));
                if let Ok(Some(profile)) = joined(keeping).await {
                    return preparation.layers().await.replay(&profile).await.map(|()| true);
                }
            }
            Ok(false)
        }))
    }

    /// Replays a profile on an image that is open.
    pub fn begin(image: &Arc<Image>, profile: crate::profile::Profile) -> Self {
        let image = image.clone();
        Self(tokio::spawn(async move { image.replay(&profile).await.map(|()| true) }))
    }

    /// Waits until the whole profile has been fetched. Returns false if the replay never began, because the image
    /// could not be opened early.
    pub async fn end(mut self) -> Result<bool, LayerError> {
        // Either the runtime is shutting down, so the result does not matter, or the task panicked and has reported
        // it.
        (&mut self.0).await.unwrap_or(Ok(true))
    }
}

impl Drop for Replay {
    fn drop(&mut self) {
        self.0.abort();
    }
}
