//! `ocifs inspect`: shows manifest, config and layers of an image.

use clap::Args;
use serde_json::json;

use super::config::Config;
use super::json::versioned;
use super::say;
use super::text::shown;
use super::units::human;
use super::{Fetching, ImageArgs, open};
use ocifs::image::Preparation;
use ocifs::layer::{LayerContext, stored_toc};

/// Arguments of `inspect`.
#[derive(Debug, Args)]
pub(super) struct InspectArgs {
    #[command(flatten)]
    image: ImageArgs,
    /// Print a JSON object with manifest and config as they are
    #[arg(long)]
    json: bool,
}

/// Returns what is odd in the layers' tars and how ocifs reads it, by layer digest. It covers only layers that were
/// indexed before.
fn oddities(context: &LayerContext, image: &Preparation) -> Vec<(String, String)> {
    let mut oddities = Vec::new();
    for layer in image.resolved().layers() {
        // A layer that was never indexed has no TOC. A layer with a damaged TOC is indexed again when it is read.
        let dir = image.stored_index(context, layer).map(|(_, dir)| dir);
        let warnings = stored_toc(&layer.digest, dir.as_ref()).map(|toc| toc.warnings());
        if let Ok(Ok(warnings)) = warnings {
            oddities.extend(warnings.into_iter().map(|text| (layer.digest.to_string(), text)));
        }
    }
    oddities
}

pub(super) fn run(config: &Config, fetching: &Fetching, args: InspectArgs) -> anyhow::Result<()> {
    let context = open::context(config)?;
    let opening = fetching.run(open::resolve(config, &args.image, &context.store))?;
    let (image, unconfirmed) = (opening.preparation.resolved(), &opening.unconfirmed);
    let oddities = oddities(&context, &opening.preparation);
    let indexes: Vec<Option<String>> = image
        .layers()
        .iter()
        .map(|layer| {
            let stored = opening.preparation.stored_index(&context, layer);
            stored.map(|(authority, _)| authority.to_string())
        })
        .collect();
    if args.json {
        let manifest: serde_json::Value = serde_json::from_slice(&image.manifest_document.bytes)?;
        let document: serde_json::Value = serde_json::from_slice(&image.config_document.bytes)?;
        let object = json!({
            "image": &*args.image.image,
            "index_digest": image.index.as_ref().map(|d| d.digest.to_string()),
            "digest": image.manifest_document.digest,
            "manifest": manifest,
            "config": document,
            "unconfirmed": unconfirmed,
            "indexes": image.layers().iter().zip(&indexes).map(|(layer, authority)| {
                json!({"layer": layer.digest, "authority": authority})
            }).collect::<Vec<_>>(),
            "oddities": oddities.iter().map(|(layer, text)| json!({"layer": layer, "text": text})).collect::<Vec<_>>(),
        });
        say!("{:#}", versioned(object)?);
        return Ok(());
    }
    say!("image     {}", shown(&args.image.image));
    if let Some(index) = &image.index {
        say!("index     {}", index.digest);
    }
    say!("digest    {}", image.manifest_document.digest);
    say!("platform  {}", image.config.platform());
    let run = &image.config.config;
    for (label, words) in [("entry", &run.entrypoint), ("command", &run.cmd)] {
        if !words.is_empty() {
            say!("{label:<9} {}", serde_json::to_string(words)?);
        }
    }
    for (label, text) in [("user", &run.user), ("workdir", &run.working_dir)] {
        if !text.is_empty() {
            say!("{label:<9} {}", shown(text));
        }
    }
    for variable in &run.env {
        say!("env       {}", shown(variable));
    }
    for (layer, index) in image.layers().iter().zip(&indexes) {
        let size = human(u64::try_from(layer.size).unwrap_or(0));
        let media_type = shown(&layer.media_type);
        let index = index.as_ref().map(|authority| format!("  index: {authority}"));
        say!(
            "layer     {} {size:>9}  {media_type}{}",
            layer.digest,
            index.unwrap_or_default()
        );
    }
    for (layer, text) in &oddities {
        say!("odd       {layer} {}", shown(text));
    }
    Ok(())
}
