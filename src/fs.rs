//! The file system without a kernel: names, attributes and bytes of an image.
//!
//! Metadata comes straight from the tree in memory and never waits. A read is turned into places in the layers and asked of the
//! content ([`crate::content`]). Nothing here knows FUSE; errno is chosen in [`error`] and nowhere else.
//!
//! Inode numbers are the EROFS nids of the tree, so they are the same on every host and after every remount, and there is no
//! lookup count to keep.

pub mod error;
pub mod kernel;

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

pub use error::{Errno, FsError, ToErrno};

use crate::content::Content;
use crate::erofs::{ErofsError, FileType, Inode, Mapping, Nid};
use crate::image::Image;
use crate::toc::DEVICE_BLOCK;

/// What stat(2) shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attr {
    /// Inode number.
    pub ino: Nid,
    /// The inode as stored.
    pub inode: Inode,
}

/// A directory entry.
#[derive(Debug, Clone, Copy)]
pub struct DirEntry<'a> {
    /// Inode number.
    pub ino: Nid,
    /// Where to continue after this entry.
    pub next: u64,
    /// Type.
    pub file_type: FileType,
    /// Name; `.` and `..` are entries like others.
    pub name: &'a [u8],
}

/// Size of the file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FsStat {
    /// Blocks of [`crate::toc::DEVICE_BLOCK`] bytes, metadata and data.
    pub blocks: u64,
    /// Inodes.
    pub inodes: u64,
}

/// An image as a file system.
#[derive(Debug, Clone)]
pub struct ImageFs {
    content: Arc<Content>,
}

impl ImageFs {
    /// The files of an image with this content.
    pub fn new(content: Arc<Content>) -> Self {
        Self { content }
    }

    /// The root directory.
    pub fn root(&self) -> Nid {
        self.image().tree().root()
    }

    /// The image behind it.
    pub fn image(&self) -> &Arc<Image> {
        self.content.image()
    }

    /// Attributes of an inode.
    pub fn attr(&self, ino: Nid) -> Result<Attr, FsError> {
        let inode = self.image().tree().inode(ino)?;
        Ok(Attr { ino, inode })
    }

    /// The entry `name` of a directory, if there is one.
    pub fn lookup(&self, parent: Nid, name: &[u8]) -> Result<Option<Attr>, FsError> {
        match self.image().tree().lookup(parent, name)? {
            Some((ino, _)) => self.attr(ino).map(Some),
            None => Ok(None),
        }
    }

    /// Entries of a directory from `position` on (0, or a [`DirEntry::next`]), until `visit` says false.
    pub fn read_dir(
        &self,
        ino: Nid,
        position: u64,
        mut visit: impl FnMut(DirEntry<'_>) -> bool,
    ) -> Result<(), FsError> {
        for entry in self.image().tree().entries(ino, position)? {
            let entry = entry?;
            let more = visit(DirEntry {
                ino: entry.nid,
                next: entry.next,
                file_type: entry.file_type,
                name: entry.name,
            });
            if !more {
                break;
            }
        }
        Ok(())
    }

    /// Target of a symbolic link.
    pub fn read_link(&self, ino: Nid) -> Result<Vec<u8>, FsError> {
        Ok(self.image().tree().symlink(ino)?.to_vec())
    }

    /// Value of an extended attribute.
    pub fn xattr(&self, ino: Nid, name: &[u8]) -> Result<Option<Vec<u8>>, FsError> {
        Ok(self.image().tree().xattr(ino, name)?.map(<[u8]>::to_vec))
    }

    /// Names of the extended attributes.
    pub fn xattr_names(&self, ino: Nid) -> Result<Vec<Vec<u8>>, FsError> {
        let mut names = Vec::new();
        for xattr in self.image().tree().xattrs(ino)? {
            names.push(xattr?.name());
        }
        Ok(names)
    }

    /// Whether any inode has extended attributes; if not, nobody needs to ask.
    pub fn has_xattrs(&self) -> bool {
        self.image().tree().has_any_xattr()
    }

    /// Whether any inode has an access control list; if not, modes and owners decide everything.
    pub fn has_acls(&self) -> bool {
        self.image().tree().has_any_acl()
    }

    /// Size of the file system.
    pub fn stat(&self) -> FsStat {
        let tree = self.image().tree();
        FsStat {
            blocks: tree.disk_size() / DEVICE_BLOCK,
            inodes: tree.inodes(),
        }
    }

    /// Fills `buf` from `offset` of a regular file if that needs no waiting. Returns the bytes read (short at the end of the
    /// file), or nothing if it has to wait.
    pub fn read_local(&self, ino: Nid, offset: u64, buf: &mut [u8]) -> Result<Option<usize>, FsError> {
        let length = self.readable(ino, offset, buf.len())?;
        let parts = self.parts(ino, offset, length);
        let here = self.content.read_local(parts, &mut buf[..length])?;
        Ok(here.then_some(length))
    }

    /// Like [`ImageFs::read_local`], but waits for what is missing, at most for the timeout of the content.
    pub async fn read(&self, ino: Nid, offset: u64, size: usize) -> Result<Vec<u8>, FsError> {
        let length = self.readable(ino, offset, size)?;
        let parts: Vec<Mapping> = self.parts(ino, offset, length).collect::<Result<_, _>>()?;
        Ok(self.content.read(&parts, length).await?)
    }

    /// Where `length` bytes of a file from `offset` on are, all of which lie within the file.
    fn parts(&self, ino: Nid, offset: u64, length: usize) -> impl Iterator<Item = Result<Mapping, ErofsError>> {
        let end = offset + length as u64;
        let mut at = offset;
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let mapping = self.image().tree().map(ino, at).transpose()?;
            at = mapping
                .as_ref()
                .map_or(end, |mapping| at.saturating_add(mapping.bytes()));
            Some(mapping)
        })
    }

    /// How many of `size` bytes at `offset` lie within the file.
    fn readable(&self, ino: Nid, offset: u64, size: usize) -> Result<usize, FsError> {
        let inode = self.image().tree().inode(ino)?;
        match inode.file_type {
            FileType::Regular => Ok(size.min(clamp(inode.size.saturating_sub(offset)))),
            FileType::Directory => Err(FsError::IsDirectory),
            _ => Err(FsError::NotAFile),
        }
    }
}

/// Modification time as the standard library has it. Times before the epoch count down to the second and then up by the
/// nanoseconds.
pub fn mtime(inode: &Inode) -> SystemTime {
    let nanoseconds = Duration::from_nanos(inode.mtime_nsec.into());
    let seconds = Duration::from_secs(inode.mtime.unsigned_abs());
    let whole = match inode.mtime {
        0.. => UNIX_EPOCH.checked_add(seconds),
        _ => UNIX_EPOCH.checked_sub(seconds),
    };
    whole.and_then(|t| t.checked_add(nanoseconds)).unwrap_or(UNIX_EPOCH)
}

fn clamp(len: u64) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}
