//! The inodes and names of a merge in progress.
//!
//! All trees of a merge share one arena: the tree of the layers so far, and the tree of the current layer. A hard
//! link across layers is therefore only an id. No function recurses, because paths may be thousands of components
//! deep.
//!
//! An image can have millions of inodes, so each inode is a small record. Names lie back to back in one long buffer,
//! and so do link targets. Equal attributes are stored once. One hash table finds names in all directories. An inode
//! that loses its last name stays until [`Arena::compact`] removes it. The arena charges all its memory.

mod compact;
mod names;
mod walk;
mod xattrs;

pub(super) use names::ArenaDirent;
use names::Names;
pub(super) use walk::split;
pub(super) use xattrs::SetId;
use xattrs::Sets;

use crate::memory::{Charge, OverLimit};
use crate::toc::{AttributeId, DataLayout, FileData, Metadata};
use crate::tree::LayerIdx;

/// Position of an inode in its [`Arena`].
pub(super) type Id = u32;

/// Stands for "none" in the place of an [`Id`] or of the number of a [`ArenaDirent`].
pub(super) const NONE: u32 = u32::MAX;

/// Encoded form of [`DeviceNumber::WHITEOUT`](crate::toc::DeviceNumber::WHITEOUT).
pub(super) const WHITEOUT: u32 = 0;

/// Metadata of a directory that no entry describes. Image engines agree on these values for parents that a layer
/// leaves out.
pub(super) const IMPLIED: Metadata = Metadata {
    mode: 0o755,
    uid: 0,
    gid: 0,
    mtime: 0,
    mtime_nsec: 0,
};

/// Most inodes of all layers together: about three times the most entries of one layer. There may be more inodes than
/// entries, because one long path can imply thousands of directories.
const MAX_INODES: usize = 32 << 20;

/// Memory in bytes that an inode takes: its record, and its places in the finished tree and in the plan of the EROFS
/// image.
const INODE_BYTES: usize = size_of::<ArenaInode>() + 20;

#[derive(Debug, Clone, Copy)]
pub(super) struct ArenaInode {
    pub meta: Metadata,
    pub xattrs: SetId,
    /// Number of the entry that made the inode, within its layer. In a finished tree: the link count.
    pub born: u32,
    pub kind: ArenaKind,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum ArenaKind {
    Directory {
        /// Number of the directory's first name. In a finished tree: the position of its names among all sorted
        /// names.
        first: u32,
        /// In a finished tree: the number of names.
        len: u32,
        /// Whether no entry of the current layer describes the directory.
        implied: bool,
    },
    /// A regular file whose content is contiguous.
    Flat {
        layer: LayerIdx,
        size: u64,
        device: u64,
    },
    /// A sparse file, with the number of its chunk list in the arena.
    Sparse {
        layer: LayerIdx,
        map: u32,
    },
    Symlink(TargetText),
    /// A character device with its encoded number.
    CharDevice(u32),
    BlockDevice(u32),
    Fifo,
    /// A hard link whose target was unknown when the link was read. `bound` later is the inode it stands for.
    Pending {
        target: TargetText,
        bound: Id,
    },
}

/// Place of a link target in the arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TargetText {
    start: u32,
    /// Length in bytes, at most `PATH_MAX`.
    len: u16,
}

/// Why the arena takes nothing more.
#[derive(Debug, Clone, Copy)]
pub(super) enum Full {
    /// The arena has [`MAX_INODES`] inodes.
    Inodes,
    /// The memory is used up, or 32 bits cannot number the bytes of names or link targets.
    Memory(OverLimit),
}

impl From<OverLimit> for Full {
    fn from(over: OverLimit) -> Self {
        Self::Memory(over)
    }
}

/// All inodes by [`Id`], and their names.
#[derive(Debug, Default)]
pub(super) struct Arena {
    pub inodes: Vec<ArenaInode>,
    pub names: Names,
    pub sets: Sets,
    targets: Vec<u8>,
    /// Chunk lists of sparse files.
    maps: Vec<FileData>,
    map_bytes: usize,
    charge: Charge,
    /// Memory in bytes after the last [`Arena::compact`].
    live: usize,
}

