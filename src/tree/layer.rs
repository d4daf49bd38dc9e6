//! Reads one layer into a tree of its own, in archive order.
//!
//! The result says which names the layer has, what it hides of lower layers, and which inodes its hard links mean. A
//! hard link may come before its target; such links are settled at the end of the layer, before anything of a lower
//! layer is hidden.

mod links;

use std::collections::HashMap;

use self::links::HardLink;
use crate::toc::{AttributeId, AttributeRef, EntryKind, FileData, PackedEntry, PackedToc};
use crate::tree::arena::{Arena, ArenaInode, ArenaKind, Full, Id, SetId, split};
use crate::tree::{LayerIdx, TreeError};

/// What a layer hides of lower layers. Paths contain no symlinks of the layer itself.
#[derive(Debug)]
pub(super) enum Hide {
    Whiteout(Vec<u8>),
    Opaque(Vec<u8>),
}

impl Hide {
    /// Returns the directory in which the marker hides something.
    pub fn directory(&self) -> &[u8] {
        match self {
            Self::Whiteout(path) => split(path).0,
            Self::Opaque(path) => path,
        }
    }
}

/// The result of reading a layer.
#[derive(Debug)]
pub(super) struct LayerReading {
    /// Root of the layer's tree.
    pub root: Id,
    /// What the layer's markers hide of lower layers.
    pub hides: Vec<Hide>,
    /// Numbers of the names that whiteout devices got.
    pub devices: Vec<u32>,
}

/// Memory in bytes that a hidden entry or the path of a marker takes in addition to the bytes of the path.
const PATH_BYTES: usize = 64;

/// A layer that is being read into a tree of its own.
#[derive(Debug)]
pub(super) struct UpperTree<'a> {
    arena: &'a mut Arena,
    layer: LayerIdx,
    toc: &'a PackedToc,
    root: Id,
    /// First id of this layer's inodes; lower layers have smaller ids.
    first: Id,
    hides: Vec<Hide>,
    hidden: HashMap<Box<[u8]>, Id>,
    /// Hard links in archive order.
    links: Vec<HardLink>,
    /// See [`LayerReading::devices`].
    devices: Vec<u32>,
    /// Memory in bytes of hides, hidden entries, links and devices.
    bytes: usize,
    /// Ids of the table's attributes in the arena, by their ids in the table.
    attributes: Vec<AttributeId>,
    /// Ids of the current entry's attributes in the arena.
    xattrs: Vec<AttributeId>,
    /// The directory of the last entry, with its path. Most entries are in the same directory as the entry before.
    last: (Vec<u8>, Id),
}

impl<'a> UpperTree<'a> {
    /// Reads a layer that lies over the tree at `lower`. Does not show the regular files at the paths `unwanted`.
    pub fn read(
        arena: &'a mut Arena,
        lower: Id,
        layer: LayerIdx,
        toc: &'a PackedToc,
        unwanted: &[&[u8]],
    ) -> Result<LayerReading, TreeError> {
        let mut upper = Self::new(arena, layer, toc)?;
        let damaged = |source| TreeError::Toc { layer, source };
        let mut entries = toc.entries().map_err(damaged)?;
        for number in 0..u32::MAX {
            let Some(entry) = entries.next().map_err(damaged)? else {
                break;
            };
            let unwanted = unwanted.contains(&entry.path);
            upper.apply(number, &entry, unwanted)?;
        }
        upper.settle_links(lower)?;
        Ok(LayerReading {
            root: upper.root,
            hides: upper.hides,
            devices: upper.devices,
        })
    }

    fn new(arena: &'a mut Arena, layer: LayerIdx, toc: &'a PackedToc) -> Result<Self, TreeError> {
        let root = arena.implied_directory(0).map_err(|why| full(layer, why, b""))?;
        Ok(Self {
            arena,
            layer,
            toc,
            root,
            first: root,
            hides: Vec::new(),
            hidden: HashMap::new(),
            links: Vec::new(),
            devices: Vec::new(),
            bytes: 0,
            attributes: Vec::new(),
            xattrs: Vec::new(),
            last: (Vec::new(), root),
        })
    }

