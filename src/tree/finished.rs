//! The merged tree, with all nodes in their final order.

use std::collections::VecDeque;
use std::fmt;

use crate::toc::{AttributeId, Attributes, DataLayout, DeviceNumber, FileData, Metadata};
use crate::tree::arena::{Arena, ArenaDirent, ArenaInode, ArenaKind, Id, NONE};
use crate::tree::{LayerIdx, Node, NodeId, NodeKind};

/// The merged tree. A tree can have millions of nodes, so the nodes are packed. [`Tree::node`] returns one node as a
/// value.
pub struct Tree {
    arena: Arena,
    /// Inode of each node.
    order: Vec<Id>,
    /// Node of each inode.
    numbers: Vec<u32>,
    /// Numbers of all names. The names of one directory lie together and are sorted.
    sorted: Vec<u32>,
}

impl fmt::Debug for Tree {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nodes = (0..self.len().min(1000) as u32).map(|number| self.node(NodeId(number)));
        f.debug_list().entries(nodes).finish()
    }
}

impl PartialEq for Tree {
    fn eq(&self, other: &Self) -> bool {
        let same = |number| self.node(NodeId(number)) == other.node(NodeId(number));
        self.len() == other.len() && (0..self.len() as u32).all(same)
    }
}

impl Eq for Tree {}

/// The content of a node, borrowed from the tree.
#[derive(Debug, Clone, Copy)]
pub(crate) enum NodeView<'a> {
    Directory(Children<'a>),
    /// A regular file whose content is contiguous.
    Flat {
        layer: LayerIdx,
        size: u64,
        device: u64,
    },
    /// A sparse file.
    Sparse {
        layer: LayerIdx,
        size: u64,
        chunk_bits: u8,
        chunks: &'a [(u32, u64)],
    },
    Symlink(&'a [u8]),
    /// A character device with its encoded number.
    CharDevice(u32),
    BlockDevice(u32),
    Fifo,
}

/// The names in a directory, sorted.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Children<'a> {
    tree: &'a Tree,
    sorted: &'a [u32],
}

impl<'a> Children<'a> {
    pub fn len(&self) -> usize {
        self.sorted.len()
    }

    fn dirent(&self, index: usize) -> &'a ArenaDirent {
        &self.tree.arena.names.dirents[self.sorted[index] as usize]
    }

    pub fn name(&self, index: usize) -> &'a [u8] {
        self.tree.arena.names.name(self.dirent(index))
    }

    pub fn node(&self, index: usize) -> NodeId {
        let id = self.dirent(index).id;
        // A tree made from values may name nodes that it does not have.
        NodeId(self.tree.numbers.get(id as usize).copied().unwrap_or(id))
    }

    /// Returns the number of names that sort before `name`.
    pub fn before(&self, name: &[u8]) -> usize {
        let names = &self.tree.arena.names;
        let number = |number: &u32| names.name(&names.dirents[*number as usize]) < name;
        self.sorted.partition_point(number)
    }
}

impl Tree {
    /// The root directory.
    pub const ROOT: NodeId = NodeId(0);

    /// Makes the tree of the inodes that `root` leads to. Nodes are in breadth-first order, a directory's children by
    /// name.
    pub(super) fn of(mut arena: Arena, root: Id) -> Self {
        arena.names.close();
        let mut tree = Self {
            order: Vec::new(),
            numbers: vec![NONE; arena.inodes.len()],
            sorted: Vec::new(),
            arena,
        };
        tree.number(root);
        let mut queue = VecDeque::from([root]);
        while let Some(dir) = queue.pop_front() {
            let (start, len, subdirectories) = tree.sort(dir, &mut queue);
            let inode = tree.arena.get_mut(dir);
            inode.born = 2 + subdirectories;
            if let ArenaKind::Directory { first, len: count, .. } = &mut inode.kind {
                (*first, *count) = (start, len);
            }
        }
        tree
    }

    /// Gives the next node number to an inode.
    fn number(&mut self, id: Id) {
        // The number fits, because there are no more nodes than inodes.
        self.numbers[id as usize] = self.order.len() as u32;
        self.order.push(id);
    }

    /// Sorts the names of a directory, numbers their inodes and counts links. Appends the subdirectories to `queue`.
    /// Returns the position and the number of the names, and the number of subdirectories.
    fn sort(&mut self, dir: Id, queue: &mut VecDeque<Id>) -> (u32, u32, u32) {
        let start = self.sorted.len();
        let names = &self.arena.names;
        let mut next = self.arena.first(dir);
        while next != NONE {
            let dirent = &names.dirents[next as usize];
            if dirent.id != NONE {
                self.sorted.push(next);
            }
            next = dirent.next;
        }
        let name = |number: &u32| names.name(&names.dirents[*number as usize]);
        self.sorted[start..].sort_unstable_by(|a, b| name(a).cmp(name(b)));
        let mut directories = 0;
        for at in start..self.sorted.len() {
            let id = self.arena.names.dirents[self.sorted[at] as usize].id;
            let is_new = self.numbers[id as usize] == NONE;
            if is_new {
                self.number(id);
            }
            let inode = self.arena.get_mut(id);
            match inode.kind {
                ArenaKind::Directory { .. } => {
                    directories += 1;
                    queue.push_back(id);
                }
                ArenaKind::Symlink(_) => inode.meta.mode = 0o777,
                _ => {}
            }
            inode.born = if is_new { 1 } else { inode.born + 1 };
        }
        (start as u32, (self.sorted.len() - start) as u32, directories)
    }

