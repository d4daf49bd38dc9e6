//! What containerd asks of a snapshotter (its `snapshots.Snapshotter`), without the protocol.
//!
//! A layer whose image ocifs can read lazily becomes a committed snapshot at once, and the answer [`SnapshotError::Exists`]
//! tells containerd that nobody has to fetch it. Such a snapshot stands for the mount of the image with all layers up to
//! this one. Every other snapshot has a directory with its changes. What is mounted for a container is an overlay of these
//! directories, down to the first lazy layer, whose mount is the lowest directory.

use std::collections::{BTreeMap, HashSet};
use std::ffi::OsString;
use std::fs::Metadata;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use futures::StreamExt as _;

use super::directories::SnapshotDirs;
use super::error::SnapshotError;
use super::filter::SnapshotFilters;
use super::layer::{CHAIN, LayerQuestion, chain_id};
use super::lazy::LazyImages;
use super::mounts::SharedMounts;
use super::record::{DiskUsage, ImageLayers, SnapshotContent, SnapshotKind, SnapshotRecord};
use super::step::MountStep;
use super::table::SnapshotTable;
use crate::oci::Digest;
use crate::os::private;
use crate::registry::RegistryConfig;
use crate::store::Store;
use crate::task::blocking;

/// How long the root directory of a mount may take to answer. It is in the tree of an image that is ready, so it answers
/// at once unless the machine is in trouble.
const ROOT_PATIENCE: Duration = Duration::from_secs(30);
/// Images that are mounted at the same time after a start. Each takes a process that reads its tree. With more, all of them
/// get on slowly; with fewer, one whose registry hangs holds others up.
const RESTORED: usize = 8;
/// What a snapshotter works with.
#[derive(Debug)]
pub struct SnapshotterConfig {
    /// The directory of the snapshots. It must be able to hold the upper directories of overlays.
    pub root: PathBuf,
    /// An ocifs, which mounts the images.
    pub program: PathBuf,
    /// Arguments of its `mount`, such as `--store DIR`.
    pub arguments: Vec<OsString>,
    /// How registries are asked for manifests.
    pub registry: RegistryConfig,
    /// Where manifests are kept. It should be the store of `arguments`.
    pub store: Store,
}

/// The snapshots of a root, and the images below them.
#[derive(Debug)]
pub struct Snapshotter {
    table: Mutex<SnapshotTable>,
    directories: SnapshotDirs,
    images: LazyImages,
    mounts: SharedMounts,
}

impl Snapshotter {
    /// Opens the snapshots of a root. Fails if another process has them open. Must be called on the runtime.
    pub fn open(config: SnapshotterConfig) -> Result<Arc<Self>, SnapshotError> {
        let root = config.root;
        MountStep::check(&root)?;
        private::directory(&root).map_err(SnapshotError::io(&root))?;
        let table = SnapshotTable::open(&root.join("table.redb"))?;
        let snapshotter = Arc::new(Self {
            table: Mutex::new(table),
            directories: SnapshotDirs::open(root.join("snapshots"))?,
            images: LazyImages::new(config.registry, config.store),
            mounts: SharedMounts::open(root.join("images"), config.program, config.arguments)?,
        });
        snapshotter.remove_orphans()?;
        Ok(snapshotter)
    }

    /// Mounts the images again that snapshots use and that are not mounted, as after a start of the machine. One that is in
    /// trouble is only a line in the log: its containers ask for it again.
    pub async fn restore(&self) {
        let serving = futures::stream::iter(self.used_images());
        let serving = serving.for_each_concurrent(RESTORED, async |image| {
            if let Err(error) = self.mounts.serve(&image).await {
                tracing::warn!(%error, "cannot mount the image of a container again");
            }
        });
        serving.await;
    }

    /// Ends the mounts that no container has used for this time. One that cannot be ended is only a line in the log: it is
    /// tried again the next time.
    pub async fn end_unused(&self, idle: Duration) {
        let is_used = |path: &Path| self.used_images().iter().any(|image| self.mounts.path(image) == path);
        self.end_mounts(|path, unused| unused >= idle && !is_used(path)).await;
    }