    fn apply(&mut self, number: u32, entry: &PackedEntry<'_>, unwanted: bool) -> Result<(), TreeError> {
        self.intern(entry)?;
        match &entry.kind {
            EntryKind::Opaque => {
                let dir = self.follow(entry.path, entry.path)?;
                self.hide(Hide::Opaque(dir), entry)
            }
            _ if entry.path.is_empty() => Ok(()), // the root is what it is, see Merger
            EntryKind::Whiteout => {
                let path = self.canonical(entry.path)?;
                self.hide(Hide::Whiteout(path), entry)
            }
            EntryKind::Hidden(data) => self.hidden(number, entry, data),
            EntryKind::Regular(data) if unwanted => self.hidden(number, entry, data),
            EntryKind::Directory => self.directory(number, entry),
            EntryKind::Hardlink(target) => self.hardlink(number, entry, target),
            EntryKind::Regular(data) => {
                let kind = self.regular(data);
                self.name_leaf(number, entry, kind)
            }
            EntryKind::Symlink(target) => {
                let target = self.arena.text(target).map_err(|why| self.full(why, entry.path))?;
                self.name_leaf(number, entry, ArenaKind::Symlink(target))
            }
            EntryKind::CharDevice(device) => self.name_leaf(number, entry, ArenaKind::CharDevice(device.encoded())),
            EntryKind::BlockDevice(device) => self.name_leaf(number, entry, ArenaKind::BlockDevice(device.encoded())),
            EntryKind::Fifo => self.name_leaf(number, entry, ArenaKind::Fifo),
        }
    }

    /// Finds the arena's numbers of the entry's attributes.
    fn intern(&mut self, entry: &PackedEntry<'_>) -> Result<(), TreeError> {
        self.xattrs.clear();
        for xattr in entry.xattrs {
            let id = match xattr {
                AttributeRef::Known(id) => self.attributes[*id as usize],
                AttributeRef::New((name, value)) => {
                    let (id, _) = self.arena.sets.attributes.intern(name, value);
                    self.attributes.push(id);
                    id
                }
            };
            self.xattrs.push(id);
        }
        if entry.xattrs.is_empty() {
            return Ok(());
        }
        self.cover(0, entry.path)
    }

    fn set(&mut self, path: &[u8]) -> Result<SetId, TreeError> {
        let set = self.arena.sets.intern(&self.xattrs);
        set.map_err(|why| self.full(why, path))
    }

    fn hide(&mut self, hide: Hide, entry: &PackedEntry<'_>) -> Result<(), TreeError> {
        let (Hide::Whiteout(path) | Hide::Opaque(path)) = &hide;
        let bytes = path.len() + PATH_BYTES;
        self.hides.push(hide);
        self.cover(bytes, entry.path)
    }

    /// Charges for `bytes` more that are not in the arena.
    fn cover(&mut self, bytes: usize, path: &[u8]) -> Result<(), TreeError> {
        self.bytes += bytes;
        let attributes = size_of_val(&*self.attributes);
        let covered = self.arena.cover(self.bytes + attributes);
        covered.map_err(|why| self.full(why, path))
    }

    fn regular(&mut self, data: &FileData) -> ArenaKind {
        self.arena.regular(self.layer, data.clone())
    }

    /// Adds a file without a name, at which hard links may point.
    fn hidden(&mut self, number: u32, entry: &PackedEntry<'_>, data: &FileData) -> Result<(), TreeError> {
        let kind = self.regular(data);
        let id = self.leaf(number, entry, kind)?;
        self.hidden.insert(entry.path.into(), id);
        self.cover(entry.path.len() + PATH_BYTES, entry.path)
    }

    fn directory(&mut self, number: u32, entry: &PackedEntry<'_>) -> Result<(), TreeError> {
        let set = self.set(entry.path)?;
        let dir = self.parent(number, entry)?;
        let (_, name) = split(entry.path);
        let id = match self.arena.child(dir, name).filter(|id| self.arena.is_directory(*id)) {
            Some(id) => id,
            None => {
                let id = self.arena.implied_directory(number);
                let id = id.map_err(|why| self.full(why, entry.path))?;
                self.bind(dir, id, entry.path)?;
                id
            }
        };
        let inode = self.arena.get_mut(id);
        inode.meta = entry.meta;
        inode.xattrs = set;
        if let ArenaKind::Directory { implied, .. } = &mut inode.kind {
            *implied = false;
        }
        Ok(())
    }

