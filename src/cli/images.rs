//! `ocifs images` and `ocifs cache rm`: the images in the store.

use std::collections::{HashMap, HashSet};
use std::time::SystemTime;

use anyhow::{Context as _, bail};
use clap::Args;

use super::config::Config;
use super::json::versioned;
use super::mounts::block_on;
use super::say;
use super::text::{in_error, shown};
use super::units::human;
use ocifs::image::{Inventory, Removal, RemovedImages, StoredImage};
use ocifs::layer::{KeptOfLayer, kept_of_layer};
use ocifs::mount::{self, MountState, MountStatus, RunDir};
use ocifs::oci::{Digest, ImageRef};
use ocifs::store::Store;

/// Arguments of `images`.
#[derive(Debug, Args)]
pub(super) struct ImagesArgs {
    /// Print a JSON array
    #[arg(long)]
    json: bool,
}

/// Arguments of `cache rm`.
#[derive(Debug, Args)]
pub(super) struct RmArgs {
    /// Images, as `ocifs images` shows them: names, or digests of manifests
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<String>,
    /// Remove images that are mounted too; their mounts fetch again what they read next
    #[arg(long)]
    force: bool,
    /// Print a JSON object for each image
    #[arg(long)]
    json: bool,
}

/// Returns the mounts and disks of this user that use the store. A process that does not say which store it has may use it.
fn mounts(store: &Store) -> anyhow::Result<Vec<MountStatus>> {
    let mut mounts = block_on(mount::list(&RunDir::open()?))??;
    let own = store.root().map(|root| root.display().to_string());
    mounts.retain(|mount| mount.state != MountState::Dead && (mount.store.is_none() || mount.store == own));
    Ok(mounts)
}

/// Formats a time as RFC 3339.
pub(super) fn rfc3339(time: SystemTime) -> String {
    humantime::format_rfc3339_seconds(time).to_string()
}

/// How much of each layer is in the store. Each layer is looked at once.
struct Kept<'a> {
    store: &'a Store,
    known: HashMap<Digest, KeptOfLayer>,
}

impl Kept<'_> {
    fn of(&mut self, layer: &Digest) -> KeptOfLayer {
        let store = self.store;
        *self
            .known
            .entry(layer.clone())
            .or_insert_with(|| kept_of_layer(store, layer))
    }
}

/// What is shown of an image.
struct Shown {
    size: u64,
    local: u64,
    indexed: usize,
    /// Bytes on disk.
    disk: u64,
    /// Bytes on disk that no other image uses.
    own: u64,
    mounts: Vec<String>,
}

pub(super) fn images(config: &Config, args: &ImagesArgs) -> anyhow::Result<()> {
    let store = Store::open(&config.store)?;
    let inventory = Inventory::read(&store)?;
    let mounts = mounts(&store)?;
    let dirs = store.layers()?;
    let mut usage: HashMap<Digest, u64> = HashMap::new();
    let mut indexed = HashSet::new();
    for dir in &dirs {
        let Some(digest) = dir.digest() else { continue };
        if dir.is_indexed() {
            indexed.insert(digest.clone());
        }
        *usage.entry(digest).or_default() += dir.usage();
    }
    let mut kept = Kept {
        store: &store,
        known: HashMap::new(),
    };
    let trees = store.trees()?;
    let mut rows = Vec::new();
    for image in &inventory.images {
        let layers = image.layer_digests();
        let sizes: HashMap<&Digest, i64> = image.layers.iter().map(|layer| (&layer.digest, layer.size)).collect();
        let of_image = trees
            .iter()
            .filter(|tree| tree.is_of(&image.manifest))
            .map(|tree| tree.bytes)
            .sum::<u64>();
        let removal = inventory.removal(&image.manifest.to_string(), &HashSet::new());
        rows.push(Shown {
            size: sizes.values().map(|&size| u64::try_from(size).unwrap_or(0)).sum(),
            local: layers.iter().map(|layer| kept.of(layer).bytes).sum(),
            indexed: layers.iter().filter(|layer| indexed.contains(**layer)).count(),
            disk: of_image
                + layers
                    .iter()
                    .map(|layer| usage.get(layer).copied().unwrap_or(0))
                    .sum::<u64>(),
            own: removal.map_or(Ok(0), |removal| removal.bytes(&store))?,
            mounts: mounted(&mounts, &image.manifest)
                .map(|mount| mount.mountpoint.clone())
                .collect(),
        });
    }
    match args.json {
        true => print_json(&inventory.images, &rows),
        false => print(&inventory.images, &rows),
    }
}

/// The mounts of the image with this manifest.
fn mounted<'a>(mounts: &'a [MountStatus], manifest: &Digest) -> impl Iterator<Item = &'a MountStatus> {
    let manifest = manifest.to_string();
    mounts.iter().filter(move |mount| mount.digest == manifest)
}

