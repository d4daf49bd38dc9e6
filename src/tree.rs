//! The merged view of all layers: one immutable tree.
//!
//! [`Merger`] takes the layers' tables of contents, base first, and makes the [`Tree`] a container would see (OCI image-spec,
//! layer.md; where engines disagree, the rules are listed at [`Merger`]).
//!
//! Invariants: node 0 is the root and a directory; every other node is reachable from it; a directory has exactly one parent;
//! `nlink` of a directory is 2 + its subdirectories, of anything else the number of names that lead to it; nodes stand in
//! breadth-first order, a directory's children by name, so equal layers give equal trees.

mod arena;
mod finished;
mod layer;
#[cfg(test)]
mod matrix;
mod merge;
#[cfg(test)]
mod model;

pub use finished::Tree;
pub(crate) use finished::{Children, View};
pub use merge::Merger;

use crate::memory::OverLimit;
use crate::toc::{DeviceNumber, FileData, Metadata, TocError, Xattrs};

/// Number of a node in its [`Tree`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub u32);

/// Position of a layer in its image, 0 is the base.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LayerIdx(pub u32);

/// One inode, as a value: what [`Tree::node`] gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Mode, owner, time. The mode of a symlink is 0777.
    pub meta: Metadata,
    /// Extended attributes, sorted by name.
    pub xattrs: Xattrs,
    /// Link count as stat(2) shows it.
    pub nlink: u32,
    /// What it is.
    pub kind: NodeKind,
}

/// Type of an inode with what belongs to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodeKind {
    /// Directory: names (1 to 255 bytes, without `/` and NUL, not `.` or `..`) and their nodes, sorted by name as bytes.
    Directory(Vec<(Box<[u8]>, NodeId)>),
    /// Regular file whose content lies in the data device of `layer`.
    Regular {
        /// The layer that has the content.
        layer: LayerIdx,
        /// Size and place.
        data: FileData,
    },
    /// Symbolic link with its target.
    Symlink(Box<[u8]>),
    /// Character device.
    CharDevice(DeviceNumber),
    /// Block device.
    BlockDevice(DeviceNumber),
    /// Named pipe.
    Fifo,
}

/// Why layers cannot be merged. None of these goes away by trying again: the image itself is at fault.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TreeError {
    /// A hard link to a path that neither its layer nor a lower one has.
    #[error("layer {}: hard link {} points at {}, which does not exist", layer.0, show(path), show(target))]
    HardlinkMissing {
        /// Layer of the link.
        layer: LayerIdx,
        /// Path of the link.
        path: Box<[u8]>,
        /// Path it points at.
        target: Box<[u8]>,
    },
    /// A hard link to a directory.
    #[error("layer {}: hard link {} points at {}, which is a directory", layer.0, show(path), show(target))]
    HardlinkToDirectory {
        /// Layer of the link.
        layer: LayerIdx,
        /// Path of the link.
        path: Box<[u8]>,
        /// Path it points at.
        target: Box<[u8]>,
    },
    /// Hard links of one layer that point at each other.
    #[error("layer {}: hard link {} to {} leads back to itself", layer.0, show(path), show(target))]
    HardlinkCycle {
        /// Layer of the link.
        layer: LayerIdx,
        /// Path of the link.
        path: Box<[u8]>,
        /// Path it points at.
        target: Box<[u8]>,
    },
    /// An entry below a symlink of the same layer that leads nowhere a path can.
    #[error("layer {}: parent of {} cannot be followed: {reason}", layer.0, show(path))]
    Unfollowable {
        /// Layer of the entry.
        layer: LayerIdx,
        /// Path of the entry, or of the hard link's target.
        path: Box<[u8]>,
        /// What is wrong with the symlinks on the way.
        reason: &'static str,
    },
    /// More inodes than the limit.
    #[error("layer {}: with {}, the image has more than 33554432 files and directories", layer.0, show(path))]
    TooManyInodes {
        /// Layer in which the count ran over.
        layer: LayerIdx,
        /// Path of the entry.
        path: Box<[u8]>,
    },
    /// The merged tree takes more memory than the image may.
    #[error("layer {}: up to {}, the files of the image take {source}", layer.0, show(path))]
    TooMuchMemory {
        /// Layer in which the memory ran out.
        layer: LayerIdx,
        /// Path of the entry.
        path: Box<[u8]>,
        /// The limit.
        source: OverLimit,
    },
    /// A table of contents is damaged.
    #[error("layer {}: {source}", layer.0)]
    Toc {
        /// The layer.
        layer: LayerIdx,
        /// What is wrong with its table.
        source: TocError,
    },
}

/// A path as a person reads it.
fn show(path: &[u8]) -> String {
    format!("/{}", path.escape_ascii())
}
