//! From an image as the user wrote it to something that can be read.

use std::sync::Arc;
use std::time::Duration;

use anyhow::bail;

use super::config::Config;
use super::fetching::Fetching;
use super::progress::{self, Bar};
use super::suggest::suggest;
use super::{ImageArgs, explain};
use crate::archive::DockerArchive;
use crate::blob::{BlobError, ImageSource};
use crate::fs::ImageFs;
use crate::image::{Confirm, Image, KeptSource, Preparation, Unconfirmed};
use crate::layer::{Health, LayerContext};
use crate::layout::OciLayout;
use crate::oci::{Digest, ImageRef, Platform};
use crate::registry::{RegistryClient, RegistryConfig};
use crate::resolve::resolve;
use crate::store::{Store, StoreError};

/// The store, or none if it cannot be written: then everything works from memory, and says so.
pub(super) fn context(config: &Config) -> anyhow::Result<LayerContext> {
    let (store, problem) = match Store::open(&config.store) {
        Ok(store) => (store, None),
        Err(error @ StoreError::Version { .. }) => return Err(error.into()),
        Err(error) => (Store::unavailable(), Some(error)),
    };
    let context = LayerContext::new(store, config.memory, config.cache_size);
    if let Some(error) = problem {
        context.health.store_lost(&error);
    }
    Ok(context)
}

/// Resolves the image: manifest and config are fetched (or found in the store), nothing else.
pub(super) async fn prepare(config: &Config, args: &ImageArgs, context: &LayerContext) -> anyhow::Result<Preparation> {
    Ok(prepare_and_tell(config, args, context).await?.0)
}

/// The same, and whether a tag was resolved without its registry; standard error has a warning if the registry failed.
pub(super) async fn prepare_and_tell(
    config: &Config,
    args: &ImageArgs,
    context: &LayerContext,
) -> anyhow::Result<(Preparation, Option<Unconfirmed>)> {
    let named = Named::open(config, args, context).await?;
    let (preparation, unconfirmed) = named.prepare().await?;
    if let Some(warning) = unconfirmed.as_ref().and_then(|u| warning(&args.image, u))
        && !config.quiet
    {
        eprintln!("ocifs: {warning}");
    }
    Ok((preparation, unconfirmed))
}

/// What to say of a tag whose registry could not be asked.
pub(super) fn warning(image: &str, unconfirmed: &Unconfirmed) -> Option<String> {
    let reason = unconfirmed.reason.as_ref()?;
    let since = unconfirmed.since.as_deref().unwrap_or("an unknown time");
    Some(format!(
        "warning: using {image} as it was at {since}, because its registry cannot be asked: {reason}"
    ))
}

/// An image as it was named, whose documents have not been asked for.
pub(super) struct Named {
    /// As the user wrote it.
    image: String,
    source: Arc<dyn ImageSource>,
    pinned: Option<Digest>,
    platform: Option<Platform>,
    store: Store,
    confirm: Confirm,
}

impl Named {
    pub(super) async fn open(config: &Config, args: &ImageArgs, context: &LayerContext) -> anyhow::Result<Self> {
        let reference = args.image.reference();
        let image: ImageRef = reference.map_err(|error| advised(error.into(), &args.image))?;
        let platform = args.platform.as_ref().map(|text| text.parse()).transpose()?;
        let (source, pinned) = open(config, &image).await?;
        Ok(Self {
            image: args.image.to_string(),
            source,
            pinned,
            platform,
            store: context.store.clone(),
            // Of what is in a file there is no other copy to ask about.
            confirm: match image {
                ImageRef::Registry(_) => args.pull.map(Confirm::from).unwrap_or_default(),
                ImageRef::Layout { .. } | ImageRef::Archive { .. } => Confirm::Always,
            },
        })
    }

    /// Manifest and config, fetched or found in the store, and whether a tag was resolved without its registry.
    pub(super) async fn prepare(&self) -> anyhow::Result<(Preparation, Option<Unconfirmed>)> {
        let (source, store) = (self.source.clone(), self.store.clone());
        let source = KeptSource::new(source, store, self.pinned.clone(), self.confirm);
        let prepared = self.resolve(Arc::new(source)).await;
        prepared.map_err(|error| advised(error.into(), &self.image))
    }

