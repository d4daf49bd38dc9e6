//! The merged view of all layers: one immutable tree.
//!
//! # How it works
//! [`Merger`] takes the layers' tables of contents, base first. The merger makes the [`Tree`] that a container would
//! see (OCI image-spec, layer.md). Where engines disagree, the rules of [`Merger`] decide.
//!
//! # Invariants
//! - Node 0 is the root and a directory. Every other node is reachable from it.
//! - A directory has exactly one parent.
//! - `nlink` of a directory is 2 plus the number of its subdirectories. `nlink` of any other node is the number of
//!   its names.
//! - Nodes are in breadth-first order, and a directory's children are in the order of their names. Equal layers
//!   therefore give equal trees.

mod arena;
mod finished;
mod layer;
#[cfg(test)]
mod matrix;
mod merge;
#[cfg(test)]
mod model;

pub use finished::Tree;
pub(crate) use finished::{Children, NodeView};
pub use merge::Merger;

use crate::memory::OverLimit;
use crate::toc::{DeviceNumber, FileData, Metadata, TocError, Xattrs};

/// Number of a node in its [`Tree`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub u32);

/// Position of a layer in its image; 0 is the base layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LayerIdx(pub u32);

/// One inode as a value; [`Tree::node`] returns it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Mode, owner and time. The mode of a symlink is 0777.
    pub meta: Metadata,
    /// Extended attributes, sorted by name.
    pub xattrs: Xattrs,
    /// Link count as stat(2) shows it.
    pub nlink: u32,
    /// Type of the inode, and what belongs to the type.
    pub kind: NodeKind,
}

/// Type of an inode, and what belongs to the type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodeKind {
    /// Directory: names and their nodes, sorted by name as bytes. A name has 1 to 255 bytes without `/` and NUL, and
    /// is not `.` or `..`.
    Directory(Vec<(Box<[u8]>, NodeId)>),
    /// Regular file whose content lies in the data device of `layer`.
    Regular {
        /// The layer that has the content.
        layer: LayerIdx,
        /// Size, and place in the data device.
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

/// Why layers cannot be merged. A retry never helps, because the image itself is at fault.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TreeError {
    /// A hard link to a path that exists neither in its layer nor in a lower one.
    #[error("layer {}: hard link {} points at {}, which does not exist", layer.0, show(path), show(target))]
    HardlinkMissing {
        /// Layer of the link.
        layer: LayerIdx,
        /// Path of the link.
        path: Box<[u8]>,
        /// Path that the link points at.
        target: Box<[u8]>,
    },
    /// A hard link to a directory.
    #[error("layer {}: hard link {} points at {}, which is a directory", layer.0, show(path), show(target))]
    HardlinkToDirectory {
        /// Layer of the link.
        layer: LayerIdx,
        /// Path of the link.
        path: Box<[u8]>,
        /// Path that the link points at.
        target: Box<[u8]>,
    },
    /// Hard links of one layer that point at each other in a circle.
    #[error("layer {}: hard link {} to {} leads back to itself", layer.0, show(path), show(target))]
    HardlinkCycle {
        /// Layer of the link.
        layer: LayerIdx,
        /// Path of the link.
        path: Box<[u8]>,
        /// Path that the link points at.
        target: Box<[u8]>,
    },
    /// An entry below a symlink of the same layer, where the symlink cannot be followed.
    #[error("layer {}: parent of {} cannot be followed: {reason}", layer.0, show(path))]
    Unfollowable {
        /// Layer of the entry.
        layer: LayerIdx,
        /// Path of the entry, or of the hard link's target.
        path: Box<[u8]>,
        /// What is wrong with the symlinks in the path.
        reason: &'static str,
    },
    /// More inodes than the limit.
    #[error("layer {}: with {}, the image has more than 33554432 files and directories", layer.0, show(path))]
    TooManyInodes {
        /// Layer in which the count exceeded the limit.
        layer: LayerIdx,
        /// Path of the entry that exceeded the limit.
        path: Box<[u8]>,
    },
    /// The merged tree takes more memory than is allowed.
    #[error("layer {}: up to {}, the files of the image take {source}", layer.0, show(path))]
    TooMuchMemory {
        /// Layer in which the memory exceeded the limit.
        layer: LayerIdx,
        /// Path of the entry that exceeded the limit.
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

impl TreeError {
    /// Returns the layer at which the merge failed. A lower layer may be the cause.
    pub fn layer(&self) -> LayerIdx {
        match self {
            Self::HardlinkMissing { layer, .. }
            | Self::HardlinkToDirectory { layer, .. }
            | Self::HardlinkCycle { layer, .. }
            | Self::Unfollowable { layer, .. }
            | Self::TooManyInodes { layer, .. }
            | Self::TooMuchMemory { layer, .. }
            | Self::Toc { layer, .. } => *layer,
        }
    }
}

/// Formats a path for a message.
fn show(path: &[u8]) -> String {
    format!("/{}", path.escape_ascii())
}
