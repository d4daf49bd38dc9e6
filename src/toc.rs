//! Table of contents (TOC) of one layer: what is where in the layer's tar.
//!
//! # How it works
//! The caller feeds the bytes of a tar to [`TarReader`] in order. The reader makes the table. Meanwhile the reader
//! reports for each content byte at which address of the layer's data device the byte belongs.
//!
//! The data device is an address space of its own. The device holds the content of every regular file in tar order.
//! Each file begins at a multiple of [`DEVICE_BLOCK`]. The addresses depend only on the tar, so every host and every
//! kind of index sees the same addresses.
//!
//! ```text
//! tar bytes --> reader --> header, pax, sparse     what the headers of one entry say
//!                  |
//!                  +-----> builder                 names, whiteouts, xattr filter, device addresses
//!                             |
//!                             +-----> PackedToc      the table as compressed bytes, in memory and as a file
//!                             +-----> ExtentTable    only where the bytes lie; used in place, without decoding
//! PackedToc <-> Toc                                  all entries at once, as values
//! ```
//! Some layers carry a table of their own, which [`carried`] reads. Its entries go through the same builder.
//!
//! A table can have millions of entries. The program therefore holds the table packed and reads it from front to back
//! ([`TocEntries`]).
//!
//! The reader interprets a tar as the engines that unpack layers do (containerd, docker, podman). Where these engines
//! differ from POSIX, the reader follows the engines. The reader
//! - drops global pax headers,
//! - gives every symbolic link the mode 0777,
//! - drops `trusted.*` attributes.
//!
//! # Invariants
//! - Paths are canonical: no empty, `.` or `..` component, no NUL, and components of at most 255 bytes.
//! - Extents are sorted by tar offset and by device offset at the same time, and do not overlap.
//! - Entries are in archive order.

mod acl;
mod attributes;
mod builder;
pub mod carried;
mod chunks;
mod codec;
mod error;
mod extents;
mod header;
mod limits;
mod number;
mod path;
mod pax;
mod reader;
mod sparse;
mod xattr;

pub use attributes::{Attribute, AttributeId, Attributes};
pub use chunks::{Chunk, ChunkCodec, ChunkTable, MAX_CHUNK};
pub use codec::{AttributeRef, PackedEntry, PackedToc, TocEntries};
pub use error::{NameProblem, TocError};
pub use extents::ExtentTable;
pub use limits::Limits;
pub use reader::TarReader;
pub(crate) use xattr::chmod as chmod_acl;

use crate::memory::Charge;

/// Bytes of a tar block: headers take one block each, and content is padded to whole blocks.
const BLOCK: usize = 512;

/// Alignment of every file in the data device, and the block size of the EROFS image.
pub const DEVICE_BLOCK: u64 = 4096;

/// A layer's table of contents.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Toc {
    /// Entries in archive order. A path may occur more than once.
    pub entries: Vec<TocEntry>,
    /// Where file content lies, in ascending order.
    pub extents: Vec<Extent>,
    /// Length of the data device in bytes, a multiple of [`DEVICE_BLOCK`].
    pub device_size: u64,
    /// Oddities of the tar that the reader tolerated, for the log; at most a few dozen.
    pub warnings: Vec<String>,
}

/// The tables that [`TarReader::finish`] returns.
#[derive(Debug)]
pub struct Tables {
    /// The table of contents.
    pub toc: PackedToc,
    /// The extents: where content lies in the tar and in the data device.
    pub extents: ExtentTable,
    /// Oddities of the tar that the reader tolerated, for the log; at most a few dozen.
    pub warnings: Vec<String>,
    /// Memory of both tables, charged to the allowance until the charge is dropped.
    pub charge: Charge,
}

/// A run of content bytes that is contiguous both in the tar and in the data device; never empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Offset in the uncompressed tar.
    pub tar: u64,
    /// Offset in the data device.
    pub device: u64,
    /// Length in bytes, never zero.
    pub len: u64,
}

