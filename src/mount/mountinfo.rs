//! /proc/self/mountinfo (proc(5)): which file systems are mounted where.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

use super::standing::Standing;

/// One mounted file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct MountEntry {
    pub(super) id: u64,
    /// Device number of the file system, as major:minor. All copies of a mount share it.
    pub(super) device: String,
    /// The directory of the file system that is mounted. For a namespace file (nsfs) it is the name of the
    /// namespace.
    pub(super) root: String,
    pub(super) mountpoint: PathBuf,
    pub(super) fs_type: String,
    /// The source that the mounting program named.
    pub(super) source: String,
}

impl MountEntry {
    /// Returns the id and device number, which together identify this mount among all present mounts. The table does
    /// not have the unique id.
    pub(super) fn standing(&self) -> Standing {
        Standing {
            id: self.id,
            device: self.device.clone(),
            unique: None,
        }
    }

    pub(super) fn is(&self, mount: &Standing) -> bool {
        self.id == mount.id && self.device == mount.device
    }
}

/// Returns the topmost mount at exactly `path`, or `None` if it is no mount point.
pub(super) fn at(path: &Path) -> io::Result<Option<MountEntry>> {
    Ok(table()?.into_iter().rfind(|entry| entry.mountpoint == path))
}

/// Finds a mount in this namespace, wherever it has been moved.
pub(super) fn find(mount: &Standing) -> io::Result<Option<MountEntry>> {
    Ok(table()?.into_iter().find(|entry| entry.is(mount)))
}

/// Returns all mounts in this namespace. A mount that covers another one comes after it. Paths are bytes, because
/// the mounts of other programs need not be UTF-8.
pub(super) fn table() -> io::Result<Vec<MountEntry>> {
    read("self")
}

/// Returns all mounts in the mount namespace of a process, in the order of [`table`].
pub(super) fn table_of(pid: u32) -> io::Result<Vec<MountEntry>> {
    read(&pid.to_string())
}

fn read(process: &str) -> io::Result<Vec<MountEntry>> {
    let text = fs::read(format!("/proc/{process}/mountinfo"))?;
    Ok(text.split(|&b| b == b'\n').filter_map(parse).collect())
}

fn parse(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|&b| b == b' ');
    let id = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
    let device = std::str::from_utf8(fields.nth(1)?).ok()?.to_owned();
    let root = String::from_utf8_lossy(fields.next()?).into_owned();
    let mountpoint = unescape(fields.next()?);
    // There may be any number of optional fields. A hyphen ends them.
    fields.find(|field| *field == b"-")?;
    Some(MountEntry {
        id,
        device,
        root,
        mountpoint,
        fs_type: String::from_utf8_lossy(fields.next()?).into_owned(),
        source: String::from_utf8_lossy(fields.next()?).into_owned(),
    })
}

/// Decodes a path. The kernel writes space, tab, newline and backslash as a backslash and three octal digits.
fn unescape(text: &[u8]) -> PathBuf {
    let mut bytes = Vec::new();
    let mut rest = text;
    while let [first, tail @ ..] = rest {
        rest = tail;
        let octal = tail.get(..3).and_then(|d| std::str::from_utf8(d).ok());
        match octal.and_then(|d| u8::from_str_radix(d, 8).ok()) {
            Some(byte) if *first == b'\\' => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            _ => bytes.push(*first),
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_understood() {
        let line = br"98 30 0:46 / /mnt/a\040b\134c rw,relatime shared:1 - fuse.ocifs alpine:latest ro,user_id=0";
        let entry = parse(line).unwrap();
        assert_eq!(
            (entry.id, entry.device.as_str(), entry.root.as_str()),
            (98, "0:46", "/")
        );
        assert_eq!(entry.mountpoint, Path::new(r"/mnt/a b\c"));
        assert_eq!(
            (entry.fs_type.as_str(), entry.source.as_str()),
            ("fuse.ocifs", "alpine:latest")
        );
        assert!(parse(b"nonsense").is_none());
        let line = b"99 30 0:47 / /mnt/\xe9 rw - tmpfs tmpfs rw";
        assert_eq!(
            parse(line).unwrap().mountpoint.as_os_str().as_encoded_bytes(),
            b"/mnt/\xe9"
        );
    }

    #[test]
    fn proc_is_a_mount_point_and_its_status_file_is_not() {
        assert_eq!(at(Path::new("/proc")).unwrap().unwrap().fs_type, "proc");
        assert!(at(Path::new("/proc/self/status")).unwrap().is_none());
    }
}