    /// Makes a tree of these nodes, the root first. Keeps the given order of names without checking it.
    ///
    /// # Panics
    /// If a name has more than 255 bytes, or a link target more than 65535.
    pub fn from_nodes(nodes: Vec<Node>) -> Self {
        let mut arena = Arena::new(crate::memory::Allowance::new(u64::MAX).charge());
        let mut sorted = Vec::new();
        let mut directories = Vec::new();
        for (number, node) in (0..).zip(nodes) {
            let ids: Vec<AttributeId> = node
                .xattrs
                .iter()
                .map(|(name, value)| arena.sets.attributes.intern(name, value).0)
                .collect();
            let kind = match node.kind {
                NodeKind::Directory(children) => {
                    directories.push((number, children));
                    ArenaKind::Directory {
                        first: NONE,
                        len: 0,
                        implied: false,
                    }
                }
                NodeKind::Regular { layer, data } => arena.regular(layer, data),
                NodeKind::Symlink(target) => ArenaKind::Symlink(arena.text(&target).expect("there is no limit")),
                NodeKind::CharDevice(device) => ArenaKind::CharDevice(device.encoded()),
                NodeKind::BlockDevice(device) => ArenaKind::BlockDevice(device.encoded()),
                NodeKind::Fifo => ArenaKind::Fifo,
            };
            let inode = ArenaInode {
                meta: node.meta,
                xattrs: arena.sets.intern(&ids).expect("there is no limit"),
                born: node.nlink,
                kind,
            };
            arena.push(inode).expect("there is no limit");
        }
        for (dir, children) in directories {
            let start = sorted.len() as u32;
            for (name, child) in children {
                sorted.push(arena.names.append(dir, &name, child.0));
            }
            let end = sorted.len() as u32;
            if let ArenaKind::Directory { first, len, .. } = &mut arena.get_mut(dir).kind {
                (*first, *len) = (start, end - start);
            }
        }
        let all: Vec<u32> = (0..arena.inodes.len() as u32).collect();
        Self {
            order: all.clone(),
            numbers: all,
            sorted,
            arena,
        }
    }

    /// Returns the number of nodes.
    pub fn len(&self) -> usize {
        self.order.len()
    }

    /// Whether the tree has no node, not even a root. A merged tree always has a root.
    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    /// Returns a node as a value.
    ///
    /// # Panics
    /// If there is no such node.
    pub fn node(&self, node: NodeId) -> Node {
        let kind = match self.view(node) {
            NodeView::Directory(children) => {
                let child = |index| (children.name(index).into(), children.node(index));
                NodeKind::Directory((0..children.len()).map(child).collect())
            }
            NodeView::Flat { layer, size, device } => NodeKind::Regular {
                layer,
                data: FileData {
                    size,
                    layout: DataLayout::Flat { device },
                },
            },
            NodeView::Sparse {
                layer,
                size,
                chunk_bits,
                chunks,
            } => NodeKind::Regular {
                layer,
                data: FileData {
                    size,
                    layout: DataLayout::Chunked {
                        chunk_bits,
                        chunks: chunks.to_vec(),
                    },
                },
            },
            NodeView::Symlink(target) => NodeKind::Symlink(target.into()),
            NodeView::CharDevice(device) => NodeKind::CharDevice(DeviceNumber::decode(device)),
            NodeView::BlockDevice(device) => NodeKind::BlockDevice(DeviceNumber::decode(device)),
            NodeView::Fifo => NodeKind::Fifo,
        };
        let attribute = |id: &AttributeId| {
            let (name, value) = self.attributes().get(*id);
            (name.into(), value.into())
        };
        Node {
            meta: *self.meta(node),
            xattrs: self.xattrs(node).iter().map(attribute).collect(),
            nlink: self.nlink(node),
            kind,
        }
    }

    fn inode(&self, node: NodeId) -> &ArenaInode {
        self.arena.get(self.order[node.0 as usize])
    }

    pub(crate) fn meta(&self, node: NodeId) -> &Metadata {
        &self.inode(node).meta
    }

    pub(crate) fn nlink(&self, node: NodeId) -> u32 {
        self.inode(node).born
    }

    /// Returns the extended attributes of a node, sorted by name.
    pub(crate) fn xattrs(&self, node: NodeId) -> &[AttributeId] {
        self.arena.set(self.inode(node).xattrs)
    }

    /// Returns all attributes that nodes of the tree have.
    pub(crate) fn attributes(&self) -> &Attributes {
        &self.arena.sets.attributes
    }

    pub(crate) fn view(&self, node: NodeId) -> NodeView<'_> {
        match self.inode(node).kind {
            ArenaKind::Directory { first, len, .. } => NodeView::Directory(Children {
                tree: self,
                sorted: &self.sorted[first as usize..][..len as usize],
            }),
            ArenaKind::Flat { layer, size, device } => NodeView::Flat { layer, size, device },
            ArenaKind::Sparse { layer, map } => {
                let data = self.arena.map(map);
                match &data.layout {
                    DataLayout::Flat { device } => NodeView::Flat {
                        layer,
                        size: data.size,
                        device: *device,
                    },
                    DataLayout::Chunked { chunk_bits, chunks } => NodeView::Sparse {
                        layer,
                        size: data.size,
                        chunk_bits: *chunk_bits,
                        chunks,
                    },
                }
            }
            ArenaKind::Symlink(target) => NodeView::Symlink(self.arena.target(target)),
            ArenaKind::CharDevice(device) => NodeView::CharDevice(device),
            ArenaKind::BlockDevice(device) => NodeView::BlockDevice(device),
            ArenaKind::Fifo => NodeView::Fifo,
            ArenaKind::Pending { .. } => unreachable!("links are settled when their layer ends"),
        }
    }
}
