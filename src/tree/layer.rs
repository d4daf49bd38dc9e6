//! One layer as a tree of its own, read in archive order: what it puts where, what it hides of lower layers, and which inodes its
//! hard links mean. Hard links that found no target in time are settled when the layer ends, before anything lower is hidden.

mod links;

use std::collections::HashMap;

use self::links::Link;
use crate::toc::{AttributeId, AttributeRef, EntryKind, FileData, PackedEntry, PackedToc};
use crate::tree::arena::{Arena, Full, Id, Inode, Kind, SetId, split};
use crate::tree::{LayerIdx, TreeError};

/// What a layer hides of lower ones, by path without in-layer symlinks.
#[derive(Debug)]
pub(super) enum Hide {
    Whiteout(Vec<u8>),
    Opaque(Vec<u8>),
}

impl Hide {
    /// The directory in which it hides something.
    pub fn directory(&self) -> &[u8] {
        match self {
            Self::Whiteout(path) => split(path).0,
            Self::Opaque(path) => path,
        }
    }
}

/// What a layer says.
#[derive(Debug)]
pub(super) struct Reading {
    /// Root of the layer's tree.
    pub root: Id,
    /// What its markers hide of lower layers.
    pub hides: Vec<Hide>,
    /// Numbers of the names that were given to whiteout devices.
    pub devices: Vec<u32>,
}

/// What a hidden entry or a path that is hidden takes beside its bytes.
const PATH_BYTES: usize = 64;

/// One layer being read into a tree of its own.
#[derive(Debug)]
pub(super) struct Upper<'a> {
    arena: &'a mut Arena,
    layer: LayerIdx,
    toc: &'a PackedToc,
    root: Id,
    /// Inodes of this layer have ids from here on.
    first: Id,
    hides: Vec<Hide>,
    hidden: HashMap<Box<[u8]>, Id>,
    /// In archive order.
    links: Vec<Link>,
    /// See [`Reading::devices`].
    devices: Vec<u32>,
    /// Memory of hides, hidden entries, links and devices.
    bytes: usize,
    /// The arena's numbers of the table's attributes.
    attributes: Vec<AttributeId>,
    /// Those of the entry.
    xattrs: Vec<AttributeId>,
    /// The directory the last entry went into, and its path: most go where the one before went.
    last: (Vec<u8>, Id),
}

impl<'a> Upper<'a> {
    /// Reads a layer that lies over the tree at `lower`.
    pub fn read(arena: &'a mut Arena, lower: Id, layer: LayerIdx, toc: &'a PackedToc) -> Result<Reading, TreeError> {
        let mut upper = Self::new(arena, layer, toc)?;
        let damaged = |source| TreeError::Toc { layer, source };
        let mut entries = toc.entries().map_err(damaged)?;
        for number in 0..u32::MAX {
            let Some(entry) = entries.next().map_err(damaged)? else {
                break;
            };
            upper.apply(number, &entry)?;
        }
        upper.settle_links(lower)?;
        Ok(Reading {
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

    fn apply(&mut self, number: u32, entry: &PackedEntry<'_>) -> Result<(), TreeError> {
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
            EntryKind::Hidden(data) => {
                let kind = self.regular(data);
                let id = self.leaf(number, entry, kind)?;
                self.hidden.insert(entry.path.into(), id);
                self.cover(entry.path.len() + PATH_BYTES, entry.path)
            }
            EntryKind::Directory => self.directory(number, entry),
            EntryKind::Hardlink(target) => self.hardlink(number, entry, target),
            EntryKind::Regular(data) => {
                let kind = self.regular(data);
                self.name_leaf(number, entry, kind)
            }
            EntryKind::Symlink(target) => {
                let target = self.arena.text(target).map_err(|why| self.full(why, entry.path))?;
                self.name_leaf(number, entry, Kind::Symlink(target))
            }
            EntryKind::CharDevice(device) => self.name_leaf(number, entry, Kind::CharDevice(device.encoded())),
            EntryKind::BlockDevice(device) => self.name_leaf(number, entry, Kind::BlockDevice(device.encoded())),
            EntryKind::Fifo => self.name_leaf(number, entry, Kind::Fifo),
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

    /// Charges for `bytes` that do not lie in the arena.
    fn cover(&mut self, bytes: usize, path: &[u8]) -> Result<(), TreeError> {
        self.bytes += bytes;
        let attributes = size_of_val(&*self.attributes);
        let covered = self.arena.cover(self.bytes + attributes);
        covered.map_err(|why| self.full(why, path))
    }

    fn regular(&mut self, data: &FileData) -> Kind {
        self.arena.regular(self.layer, data.clone())
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
        if let Kind::Directory { implied, .. } = &mut inode.kind {
            *implied = false;
        }
        Ok(())
    }

    fn name_leaf(&mut self, number: u32, entry: &PackedEntry<'_>, kind: Kind) -> Result<(), TreeError> {
        let dir = self.parent(number, entry)?;
        let id = self.leaf(number, entry, kind)?;
        let dirent = self.bind(dir, id, entry.path)?;
        if self.arena.is_whiteout(id) {
            self.devices.push(dirent);
            self.cover(size_of::<u32>(), entry.path)?;
        }
        Ok(())
    }

    fn leaf(&mut self, number: u32, entry: &PackedEntry<'_>, kind: Kind) -> Result<Id, TreeError> {
        let set = self.set(entry.path)?;
        self.push(number, entry, set, kind)
    }

    fn push(&mut self, born: u32, entry: &PackedEntry<'_>, xattrs: SetId, kind: Kind) -> Result<Id, TreeError> {
        let inode = Inode {
            meta: entry.meta,
            xattrs,
            born,
            kind,
        };
        self.arena.push(inode).map_err(|why| self.full(why, entry.path))
    }

    /// Gives the last name of `path` in `dir` to an inode.
    fn bind(&mut self, dir: Id, id: Id, path: &[u8]) -> Result<u32, TreeError> {
        let bound = self.arena.bind(dir, split(path).1, id);
        let (dirent, old) = bound.map_err(|why| self.full(why, path))?;
        if old.is_some_and(|old| self.arena.is_directory(old)) {
            // It may have been on the way to the last directory.
            self.last = (Vec::new(), self.root);
        }
        Ok(dirent)
    }

    /// The directory an entry goes into.
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

    /// `path` without symlinks of this layer in its parents.
    fn canonical(&self, path: &[u8]) -> Result<Vec<u8>, TreeError> {
        let (parent, name) = split(path);
        let mut canonical = self.follow(parent, path)?;
        if !canonical.is_empty() {
            canonical.push(b'/');
        }
        canonical.extend_from_slice(name);
        Ok(canonical)
    }

    /// What `target` names in this layer at this moment.
    fn find(&self, target: &[u8]) -> Result<Option<Id>, TreeError> {
        match self.arena.lookup(self.root, target) {
            Ok(found) => Ok(found.or_else(|| self.hidden.get(target).copied())),
            Err(reason) => Err(self.unfollowable(target, reason)),
        }
    }

    /// Path of an entry, for messages: read once more.
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
