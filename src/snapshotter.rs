//! A snapshotter for containerd, whose containers have mounts of images as their roots.
//!
//! containerd unpacks an image by preparing a snapshot for each layer. A snapshotter may answer that a snapshot exists
//! already, and then containerd does not fetch the layer. This snapshotter says so for every image that ocifs can read
//! lazily, and mounts the image, once for all containers. Everything else it does as containerd's own overlayfs
//! snapshotter: images that cannot be read lazily, commits, and builds work as before.
//!
//! ```text
//! containerd --gRPC--> grpc --> service --> table        what snapshots there are
//!                               |           directories  changes of containers
//!                               |           lazy         which images can be read lazily
//!                               +---------> mounts --starts--> `ocifs mount`, one process for each image
//! ```
//!
//! ```text
//! ROOT/table.redb           the snapshots
//!      snapshots/ID/...     the changes of a snapshot
//!      images/DIGEST-N      where the lowest N layers of an image are mounted
//! ```
//!
//! Invariants:
//! - A snapshot that was answered for is in the table on disk.
//! - No container depends on this process: images are served by processes of their own.
//! - A mount is ended only when no active snapshot and no view uses it.
//! - Trouble with an image never makes an answer about another one wait.

mod directories;
mod error;
mod filter;
mod grpc;
mod layer;
mod lazy;
mod messages;
mod mounts;
mod record;
mod service;
mod step;
mod table;

pub use error::SnapshotError;
pub use filter::SnapshotFilters;
pub use grpc::serve;
pub use record::{DiskUsage, ImageLayers, SnapshotContent, SnapshotKind, SnapshotRecord};
pub use service::{Snapshotter, SnapshotterConfig};
pub use step::MountStep;
