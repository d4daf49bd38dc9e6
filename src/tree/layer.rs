//! One layer as a tree of its own, read in archive order: what it puts where, what it hides of lower layers, and which inodes its
//! hard links mean. Hard links that found no target in time are settled when the layer ends, before anything lower is hidden.

use std::collections::BTreeMap;

use crate::toc::{EntryKind, FileData, Metadata, Toc, TocEntry, Xattrs};
use crate::tree::arena::{Arena, ArenaFull, Id, Inode, Kind, split};
use crate::tree::{LayerIdx, NodeKind, TreeError};

/// What a layer hides of lower ones, by path without in-layer symlinks.
#[derive(Debug)]
pub(super) enum Hide {
    Whiteout(Vec<u8>),
    Opaque(Vec<u8>),
}

/// A hard link entry and what it is bound to.
#[derive(Debug)]
struct Link {
    /// Number of the entry.
    entry: u32,
    /// Directory of its name.
    dir: Id,
    /// The inode, perhaps a pending one.
    id: Id,
}

/// One layer being read into a tree of its own.
#[derive(Debug)]
pub(super) struct Upper<'a> {
    arena: &'a mut Arena,
    layer: LayerIdx,
    toc: &'a Toc,
    root: Id,
    /// Inodes of this layer have ids from here on.
    first: Id,
    hides: Vec<Hide>,
    hidden: BTreeMap<&'a [u8], Id>,
    /// In archive order.
    links: Vec<Link>,
}

impl<'a> Upper<'a> {
    /// Reads a layer; gives the root of its tree, and what it hides of the tree at `lower`.
    pub fn read(arena: &'a mut Arena, lower: Id, layer: LayerIdx, toc: &'a Toc) -> Result<(Id, Vec<Hide>), TreeError> {
        let mut upper = Self::new(arena, layer, toc)?;
        for (number, entry) in toc.entries.iter().enumerate() {
            let number = u32::try_from(number).map_err(|_| TreeError::TooManyInodes { layer })?;
            upper.apply(number, entry)?;
        }
        upper.settle_links(lower)?;
        Ok((upper.root, upper.hides))
    }

    fn new(arena: &'a mut Arena, layer: LayerIdx, toc: &'a Toc) -> Result<Self, TreeError> {
        let root = arena
            .implied_directory(0)
            .map_err(|ArenaFull| TreeError::TooManyInodes { layer })?;
        Ok(Self {
            arena,
            layer,
            toc,
            root,
            first: root,
            hides: Vec::new(),
            hidden: BTreeMap::new(),
            links: Vec::new(),
        })
    }

    fn apply(&mut self, number: u32, entry: &'a TocEntry) -> Result<(), TreeError> {
        match &entry.kind {
            EntryKind::Opaque => {
                let dir = self.follow(&entry.path, &entry.path)?;
                self.hides.push(Hide::Opaque(dir));
                Ok(())
            }
            _ if entry.path.is_empty() => Ok(()), // the root is what it is, see Merger
            EntryKind::Whiteout => {
                let (parent, name) = split(&entry.path);
                let mut path = self.follow(parent, &entry.path)?;
                if !path.is_empty() {
                    path.push(b'/');
                }
                path.extend_from_slice(name);
                self.hides.push(Hide::Whiteout(path));
                Ok(())
            }
            EntryKind::Hidden(data) => {
                let id = self.leaf(number, entry, self.regular(data))?;
                self.hidden.insert(&entry.path, id);
                Ok(())
            }
            EntryKind::Directory => self.directory(number, entry),
            EntryKind::Hardlink(target) => self.hardlink(number, entry, target),
            EntryKind::Regular(data) => self.name_leaf(number, entry, self.regular(data)),
            EntryKind::Symlink(target) => self.name_leaf(number, entry, NodeKind::Symlink(target.clone())),
            EntryKind::CharDevice(device) => self.name_leaf(number, entry, NodeKind::CharDevice(*device)),
            EntryKind::BlockDevice(device) => self.name_leaf(number, entry, NodeKind::BlockDevice(*device)),
            EntryKind::Fifo => self.name_leaf(number, entry, NodeKind::Fifo),
        }
    }

