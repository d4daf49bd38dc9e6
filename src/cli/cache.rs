//! `ocifs cache`: looking after the store.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, bail};
use clap::Subcommand;
use nix::fcntl::{Flock, FlockArg};

use super::config::Config;
use super::say;
use super::units::{Size, human};
use crate::device::evict_to;
use crate::store::{LayerDir, Store, gone};

/// Commands of `cache`.
#[derive(Debug, Subcommand)]
pub(super) enum CacheCommand {
    /// Show the layers in the store and what they take
    List {
        /// Print a JSON array
        #[arg(long)]
        json: bool,
    },
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
            let evicted = evict_to(&store, to.map_or(config.cache_size, |s| s.0))?;
            eprintln!("{} spans deleted, {} left", evicted.spans, human(evicted.after));
            Ok(())
        }
        CacheCommand::Drop { all } => drop_cache(&store, all),
    }
}

fn list(store: &Store, json: bool) -> anyhow::Result<()> {
    let mut rows = Vec::new();
    for dir in store.layers()? {
        let name = dir
            .path()
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .replacen('-', ":", 1);
        let size = |path: std::path::PathBuf| fs::metadata(path).map_or(0, |m| m.len());
        let index = size(dir.spans()) + size(dir.toc()) + size(dir.extents());
        rows.push((name, index, dir.data_usage()));
    }
    rows.sort_by(|a, b| b.2.cmp(&a.2).then_with(|| a.0.cmp(&b.0)));
    if json {
        let object = |(layer, index, data): &(String, u64, u64)| serde_json::json!({"layer": layer, "index_bytes": index, "data_bytes": data});
        say!("{}", serde_json::Value::from_iter(rows.iter().map(object)));
        return Ok(());
    }
    say!("{:<72} {:>10} {:>10}", "LAYER", "INDEX", "DATA");
    for (layer, index, data) in &rows {
        say!("{layer:<72} {:>10} {:>10}", human(*index), human(*data));
    }
    let (index, data) = rows.iter().fold((0, 0), |(i, d), row| (i + row.1, d + row.2));
    say!(
        "{:<72} {:>10} {:>10}",
        format!("{} layers", rows.len()),
        human(index),
        human(data)
    );
    Ok(())
}

/// Data of mounted images goes too: whatever a mount reads next it fetches again.
fn drop_cache(store: &Store, all: bool) -> anyhow::Result<()> {
    let evicted = evict_to(store, 0)?;
    let root = store.root().context("no store")?;
    let mut busy = 0;
    if all {
        for dir in store.layers()? {
            busy += usize::from(!remove_layer(&dir)?);
        }
        for directory in ["trees", "documents", "profiles"] {
            empty(&root.join(directory))?;
        }
    }
    eprintln!(
        "{} of data deleted",
        human(evicted.before.saturating_sub(evicted.after))
    );
    match busy {
        0 => Ok(()),
        n => bail!("{n} layers are being fetched at the moment and stay"),
    }
}

/// Removes a layer's directory unless somebody is indexing it.
fn remove_layer(dir: &LayerDir) -> anyhow::Result<bool> {
    match Flock::lock(dir.lock_file()?, FlockArg::LockExclusiveNonblock) {
        Err(_) => Ok(false),
        Ok(_lock) => {
            fs::remove_dir_all(dir.path()).with_context(|| format!("{}", dir.path().display()))?;
            Ok(true)
        }
    }
}

fn empty(directory: &Path) -> anyhow::Result<()> {
    for entry in fs::read_dir(directory).with_context(|| format!("{}", directory.display()))? {
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
