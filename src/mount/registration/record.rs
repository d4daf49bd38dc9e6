//! What is written down about a mount.

use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;

use base64::Engine as _;
use serde::{Deserialize, Serialize};

use crate::mount::mountinfo::{self, MountEntry};
use crate::mount::overlay;
use crate::mount::process::process_start;

/// What is known about a mount without asking its process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountRecord {
    /// Serving process.
    pub pid: u32,
    /// When that process started, in clock ticks since boot (/proc/PID/stat field 22); tells it from a later one.
    pub started: u64,
    /// The image as given.
    pub image: String,
    /// Digest of its manifest.
    pub digest: String,
    /// Where the user sees it.
    #[serde(with = "path_bytes")]
    pub mountpoint: PathBuf,
    /// Where the image itself is mounted: the mount point, or, until there is an overlay, a directory of its own.
    #[serde(with = "path_bytes")]
    pub lower: PathBuf,
    /// Whether an overlay lies on top.
    pub writable: bool,
    /// Private upper directory to delete at the end.
    #[serde(with = "optional_path_bytes")]
    pub scratch: Option<PathBuf>,
    /// The mount that the user sees, once it stands.
    #[serde(default)]
    pub standing: Option<Standing>,
}

/// A mount as the kernel knows it, wherever its directory is moved. Neither of the two alone is enough: the ids and device
/// numbers of what is gone are given away again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standing {
    /// Id of the mount in the namespace of its process.
    pub id: u64,
    /// Device number of the file system, major:minor.
    pub device: String,
}

impl MountRecord {
    /// The mount point in base64, if it is not UTF-8.
    pub(in crate::mount) fn mountpoint_base64(&self) -> Option<String> {
        let bytes = self.mountpoint.as_os_str().as_bytes();
        let is_text = self.mountpoint.to_str().is_some();
        (!is_text).then(|| base64::engine::general_purpose::STANDARD.encode(bytes))
    }

    /// Whether the process that serves the mount is alive.
    pub fn is_alive(&self) -> bool {
        process_start(self.pid) == Some(self.started)
    }

    /// Whether anything of it is mounted in this namespace.
    pub(in crate::mount) fn is_mounted(&self) -> io::Result<bool> {
        Ok(self.mounts()?.next().is_some())
    }

    /// What of it is mounted in this namespace, the uppermost first.
    pub(in crate::mount) fn mounts(&self) -> io::Result<impl Iterator<Item = MountEntry>> {
        let mut table = mountinfo::table()?;
        table.retain(|mount| match &self.standing {
            // In another namespace the mount has another id.
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

    /// Whether the mount point is gone from the namespace of its process, which goes on because others use the mount.
    pub(in crate::mount) fn is_detached(&self) -> bool {
        let Some(standing) = &self.standing else {
            return false;
        };
        // If it may not be looked at, nothing is known.
        mountinfo::table_of(self.pid).is_ok_and(|table| !table.iter().any(|mount| mount.is(standing)))
    }
}

/// JSON text is Unicode and a path need not be: such a one is written as an array of its bytes.
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

/// The same for a path that may be missing.
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