    fn regular(&self, data: &FileData) -> NodeKind {
        NodeKind::Regular {
            layer: self.layer,
            data: data.clone(),
        }
    }

    fn directory(&mut self, number: u32, entry: &TocEntry) -> Result<(), TreeError> {
        let dir = self.parent(number, entry)?;
        let (_, name) = split(&entry.path);
        let id = match self.arena.child(dir, name).filter(|id| self.arena.is_directory(*id)) {
            Some(id) => id,
            None => {
                let id = self.arena.implied_directory(number).map_err(|e| self.full(e))?;
                self.arena.bind(dir, name, id);
                id
            }
        };
        let inode = self.arena.get_mut(id);
        inode.meta = entry.meta;
        inode.xattrs.clone_from(&entry.xattrs);
        if let Kind::Directory { implied, .. } = &mut inode.kind {
            *implied = false;
        }
        Ok(())
    }

    fn hardlink(&mut self, number: u32, entry: &TocEntry, target: &[u8]) -> Result<(), TreeError> {
        let id = match self.find(target)? {
            Some(id) if self.arena.is_directory(id) => return Err(self.directory_target(entry, target)),
            Some(id) => id,
            None => self.push(number, entry.meta, Xattrs::new(), Kind::Pending { bound: None })?,
        };
        let dir = self.parent(number, entry)?;
        self.arena.bind(dir, split(&entry.path).1, id);
        self.links.push(Link { entry: number, dir, id });
        Ok(())
    }

    fn name_leaf(&mut self, number: u32, entry: &TocEntry, kind: NodeKind) -> Result<(), TreeError> {
        let dir = self.parent(number, entry)?;
        let id = self.leaf(number, entry, kind)?;
        self.arena.bind(dir, split(&entry.path).1, id);
        Ok(())
    }

    fn leaf(&mut self, number: u32, entry: &TocEntry, kind: NodeKind) -> Result<Id, TreeError> {
        self.push(number, entry.meta, entry.xattrs.clone(), Kind::Leaf(kind))
    }

    fn push(&mut self, born: u32, meta: Metadata, xattrs: Xattrs, kind: Kind) -> Result<Id, TreeError> {
        let inode = Inode {
            meta,
            xattrs,
            born,
            kind,
        };
        self.arena.push(inode).map_err(|e| self.full(e))
    }

    /// The directory an entry goes into.
    fn parent(&mut self, number: u32, entry: &TocEntry) -> Result<Id, TreeError> {
        let (parent, _) = split(&entry.path);
        if let Some(dir) = self.arena.directory_at(self.root, parent) {
            return Ok(dir);
        }
        let parent = self.follow(parent, &entry.path)?;
        self.arena
            .make_directories(self.root, &parent, number)
            .map_err(|e| self.full(e))
    }

    fn follow(&self, dir: &[u8], path: &[u8]) -> Result<Vec<u8>, TreeError> {
        match self.arena.follow(self.root, dir) {
            Ok(dir) => Ok(dir.into_owned()),
            Err(reason) => Err(self.unfollowable(path, reason)),
        }
    }

    /// What `target` names in this layer at this moment.
    fn find(&self, target: &[u8]) -> Result<Option<Id>, TreeError> {
        match self.arena.lookup(self.root, target) {
            Ok(found) => Ok(found.or_else(|| self.hidden.get(target).copied())),
            Err(reason) => Err(self.unfollowable(target, reason)),
        }
    }

