//! Answers questions from an image's bytes, usually a memory map. The reader parses no part of the image
//! in advance, and a lookup does not allocate.

use crate::erofs::dirent::{DIRENT, DirBlock};
use crate::erofs::format::{AttributeKinds, BLOCK, INODE, Layout, RawInode, SLOT, Superblock};
use crate::erofs::plan::device_starts;
use crate::erofs::xattr::{Xattr, XattrIter};
use crate::erofs::{ErofsError, FileType, Nid};
use crate::tree::LayerIdx;

/// Reads a file system image.
#[derive(Debug, Clone)]
pub struct Reader<B> {
    image: B,
    superblock: Superblock,
    /// First block of each data device, then the end of the disk.
    pub(super) device_starts: Vec<u64>,
}

/// What stat(2) shows of an inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Inode {
    /// Number of the inode.
    pub nid: Nid,
    /// Type.
    pub file_type: FileType,
    /// `st_mode` with type bits.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Size in bytes.
    pub size: u64,
    /// Modification time, seconds since the epoch.
    pub mtime: i64,
    /// Nanoseconds to add to `mtime`.
    pub mtime_nsec: u32,
    /// Link count.
    pub nlink: u32,
    /// Device number of device nodes in the form that FUSE uses (kernel: `new_encode_dev`), otherwise 0.
    pub rdev: u32,
    pub(super) raw: RawInode,
}

/// A directory entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dirent<'a> {
    /// Position from which [`Reader::entries`] continues after this entry.
    pub next: u64,
    /// Number of the entry's inode.
    pub nid: Nid,
    /// Type of the entry's inode.
    pub file_type: FileType,
    /// Name, 1 to 255 bytes.
    pub name: &'a [u8],
}

impl<B: AsRef<[u8]>> Reader<B> {
    /// Opens an image that [`crate::erofs::write()`] wrote for data devices of these sizes (bytes, base layer first).
    ///
    /// Checks only the first block; other methods check the parts that they use.
    pub fn open(image: B, devices: &[u64]) -> Result<Self, ErofsError> {
        let bytes = image.as_ref();
        let superblock = Superblock::decode(bytes)?;
        let blocks = u64::from(superblock.blocks);
        let device_blocks = devices
            .iter()
            .fold(0u64, |sum, size| sum.saturating_add(size.div_ceil(BLOCK)));
        let metadata_blocks = blocks
            .checked_sub(device_blocks)
            .ok_or(ErofsError::DeviceMismatch { blocks, device_blocks })?;
        let (size, expected) = (bytes.len() as u64, metadata_blocks * BLOCK);
        if size != expected {
            return Err(ErofsError::Truncated { size, expected });
        }
        Ok(Self {
            image,
            superblock,
            device_starts: device_starts(metadata_blocks, devices),
        })
    }

    /// Returns the bytes of the metadata image.
    pub fn image(&self) -> &[u8] {
        self.image.as_ref()
    }

    /// Returns the root directory.
    pub fn root(&self) -> Nid {
        Nid(u64::from(self.superblock.root_nid))
    }

    /// Returns the number of inodes in the image.
    pub fn inodes(&self) -> u64 {
        self.superblock.inodes
    }

    /// Returns the size of the metadata image in bytes.
    pub fn metadata_size(&self) -> u64 {
        self.device_starts[0] * BLOCK
    }

    /// Returns the size of the whole disk in bytes: the image and all data devices, each rounded up to blocks.
    pub fn disk_size(&self) -> u64 {
        u64::from(self.superblock.blocks) * BLOCK
    }

    /// Returns the disk offset at which a layer's data device begins.
    pub fn device_start(&self, layer: LayerIdx) -> Option<u64> {
        let devices = &self.device_starts[..self.device_starts.len() - 1];
        devices.get(layer.0 as usize).map(|block| block * BLOCK)
    }

    /// Whether some inode may have extended attributes. False only if none has.
    pub fn has_any_xattr(&self) -> bool {
        self.superblock.attributes != Some(AttributeKinds::None)
    }

