//! The first pass of the writer: plans where everything of a tree goes in the image.
//!
//! The plan also checks the tree, so the second pass fails only if its output fails.

use crate::erofs::ErofsError;
use crate::erofs::dirent::{FileType, Measure};
use crate::erofs::format::{AttributeKinds, BLOCK, FIRST_INODE, INODE, Layout, SLOT};
use crate::erofs::xattr::{self, SharedAttributes};
use crate::tree::{Children, LayerIdx, NodeId, NodeView, Tree};

/// Most entries of all chunk maps in one image, together 256 MiB. A few header bytes in a tar can claim exabytes of
/// holes.
const MAX_CHUNKS: u64 = 1 << 26;

/// Most bytes of an inode together with its attributes and inline content. All of them must share one block, so a
/// large inode may waste the rest of the block before it. Up to half a block, the waste costs less than a separate
/// block for the content would.
const MAX_INLINE: u64 = BLOCK / 2;

/// Longest symlink target in bytes: `PATH_MAX` of Linux without the NUL.
const MAX_SYMLINK: usize = 4095;

/// What one inode takes in the image.
#[derive(Debug, Clone, Copy)]
pub(super) struct InodeShape {
    pub layout: Layout,
    pub xattr_size: u32,
    /// Size that stat(2) shows, in bytes.
    pub size: u64,
    /// Bytes behind inode and attributes: inline content or chunk map.
    pub extra: u64,
    /// Metadata blocks that only this inode uses.
    pub blocks: u64,
}

/// The places of all inodes, and some totals.
#[derive(Debug)]
pub(super) struct Plan {
    /// Nid of each node.
    pub nids: Vec<u32>,
    /// Parent of each node; meaningless for nodes that are no directories.
    pub parents: Vec<NodeId>,
    pub shared: SharedAttributes,
    /// First block behind the inodes.
    pub first_block: u64,
    /// First block of the shared attributes, which are the last part of the image.
    pub xattr_block: u64,
    /// Number of all metadata blocks.
    pub metadata_blocks: u64,
    /// First block of each layer's data device, then the block behind the last device.
    pub device_starts: Vec<u64>,
    pub attributes: AttributeKinds,
    pub dropped_xattrs: u64,
    pub any_chunked: bool,
}

