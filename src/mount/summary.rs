//! What a mount has done from its beginning to its end.

use serde::{Deserialize, Serialize};

use super::status::MountStatus;

/// The figures of a mount at its end. All of them count from the start of its process.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RunSummary {
    /// The image as the user wrote it.
    pub image: String,
    /// Digest of the image's manifest.
    pub digest: String,
    /// Seconds from the start of the process until its end.
    pub seconds: f64,
    /// Seconds until the image was mounted.
    pub mount_seconds: f64,
    /// Seconds until the tree was ready. None if it never was.
    pub ready_seconds: Option<f64>,
    /// Sum of the layers' compressed sizes in bytes.
    pub size: u64,
    /// Compressed bytes that were fetched.
    pub fetched: u64,
    /// Compressed bytes of what was read, whether it was fetched or local.
    pub used: u64,
    /// Number of requests for layers.
    pub requests: u64,
    /// Number of reads that reached the process.
    pub reads: u64,
    /// Number of those that had to wait.
    pub waits: u64,
    /// Part of the reads that did not have to wait, from 0 to 1. None if there were no reads.
    pub hit_rate: Option<f64>,
}

impl From<&MountStatus> for RunSummary {
    fn from(status: &MountStatus) -> Self {
        let reads = status.reads.at_once + status.reads.waited;
        Self {
            image: status.image.clone(),
            digest: status.digest.clone(),
            seconds: status.uptime,
            mount_seconds: status.mount_seconds,
            ready_seconds: status.ready_seconds,
            size: status.size,
            fetched: status.fetched,
            used: status.used,
            requests: status.requests,
            reads,
            waits: status.reads.waited,
            hit_rate: (reads > 0).then(|| status.reads.at_once as f64 / reads as f64),
        }
    }
}
