//! Applies layers one after another: see [`Merger`].
//!
//! A layer is first read into a tree of its own (the *upper*, see [`Upper`]), its whiteouts are taken out of what lower layers
//! gave (the *lower*), and the upper is laid over the lower. Since whiteouts never touch the upper, their place in the archive
//! does not matter.

use std::collections::{BTreeMap, VecDeque};

use crate::toc::Toc;
use crate::tree::arena::{Arena, Id, Inode, Kind, split};
use crate::tree::layer::{Hide, Upper};
use crate::tree::{LayerIdx, Node, NodeId, NodeKind, Tree, TreeError};

/// Merges layers into a [`Tree`].
///
/// The image-spec leaves cases open on which engines differ. Here:
///
/// - Whiteouts and opaque markers hide what *lower* layers have, wherever they stand in the archive. They make no directories.
/// - Inside a layer the last entry of a path wins; a directory again keeps its children; a change between directory and anything
///   else drops what was below.
/// - A directory over a lower directory keeps the lower children and replaces owner, mode, time and attributes. A parent that has
///   no entry keeps what the lower layer says, or is 0755 0:0 at time 0.
/// - The root is 0755 0:0 at time 0, whatever layers say of it.
/// - A parent that is a symlink of the same layer is followed; a symlink of a lower layer is replaced by a directory, which is
///   what overlay engines show.
/// - A hard link binds to what its target names in its own layer so far, else at the layer's end, else in lower layers (even what
///   this layer hides). Metadata of the link entry applies to the shared inode if it is the later one; attributes are added.
///
/// ```
/// use ocifs::toc::Toc;
/// use ocifs::tree::{LayerIdx, Merger};
///
/// let mut merger = Merger::new();
/// merger.add(LayerIdx(0), &Toc::default())?;
/// assert_eq!(merger.finish().nodes.len(), 1);
/// # Ok::<(), ocifs::tree::TreeError>(())
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
        let mut arena = Arena::default();
        let root = arena.implied_directory(0).expect("an empty arena has room");
        Self { arena, root }
    }

    /// Lays the next layer over those before it; base first. An error leaves the merge half done and of no use.
    pub fn add(&mut self, layer: LayerIdx, toc: &Toc) -> Result<(), TreeError> {
        let (upper, hides) = Upper::read(&mut self.arena, self.root, layer, toc)?;
        for hide in &hides {
            self.hide(hide);
        }
        self.overlay(upper);
        Ok(())
    }

    /// The tree all layers added so far make.
    pub fn finish(mut self) -> Tree {
        let mut nodes: Vec<Node> = Vec::new();
        // By Id; node numbers stay below the sentinel because ids do.
        let mut numbers = vec![u32::MAX; self.arena.inodes.len()];
        let mut queue = VecDeque::from([self.root]);
        let mut next = 1;
        while let Some(id) = queue.pop_front() {
            let Inode { meta, xattrs, kind, .. } = self.arena.take(id);
            let (kind, nlink) = match kind {
                Kind::Directory { children, .. } => {
                    let mut nlink = 2;
                    let number = |(name, child): (Box<[u8]>, Id)| {
                        nlink += u32::from(self.arena.is_directory(child));
                        let number = &mut numbers[child as usize];
                        if *number == u32::MAX {
                            *number = next;
                            next += 1;
                            queue.push_back(child);
                        }
                        (name, NodeId(*number))
                    };
                    (NodeKind::Directory(children.into_iter().map(number).collect()), nlink)
                }
                Kind::Leaf(kind) => (kind, 0),
                Kind::Pending { .. } => unreachable!("links are settled when their layer ends"),
            };
            nodes.push(Node {
                meta,
                xattrs,
                nlink,
                kind,
            });
        }
        count_names(&mut nodes);
        Tree { nodes }
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
        let Some(children) = self.arena.children_mut(dir) else {
            return;
        };
        match name {
            Some(name) => {
                children.remove(name);
            }
            None => children.clear(),
        }
    }

    /// Lays the tree at `upper` over the merged one.
    fn overlay(&mut self, upper: Id) {
        let mut todo = vec![(upper, self.root)];
        while let Some((upper, lower)) = todo.pop() {
            let children = self.arena.children_mut(upper).map(std::mem::take).unwrap_or_default();
            for (name, above) in children {
                match self.arena.child(lower, &name) {
                    Some(below) if self.arena.is_directory(below) && self.arena.is_directory(above) => {
                        self.arena.describe(above, below);
                        todo.push((above, below));
                    }
                    _ => self.arena.bind(lower, &name, above),
                }
            }
        }
    }
}

impl Arena {
    /// Gives the directory `below` the metadata of the directory `above`, unless no entry describes that.
    fn describe(&mut self, above: Id, below: Id) {
        if matches!(self.get(above).kind, Kind::Directory { implied: true, .. }) {
            return;
        }
        let meta = self.get(above).meta;
        let xattrs = std::mem::take(&mut self.get_mut(above).xattrs);
        let below = self.get_mut(below);
        below.meta = meta;
        below.xattrs = xattrs;
    }

    /// Moves an inode out, leaving one of the same type (directory or not) without content.
    fn take(&mut self, id: Id) -> Inode {
        let inode = self.get_mut(id);
        let husk = match inode.kind {
            Kind::Directory { implied, .. } => Kind::Directory {
                children: BTreeMap::new(),
                implied,
            },
            Kind::Leaf(_) | Kind::Pending { .. } => Kind::Leaf(NodeKind::Fifo),
        };
        Inode {
            meta: inode.meta,
            xattrs: std::mem::take(&mut inode.xattrs),
            born: inode.born,
            kind: std::mem::replace(&mut inode.kind, husk),
        }
    }
}

/// Sets the link counts of what is no directory, and the mode of symlinks.
fn count_names(nodes: &mut [Node]) {
    let mut names = vec![0u32; nodes.len()];
    for node in &*nodes {
        if let NodeKind::Directory(children) = &node.kind {
            for (_, child) in children {
                names[child.0 as usize] += 1;
            }
        }
    }
    for (node, names) in nodes.iter_mut().zip(names) {
        match node.kind {
            NodeKind::Directory(_) => continue,
            NodeKind::Symlink(_) => node.meta.mode = 0o777,
            _ => {}
        }
        node.nlink = names;
    }
}
