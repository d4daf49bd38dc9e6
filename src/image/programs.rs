//! Which files of an image are loaded together: programs, their interpreters and their libraries.
//!
//! The first start of a program is a chain of waits, because the loader asks for one file after the other. But the
//! files themselves say what they need. The first pass over each layer noted the needs of its programs. This module
//! combines the notes for the merged tree, and keeps the result beside the tree. When a reader reads a program's
//! first bytes, everything that the program's loader will ask for is fetched at once.
//!
//! The result is a hint, made of the image's own content. Damaged or wrong content costs bandwidth, and a bounded
//! time before the image is ready the first time.

mod linker;

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use serde::{Deserialize, Serialize};

use super::Image;
use super::prefetch::Layers;
use crate::erofs::{ErofsError, Mapping, Nid, Reader, Walker};
use crate::layer::stored_programs;
use crate::program::Program;
use crate::store::{Durability, Store, StoreError, TreeName, read_sealed};
use crate::tree::LayerIdx;

const VERSION: u32 = 2;
/// Size limit for reading a stored file. The file of an image with a million programs is smaller.
const LARGEST_FILE: u64 = 64 << 20;
/// Number of programs whose needs are fetched while the image is mounted. A reader that starts more programs is
/// looking at files, not running them.
const MOST_STARTS: usize = 64;
/// Limit of the memory for the programs of all layers, in bytes. Programs of further layers are ignored.
const MOST_KNOWN: usize = 32 << 20;
/// Search path for programs if the image does not set one.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Why the programs of an image are not known.
#[derive(Debug, thiserror::Error)]
pub(super) enum ProgramsError {
    /// The tree cannot be read.
    #[error(transparent)]
    Tree(#[from] ErofsError),
    /// The result could not be kept in the store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Position of a layer, and an offset in its data device.
type Address = (u32, u64);

/// A stored program or library.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct ProgramRecord {
    /// Address of its first byte.
    at: Address,
    /// The parts of the file that loading reads: layer, device address and bytes.
    hot: Vec<(u32, u64, u64)>,
    /// Positions of the other records that are loaded with it.
    needs: Vec<u32>,
}

#[derive(Debug, Serialize, Deserialize)]
struct ProgramsFile {
    #[serde(rename = "ocifs-programs")]
    version: u32,
    programs: Vec<ProgramRecord>,
}

/// The programs of an image.
#[derive(Debug)]
pub(super) struct Programs {
    records: Vec<ProgramRecord>,
    positions: HashMap<Address, u32>,
    fetched: Vec<AtomicBool>,
    starts: AtomicUsize,
}

impl Programs {
    fn new(records: Vec<ProgramRecord>) -> Self {
        Self {
            positions: records.iter().zip(0..).map(|(record, at)| (record.at, at)).collect(),
            fetched: records.iter().map(|_| AtomicBool::new(false)).collect(),
            starts: AtomicUsize::new(0),
            records,
        }
    }

    /// Reads the stored programs of an image. `None` if there are none, or if they cannot be used.
    pub(super) fn stored(store: &Store, tree: &TreeName) -> Option<Self> {
        let path = store.programs_path(tree)?;
        let size = std::fs::metadata(&path).ok()?.len();
        if size > LARGEST_FILE {
            return None;
        }
        let file: ProgramsFile = serde_json::from_slice(&read_sealed(&path).ok()??).ok()?;
        let count = file.programs.len();
        let sound = |record: &ProgramRecord| record.needs.iter().all(|&at| (at as usize) < count);
        (file.version == VERSION && file.programs.iter().all(sound)).then(|| Self::new(file.programs))
    }

    fn keep(&self, store: &Store, tree: &TreeName) -> Result<(), StoreError> {
        let path = store.programs_path(tree).ok_or(StoreError::Unavailable)?;
        let file = ProgramsFile {
            version: VERSION,
            programs: self.records.clone(),
        };
        let encoded = serde_json::to_vec(&file).map_err(|e| StoreError::io("encode", &path, io::Error::other(e)))?;
        store.publish_sealed(&path, Durability::Lazy, |file| file.write_all(&encoded))
    }

    /// Returns the parts of all files that are loaded when the file at `at` is started, including its own. Files that
    /// were returned before are left out.
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

/// Combines what is known about the programs of each layer, and keeps the result.
pub(super) fn link(
    store: &Store,
    name: &TreeName,
    tree: &Reader<Vec<u8>>,
    layers: &Layers,
) -> Result<Programs, ProgramsError> {
    let mut room = MOST_KNOWN;
    let layers: Vec<_> = layers
        .all
        .iter()
        .map(|layer| {
            let programs = stored_programs(layer.home()?)?;
            room = room.checked_sub(programs.values().map(Program::size).sum())?;
            Some(programs)
        })
        .collect();
    let programs = Programs::new(linker::link(tree, &layers)?);
    programs.keep(store, name)?;
    Ok(programs)
}

impl Image {
    /// Fetches the files that are loaded with the image's own program, which will probably be run. Returns when they
    /// are in flight.
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

    /// Records that a read begins at a device address of a layer. If a program begins there, fetches the files that
    /// are loaded with it. Does nothing before [`Image::be_eager`], or if a profile is replayed.
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

    /// Fetches these places ahead of their readers. Returns when all are in flight.
    async fn fetch_all_ahead(&self, places: Vec<(LayerIdx, Range<u64>)>) {
        let known = places
            .into_iter()
            .filter(|(layer, _)| (layer.0 as usize) < self.layers.all.len());
        for (layer, device) in known {
            self.layer(layer).fetch_ahead(device).await;
        }
    }
}

/// Address of the first byte of a file.
fn first_byte(tree: &Reader<Vec<u8>>, ino: Nid) -> Option<Address> {
    match tree.map(ino, 0) {
        Ok(Some(Mapping::Device { layer, offset, .. })) => Some((layer.0, offset)),
        _ => None,
    }
}

/// Finds a program in the directories of a search path.
fn in_path(walker: &mut Walker<'_, Vec<u8>>, path: &str, name: &str) -> Option<Nid> {
    let root = walker.tree().root();
    let mut directories = path.split(':');
    directories.find_map(|directory| walker.resolve(root, &join(directory.as_bytes(), name.as_bytes())).ok())
}

fn join(directory: &[u8], name: &[u8]) -> Vec<u8> {
    [directory, b"/", name].concat()
}
