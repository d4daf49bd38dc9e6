//! What is known of one snapshot.

use std::collections::BTreeMap;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::oci::Digest;

/// What can be done with a snapshot (containerd's `snapshots.Kind`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SnapshotKind {
    /// It can be read.
    View,
    /// It can be changed and committed.
    Active,
    /// It never changes, and others can be made on it.
    Committed,
}

impl SnapshotKind {
    /// Returns the name that filters use.
    pub fn name(self) -> &'static str {
        match self {
            Self::View => "view",
            Self::Active => "active",
            Self::Committed => "committed",
        }
    }
}

/// Disk space of the changes in a snapshot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskUsage {
    /// Bytes on disk.
    pub size: u64,
    /// Files, directories and others.
    pub inodes: u64,
}

/// The lowest layers of an image, which ocifs mounts.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ImageLayers {
    /// Name of the image, as containerd gave it.
    pub reference: String,
    /// Digest of the image's manifest.
    pub manifest: Digest,
    /// How many layers, from the lowest.
    pub layers: usize,
}

/// Where the files of a snapshot come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SnapshotContent {
    /// A directory with the changes to the parent. A committed snapshot knows the space that it takes.
    Changes(Option<DiskUsage>),
    /// All files, those of the parents too, are in the mount of an image.
    Image(ImageLayers),
}

/// One snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotRecord {
    /// Its name or key.
    pub name: String,
    /// The name of the committed snapshot below it, if there is one.
    pub parent: Option<String>,
    /// What can be done with it.
    pub kind: SnapshotKind,
    /// Number of its directory. No other snapshot of this root ever has it.
    pub id: u64,
    /// When it was made.
    pub created: SystemTime,
    /// When its labels were changed last.
    pub updated: SystemTime,
    /// Labels, which containerd gives meaning to.
    pub labels: BTreeMap<String, String>,
    /// Where its files come from.
    pub content: SnapshotContent,
}

impl SnapshotRecord {
    /// Returns the image whose mount has the files of this snapshot, if it is a layer that is read lazily.
    pub fn image(&self) -> Option<&ImageLayers> {
        match &self.content {
            SnapshotContent::Image(image) => Some(image),
            SnapshotContent::Changes(_) => None,
        }
    }
}
