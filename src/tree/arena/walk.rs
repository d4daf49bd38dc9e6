//! Walking paths among the inodes, with and without following symlinks.

use std::borrow::Cow;

use super::{Arena, ArenaKind, Full, Id};

/// Most symlinks followed in one path before it counts as a loop, as in Linux (`MAXSYMLINKS`).
const MAX_SYMLINKS: u32 = 40;

/// Longest path in bytes, as in Linux (`PATH_MAX`).
const MAX_PATH: usize = 4096;

/// Longest name in bytes, as in Linux (`NAME_MAX`).
const MAX_NAME: usize = 255;

impl Arena {
    /// Returns the directory at `path`, if all components of the path are directories.
    pub fn directory_at(&self, root: Id, path: &[u8]) -> Option<Id> {
        components(path)
            .try_fold(root, |at, name| self.child(at, name))
            .filter(|id| self.is_directory(*id))
    }

    /// Returns the directory at `path`. Makes missing directories, and replaces anything on the path that is no
    /// directory.
    pub fn make_directories(&mut self, root: Id, path: &[u8], born: u32) -> Result<Id, Full> {
        let mut at = root;
        for name in components(path) {
            at = match self.child(at, name).filter(|id| self.is_directory(*id)) {
                Some(child) => child,
                None => {
                    let child = self.implied_directory(born)?;
                    self.bind(at, name, child)?;
                    child
                }
            };
        }
        Ok(at)
    }

    /// Returns the first inode on the directory path `path` that is no directory; `None` if the walk meets only
    /// directories, or a missing name.
    pub fn obstacle(&self, root: Id, path: &[u8]) -> Option<Id> {
        let mut at = root;
        for name in components(path) {
            at = self.child(at, name)?;
            if !self.is_directory(at) {
                return Some(at);
            }
        }
        None
    }

    /// Returns the directory path `path` without symlinks of the tree at `root`. Components that do not exist stay as
    /// they are.
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

    /// Returns the inode at `path` in the tree at `root`. Follows symlinks in the parents, but not in the last
    /// component.
    pub fn lookup(&self, root: Id, path: &[u8]) -> Result<Option<Id>, &'static str> {
        let (parent, name) = split(path);
        if name.is_empty() {
            return Ok(Some(root));
        }
        let parent = self.follow(root, parent)?;
        Ok(self.directory_at(root, &parent).and_then(|dir| self.child(dir, name)))
    }

    pub fn symlink(&self, id: Id) -> Option<&[u8]> {
        match self.get(id).kind {
            ArenaKind::Symlink(text) => Some(self.target(text)),
            _ => None,
        }
    }
}

/// Splits a canonical path into parent and last component.
pub(in crate::tree) fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (&[], path),
    }
}

fn components(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.split(|byte| *byte == b'/').filter(|name| !name.is_empty())
}
