//! The tree as an EROFS image: metadata that the Linux kernel, `fsck.erofs` and ocifs read alike.
//!
//! # How it works
//! [`write()`] turns a [`crate::tree::Tree`] into the metadata of a virtual disk. [`Reader`] answers questions from
//! these bytes without parsing them first. The image contains no file content. On the disk the layers' data devices
//! follow the metadata, end to end. The first block of a file therefore says which layer has the content, and where.
//!
//! ```text
//! | metadata | device of layer 0 | device of layer 1 | ...      blocks of 4 KiB, numbered with 32 bits: at most 16 TiB
//! ```
//!
//! The writer uses the oldest format that can express the tree: kernel 5.4, or 5.15 if a sparse file needs chunks.
//! The image has extended inodes and plain files. Small directories and symlinks lie behind their inode.
//!
//! # Invariants
//! - Equal trees give equal bytes.
//! - A [`Nid`] is an inode's place in the image, so the inode number is the same on every host.
//! - The reader trusts nothing. Bytes that make no sense are a typed error, never a panic, an endless loop or a large
//!   allocation.
//! - The reader reads what this module writes. The reader refuses EROFS images that use more of the format.

mod dirent;
mod format;
mod map;
mod plan;
mod read;
mod walk;
mod write;
mod xattr;

pub use dirent::FileType;
pub use map::Mapping;
pub use read::{Dirent, Dirents, Inode, Reader};
pub use walk::{MOST_LINKS, WalkError, Walker};
pub use write::{Planned, WriteSummary, write};
pub use xattr::{Xattr, XattrIter};

use crate::tree::LayerIdx;

/// Number of an inode: its byte offset in the image divided by 32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Nid(pub u64);

/// Why a tree cannot become an image, or an image cannot answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ErofsError {
    /// An error of the output to which the image is written.
    #[error("cannot write the file system image")]
    Io(#[from] std::io::Error),
    /// An image with more blocks than 32 bits can number.
    #[error(
        "the image needs {metadata_blocks} blocks of metadata and {device_blocks} of content, and a disk has at most {} (16 TiB)",
        u32::MAX
    )]
    TooLarge {
        /// Blocks of metadata.
        metadata_blocks: u64,
        /// Blocks of all data devices.
        device_blocks: u64,
    },
    /// Sparse files that need an unreasonable amount of metadata.
    #[error("{} makes {chunks} chunks of sparse files, more than the {limit} one image may have", path.escape_ascii())]
    TooManyChunks {
        /// Path of the file that exceeded the limit.
        path: Box<[u8]>,
        /// Chunks of that file and of all files before it.
        chunks: u64,
        /// Most chunks that are allowed.
        limit: u64,
    },
    /// Metadata that takes more memory than is allowed.
    #[error(
        "up to {}, the tree takes {} MiB, more than the {} MiB that are allowed; a larger --memory allows more",
        path.escape_ascii(), bytes.div_ceil(1 << 20), limit >> 20
    )]
    TooMuchMetadata {
        /// Path of the file that exceeded the limit.
        path: Box<[u8]>,
        /// Bytes of metadata up to and including that file.
        bytes: u64,
        /// Most bytes that are allowed.
        limit: u64,
    },
    /// A file with more extended attributes than an inode can have.
    #[error("extended attributes of {} take {size} bytes, and at most {limit} fit", path.escape_ascii())]
    XattrsTooLarge {
        /// Path of the file.
        path: Box<[u8]>,
        /// Size of the attributes as stored, in bytes.
        size: u64,
        /// Most bytes that are allowed.
        limit: u64,
    },
    /// A file whose content lies outside the data device of its layer.
    #[error("content of {} lies outside the data device of layer {}", path.escape_ascii(), layer.0)]
    OutsideDevice {
        /// Path of the file.
        path: Box<[u8]>,
        /// The layer that should have the content.
        layer: LayerIdx,
    },
    /// A name, symlink or chunk list that violates the invariants of [`crate::tree::Tree`].
    #[error("{} cannot be stored: {what}", path.escape_ascii())]
    Unstorable {
        /// Path of the file, or of the directory that has the name.
        path: Box<[u8]>,
        /// What is wrong with the file or the directory.
        what: &'static str,
    },
    /// An image whose length differs from what the superblock and the device sizes say.
    #[error("the file system image has {size} bytes instead of {expected}")]
    Truncated {
        /// Length of the image in bytes.
        size: u64,
        /// Expected length in bytes.
        expected: u64,
    },
    /// An image without an EROFS superblock.
    #[error("not an erofs image: magic {magic:#010x}")]
    NotErofs {
        /// The four bytes in the place of the magic number.
        magic: u32,
    },
    /// An image whose first block was altered.
    #[error("the superblock is corrupt: checksum {found:#010x}, computed {computed:#010x}")]
    Checksum {
        /// Checksum that the superblock states.
        found: u32,
        /// Checksum computed from the block.
        computed: u32,
    },
    /// An EROFS image that another program wrote.
    #[error("the erofs image was not written by ocifs: it has {what}")]
    Foreign {
        /// The part of the image that ocifs does not write.
        what: &'static str,
    },
    /// An image that belongs to other data devices than the given ones.
    #[error("the image counts {blocks} blocks, fewer than its data devices have ({device_blocks})")]
    DeviceMismatch {
        /// Blocks of metadata and devices, as the superblock states.
        blocks: u64,
        /// Blocks of the given devices.
        device_blocks: u64,
    },
    /// An inode that makes no sense, or something that belongs to the inode.
    #[error("inode {nid} of the image is corrupt: {what}")]
    Corrupt {
        /// Number of the inode.
        nid: u64,
        /// The part that makes no sense.
        what: &'static str,
    },
    /// An inode of a different type than the caller asked for.
    #[error("inode {nid} is no {wanted}")]
    WrongType {
        /// Number of the inode.
        nid: u64,
        /// Type that the caller asked for.
        wanted: &'static str,
    },
}
