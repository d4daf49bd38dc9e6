//! An image opened for reading: its merged tree and its layers.
//!
//! A [`Preparation`] knows manifest and config, which is enough to mount. [`Preparation::finish`] opens all layers
//! side by side, from the store or by streaming each once. Then `finish` merges their tables into the tree, unless
//! the store has the tree of this manifest.
//!
//! Invariants:
//! - Manifest and config are verified.
//! - Each layer in use was verified against its digest and diffID. Either this process verified the layer, or the
//!   process that put the layer's index into the store did. The exception is a layer that carries a table for which the
//!   manifest vouches: its table was verified, and its content is verified when it is fetched.
//! - The tree is made only from such layers.

mod early;
mod error;
mod expecting;
mod indexed;
mod inventory;
mod kept;
mod learning;
mod merged;
mod named;
mod prefetch;
mod programs;
mod suspects;
mod tree_file;
mod verify;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use futures::StreamExt as _;
use tokio::runtime::Handle;
use tokio::sync::{OnceCell, watch};

use early::Early;
pub use early::Replay;
pub use error::{CompleteError, ImageError};
pub use inventory::{Inventory, Removal, RemovedImages, StoredImage};
use kept::KeptSource;
pub use kept::{Confirm, Unconfirmed};
pub use learning::{Learning, stored as stored_profile};
pub use named::{NamedImage, Opening};
pub use verify::{StoreReport, Unchecked, verify};

use self::indexed::carried;
use self::merged::{Tocs, hold, merge};
use self::prefetch::Layers;
use self::programs::Programs;
use crate::blob::{BlobSource, ImageSource, Link, Retries};
use crate::erofs::Reader;
use crate::layer::{
    self, FirstPassError, Health, Layer, LayerContext, LayerError, LayerStats, LayerStatus, OpenError, Opened, ToOpen,
};
use crate::memory::Charge;
use crate::oci::{Descriptor, DiffId, Digest};
use crate::profile::{BLOCK, Block, FIRST_SCORE, Label, MOST_BLOCKS, Profile, Recorder, Touch};
use crate::published::Lookups;
use crate::resolve::ResolvedImage;
use crate::store::{IndexName, Store, TreeName};
use crate::task::joined;
use crate::toc::carried::TableRef;
use crate::tree::LayerIdx;

/// Number of layers that are opened at the same time. Each has a few files open meanwhile, and a process may open
/// only a limited number.
const OPENING: usize = 64;

/// What the preparation of an image is doing.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Activity {
    /// Compressed bytes that have arrived.
    pub bytes: u64,
    /// How often other processes that stream some of the layers have shown progress: about once a second each.
    pub beats: u64,
    /// Whether this machine has work to do: decoding the arrived bytes, or merging the layers.
    pub working: bool,
    /// Bytes per second that are worth waiting for, on the best link to a layer.
    pub useful_rate: f64,
}

/// An image whose manifest and config are known.
#[derive(Debug)]
pub struct Preparation {
    source: Arc<dyn ImageSource>,
    resolved: Arc<ResolvedImage>,
    stats: HashMap<Digest, Arc<LayerStats>>,
    /// Sources of the layers, as far as they are known.
    blobs: Mutex<HashMap<Digest, Arc<dyn BlobSource>>>,
    /// The layers, once they are open.
    layers: watch::Sender<Option<Arc<Layers>>>,
    merging: AtomicBool,
    image: OnceCell<Arc<Image>>,
    /// Questions for indexes of the layers.
    lookups: Arc<Lookups>,
}

