//! `ocifs pull`: fetches all of an image into the store.

use anyhow::bail;
use clap::Args;

use super::config::Config;
use super::json::versioned;
use super::open::{context, resolve, watch};
use super::progress::Bar;
use super::say;
use super::units::human;
use super::{Fetching, ImageArgs};
use ocifs::layer::kept_of_layer;

/// Arguments of `pull`.
#[derive(Debug, Args)]
pub(super) struct PullArgs {
    #[command(flatten)]
    image: ImageArgs,
    /// Print a JSON object at the end
    #[arg(long)]
    json: bool,
}

pub(super) fn run(config: &Config, fetching: &Fetching, args: PullArgs) -> anyhow::Result<()> {
    let context = context(config)?;
    if let Some(problem) = context.health.store_problem() {
        bail!("nothing can be kept: {problem}");
    }
    let result = fetching.run(async {
        let opening = resolve(config, &args.image, &context.store).await?;
        let (preparation, unconfirmed) = (opening.preparation, opening.unconfirmed);
        let mut layers = preparation.resolved().layers().iter();
        if let Err(error) = context.store.probe(0)
            && !layers.all(|layer| kept_of_layer(&context.store, &layer.digest).is_whole)
        {
            bail!("nothing can be kept: {error}");
        }
        fetching.begin(&context.store, &preparation);
        let bar = Bar::new(&args.image.image, config.quiet);
        let image = watch(&preparation, &bar, preparation.finish(&context)).await?;
        watch(&preparation, &bar, image.complete()).await?;
        bar.finish();
        let digest = preparation.resolved().manifest_document.digest.to_string();
        anyhow::Ok((digest, preparation.status(), unconfirmed))
    });
    let (digest, layers, unconfirmed) = result?;
    let (size, fetched) = layers.iter().fold((0, 0), |(s, f), l| (s + l.size, f + l.fetched));
    if args.json {
        let object = serde_json::json!({
            "image": &*args.image.image, "digest": digest, "size": size, "fetched": fetched, "layers": layers,
            "unconfirmed": unconfirmed,
        });
        say!("{}", versioned(object)?);
    } else {
        say!("{digest}");
        if !config.quiet {
            let (image, count) = (&args.image.image, layers.len());
            eprintln!("{image}: {count} layers, {}, fetched {}", human(size), human(fetched));
        }
    }
    Ok(())
}
