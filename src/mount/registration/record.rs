//! The record of a mount in the run directory.

use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use serde::{Deserialize, Serialize};

use crate::mount::doors::DiskDoors;
use crate::mount::mountinfo::{self, MountEntry};
use crate::mount::overlay;
use crate::mount::path_bytes;
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
    /// The mount point that the user gave. For a disk, its first place ([`DiskDoors::places`]).
    #[serde(with = "path_bytes::required")]
    pub mountpoint: PathBuf,
    /// Where the image itself is mounted. This is the mount point, or, for a writable mount until the overlay
    /// stands, a directory of its own.
    #[serde(with = "path_bytes::required")]
    pub lower: PathBuf,
    /// Whether the mount is writable: an overlay lies on top of the image.
    pub writable: bool,
    /// The private upper directory to delete at the end.
    #[serde(with = "path_bytes::optional")]
    pub scratch: Option<PathBuf>,
    /// Identity of the mount at the mount point. `None` until it is made.
    #[serde(default)]
    pub standing: Option<Standing>,
    /// What serves the directory tree.
    #[serde(default)]
    pub carrier: Carrier,
    /// Where the disk is mounted until the kernel's EROFS holds it.
    #[serde(default, with = "path_bytes::optional")]
    pub disk_mount: Option<PathBuf>,
    /// Where the disk can be reached, if the image is served as one.
    #[serde(default)]
    pub disk: Option<DiskDoors>,
    /// How far the attachment is.
    #[serde(default)]
    pub phase: AttachPhase,
}

/// What serves a directory tree.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Carrier {
    /// FUSE, and behind it the process.
    #[default]
    Fuse,
    /// The kernel's EROFS. The process serves only the disk below it.
    Erofs,
}

/// How far an attachment is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AttachPhase {
    /// The process will attach the image when it is ready.
    Pending,
    /// The image was attached. Another program may have unmounted it since.
    #[default]
    Attached,
    /// The process has taken the disk away from new users, and serves those that are left.
    Detached,
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

    /// Whether this record occupies its places, provided that its process is alive.
    pub(in crate::mount) fn is_in_use(&self) -> io::Result<bool> {
        match (self.phase, &self.disk) {
            (AttachPhase::Pending, _) => Ok(true),
            (AttachPhase::Attached, Some(_)) => Ok(true),
            (AttachPhase::Detached, _) => Ok(false),
            (AttachPhase::Attached, None) => Ok(self.mounts()?.next().is_some()),
        }
    }

    /// Whether a path is one of the places of this record.
    pub(in crate::mount) fn is_at(&self, path: &Path) -> bool {
        let places = self.disk.as_ref().map(DiskDoors::places).unwrap_or_default();
        self.mountpoint == path || places.iter().any(|place| place == path)
    }

    /// Returns the mounts of this record in this mount namespace, the topmost first.
    pub(in crate::mount) fn mounts(&self) -> io::Result<impl Iterator<Item = MountEntry>> {
        let mut table = mountinfo::table()?;
        // The kernel may give the numbers of a mount that is gone to one of another program.
        let by_ocifs = |mount: &MountEntry| {
            let by_erofs = self.carrier == Carrier::Erofs && mount.fs_type == "erofs";
            mount.fs_type == "fuse.ocifs" || by_erofs || overlay::is_ours(mount)
        };
        table.retain(|mount| match &self.standing {
            _ if !by_ocifs(mount) => false,
            // A process that was killed may have left what is below its overlay or EROFS.
            _ if Some(&mount.mountpoint) == self.disk_mount.as_ref() => true,
            _ if self.lower != self.mountpoint && mount.mountpoint == self.lower => true,
            // A copy of the mount in another mount namespace has another id.
            Some(standing) => {
                mount.is(standing) || (mount.device == standing.device && mount.mountpoint == self.mountpoint)
            }
            None => {
                (mount.mountpoint == self.lower && !overlay::is_ours(mount))
                    || (self.writable && mount.mountpoint == self.mountpoint && overlay::is_ours(mount))
            }
        });
        Ok(table.into_iter().rev())
    }

    /// Whether the mount is gone from the mount namespace of its process. The process then goes on because the
    /// mount still has users.
    pub(in crate::mount) fn is_detached(&self) -> bool {
        if self.phase == AttachPhase::Detached {
            return true;
        }
        let Some(standing) = self.standing.as_ref().filter(|_| self.disk.is_none()) else {
            return false;
        };
        // If this process may not read the mount table of that process, it cannot tell.
        mountinfo::table_of(self.pid).is_ok_and(|table| !table.iter().any(|mount| mount.is(standing)))
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
            carrier: Carrier::Erofs,
            disk_mount: Some(path(b"/run/\xff")),
            disk: None,
            phase: AttachPhase::Pending,
        };
        let json = serde_json::to_string(&record).unwrap();
        assert!(json.contains("\"/mnt/plain\""), "{json}");
        assert_eq!(serde_json::from_str::<MountRecord>(&json).unwrap(), record);
    }
}
