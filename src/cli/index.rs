//! `ocifs index`: makes, publishes and checks indexes of layers for other hosts.

mod push;
mod verify;

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::bail;
use clap::{Args, Subcommand};

use super::config::Config;
use super::open::{context, resolve, watch};
use super::progress::Bar;
use super::{Fetching, ImageArgs};
use ocifs::image::Image;
use ocifs::layer::{Layer, LayerContext};
use ocifs::published::Locations;
use ocifs::store::Authority;

/// Commands of `index`.
#[derive(Debug, Subcommand)]
pub(super) enum IndexCommand {
    /// Write the indexes of an image's layers, and the profiles of its starts, to a directory
    ///
    /// Layers that this host has not seen are streamed once. The same layer has the same index on every host, byte for byte.
    Build(BuildArgs),
    /// Put the indexes of an image's layers, and the profiles of its starts, into a directory or a repository
    ///
    /// Files that are there keep their signatures. An index that is no index of its layer is not pushed.
    Push(PushArgs),
    /// Compare the indexes at the index locations with those that a pass on this host makes
    ///
    /// All locations are asked. What the store keeps from them is compared too. An index that differs is removed from the
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
    /// Overwrite indexes at the location that have other bytes, and their signatures
    #[arg(long)]
    replace: bool,
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
        IndexCommand::Build(args) => push::build(config, fetching, &args),
        IndexCommand::Push(args) => push::push(config, fetching, &args),
        IndexCommand::Verify(args) => verify::verify(config, fetching, &args),
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
