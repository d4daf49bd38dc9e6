//! An image opened for reading: its merged tree and its layers.
//!
//! A [`Preparation`] knows manifest and config, which is enough to mount. [`Preparation::finish`] opens all layers
//! side by side, from the store or by streaming each once. Then `finish` merges their tables into the tree, unless
//! the store has the tree of this manifest.
//!
//! Invariants: manifest and config are verified; a layer in use was verified against its digest and diffID, here or by the
//! process that put its index into the store; the tree is made from such layers only.

mod early;
mod kept;
mod learning;
mod prefetch;
mod programs;
mod tree_file;
mod verify;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use futures::StreamExt as _;
use tokio::runtime::Handle;
use tokio::sync::{OnceCell, watch};

pub use early::{Early, Replay};
pub use kept::{Confirm, KeptSource, Unconfirmed};
pub use learning::{Learning, stored as stored_profile};
pub use verify::{StoreReport, Unchecked, verify};

use self::prefetch::Layers;
use self::programs::Programs;
use crate::blob::{BlobError, BlobSource, ImageSource, Link};
use crate::device::DeviceError;
use crate::erofs::{ErofsError, Reader};
use crate::layer::{
    self, FirstPassError, Health, Layer, LayerContext, LayerError, LayerStats, LayerStatus, OpenError, Opened,
};
use crate::memory::{Allowance, Charge, OverLimit};
use crate::oci::{Descriptor, DiffId, Digest};
use crate::profile::{Profile, Recorder};
use crate::resolve::ResolvedImage;
use crate::store::{Store, StoreError};
use crate::toc::PackedToc;
use crate::tree::{LayerIdx, Merger, Tree, TreeError};

/// Layers that are being opened at a time. Each has a few files open meanwhile, of which a process may not have many.
const OPENING: usize = 64;

