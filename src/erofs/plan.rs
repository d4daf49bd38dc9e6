//! Where everything of a tree goes in the image: the first pass of the writer. It checks the tree on the way, so that the second
//! pass can only fail to write.

use crate::erofs::ErofsError;
use crate::erofs::dirent::{FileType, Measure};
use crate::erofs::format::{BLOCK, FIRST_INODE, INODE, Layout, SLOT};
use crate::erofs::xattr;
use crate::toc::{DataLayout, FileData};
use crate::tree::{LayerIdx, Node, NodeId, NodeKind, Tree};

/// Entries of chunk maps in one image: 256 MiB of them. A few header bytes in a tar can claim exabytes of holes.
const MAX_CHUNKS: u64 = 1 << 26;

/// Most bytes to put behind an inode. What goes there must share a block with its inode, so a large piece may waste the rest of a
/// block before it; up to half a block that costs less than a block of its own would.
const MAX_INLINE: u64 = BLOCK / 2;

/// Longest symlink target, as in Linux (`PATH_MAX` with its NUL).
const MAX_SYMLINK: usize = 4095;

/// What one inode takes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub layout: Layout,
    pub xattr_size: u32,
    /// `st_size`.
    pub size: u64,
    /// Bytes behind inode and attributes: inline content or chunk map.
    pub extra: u64,
    /// Metadata blocks of its own.
    pub blocks: u64,
}

/// Places of all inodes, and what was counted on the way.
#[derive(Debug)]
pub(super) struct Plan {
    /// By node.
    pub nids: Vec<u32>,
    /// By node; of no meaning for anything but directories.
    pub parents: Vec<NodeId>,
    /// First block behind the inodes.
    pub first_block: u64,
    /// All metadata blocks.
    pub metadata_blocks: u64,
    /// First block of each layer's data device, then that behind the last.
    pub device_starts: Vec<u64>,
    pub any_xattrs: bool,
    pub dropped_xattrs: u64,
    pub any_chunked: bool,
}

/// What is wrong with a node; the path is found later.
#[derive(Debug)]
enum Flaw {
    Xattrs { size: u64, limit: u64 },
    Outside(LayerIdx),
    Chunks(u64),
    Unstorable(&'static str),
}

impl Plan {
    pub fn new(tree: &Tree, devices: &[u64]) -> Result<Self, ErofsError> {
        let mut plan = Self {
            nids: Vec::with_capacity(tree.nodes.len()),
            parents: vec![Tree::ROOT; tree.nodes.len()],
            first_block: 0,
            metadata_blocks: 0,
            device_starts: Vec::new(),
            any_xattrs: false,
            dropped_xattrs: 0,
            any_chunked: false,
        };
        let blocks_of = |sum: u64, size: &u64| sum.saturating_add(size.div_ceil(BLOCK));
        let device_blocks = devices.iter().fold(0, blocks_of);
        let too_large = |metadata_blocks| ErofsError::TooLarge {
            metadata_blocks,
            device_blocks,
        };
        let mut chunks = 0;
        let mut position = FIRST_INODE;
        let mut blocks = 0;
        for (number, node) in tree.nodes.iter().enumerate() {
            let id = NodeId(number as u32);
            let shape = plan
                .visit(id, node, devices, &mut chunks)
                .map_err(|flaw| flaw.at(tree, id))?;
            position = place(position, &shape);
            let nid = u32::try_from(position / SLOT).map_err(|_| too_large(position / BLOCK))?;
            plan.nids.push(nid);
            position = (position + INODE + u64::from(shape.xattr_size) + shape.extra).next_multiple_of(SLOT);
            blocks += shape.blocks;
        }
        plan.first_block = position.div_ceil(BLOCK);
        plan.metadata_blocks = plan.first_block + blocks;
        if plan.metadata_blocks.saturating_add(device_blocks) > u64::from(u32::MAX) {
            return Err(too_large(plan.metadata_blocks));
        }
        plan.device_starts = device_starts(plan.metadata_blocks, devices);
        Ok(plan)
    }

