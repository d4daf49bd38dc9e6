//! Opens an image that the user named on the command line.

use std::sync::Arc;
use std::time::Duration;

use super::config::Config;
use super::fetching::Fetching;
use super::progress::{self, Bar};
use super::suggest::suggest;
use super::{ImageArgs, explain};
use ocifs::blob::BlobError;
use ocifs::content::Content;
use ocifs::fs::ImageFs;
use ocifs::image::{Confirm, NamedImage, Opening, Preparation, Unconfirmed};
use ocifs::layer::LayerContext;
use ocifs::oci::ImageRef;
use ocifs::published::{Locations, LookupPatience};
#[cfg(feature = "snapshotter")]
use ocifs::registry::credentials::{KubeletProviders, Several};
use ocifs::registry::{RegistryClient, RegistryConfig};
use ocifs::source;
use ocifs::store::{Store, StoreError};

/// Time in which a place with indexes must answer. With a larger time, mounts wait longer for a place that does not; with a
/// smaller one, indexes in slow places are not used.
const ANSWER: Duration = Duration::from_secs(4);

/// Opens the store. If the store cannot be opened, the command works from memory and reports the problem. A store of
/// another version is an error.
pub(super) fn context(config: &Config) -> anyhow::Result<LayerContext> {
    let (store, problem) = match Store::open(&config.store) {
        Ok(store) => (store, None),
        Err(error @ StoreError::Version { .. }) => return Err(error.into()),
        Err(error) => (Store::unavailable(), Some(error)),
    };
    let patience = config
        .timeout
        .map_or_else(LookupPatience::default, LookupPatience::within);
    let locations = match config.index.is_empty() {
        true => Locations::default(),
        // A place with indexes must not hold up a mount: without an answer, layers are streamed.
        false => Locations::new(config.index.clone(), &client(config)?.hurried(ANSWER), &store, patience)?,
    };
    let context = LayerContext::new(store, config.memory, config.cache_size)
        .with_locations(locations)
        .with_timeout(config.timeout);
    if let Some(error) = problem {
        context.health.store_lost(&error);
    }
    Ok(context)
}

/// Returns the image that `args` name, without asking its source for anything.
pub(super) async fn named(config: &Config, args: &ImageArgs, store: &Store) -> anyhow::Result<NamedImage> {
    let reference = args.image.reference();
    let image: ImageRef = reference.map_err(|error| advised(error.into(), &args.image))?;
    let platform = args.platform.as_ref().map(|text| text.parse()).transpose()?;
    let source = source::open_with(&image, || client(config)).await?;
    let confirm = args.pull.map(Confirm::from).unwrap_or_default();
    let named = NamedImage::new(source, platform, store.clone(), confirm);
    Ok(match args.layers {
        Some(count) => named.with_lowest_layers(count),
        None => named,
    })
}

/// Resolves the image: fetches its manifest and config, or reads them from the store, and nothing else. If the
/// registry could not be asked and the tag was resolved without it, a warning goes to standard error.
pub(super) async fn resolve(config: &Config, args: &ImageArgs, store: &Store) -> anyhow::Result<Opening> {
    let resolved = named(config, args, store).await?.resolve().await;
    let opening = resolved.map_err(|error| advised(error.into(), &args.image))?;
    warn(config, args, &opening);
    Ok(opening)
}

/// Warns the user of a tag that was resolved without its registry.
fn warn(config: &Config, args: &ImageArgs, opening: &Opening) {
    if let Some(warning) = opening.unconfirmed.as_ref().and_then(|u| warning(&args.image, u))
        && !config.quiet
    {
        eprintln!("ocifs: {warning}");
    }
}

/// Returns the warning for a tag whose registry could not be asked.
pub(super) fn warning(image: &str, unconfirmed: &Unconfirmed) -> Option<String> {
    let reason = unconfirmed.reason.as_ref()?;
    let since = unconfirmed.since.as_deref().unwrap_or("an unknown time");
    Some(format!(
        "warning: using {image} as it was at {since}, because its registry cannot be asked: {reason}"
    ))
}

/// Adds to an error about an image what its user may have meant by the name.
pub(super) fn advised(error: anyhow::Error, image: &str) -> anyhow::Error {
    match suggest(image) {
        Some(advice) => {
            let text = format!("{}; {advice}", explain(&error));
            error.context(text)
        }
        None => error,
    }
}

/// Returns the client of this process. Places with indexes are often in the registry of the image, so both share their
/// connections: a new connection would cost round trips and begin slowly.
pub(super) fn client(config: &Config) -> Result<RegistryClient, BlobError> {
    if let Some(client) = config.client.get() {
        return Ok(client.clone());
    }
    let client = RegistryClient::new(registry_config(config))?;
    Ok(config.client.get_or_init(|| client).clone())
}

/// Returns the settings for requests to registries.
pub(super) fn registry_config(config: &Config) -> RegistryConfig {
    let mut settings = settings(config);
    #[cfg(feature = "snapshotter")]
    if let Some(kubelet) = &config.kubelet {
        let providers = KubeletProviders::new(kubelet.config.clone(), kubelet.bin_dir.clone());
        settings.credentials = Arc::new(Several(vec![settings.credentials, Arc::new(providers)]));
    }
    settings
}

fn settings(config: &Config) -> RegistryConfig {
    RegistryConfig {
        plain_http: config.plain_http.clone(),
        ca_files: config.ca.clone(),
        hosts: config.hosts.clone(),
        foreign_layer_hosts: config.foreign_layers_from.clone(),
        allow_private_redirects: config.allow_private_redirects,
        timeout: config.timeout.unwrap_or(Duration::MAX),
        ..RegistryConfig::default()
    }
}

/// Opens the image as a file system. Standard error shows progress while layers are streamed.
pub(super) fn open_image(fetching: &Fetching, config: &Config, args: &ImageArgs) -> anyhow::Result<ImageFs> {
    let context = context(config)?;
    fetching.run(async {
        let named = named(config, args, &context.store).await?;
        let opening = named.resolve_expecting(&context, None).await;
        let opening = opening.map_err(|error| advised(error.into(), &args.image))?;
        warn(config, args, &opening);
        let preparation = opening.preparation;
        fetching.begin(&context.store, &preparation);
        let bar = Bar::new(&args.image, config.quiet);
        let image = watch(&preparation, &bar, preparation.finish(&context)).await?;
        bar.finish();
        anyhow::Ok(ImageFs::new(Arc::new(Content::new(image, config.timeout))))
    })
}

/// Runs `work` and shows how many bytes of the image's layers have arrived.
pub(super) async fn watch<T>(preparation: &Preparation, bar: &Bar, work: impl Future<Output = T>) -> T {
    let mut interval = tokio::time::interval(progress::INTERVAL);
    let mut work = std::pin::pin!(work);
    loop {
        tokio::select! {
            result = &mut work => return result,
            _ = interval.tick() => {
                let (done, total) = ocifs::layer::progress(&preparation.status());
                bar.set(done, total);
            }
        }
    }
}