/// Why an image cannot be made readable.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// A blob could not be had.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// A layer could not be opened.
    #[error(transparent)]
    Layer(#[from] OpenError),
    /// The layers do not fit together.
    #[error("cannot merge the layers: {0}")]
    Merge(#[from] TreeError),
    /// The tree could not be written or read back.
    #[error("cannot build the tree: {0}")]
    Tree(#[from] ErofsError),
    /// The tree is larger than may be held in memory.
    #[error("the tree of the image takes {0}")]
    TooMuchMemory(#[from] OverLimit),
    /// The tree could not be read from the store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A data device could not be read.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The program is shutting down.
    #[error("interrupted")]
    Interrupted,
}

/// What an image does that is being prepared.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Activity {
    /// Compressed bytes that have come.
    pub bytes: u64,
    /// How often other processes, which stream some of the layers, have shown that they get on: about once a second each.
    pub beats: u64,
    /// This machine has something to do: it decodes what has come, or merges the layers.
    pub working: bool,
    /// Bytes per second that are worth waiting for, as the links to the layers are.
    pub useful_rate: f64,
}

/// An image whose manifest and config are known.
#[derive(Debug)]
pub struct Preparation {
    source: Arc<dyn ImageSource>,
    resolved: Arc<ResolvedImage>,
    stats: HashMap<Digest, Arc<LayerStats>>,
    /// Those that were opened.
    blobs: Mutex<HashMap<Digest, Arc<dyn BlobSource>>>,
    /// The layers, once they are open.
    layers: watch::Sender<Option<Arc<Layers>>>,
    merging: AtomicBool,
    image: OnceCell<Arc<Image>>,
}

impl Preparation {
    /// Nothing is fetched yet.
    pub fn new(source: Arc<dyn ImageSource>, resolved: ResolvedImage) -> Self {
        let stats = resolved.layers().iter().map(|d| {
            let size = u64::try_from(d.size).unwrap_or(0);
            (d.digest.clone(), Arc::new(LayerStats::new(size)))
        });
        Self {
            source,
            stats: stats.collect(),
            blobs: Mutex::default(),
            layers: watch::Sender::new(None),
            merging: AtomicBool::new(false),
            image: OnceCell::new(),
            resolved: Arc::new(resolved),
        }
    }

    /// Manifest, config and layer descriptors.
    pub fn resolved(&self) -> &Arc<ResolvedImage> {
        &self.resolved
    }

    /// What this image has in common with its other versions.
    pub fn repository(&self) -> String {
        self.source.repository()
    }

    /// Counters per layer, base first, before there is an image.
    pub fn status(&self) -> Vec<LayerStatus> {
        let layers = self.resolved.layers().iter();
        layers
            .map(|d| self.stats[&d.digest].snapshot(d.digest.to_string(), 0, (0, 0)))
            .collect()
    }

    /// What it does at the moment.
    pub fn activity(&self) -> Activity {
        let stats = self.stats.values();
        let blobs = self.blobs.lock().expect("no panic while locked");
        Activity {
            bytes: stats.clone().map(|s| s.fetched()).sum(),
            beats: stats.clone().map(|s| s.beats()).sum(),
            working: self.merging.load(Ordering::Relaxed) || stats.clone().any(|s| s.is_working()),
            useful_rate: blobs.values().map(|b| b.link().useful_rate()).fold(0.0, f64::max),
        }
    }

    /// Why layers do not come that are asked for again.
    pub fn trouble(&self) -> Option<String> {
        self.stats.values().find_map(|stats| stats.trouble())
    }

    /// The layers, as soon as [`Preparation::finish`] has opened them.
    async fn layers(&self) -> Arc<Layers> {
        let mut layers = self.layers.subscribe();
        let opened = layers.wait_for(Option::is_some).await;
        let opened = opened.expect("the sender is this preparation's");
        opened.clone().expect("that was waited for")
    }

    /// Opens all layers and the tree, once: whoever asks meanwhile waits for the same image. A stored table of contents that
    /// is damaged is made again.
    pub async fn finish(&self, context: &LayerContext) -> Result<Arc<Image>, ImageError> {
        let opening = || async { self.open(context).await.map(Arc::new) };
        self.image.get_or_try_init(opening).await.cloned()
    }

    async fn open(&self, context: &LayerContext) -> Result<Image, ImageError> {
        // Each layer's table can be damaged, and each is made again once.
        for _ in self.resolved.layers() {
            match self.assemble(context).await {
                Err(ImageError::Layer(OpenError::Toc { layer, reason })) => {
                    tracing::warn!(%layer, reason, "cannot use the stored table of contents, making it again");
                    if let Some(dir) = context.store.layer(&layer) {
                        dir.forget()?;
                    }
                }
                result => return result,
            }
        }
        self.assemble(context).await
    }

    async fn assemble(&self, context: &LayerContext) -> Result<Image, ImageError> {
        let manifest = self.resolved.manifest_document.digest.clone();
        // The tree is read and checked while the layers are opened.
        let (store, of) = (context.store.clone(), manifest.clone());
        let reading = tokio::task::spawn_blocking(move || tree_file::read(&store, &of));
        let mut opened = self.open_layers(context).await?;
        let layers = self.resolved.layers().iter();
        let layers = Arc::new(Layers::new(layers.map(|d| opened[&d.digest].layer.clone()).collect()));
        self.layers.send_replace(Some(layers.clone()));
        let stored = reading.await.map_err(|_| ImageError::Interrupted)?;
        let sizes: Vec<u64> = layers.all.iter().map(|l| l.device_size()).collect();
        let order: Vec<Digest> = self.resolved.layers().iter().map(|d| d.digest.clone()).collect();
        let tocs: Tocs = opened.drain().map(|(digest, o)| (digest, o.toc)).collect();
        let (store, budget, tables) = (context.store.clone(), context.budget.clone(), context.tables.clone());
        self.merging.store(true, Ordering::Relaxed);
        let building = tokio::task::spawn_blocking(move || {
            let tree = match stored.and_then(|stored| stored.open(&store, &sizes)) {
                Some(tree) => tree,
                None => {
                    let made = tree_file::make(&store, &budget, &manifest, &sizes, &tables, || {
                        merge(&store, &order, &tocs, &tables)
                    });
                    drop(tocs);
                    made?
                }
            };
            let mut charge = tables.charge();
            charge.exactly(tree.image().len() as u64)?;
            let programs = programs(&store, &manifest, &tree, &order);
            Ok::<_, ImageError>((tree, charge, programs))
        });
        let built = building.await;
        self.merging.store(false, Ordering::Relaxed);
        let (tree, charge, programs) = built.map_err(|_| ImageError::Interrupted)??;
        Ok(Image {
            resolved: self.resolved.clone(),
            tree,
            _charge: charge,
            layers,
            programs,
            eager: AtomicBool::new(false),
            runtime: Handle::current(),
            health: context.health.clone(),
        })
    }

    /// The largest layer starts first, because it ends last; the small ones then fill the other places.
    async fn open_layers(&self, context: &LayerContext) -> Result<HashMap<Digest, Opened>, ImageError> {
        let mut order: Vec<usize> = (0..self.resolved.layers().len()).collect();
        order.sort_by_key(|&i| self.resolved.layers()[i].size);
        let largest = usize::from(!order.is_empty());
        order.rotate_right(largest);
        let mut wanted = Vec::new();
        let mut seen: HashMap<Digest, &DiffId> = HashMap::new();
        for i in order {
            let descriptor = self.resolved.layers()[i].clone();
            let diff_id = &self.resolved.diff_ids()[i];
            match seen.insert(descriptor.digest.clone(), diff_id) {
                None => wanted.push((descriptor, i)),
                Some(other) if other == diff_id => {}
                Some(other) => {
                    return Err(ImageError::Layer(OpenError::FirstPass(FirstPassError::DiffId {
                        layer: descriptor.digest,
                        expected: diff_id.clone(),
                        actual: other.0.clone(),
                    })));
                }
            }
        }
        let mut opening = futures::stream::iter(wanted)
            .map(|(descriptor, i)| self.open_layer(context, descriptor, i))
            .buffer_unordered(OPENING);
        let mut opened = HashMap::new();
        while let Some(result) = opening.next().await {
            let (digest, layer) = result?;
            opened.insert(digest, layer);
        }
        Ok(opened)
    }

    /// A layer's bytes are there.
    fn found(&self, digest: &Digest, blob: &Arc<dyn BlobSource>) {
        let mut blobs = self.blobs.lock().expect("no panic while locked");
        blobs.insert(digest.clone(), blob.clone());
    }

    async fn open_layer(
        &self,
        context: &LayerContext,
        descriptor: Descriptor,
        position: usize,
    ) -> Result<(Digest, Opened), ImageError> {
        let blob = self.source.blob(&descriptor).await?;
        self.found(&descriptor.digest, &blob);
        let diff_id = self.resolved.diff_ids()[position].clone();
        let stats = self.stats[&descriptor.digest].clone();
        let opened = layer::open(context, blob, diff_id, stats).await?;
        Ok((descriptor.digest, opened))
    }
}

/// What the image's programs need: as it is kept, or put together now.
fn programs(store: &Store, manifest: &Digest, tree: &Reader<Vec<u8>>, layers: &[Digest]) -> Option<Programs> {
    store.root()?;
    Programs::stored(store, manifest).or_else(|| {
        let start = Instant::now();
        let programs = programs::link(store, manifest, tree, layers);
        tracing::debug!(
            took_ms = start.elapsed().as_secs_f64() * 1e3,
            "put together what the programs need"
        );
        let unknown = |error| tracing::warn!(%error, "cannot find out what the programs need");
        programs.map_err(unknown).ok()
    })
}

/// Tables of contents that the store does not have, with the memory they take.
type Tocs = HashMap<Digest, Option<(PackedToc, Charge)>>;

/// Merges the layers' tables, base first, one in memory at a time if the store has them.
fn merge(store: &Store, order: &[Digest], tocs: &Tocs, tables: &Arc<Allowance>) -> Result<Tree, ImageError> {
    let mut merger = Merger::charged(tables.charge())?;
    for (position, digest) in order.iter().enumerate() {
        let position = LayerIdx(position as u32);
        let merged = match &tocs[digest] {
            Some((toc, _)) => merger.add(position, toc),
            None => {
                let toc = layer::stored_toc(store, digest)?;
                let mut charge = tables.charge();
                charge.exactly(toc.bytes() as u64)?;
                merger.add(position, &toc)
            }
        };
        merged.map_err(|error| match error {
            TreeError::Toc { source, .. } => ImageError::Layer(OpenError::Toc {
                layer: digest.clone(),
                reason: source.to_string(),
            }),
            error => ImageError::Merge(error),
        })?;
    }
    Ok(merger.finish())
}

/// An image that can be read.
#[derive(Debug)]
pub struct Image {
    resolved: Arc<ResolvedImage>,
    tree: Reader<Vec<u8>>,
    /// Memory of the tree.
    _charge: Charge,
    layers: Arc<Layers>,
    /// What its programs need, if that is known.
    programs: Option<Programs>,
    /// Whether what was not read yet may be guessed.
    eager: AtomicBool,
    /// Where what is fetched ahead is fetched: reads that need no waiting come from threads that belong to no runtime.
    runtime: Handle,
    health: Arc<Health>,
}

impl Image {
    /// Manifest, config and layer descriptors.
    pub fn resolved(&self) -> &Arc<ResolvedImage> {
        &self.resolved
    }

    /// The merged tree.
    pub fn tree(&self) -> &Reader<Vec<u8>> {
        &self.tree
    }

    /// The layer at a position, 0 is the base.
    ///
    /// # Panics
    /// If the image has no such layer; positions in the tree are checked when it is opened.
    pub fn layer(&self, position: LayerIdx) -> &Arc<Layer> {
        &self.layers.all[position.0 as usize]
    }

    /// All layers, base first.
    pub fn layers(&self) -> &[Arc<Layer>] {
        &self.layers.all
    }

    /// What does not work at the moment.
    pub fn health(&self) -> &Health {
        &self.health
    }

    /// From now on more may be fetched ahead of readers who wait, see [`Layer::be_eager`], and what programs need.
    pub fn be_eager(&self) {
        self.eager.store(true, Ordering::Relaxed);
        for layer in &self.layers.all {
            layer.be_eager();
        }
    }

    /// Fetches what a profile says, in its order. Ends early at the first error: the profile is a hint, and from then on what
    /// it says is guessed at like anything else. If it says nothing, the image's own program is expected.
    pub async fn replay(&self, profile: &Profile) -> Result<(), LayerError> {
        match profile.touches.is_empty() {
            true => {
                self.expect_start().await;
                Ok(())
            }
            false => self.layers.replay(profile).await,
        }
    }

    /// Fetches every span that is not on the local devices, and returns how many are not there even so: none, unless the
    /// devices cannot be written or may not grow that large. Without any missing no registry is needed any more.
    pub async fn complete(&self) -> Result<usize, LayerError> {
        self.layers.complete().await
    }

    /// The way to the largest layer, for most of the bytes come from where that one does.
    pub fn link(&self) -> Option<Link> {
        self.layers.link()
    }

    /// Begins to listen to what is read.
    pub fn record(&self) -> Arc<Recorder> {
        let recorder = Arc::new(Recorder::default());
        for (layer, position) in self.layers.all.iter().zip(0..) {
            layer.record(position, recorder.clone());
        }
        recorder
    }

    /// Counters per layer, base first.
    pub fn status(&self) -> Vec<LayerStatus> {
        let layers = self.layers.all.iter();
        layers
            .map(|l| {
                let spans = l.index().len() as u32;
                l.stats().snapshot(l.digest().to_string(), spans, l.local())
            })
            .collect()
    }
}
