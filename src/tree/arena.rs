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

pub(super) use names::Dirent;
use names::Names;
pub(super) use walk::split;
pub(super) use xattrs::SetId;
use xattrs::Sets;

use crate::memory::{Charge, OverLimit};
use crate::toc::{AttributeId, DataLayout, FileData, Metadata};
use crate::tree::LayerIdx;

/// Position of an inode in its [`Arena`].
pub(super) type Id = u32;

/// In the place of an [`Id`], or of the number of a [`Dirent`]: none.
pub(super) const NONE: u32 = u32::MAX;

/// Encoded [`DeviceNumber::WHITEOUT`](crate::toc::DeviceNumber::WHITEOUT).
pub(super) const WHITEOUT: u32 = 0;

/// A directory no entry describes (image engines agree on these values for parents a layer leaves out).
pub(super) const IMPLIED: Metadata = Metadata {
    mode: 0o755,
    uid: 0,
    gid: 0,
    mtime: 0,
    mtime_nsec: 0,
};

/// Inodes of all layers together: three times the entries of the largest layer. A few paths can imply many directories.
const MAX_INODES: usize = 32 << 20;

/// Besides its record: its places in the finished tree and in the plan of the image.
const INODE_BYTES: usize = size_of::<Inode>() + 20;

#[derive(Debug, Clone, Copy)]
pub(super) struct Inode {
    pub meta: Metadata,
    pub xattrs: SetId,
    /// Number of the entry that made it, in its layer. In a finished tree: the link count.
    pub born: u32,
    pub kind: Kind,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    Directory {
        /// The first of its names; in a finished tree: the place of its names among all sorted ones.
        first: u32,
        /// In a finished tree: how many.
        len: u32,
        /// No entry of the current layer describes it.
        implied: bool,
    },
    /// A regular file in one piece.
    Flat {
        layer: LayerIdx,
        size: u64,
        device: u64,
    },
    /// A sparse file, with the number of its map.
    Sparse {
        layer: LayerIdx,
        map: u32,
    },
    Symlink(Text),
    /// A character device with its encoded number.
    CharDevice(u32),
    BlockDevice(u32),
    Fifo,
    /// A hard link whose target was not there yet when it was read; later the inode it stands for.
    Pending {
        target: Text,
        bound: Id,
    },
}

/// Bytes of a link target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Text {
    start: u32,
    /// At most `PATH_MAX`.
    len: u16,
}

/// Why nothing more can be added.
#[derive(Debug, Clone, Copy)]
pub(super) enum Full {
    /// There are [`MAX_INODES`].
    Inodes,
    /// Or more bytes of names or targets than 32 bits number.
    Memory(OverLimit),
}

impl From<OverLimit> for Full {
    fn from(over: OverLimit) -> Self {
        Self::Memory(over)
    }
}

/// Inodes by [`Id`], and their names.
#[derive(Debug, Default)]
pub(super) struct Arena {
    pub inodes: Vec<Inode>,
    pub names: Names,
    pub sets: Sets,
    targets: Vec<u8>,
    /// Sparse files.
    maps: Vec<FileData>,
    map_bytes: usize,
    charge: Charge,
    /// Bytes after the last [`Arena::compact`].
    live: usize,
}

impl Arena {
    pub fn new(charge: Charge) -> Self {
        Self {
            charge,
            ..Self::default()
        }
    }

    /// Memory that grows with what is added.
    fn bytes(&self) -> usize {
        self.inodes.len() * INODE_BYTES + self.names.bytes() + self.sets.bytes() + self.targets.len() + self.map_bytes
    }

    /// Charges for what was added, and for `more`.
    pub fn cover(&mut self, more: usize) -> Result<(), Full> {
        Ok(self.charge.cover((self.bytes() + more) as u64)?)
    }

    pub fn push(&mut self, inode: Inode) -> Result<Id, Full> {
        if self.inodes.len() == MAX_INODES {
            return Err(Full::Inodes);
        }
        // There are fewer than fit.
        let id = self.inodes.len() as Id;
        self.inodes.push(inode);
        self.cover(0)?;
        Ok(id)
    }

    pub fn implied_directory(&mut self, born: u32) -> Result<Id, Full> {
        self.push(Inode {
            meta: IMPLIED,
            xattrs: SetId::EMPTY,
            born,
            kind: Kind::Directory {
                first: NONE,
                len: 0,
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

    /// Whether it hides what lower layers have of its name.
    pub fn is_whiteout(&self, id: Id) -> bool {
        matches!(self.get(id).kind, Kind::CharDevice(WHITEOUT))
    }

    /// Keeps a link target of at most `PATH_MAX` bytes.
    pub fn text(&mut self, bytes: &[u8]) -> Result<Text, Full> {
        let start = self.targets.len();
        self.targets.extend_from_slice(bytes);
        if u32::try_from(self.targets.len()).is_err() {
            return Err(OverLimit { limit: u32::MAX.into() }.into());
        }
        Ok(Text {
            start: start as u32,
            len: u16::try_from(bytes.len()).expect("a target has at most 4096 bytes"),
        })
    }

    pub fn target(&self, text: Text) -> &[u8] {
        &self.targets[text.start as usize..][..text.len.into()]
    }

    /// A regular file of a layer.
    pub fn regular(&mut self, layer: LayerIdx, data: FileData) -> Kind {
        match data.layout {
            DataLayout::Flat { device } => Kind::Flat {
                layer,
                size: data.size,
                device,
            },
            DataLayout::Chunked { .. } => {
                self.map_bytes += Self::map_size(&data);
                self.maps.push(data);
                Kind::Sparse {
                    layer,
                    // Fewer than inodes.
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

    /// The map of a sparse file.
    pub fn map(&self, map: u32) -> &FileData {
        &self.maps[map as usize]
    }

    /// The attributes of a set.
    pub fn set(&self, set: SetId) -> &[AttributeId] {
        self.sets.get(set)
    }
}