/// What is wrong with a node. The caller adds the path.
#[derive(Debug)]
enum Flaw {
    Xattrs { size: u64, limit: u64 },
    Outside(LayerIdx),
    Chunks(u64),
    Unstorable(&'static str),
}

impl Plan {
    /// Plans the image of `tree`. `limit` is the most bytes that the image may have.
    pub fn new(tree: &Tree, devices: &[u64], limit: u64) -> Result<Self, ErofsError> {
        let mut plan = Self {
            nids: Vec::with_capacity(tree.len()),
            parents: vec![Tree::ROOT; tree.len()],
            shared: SharedAttributes::of(tree),
            first_block: 0,
            xattr_block: 0,
            metadata_blocks: 0,
            device_starts: Vec::new(),
            attributes: AttributeKinds::None,
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
        let mut blocks = plan.shared.bytes.div_ceil(BLOCK);
        for number in 0..tree.len() as u32 {
            let id = NodeId(number);
            let visited = plan.visit(id, tree, devices, &mut chunks);
            let shape = visited.map_err(|flaw| flaw.at(path_of(tree, &plan.parents, id)))?;
            position = place(position, &shape);
            let nid = u32::try_from(position / SLOT).map_err(|_| too_large(position / BLOCK))?;
            plan.nids.push(nid);
            position = (position + INODE + u64::from(shape.xattr_size) + shape.extra).next_multiple_of(SLOT);
            blocks += shape.blocks;
            let bytes = (position.div_ceil(BLOCK) + blocks) * BLOCK;
            if bytes > limit {
                return Err(ErofsError::TooMuchMetadata {
                    path: path_of(tree, &plan.parents, id),
                    bytes,
                    limit,
                });
            }
        }
        plan.first_block = position.div_ceil(BLOCK);
        plan.metadata_blocks = plan.first_block + blocks;
        plan.xattr_block = plan.metadata_blocks - plan.shared.bytes.div_ceil(BLOCK);
        if plan.metadata_blocks.saturating_add(device_blocks) > u64::from(u32::MAX) {
            return Err(too_large(plan.metadata_blocks));
        }
        plan.device_starts = device_starts(plan.metadata_blocks, devices);
        Ok(plan)
    }

    /// Checks a node and returns what it needs.
    fn visit(&mut self, id: NodeId, tree: &Tree, devices: &[u64], chunks: &mut u64) -> Result<InodeShape, Flaw> {
        let (xattr_size, dropped) = self
            .shared
            .measure(tree, id)
            .map_err(|(size, limit)| Flaw::Xattrs { size, limit })?;
        if xattr_size > 0 {
            self.attributes = self.attributes.max(xattr::attributes(tree, id));
        }
        self.dropped_xattrs += dropped;
        let view = tree.view(id);
        match view {
            NodeView::Directory(children) => {
                for index in 0..children.len() {
                    check_name(children.name(index))?;
                    let parent = self.parents.get_mut(children.node(index).0 as usize);
                    *parent.ok_or(Flaw::Unstorable("an entry leads to no node"))? = id;
                }
                if !(1..children.len()).all(|index| children.name(index - 1) < children.name(index)) {
                    return Err(Flaw::Unstorable("its entries are not sorted, or one occurs twice"));
                }
            }
            NodeView::Flat { layer, size, device } => {
                let inside = Inside::of(layer, size, devices)?;
                inside.check(size == 0 || inside.holds(device, size))?;
            }
            NodeView::Sparse {
                layer,
                size,
                chunk_bits,
                chunks: stored,
            } => {
                Inside::of(layer, size, devices)?.check_chunks(size, chunk_bits, stored)?;
                if size > 0 {
                    self.any_chunked = true;
                    *chunks = chunks.saturating_add(size.div_ceil(BLOCK << chunk_bits));
                    if *chunks > MAX_CHUNKS {
                        return Err(Flaw::Chunks(*chunks));
                    }
                }
            }
            NodeView::Symlink(target) if target.is_empty() || target.len() > MAX_SYMLINK => {
                return Err(Flaw::Unstorable("a symlink target has 1 to 4095 bytes"));
            }
            _ => {}
        }
        Ok(InodeShape::of(view, xattr_size))
    }
}

impl InodeShape {
    /// Returns the shape of a node whose attributes take `xattr_size` bytes.
    pub fn of(view: NodeView<'_>, xattr_size: u32) -> Self {
        let plain = Self {
            layout: Layout::Plain,
            xattr_size,
            size: 0,
            extra: 0,
            blocks: 0,
        };
        match view {
            NodeView::Directory(children) => {
                let mut measure = Measure::default();
                for (name, _) in entries(children) {
                    measure.add(name);
                }
                let (full, tail) = measure.finish();
                plain.stored(full, tail)
            }
            NodeView::Symlink(target) => plain.stored(0, target.len() as u64),
            NodeView::Sparse { size, chunk_bits, .. } if size > 0 => Self {
                layout: Layout::Chunked,
                size,
                extra: size.div_ceil(BLOCK << chunk_bits) * 4,
                ..plain
            },
            NodeView::Flat { size, .. } => Self { size, ..plain },
            NodeView::Sparse { .. } | NodeView::CharDevice(_) | NodeView::BlockDevice(_) | NodeView::Fifo => plain,
        }
    }