/// One tar entry, with everything that its headers say about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TocEntry {
    /// Canonical path: no leading slash, components joined by `/`. The root has the empty path.
    pub path: Box<[u8]>,
    /// Type of the entry, and what belongs to the type.
    pub kind: EntryKind,
    /// Mode, owner and time.
    pub meta: Metadata,
    /// Extended attributes that the filter keeps, sorted by name. The filter drops `trusted.*`, `user.overlay.*` and
    /// `security.selinux`, for example.
    pub xattrs: Xattrs,
}

/// Names and values of extended attributes, sorted by name.
pub type Xattrs = Vec<Attribute>;

/// What stat(2) shows of an entry, except its type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Metadata {
    /// Permission bits with set-id and sticky bits: `mode & 0o7777`.
    pub mode: u16,
    /// Owner. The value 4294967295, which means "no user" in Linux, does not occur.
    pub uid: u32,
    /// Group. The value 4294967295, which means "no group" in Linux, does not occur.
    pub gid: u32,
    /// Modification time in seconds since the epoch; may be negative.
    pub mtime: i64,
    /// Nanoseconds to add to `mtime`, below 10^9.
    pub mtime_nsec: u32,
}

/// Type of an entry, and what belongs to the type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryKind {
    /// Directory.
    Directory,
    /// Regular file.
    Regular(FileData),
    /// Symbolic link with its target, byte for byte; 1 to 4095 bytes.
    Symlink(Box<[u8]>),
    /// Hard link: another name for the entry at this canonical path. The entry is in this layer or in a lower one.
    Hardlink(Box<[u8]>),
    /// Character device. The device [`DeviceNumber::WHITEOUT`] hides the lower layers' entry of the same name, and so
    /// does a hard link to that device.
    CharDevice(DeviceNumber),
    /// Block device.
    BlockDevice(DeviceNumber),
    /// Named pipe.
    Fifo,
    /// Whiteout (a `.wh.NAME` entry): hides the lower layers' entry at `path`.
    Whiteout,
    /// Opaque marker (`.wh..wh..opq`): hides everything that lower layers have below the directory `path`.
    Opaque,
    /// Content of AUFS bookkeeping. The tree never shows the entry, but a hard link may point at it.
    Hidden(FileData),
}

/// Number of a device, limited to the bits that Linux has for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceNumber {
    /// Major number, below 2^12.
    pub major: u32,
    /// Minor number, below 2^20.
    pub minor: u32,
}

impl DeviceNumber {
    /// Number of the character device that overlayfs uses as a whiteout. A tar of an overlay's upper directory
    /// contains such devices.
    pub const WHITEOUT: Self = Self { major: 0, minor: 0 };

    /// Returns the number as 32 bits, the form that inodes, FUSE and EROFS use (`new_encode_dev` of linux/kdev_t.h).
    pub fn encoded(self) -> u32 {
        (self.minor & 0xff) | (self.major & 0xfff) << 8 | (self.minor & 0xfff00) << 12
    }

    /// Returns the number that `bits` encode.
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
    /// Logical size in bytes, holes included.
    pub size: u64,
    /// Layout in the data device.
    pub layout: DataLayout,
}

/// How a file's bytes map to the data device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DataLayout {
    /// The content is contiguous from this device offset, a multiple of [`DEVICE_BLOCK`]. The offset means nothing if
    /// the size is 0.
    Flat {
        /// Device offset of the first byte.
        device: u64,
    },
    /// A sparse file, cut into equal chunks of `DEVICE_BLOCK << chunk_bits` bytes. The listed chunks are stored; all
    /// others are holes. Within a stored chunk, bytes outside the tar's fragments read as zeros, because the device
    /// has a hole there.
    Chunked {
        /// Binary logarithm of the chunk size in blocks, at most 31 (EROFS chunk format).
        chunk_bits: u8,
        /// Chunk number in the file and device offset of the chunk, ascending.
        chunks: Vec<(u32, u64)>,
    },
}

#[cfg(test)]
mod tests;
