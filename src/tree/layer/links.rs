//! Hard links of a layer: which inode each link means, and what the link changes about the inode.
//!
//! A link may come before its target, and its target may be in a lower layer. Until the layer ends, such a link has a
//! pending inode.

use std::collections::HashSet;

use super::{Hide, UpperTree};
use crate::toc::{AttributeId, Metadata, PackedEntry, chmod_acl};
use crate::tree::TreeError;
use crate::tree::arena::{Arena, ArenaKind, Id, NONE, SetId, WHITEOUT};

/// A hard link entry and the inode it is bound to.
#[derive(Debug, Clone, Copy)]
pub(super) struct HardLink {
    /// Number of the link's entry.
    entry: u32,
    /// Number of the link's name.
    dirent: u32,
    /// The inode, possibly a pending one.
    id: Id,
    meta: Metadata,
    xattrs: SetId,
}

impl UpperTree<'_> {
    /// Binds an entry's name to the target of its hard link, or to a pending inode if the target is unknown so far.
    pub(super) fn hardlink(&mut self, number: u32, entry: &PackedEntry<'_>, target: &[u8]) -> Result<(), TreeError> {
        let xattrs = self.set(entry.path)?;
        let id = match self.find(target)? {
            Some(id) if self.arena.is_directory(id) => return Err(self.directory_target(entry.path, target)),
            Some(id) => id,
            None => {
                let target = self.arena.text(target).map_err(|why| self.full(why, entry.path))?;
                let kind = ArenaKind::Pending { target, bound: NONE };
                self.push(number, entry, SetId::EMPTY, kind)?
            }
        };
        let dir = self.parent(number, entry)?;
        let dirent = self.bind(dir, id, entry.path)?;
        self.links.push(HardLink {
            entry: number,
            dirent,
            id,
            meta: entry.meta,
            xattrs,
        });
        self.cover(size_of::<HardLink>(), entry.path)
    }

    /// Returns what the hard link target `target` names in lower layers. `path` is the target without symlinks of
    /// this layer.
    fn find_lower(&self, lower: Id, path: &[u8], target: &[u8]) -> Result<Option<Id>, TreeError> {
        self.arena
            .lookup(lower, path)
            .map_err(|reason| self.unfollowable(target, reason))
    }

    /// Binds the hard links that came before their target. Applies the metadata of all hard links afterwards.
    pub(super) fn settle_links(&mut self, lower: Id) -> Result<(), TreeError> {
        let hides = std::mem::take(&mut self.hides);
        self.bind_links(lower, &hides)?;
        self.hides = hides;
        self.apply_links()
    }

    fn bind_links(&mut self, lower: Id, hides: &[Hide]) -> Result<(), TreeError> {
        let mut deleted = None;
        for link in 0..self.links.len() {
            let HardLink { entry, id, .. } = self.links[link];
            let ArenaKind::Pending { target, bound: NONE } = self.arena.get(id).kind else {
                continue;
            };
            let name = self.arena.target(target);
            let found = match self.find(name)? {
                Some(found) => Some(found),
                None => {
                    let path = self.canonical(name)?;
                    if deleted.get_or_insert_with(|| whiteouts(hides)).contains(&path[..]) {
                        // The target is deleted by this layer, so the link hides its own name too: the engines link
                        // it to the whiteout.
                        self.arena.get_mut(id).kind = ArenaKind::CharDevice(WHITEOUT);
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
            self.arena.get_mut(id).kind = ArenaKind::Pending { target, bound };
        }
        Ok(())
    }

    fn apply_links(&mut self) -> Result<(), TreeError> {
        // Inodes whose attributes change, each with the link that changes them. The set of an inode is complete once
        // all its links are applied.
        let mut changed: Vec<(Id, u32)> = Vec::new();
        for link in 0..self.links.len() {
            let HardLink {
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
                    changed.push((settled, link as u32));
                    self.cover(size_of::<(Id, u32)>(), b"")?;
                }
            }
        }
        // Handle one set at a time. The stable sort keeps the links of an inode in their order.
        changed.sort_by_key(|&(id, _)| id);
        for links in changed.chunk_by(|a, b| a.0 == b.0) {
            let (id, _) = links[0];
            let mut set = self.arena.set(self.arena.get(id).xattrs).to_vec();
            for &(_, link) in links {
                let HardLink { meta, xattrs, .. } = self.links[link as usize];
                chmod(self.arena, &mut set, meta.mode);
                set_xattrs(self.arena, &mut set, xattrs);
                // chmod may make new values of access control lists, which take memory.
                self.cover(0, b"")?;
            }
            let set = self.arena.sets.intern(&set);
            let set = set.and_then(|set| self.arena.cover(self.bytes).map(|()| set));
            self.arena.get_mut(id).xattrs = set.map_err(|why| self.full(why, b""))?;
        }
        Ok(())
    }

    /// Returns the inode that a possibly pending one stands for. Shortens chains of pending inodes on the way, so
    /// that long chains cost little.
    fn settled(&mut self, entry: u32, id: Id) -> Result<Id, TreeError> {
        let mut chain = 0;
        let mut end = id;
        while let ArenaKind::Pending { bound, target } = self.arena.get(end).kind {
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
        while let ArenaKind::Pending { bound, .. } = &mut self.arena.get_mut(at).kind {
            at = std::mem::replace(bound, end);
        }
        Ok(end)
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

/// Returns the paths that the layer's whiteouts hide.
fn whiteouts(hides: &[Hide]) -> HashSet<&[u8]> {
    let paths = hides.iter().filter_map(|hide| match hide {
        Hide::Whiteout(path) => Some(&path[..]),
        Hide::Opaque(_) => None,
    });
    paths.collect()
}

/// Changes an access control list among the attributes as chmod(2) would.
fn chmod(arena: &mut Arena, set: &mut [AttributeId], mode: u16) {
    for id in set {
        let (name, value) = arena.sets.attributes.get(*id);
        if let Some(value) = chmod_acl(name, value, mode) {
            let name: Box<[u8]> = name.into();
            (*id, _) = arena.sets.attributes.intern(&name, &value);
        }
    }
}

/// Sets attributes as setxattr(2) would: attributes with other names stay.
fn set_xattrs(arena: &Arena, set: &mut Vec<AttributeId>, new: SetId) {
    let name = |id: &AttributeId| arena.sets.attributes.get(*id).0;
    for id in arena.set(new) {
        match set.binary_search_by(|have| name(have).cmp(name(id))) {
            Ok(at) => set[at] = *id,
            Err(at) => set.insert(at, *id),
        }
    }
}
