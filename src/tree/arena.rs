//! The inodes of a merge under way, and walking names among them.
//!
//! All trees of a merge (what the layers so far give, what the current layer adds) share one arena, so a hard link across layers
//! is only an id. Inodes that lose their last name stay until the merge ends. Nothing here recurses: paths may be thousands of
//! components deep.

use std::borrow::Cow;
use std::collections::BTreeMap;

use crate::toc::{Metadata, Xattrs};
use crate::tree::NodeKind;

/// Position of an inode in its [`Arena`].
pub(super) type Id = u32;

/// A directory no entry describes (image engines agree on these values for parents a layer leaves out).
pub(super) const IMPLIED: Metadata = Metadata {
    mode: 0o755,
    uid: 0,
    gid: 0,
    mtime: 0,
    mtime_nsec: 0,
};

/// Symlinks followed in one path before it counts as a loop, as in Linux (`MAXSYMLINKS`).
const MAX_SYMLINKS: u32 = 40;

/// Longest path, as in Linux (`PATH_MAX`).
const MAX_PATH: usize = 4096;

/// Longest name, as in Linux (`NAME_MAX`).
const MAX_NAME: usize = 255;

#[derive(Debug)]
pub(super) struct Inode {
    pub meta: Metadata,
    pub xattrs: Xattrs,
    /// Number of the entry that made it, in its layer.
    pub born: u32,
    pub kind: Kind,
}

#[derive(Debug)]
pub(super) enum Kind {
    Directory {
        children: BTreeMap<Box<[u8]>, Id>,
        /// No entry of the current layer describes it.
        implied: bool,
    },
    /// Anything but a directory.
    Leaf(NodeKind),
    /// A hard link whose target was not there yet when it was read; later the inode it stands for.
    Pending { bound: Option<Id> },
}

/// Inodes by [`Id`].
#[derive(Debug, Default)]
pub(super) struct Arena {
    pub inodes: Vec<Inode>,
}

/// Inodes of all layers together: three times the entries of the largest layer. A few paths can imply many directories.
const MAX_INODES: usize = 32 << 20;

/// There are more inodes than [`MAX_INODES`].
#[derive(Debug)]
pub(super) struct ArenaFull;

impl Arena {
    pub fn push(&mut self, inode: Inode) -> Result<Id, ArenaFull> {
        if self.inodes.len() == MAX_INODES {
            return Err(ArenaFull);
        }
        // There are fewer than fit.
        let id = self.inodes.len() as Id;
        self.inodes.push(inode);
        Ok(id)
    }

    pub fn implied_directory(&mut self, born: u32) -> Result<Id, ArenaFull> {
        self.push(Inode {
            meta: IMPLIED,
            xattrs: Xattrs::new(),
            born,
            kind: Kind::Directory {
                children: BTreeMap::new(),
                implied: true,
            },
        })
    }

    pub fn get(&self, id: Id) -> &Inode {
        &self.inodes[id as usize]
    }

    pub fn get_mut(&mut self, id: Id) -> &mut Inode {
        &mut self.inodes[id as usize]
    }

    pub fn is_directory(&self, id: Id) -> bool {
        matches!(self.get(id).kind, Kind::Directory { .. })
    }

    /// The children of a directory; none of anything else.
    pub fn children_mut(&mut self, id: Id) -> Option<&mut BTreeMap<Box<[u8]>, Id>> {
        match &mut self.get_mut(id).kind {
            Kind::Directory { children, .. } => Some(children),
            Kind::Leaf(_) | Kind::Pending { .. } => None,
        }
    }

    pub fn child(&self, id: Id, name: &[u8]) -> Option<Id> {
        match &self.get(id).kind {
            Kind::Directory { children, .. } => children.get(name).copied(),
            Kind::Leaf(_) | Kind::Pending { .. } => None,
        }
    }

    /// Gives `name` in the directory `dir` to `id`.
    pub fn bind(&mut self, dir: Id, name: &[u8], id: Id) {
        let children = self.children_mut(dir).expect("names are bound in directories only");
        match children.get_mut(name) {
            Some(old) => *old = id,
            None => {
                children.insert(name.into(), id);
            }
        }
    }

    /// The directory at `path`, if nothing but directories leads to it.
    pub fn directory_at(&self, root: Id, path: &[u8]) -> Option<Id> {
        components(path)
            .try_fold(root, |at, name| self.child(at, name))
            .filter(|id| self.is_directory(*id))
    }

    /// The directory at `path`, made where missing and put in the place of whatever else was there.
    pub fn make_directories(&mut self, root: Id, path: &[u8], born: u32) -> Result<Id, ArenaFull> {
        let mut at = root;
        for name in components(path) {
            at = match self.child(at, name).filter(|id| self.is_directory(*id)) {
                Some(child) => child,
                None => {
                    let child = self.implied_directory(born)?;
                    self.bind(at, name, child);
                    child
                }
            };
        }
        Ok(at)
    }

    /// Spells the directory path `path` without the symlinks that stand at `root` and below. What does not exist is kept as it is.
    pub fn follow<'a>(&'a self, root: Id, path: &'a [u8]) -> Result<Cow<'a, [u8]>, &'static str> {
        if self.directory_at(root, path).is_some() {
            return Ok(Cow::Borrowed(path));
        }
        let mut done: Vec<(&[u8], Option<Id>)> = Vec::new();
        let mut todo: Vec<&[u8]> = path.rsplit(|byte| *byte == b'/').collect();
        let mut hops = 0;
        while let Some(name) = todo.pop() {
            match name {
                b"" | b"." => continue,
                b".." => {
                    done.pop();
                    continue;
                }
                _ if name.len() > MAX_NAME => return Err("a symlink names a component longer than 255 bytes"),
                _ => {}
            }
            let here = done.last().map_or(Some(root), |(_, id)| *id);
            let child = here.and_then(|dir| self.child(dir, name));
            let Some(target) = child.and_then(|id| self.symlink(id)) else {
                done.push((name, child));
                continue;
            };
            hops += 1;
            if hops > MAX_SYMLINKS {
                return Err("too many symlinks, probably a loop");
            }
            if target.starts_with(b"/") {
                done.clear();
            }
            todo.extend(target.rsplit(|byte| *byte == b'/'));
        }
        if hops == 0 {
            return Ok(Cow::Borrowed(path));
        }
        let joined = done.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(&b'/');
        if joined.len() > MAX_PATH {
            return Err("the path is longer than 4096 bytes once its symlinks are followed");
        }
        Ok(Cow::Owned(joined))
    }

    /// What `path` names in the tree at `root`, following symlinked parents.
    pub fn lookup(&self, root: Id, path: &[u8]) -> Result<Option<Id>, &'static str> {
        let (parent, name) = split(path);
        if name.is_empty() {
            return Ok(Some(root));
        }
        let parent = self.follow(root, parent)?;
        Ok(self.directory_at(root, &parent).and_then(|dir| self.child(dir, name)))
    }

    fn symlink(&self, id: Id) -> Option<&[u8]> {
        match &self.get(id).kind {
            Kind::Leaf(NodeKind::Symlink(target)) => Some(target),
            _ => None,
        }
    }
}

/// Parent and last component of a canonical path.
pub(super) fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (&[], path),
    }
}

fn components(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.split(|byte| *byte == b'/').filter(|name| !name.is_empty())
}
