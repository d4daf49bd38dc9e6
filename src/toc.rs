//! Table of contents of one layer: what is where in its tar, as values.
//!
//! [`TarReader`] is fed the bytes of a tar in order and makes the table; while doing so it says at which address of the layer's
//! data device each content byte belongs. The data device is an address space of its own: the content of every regular file
//! in tar order, each file beginning at a multiple of [`DEVICE_BLOCK`]. It depends on nothing but the tar, so every host and
//! every kind of index sees the same addresses.
//!
//! Invariants: paths are canonical (no empty, `.` or `..` component, no NUL, components of at most 255 bytes); extents are
//! sorted by tar offset and by device offset at the same time and do not overlap; entries stand in archive order.
//!
//! # How it works
//! ```text
//! tar bytes --> reader --> header, pax, sparse     what one entry says of itself
//!                  |
//!                  +-----> builder                 names, whiteouts, xattr filter, device addresses
//!                             |
//!                             +-----> PackedToc      the table as compressed bytes, in memory and as a file
//!                             +-----> ExtentTable    only where the bytes lie; used in place, without decoding
//! PackedToc <-> Toc                                  all entries at once, as values
//! ```
//! A table can have millions of entries, so the program holds it packed and reads it from front to back ([`Entries`]).
//!
//! What a tar means is taken from the engines that unpack layers (containerd, docker, podman), not from POSIX where the two
//! differ: global pax headers are dropped, a symbolic link's mode is 0777, `trusted.*` attributes do not survive.

mod acl;
mod attributes;
mod builder;
mod codec;
mod error;
mod extents;
mod header;
mod number;
mod path;
mod pax;
mod reader;
mod sparse;
mod xattr;

pub use attributes::{Attribute, AttributeId, Attributes};
pub use codec::{AttributeRef, Entries, PackedEntry, PackedToc};
pub use error::{NameProblem, TocError};
pub use extents::ExtentTable;
pub use reader::{Limits, TarReader};
pub(crate) use xattr::chmod as chmod_acl;

use crate::memory::Charge;

/// Unit of a tar.
const BLOCK: usize = 512;

/// Alignment of every file in the data device, and the block size of the EROFS image.
pub const DEVICE_BLOCK: u64 = 4096;

/// A layer's table of contents.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Toc {
    /// Entries in archive order; a path may occur more than once.
    pub entries: Vec<TocEntry>,
    /// Where file content lies, ascending.
    pub extents: Vec<Extent>,
    /// Length of the data device in bytes, a multiple of [`DEVICE_BLOCK`].
    pub device_size: u64,
    /// Oddities that were tolerated, for the log; at most a few dozen.
    pub warnings: Vec<String>,
}

/// What reading a tar gives.
#[derive(Debug)]
pub struct Tables {
    /// What is where.
    pub toc: PackedToc,
    /// Where content lies.
    pub extents: ExtentTable,
    /// Oddities that were tolerated, for the log; at most a few dozen.
    pub warnings: Vec<String>,
    /// The memory these take.
    pub charge: Charge,
}

/// A run of content bytes that is contiguous in the tar and in the data device. Length is in bytes and never zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Offset in the uncompressed tar.
    pub tar: u64,
    /// Offset in the data device.
    pub device: u64,
    /// Bytes.
    pub len: u64,
}

/// One tar entry after all headers that describe it were read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TocEntry {
    /// Canonical path without leading slash, components joined by `/`; empty for the root.
    pub path: Box<[u8]>,
    /// What it is.
    pub kind: EntryKind,
    /// Mode, owner, time.
    pub meta: Metadata,
    /// Extended attributes that survive the filter (`trusted.*`, `user.overlay.*` and `security.selinux` are dropped), sorted by name.
    pub xattrs: Xattrs,
}

/// Name and value of extended attributes, sorted by name.
pub type Xattrs = Vec<Attribute>;

/// What stat(2) shows of an entry besides its type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Metadata {
    /// Permission bits with set-id and sticky: `mode & 0o7777`.
    pub mode: u16,
    /// Owner; 4294967295 stands for no user and does not occur.
    pub uid: u32,
    /// Group; 4294967295 does not occur.
    pub gid: u32,
    /// Modification time, seconds since the epoch, may be negative.
    pub mtime: i64,
    /// Nanoseconds to add to `mtime`, below 10^9.
    pub mtime_nsec: u32,
}

/// Type of an entry with what belongs to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryKind {
    /// Directory.
    Directory,
    /// Regular file.
    Regular(FileData),
    /// Symbolic link; target bytes verbatim, 1 to 4095 of them.
    Symlink(Box<[u8]>),
    /// Another name for the entry at this canonical path (of this layer, or of a lower one).
    Hardlink(Box<[u8]>),
    /// Character device; [`DeviceNumber::WHITEOUT`] hides the lower layers' entry of this name, and so do hard links to it.
    CharDevice(DeviceNumber),
    /// Block device.
    BlockDevice(DeviceNumber),
    /// Named pipe.
    Fifo,
    /// Hides the lower layers' entry at `path` (a `.wh.NAME` entry).
    Whiteout,
    /// Hides all that lower layers have below the directory `path` (`.wh..wh..opq`).
    Opaque,
    /// AUFS bookkeeping: never visible, but a hard link may point at it.
    Hidden(FileData),
}

/// Number of a device, within the bits that Linux has for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceNumber {
    /// Major number, below 2^12.
    pub major: u32,
    /// Minor number, below 2^20.
    pub minor: u32,
}

impl DeviceNumber {
    /// Number of the character device that overlayfs takes for a whiteout. A tar of an overlay's upper directory has them.
    pub const WHITEOUT: Self = Self { major: 0, minor: 0 };

    /// The 32 bits that inodes, FUSE and EROFS carry (`new_encode_dev` of linux/kdev_t.h).
    pub fn encoded(self) -> u32 {
        (self.minor & 0xff) | (self.major & 0xfff) << 8 | (self.minor & 0xfff00) << 12
    }

    /// The number that is encoded as `bits`.
    pub fn decode(bits: u32) -> Self {
        Self {
            major: (bits >> 8) & 0xfff,
            minor: (bits & 0xff) | ((bits >> 12) & 0xf_ff00),
        }
    }
}

/// Where the content of a regular file lies in the data device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileData {
    /// Logical size in bytes.
    pub size: u64,
    /// Layout in the data device.
    pub layout: DataLayout,
}

/// How a file's bytes map to the data device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DataLayout {
    /// Contiguous from this device offset, a multiple of [`DEVICE_BLOCK`]; of no meaning when the size is 0.
    Flat {
        /// Device offset of the first byte.
        device: u64,
    },
    /// A tar-sparse file: equal chunks of `DEVICE_BLOCK << chunk_bits` bytes, the listed ones stored, all others holes.
    /// A stored chunk's bytes outside the tar's fragments read as zeros (the device has a hole there).
    Chunked {
        /// Binary logarithm of the chunk size in blocks, at most 31 (EROFS chunk format).
        chunk_bits: u8,
        /// (chunk number in the file, device offset of the chunk), ascending.
        chunks: Vec<(u32, u64)>,
    },
}

#[cfg(test)]
mod tests;
