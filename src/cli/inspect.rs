//! `ocifs inspect`.

use clap::Args;

use super::config::Config;
use super::say;
use super::units::human;
use super::{ImageArgs, open, runtime};

/// Arguments of `inspect`.
#[derive(Debug, Args)]
pub(super) struct InspectArgs {
    #[command(flatten)]
    image: ImageArgs,
    /// Print a JSON object with manifest and config as they are
    #[arg(long)]
    json: bool,
}

pub(super) fn run(config: &Config, args: InspectArgs) -> anyhow::Result<()> {
    let context = open::context(config)?;
    let preparing = open::prepare_and_tell(config, &args.image, &context);
    let (preparation, unconfirmed) = runtime()?.block_on(preparing)?;
    let image = preparation.resolved();
    if args.json {
        let manifest: serde_json::Value = serde_json::from_slice(&image.manifest_document.bytes)?;
        let document: serde_json::Value = serde_json::from_slice(&image.config_document.bytes)?;
        let object = serde_json::json!({
            "image": args.image.image,
            "index_digest": image.index.as_ref().map(|d| d.digest.to_string()),
            "digest": image.manifest_document.digest,
            "manifest": manifest,
            "config": document,
            "unconfirmed": unconfirmed,
        });
        say!("{}", serde_json::to_string_pretty(&object)?);
        return Ok(());
    }
    say!("image     {}", args.image.image);
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
            say!("{label:<9} {text}");
        }
    }
    for variable in &run.env {
        say!("env       {variable}");
    }
    for layer in image.layers() {
        let size = human(u64::try_from(layer.size).unwrap_or(0));
        say!("layer     {} {size:>9}  {}", layer.digest, layer.media_type);
    }
    Ok(())
}
