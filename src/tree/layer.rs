//! One layer as a tree of its own, read in archive order: what it puts where, what it hides of lower layers, and which inodes its
//! hard links mean. Hard links that found no target in time are settled when the layer ends, before anything lower is hidden.

use std::collections::{HashMap, HashSet};

use crate::toc::{AttributeId, AttributeRef, EntryKind, FileData, Metadata, PackedEntry, PackedToc, chmod_acl};
use crate::tree::arena::{Arena, Full, Id, Inode, Kind, NONE, SetId, WHITEOUT, split};
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

/// A hard link entry and what it is bound to.
#[derive(Debug, Clone, Copy)]
struct Link {
    /// Number of the entry.
    entry: u32,
    /// Number of its name.
    dirent: u32,
    /// The inode, perhaps a pending one.
    id: Id,
    meta: Metadata,
    xattrs: SetId,
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

    fn hardlink(&mut self, number: u32, entry: &PackedEntry<'_>, target: &[u8]) -> Result<(), TreeError> {
        let xattrs = self.set(entry.path)?;
        let id = match self.find(target)? {
            Some(id) if self.arena.is_directory(id) => return Err(self.directory_target(entry.path, target)),
            Some(id) => id,
            None => {
                let target = self.arena.text(target).map_err(|why| self.full(why, entry.path))?;
                let kind = Kind::Pending { target, bound: NONE };
                self.push(number, entry, SetId::EMPTY, kind)?
            }
        };
        let dir = self.parent(number, entry)?;
        let dirent = self.bind(dir, id, entry.path)?;
        self.links.push(Link {
            entry: number,
            dirent,
            id,
            meta: entry.meta,
            xattrs,
        });
        self.cover(size_of::<Link>(), entry.path)
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

    /// What the target `target` names, whose path without symlinks of this layer is `path`, below this layer.
    fn find_lower(&self, lower: Id, path: &[u8], target: &[u8]) -> Result<Option<Id>, TreeError> {
        self.arena
            .lookup(lower, path)
            .map_err(|reason| self.unfollowable(target, reason))
    }

    /// Binds the hard links that were read before their target, and applies the metadata of all of them.
    fn settle_links(&mut self, lower: Id) -> Result<(), TreeError> {
        let hides = std::mem::take(&mut self.hides);
        self.bind_links(lower, &hides)?;
        self.hides = hides;
        self.apply_links()
    }

    fn bind_links(&mut self, lower: Id, hides: &[Hide]) -> Result<(), TreeError> {
        let mut deleted = None;
        for link in 0..self.links.len() {
            let Link { entry, id, .. } = self.links[link];
            let Kind::Pending { target, bound: NONE } = self.arena.get(id).kind else {
                continue;
            };
            let name = self.arena.target(target);
            let found = match self.find(name)? {
                Some(found) => Some(found),
                None => {
                    let path = self.canonical(name)?;
                    if deleted.get_or_insert_with(|| whiteouts(hides)).contains(&path[..]) {
                        // Another name of what the layer deletes is deleted too: the engines link it to the whiteout.
                        self.arena.get_mut(id).kind = Kind::CharDevice(WHITEOUT);
                        continue;
                    }
                    self.find_lower(lower, &path, name)?
                }
            };
            let bound = match found {
                None => return Err(self.missing_target(entry, name)),
                Some(found) if self.arena.is_directory(found) => {
                    return Err(self.directory_target(&self.path_of(entry), name));
                }
                Some(found) => found,
            };
            self.arena.get_mut(id).kind = Kind::Pending { target, bound };
        }
        Ok(())
    }

    fn apply_links(&mut self) -> Result<(), TreeError> {
        // Attributes that links add or change: sets that are complete only when all links were seen.
        let mut added: HashMap<Id, Vec<AttributeId>> = HashMap::new();
        for link in 0..self.links.len() {
            let Link {
                entry,
                dirent,
                id,
                meta,
                xattrs,
            } = self.links[link];
            let settled = self.settled(entry, id)?;
            let name = &mut self.arena.names.dirents[dirent as usize];
            if name.id == id {
                name.id = settled;
            }
            if self.arena.is_whiteout(settled) {
                self.devices.push(dirent);
                self.cover(size_of::<u32>(), b"")?;
                continue;
            }
            let inode = self.arena.get_mut(settled);
            if settled < self.first || inode.born < entry {
                inode.meta = meta;
                let own = inode.xattrs;
                let adds = xattrs != own && xattrs != SetId::EMPTY;
                if adds || own != SetId::EMPTY {
                    let set = added.entry(settled).or_insert_with(|| self.arena.set(own).to_vec());
                    chmod(self.arena, set, meta.mode);
                    set_xattrs(self.arena, set, xattrs);
                }
            }
        }
        for (id, set) in added {
            let set = self.arena.sets.intern(&set);
            let set = set.and_then(|set| self.arena.cover(self.bytes).map(|()| set));
            self.arena.get_mut(id).xattrs = set.map_err(|why| self.full(why, b""))?;
        }
        Ok(())
    }

    /// The inode a perhaps pending one stands for; chains are shortened on the way, so that long ones cost little.
    fn settled(&mut self, entry: u32, id: Id) -> Result<Id, TreeError> {
        let mut chain = 0;
        let mut end = id;
        while let Kind::Pending { bound, target } = self.arena.get(end).kind {
            chain += 1;
            if bound == NONE || chain > self.links.len() {
                return Err(TreeError::HardlinkCycle {
                    layer: self.layer,
                    path: self.path_of(entry),
                    target: self.arena.target(target).into(),
                });
            }
            end = bound;
        }
        let mut at = id;
        while let Kind::Pending { bound, .. } = &mut self.arena.get_mut(at).kind {
            at = std::mem::replace(bound, end);
        }
        Ok(end)
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

    fn missing_target(&self, entry: u32, target: &[u8]) -> TreeError {
        TreeError::HardlinkMissing {
            layer: self.layer,
            path: self.path_of(entry),
            target: target.into(),
        }
    }

    fn directory_target(&self, path: &[u8], target: &[u8]) -> TreeError {
        TreeError::HardlinkToDirectory {
            layer: self.layer,
            path: path.into(),
            target: target.into(),
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

/// Paths that the layer's whiteouts hide.
fn whiteouts(hides: &[Hide]) -> HashSet<&[u8]> {
    let paths = hides.iter().filter_map(|hide| match hide {
        Hide::Whiteout(path) => Some(&path[..]),
        Hide::Opaque(_) => None,
    });
    paths.collect()
}

/// Does to an access control list among the attributes what chmod(2) does.
fn chmod(arena: &mut Arena, set: &mut [AttributeId], mode: u16) {
    for id in set {
        let (name, value) = arena.sets.attributes.get(*id);
        if let Some(value) = chmod_acl(name, value, mode) {
            let name: Box<[u8]> = name.into();
            (*id, _) = arena.sets.attributes.intern(&name, &value);
        }
    }
}

/// Sets attributes as setxattr(2) would: those not named stay.
fn set_xattrs(arena: &Arena, set: &mut Vec<AttributeId>, new: SetId) {
    let name = |id: &AttributeId| arena.sets.attributes.get(*id).0;
    for id in arena.set(new) {
        match set.binary_search_by(|have| name(have).cmp(name(id))) {
            Ok(at) => set[at] = *id,
            Err(at) => set.insert(at, *id),
        }
    }
}
