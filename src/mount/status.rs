//! The status of a mount.

use serde::{Deserialize, Serialize};

use super::doors::DiskDoors;
use super::prefetch::PrefetchStatus;
use super::registration::Carrier;
use crate::blob::{Link, Retries};
use crate::content::ReadStatus;
use crate::device::Evictions;
use crate::fetch::Load;
use crate::image::Unconfirmed;
use crate::layer::{FetchedFor, LayerStatus};

/// The state of a mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MountState {
    /// The tree is not ready yet, and operations wait for it.
    Preparing,
    /// The tree is not ready, and no useful bytes have come for as long as a read may take. Operations fail until
    /// useful bytes come.
    Stalled,
    /// The process serves the image.
    Ready,
    /// The image could not be prepared. Every operation fails.
    Failed,
    /// The process is dead. The mount point may still be mounted.
    Dead,
    /// The process is alive and does not answer.
    Unresponsive,
    /// The mount point is unmounted. The process goes on because the mount still has users.
    Detached,
}

/// The measured link to the layers.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct LinkStatus {
    /// Seconds from a request to the first byte of its response.
    pub rtt: Option<f64>,
    /// Bytes per second of all requests together.
    pub bandwidth: Option<f64>,
}

impl From<Link> for LinkStatus {
    fn from(link: Link) -> Self {
        Self {
            rtt: link.rtt.map(|rtt| rtt.as_secs_f64()),
            bandwidth: link.bandwidth,
        }
    }
}

/// The status of a mount and its layers.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MountStatus {
    /// Id of the process behind the mount.
    pub pid: u32,
    /// The image as the user wrote it.
    pub image: String,
    /// Digest of the image's manifest.
    pub digest: String,
    /// When the registry last confirmed the tag and why it is unconfirmed, if the tag was resolved without its
    /// registry.
    pub unconfirmed: Option<Unconfirmed>,
    /// The mount point. For a disk, the first of its places: directory, NBD address, vhost-user socket.
    pub mountpoint: String,
    /// The whole mount point in base64, if it is not UTF-8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mountpoint_base64: Option<String>,
    /// The log of the process, if it runs in the background.
    #[serde(default)]
    pub log: Option<String>,
    /// Directory of the store that the process uses, if it has one and reported it.
    #[serde(default)]
    pub store: Option<String>,
    /// Where the figures of the mount go, if they go anywhere: HOST:PORT, `unix:SOCKET`, or a file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics: Option<String>,
    /// The state of the mount.
    pub state: MountState,
    /// What is wrong at the moment: why the mount failed, why the store keeps no content, why reads fail, or why
    /// the process does not answer.
    pub problem: Option<String>,
    /// Whether the mount is writable.
    pub writable: bool,
    /// What serves the directory tree.
    #[serde(default)]
    pub via: Carrier,
    /// Where the disk can be reached, if the image is served as one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<DiskDoors>,
    /// Seconds since the start of the process.
    pub uptime: f64,
    /// Seconds from the start of the process until the image was mounted. The overlay of a writable mount comes
    /// later.
    pub mount_seconds: f64,
    /// Seconds from the start of the process until the tree was ready.
    pub ready_seconds: Option<f64>,
    /// Sum of the layers' compressed sizes in bytes.
    pub size: u64,
    /// Compressed bytes that this mount has fetched.
    pub fetched: u64,
    /// What they were fetched for.
    #[serde(default)]
    pub fetched_for: FetchedFor,
    /// While preparing: the average rate at which layers have arrived since the image was mounted, in compressed
    /// bytes per second. It includes bytes that an interrupted earlier pass left in the store. While stalled: the
    /// rate of the last seconds.
    pub rate: Option<f64>,
    /// While stalled: seconds since useful bytes came last.
    #[serde(default)]
    pub stalled_seconds: Option<f64>,
    /// While preparing: seconds until all layers have arrived, if `rate` stays the same.
    pub remaining_seconds: Option<f64>,
    /// Bytes of decoded spans in memory.
    pub memory: u64,
    /// Bytes of memory that the process takes.
    #[serde(default)]
    pub resident: Option<u64>,
    /// Compressed bytes of the spans that were read.
    pub used: u64,
    /// Compressed bytes of the spans that need no fetch.
    pub local: u64,
    /// Number of requests for layers.
    pub requests: u64,
    /// How often a request for a layer was repeated, by what went wrong.
    #[serde(default)]
    pub retries: Retries,
    /// What this process has evicted from the store to make room.
    #[serde(default)]
    pub evicted: Evictions,
    /// Requests in flight, and requests that wait for a pass.
    pub in_flight: Load,
    /// The measured link to the layers. `None` until the tree is ready.
    pub link: Option<LinkStatus>,
    /// Counts and times of reads.
    pub reads: ReadStatus,
    /// The status of prefetching. `None` if the process did not report it.
    pub prefetch: Option<PrefetchStatus>,
    /// The layers, base first.
    pub layers: Vec<LayerStatus>,
}