fn print_json(images: &[StoredImage], rows: &[Shown]) -> anyhow::Result<()> {
    let objects = images.iter().zip(rows).map(|(image, row)| {
        serde_json::json!({
            "names": image.names, "digest": image.manifest, "platform": image.platform,
            "layers": image.layer_digests().len(), "indexed_layers": row.indexed,
            "size": row.size, "local": row.local, "disk_bytes": row.disk, "own_bytes": row.own,
            "last_used": image.last_used.map(rfc3339), "mounts": row.mounts,
        })
    });
    say!("{:#}", versioned(serde_json::Value::from_iter(objects))?);
    Ok(())
}

fn print(images: &[StoredImage], rows: &[Shown]) -> anyhow::Result<()> {
    say!(
        "{:<44} {:<19} {:>9} {:>7} {:>9} {:>9} {:>9}  LAST USE",
        "IMAGE",
        "DIGEST",
        "SIZE",
        "INDEXED",
        "LOCAL",
        "ON DISK",
        "ALONE"
    );
    for (image, row) in images.iter().zip(rows) {
        let mut names = image.names.iter().map(|name| shown(name));
        let digest = image.manifest.to_string();
        say!(
            "{:<44} {:<19} {:>9} {:>7} {:>9} {:>9} {:>9}  {}",
            names.next().unwrap_or_else(|| "<none>".to_owned()),
            digest.get(..19).unwrap_or(&digest),
            human(row.size),
            format!("{}/{}", row.indexed, image.layer_digests().len()),
            human(row.local),
            human(row.disk),
            human(row.own),
            image.last_used.map_or("unknown".to_owned(), rfc3339),
        );
        for name in names {
            say!("{name}");
        }
        for mountpoint in &row.mounts {
            say!("  mounted on {}", shown(mountpoint));
        }
    }
    Ok(())
}

pub(super) fn rm(config: &Config, store: &Store, args: &RmArgs) -> anyhow::Result<()> {
    for image in &args.images {
        // Each removal changes which layers the next image has alone.
        let inventory = Inventory::read(store)?;
        let removal = removal(store, &inventory, image, args.force)?;
        let removed = removal.carry_out(store)?;
        report(config, args, image, &removal, removed)?;
        if removed.busy > 0 {
            bail!(
                "{} layers of {} are being fetched at the moment and stay",
                removed.busy,
                in_error(image)
            );
        }
    }
    Ok(())
}

/// Returns what is to be removed for an image. Fails if that takes data from a mount.
fn removal(store: &Store, inventory: &Inventory, image: &str, force: bool) -> anyhow::Result<Removal> {
    let whole: Option<String> = image.parse::<ImageRef>().ok().map(|reference| reference.to_string());
    let names: Vec<&str> = [Some(image), whole.as_deref()].into_iter().flatten().collect();
    let find = |in_use: &HashSet<Digest>| names.iter().find_map(|name| inventory.removal(name, in_use));
    let unknown = || {
        format!(
            "the store does not know the image {} (`ocifs images` shows those that it knows)",
            in_error(image)
        )
    };
    let removal = find(&HashSet::new()).with_context(unknown)?;
    let mounts = mounts(store)?;
    let mut taken = removal.images.iter().flat_map(|manifest| mounted(&mounts, manifest));
    if let (Some(mount), false) = (taken.next(), force) {
        bail!(
            "{} is mounted on {}: take it down first, or use --force, and the mount fetches again what it reads next",
            in_error(image),
            in_error(&mount.mountpoint)
        );
    }
    // A mount may have an image whose manifest the store does not have any more.
    let removed: HashSet<String> = removal.images.iter().map(ToString::to_string).collect();
    let others = mounts.iter().filter(|mount| !removed.contains(&mount.digest));
    let layers = others
        .flat_map(|mount| &mount.layers)
        .filter_map(|layer| layer.digest.parse().ok());
    find(&layers.collect()).with_context(unknown)
}

fn report(
    config: &Config,
    args: &RmArgs,
    image: &str,
    removal: &Removal,
    removed: RemovedImages,
) -> anyhow::Result<()> {
    if args.json {
        let object = serde_json::json!({
            "image": image, "names": removal.names, "digests": removal.images, "layers": removal.layers.len(),
            "shared_layers": removal.shared_layers, "freed_bytes": removed.bytes,
        });
        say!("{}", versioned(object)?);
    } else if !config.quiet {
        let shown = shown(image);
        match (removal.images.is_empty(), removal.shared_layers) {
            (true, _) => {
                eprintln!("{shown}: the name is forgotten; the image stays, because another name means it too")
            }
            (false, 0) => eprintln!("{shown}: {} freed", human(removed.bytes)),
            (false, shared) => eprintln!(
                "{shown}: {} freed, {shared} layers stay that other images have",
                human(removed.bytes)
            ),
        }
    }
    Ok(())
}
