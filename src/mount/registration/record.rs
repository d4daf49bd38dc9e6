//! The record of a mount in the run directory.

use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;

use base64::Engine as _;
use serde::{Deserialize, Serialize};

use crate::mount::mountinfo::{self, MountEntry};
use crate::mount::overlay;
use crate::mount::process::process_start;
use crate::mount::standing::Standing;

/// The facts about a mount that other processes know without asking its process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountRecord {
    /// Id of the process behind the mount.
    pub pid: u32,
    /// When that process started, in clock ticks since boot (/proc/PID/stat field 22). The start time tells the
    /// process from a later one with the same id.
    pub started: u64,
    /// The image as the user wrote it.
    pub image: String,
    /// Digest of the image's manifest.
    pub digest: String,
    /// The mount point that the user gave.
    #[serde(with = "path_bytes")]
    pub mountpoint: PathBuf,
    /// Where the image itself is mounted. This is the mount point, or, for a writable mount until the overlay
    /// stands, a directory of its own.
    #[serde(with = "path_bytes")]
    pub lower: PathBuf,
    /// Whether the mount is writable: an overlay lies on top of the image.
    pub writable: bool,
    /// The private upper directory to delete at the end.
    #[serde(with = "optional_path_bytes")]
    pub scratch: Option<PathBuf>,
    /// Identity of the mount at the mount point. `None` until it is made.
    #[serde(default)]
    pub standing: Option<Standing>,
}

impl MountRecord {
    /// Returns the mount point in base64 if it is not UTF-8.
    pub(in crate::mount) fn mountpoint_base64(&self) -> Option<String> {
        let bytes = self.mountpoint.as_os_str().as_bytes();
        let is_text = self.mountpoint.to_str().is_some();
        (!is_text).then(|| base64::engine::general_purpose::STANDARD.encode(bytes))
    }

    /// Whether the process behind the mount is alive.
    pub fn is_alive(&self) -> bool {
        process_start(self.pid) == Some(self.started)
    }

    /// Whether any mount of this record exists in this mount namespace.
    pub(in crate::mount) fn is_mounted(&self) -> io::Result<bool> {
        Ok(self.mounts()?.next().is_some())
    }

    /// Returns the mounts of this record in this mount namespace, the topmost first.
    pub(in crate::mount) fn mounts(&self) -> io::Result<impl Iterator<Item = MountEntry>> {
        let mut table = mountinfo::table()?;
        // The kernel may give the numbers of a mount that is gone to one of another program.
        let by_ocifs = |mount: &MountEntry| mount.fs_type == "fuse.ocifs" || overlay::is_ours(mount);
        table.retain(|mount| match &self.standing {
            _ if !by_ocifs(mount) => false,
            // A copy of the mount in another mount namespace has another id.
            Some(standing) => {
                mount.is(standing) || (mount.device == standing.device && mount.mountpoint == self.mountpoint)
            }
            None => {
                (mount.mountpoint == self.lower && mount.fs_type == "fuse.ocifs")
                    || (self.writable && mount.mountpoint == self.mountpoint && overlay::is_ours(mount))
            }
        });
        Ok(table.into_iter().rev())
    }

    /// Whether the mount is gone from the mount namespace of its process. The process then goes on because the
    /// mount still has users.
    pub(in crate::mount) fn is_detached(&self) -> bool {
        let Some(standing) = &self.standing else {
            return false;
        };
        // If this process may not read the mount table of that process, it cannot tell.
        mountinfo::table_of(self.pid).is_ok_and(|table| !table.iter().any(|mount| mount.is(standing)))
    }
}

/// Serializes a path. JSON text is Unicode, and a path need not be. A path that is not UTF-8 becomes an array of
/// its bytes.
mod path_bytes {
    use std::ffi::OsString;
    use std::os::unix::ffi::OsStringExt as _;
    use std::path::{Path, PathBuf};

    use serde::{Deserialize, Deserializer, Serialize as _, Serializer};

    pub(super) fn serialize<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
        match path.to_str() {
            Some(text) => serializer.serialize_str(text),
            None => path.as_os_str().as_encoded_bytes().serialize(serializer),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PathBuf, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Text(PathBuf),
            Bytes(Vec<u8>),
        }
        Ok(match Written::deserialize(deserializer)? {
            Written::Text(path) => path,
            Written::Bytes(bytes) => OsString::from_vec(bytes).into(),
        })
    }
}

/// Serializes a path that may be missing, in the format of [`path_bytes`].
mod optional_path_bytes {
    use std::path::PathBuf;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Serialize, Deserialize)]
    struct Wrapped(#[serde(with = "super::path_bytes")] PathBuf);

    pub(super) fn serialize<S: Serializer>(path: &Option<PathBuf>, serializer: S) -> Result<S::Ok, S::Error> {
        path.clone().map(Wrapped).serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<PathBuf>, D::Error> {
        Ok(Option::<Wrapped>::deserialize(deserializer)?.map(|wrapped| wrapped.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_keeps_paths_that_are_not_text() {
        use std::os::unix::ffi::OsStrExt as _;
        let path = |bytes: &[u8]| PathBuf::from(std::ffi::OsStr::from_bytes(bytes));
        let record = MountRecord {
            pid: 1,
            started: 2,
            image: "alpine".to_owned(),
            digest: String::new(),
            mountpoint: path(b"/mnt/\xe9"),
            lower: path(b"/mnt/plain"),
            writable: true,
            scratch: Some(path(b"/store/\xff")),
            standing: None,
        };
        let json = serde_json::to_string(&record).unwrap();
        assert!(json.contains("\"/mnt/plain\""), "{json}");
        assert_eq!(serde_json::from_str::<MountRecord>(&json).unwrap(), record);
    }
}