    /// What `target` names below this layer.
    fn find_lower(&self, lower: Id, target: &[u8]) -> Result<Option<Id>, TreeError> {
        let (parent, name) = split(target);
        let mut path = self.follow(parent, target)?;
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(name);
        self.arena
            .lookup(lower, &path)
            .map_err(|reason| self.unfollowable(target, reason))
    }

    /// Binds the hard links that were read before their target, and applies the metadata of all of them.
    fn settle_links(&mut self, lower: Id) -> Result<(), TreeError> {
        for link in 0..self.links.len() {
            let Link { entry, id, .. } = self.links[link];
            let entry = self.entry(entry);
            let (Kind::Pending { bound: None }, EntryKind::Hardlink(target)) = (&self.arena.get(id).kind, &entry.kind)
            else {
                continue;
            };
            let found = match self.find(target)? {
                Some(found) => Some(found),
                None => self.find_lower(lower, target)?,
            };
            match found {
                None => return Err(self.missing_target(entry, target)),
                Some(found) if self.arena.is_directory(found) => return Err(self.directory_target(entry, target)),
                Some(found) => self.arena.get_mut(id).kind = Kind::Pending { bound: Some(found) },
            }
        }
        for link in 0..self.links.len() {
            let Link { entry, dir, id } = self.links[link];
            let settled = self.settled(entry, id)?;
            let entry_number = entry;
            let entry = self.entry(entry);
            let name = split(&entry.path).1;
            if settled != id && self.arena.child(dir, name) == Some(id) {
                self.arena.bind(dir, name, settled);
            }
            let inode = self.arena.get_mut(settled);
            if settled < self.first || inode.born < entry_number {
                inode.meta = entry.meta;
                set_xattrs(&mut inode.xattrs, &entry.xattrs);
            }
        }
        Ok(())
    }

    /// The inode a perhaps pending one stands for; chains are shortened on the way, so that long ones cost little.
    fn settled(&mut self, entry: u32, id: Id) -> Result<Id, TreeError> {
        let mut chain = Vec::new();
        let mut at = id;
        while let Kind::Pending { bound } = self.arena.get(at).kind {
            chain.push(at);
            match bound {
                Some(next) if chain.len() <= self.links.len() => at = next,
                _ => {
                    let entry = self.entry(entry);
                    let target = match &entry.kind {
                        EntryKind::Hardlink(target) => target.clone(),
                        _ => Box::default(),
                    };
                    return Err(TreeError::HardlinkCycle {
                        layer: self.layer,
                        path: entry.path.clone(),
                        target,
                    });
                }
            }
        }
        for link in chain {
            self.arena.get_mut(link).kind = Kind::Pending { bound: Some(at) };
        }
        Ok(at)
    }

    fn entry(&self, number: u32) -> &'a TocEntry {
        &self.toc.entries[number as usize]
    }

    fn full(&self, _: ArenaFull) -> TreeError {
        TreeError::TooManyInodes { layer: self.layer }
    }

    fn unfollowable(&self, path: &[u8], reason: &'static str) -> TreeError {
        TreeError::Unfollowable {
            layer: self.layer,
            path: path.into(),
            reason,
        }
    }

    fn missing_target(&self, entry: &TocEntry, target: &[u8]) -> TreeError {
        TreeError::HardlinkMissing {
            layer: self.layer,
            path: entry.path.clone(),
            target: target.into(),
        }
    }

    fn directory_target(&self, entry: &TocEntry, target: &[u8]) -> TreeError {
        TreeError::HardlinkToDirectory {
            layer: self.layer,
            path: entry.path.clone(),
            target: target.into(),
        }
    }
}

/// Sets attributes as setxattr(2) would: those not named stay.
fn set_xattrs(xattrs: &mut Xattrs, new: &Xattrs) {
    for (name, value) in new {
        match xattrs.binary_search_by(|(have, _)| have.cmp(name)) {
            Ok(at) => xattrs[at].1.clone_from(value),
            Err(at) => xattrs.insert(at, (name.clone(), value.clone())),
        }
    }
}
