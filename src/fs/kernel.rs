//! Answers that let the kernel cache everything it has asked once (kernel: fs/fuse/dir.c, fs/fuse/file.c).
//!
//! The tree never changes. So the kernel may cache names, absent names, attributes and pages for ever. The kernel may
//! also read a file without opening it first.

use std::time::Duration;

use super::{Errno, ImageFs};
use crate::erofs::Nid;

/// How long names, attributes and absent names are valid: practically for ever. The kernel converts the time to
/// jiffies, and this value does not overflow there.
pub const VALID: Duration = Duration::from_secs(1_000_000_000);

/// The protocol's number of the root directory in requests. No inode has the nid 1: the first inode lies behind the
/// superblock, at nid 36. The kernel never asks for the root by a name, so no answer needs this number: LOOKUP does not
/// lead there, and the entries "." and ".." of READDIRPLUS are not taken as inodes (fs/fuse/readdir.c).
pub const ROOT: u64 = 1;

/// Inode number in the answer to LOOKUP of an absent name. With [`VALID`] the kernel remembers that the name is
/// absent.
pub const ABSENT: u64 = 0;

/// The answer to requests that the kernel need not send: OPEN, OPENDIR and FLUSH, and GETXATTR if no inode has
/// attributes. After this answer the kernel never sends that kind of request again. Without OPEN the kernel sends no
/// RELEASE either, and it keeps the pages that it has read.
pub const NOT_NEEDED: Errno = Errno::ENOSYS;

impl ImageFs {
    /// The inode that has this number in the protocol.
    pub fn inode(&self, number: u64) -> Nid {
        if number == ROOT { self.root() } else { Nid(number) }
    }
}
