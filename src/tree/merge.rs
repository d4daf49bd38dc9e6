//! Applies layers one after another; see [`Merger`].
//!
//! The merger reads each layer into a tree of its own, the *upper* ([`Upper`]). The merger then removes from the
//! *lower*, the tree of the layers below, what the layer's whiteouts hide. Last, the merger lays the upper over the
//! lower. Whiteouts never touch the upper, so their place in the archive does not matter.

use crate::memory::Charge;
use crate::toc::PackedToc;
use crate::tree::arena::{Arena, Full, Id, Kind, NONE, split};
use crate::tree::layer::{Hide, Reading, Upper, full};
use crate::tree::{LayerIdx, Tree, TreeError};

/// Merges layers into a [`Tree`].
///
/// The image-spec leaves cases open on which engines differ. Here:
///
/// - Whiteouts and opaque markers hide what *lower* layers have, wherever they stand in the archive. They make no directories,
///   except in the place of a symlink (see below).
/// - A character device 0:0 is a whiteout as overlayfs has it: like any other entry it takes its name from earlier entries of its
///   layer and loses it to later ones. A hard link to it, or to a path that a whiteout of the same layer hides, is one too.
/// - Inside a layer the last entry of a path wins; a directory again keeps its children; a change between directory and anything
///   else drops what was below.
/// - A directory over a lower directory keeps the lower children and replaces owner, mode, time and attributes. A parent that has
///   no entry keeps what the lower layer says, or is 0755 0:0 at time 0.
/// - The root is 0755 0:0 at time 0, whatever layers say of it.
/// - A parent that is a symlink of the same layer is followed; a symlink of a lower layer is replaced by a directory, which is
///   what overlay engines show. That goes for the parents of markers too: `lib/.wh.foo` over a lower `lib -> usr/lib` leaves an
///   empty directory `lib`, and `usr/lib` as it is.
/// - A hard link binds to what its target names in its own layer so far. If the target does not exist yet, the link
///   binds to what the target names at the layer's end. If the layer does not have the target at all, the link binds
///   to the target in lower layers, even in a directory that this layer makes opaque.
/// - The metadata of a hard link entry applies to the shared inode if the link is the later entry. The attributes of
///   the link entry are added to the attributes of the inode.
///
/// ```
/// use ocifs::toc::Toc;
/// use ocifs::tree::{LayerIdx, Merger};
///
/// let mut merger = Merger::new();
/// merger.add(LayerIdx(0), &Toc::default().pack()?)?;
/// assert_eq!(merger.finish().len(), 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Merger {
    arena: Arena,
    root: Id,
}

impl Default for Merger {
    fn default() -> Self {
        Self::new()
    }
}

impl Merger {
    /// A merge of no layers yet: an empty root.
    pub fn new() -> Self {
        Self::charged(Charge::default()).expect("an empty tree fits in any memory")
    }

    /// The same, with its memory charged for.
    pub fn charged(charge: Charge) -> Result<Self, TreeError> {
        let mut arena = Arena::new(charge);
        let root = arena.implied_directory(0).map_err(|why| full(LayerIdx(0), why, b""))?;
        Ok(Self { arena, root })
    }

    /// Lays the next layer over those before it; base first. An error leaves the merge half done and of no use.
    pub fn add(&mut self, layer: LayerIdx, toc: &PackedToc) -> Result<(), TreeError> {
        let Reading { root, hides, devices } = Upper::read(&mut self.arena, self.root, layer, toc)?;
        for hide in &hides {
            self.hide(hide);
        }
        for hide in &hides {
            let displaced = self.displace(root, hide.directory());
            displaced.map_err(|why| full(layer, why, hide.directory()))?;
        }
        drop(hides);
        self.overlay(root);
        // Those in directories that lower layers do not have.
        for number in devices {
            let id = self.arena.names.dirents[number as usize].id;
            if id != NONE && self.arena.is_whiteout(id) {
                self.arena.names.remove(number);
            }
        }
        let root = self.arena.compact_if_worth(self.root);
        self.root = root.map_err(|why| full(layer, why, b""))?;
        Ok(())
    }

    /// Makes room, whether or not that is worth the work.
    #[cfg(test)]
    pub(super) fn compact(&mut self) {
        self.root = self.arena.compact(self.root).expect("less memory than before");
    }

    /// The tree all layers added so far make.
    pub fn finish(self) -> Tree {
        Tree::of(self.arena, self.root)
    }

    fn hide(&mut self, hide: &Hide) {
        let (dir, name) = match hide {
            Hide::Whiteout(path) => {
                let (dir, name) = split(path);
                (dir, Some(name))
            }
            Hide::Opaque(path) => (&path[..], None),
        };
        let Some(dir) = self.arena.directory_at(self.root, dir) else {
            return;
        };
        match name {
            Some(name) => self.arena.unbind(dir, name),
            None => self.arena.clear(dir),
        }
    }

    /// Puts a directory where a marker of the upper layer speaks of one and the lower layers have a symlink.
    fn displace(&mut self, upper: Id, dir: &[u8]) -> Result<(), Full> {
        let obstacle = self.arena.obstacle(self.root, dir);
        let is_symlink = obstacle.is_some_and(|id| self.arena.symlink(id).is_some());
        if is_symlink && self.arena.obstacle(upper, dir).is_none() {
            self.arena.make_directories(upper, dir, 0)?;
        }
        Ok(())
    }

    /// Lays the tree at `upper` over the merged one. Nothing is added, names only move.
    fn overlay(&mut self, upper: Id) {
        let mut todo = vec![(upper, self.root)];
        while let Some((upper, lower)) = todo.pop() {
            let mut next = self.arena.first(upper);
            while next != NONE {
                let number = next;
                let dirent = self.arena.names.dirents[number as usize];
                next = dirent.next;
                let above = dirent.id;
                if above == NONE {
                    continue;
                }
                let other = self.arena.names.find(lower, self.arena.names.name(&dirent));
                if self.arena.is_whiteout(above) {
                    other.into_iter().for_each(|other| self.arena.names.remove(other));
                    self.arena.names.remove(number);
                    continue;
                }
                let Some(other) = other else {
                    self.arena.move_name(number, lower);
                    continue;
                };
                let was = self.arena.names.dirents[other as usize].id;
                if self.arena.is_directory(was) && self.arena.is_directory(above) {
                    self.arena.describe(above, was);
                    todo.push((above, was));
                } else {
                    self.arena.names.dirents[other as usize].id = above;
                }
                self.arena.names.dirents[number as usize].id = NONE;
            }
        }
    }
}

impl Arena {
    /// Gives the directory `below` the metadata of the directory `above`, unless no entry describes that.
    fn describe(&mut self, above: Id, below: Id) {
        let above = *self.get(above);
        if matches!(above.kind, Kind::Directory { implied: true, .. }) {
            return;
        }
        let below = self.get_mut(below);
        below.meta = above.meta;
        below.xattrs = above.xattrs;
    }
}
