//! What a carrier of the FUSE protocol tells the kernel so that it need not ask again (kernel: fs/fuse/dir.c, fs/fuse/file.c).
//!
//! The tree never changes. So the kernel may keep names, attributes and pages for ever, names that are absent too, and needs
//! to open nothing before it reads.

use std::time::Duration;

use super::{Errno, ImageFs};
use crate::erofs::Nid;

/// How long names, attributes and absent names are valid: for ever. The kernel keeps times in jiffies, which this does not
/// overflow.
pub const VALID: Duration = Duration::from_secs(1_000_000_000);

/// The protocol's number of the root directory. No other inode has it, because the superblock lies there.
pub const ROOT: u64 = 1;

/// Inode number in the answer to LOOKUP of a name that is absent; with [`VALID`] the kernel remembers that.
pub const ABSENT: u64 = 0;

/// The answer to requests that need not be sent: OPEN, OPENDIR and FLUSH, and GETXATTR where there are no attributes. The
/// kernel does not send them again, and without OPEN it sends no RELEASE and keeps what it has read.
pub const NOT_NEEDED: Errno = Errno::ENOSYS;

impl ImageFs {
    /// The protocol's number of an inode.
    pub fn number(&self, ino: Nid) -> u64 {
        if ino == self.root() { ROOT } else { ino.0 }
    }

    /// The inode with this number in the protocol.
    pub fn inode(&self, number: u64) -> Nid {
        if number == ROOT { self.root() } else { Nid(number) }
    }
}