    /// Makes an active snapshot, or finds that a layer is there already.
    pub async fn prepare(
        &self,
        key: &str,
        parent: Option<&str>,
        labels: BTreeMap<String, String>,
    ) -> Result<Vec<MountStep>, SnapshotError> {
        if let Some(question) = LayerQuestion::of(&labels)
            && let Some(name) = self.answer(&question, parent, &labels).await?
        {
            return Err(SnapshotError::Exists { name });
        }
        self.create(key, parent, labels, SnapshotKind::Active).await
    }

    /// Makes a snapshot that can only be read.
    pub async fn view(
        &self,
        key: &str,
        parent: Option<&str>,
        labels: BTreeMap<String, String>,
    ) -> Result<Vec<MountStep>, SnapshotError> {
        self.create(key, parent, labels, SnapshotKind::View).await
    }

    /// Returns what has to be mounted for a snapshot that is active or a view.
    pub async fn mounts(&self, key: &str) -> Result<Vec<MountStep>, SnapshotError> {
        let record = self.stat(key)?;
        if record.kind == SnapshotKind::Committed {
            return Err(SnapshotError::State {
                name: key.to_owned(),
                reason: "is committed and cannot be mounted",
            });
        }
        let lowers = self.lowers(record.parent.as_deref()).await?;
        self.steps(&record, &lowers)
    }

    /// Makes a committed snapshot of an active one.
    pub async fn commit(
        self: &Arc<Self>,
        name: &str,
        key: &str,
        labels: BTreeMap<String, String>,
    ) -> Result<(), SnapshotError> {
        let is_active = |record: &SnapshotRecord| match record.kind {
            SnapshotKind::Active => Ok(()),
            SnapshotKind::View | SnapshotKind::Committed => Err(SnapshotError::State {
                name: key.to_owned(),
                reason: "is not active, so it cannot be committed",
            }),
        };
        let record = self.stat(key)?;
        is_active(&record)?;
        let usage = self.scan(record.id).await?;
        self.change(|table| {
            let record = table.get(key)?.clone();
            is_active(&record)?;
            let now = SystemTime::now();
            let committed = SnapshotRecord {
                name: name.to_owned(),
                kind: SnapshotKind::Committed,
                created: now,
                updated: now,
                labels,
                content: SnapshotContent::Changes(Some(usage)),
                ..record
            };
            table.replace(key, committed)
        })
    }

    /// Removes a snapshot, on which no others are made.
    pub async fn remove(self: &Arc<Self>, key: &str) -> Result<(), SnapshotError> {
        let record = self.change(|table| table.remove(key))?;
        match record.image() {
            Some(image) => {
                self.end_without_snapshots(&image.manifest);
                Ok(())
            }
            None => {
                let snapshotter = self.clone();
                blocking(move || snapshotter.directories.remove(record.id)).await?
            }
        }
    }

    /// Returns what is known of a snapshot.
    pub fn stat(&self, key: &str) -> Result<SnapshotRecord, SnapshotError> {
        self.table().get(key).cloned()
    }

    /// Changes labels of a snapshot, and returns it. `fields` names what to change: `labels`, or `labels.` and the name of
    /// one; without any, all labels are changed. A label without a value is removed.
    pub fn update(
        &self,
        name: &str,
        labels: &BTreeMap<String, String>,
        fields: &[String],
    ) -> Result<SnapshotRecord, SnapshotError> {
        let all = ["labels".to_owned()];
        let fields = if fields.is_empty() { &all } else { fields };
        self.change(|table| {
            let mut record = table.get(name)?.clone();
            for field in fields {
                match field.strip_prefix("labels.") {
                    Some(label) => {
                        let value = labels.get(label).cloned().unwrap_or_default();
                        record.labels.insert(label.to_owned(), value);
                    }
                    None if field == "labels" => record.labels = labels.clone(),
                    None => {
                        return Err(SnapshotError::Argument(format!(
                            "field {field:?} of snapshot {name:?} cannot be changed"
                        )));
                    }
                }
            }
            record.labels.retain(|_, value| !value.is_empty());
            record.updated = SystemTime::now();
            table.replace(name, record.clone())?;
            Ok(record)
        })
    }

    /// Returns the snapshots that pass the filters.
    pub fn list(&self, filters: &SnapshotFilters) -> Vec<SnapshotRecord> {
        let table = self.table();
        table.all().filter(|record| filters.hold(record)).cloned().collect()
    }

