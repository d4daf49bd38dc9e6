//! Which files of an image are loaded together: programs, what interprets them, and their libraries.
//!
//! The start of a program nobody has run before is a chain of waits, since the loader asks for one file after the other. But
//! the files say themselves what they need. What each layer's programs say was noted at its first pass; here it is put
//! together for the merged tree, and kept beside it. When a program's first bytes are read, everything that its loader will
//! ask for is fetched at once.
//!
//! It is a hint, made of the image's own content: what is damaged or wrong costs bandwidth, and a bounded time before the image
//! is ready the first time.

use std::collections::{HashMap, HashSet};
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use serde::{Deserialize, Serialize};

use super::Image;
use crate::erofs::{ErofsError, FileType, Mapping, Nid, Reader};
use crate::layer::{self, stored_programs};
use crate::oci::Digest;
use crate::program::Program;
use crate::store::{Durability, Store, StoreError, read_sealed};

const VERSION: u32 = 1;
/// A larger file is not read; one of a million programs is smaller.
const LARGEST_FILE: u64 = 64 << 20;
/// Programs whose needs are fetched in the life of a mount. Whoever begins more of them is looking at files, not running them.
const MOST_STARTS: usize = 64;
/// What is known of the programs of all layers takes about so much memory at most; further layers count as having none.
const MOST_KNOWN: usize = 32 << 20;
/// Directory entries that are looked up to find what all programs of an image name, which takes a second at most: what would
/// take more is not looked for, lest an image made for it keeps the mount from getting ready. Real images take some thousands.
const MOST_LOOKUPS: usize = 500_000;
/// Deepest directories, and symlinks on the way to a file (path_resolution(7)).
const MOST_DEPTH: usize = 64;
const MOST_LINKS: usize = 40;
/// Where the loader looks when nothing else is said (ld.so(8)), but for the directories of architectures.
const LIBRARY_DIRECTORIES: [&[u8]; 7] = [
    b"/lib",
    b"/usr/lib",
    b"/lib64",
    b"/usr/lib64",
    b"/usr/local/lib",
    b"/lib32",
    b"/usr/lib32",
];
/// Where programs are looked for if the image does not say.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const LOADER_CACHE: &[u8] = b"/etc/ld.so.cache";

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

/// A program or library as it is kept.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    ino: u64,
    /// Offset and length.
    hot: Vec<(u64, u64)>,
    /// Positions of others.
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
    positions: HashMap<u64, u32>,
    fetched: Vec<AtomicBool>,
    starts: AtomicUsize,
}

