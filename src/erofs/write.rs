//! Writes the image.
//!
//! A first pass over the tree writes the inodes in order. A second pass writes the blocks of directories and long
//! symlinks. The shared attributes come last. All bytes are written once, front to back. The writer holds back only
//! the first block, until its checksum is known.

use std::io::{BufWriter, Write};

use crate::erofs::ErofsError;
use crate::erofs::dirent::{self, FileType, Measure};
use crate::erofs::format::{BLOCK, INCOMPAT_CHUNKED, INODE, Layout, NULL_BLOCK, RawInode, SLOT, Superblock};
use crate::erofs::plan::{InodeShape, Plan, entries, file_type};
use crate::erofs::xattr;
use crate::oci::Digest;
use crate::tree::{Children, LayerIdx, NodeId, NodeView, Tree};

/// What the writer wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WriteSummary {
    /// Size of the image in bytes, a multiple of 4096.
    pub metadata_bytes: u64,
    /// Size of the whole disk in bytes: the image and all data devices behind it.
    pub disk_bytes: u64,
    /// Number of inodes.
    pub inodes: u64,
    /// Number of extended attributes left out because EROFS or Linux has no such namespace or takes no such size.
    pub dropped_xattrs: u64,
}

/// Writes the metadata image of `tree` to `out`.
///
/// `devices` has the size in bytes of each layer's data device, base first. `seed` is the digest of the manifest; the
/// UUID of the file system is derived from it. The writer checks the tree before it writes the first byte.
pub fn write(tree: &Tree, devices: &[u64], seed: &Digest, out: impl Write) -> Result<WriteSummary, ErofsError> {
    Planned::new(tree, devices, u64::MAX)?.write(seed, out)
}

/// An image whose layout is planned and checked.
#[derive(Debug)]
pub struct Planned<'a> {
    tree: &'a Tree,
    plan: Plan,
}

impl<'a> Planned<'a> {
    /// Checks a tree and plans its image of at most `limit` bytes. For `devices` see [`write()`].
    pub fn new(tree: &'a Tree, devices: &[u64], limit: u64) -> Result<Self, ErofsError> {
        let plan = Plan::new(tree, devices, limit)?;
        Ok(Self { tree, plan })
    }

    /// Returns the size of the image in bytes, a multiple of 4096.
    pub fn metadata_bytes(&self) -> u64 {
        self.plan.metadata_blocks * BLOCK
    }

    /// Writes the image to `out`. Fails only if `out` fails.
    pub fn write(&self, seed: &Digest, out: impl Write) -> Result<WriteSummary, ErofsError> {
        let Self { tree, plan } = self;
        let disk_blocks = *plan.device_starts.last().expect("the end of the disk is always there");
        let superblock = Superblock {
            root_nid: plan.nids.first().map_or(0, |nid| *nid as u16),
            inodes: tree.len() as u64,
            blocks: u32::try_from(disk_blocks).expect("checked by the plan"),
            uuid: uuid(seed),
            attributes: Some(plan.attributes),
            incompat: if plan.any_chunked { INCOMPAT_CHUNKED } else { 0 },
            // The block number fits, because the number of all blocks fits.
            xattr_block: if plan.shared.bytes > 0 {
                plan.xattr_block as u32
            } else {
                0
            },
        };
        let mut emit = Emit {
            tree,
            plan,
            out: ImageWriter {
                head: Some((Vec::with_capacity(BLOCK as usize), superblock)),
                inner: BufWriter::with_capacity(1 << 18, out),
                position: 0,
            },
            scratch: Vec::new(),
        };
        emit.inodes()?;
        emit.blocks()?;
        emit.shared_xattrs()?;
        emit.out.inner.flush()?;
        debug_assert_eq!(emit.out.position, self.metadata_bytes());
        Ok(WriteSummary {
            metadata_bytes: self.metadata_bytes(),
            disk_bytes: disk_blocks * BLOCK,
            inodes: tree.len() as u64,
            dropped_xattrs: plan.dropped_xattrs,
        })
    }
}