    /// Checks a node and counts what it needs.
    fn visit(&mut self, id: NodeId, node: &Node, devices: &[u64], chunks: &mut u64) -> Result<Shape, Flaw> {
        let (xattr_size, dropped) =
            xattr::measure(&node.xattrs).map_err(|(size, limit)| Flaw::Xattrs { size, limit })?;
        self.any_xattrs |= xattr_size > 0;
        self.dropped_xattrs += dropped;
        match &node.kind {
            NodeKind::Directory(children) => {
                for (name, child) in children {
                    check_name(name)?;
                    let parent = self.parents.get_mut(child.0 as usize);
                    *parent.ok_or(Flaw::Unstorable("an entry leads to no node"))? = id;
                }
                if !children.windows(2).all(|pair| pair[0].0 < pair[1].0) {
                    return Err(Flaw::Unstorable("its entries are not sorted, or one occurs twice"));
                }
            }
            NodeKind::Regular { layer, data } => {
                let device = devices.get(layer.0 as usize).copied().ok_or(Flaw::Outside(*layer))?;
                check_data(*layer, data, device)?;
                if let DataLayout::Chunked { chunk_bits, .. } = data.layout
                    && data.size > 0
                {
                    self.any_chunked = true;
                    *chunks = chunks.saturating_add(data.size.div_ceil(BLOCK << chunk_bits));
                    if *chunks > MAX_CHUNKS {
                        return Err(Flaw::Chunks(*chunks));
                    }
                }
            }
            NodeKind::Symlink(target) if target.is_empty() || target.len() > MAX_SYMLINK => {
                return Err(Flaw::Unstorable("a symlink target has 1 to 4095 bytes"));
            }
            _ => {}
        }
        Ok(Shape::of(node, xattr_size))
    }
}

impl Shape {
    /// The shape of a node whose attributes take `xattr_size` bytes.
    pub fn of(node: &Node, xattr_size: u32) -> Self {
        let plain = Self {
            layout: Layout::Plain,
            xattr_size,
            size: 0,
            extra: 0,
            blocks: 0,
        };
        match &node.kind {
            NodeKind::Directory(_) => {
                let mut measure = Measure::default();
                for (name, _) in entries(node) {
                    measure.add(name);
                }
                let (full, tail) = measure.finish();
                plain.stored(full, tail)
            }
            NodeKind::Symlink(target) => plain.stored(0, target.len() as u64),
            NodeKind::Regular { data, .. } => match data.layout {
                DataLayout::Chunked { chunk_bits, .. } if data.size > 0 => Self {
                    layout: Layout::Chunked,
                    size: data.size,
                    extra: data.size.div_ceil(BLOCK << chunk_bits) * 4,
                    ..plain
                },
                _ => Self {
                    size: data.size,
                    ..plain
                },
            },
            NodeKind::CharDevice(_) | NodeKind::BlockDevice(_) | NodeKind::Fifo => plain,
        }
    }