    /// Whether some inode may have an access control list. False only if none has.
    pub(crate) fn has_any_acl(&self) -> bool {
        !matches!(
            self.superblock.attributes,
            Some(AttributeKinds::None | AttributeKinds::Plain)
        )
    }

    /// Whether this version of ocifs would make the same tree from the layers. Other versions made different trees of
    /// some layers.
    pub(crate) fn is_current(&self) -> bool {
        self.superblock.attributes.is_some()
    }

    /// Returns the inode `nid`.
    pub fn inode(&self, nid: Nid) -> Result<Inode, ErofsError> {
        let corrupt = |what| ErofsError::Corrupt { nid: nid.0, what };
        let at = nid.0.checked_mul(SLOT).and_then(|at| usize::try_from(at).ok());
        let bytes = at.and_then(|at| self.image.as_ref().get(at..));
        let bytes = bytes
            .and_then(<[u8]>::first_chunk)
            .ok_or(corrupt("it lies outside the image"))?;
        let raw = RawInode::decode(bytes).ok_or(corrupt("its format is unknown"))?;
        let file_type = FileType::from_mode(raw.mode).ok_or(corrupt("its type is unknown"))?;
        let rdev = match file_type {
            FileType::CharDevice | FileType::BlockDevice => raw.union,
            _ => 0,
        };
        Ok(Inode {
            nid,
            file_type,
            mode: raw.mode,
            uid: raw.uid,
            gid: raw.gid,
            size: raw.size,
            mtime: raw.mtime,
            mtime_nsec: raw.mtime_nsec,
            nlink: raw.nlink,
            rdev,
            raw,
        })
    }

    /// Looks up `name` in the directory `dir`. The names `.` and `..` are found like any other name.
    pub fn lookup(&self, dir: Nid, name: &[u8]) -> Result<Option<(Nid, FileType)>, ErofsError> {
        let dir = self.typed(dir, FileType::Directory, "directory")?;
        // Only the last block whose first name does not sort behind `name` can contain it.
        let (mut low, mut high) = (0, dir.size.div_ceil(BLOCK));
        while low < high {
            let middle = low.midpoint(high);
            if self.dir_block(&dir, middle)?.name(0)? <= name {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        let Some(block) = low.checked_sub(1) else {
            return Ok(None);
        };
        let block = self.dir_block(&dir, block)?;
        match block.find(name)? {
            Some(index) => block.target(index).map(|(nid, file_type)| Some((Nid(nid), file_type))),
            None => Ok(None),
        }
    }

    /// Returns the entries of the directory `dir` from position `from` on. `from` is 0, or the `next` of an entry.
    /// `.` and `..` are among the entries.
    ///
    /// The iterator ends after the first error.
    pub fn entries(&self, dir: Nid, from: u64) -> Result<Dirents<'_, B>, ErofsError> {
        Ok(Dirents {
            reader: self,
            dir: self.typed(dir, FileType::Directory, "directory")?,
            block: None,
            position: from,
        })
    }

    /// Returns the target of the symlink `nid`.
    pub fn symlink(&self, nid: Nid) -> Result<&[u8], ErofsError> {
        let inode = self.typed(nid, FileType::Symlink, "symlink")?;
        let corrupt = ErofsError::Corrupt {
            nid: nid.0,
            what: "symlink target",
        };
        // A target has at most 4095 bytes, so it is contiguous.
        if inode.size == 0 || inode.size >= BLOCK {
            return Err(corrupt);
        }
        self.content_block(&inode, 0).ok_or(corrupt)
    }

    /// Returns the extended attributes of `nid`.
    pub fn xattrs(&self, nid: Nid) -> Result<XattrIter<'_>, ErofsError> {
        let inode = self.inode(nid)?;
        let area = self.behind(&inode, 0, u64::from(inode.raw.xattr_size));
        let area = area.ok_or(ErofsError::Corrupt {
            nid: nid.0,
            what: "attributes lie outside the image",
        })?;
        let shared = u64::from(self.superblock.xattr_block) * BLOCK;
        let shared = usize::try_from(shared)
            .ok()
            .and_then(|at| self.image.as_ref().get(at..));
        XattrIter::new(nid.0, area, shared.unwrap_or_default())
    }

