//! `ocifs cache`: lists, checks and shrinks the store.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::SystemTime;

use anyhow::{Context as _, bail};
use clap::Subcommand;

use super::config::Config;
use super::images::{self, rfc3339};
use super::json::versioned;
use super::open;
use super::text::shown;
use super::units::{Size, human};
use super::{Fetching, ImageArgs, ImageName, say};
use ocifs::device::{Scope, evict_to};
use ocifs::image::{self, Inventory};
use ocifs::layer::kept_in;
use ocifs::os::gone;
use ocifs::store::Store;

/// Commands of `cache`.
#[derive(Debug, Subcommand)]
pub(super) enum CacheCommand {
    /// Show the layers in the store and what they take
    ///
    /// DATA is content of files that was fetched, on disk. It is kept unpacked, so that reads need no decoding, and takes more
    /// than the compressed bytes that it came from. These are in the column FROM.
    List {
        /// Print a JSON array
        #[arg(long)]
        json: bool,
    },
    /// Compare all that the store has with its checksums; what is damaged is removed, and fetched again when it is needed
    ///
    /// Exits with 1 if anything was damaged.
    Verify {
        /// Only what belongs to this image, as it was named when it was mounted or pulled
        image: Option<ImageName>,
        /// Platform of the image, as OS/ARCH[/VARIANT] [default: this machine's]
        #[arg(long, value_name = "PLATFORM")]
        platform: Option<String>,
        /// Print a JSON object
        #[arg(long)]
        json: bool,
    },
    /// Remove images from the store
    ///
    /// An image's indexes, trees and data are removed, unless another image has the layer too. If another name means the same image,
    /// only the name is removed. What is known of the starts of programs stays (`ocifs profile`), because it serves other versions of
    /// the image.
    Rm(images::RmArgs),
    /// Delete least recently used data down to a size
    Prune {
        /// What may stay [default: --cache-size]
        #[arg(long, value_name = "SIZE")]
        to: Option<Size>,
    },
    /// Delete all cached data; indexes and trees stay, so that images stay quick to mount
    Drop {
        /// Delete indexes, trees, profiles and manifests too
        #[arg(long)]
        all: bool,
    },
}

pub(super) fn run(config: &Config, command: CacheCommand) -> anyhow::Result<()> {
    let store = Store::open(&config.store)?;
    match command {
        CacheCommand::List { json } => list(&store, json),
        CacheCommand::Prune { to } => {
            let evicted = evict_to(&store, to.map_or(config.cache_size, |s| s.0), Scope::Cache)?;
            if !config.quiet {
                eprintln!("{} deleted, {} left", human(evicted.freed()), human(evicted.after));
            }
            Ok(())
        }
        CacheCommand::Verify { image, platform, json } => {
            let image = image.map(|image| ImageArgs {
                image,
                platform,
                pull: None,
                layers: None,
            });
            verify(config, &store, image.as_ref(), json)
        }
        CacheCommand::Rm(args) => images::rm(config, &store, &args),
        CacheCommand::Drop { all } => drop_cache(config, &store, all),
    }
}

fn list(store: &Store, json: bool) -> anyhow::Result<()> {
    let inventory = Inventory::read(store)?;
    let mut rows = Vec::new();
    for dir in store.layers()? {
        let Some(digest) = dir.digest() else { continue };
        let images = || {
            inventory
                .images
                .iter()
                .filter(|image| image.layer_digests().contains(&digest))
        };
        let size = |path: std::path::PathBuf| fs::metadata(path).map_or(0, |m| m.len());
        let index = size(dir.spans()) + size(dir.toc()) + size(dir.extents());
        rows.push(Row {
            layer: digest.to_string(),
            images: images().flat_map(|image| image.names.clone()).collect(),
            last_used: images().filter_map(|image| image.last_used).max(),
            fetched: if dir.is_indexed() {
                kept_in(store, &dir, &digest).bytes
            } else {
                0
            },
            authority: dir.is_indexed().then(|| dir.authority()),
            index,
            data: dir.data_usage(),
            unfinished: dir.partial_usage() + store.drafts_usage(&dir),
        });
    }
    rows.sort_by(|a, b| b.data.cmp(&a.data).then_with(|| a.layer.cmp(&b.layer)));
    if json {
        let object = |row: &Row| {
            serde_json::json!({
                "layer": row.layer, "images": row.images, "last_used": row.last_used.map(rfc3339),
                "authority": row.authority, "index_bytes": row.index, "data_bytes": row.data,
                "compressed_bytes": row.fetched, "unfinished_bytes": row.unfinished,
            })
        };
        say!("{}", versioned(serde_json::Value::from_iter(rows.iter().map(object)))?);
        return Ok(());
    }
    say!(
        "{:<72} {:>10} {:>10} {:>10} {:>10}  AUTHORITY",
        "LAYER",
        "INDEX",
        "DATA",
        "FROM",
        "UNFINISHED"
    );
    let sum = |bytes: fn(&Row) -> u64| rows.iter().map(bytes).sum();
    let total = Row {
        layer: format!("{} layers", rows.len()),
        images: BTreeSet::new(),
        last_used: None,
        fetched: sum(|row| row.fetched),
        authority: None,
        index: sum(|row| row.index),
        data: sum(|row| row.data),
        unfinished: sum(|row| row.unfinished),
    };
    for row in rows.iter().chain([&total]) {
        let [index, data, fetched, unfinished] = [row.index, row.data, row.fetched, row.unfinished].map(human);
        let authority = row.authority.as_deref().map(|text| format!("  {}", shown(text)));
        say!(
            "{:<72} {index:>10} {data:>10} {fetched:>10} {unfinished:>10}{}",
            row.layer,
            authority.unwrap_or_default()
        );
        let last_used = row.last_used.map(|time| format!("  last used {}", rfc3339(time)));
        for (name, last_used) in row
            .images
            .iter()
            .zip(last_used.into_iter().chain(std::iter::repeat(String::new())))
        {
            say!("  {}{last_used}", shown(name));
        }
    }
    Ok(())
}

