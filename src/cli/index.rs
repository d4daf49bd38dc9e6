//! `ocifs index`: makes, publishes and checks indexes of layers for other hosts.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};

use super::config::Config;
use super::open::{context, registry_config, resolve, watch};
use super::progress::Bar;
use super::say;
use super::units::human;
use super::{Fetching, ImageArgs};
use ocifs::image::{Image, stored_profile};
use ocifs::layer::{Layer, LayerContext, export};
use ocifs::oci::{Descriptor, Digest};
use ocifs::published::{Compared, Difference, FileName, IndexPlace, Locations, PublishedFile, Publisher, Pushed};
use ocifs::registry::RegistryClient;
use ocifs::store::Authority;
use ocifs::toc::carried::TableRef;

/// Commands of `index`.
#[derive(Debug, Subcommand)]
pub(super) enum IndexCommand {
    /// Write the indexes of an image's layers, and the profiles of its starts, to a directory
    ///
    /// Layers that this host has not seen are streamed once. The same layer has the same index on every host, byte for byte.
    Build(BuildArgs),
    /// Put the indexes of an image's layers, and the profiles of its starts, into a directory or a repository
    Push(PushArgs),
    /// Compare the indexes at the index locations with those that a pass on this host makes
    ///
    /// All locations are asked, and what the store keeps from them is compared too. An index that differs is removed from the
    /// store. Exits with 1 if any differs, or if a location cannot be asked.
    Verify(VerifyArgs),
}

/// Arguments of `index build`.
#[derive(Debug, Args)]
pub(super) struct BuildArgs {
    #[command(flatten)]
    image: ImageArgs,
    /// Directory for the files; it is made if it is missing
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Print a JSON object at the end
    #[arg(long)]
    json: bool,
}

/// Arguments of `index push`.
#[derive(Debug, Args)]
pub(super) struct PushArgs {
    #[command(flatten)]
    image: ImageArgs,
    /// Where to put the files: a directory or oci://HOST/REPOSITORY
    location: String,
    /// Push the files that `index build` wrote to this directory, with the signatures beside them (NAME.minisig)
    #[arg(long, value_name = "DIR")]
    from: Option<PathBuf>,
    /// Print a JSON object at the end
    #[arg(long)]
    json: bool,
}

/// Arguments of `index verify`.
#[derive(Debug, Args)]
pub(super) struct VerifyArgs {
    #[command(flatten)]
    image: ImageArgs,
    /// Print a JSON object at the end
    #[arg(long)]
    json: bool,
}

pub(super) fn run(config: &Config, fetching: &Fetching, command: IndexCommand) -> anyhow::Result<()> {
    match command {
        IndexCommand::Build(args) => build(config, fetching, &args),
        IndexCommand::Push(args) => push(config, fetching, &args),
        IndexCommand::Verify(args) => verify(config, fetching, &args),
    }
}

/// Opens an image with indexes of passes on this host alone. Streams the layers that the store does not know.
async fn open(config: &Config, fetching: &Fetching, args: &ImageArgs) -> anyhow::Result<(LayerContext, Arc<Image>)> {
    let context = context(config)?.with_locations(Locations::default());
    if let Some(problem) = context.health.store_problem() {
        bail!("no index can be kept: {problem}");
    }
    let preparation = resolve(config, args, &context.store).await?.preparation;
    fetching.begin(&context.store, &preparation);
    let bar = Bar::new(&args.image, config.quiet);
    let image = watch(&preparation, &bar, preparation.finish(&context)).await?;
    bar.finish();
    Ok((context, image))
}

/// Whether other hosts need an index to open a layer without streaming it. A layer that carries a table needs none.
fn needs_index(layer: &Layer) -> bool {
    !matches!(layer.authority(), Authority::Manifest { .. })
}

/// Returns the index files of an image's layers, each layer once, and the profiles of its starts.
async fn files(context: &LayerContext, image: &Image) -> anyhow::Result<Vec<PublishedFile>> {
    let mut files: Vec<PublishedFile> = Vec::new();
    for layer in image.layers().iter().filter(|layer| needs_index(layer)) {
        let name = FileName::Index {
            layer: layer.digest().clone(),
        };
        if files.iter().any(|file| file.name == name) {
            continue;
        }
        let index = export(layer.clone()).await?;
        files.push(PublishedFile {
            name,
            bytes: index.encode().into(),
            signature: None,
        });
    }
    let manifest = &image.resolved().manifest_document.digest;
    for label in context.store.profile_labels(manifest)? {
        let label = label.parse().map_err(anyhow::Error::msg)?;
        if let Some(profile) = stored_profile(&context.store, manifest, &label) {
            files.push(PublishedFile {
                name: FileName::Profile {
                    manifest: manifest.clone(),
                    label,
                },
                bytes: profile.encode().into(),
                signature: None,
            });
        }
    }
    Ok(files)
}

fn client(config: &Config) -> anyhow::Result<RegistryClient> {
    Ok(RegistryClient::new(registry_config(config))?)
}

fn build(config: &Config, fetching: &Fetching, args: &BuildArgs) -> anyhow::Result<()> {
    let place = IndexPlace::Directory(std::path::absolute(&args.output)?);
    let (pushed, digest) = fetching.run(async {
        let (context, image) = open(config, fetching, &args.image).await?;
        let files = files(&context, &image).await?;
        let digest = image.resolved().manifest_document.digest.clone();
        let publisher = Publisher::new(place.clone(), &client(config)?, &context.store)?;
        anyhow::Ok((publisher.push(&digest, &files).await?, digest))
    })?;
    report(config, args.json, &place, &digest, pushed)
}