impl Preparation {
    /// A preparation of the image, which has fetched nothing yet.
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
            lookups: Arc::default(),
        }
    }

    /// Uses the answers to questions for indexes.
    fn with_lookups(mut self, lookups: Lookups) -> Self {
        self.lookups = Arc::new(lookups);
        self
    }

    /// Manifest, config and layer descriptors.
    pub fn resolved(&self) -> &Arc<ResolvedImage> {
        &self.resolved
    }

    /// Name that this image has in common with its other versions.
    pub fn repository(&self) -> String {
        self.source.repository()
    }

    /// Returns the counters of each layer, base first, also before the image is ready.
    pub fn status(&self) -> Vec<LayerStatus> {
        let layers = self.resolved.layers().iter();
        layers.map(|d| self.stats[&d.digest].snapshot(&d.digest)).collect()
    }

    /// Returns what the preparation is doing.
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

    /// Returns how often requests for layers were repeated.
    pub fn retries(&self) -> Retries {
        let blobs = self.blobs.lock().expect("no panic while locked");
        blobs.values().map(|blob| blob.retries()).sum()
    }

    /// Why the last request for a layer failed, if such a request is being retried.
    pub fn trouble(&self) -> Option<String> {
        self.stats.values().find_map(|stats| stats.trouble())
    }

    /// Waits until [`Preparation::finish`] has opened the layers, and returns them.
    async fn layers(&self) -> Arc<Layers> {
        let mut layers = self.layers.subscribe();
        let opened = layers.wait_for(Option::is_some).await;
        let opened = opened.expect("the sender is this preparation's");
        opened.clone().expect("that was waited for")
    }

    /// Opens all layers and the tree, once: concurrent callers wait for the same image. A damaged table of contents
    /// in the store is made again.
    pub async fn finish(&self, context: &LayerContext) -> Result<Arc<Image>, ImageError> {
        let opening = || async { self.open(context).await.map(Arc::new) };
        self.image.get_or_try_init(opening).await.cloned()
    }

    async fn open(&self, context: &LayerContext) -> Result<Image, ImageError> {
        // The table of each layer may be damaged, and each is made again once.
        let mut remakes = self.resolved.layers().len();
        // Layers whose indexes from elsewhere are not used.
        let mut streamed = HashSet::new();
        loop {
            match self.assemble(context, &streamed).await {
                Err(ImageError::Layer(OpenError::Toc { layer, reason })) if remakes > 0 => {
                    remakes -= 1;
                    tracing::warn!(%layer, reason, "cannot use the stored table of contents, making it again");
                    let damaged = self.resolved.layers().iter().filter(|other| other.digest == layer);
                    for authority in damaged.flat_map(|layer| self.authorities(context, layer)) {
                        context.forget(&IndexName::new(&layer, &authority))?;
                    }
                }
                Err(error) => {
                    // The layers are closed, so that the next ones have all of the memory.
                    let layers = self.layers.send_replace(None);
                    let known = streamed.len();
                    streamed.extend(self.suspects(context, &error, layers));
                    if streamed.len() == known {
                        return Err(error);
                    }
                }
                result => return result,
            }
        }
    }

    /// Opens all layers and the tree. The layers of `streamed` may be opened only by a pass on this host.
    async fn assemble(&self, context: &LayerContext, streamed: &HashSet<Digest>) -> Result<Image, ImageError> {
        let manifest = self.resolved.manifest_document.digest.clone();
        // The tree is read and checked while the layers are opened.
        let (store, expected) = (context.store.clone(), self.stored_tree(context));
        let reading = tokio::task::spawn_blocking(move || {
            let name = expected?;
            tree_file::read(&store, &name).map(|stored| (name, stored))
        });
        let mut opened = self.open_layers(context, streamed).await?;
        let layers = self.resolved.layers().iter();
        let layers = Arc::new(Layers::new(layers.map(|d| opened[&d.digest].layer.clone()).collect()));
        self.layers.send_replace(Some(layers.clone()));
        let stored = joined(reading).await?;
        let sizes: Vec<u64> = layers.all.iter().map(|l| l.spans().device_size()).collect();
        let names: Vec<IndexName> = layers.all.iter().map(|l| l.index().clone()).collect();
        let name = TreeName::new(&manifest, &names);
        let order = layers.clone();
        let descriptors = self.resolved.layers().iter();
        let added: Vec<bool> = descriptors.map(TableRef::adds_files).collect();
        let tocs: Tocs = opened.drain().map(|(digest, o)| (digest, o.toc)).collect();
        let (store, budget, tables) = (context.store.clone(), context.budget.clone(), context.tables.clone());
        self.merging.store(true, Ordering::Relaxed);
        let building = tokio::task::spawn_blocking(move || {
            // The tree that was read may be of other indexes than the layers were opened with.
            let stored = stored.filter(|(of, _)| *of == name).map(|(_, stored)| stored);
            let tree = match stored.and_then(|stored| stored.open(&store, &sizes)) {
                Some(tree) => tree,
                None => {
                    let made = tree_file::make(&store, &budget, (&name, &manifest), &sizes, &tables, || {
                        merge(&order, &added, &tocs, &tables)
                    });
                    made?
                }
            };
            hold(&order, tocs);
            let mut charge = tables.charge();
            charge.exactly(tree.image().len() as u64)?;
            let programs = programs(&store, &name, &tree, &order);
            Ok::<_, ImageError>((tree, charge, programs))
        });
        let built = joined(building).await;
        self.merging.store(false, Ordering::Relaxed);
        let (tree, charge, programs) = built??;
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

    /// Opens all layers. The largest layer starts first, because it ends last. The small layers then use the other
    /// places.
    async fn open_layers(
        &self,
        context: &LayerContext,
        streamed: &HashSet<Digest>,
    ) -> Result<HashMap<Digest, Opened>, ImageError> {
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
            .map(|(descriptor, i)| {
                let by_pass = streamed.contains(&descriptor.digest);
                self.open_layer(context, descriptor, i, by_pass)
            })
            .buffer_unordered(OPENING);
        let mut opened = HashMap::new();
        while let Some(result) = opening.next().await {
            let (digest, layer) = result?;
            opened.insert(digest, layer);
        }
        Ok(opened)
    }

    /// Records the source of a layer, whose blob was found.
    fn found(&self, digest: &Digest, blob: &Arc<dyn BlobSource>) {
        let mut blobs = self.blobs.lock().expect("no panic while locked");
        blobs.insert(digest.clone(), blob.clone());
    }

    async fn open_layer(
        &self,
        context: &LayerContext,
        descriptor: Descriptor,
        position: usize,
        by_pass: bool,
    ) -> Result<(Digest, Opened), ImageError> {
        let blob = self.source.blob(&descriptor).await?;
        self.found(&descriptor.digest, &blob);
        let diff_id = self.resolved.diff_ids()[position].clone();
        let stats = self.stats[&descriptor.digest].clone();
        let mut wanted = ToOpen::by_pass(blob, diff_id, stats);
        if !by_pass {
            wanted.authorities = self.authorities(context, &descriptor);
            wanted.lookups = self.lookups.clone();
            wanted.table = carried(&descriptor);
        }
        let opened = layer::open(context, wanted).await?;
        Ok((descriptor.digest, opened))
    }
}