impl Arena {
    pub fn new(charge: Charge) -> Self {
        Self {
            charge,
            ..Self::default()
        }
    }

    /// Returns the memory in bytes that grows with every addition.
    fn bytes(&self) -> usize {
        self.inodes.len() * INODE_BYTES + self.names.bytes() + self.sets.bytes() + self.targets.len() + self.map_bytes
    }

    /// Charges for all of the arena, and for `more` bytes.
    pub fn cover(&mut self, more: usize) -> Result<(), Full> {
        Ok(self.charge.cover((self.bytes() + more) as u64)?)
    }

    pub fn push(&mut self, inode: ArenaInode) -> Result<Id, Full> {
        if self.inodes.len() == MAX_INODES {
            return Err(Full::Inodes);
        }
        // The number fits, because there are at most `MAX_INODES` inodes.
        let id = self.inodes.len() as Id;
        self.inodes.push(inode);
        self.cover(0)?;
        Ok(id)
    }

    pub fn implied_directory(&mut self, born: u32) -> Result<Id, Full> {
        self.push(ArenaInode {
            meta: IMPLIED,
            xattrs: SetId::EMPTY,
            born,
            kind: ArenaKind::Directory {
                first: NONE,
                len: 0,
                implied: true,
            },
        })
    }

    pub fn get(&self, id: Id) -> &ArenaInode {
        &self.inodes[id as usize]
    }

    pub fn get_mut(&mut self, id: Id) -> &mut ArenaInode {
        &mut self.inodes[id as usize]
    }

    pub fn is_directory(&self, id: Id) -> bool {
        matches!(self.get(id).kind, ArenaKind::Directory { .. })
    }

    /// Whether the inode is a whiteout device, which hides the lower layers' entry of the same name.
    pub fn is_whiteout(&self, id: Id) -> bool {
        matches!(self.get(id).kind, ArenaKind::CharDevice(WHITEOUT))
    }

    /// Stores a link target of at most `PATH_MAX` bytes.
    pub fn text(&mut self, bytes: &[u8]) -> Result<TargetText, Full> {
        let start = self.targets.len();
        self.targets.extend_from_slice(bytes);
        if u32::try_from(self.targets.len()).is_err() {
            return Err(OverLimit { limit: u32::MAX.into() }.into());
        }
        Ok(TargetText {
            start: start as u32,
            len: u16::try_from(bytes.len()).expect("a target has at most 4096 bytes"),
        })
    }

    pub fn target(&self, text: TargetText) -> &[u8] {
        &self.targets[text.start as usize..][..text.len.into()]
    }

    /// Returns the kind for a regular file of a layer, and stores the chunk list of a sparse one.
    pub fn regular(&mut self, layer: LayerIdx, data: FileData) -> ArenaKind {
        match data.layout {
            DataLayout::Flat { device } => ArenaKind::Flat {
                layer,
                size: data.size,
                device,
            },
            DataLayout::Chunked { .. } => {
                self.map_bytes += Self::map_size(&data);
                self.maps.push(data);
                ArenaKind::Sparse {
                    layer,
                    // The number fits, because there are fewer lists than inodes.
                    map: (self.maps.len() - 1) as u32,
                }
            }
        }
    }

    fn map_size(data: &FileData) -> usize {
        let chunks = match &data.layout {
            DataLayout::Chunked { chunks, .. } => chunks.len(),
            DataLayout::Flat { .. } => 0,
        };
        size_of::<FileData>() + chunks * size_of::<(u32, u64)>()
    }

    /// Returns size and chunk list of a sparse file.
    pub fn map(&self, map: u32) -> &FileData {
        &self.maps[map as usize]
    }

    /// Returns the attributes of a set.
    pub fn set(&self, set: SetId) -> &[AttributeId] {
        self.sets.get(set)
    }
}
