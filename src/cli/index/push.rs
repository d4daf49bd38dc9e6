//! Makes the indexes of an image's layers, and writes them to a place.

use std::path::Path;

use anyhow::{Context as _, anyhow, bail};

use super::super::config::Config;
use super::super::json::versioned;
use super::super::open::{client, context, resolve};
use super::super::units::human;
use super::super::{Fetching, say};
use super::{BuildArgs, PushArgs, needs_index, open};
use ocifs::image::{Image, stored_profile};
use ocifs::layer::{LayerContext, check_index, export};
use ocifs::oci::{Descriptor, DiffId, Digest};
use ocifs::profile::{MOST_PUBLISHED, Profile};
use ocifs::published::{FileName, IndexFile, IndexPlace, PublishedFile, Publisher, Pushed};
use ocifs::resolve::ResolvedImage;
use ocifs::toc::carried::TableRef;

pub(super) fn build(config: &Config, fetching: &Fetching, args: &BuildArgs) -> anyhow::Result<()> {
    let place = IndexPlace::Directory(std::path::absolute(&args.output)?);
    let (pushed, digest) = fetching.run(async {
        let (context, image) = open(config, fetching, &args.image).await?;
        let files = files(&context, &image).await?;
        let digest = image.resolved().manifest_document.digest.clone();
        // What was built here before is made again.
        let publisher = Publisher::new(place.clone(), &client(config)?, &context.store, true)?;
        anyhow::Ok((publisher.push(&digest, &files).await?, digest))
    })?;
    report(config, args.json, &place, &digest, pushed)
}

pub(super) fn push(config: &Config, fetching: &Fetching, args: &PushArgs) -> anyhow::Result<()> {
    let place = IndexPlace::parse(&args.location)?;
    let (pushed, digest) = fetching.run(async {
        let context = context(config)?;
        let publisher = Publisher::new(place.clone(), &client(config)?, &context.store, args.replace)?;
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
                (built(directory, resolved)?, digest)
            }
        };
        anyhow::Ok((publisher.push(&digest, &files).await?, digest))
    })?;
    report(config, args.json, &place, &digest, pushed)
}

/// Reads the files of an image that `index build` wrote to a directory, with their signatures. Fails if one is not what its
/// name says.
fn built(directory: &Path, resolved: &ResolvedImage) -> anyhow::Result<Vec<PublishedFile>> {
    let manifest = &resolved.manifest_document.digest;
    let mut files: Vec<PublishedFile> = Vec::new();
    let mut wanted = 0;
    for (layer, diff_id) in resolved.layers().iter().zip(resolved.diff_ids()) {
        // A layer that carries a table has no index.
        if matches!(TableRef::of(layer), Ok(Some(_))) {
            continue;
        }
        let name = FileName::Index {
            layer: layer.digest.clone(),
        };
        if files.iter().any(|file| file.name == name) {
            continue;
        }
        wanted += 1;
        if !directory.join(name.to_string()).try_exists()? {
            // `index build` leaves out what is too long.
            eprintln!("{name} is not in {}, leaving it out", directory.display());
            continue;
        }
        let file = PublishedFile::read(directory, name)?;
        check(&file, layer, diff_id).with_context(|| directory.display().to_string())?;
        files.push(file);
    }
    if wanted > 0 && files.is_empty() {
        bail!("no index of this image's layers is in {}", directory.display());
    }
    let entries = std::fs::read_dir(directory).with_context(|| format!("{}", directory.display()))?;
    let mut profiles = Vec::new();
    for entry in entries {
        let name = entry?.file_name();
        profiles.extend(name.to_str().and_then(|name| FileName::profile_of(manifest, name)));
    }
    profiles.sort_by_key(ToString::to_string);
    for name in profiles {
        let file = PublishedFile::read(directory, name)?;
        if let FileName::Profile { manifest, label } = &file.name {
            Profile::decode_of(&file.bytes, manifest, label)
                .with_context(|| format!("{} in {}", file.name, directory.display()))?;
        }
        files.push(file);
    }
    Ok(files)
}

/// Checks that a file is a usable index of a layer.
fn check(file: &PublishedFile, layer: &Descriptor, diff_id: &DiffId) -> anyhow::Result<()> {
    let (name, size) = (file.name.to_string(), u64::try_from(layer.size)?);
    let most = IndexFile::longest(size);
    if file.bytes.len() > most {
        bail!("{name} is longer than {}, so no host would use it", human(most as u64));
    }
    let index = IndexFile::decode(&name, &file.bytes, &layer.digest, size)?;
    check_index(index, &layer.digest, diff_id).map_err(|reason| anyhow!("{name} is no usable index: {reason}"))
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
        let bytes = index.encode();
        let most = IndexFile::longest(index.size);
        if bytes.len() > most {
            eprintln!(
                "the index of {} has {}, and other hosts use none of more than {} for this layer: leaving it out",
                index.layer,
                human(bytes.len() as u64),
                human(most as u64)
            );
            continue;
        }
        files.push(PublishedFile {
            name,
            bytes: bytes.into(),
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
                bytes: profile.encode_within(MOST_PUBLISHED)?.into(),
                signature: None,
            });
        }
    }
    Ok(files)
}

fn report(config: &Config, json: bool, place: &IndexPlace, digest: &Digest, pushed: Pushed) -> anyhow::Result<()> {
    if json {
        say!(
            "{}",
            versioned(serde_json::json!({
                "location": place.to_string(), "digest": digest,
                "written": pushed.written, "present": pushed.present, "written_bytes": pushed.bytes,
            }))?
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
