//! Applies layers one after another; see [`Merger`].
//!
//! The merger reads each layer into a tree of its own, the *upper* ([`UpperTree`]). The merger then removes from the
//! *lower*, the tree of the layers below, what the layer's whiteouts hide. Last, the merger lays the upper over the
//! lower. Whiteouts never touch the upper, so their place in the archive does not matter.

use crate::memory::Charge;
use crate::toc::PackedToc;
use crate::tree::arena::{Arena, ArenaKind, Full, Id, NONE, split};
use crate::tree::layer::{Hide, LayerReading, UpperTree, full};
use crate::tree::{LayerIdx, Tree, TreeError};

/// Merges layers into a [`Tree`].
///
/// The image-spec leaves cases open, and engines differ in them. The merger follows these rules:
///
/// - Whiteouts and opaque markers hide what *lower* layers have. The place of a marker in the archive does not
///   matter. Markers make no directories, except in the place of a symlink (see below).
/// - A character device 0:0 is a whiteout, as in overlayfs. Like any other entry it replaces earlier entries of its
///   layer with the same name, and later ones replace it. A hard link to such a device is a whiteout too. So is a
///   hard link to a path that a whiteout of the same layer hides.
/// - Inside a layer the last entry of a path wins. A second directory entry keeps the children. A change between a
///   directory and anything else drops what was below.
/// - A directory over a lower directory keeps the lower children and replaces owner, mode, time and attributes. A
///   parent without an entry keeps the lower layer's values; if there are none, it is 0755 0:0 at time 0.
/// - The root is 0755 0:0 at time 0, whatever the layers say.
/// - The merger follows a parent that is a symlink of the same layer. The merger replaces a symlink of a lower layer
///   by a directory, as overlay engines show it. Both rules also apply to the parents of markers: `lib/.wh.foo` over
///   a lower `lib -> usr/lib` leaves an empty directory `lib`, and leaves `usr/lib` unchanged.
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
    /// Starts a merge without layers: an empty root.
    pub fn new() -> Self {
        Self::charged(Charge::default()).expect("an empty tree fits in any memory")
    }

    /// Starts a merge that charges its memory to `charge`.
    pub(crate) fn charged(charge: Charge) -> Result<Self, TreeError> {
        let mut arena = Arena::new(charge);
        let root = arena.implied_directory(0).map_err(|why| full(LayerIdx(0), why, b""))?;
        Ok(Self { arena, root })
    }

    /// Lays the next layer over the layers before it; the base layer comes first. After an error the merge is
    /// incomplete and useless.
    pub fn add(&mut self, layer: LayerIdx, toc: &PackedToc) -> Result<(), TreeError> {
        self.add_without(layer, toc, &[])
    }

    /// Lays the next layer over the layers before it, like [`Merger::add`], but does not show the regular files at the
    /// paths `hidden`. Hard links may still point at them.
    pub fn add_without(&mut self, layer: LayerIdx, toc: &PackedToc, hidden: &[&[u8]]) -> Result<(), TreeError> {
        let LayerReading { root, hides, devices } = UpperTree::read(&mut self.arena, self.root, layer, toc, hidden)?;
        for hide in &hides {
            self.hide(hide);
        }
        for hide in &hides {
            let displaced = self.displace(root, hide.directory());
            displaced.map_err(|why| full(layer, why, hide.directory()))?;
        }
        drop(hides);
        self.overlay(root);
        // Remove whiteout devices in directories that lower layers do not have.
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

    /// Compacts the arena in any case.
    #[cfg(test)]
    pub(super) fn compact(&mut self) {
        self.root = self.arena.compact(self.root).expect("less memory than before");
    }

    /// Returns the tree of all layers added so far.
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

    /// Makes a directory in the upper layer where one of its markers names a directory and the lower layers have a
    /// symlink.
    fn displace(&mut self, upper: Id, dir: &[u8]) -> Result<(), Full> {
        let obstacle = self.arena.obstacle(self.root, dir);
        let is_symlink = obstacle.is_some_and(|id| self.arena.symlink(id).is_some());
        if is_symlink && self.arena.obstacle(upper, dir).is_none() {
            self.arena.make_directories(upper, dir, 0)?;
        }
        Ok(())
    }

    /// Lays the tree at `upper` over the merged one. Adds no names, only moves them.
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
    /// Gives the directory `below` the metadata of the directory `above`, unless no entry describes `above`.
    fn describe(&mut self, above: Id, below: Id) {
        let above = *self.get(above);
        if matches!(above.kind, ArenaKind::Directory { implied: true, .. }) {
            return;
        }
        let below = self.get_mut(below);
        below.meta = above.meta;
        below.xattrs = above.xattrs;
    }
}