    /// Returns the disk space of the changes in a snapshot. A layer that is read lazily has none of its own: its data is in
    /// the store, for all images that have it.
    pub async fn usage(self: &Arc<Self>, key: &str) -> Result<DiskUsage, SnapshotError> {
        let record = self.stat(key)?;
        match record.content {
            SnapshotContent::Changes(Some(usage)) => Ok(usage),
            SnapshotContent::Changes(None) => self.scan(record.id).await,
            SnapshotContent::Image(_) => Ok(DiskUsage::default()),
        }
    }

    /// Removes what killed processes have left.
    pub async fn cleanup(self: &Arc<Self>) -> Result<(), SnapshotError> {
        let snapshotter = self.clone();
        blocking(move || snapshotter.remove_orphans()).await?
    }

    fn table(&self) -> MutexGuard<'_, SnapshotTable> {
        self.table.lock().expect("no panic while locked")
    }

    /// Changes the table, which waits for the disk.
    fn change<T>(&self, work: impl FnOnce(&mut SnapshotTable) -> T) -> T {
        tokio::task::block_in_place(|| work(&mut self.table()))
    }

    fn remove_orphans(&self) -> Result<(), SnapshotError> {
        // A snapshot is in the table before it has a directory. So each directory that was found is in the table now, or
        // has no snapshot any more.
        self.directories
            .remove_others(|| self.table().all().map(|record| record.id).collect())
    }

    async fn scan(self: &Arc<Self>, id: u64) -> Result<DiskUsage, SnapshotError> {
        let snapshotter = self.clone();
        blocking(move || snapshotter.directories.usage(id)).await?
    }

    /// Returns the images that active snapshots and views use.
    fn used_images(&self) -> HashSet<ImageLayers> {
        let table = self.table();
        let used = table.all().filter(|record| record.kind != SnapshotKind::Committed);
        let below = used.filter_map(|record| {
            let chain = table.chain(&record.name).ok()?;
            chain.into_iter().find_map(SnapshotRecord::image).cloned()
        });
        below.collect()
    }

    /// Ends the mounts of an image that no snapshot stands for any more.
    fn end_without_snapshots(self: &Arc<Self>, manifest: &Digest) {
        let has_snapshots = |snapshotter: &Self| {
            let table = snapshotter.table();
            let mut images = table.all().filter_map(SnapshotRecord::image);
            images.any(|image| image.manifest == *manifest)
        };
        if has_snapshots(self) {
            return;
        }
        let (snapshotter, manifest) = (self.clone(), manifest.clone());
        tokio::spawn(async move {
            snapshotter
                .end_mounts(|path, _| SharedMounts::is_of(path, &manifest))
                .await
        });
    }

    /// Ends the mounts that `choose` chooses by their directory and by the time since somebody wanted them.
    async fn end_mounts(&self, choose: impl Fn(&Path, Duration) -> bool) {
        let all = self.mounts.all().unwrap_or_else(|error| {
            tracing::warn!(%error, "cannot list the mounts of images");
            Vec::new()
        });
        for (path, unused) in all {
            if choose(&path, unused)
                && let Err(error) = self.mounts.end(&path).await
            {
                tracing::warn!(%error, "cannot end the mount of an image");
            }
        }
    }

    /// Returns the name of the snapshot of a layer, if nobody has to fetch the layer.
    async fn answer(
        &self,
        question: &LayerQuestion,
        parent: Option<&str>,
        labels: &BTreeMap<String, String>,
    ) -> Result<Option<String>, SnapshotError> {
        let below = {
            let table = self.table();
            if let Some(name) = existing(&table, &question.chain, parent) {
                return Ok(Some(name));
            }
            match parent {
                Some(parent) => {
                    table.check_parent(parent)?;
                    table.chain(parent)?.len()
                }
                None => 0,
            }
        };
        let Some(diff_ids) = self.images.diff_ids(question).await else {
            return Ok(None);
        };
        let layers = below + 1;
        let chain = diff_ids.get(..layers).and_then(chain_id);
        if chain.as_ref() != Some(&question.chain) {
            self.images
                .give_up(question, &"its layers are not those that containerd asks for");
            return Ok(None);
        }
        let reference = question.reference.to_string();
        let manifest = question.manifest.clone();
        let whole = ImageLayers {
            reference: reference.clone(),
            manifest: manifest.clone(),
            layers: diff_ids.len(),
        };
        if let Err(error) = self.mounts.serve(&whole).await {
            self.images.give_up(question, &error);
            return Ok(None);
        }
        self.change(|table| {
            if let Some(name) = existing(table, &question.chain, parent) {
                return Ok(Some(name));
            }
            let (id, now) = (table.next_id(), SystemTime::now());
            let name = format!("{}-{id}", question.chain);
            table.insert(SnapshotRecord {
                name: name.clone(),
                parent: parent.map(str::to_owned),
                kind: SnapshotKind::Committed,
                id,
                created: now,
                updated: now,
                labels: labels.clone(),
                content: SnapshotContent::Image(ImageLayers {
                    reference,
                    manifest,
                    layers,
                }),
            })?;
            Ok(Some(name))
        })
    }

    async fn create(
        &self,
        key: &str,
        parent: Option<&str>,
        labels: BTreeMap<String, String>,
        kind: SnapshotKind,
    ) -> Result<Vec<MountStep>, SnapshotError> {
        let record = self.change(|table| {
            let (id, now) = (table.next_id(), SystemTime::now());
            let record = SnapshotRecord {
                name: key.to_owned(),
                parent: parent.map(str::to_owned),
                kind,
                id,
                created: now,
                updated: now,
                labels,
                content: SnapshotContent::Changes(None),
            };
            // It is in the table before its image is mounted, so that the image counts as used.
            table.insert(record.clone())?;
            Ok::<_, SnapshotError>(record)
        })?;
        let made = async {
            let lowers = self.lowers(parent).await?;
            let below = match lowers.first() {
                Some(lower) => Some(attributes(lower.clone()).await?),
                None => None,
            };
            tokio::task::block_in_place(|| self.directories.create(record.id, below.as_ref()))?;
            self.steps(&record, &lowers)
        };
        let made = made.await;
        if made.is_err() {
            let undone = self
                .table()
                .remove(key)
                .and_then(|_| self.directories.remove(record.id));
            if let Err(error) = undone {
                tracing::warn!(%error, "cannot remove a snapshot that could not be made");
            }
        }
        made
    }

    /// Returns the directories below a snapshot, the topmost first. Mounts the image that the lowest is a mount of.
    async fn lowers(&self, parent: Option<&str>) -> Result<Vec<PathBuf>, SnapshotError> {
        let Some(parent) = parent else {
            return Ok(Vec::new());
        };
        let (mut lowers, mut image) = (Vec::new(), None);
        for record in self.table().chain(parent)? {
            if let Some(found) = record.image() {
                image = Some(found.clone());
                break;
            }
            lowers.push(self.directories.changes(record.id));
        }
        if let Some(image) = image {
            lowers.push(self.mounts.serve(&image).await?);
        }
        Ok(lowers)
    }

    fn steps(&self, record: &SnapshotRecord, lowers: &[PathBuf]) -> Result<Vec<MountStep>, SnapshotError> {
        let changes = self.directories.changes(record.id);
        let is_view = record.kind == SnapshotKind::View;
        let step = match lowers {
            [] => MountStep::bind(&changes, !is_view),
            [only] if is_view => MountStep::bind(only, false),
            lowers if is_view => MountStep::overlay(lowers, None),
            lowers => MountStep::overlay(lowers, Some((&changes, &self.directories.work(record.id)))),
        };
        Ok(vec![step?])
    }
}

/// Returns the name of the committed snapshot that completes this chain on this parent.
fn existing(table: &SnapshotTable, chain: &str, parent: Option<&str>) -> Option<String> {
    let mut all = table.all();
    let found = all.find(|record| {
        record.kind == SnapshotKind::Committed
            && record.parent.as_deref() == parent
            && record.labels.get(CHAIN).is_some_and(|other| other == chain)
    });
    found.map(|record| record.name.clone())
}

/// Returns the attributes of a directory, which may be the root of a mount.
async fn attributes(path: PathBuf) -> Result<Metadata, SnapshotError> {
    let shown = path.display().to_string();
    let asking = blocking(move || std::fs::symlink_metadata(&path).map_err(SnapshotError::io(&path)));
    match tokio::time::timeout(ROOT_PATIENCE, asking).await {
        Ok(found) => found?,
        Err(_) => Err(SnapshotError::Image {
            image: shown,
            reason: format!("it does not answer within {} s", ROOT_PATIENCE.as_secs()),
        }),
    }
}
