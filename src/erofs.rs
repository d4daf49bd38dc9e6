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
mod write;
mod xattr;

pub use dirent::FileType;
pub use map::Mapping;
pub use read::{Entries, Entry, Inode, Reader};
pub use write::{Planned, WriteSummary, write};
pub use xattr::{Xattr, XattrIter};

use crate::tree::LayerIdx;

/// Number of an inode: its byte offset in the image, divided by 32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Nid(pub u64);

/// Why a tree has no image, or an image no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ErofsError {
    /// The image could not be stored.
    #[error("cannot write the file system image")]
    Io(#[from] std::io::Error),
    /// More blocks than 32 bits number.
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
    /// Sparse files that would need an unreasonable amount of metadata.
    #[error("{} makes {chunks} chunks of sparse files, more than the {limit} one image may have", path.escape_ascii())]
    TooManyChunks {
        /// The file that passed the limit.
        path: Box<[u8]>,
        /// Chunks of it and of files before it.
        chunks: u64,
        /// Chunks allowed.
        limit: u64,
    },
    /// More metadata than may be held in memory.
    #[error(
        "up to {}, the tree takes {} MiB, more than the {} MiB that are allowed; a larger --memory allows more",
        path.escape_ascii(), bytes.div_ceil(1 << 20), limit >> 20
    )]
    TooMuchMetadata {
        /// The file that passed the limit.
        path: Box<[u8]>,
        /// Bytes with it.
        bytes: u64,
        /// Bytes allowed.
        limit: u64,
    },
    /// More extended attributes than an inode can have.
    #[error("extended attributes of {} take {size} bytes, and at most {limit} fit", path.escape_ascii())]
    XattrsTooLarge {
        /// The file.
        path: Box<[u8]>,
        /// Bytes as stored.
        size: u64,
        /// Bytes allowed.
        limit: u64,
    },
    /// Content that lies outside the data device of its layer.
    #[error("content of {} lies outside the data device of layer {}", path.escape_ascii(), layer.0)]
    OutsideDevice {
        /// The file.
        path: Box<[u8]>,
        /// The layer that should have the content.
        layer: LayerIdx,
    },
    /// A name, symlink or chunk list that breaks the promises of [`crate::tree::Tree`].
    #[error("{} cannot be stored: {what}", path.escape_ascii())]
    Unstorable {
        /// The file, or the directory of the name.
        path: Box<[u8]>,
        /// What is wrong with it.
        what: &'static str,
    },
    /// Not the number of bytes the superblock and the device sizes tell of.
    #[error("the file system image has {size} bytes instead of {expected}")]
    Truncated {
        /// Bytes there are.
        size: u64,
        /// Bytes there should be.
        expected: u64,
    },
    /// No EROFS superblock.
    #[error("not an erofs image: magic {magic:#010x}")]
    NotErofs {
        /// What stands where the magic number should.
        magic: u32,
    },
    /// The first block was altered.
    #[error("the superblock is corrupt: checksum {found:#010x}, computed {computed:#010x}")]
    Checksum {
        /// As stored.
        found: u32,
        /// As computed.
        computed: u32,
    },
    /// An EROFS image of another program.
    #[error("the erofs image was not written by ocifs: it has {what}")]
    Foreign {
        /// What ocifs does not write.
        what: &'static str,
    },
    /// The image belongs to other data devices than those given.
    #[error("the image counts {blocks} blocks, fewer than its data devices have ({device_blocks})")]
    DeviceMismatch {
        /// Blocks of metadata and devices as the superblock has it.
        blocks: u64,
        /// Blocks of the devices given.
        device_blocks: u64,
    },
    /// An inode, or something that belongs to it, makes no sense.
    #[error("inode {nid} of the image is corrupt: {what}")]
    Corrupt {
        /// The inode.
        nid: u64,
        /// What makes no sense.
        what: &'static str,
    },
    /// The inode is of another type than the question.
    #[error("inode {nid} is no {wanted}")]
    WrongType {
        /// The inode.
        nid: u64,
        /// What it would have to be.
        wanted: &'static str,
    },
}
