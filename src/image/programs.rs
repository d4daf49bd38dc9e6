//! Which files of an image are loaded together: programs, what interprets them, and their libraries.
//!
//! The start of a program nobody has run before is a chain of waits, since the loader asks for one file after the other. But
//! the files say themselves what they need. What each layer's programs say was noted at its first pass; here it is put
//! together for the merged tree, and kept beside it. When a program's first bytes are read, everything that its loader will
//! ask for is fetched at once.
//!
//! It is a hint, made of the image's own content: what is damaged or wrong costs bandwidth, and a bounded time before the image
//! is ready the first time.

mod linker;

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use serde::{Deserialize, Serialize};

use super::Image;
use crate::erofs::{ErofsError, Mapping, Nid, Reader, Walker};
use crate::layer::stored_programs;
use crate::oci::Digest;
use crate::program::Program;
use crate::store::{Durability, Store, StoreError, read_sealed};
use crate::tree::LayerIdx;

const VERSION: u32 = 2;
/// A larger file is not read; one of a million programs is smaller.
const LARGEST_FILE: u64 = 64 << 20;
/// Programs whose needs are fetched in the life of a mount. Whoever begins more of them is looking at files, not running them.
const MOST_STARTS: usize = 64;
/// What is known of the programs of all layers takes about so much memory at most; further layers count as having none.
const MOST_KNOWN: usize = 32 << 20;
/// Where programs are looked for if the image does not say.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Why the programs of an image are not known.
#[derive(Debug, thiserror::Error)]
pub(super) enum ProgramsError {
    /// The tree cannot be read.
    #[error(transparent)]
    Tree(#[from] ErofsError),
    /// They could not be kept.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A place in the data device of the layer at a position.
type Address = (u32, u64);

/// A program or library as it is kept.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Record {
    /// Where its first byte is.
    at: Address,
    /// What is read of it when it is loaded: layer, device address and bytes.
    hot: Vec<(u32, u64, u64)>,
    /// Positions of others that are loaded with it.
    needs: Vec<u32>,
}

#[derive(Debug, Serialize, Deserialize)]
struct File {
    #[serde(rename = "ocifs-programs")]
    version: u32,
    programs: Vec<Record>,
}

/// The programs of an image.
#[derive(Debug)]
pub(super) struct Programs {
    records: Vec<Record>,
    positions: HashMap<Address, u32>,
    fetched: Vec<AtomicBool>,
    starts: AtomicUsize,
}

impl Programs {
    fn new(records: Vec<Record>) -> Self {
        Self {
            positions: records.iter().zip(0..).map(|(record, at)| (record.at, at)).collect(),
            fetched: records.iter().map(|_| AtomicBool::new(false)).collect(),
            starts: AtomicUsize::new(0),
            records,
        }
    }

    /// What is kept for an image, if anything is.
    pub(super) fn stored(store: &Store, manifest: &Digest) -> Option<Self> {
        let path = store.programs_path(manifest)?;
        let size = std::fs::metadata(&path).ok()?.len();
        if size > LARGEST_FILE {
            return None;
        }
        let file: File = serde_json::from_slice(&read_sealed(&path).ok()??).ok()?;
        let count = file.programs.len();
        let sound = |record: &Record| record.needs.iter().all(|&at| (at as usize) < count);
        (file.version == VERSION && file.programs.iter().all(sound)).then(|| Self::new(file.programs))
    }

    fn keep(&self, store: &Store, manifest: &Digest) -> Result<(), StoreError> {
        let path = store.programs_path(manifest).ok_or(StoreError::Unavailable)?;
        let file = File {
            version: VERSION,
            programs: self.records.clone(),
        };
        let encoded = serde_json::to_vec(&file).map_err(|e| StoreError::io("encode", &path, io::Error::other(e)))?;
        store.publish_sealed(&path, Durability::Lazy, |file| file.write_all(&encoded))
    }