/// Returns the first 16 bytes of the hash with the marks of an application-defined UUID (RFC 9562, version 8).
fn uuid(seed: &Digest) -> [u8; 16] {
    let mut uuid = [0; 16];
    for (byte, pair) in uuid.iter_mut().zip(seed.hex().as_bytes().chunks(2)) {
        let digit = |c: u8| (c as char).to_digit(16).unwrap_or(0) as u8;
        *byte = pair.iter().fold(0, |value, c| value << 4 | digit(*c));
    }
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}

struct Emit<'a, W: Write> {
    tree: &'a Tree,
    plan: &'a Plan,
    out: ImageWriter<W>,
    /// Attributes and tail of one inode, or one block.
    scratch: Vec<u8>,
}

impl<W: Write> Emit<'_, W> {
    fn inodes(&mut self) -> Result<(), ErofsError> {
        let (tree, plan) = (self.tree, self.plan);
        let mut next_block = plan.first_block;
        for number in 0..tree.len() as u32 {
            let id = NodeId(number);
            let view = tree.view(id);
            self.scratch.clear();
            plan.shared.encode(tree, id, &mut self.scratch);
            let shape = InodeShape::of(view, self.scratch.len() as u32);
            self.out.pad_to(u64::from(plan.nids[number as usize]) * SLOT)?;
            self.out.write(&self.inode(id, view, &shape, next_block))?;
            match (view, shape.layout) {
                (NodeView::Symlink(target), Layout::Inline) => self.scratch.extend_from_slice(target),
                (NodeView::Directory(children), Layout::Inline) => {
                    let (tail, keep) = (&mut self.scratch, shape.xattr_size as usize);
                    each_block(tree, plan, id, children, &mut |block| {
                        tail.truncate(keep);
                        tail.extend_from_slice(block);
                        Ok(())
                    })?;
                }
                _ => {}
            }
            self.out.write(&self.scratch)?;
            if let (
                NodeView::Sparse {
                    layer,
                    size,
                    chunk_bits,
                    chunks,
                },
                Layout::Chunked,
            ) = (view, shape.layout)
            {
                self.chunk_map(layer, size.div_ceil(BLOCK << chunk_bits), chunks)?;
            }
            next_block += shape.blocks;
        }
        self.out.pad_to(plan.first_block * BLOCK)
    }

    fn inode(&self, id: NodeId, view: NodeView<'_>, shape: &InodeShape, next_block: u64) -> [u8; INODE as usize] {
        let union = match view {
            NodeView::CharDevice(device) | NodeView::BlockDevice(device) => device,
            NodeView::Flat { size: 0, .. } | NodeView::Sparse { size: 0, .. } => 0,
            NodeView::Flat { layer, device, .. } => self.device_block(layer, device),
            NodeView::Sparse { chunk_bits, .. } => u32::from(chunk_bits),
            NodeView::Directory(_) | NodeView::Symlink(_) if shape.blocks > 0 => next_block as u32,
            NodeView::Directory(_) | NodeView::Symlink(_) | NodeView::Fifo => 0,
        };
        let meta = self.tree.meta(id);
        let inode = RawInode {
            layout: shape.layout,
            xattr_size: shape.xattr_size,
            mode: file_type(view).mode_bits() | meta.mode & 0o7777,
            size: shape.size,
            union,
            ino: id.0 + 1,
            uid: meta.uid,
            gid: meta.gid,
            mtime: meta.mtime,
            mtime_nsec: meta.mtime_nsec,
            nlink: self.tree.nlink(id),
        };
        inode.encode()
    }

    /// Returns the disk block that contains byte `offset` of a data device. The plan has checked that there is one.
    fn device_block(&self, layer: LayerIdx, offset: u64) -> u32 {
        (self.plan.device_starts[layer.0 as usize] + offset / BLOCK) as u32
    }

    fn chunk_map(&mut self, layer: LayerIdx, count: u64, chunks: &[(u32, u64)]) -> Result<(), ErofsError> {
        let mut stored = chunks.iter().peekable();
        for number in 0..count {
            let chunk = stored.next_if(|(at, _)| u64::from(*at) == number);
            let block = chunk.map_or(NULL_BLOCK, |(_, offset)| self.device_block(layer, *offset));
            self.out.write(&block.to_le_bytes())?;
        }
        Ok(())
    }

    /// Writes the blocks behind the inodes.
    fn blocks(&mut self) -> Result<(), ErofsError> {
        for number in 0..self.tree.len() as u32 {
            let id = NodeId(number);
            let view = self.tree.view(id);
            if !matches!(view, NodeView::Directory(_) | NodeView::Symlink(_)) {
                continue;
            }
            let measured = self.plan.shared.measure(self.tree, id);
            let (xattr_size, _) = measured.expect("the plan measured the same");
            let mut left = InodeShape::of(view, xattr_size).blocks;
            if left == 0 {
                continue;
            }
            let out = &mut self.out;
            let mut write_block = |block: &[u8]| {
                if left == 0 {
                    return Ok(()); // the tail, which lies behind the inode
                }
                left -= 1;
                out.write(block)?;
                out.pad_to(out.position.next_multiple_of(BLOCK))
            };
            match view {
                NodeView::Symlink(target) => write_block(target)?,
                NodeView::Directory(children) => each_block(self.tree, self.plan, id, children, &mut write_block)?,
                _ => {}
            }
        }
        Ok(())
    }

    /// Writes the attributes that inodes share.
    fn shared_xattrs(&mut self) -> Result<(), ErofsError> {
        for id in self.plan.shared.area() {
            self.scratch.clear();
            xattr::encode(self.tree, id, &mut self.scratch);
            self.out.write(&self.scratch)?;
        }
        self.out.pad_to(self.plan.metadata_blocks * BLOCK)
    }
}