    fn name_leaf(&mut self, number: u32, entry: &PackedEntry<'_>, kind: ArenaKind) -> Result<(), TreeError> {
        let dir = self.parent(number, entry)?;
        let id = self.leaf(number, entry, kind)?;
        let dirent = self.bind(dir, id, entry.path)?;
        if self.arena.is_whiteout(id) {
            self.devices.push(dirent);
            self.cover(size_of::<u32>(), entry.path)?;
        }
        Ok(())
    }

    fn leaf(&mut self, number: u32, entry: &PackedEntry<'_>, kind: ArenaKind) -> Result<Id, TreeError> {
        let set = self.set(entry.path)?;
        self.push(number, entry, set, kind)
    }

    fn push(&mut self, born: u32, entry: &PackedEntry<'_>, xattrs: SetId, kind: ArenaKind) -> Result<Id, TreeError> {
        let inode = ArenaInode {
            meta: entry.meta,
            xattrs,
            born,
            kind,
        };
        self.arena.push(inode).map_err(|why| self.full(why, entry.path))
    }

    /// Binds the last component of `path` in `dir` to an inode. Returns the number of the name.
    fn bind(&mut self, dir: Id, id: Id, path: &[u8]) -> Result<u32, TreeError> {
        let bound = self.arena.bind(dir, split(path).1, id);
        let (dirent, old) = bound.map_err(|why| self.full(why, path))?;
        if old.is_some_and(|old| self.arena.is_directory(old)) {
            // The replaced directory may be part of the last entry's path.
            self.last = (Vec::new(), self.root);
        }
        Ok(dirent)
    }

    /// Returns the directory that an entry goes into, and makes it if necessary.
    fn parent(&mut self, number: u32, entry: &PackedEntry<'_>) -> Result<Id, TreeError> {
        let (parent, _) = split(entry.path);
        if self.last.0 == parent {
            return Ok(self.last.1);
        }
        let dir = match self.arena.directory_at(self.root, parent) {
            Some(dir) => dir,
            None => {
                let real = self.follow(parent, entry.path)?;
                let made = self.arena.make_directories(self.root, &real, number);
                let dir = made.map_err(|why| self.full(why, entry.path))?;
                if real != parent {
                    return Ok(dir);
                }
                dir
            }
        };
        self.last.0.clear();
        self.last.0.extend_from_slice(parent);
        self.last.1 = dir;
        Ok(dir)
    }

    fn follow(&self, dir: &[u8], path: &[u8]) -> Result<Vec<u8>, TreeError> {
        match self.arena.follow(self.root, dir) {
            Ok(dir) => Ok(dir.into_owned()),
            Err(reason) => Err(self.unfollowable(path, reason)),
        }
    }

    /// Returns `path` without symlinks of this layer in its parents.
    fn canonical(&self, path: &[u8]) -> Result<Vec<u8>, TreeError> {
        let (parent, name) = split(path);
        let mut canonical = self.follow(parent, path)?;
        if !canonical.is_empty() {
            canonical.push(b'/');
        }
        canonical.extend_from_slice(name);
        Ok(canonical)
    }

    /// Returns the inode at `target` in this layer, as far as the layer was read.
    fn find(&self, target: &[u8]) -> Result<Option<Id>, TreeError> {
        match self.arena.lookup(self.root, target) {
            Ok(found) => Ok(found.or_else(|| self.hidden.get(target).copied())),
            Err(reason) => Err(self.unfollowable(target, reason)),
        }
    }

    /// Returns the path of an entry for a message. Reads the table again to find it.
    fn path_of(&self, number: u32) -> Box<[u8]> {
        let Ok(mut entries) = self.toc.entries() else {
            return Box::default();
        };
        let mut path: Box<[u8]> = Box::default();
        for _ in 0..=number {
            match entries.next() {
                Ok(Some(entry)) => path = entry.path.into(),
                Ok(None) | Err(_) => break,
            }
        }
        path
    }

    fn full(&self, why: Full, path: &[u8]) -> TreeError {
        full(self.layer, why, path)
    }

    fn unfollowable(&self, path: &[u8], reason: &'static str) -> TreeError {
        TreeError::Unfollowable {
            layer: self.layer,
            path: path.into(),
            reason,
        }
    }
}

pub(super) fn full(layer: LayerIdx, why: Full, path: &[u8]) -> TreeError {
    match why {
        Full::Inodes => TreeError::TooManyInodes {
            layer,
            path: path.into(),
        },
        Full::Memory(source) => TreeError::TooMuchMemory {
            layer,
            path: path.into(),
            source,
        },
    }
}