/// Bytes that a layer takes in the store.
struct Row {
    layer: String,
    /// Names of the images that have it.
    images: BTreeSet<String>,
    /// When one of these was last mounted or asked for.
    last_used: Option<SystemTime>,
    /// Compressed bytes that the data came from.
    fetched: u64,
    /// Who vouches for the index, if there is one.
    authority: Option<String>,
    index: u64,
    data: u64,
    /// Bytes of a layer whose first pass did not finish or is running.
    unfinished: u64,
}

fn verify(config: &Config, store: &Store, image: Option<&ImageArgs>, json: bool) -> anyhow::Result<()> {
    let resolved = match image {
        None => None,
        Some(args) => {
            let context = open::context(config)?;
            // Does not call `Fetching::run`, which handles signals: a signal ends the checks that follow as it ends
            // any program.
            let recalled = Fetching::new()?.runtime().block_on(async {
                let named = open::named(config, args, &context.store).await?;
                anyhow::Ok(named.recall().await)
            })?;
            let known = recalled.with_context(|| format!("the store does not know the image {}", args.image))?;
            Some(known.resolved().clone())
        }
    };
    let report = image::verify(store, resolved.as_deref(), |dir| {
        tracing::info!(layer = %dir.path().display(), "checking");
    })?;
    if json {
        say!("{}", versioned(&report)?);
    } else {
        say!(
            "sound: {} documents, {} trees, {} layers, {} spans of data ({})",
            report.documents,
            report.trees,
            report.layers,
            report.spans,
            human(report.bytes)
        );
        for path in &report.removed {
            say!("damaged and removed: {}", path.display());
        }
        if report.dropped_spans > 0 {
            say!("damaged and dropped: {} spans of data", report.dropped_spans);
        }
        for unchecked in &report.unchecked {
            say!("not checked: {}: {}", unchecked.path.display(), unchecked.reason);
        }
    }
    if !report.unchecked.is_empty() {
        bail!("some of the store could not be checked");
    }
    if !report.is_sound() {
        bail!("some of the store was damaged; what was removed is fetched again when it is needed");
    }
    Ok(())
}

/// Deletes all cached data, with `all` the rest of the store too. The data of mounted images is deleted as well:
/// their mounts fetch again what they read next.
fn drop_cache(config: &Config, store: &Store, all: bool) -> anyhow::Result<()> {
    let evicted = evict_to(store, 0, Scope::Data)?;
    let root = store.root().context("no store")?;
    let mut busy = 0;
    if all {
        for dir in store.layers()? {
            busy += usize::from(dir.remove()?.is_none());
        }
        for directory in ["trees", "documents", "profiles", "notes"] {
            empty(&root.join(directory))?;
        }
    }
    if !config.quiet {
        eprintln!("{} of data deleted", human(evicted.freed()));
    }
    match busy {
        0 => Ok(()),
        1 => bail!("1 layer is being fetched at the moment and stays"),
        n => bail!("{n} layers are being fetched at the moment and stay"),
    }
}

fn empty(directory: &Path) -> anyhow::Result<()> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        entries => entries.with_context(|| format!("{}", directory.display()))?,
    };
    for entry in entries {
        let path = entry?.path();
        let removed = if path.is_dir() {
            fs::remove_dir_all(&path)
        } else {
            fs::remove_file(&path)
        };
        gone(removed).with_context(|| format!("{}", path.display()))?;
    }
    Ok(())
}
