//! The identity of a mount in the kernel.

use serde::{Deserialize, Serialize};

/// The identity of a mount in the kernel, which stays the same wherever its directory is moved. It takes both
/// fields, because the kernel reuses ids and device numbers of mounts that are gone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standing {
    /// Id of the mount in the mount namespace of its process.
    pub id: u64,
    /// Device number of the file system, major:minor.
    pub device: String,
}
