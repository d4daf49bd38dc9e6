//! The kernel shows the tree when it mounts the disk. Needs root.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use ocifs::erofs::Reader;
use ocifs::toc::{DeviceNumber, Metadata};
use ocifs::tree::NodeKind;
use tempfile::TempDir;

use super::trees::{self, Sample};
use super::{disk_of, image_of, paths, run};

/// A mounted image. Dropping it unmounts it.
struct Mount(TempDir);

impl Mount {
    fn new(disk: &Path) -> Self {
        let dir = TempDir::new().unwrap();
        let output = Command::new("mount")
            .args(["-t", "erofs", "-o", "ro"])
            .args([disk, dir.path()])
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "these tests need root and a kernel with erofs: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Self(dir)
    }

    fn path(&self, path: &[u8]) -> PathBuf {
        self.0
            .path()
            .join(std::ffi::OsStr::from_bytes(path.strip_prefix(b"/").unwrap_or(path)))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let status = Command::new("umount").arg(self.0.path()).status();
        assert!(
            status.is_ok_and(|status| status.success()),
            "cannot unmount {:?}",
            self.0.path()
        );
    }
}

/// Returns all attributes below the mount as `getfattr` dumps them: path to name to hex digits.
fn kernel_xattrs(mount: &Mount) -> BTreeMap<Vec<u8>, BTreeMap<String, String>> {
    let args = ["-R", "-P", "-h", "-d", "-m", "-", "-e", "hex", "."];
    let output = Command::new("getfattr")
        .current_dir(mount.0.path())
        .args(args)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut all = BTreeMap::new();
    let mut path = Vec::new();
    for line in output.stdout.split(|byte| *byte == b'\n') {
        if let Some(file) = line.strip_prefix(b"# file: ") {
            path = match unescape(file) {
                file if file == b"." => Vec::new(),
                file => [b"/", &file[..]].concat(),
            };
        } else if !line.is_empty() {
            let line = String::from_utf8(line.to_vec()).unwrap();
            let (name, value) = line.split_once('=').unwrap_or((&line, "0x"));
            let value = value.strip_prefix("0x").unwrap_or("");
            all.entry(path.clone())
                .or_insert_with(BTreeMap::new)
                .insert(name.to_owned(), value.to_owned());
        }
    }
    all
}

/// Decodes the `\ooo` escapes that getfattr uses in file names.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut at = 0;
    while at < text.len() {
        if text[at] == b'\\' {
            let digits = std::str::from_utf8(&text[at + 1..at + 4]).unwrap();
            out.push(u8::from_str_radix(digits, 8).unwrap());
            at += 4;
        } else {
            out.push(text[at]);
            at += 1;
        }
    }
    out
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Mounts the disk and compares what the kernel shows with the tree.
fn assert_kernel_agrees(sample: &Sample) {
    let dir = TempDir::new().unwrap();
    let disk = disk_of(sample, &dir);
    let reader = Reader::open(image_of(sample), &sample.device_sizes()).unwrap();
    let mount = Mount::new(&disk);
    let mut xattrs = kernel_xattrs(&mount);
    let mut nids = BTreeMap::from([(Vec::new(), reader.root())]);
    for (path, id) in paths(&sample.tree) {
        let node = sample.tree.node(id);
        let nid = nids[&path];
        let file = mount.path(&path);
        let stat = fs::symlink_metadata(&file).unwrap();
        let meta = Metadata {
            mode: stat.mode() as u16 & 0o7777,
            uid: stat.uid(),
            gid: stat.gid(),
            mtime: stat.mtime(),
            mtime_nsec: stat.mtime_nsec() as u32,
        };
        assert_eq!(meta, node.meta, "{file:?}");
        assert_eq!((stat.nlink(), stat.ino()), (node.nlink.into(), nid.0), "{file:?}");
        let wanted: BTreeMap<_, _> = node
            .xattrs
            .iter()
            .map(|(name, value)| (String::from_utf8(name.to_vec()).unwrap(), hex(value)))
            .collect();
        assert_eq!(xattrs.remove(&path).unwrap_or_default(), wanted, "{file:?}");
        let device = |major: u32, minor: u32| nix::sys::stat::makedev(major.into(), minor.into());
        match &node.kind {
            NodeKind::Directory(children) => {
                let listed: BTreeSet<_> = fs::read_dir(&file)
                    .unwrap()
                    .map(|entry| entry.unwrap().file_name().into_vec())
                    .collect();
                assert_eq!(
                    listed,
                    children.iter().map(|(name, _)| name.to_vec()).collect(),
                    "{file:?}"
                );
                for (name, _) in children {
                    let (child, _) = reader.lookup(nid, name).unwrap().unwrap();
                    nids.insert([&path[..], b"/", name].concat(), child);
                }
            }
            NodeKind::Regular { layer, data } => {
                assert!(stat.is_file() && stat.len() == data.size, "{file:?}");
                assert!(
                    fs::read(&file).unwrap() == sample.content(*layer, data),
                    "content of {file:?}"
                );
            }
            NodeKind::Symlink(target) => {
                assert_eq!(
                    fs::read_link(&file).unwrap().into_os_string().into_vec(),
                    target.to_vec()
                );
            }
            NodeKind::CharDevice(DeviceNumber { major, minor }) => {
                assert!(
                    stat.file_type().is_char_device() && stat.rdev() == device(*major, *minor),
                    "{file:?}"
                );
            }
            NodeKind::BlockDevice(DeviceNumber { major, minor }) => {
                assert!(
                    stat.file_type().is_block_device() && stat.rdev() == device(*major, *minor),
                    "{file:?}"
                );
            }
            NodeKind::Fifo => assert!(stat.file_type().is_fifo(), "{file:?}"),
        }
    }
    assert_eq!(xattrs, BTreeMap::new());
}

#[test]
fn kernel_reads_random_trees() {
    run(25, 60, assert_kernel_agrees);
}

#[test]
fn kernel_reads_the_corner_cases() {
    assert_kernel_agrees(&trees::corners());
}