    /// The first byte of something is read: what is loaded with it, itself included, as far as that was not said before.
    fn start(&self, at: Address) -> Vec<(LayerIdx, Range<u64>)> {
        let Some(&position) = self.positions.get(&at) else {
            return Vec::new();
        };
        if self.fetched[position as usize].load(Ordering::Relaxed)
            || self.starts.fetch_add(1, Ordering::Relaxed) >= MOST_STARTS
        {
            return Vec::new();
        }
        let mut found = Vec::new();
        let mut next = std::collections::VecDeque::from([position]);
        while let Some(position) = next.pop_front() {
            if self.fetched[position as usize].swap(true, Ordering::Relaxed) {
                continue;
            }
            let record = &self.records[position as usize];
            next.extend(&record.needs);
            let range = |&(layer, from, length): &(u32, u64, u64)| (LayerIdx(layer), from..from.saturating_add(length));
            found.extend(record.hot.iter().map(range));
        }
        found
    }
}

/// Finds out what the programs of an image need, from what is known of each layer's, and keeps it.
pub(super) fn link(
    store: &Store,
    manifest: &Digest,
    tree: &Reader<Vec<u8>>,
    layers: &[Digest],
) -> Result<Programs, ProgramsError> {
    let mut room = MOST_KNOWN;
    let layers: Vec<_> = layers
        .iter()
        .map(|layer| {
            let programs = stored_programs(store, layer)?;
            room = room.checked_sub(programs.values().map(Program::size).sum())?;
            Some(programs)
        })
        .collect();
    let programs = Programs::new(linker::link(tree, &layers)?);
    programs.keep(store, manifest)?;
    Ok(programs)
}

impl Image {
    /// The image's own program will probably be run: what is loaded with it is fetched. Returns when it is under way.
    pub(super) async fn expect_start(&self) {
        let run = &self.resolved.config.config;
        let Some(word) = run.entrypoint.iter().chain(&run.cmd).next() else {
            return;
        };
        let mut walker = Walker::new(&self.tree);
        let ino = if word.contains('/') {
            walker.resolve(self.tree.root(), word.as_bytes()).ok()
        } else {
            let path = run.env.iter().find_map(|variable| variable.strip_prefix("PATH="));
            in_path(&mut walker, path.unwrap_or(PATH), word)
        };
        if let (Some(at), Some(programs)) = (ino.and_then(|ino| first_byte(&self.tree, ino)), &self.programs) {
            self.fetch_all_ahead(programs.start(at)).await;
        }
    }

    /// A read begins at a device address of a layer. If a program begins there, this fetches what will be loaded with it, unless
    /// only what lies right before readers is to be fetched ahead, or a profile knows better.
    pub fn started(self: &Arc<Self>, layer: LayerIdx, offset: u64) {
        let Some(programs) = &self.programs else { return };
        if !self.eager.load(Ordering::Relaxed) || self.layers.are_profiled() {
            return;
        }
        let loaded = programs.start((layer.0, offset));
        if !loaded.is_empty() {
            let image = self.clone();
            self.runtime.spawn(async move { image.fetch_all_ahead(loaded).await });
        }
    }

    /// Fetches these places ahead of whoever reads them. Returns when all are under way.
    async fn fetch_all_ahead(&self, places: Vec<(LayerIdx, Range<u64>)>) {
        let known = places
            .into_iter()
            .filter(|(layer, _)| (layer.0 as usize) < self.layers.all.len());
        for (layer, device) in known {
            self.layer(layer).fetch_ahead(device).await;
        }
    }
}

/// Where the first byte of a file is.
fn first_byte(tree: &Reader<Vec<u8>>, ino: Nid) -> Option<Address> {
    match tree.map(ino, 0) {
        Ok(Some(Mapping::Device { layer, offset, .. })) => Some((layer.0, offset)),
        _ => None,
    }
}

/// A program in the directories of a search path.
fn in_path(walker: &mut Walker<'_, Vec<u8>>, path: &str, name: &str) -> Option<Nid> {
    let root = walker.tree().root();
    let mut directories = path.split(':');
    directories.find_map(|directory| walker.resolve(root, &join(directory.as_bytes(), name.as_bytes())).ok())
}

fn join(directory: &[u8], name: &[u8]) -> Vec<u8> {
    [directory, b"/", name].concat()
}