/// Gives each block of a directory to `take`, in order. The last block may be short.
fn each_block(
    tree: &Tree,
    plan: &Plan,
    id: NodeId,
    children: Children<'_>,
    take: &mut dyn FnMut(&[u8]) -> Result<(), ErofsError>,
) -> Result<(), ErofsError> {
    let mut measure = Measure::default();
    let mut block: Vec<(&[u8], u64, FileType)> = Vec::new();
    let mut bytes = Vec::with_capacity(BLOCK as usize);
    for (name, child) in entries(children) {
        if measure.add(name) {
            bytes.clear();
            dirent::encode(&block, &mut bytes);
            take(&bytes)?;
            block.clear();
        }
        let child = match child {
            Some(child) => child,
            None if name == b"." => id,
            None => plan.parents[id.0 as usize],
        };
        let file_type = file_type(tree.view(child));
        block.push((name, u64::from(plan.nids[child.0 as usize]), file_type));
    }
    bytes.clear();
    dirent::encode(&block, &mut bytes);
    take(&bytes)
}

/// Counts written bytes. Keeps the first block until it is complete and has its checksum.
struct ImageWriter<W: Write> {
    head: Option<(Vec<u8>, Superblock)>,
    inner: BufWriter<W>,
    position: u64,
}

impl<W: Write> ImageWriter<W> {
    fn write(&mut self, mut bytes: &[u8]) -> Result<(), ErofsError> {
        self.position += bytes.len() as u64;
        if let Some((head, superblock)) = &mut self.head {
            let (first, rest) = bytes.split_at(bytes.len().min(BLOCK as usize - head.len()));
            head.extend_from_slice(first);
            bytes = rest;
            if let Some(block) = head.first_chunk_mut() {
                superblock.encode(block);
                self.inner.write_all(block)?;
                self.head = None;
            }
        }
        Ok(self.inner.write_all(bytes)?)
    }

    fn pad_to(&mut self, position: u64) -> Result<(), ErofsError> {
        const ZEROS: [u8; BLOCK as usize] = [0; BLOCK as usize];
        while self.position < position {
            let len = (position - self.position).min(BLOCK) as usize;
            self.write(&ZEROS[..len])?;
        }
        Ok(())
    }
}