fn push(config: &Config, fetching: &Fetching, args: &PushArgs) -> anyhow::Result<()> {
    let place = IndexPlace::parse(&args.location)?;
    let (pushed, digest) = fetching.run(async {
        let context = context(config)?;
        let publisher = Publisher::new(place.clone(), &client(config)?, &context.store)?;
        let (files, digest) = match &args.from {
            None => {
                let (context, image) = open(config, fetching, &args.image).await?;
                let digest = image.resolved().manifest_document.digest.clone();
                (files(&context, &image).await?, digest)
            }
            Some(directory) => {
                let preparation = resolve(config, &args.image, &context.store).await?.preparation;
                let resolved = preparation.resolved();
                let digest = resolved.manifest_document.digest.clone();
                (built(directory, &digest, resolved.layers())?, digest)
            }
        };
        anyhow::Ok((publisher.push(&digest, &files).await?, digest))
    })?;
    report(config, args.json, &place, &digest, pushed)
}

/// Returns the files of an image that `index build` wrote to a directory, with their signatures.
fn built(directory: &Path, manifest: &Digest, layers: &[Descriptor]) -> anyhow::Result<Vec<PublishedFile>> {
    let mut names: Vec<FileName> = Vec::new();
    // A layer that carries a table has no index.
    for layer in layers
        .iter()
        .filter(|layer| !matches!(TableRef::of(layer), Ok(Some(_))))
    {
        let name = FileName::Index {
            layer: layer.digest.clone(),
        };
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let entries = std::fs::read_dir(directory).with_context(|| format!("{}", directory.display()))?;
    let mut profiles = Vec::new();
    for entry in entries {
        let name = entry?.file_name();
        profiles.extend(name.to_str().and_then(|name| FileName::profile_of(manifest, name)));
    }
    profiles.sort_by_key(ToString::to_string);
    let files = names.into_iter().chain(profiles).map(|name| {
        let path = directory.join(name.to_string());
        let bytes = std::fs::read(&path).with_context(|| format!("{}", path.display()))?;
        let signature = directory.join(name.signature());
        let signature = match std::fs::read_to_string(&signature) {
            Ok(text) => Some(text),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => return Err(error).with_context(|| format!("{}", signature.display())),
        };
        Ok(PublishedFile {
            name,
            bytes: bytes.into(),
            signature,
        })
    });
    files.collect()
}

fn report(config: &Config, json: bool, place: &IndexPlace, digest: &Digest, pushed: Pushed) -> anyhow::Result<()> {
    if json {
        say!(
            "{}",
            serde_json::json!({
                "location": place.to_string(), "digest": digest,
                "written": pushed.written, "present": pushed.present, "written_bytes": pushed.bytes,
            })
        );
    } else if !config.quiet {
        let Pushed {
            written,
            present,
            bytes,
        } = pushed;
        eprintln!(
            "{place}: {written} files written ({}), {present} were there",
            human(bytes)
        );
    }
    Ok(())
}

fn verify(config: &Config, fetching: &Fetching, args: &VerifyArgs) -> anyhow::Result<()> {
    if config.index.is_empty() {
        bail!("there is no index location to compare with: name one with --index, or in the configuration file");
    }
    let verified = fetching.run(async {
        let locations = context(config)?.locations;
        let (context, image) = open(config, fetching, &args.image).await?;
        let comparison = locations.comparison(&image.resolved().manifest_document.digest);
        let mut verified = Verified::default();
        let mut seen = std::collections::HashSet::new();
        for layer in image.layers().iter().filter(|layer| needs_index(layer)) {
            if !seen.insert(layer.digest().clone()) {
                continue;
            }
            let own = export(layer.clone()).await?;
            for compared in comparison.compare(&context.store, &own).await {
                verified.count(compared);
            }
        }
        anyhow::Ok(verified)
    })?;
    verified.show(args.json)?;
    let Verified {
        differences,
        troubles,
        compared,
        ..
    } = verified;
    match (differences.len(), troubles.len()) {
        (0, 0) => Ok(()),
        (0, n) => bail!("{n} indexes cannot be compared, because their locations cannot be asked"),
        (n, _) => {
            bail!("{n} of {compared} indexes differ from what the layers contain; do not use these locations or keys")
        }
    }
}

/// What a comparison of all layers with all places has found.
#[derive(Debug, Default)]
struct Verified {
    differences: Vec<Difference>,
    /// Why places could not be asked, for each index that was not compared.
    troubles: Vec<String>,
    compared: usize,
    missing: usize,
}

impl Verified {
    fn count(&mut self, compared: Compared) {
        match (&compared.trouble, compared.is_there) {
            (_, true) => self.compared += 1,
            (None, false) => self.missing += 1,
            (Some(_), false) => {}
        }
        self.differences.extend(compared.difference);
        self.troubles.extend(compared.trouble.map(|error| error.to_string()));
    }

    fn show(&self, json: bool) -> anyhow::Result<()> {
        if json {
            let objects = self.differences.iter().map(|difference| {
                serde_json::json!({
                    "location": difference.place, "authority": difference.authority.to_string(),
                    "layer": difference.layer, "differs": difference.parts,
                })
            });
            let differences: Vec<_> = objects.collect();
            say!(
                "{}",
                serde_json::json!({
                    "compared": self.compared, "missing": self.missing, "differences": differences,
                    "troubles": self.troubles,
                })
            );
            return Ok(());
        }
        for difference in &self.differences {
            say!(
                "differs: {} at {} (believed by {}): {}",
                difference.layer,
                difference.place,
                difference.authority,
                difference.parts.join(", ")
            );
        }
        for trouble in &self.troubles {
            say!("not compared: {trouble}");
        }
        say!("{} indexes compared, {} not there", self.compared, self.missing);
        Ok(())
    }
}
