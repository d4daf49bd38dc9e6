//! The identity of a mount in the kernel.

use serde::{Deserialize, Serialize};

/// The identity of a mount in the kernel, which stays the same wherever its directory is moved.
///
/// The kernel reuses ids and device numbers of mounts that are gone. A new mount often gets both numbers of the last
/// one that ended. So whoever unmounts by these numbers has to make sure that the mount is still the same, by `unique`
/// or in another way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standing {
    /// Id of the mount in the mount namespace of its process.
    pub id: u64,
    /// Device number of the file system, major:minor.
    pub device: String,
    /// The id that no other mount gets until the next boot. `None` before Linux 6.8.
    #[serde(default)]
    pub unique: Option<u64>,
}