/// Returns the needs of the image's programs from the store, or finds them and keeps them there.
fn programs(store: &Store, name: &TreeName, tree: &Reader<Vec<u8>>, layers: &Layers) -> Option<Programs> {
    store.root()?;
    Programs::stored(store, name).or_else(|| {
        let start = Instant::now();
        let programs = programs::link(store, name, tree, layers);
        tracing::debug!(
            took_ms = start.elapsed().as_secs_f64() * 1e3,
            "put together what the programs need"
        );
        let unknown = |error| tracing::warn!(%error, "cannot find out what the programs need");
        programs.map_err(unknown).ok()
    })
}

/// Returns the blocks of a layer's data device up to `end`, as if a run had read them first of all.
fn recommend(layer: u32, end: u64) -> impl Iterator<Item = Touch> {
    (0..end.div_ceil(BLOCK).min(MOST_BLOCKS as u64)).map(move |number| Touch {
        block: Block { layer, number },
        at: 0,
        score: FIRST_SCORE,
    })
}

/// An image that can be read.
#[derive(Debug)]
pub struct Image {
    resolved: Arc<ResolvedImage>,
    tree: Reader<Vec<u8>>,
    /// Memory charge of the tree.
    _charge: Charge,
    layers: Arc<Layers>,
    /// The needs of the image's programs, if they are known.
    programs: Option<Programs>,
    /// Whether more may be fetched ahead of readers; see [`Image::be_eager`].
    eager: AtomicBool,
    /// Runtime of the requests ahead of readers. Reads that need no waiting come from threads that belong to no
    /// runtime.
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

