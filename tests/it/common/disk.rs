//! A disk that `ocifs disk` serves.

use std::path::{Path, PathBuf};

use serde_json::Value;
use tempfile::TempDir;

use crate::common::ocifs::{Ocifs, Said, alive, eventually, mountpoint};

/// A disk with all doors. Dropping it takes it down.
pub struct ServedDisk<'a> {
    ocifs: &'a Ocifs,
    directory: TempDir,
    pub pid: u32,
}

impl<'a> ServedDisk<'a> {
    pub fn serve(ocifs: &'a Ocifs, image: &str, options: &[&str]) -> Self {
        Self::serve_in(ocifs, mountpoint(), image, options)
    }

    /// Serves a disk whose doors are in a directory.
    pub fn serve_in(ocifs: &'a Ocifs, directory: TempDir, image: &str, options: &[&str]) -> Self {
        let mut disk = Self {
            ocifs,
            directory,
            pid: 0,
        };
        std::fs::create_dir_all(disk.file_directory()).unwrap();
        disk.pid = disk.start(image, options)["pid"].as_u64().unwrap() as u32;
        disk
    }

    /// Starts the process of the disk, which is not running at this time. Returns the JSON that it prints.
    fn start(&self, image: &str, options: &[&str]) -> Value {
        let (file, nbd, vhost) = (self.file_directory(), self.nbd(), self.vhost());
        let doors = [
            "--file",
            text(&file),
            "--nbd",
            text(&nbd),
            "--vhost-user-blk",
            text(&vhost),
        ];
        self.ocifs
            .ok([&["disk", "--json"], &doors[..], options, &[image]].concat())
            .json()
    }

    /// Starts the process again after it was killed.
    pub fn restart(&mut self, image: &str, options: &[&str]) {
        assert!(!alive(self.pid));
        self.pid = self.start(image, options)["pid"].as_u64().unwrap() as u32;
    }

    fn file_directory(&self) -> PathBuf {
        self.directory.path().join("file")
    }

    pub fn file(&self) -> PathBuf {
        self.file_directory().join("rootfs.erofs")
    }

    pub fn config(&self) -> PathBuf {
        self.file_directory().join("config.json")
    }

    pub fn nbd(&self) -> PathBuf {
        self.directory.path().join("nbd")
    }

    pub fn nbd_uri(&self) -> String {
        format!("nbd+unix:///?socket={}", text(&self.nbd()))
    }

    pub fn vhost(&self) -> PathBuf {
        self.directory.path().join("vhost")
    }

    /// All places at which other commands find the disk.
    pub fn places(&self) -> [PathBuf; 3] {
        [self.file_directory(), self.nbd(), self.vhost()]
    }

    pub fn status(&self) -> Value {
        self.ocifs.ok(["status", "--json", text(&self.nbd())]).json()
    }

    pub fn umount(&self, place: &Path, options: &[&str]) -> Said {
        self.ocifs.run([&["umount"], options, &[text(place)]].concat())
    }

    /// Waits until nothing of the disk is left.
    pub fn assert_gone(&self) {
        eventually("the process ends", || !alive(self.pid));
        assert!(!self.nbd().exists() && !self.vhost().exists(), "a socket stays");
        assert!(!self.file().exists(), "the file stays");
    }
}

impl Drop for ServedDisk<'_> {
    fn drop(&mut self) {
        if alive(self.pid) {
            let said = self.umount(&self.nbd(), &["--lazy"]);
            if !std::thread::panicking() {
                assert_eq!(said.code, Some(0), "{said:?}");
                self.assert_gone();
            }
        }
    }
}

/// A path as text.
pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
