//! Resolves the names in the programs of a merged tree: interpreters and libraries, found like ld.so(8) finds them.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use super::{Address, PATH, ProgramRecord, first_byte, in_path, join};
use crate::erofs::{ErofsError, FileType, Mapping, Nid, Reader, Walker};
use crate::layer;
use crate::program::Program;

/// Limit of the directory lookups for all programs of an image. Real images need some thousands. The limit takes at
/// most a second. Without it, a malicious image could delay the mount for ever.
const MOST_LOOKUPS: usize = 500_000;
/// Deepest directories in which programs are looked for.
const MOST_DEPTH: usize = 64;
/// Directories where the loader looks by default (ld.so(8)), without the directories of architectures.
const LIBRARY_DIRECTORIES: [&[u8]; 7] = [
    b"/lib",
    b"/usr/lib",
    b"/lib64",
    b"/usr/lib64",
    b"/usr/local/lib",
    b"/lib32",
    b"/usr/lib32",
];
const LOADER_CACHE: &[u8] = b"/etc/ld.so.cache";

/// Finds the needs of all programs and libraries in the tree. `layers` has the programs of each layer, if they are
/// known.
pub(super) fn link(
    tree: &Reader<Vec<u8>>,
    layers: &[Option<layer::LayerPrograms>],
) -> Result<Vec<ProgramRecord>, ErofsError> {
    let found = find(tree, layers)?;
    Ok(Linker::new(tree, &found).link(&found))
}

/// A program and the directory it was found in.
struct FoundProgram {
    ino: Nid,
    at: Address,
    directory: Nid,
    program: Program,
}

/// Resolves the names in programs.
struct Linker<'a> {
    walker: Walker<'a, Vec<u8>>,
    positions: HashMap<u64, u32>,
    directories: Vec<Nid>,
    /// Results of lookups in the default directories, by library name.
    libraries: HashMap<Vec<u8>, Option<Nid>>,
}

impl<'a> Linker<'a> {
    fn new(tree: &'a Reader<Vec<u8>>, found: &[FoundProgram]) -> Self {
        let mut directories = Vec::new();
        let mut walker = Walker::limited(tree, MOST_LOOKUPS);
        for path in LIBRARY_DIRECTORIES {
            let Ok(directory) = walker.resolve(tree.root(), path) else {
                continue;
            };
            // Directories of architectures, such as x86_64-linux-gnu.
            let entries = tree.entries(directory, 0).into_iter().flatten().flatten();
            let of_machines = entries.filter(|entry| entry.name.windows(7).any(|part| part == b"-linux-"));
            directories.extend(of_machines.map(|entry| entry.nid));
            directories.push(directory);
        }
        Self {
            walker,
            positions: found.iter().zip(0..).map(|(found, at)| (found.ino.0, at)).collect(),
            directories,
            libraries: HashMap::new(),
        }
    }

    fn link(&mut self, found: &[FoundProgram]) -> Vec<ProgramRecord> {
        let mut records: Vec<ProgramRecord> = found.iter().map(|found| self.record(found)).collect();
        // The cache file that the loader itself reads.
        let tree = self.walker.tree();
        if let Ok(cache) = self.walker.resolve(tree.root(), LOADER_CACHE)
            && let Ok(inode) = tree.inode(cache)
            && let Some(at) = first_byte(tree, cache)
        {
            let position = records.len() as u32;
            let loaded =
                |found: &FoundProgram| found.program.interpreter.is_some() && !found.program.libraries.is_empty();
            for (record, _) in records.iter_mut().zip(found).filter(|(_, found)| loaded(found)) {
                // Right behind the loader, which reads the cache first.
                record.needs.insert(record.needs.len().min(1), position);
            }
            records.push(ProgramRecord {
                at,
                hot: places(tree, cache, 0..inode.size),
                needs: Vec::new(),
            });
        }
        records
    }

    fn record(&mut self, found: &FoundProgram) -> ProgramRecord {
        let program = &found.program;
        let mut needed: Vec<Nid> = Vec::new();
        if let Some(path) = &program.interpreter {
            needed.extend(self.find(found.directory, path.as_bytes()));
        }
        if let Some(name) = program.argument.as_ref().filter(|name| !name.contains('/')) {
            needed.extend(in_path(&mut self.walker, PATH, name));
        }
        for name in &program.libraries {
            needed.extend(self.by_soname(found, name.as_bytes()));
        }
        let known = needed.iter().filter_map(|ino| self.positions.get(&ino.0).copied());
        let known: Vec<u32> = known.collect();
        let (tree, hot) = (self.walker.tree(), program.hot.iter());
        ProgramRecord {
            at: found.at,
            hot: hot.flat_map(|hot| places(tree, found.ino, hot.clone())).collect(),
            needs: known,
        }
    }

    /// Finds a library that a program names in DT_NEEDED. The name is mostly a soname, which is searched like
    /// ld.so(8) does.
    fn by_soname(&mut self, of: &FoundProgram, name: &[u8]) -> Option<Nid> {
        if name.contains(&b'/') {
            return self.find(of.directory, name);
        }
        for place in &of.program.search {
            let found = match place
                .strip_prefix("$ORIGIN")
                .or_else(|| place.strip_prefix("${ORIGIN}"))
            {
                Some(rest) => {
                    let path = join(rest.as_bytes(), name);
                    // The path is relative to the program's directory, even if it begins with a slash.
                    let names = path.iter().position(|&byte| byte != b'/').unwrap_or(path.len());
                    self.walker.resolve(of.directory, &path[names..]).ok()
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
        let found = directories.find_map(|&directory| self.walker.resolve(directory, name).ok());
        self.libraries.insert(name.to_vec(), found);
        found
    }

    fn find(&mut self, directory: Nid, path: &[u8]) -> Option<Nid> {
        self.walker.resolve(directory, path).ok()
    }
}

/// Finds all programs and libraries in the tree.
fn find(tree: &Reader<Vec<u8>>, layers: &[Option<layer::LayerPrograms>]) -> Result<Vec<FoundProgram>, ErofsError> {
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
                    found.extend(program.map(|program| FoundProgram {
                        ino,
                        at: (layer.0, offset),
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

/// Addresses of a range of a file.
fn places(tree: &Reader<Vec<u8>>, ino: Nid, range: Range<u64>) -> Vec<(u32, u64, u64)> {
    let (mut at, mut found) = (range.start, Vec::new());
    while at < range.end
        && let Ok(Some(mapping)) = tree.map(ino, at)
    {
        let length = mapping.bytes().min(range.end - at);
        if let Mapping::Device { layer, offset, .. } = mapping {
            found.push((layer.0, offset, length));
        }
        at += length;
    }
    found
}