    /// Returns the layer at a position; 0 is the base.
    ///
    /// # Panics
    /// If the image has no such layer. Positions in the tree are checked when it is opened.
    pub fn layer(&self, position: LayerIdx) -> &Arc<Layer> {
        &self.layers.all[position.0 as usize]
    }

    /// All layers, base first.
    pub fn layers(&self) -> &[Arc<Layer>] {
        &self.layers.all
    }

    /// Number of spans that this image has fetched, over all layers.
    pub fn landed(&self) -> u64 {
        self.layers.all.iter().map(|layer| layer.stats().spans_landed()).sum()
    }

    /// Allows fetching more ahead of readers: what [`Layer::be_eager`] allows, and the files that programs need.
    pub fn be_eager(&self) {
        self.eager.store(true, Ordering::Relaxed);
        for layer in &self.layers.all {
            layer.be_eager();
        }
    }

    /// Fetches the content that a profile names, in its order. Returns at the first error. The profile is only a
    /// hint: after an error, readahead guesses about its spans like about all others. If the profile is empty,
    /// fetches what the writers of the layers recommend, or else the files of the image's own program.
    pub async fn replay(&self, profile: &Profile) -> Result<(), LayerError> {
        if !profile.touches.is_empty() {
            return self.layers.replay(profile).await;
        }
        match self.recommended() {
            Some(profile) => self.layers.replay(&profile).await,
            None => {
                self.expect_start().await;
                Ok(())
            }
        }
    }

    /// Returns a profile of the content that the writers of the layers recommend to fetch first, base first. Returns
    /// none if they recommend nothing.
    fn recommended(&self) -> Option<Profile> {
        let manifest = self.resolved.manifest_document.digest.clone();
        let mut profile = Profile::new(manifest, Label::default(), Vec::new());
        let ends = self.layers.all.iter().map(|layer| layer.spans().recommended());
        profile.touches = (0..).zip(ends).flat_map(|(layer, end)| recommend(layer, end)).collect();
        profile.touches.truncate(MOST_BLOCKS);
        (!profile.touches.is_empty()).then_some(profile)
    }

    /// Fetches every span that is not on the local devices. After success, the image needs no registry.
    pub async fn complete(&self) -> Result<(), CompleteError> {
        match self.layers.complete().await? {
            0 => Ok(()),
            spans => Err(CompleteError::NotKept {
                spans,
                problem: self.health.store_problem(),
            }),
        }
    }

    /// The link to the largest layer: most bytes come over it.
    pub fn link(&self) -> Option<Link> {
        self.layers.link()
    }

    /// Starts to record the reads of the image.
    pub fn record(&self) -> Arc<Recorder> {
        let recorder = Arc::new(Recorder::default());
        for (layer, position) in self.layers.all.iter().zip(0..) {
            layer.record(position, recorder.clone());
        }
        recorder
    }

    /// Returns the counters of each layer, base first.
    pub fn status(&self) -> Vec<LayerStatus> {
        self.layers.all.iter().map(|layer| layer.status()).collect()
    }
}