impl Programs {
    fn new(records: Vec<Record>) -> Self {
        Self {
            positions: records.iter().zip(0..).map(|(record, at)| (record.ino, at)).collect(),
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
        let records = self.records.iter().map(|record| Record {
            ino: record.ino,
            hot: record.hot.clone(),
            needs: record.needs.clone(),
        });
        let file = File {
            version: VERSION,
            programs: records.collect(),
        };
        let encoded = serde_json::to_vec(&file).map_err(|e| StoreError::io("encode", &path, io::Error::other(e)))?;
        store.publish_sealed(&path, Durability::Lazy, |file| file.write_all(&encoded))
    }

    /// The first bytes of a file are read: what is loaded with it and was not said before, itself included.
    fn start(&self, ino: Nid) -> Vec<(Nid, Range<u64>)> {
        let Some(&position) = self.positions.get(&ino.0) else {
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
            let range = |&(offset, length): &(u64, u64)| offset..offset.saturating_add(length);
            found.extend(record.hot.iter().map(|hot| (Nid(record.ino), range(hot))));
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
    let found = find(tree, &layers)?;
    let programs = Programs::new(Linker::new(tree, &found).link(&found));
    programs.keep(store, manifest)?;
    Ok(programs)
}

/// All programs and libraries that the tree shows.
fn find(tree: &Reader<Vec<u8>>, layers: &[Option<layer::Programs>]) -> Result<Vec<Found>, ErofsError> {
    let mut found = Vec::new();
    let mut directories = vec![(tree.root(), 0)];
    let mut seen = HashSet::new();
    while let Some((directory, depth)) = directories.pop() {
        for entry in tree.entries(directory, 0)? {
            let entry = entry?;
            let ino = entry.nid;
            match entry.file_type {
                _ if matches!(entry.name, b"." | b"..") => {}
                FileType::Directory if depth < MOST_DEPTH => directories.push((ino, depth + 1)),
                FileType::Regular if seen.insert(ino) => {
                    let Some(Mapping::Device { layer, offset, .. }) = tree.map(ino, 0)? else {
                        continue;
                    };
                    let of_layer = layers.get(layer.0 as usize).and_then(Option::as_ref);
                    let program = of_layer.and_then(|programs| programs.get(&offset)).cloned();
                    found.extend(program.map(|program| Found {
                        ino,
                        directory,
                        program,
                    }));
                }
                _ => {}
            }
        }
    }
    Ok(found)
}

impl Image {
    /// The image's own program will probably be run: what is loaded with it is fetched. Returns when it is under way.
    pub(super) async fn expect_start(&self) {
        let run = &self.resolved.config.config;
        let Some(word) = run.entrypoint.iter().chain(&run.cmd).next() else {
            return;
        };
        let ino = if word.contains('/') {
            Paths::new(&self.tree).resolve(self.tree.root(), word.as_bytes())
        } else {
            let path = run.env.iter().find_map(|variable| variable.strip_prefix("PATH="));
            Paths::new(&self.tree).in_path(path.unwrap_or(PATH), word)
        };
        if let (Some(ino), Some(programs)) = (ino, &self.programs) {
            self.fetch_all_ahead(programs.start(ino)).await;
        }
    }

    /// Call it when a reader begins a file. If the file is a program, everything that its loader will ask for is fetched.
    /// Nothing is fetched if a profile was replayed, or if only the bytes right in front of readers may be fetched ahead.
    pub fn started(self: &Arc<Self>, ino: Nid) {
        let Some(programs) = &self.programs else { return };
        if !self.eager.load(Ordering::Relaxed) || self.layers.are_profiled() {
            return;
        }
        let loaded = programs.start(ino);
        if !loaded.is_empty() {
            let image = self.clone();
            self.runtime.spawn(async move { image.fetch_all_ahead(loaded).await });
        }
    }

    async fn fetch_all_ahead(&self, parts: Vec<(Nid, Range<u64>)>) {
        for (ino, range) in parts {
            self.fetch_ahead(ino, range).await;
        }
    }

    /// Fetches part of a file ahead of whoever reads it. Returns when it is under way.
    async fn fetch_ahead(&self, ino: Nid, range: Range<u64>) {
        let mut at = range.start;
        while at < range.end {
            let Ok(Some(mapping)) = self.tree.map(ino, at) else {
                return;
            };
            let length = mapping.bytes().min(range.end - at);
            if let Mapping::Device { layer, offset, .. } = mapping {
                self.layer(layer).fetch_ahead(offset..offset + length).await;
            }
            at += length;
        }
    }
}

/// A program and the directory it was found in.
struct Found {
    ino: Nid,
    directory: Nid,
    program: Program,
}

/// Finds what programs name.
struct Linker<'a> {
    paths: Paths<'a>,
    positions: HashMap<u64, u32>,
    directories: Vec<Nid>,
    /// Libraries in the usual places, by name.
    libraries: HashMap<Vec<u8>, Option<Nid>>,
}

impl<'a> Linker<'a> {
    fn new(tree: &'a Reader<Vec<u8>>, found: &[Found]) -> Self {
        let mut directories = Vec::new();
        let mut paths = Paths::new(tree);
        for path in LIBRARY_DIRECTORIES {
            let Some(directory) = paths.resolve(tree.root(), path) else {
                continue;
            };
            // Those of architectures, such as x86_64-linux-gnu.
            let entries = tree.entries(directory, 0).into_iter().flatten().flatten();
            let of_machines = entries.filter(|entry| entry.name.windows(7).any(|part| part == b"-linux-"));
            directories.extend(of_machines.map(|entry| entry.nid));
            directories.push(directory);
        }
        Self {
            paths,
            positions: found.iter().zip(0..).map(|(found, at)| (found.ino.0, at)).collect(),
            directories,
            libraries: HashMap::new(),
        }
    }

    fn link(&mut self, found: &[Found]) -> Vec<Record> {
        let mut records: Vec<Record> = found.iter().map(|found| self.record(found)).collect();
        // What the loader itself reads.
        let tree = self.paths.tree;
        if let Some(cache) = self.paths.resolve(tree.root(), LOADER_CACHE)
            && let Ok(inode) = tree.inode(cache)
        {
            let position = records.len() as u32;
            let loaded = |found: &Found| found.program.interpreter.is_some() && !found.program.libraries.is_empty();
            for (record, _) in records.iter_mut().zip(found).filter(|(_, found)| loaded(found)) {
                // Right behind the loader, which reads it first.
                record.needs.insert(record.needs.len().min(1), position);
            }
            records.push(Record {
                ino: cache.0,
                hot: vec![(0, inode.size)],
                needs: Vec::new(),
            });
        }
        records
    }

    fn record(&mut self, found: &Found) -> Record {
        let program = &found.program;
        let mut needed: Vec<Nid> = Vec::new();
        if let Some(path) = &program.interpreter {
            needed.extend(self.find(found.directory, path.as_bytes()));
        }
        if let Some(name) = program.argument.as_ref().filter(|name| !name.contains('/')) {
            needed.extend(self.paths.in_path(PATH, name));
        }
        for name in &program.libraries {
            needed.extend(self.by_soname(found, name.as_bytes()));
        }
        let known = needed.iter().filter_map(|ino| self.positions.get(&ino.0).copied());
        let known: Vec<u32> = known.collect();
        Record {
            ino: found.ino.0,
            hot: program.hot.iter().map(|hot| (hot.start, hot.end - hot.start)).collect(),
            needs: known,
        }
    }

    /// What a program names in DT_NEEDED: mostly a soname, looked for as ld.so(8) does.
    fn by_soname(&mut self, of: &Found, name: &[u8]) -> Option<Nid> {
        if name.contains(&b'/') {
            return self.find(of.directory, name);
        }
        for place in &of.program.search {
            let found = match place
                .strip_prefix("$ORIGIN")
                .or_else(|| place.strip_prefix("${ORIGIN}"))
            {
                Some(rest) => {
                    let rest = rest.trim_start_matches('/');
                    self.paths.resolve(of.directory, &join(rest.as_bytes(), name))
                }
                None => self.find(of.directory, &join(place.as_bytes(), name)),
            };
            if found.is_some() {
                return found;
            }
        }
        if let Some(known) = self.libraries.get(name) {
            return *known;
        }
        let mut directories = self.directories.iter();
        let found = directories.find_map(|&directory| self.paths.resolve(directory, name));
        self.libraries.insert(name.to_vec(), found);
        found
    }

    fn find(&mut self, directory: Nid, path: &[u8]) -> Option<Nid> {
        let from = if path.starts_with(b"/") {
            self.paths.tree.root()
        } else {
            directory
        };
        self.paths.resolve(from, path)
    }
}

/// Follows paths in a tree, until it has looked up too much.
struct Paths<'a> {
    tree: &'a Reader<Vec<u8>>,
    lookups: usize,
}

impl<'a> Paths<'a> {
    fn new(tree: &'a Reader<Vec<u8>>) -> Self {
        Self { tree, lookups: 0 }
    }