    /// With content of `full` blocks and `tail` bytes, all of it metadata.
    fn stored(self, full: u64, tail: u64) -> Self {
        let size = full * BLOCK + tail;
        if tail > 0 && INODE + u64::from(self.xattr_size) + tail <= MAX_INLINE {
            Self {
                layout: Layout::Inline,
                size,
                extra: tail,
                blocks: full,
                ..self
            }
        } else {
            Self {
                size,
                blocks: full + u64::from(tail > 0),
                ..self
            }
        }
    }
}

/// Names and nodes of a directory as stored, with `.` and `..` in their places; those two have no node.
pub(super) fn entries(node: &Node) -> impl Iterator<Item = (&[u8], Option<NodeId>)> {
    let children = match &node.kind {
        NodeKind::Directory(children) => &children[..],
        _ => &[],
    };
    let dot = children.partition_point(|(name, _)| **name < b"."[..]);
    let dotdot = children.partition_point(|(name, _)| **name < b".."[..]);
    let range = |from: usize, to: usize| children[from..to].iter().map(|(name, id)| (&name[..], Some(*id)));
    range(0, dot)
        .chain([(&b"."[..], None)])
        .chain(range(dot, dotdot))
        .chain([(&b".."[..], None)])
        .chain(range(dotdot, children.len()))
}

/// First block of each device behind `metadata_blocks`, and the block behind the last.
pub(super) fn device_starts(metadata_blocks: u64, devices: &[u64]) -> Vec<u64> {
    let mut next = metadata_blocks;
    let mut starts = vec![next];
    for size in devices {
        next = next.saturating_add(size.div_ceil(BLOCK));
        starts.push(next);
    }
    starts
}

/// Where an inode of this shape can begin, from `position` on: it lies within one block with all that belongs to it, or at the
/// start of a block if it is larger.
fn place(position: u64, shape: &Shape) -> u64 {
    let whole = INODE + u64::from(shape.xattr_size) + shape.extra;
    if position % BLOCK + whole > BLOCK {
        position.next_multiple_of(BLOCK)
    } else {
        position
    }
}

fn check_name(name: &[u8]) -> Result<(), Flaw> {
    let dots = name == b"." || name == b"..";
    if name.is_empty() || name.len() > 255 || dots || name.contains(&b'/') || name.contains(&0) {
        return Err(Flaw::Unstorable(
            "a name has 1 to 255 bytes, no slash, no NUL, and is not `.` or `..`",
        ));
    }
    Ok(())
}

fn check_data(layer: LayerIdx, data: &FileData, device: u64) -> Result<(), Flaw> {
    if data.size > i64::MAX as u64 {
        return Err(Flaw::Unstorable("a file has at most 2^63 - 1 bytes"));
    }
    let device = device.div_ceil(BLOCK).saturating_mul(BLOCK);
    let inside = |offset: u64, len: u64| {
        let end = offset.checked_add(len);
        offset.is_multiple_of(BLOCK) && end.is_some_and(|end| end <= device)
    };
    let fits = match &data.layout {
        _ if data.size == 0 => true,
        DataLayout::Flat { device } => inside(*device, data.size),
        DataLayout::Chunked { chunk_bits, .. } if *chunk_bits > 31 => {
            return Err(Flaw::Unstorable("its chunks are larger than 2^31 blocks"));
        }
        DataLayout::Chunked { chunk_bits, chunks } => {
            let chunk = BLOCK << chunk_bits;
            if !chunks.windows(2).all(|pair| pair[0].0 < pair[1].0) {
                return Err(Flaw::Unstorable("its chunks are not in order"));
            }
            chunks.iter().all(|(number, offset)| {
                let start = u64::from(*number).saturating_mul(chunk);
                start < data.size && inside(*offset, chunk.min(data.size - start))
            })
        }
    };
    if fits { Ok(()) } else { Err(Flaw::Outside(layer)) }
}

impl Flaw {
    fn at(self, tree: &Tree, id: NodeId) -> ErofsError {
        let path = path_of(tree, id);
        match self {
            Self::Xattrs { size, limit } => ErofsError::XattrsTooLarge { path, size, limit },
            Self::Outside(layer) => ErofsError::OutsideDevice { path, layer },
            Self::Chunks(chunks) => ErofsError::TooManyChunks {
                path,
                chunks,
                limit: MAX_CHUNKS,
            },
            Self::Unstorable(what) => ErofsError::Unstorable { path, what },
        }
    }
}

/// A path to a node, for error messages: found by search, since nodes do not know their names.
fn path_of(tree: &Tree, id: NodeId) -> Box<[u8]> {
    let mut names: Vec<&[u8]> = Vec::new();
    let mut at = id;
    // A tree has no deeper path than it has nodes, so this ends even if the tree is none.
    while at != Tree::ROOT && names.len() < tree.nodes.len() {
        let parent = tree.nodes.iter().enumerate().find_map(|(number, node)| {
            let NodeKind::Directory(children) = &node.kind else {
                return None;
            };
            let (name, _) = children.iter().find(|(_, child)| *child == at)?;
            Some((number, &name[..]))
        });
        let Some((number, name)) = parent else {
            break;
        };
        names.push(name);
        at = NodeId(number as u32);
    }
    let mut path = Vec::new();
    for name in names.iter().rev() {
        path.push(b'/');
        path.extend_from_slice(name);
    }
    if path.is_empty() {
        path.push(b'/');
    }
    path.into()
}

/// Type of a node.
pub(super) fn file_type(node: &Node) -> FileType {
    match node.kind {
        NodeKind::Directory(_) => FileType::Directory,
        NodeKind::Regular { .. } => FileType::Regular,
        NodeKind::Symlink(_) => FileType::Symlink,
        NodeKind::CharDevice(_) => FileType::CharDevice,
        NodeKind::BlockDevice(_) => FileType::BlockDevice,
        NodeKind::Fifo => FileType::Fifo,
    }
}