    /// The same as they were the last time, if all of that is in the store. Nothing is fetched.
    pub(super) async fn recall(&self) -> Option<Preparation> {
        let source = KeptSource::recalled(self.source.clone(), self.store.clone())?;
        let (preparation, _) = self.resolve(Arc::new(source)).await.ok()?;
        Some(preparation)
    }

    async fn resolve(&self, source: Arc<KeptSource>) -> Result<(Preparation, Option<Unconfirmed>), BlobError> {
        let resolved = resolve(&*source, self.platform.as_ref()).await?;
        let unconfirmed = source.unconfirmed().cloned();
        Ok((Preparation::new(source, resolved), unconfirmed))
    }
}

/// The error about an image, and what its user may have meant by it.
fn advised(error: anyhow::Error, image: &str) -> anyhow::Error {
    match suggest(image) {
        Some(advice) => {
            let text = format!("{}; {advice}", explain(&error));
            error.context(text)
        }
        None => error,
    }
}

/// The source of an image, and the digest in its reference.
async fn open(config: &Config, image: &ImageRef) -> anyhow::Result<(Arc<dyn ImageSource>, Option<Digest>)> {
    match image {
        ImageRef::Registry(reference) => {
            let client = RegistryClient::new(registry_config(config))?;
            let source = client.source(&reference.registry, &reference.repository, reference.selector())?;
            Ok((Arc::new(source), reference.digest.clone()))
        }
        ImageRef::Layout { dir, image } => Ok((Arc::new(OciLayout::open(dir, image.as_deref()).await?), None)),
        ImageRef::Archive { file, image } => Ok((Arc::new(DockerArchive::open(file, image.as_deref()).await?), None)),
    }
}

fn registry_config(config: &Config) -> RegistryConfig {
    RegistryConfig {
        plain_http: config.plain_http.clone(),
        ca_files: config.ca.clone(),
        foreign_layer_hosts: config.foreign_layers_from.clone(),
        allow_private_redirects: config.allow_private_redirects,
        timeout: config.timeout.unwrap_or(Duration::MAX),
        ..RegistryConfig::default()
    }
}

/// The image as a file system, with progress on standard error while layers are streamed.
pub(super) fn open_image(fetching: &Fetching, config: &Config, args: &ImageArgs) -> anyhow::Result<ImageFs> {
    let context = context(config)?;
    fetching.run(async {
        let preparation = Arc::new(prepare(config, args, &context).await?);
        fetching.begin(&context.store, &preparation);
        let bar = Bar::new(&args.image, config.quiet);
        let image = watch(&preparation, &bar, preparation.finish(&context)).await?;
        bar.finish();
        anyhow::Ok(ImageFs::new(image, config.timeout))
    })
}

/// Brings all of an image into the store, or says why not all of it is there.
pub(super) async fn complete(image: &Image, health: &Health) -> anyhow::Result<()> {
    let missing = image.complete().await?;
    if let Some(problem) = health.store_problem() {
        bail!("not all of the image could be kept: {problem}");
    }
    if missing > 0 && !image.layers().iter().all(|layer| layer.has_disk()) {
        bail!("not all of the image could be kept: the store cannot be written");
    }
    if missing > 0 {
        bail!("not all of the image fits in the cache, {missing} spans are gone again: raise --cache-size");
    }
    Ok(())
}

/// Shows how many bytes of the image's layers came in while `work` runs.
pub(super) async fn watch<T>(preparation: &Preparation, bar: &Bar, work: impl Future<Output = T>) -> T {
    let mut interval = tokio::time::interval(progress::INTERVAL);
    let mut work = std::pin::pin!(work);
    loop {
        tokio::select! {
            result = &mut work => return result,
            _ = interval.tick() => {
                let (done, total) = crate::layer::progress(&preparation.status());
                bar.set(done, total);
            }
        }
    }
}
