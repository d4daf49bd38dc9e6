//! The file system of an image, independent of the kernel: names, attributes and bytes.
//!
//! Metadata comes from the tree in memory, so metadata operations never wait. A read is split into ranges of the
//! layers' data devices, which the content ([`crate::content`]) delivers. Nothing in this module knows FUSE.
//! [`error`] chooses the errno of every error.
//!
//! Inode numbers are the EROFS nids of the tree. An inode has one number on every host and after every remount, and
//! no lookup count is needed.

pub mod error;
pub mod kernel;

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

pub use error::{Errno, FsError, ToErrno};

use crate::content::Content;
use crate::erofs::{ErofsError, FileType, Inode, Mapping, Nid};
use crate::image::Image;
use crate::toc::DEVICE_BLOCK;

/// The attributes of an inode as stat(2) shows them.
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
    /// Position from which to list the entries after this one.
    pub next: u64,
    /// Type.
    pub file_type: FileType,
    /// Name; `.` and `..` are entries like all others.
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

/// The file system of one image.
#[derive(Debug, Clone)]
pub struct ImageFs {
    content: Arc<Content>,
}

impl ImageFs {
    /// A file system over the files of the image with this content.
    pub fn new(content: Arc<Content>) -> Self {
        Self { content }
    }

    /// The root directory.
    pub fn root(&self) -> Nid {
        self.image().tree().root()
    }

    /// The image whose files this file system shows.
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

    /// Passes the entries of a directory from `position` on (0, or a [`DirEntry::next`]) to `visit`, until `visit`
    /// returns false.
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

    /// Whether any inode has extended attributes. If none has, the kernel need not ask for them.
    pub fn has_xattrs(&self) -> bool {
        self.image().tree().has_any_xattr()
    }

    /// Whether any inode has an access control list. If none has, modes and owners decide about all permissions.
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

    /// Fills `buf` with bytes of a regular file from `offset` on if all of them are local. Returns the number of
    /// bytes read, which is smaller than `buf` only at the end of the file. Returns `None` if the read would have to
    /// wait.
    pub fn read_local(&self, ino: Nid, offset: u64, buf: &mut [u8]) -> Result<Option<usize>, FsError> {
        let length = self.readable(ino, offset, buf.len())?;
        let parts = self.parts(ino, offset, length);
        let here = self.content.read_local(parts, &mut buf[..length])?;
        Ok(here.then_some(length))
    }

    /// Reads like [`ImageFs::read_local`], but waits for missing bytes, at most for the timeout of the content.
    pub async fn read(&self, ino: Nid, offset: u64, size: usize) -> Result<Vec<u8>, FsError> {
        let length = self.readable(ino, offset, size)?;
        let parts: Vec<Mapping> = self.parts(ino, offset, length).collect::<Result<_, _>>()?;
        Ok(self.content.read(&parts, length).await?)
    }

    /// The places of `length` bytes of a file from `offset` on. All of these bytes must lie within the file.
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

    /// Returns how many of `size` bytes at `offset` lie within the file.
    fn readable(&self, ino: Nid, offset: u64, size: usize) -> Result<usize, FsError> {
        let inode = self.image().tree().inode(ino)?;
        match inode.file_type {
            FileType::Regular => Ok(size.min(clamp(inode.size.saturating_sub(offset)))),
            FileType::Directory => Err(FsError::IsDirectory),
            _ => Err(FsError::NotAFile),
        }
    }
}

/// The modification time as a [`SystemTime`]. For times before the epoch, the seconds are negative and the
/// nanoseconds are added to them.
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
