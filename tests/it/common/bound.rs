//! Directories that are read-only for a while.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::process::Command;

use super::ocifs::{bounded, tool};

/// Something mounted on a directory. Dropping it unmounts it.
pub struct Bound(pub PathBuf);

impl Drop for Bound {
    fn drop(&mut self) {
        bounded(Command::new("umount").arg("--lazy").arg(&self.0));
    }
}

/// Makes the directory at `path` read-only.
pub fn read_only(path: &Path) -> Bound {
    let path_text = path.to_str().unwrap();
    tool("mount", ["--bind", path_text, path_text]);
    let bound = Bound(path.to_owned());
    tool("mount", ["-o", "remount,bind,ro", path_text]);
    bound
}