    /// Returns the value of the extended attribute `name` of `nid`.
    pub fn xattr(&self, nid: Nid, name: &[u8]) -> Result<Option<&[u8]>, ErofsError> {
        for xattr in self.xattrs(nid)? {
            let Xattr { value, .. } = match xattr? {
                xattr if xattr.is_named(name) => xattr,
                _ => continue,
            };
            return Ok(Some(value));
        }
        Ok(None)
    }

    /// Returns the inode `nid` if it has the given type. `wanted` names the type in the error.
    pub(super) fn typed(&self, nid: Nid, file_type: FileType, wanted: &'static str) -> Result<Inode, ErofsError> {
        let inode = self.inode(nid)?;
        if inode.file_type == file_type {
            Ok(inode)
        } else {
            Err(ErofsError::WrongType { nid: nid.0, wanted })
        }
    }

    fn dir_block(&self, dir: &Inode, index: u64) -> Result<DirBlock<'_>, ErofsError> {
        let bytes = self.content_block(dir, index).ok_or(ErofsError::Corrupt {
            nid: dir.nid.0,
            what: "a directory block lies outside the image",
        })?;
        DirBlock::new(dir.nid.0, bytes)
    }

    /// Returns block `index` of content that is stored in the image, cut at the end of the content.
    fn content_block(&self, inode: &Inode, index: u64) -> Option<&[u8]> {
        let start = index.checked_mul(BLOCK)?;
        let len = inode.size.checked_sub(start)?.min(BLOCK);
        match inode.raw.layout {
            Layout::Inline if len < BLOCK => self.behind(inode, u64::from(inode.raw.xattr_size), len),
            Layout::Plain | Layout::Inline => {
                let at = u64::from(inode.raw.union).checked_add(index)?.checked_mul(BLOCK)?;
                self.slice(at, len)
            }
            Layout::Chunked => None,
        }
    }

    /// Returns `len` bytes at `offset` behind the inode itself.
    pub(super) fn behind(&self, inode: &Inode, offset: u64, len: u64) -> Option<&[u8]> {
        let at = inode.nid.0.checked_mul(SLOT)?.checked_add(INODE)?;
        self.slice(at.checked_add(offset)?, len)
    }

    fn slice(&self, at: u64, len: u64) -> Option<&[u8]> {
        let range = usize::try_from(at).ok()?..usize::try_from(at.checked_add(len)?).ok()?;
        self.image.as_ref().get(range)
    }
}

/// Iterates over the entries of a directory; made by [`Reader::entries`].
#[derive(Debug)]
pub struct Dirents<'a, B> {
    reader: &'a Reader<B>,
    dir: Inode,
    /// The block that contains `position`, once it is open.
    block: Option<DirBlock<'a>>,
    position: u64,
}

impl<'a, B: AsRef<[u8]>> Dirents<'a, B> {
    fn read(&mut self) -> Result<Option<Dirent<'a>>, ErofsError> {
        while self.position < self.dir.size {
            let index = (self.position % BLOCK) as usize / DIRENT;
            let number = self.position / BLOCK;
            let block = match self.block {
                Some(block) => block,
                None => *self.block.insert(self.reader.dir_block(&self.dir, number)?),
            };
            if index < block.count() {
                let name = block.name(index)?;
                let (nid, file_type) = block.target(index)?;
                // A directory may claim the largest size there is, so the sum must saturate.
                self.position = self.position.saturating_add(DIRENT as u64);
                return Ok(Some(Dirent {
                    next: self.position,
                    nid: Nid(nid),
                    file_type,
                    name,
                }));
            }
            self.block = None;
            self.position = (number + 1).saturating_mul(BLOCK);
        }
        Ok(None)
    }
}

impl<'a, B: AsRef<[u8]>> Iterator for Dirents<'a, B> {
    type Item = Result<Dirent<'a>, ErofsError>;

    fn next(&mut self) -> Option<Self::Item> {
        let entry = self.read();
        if entry.is_err() {
            self.position = u64::MAX;
        }
        entry.transpose()
    }
}
