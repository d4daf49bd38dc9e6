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

impl Standing {
    /// Whether `other` may be this mount or a copy of it: the file system is the same as far as the numbers tell. A copy
    /// in another mount namespace has other ids. A later mount that got both numbers has another unique id.
    pub(super) fn may_be(&self, other: &Self) -> bool {
        let differ = |(ours, theirs)| ours != theirs;
        let is_later = self.id == other.id && self.unique.zip(other.unique).is_some_and(differ);
        self.device == other.device && !is_later
    }
}
