//! What a mount says about itself.

use serde::{Deserialize, Serialize};

use super::prefetch::PrefetchStatus;
use crate::blob::Link;
use crate::content::ReadStatus;
use crate::fetch::Load;
use crate::image::Unconfirmed;
use crate::layer::LayerStatus;

/// Where a mount is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MountState {
    /// Mounted; operations wait for the tree.
    Preparing,
    /// The same, but nothing useful has come for as long as a read may take: operations fail until something does.
    Stalled,
    /// Serving.
    Ready,
    /// The image could not be made readable; every operation gets an error.
    Failed,
    /// The process is gone, the mount point may still be there.
    Dead,
    /// The process is there and does not answer.
    Unresponsive,
    /// The mount point is unmounted, and the process goes on because somebody still uses the mount.
    Detached,
}

/// The way to the layers.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct LinkStatus {
    /// Seconds from a request to its answer.
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

/// A mount and its layers.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MountStatus {
    /// Serving process.
    pub pid: u32,
    /// The image as given.
    pub image: String,
    /// Digest of its manifest.
    pub digest: String,
    /// If the image's tag was resolved without its registry: since when that has not confirmed it, and why.
    pub unconfirmed: Option<Unconfirmed>,
    /// Where it is mounted.
    pub mountpoint: String,
    /// The same path whole, in base64, if it is not UTF-8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mountpoint_base64: Option<String>,
    /// The log of the process, if it runs in the background.
    #[serde(default)]
    pub log: Option<String>,
    /// Life stage.
    pub state: MountState,
    /// What is wrong at the moment: why it failed, why nothing is kept on disk, why reads fail, why it does not answer.
    pub problem: Option<String>,
    /// Whether changes can be made.
    pub writable: bool,
    /// Seconds since it was mounted.
    pub uptime: f64,
    /// Seconds from the start of the process until it was mounted.
    pub mount_seconds: f64,
    /// Seconds from the start of the process until the tree was ready.
    pub ready_seconds: Option<f64>,
    /// Sum of the layers' compressed sizes in bytes.
    pub size: u64,
    /// Compressed bytes fetched by this mount.
    pub fetched: u64,
    /// While preparing: how fast layers come in, compressed bytes per second, on average since it was mounted; while stalled:
    /// over the last seconds.
    pub rate: Option<f64>,
    /// While stalled: seconds in which nothing useful has come.
    #[serde(default)]
    pub stalled_seconds: Option<f64>,
    /// While preparing: seconds until all layers are in, at that rate.
    pub remaining_seconds: Option<f64>,
    /// Decoded spans held in memory, bytes.
    pub memory: u64,
    /// Compressed bytes of the spans that were read.
    pub used: u64,
    /// Compressed bytes of the spans that need no fetch.
    pub local: u64,
    /// Requests made for layers.
    pub requests: u64,
    /// Requests under way, and those that wait for their turn.
    pub in_flight: Load,
    /// The way to the layers, as measured; nothing before there is a tree.
    pub link: Option<LinkStatus>,
    /// How long reads take.
    pub reads: ReadStatus,
    /// What is fetched although no reader asked for it. None if the process does not say.
    pub prefetch: Option<PrefetchStatus>,
    /// Layers, base first.
    pub layers: Vec<LayerStatus>,
}