    /// Returns the shape with content of `full` blocks and `tail` bytes, all of it metadata.
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

/// Returns the names and nodes of a directory as stored, with `.` and `..` in their places. The names `.` and `..`
/// have no node.
pub(super) fn entries(children: Children<'_>) -> impl Iterator<Item = (&[u8], Option<NodeId>)> {
    let (dot, dotdot) = (children.before(b"."), children.before(b".."));
    let range =
        move |from: usize, to: usize| (from..to).map(move |index| (children.name(index), Some(children.node(index))));
    range(0, dot)
        .chain([(&b"."[..], None)])
        .chain(range(dot, dotdot))
        .chain([(&b".."[..], None)])
        .chain(range(dotdot, children.len()))
}

/// Returns the first block of each device behind `metadata_blocks`, then the block behind the last device.
pub(super) fn device_starts(metadata_blocks: u64, devices: &[u64]) -> Vec<u64> {
    let mut next = metadata_blocks;
    let mut starts = vec![next];
    for size in devices {
        next = next.saturating_add(size.div_ceil(BLOCK));
        starts.push(next);
    }
    starts
}

/// Returns where an inode of this shape can begin, from `position` on. The inode and all that belongs to it must lie
/// within one block. If they are larger than a block, they begin at the start of one.
fn place(position: u64, shape: &InodeShape) -> u64 {
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

/// The data device of a layer. The content of the layer's files must lie within it.
struct Inside {
    layer: LayerIdx,
    /// Size in bytes, a multiple of the block size.
    device: u64,
}

impl Inside {
    fn of(layer: LayerIdx, size: u64, devices: &[u64]) -> Result<Self, Flaw> {
        let device = devices.get(layer.0 as usize).ok_or(Flaw::Outside(layer))?;
        if size > i64::MAX as u64 {
            return Err(Flaw::Unstorable("a file has at most 2^63 - 1 bytes"));
        }
        let device = device.div_ceil(BLOCK).saturating_mul(BLOCK);
        Ok(Self { layer, device })
    }

    fn holds(&self, offset: u64, len: u64) -> bool {
        let end = offset.checked_add(len);
        offset.is_multiple_of(BLOCK) && end.is_some_and(|end| end <= self.device)
    }

    fn check(&self, fits: bool) -> Result<(), Flaw> {
        if fits { Ok(()) } else { Err(Flaw::Outside(self.layer)) }
    }

    fn check_chunks(&self, size: u64, chunk_bits: u8, chunks: &[(u32, u64)]) -> Result<(), Flaw> {
        if size == 0 {
            return Ok(());
        }
        if chunk_bits > 31 {
            return Err(Flaw::Unstorable("its chunks are larger than 2^31 blocks"));
        }
        let chunk = BLOCK << chunk_bits;
        if !chunks.windows(2).all(|pair| pair[0].0 < pair[1].0) {
            return Err(Flaw::Unstorable("its chunks are not in order"));
        }
        self.check(chunks.iter().all(|(number, offset)| {
            let start = u64::from(*number).saturating_mul(chunk);
            start < size && self.holds(*offset, chunk.min(size - start))
        }))
    }
}

impl Flaw {
    fn at(self, path: Box<[u8]>) -> ErofsError {
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

/// Returns a path to a node, for error messages. The parents of the node must have been visited.
fn path_of(tree: &Tree, parents: &[NodeId], id: NodeId) -> Box<[u8]> {
    let mut names: Vec<&[u8]> = Vec::new();
    let mut at = id;
    // A path has at most as many components as the tree has nodes, so the loop ends even if `parents` is no tree.
    while at != Tree::ROOT && names.len() < tree.len() {
        let parent = parents[at.0 as usize];
        let NodeView::Directory(children) = tree.view(parent) else {
            break;
        };
        let Some(index) = (0..children.len()).find(|index| children.node(*index) == at) else {
            break;
        };
        names.push(children.name(index));
        at = parent;
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

/// Returns the type of a node.
pub(super) fn file_type(view: NodeView<'_>) -> FileType {
    match view {
        NodeView::Directory(_) => FileType::Directory,
        NodeView::Flat { .. } | NodeView::Sparse { .. } => FileType::Regular,
        NodeView::Symlink(_) => FileType::Symlink,
        NodeView::CharDevice(_) => FileType::CharDevice,
        NodeView::BlockDevice(_) => FileType::BlockDevice,
        NodeView::Fifo => FileType::Fifo,
    }
}
