//! Conversion of attributes to FUSE's types.

use std::time::UNIX_EPOCH;

use fuser::{FileAttr, INodeNo};

use crate::erofs::FileType;
use crate::fs::kernel::ABSENT;
use crate::fs::{Attr, mtime};
use crate::toc::DEVICE_BLOCK;

/// Block size shown by stat(2) and statfs(2).
pub(super) const BLOCK: u32 = DEVICE_BLOCK as u32;

pub(super) fn fuse_type(file_type: FileType) -> fuser::FileType {
    match file_type {
        FileType::Regular => fuser::FileType::RegularFile,
        FileType::Directory => fuser::FileType::Directory,
        FileType::Symlink => fuser::FileType::Symlink,
        FileType::CharDevice => fuser::FileType::CharDevice,
        FileType::BlockDevice => fuser::FileType::BlockDevice,
        FileType::Fifo => fuser::FileType::NamedPipe,
    }
}

/// The inode number that programs see is the nid, also of the root directory, as in a mount by the kernel's EROFS.
pub(super) fn to_fuse(attr: &Attr) -> FileAttr {
    let inode = &attr.inode;
    let mtime = mtime(inode);
    FileAttr {
        ino: INodeNo(attr.ino.0),
        size: inode.size,
        blocks: inode.size.div_ceil(512),
        atime: mtime,
        mtime,
        ctime: mtime,
        crtime: mtime,
        kind: fuse_type(inode.file_type),
        perm: inode.mode & 0o7777,
        nlink: inode.nlink,
        uid: inode.uid,
        gid: inode.gid,
        rdev: inode.rdev,
        blksize: BLOCK,
        flags: 0,
    }
}

/// The attributes that stand for an absent name in the answer to LOOKUP.
pub(super) fn absent() -> FileAttr {
    FileAttr {
        ino: INodeNo(ABSENT),
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: fuser::FileType::RegularFile,
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 0,
        flags: 0,
    }
}