    /// A program in the directories of a search path.
    fn in_path(&mut self, path: &str, name: &str) -> Option<Nid> {
        let mut places = path.split(':').map(|place| join(place.as_bytes(), name.as_bytes()));
        places.find_map(|path| self.resolve(self.tree.root(), &path))
    }

    /// The file at a path, symlinks followed, if there is one.
    fn resolve(&mut self, from: Nid, path: &[u8]) -> Option<Nid> {
        let mut links = 0;
        let mut at = from;
        let mut rest: Vec<Vec<u8>> = components(path);
        while let Some(name) = rest.pop() {
            self.lookups += 1;
            if self.lookups > MOST_LOOKUPS {
                return None;
            }
            let (next, file_type) = self.tree.lookup(at, &name).ok()??;
            if file_type != FileType::Symlink {
                at = next;
                continue;
            }
            links += 1;
            let target = self.tree.symlink(next).ok().filter(|_| links <= MOST_LINKS)?;
            if target.starts_with(b"/") {
                at = self.tree.root();
            }
            rest.extend(components(target));
        }
        Some(at)
    }
}

fn join(directory: &[u8], name: &[u8]) -> Vec<u8> {
    [directory, b"/", name].concat()
}

/// Names of a path, the first one last.
fn components(path: &[u8]) -> Vec<Vec<u8>> {
    let names = path
        .split(|&byte| byte == b'/')
        .filter(|name| !matches!(*name, b"" | b"."));
    names.rev().map(<[u8]>::to_vec).collect()
}
