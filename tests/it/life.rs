//! Mounts with an unusual life. Their processes are stopped, killed or cut off, their namespaces end, their
//! directories change, or their store or registry fails for a while.

mod directories;
mod log;
mod namespaces;
mod problems;
mod stopped;

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::common::layers::{Blob, Tar};
use crate::common::oci_layout;
use crate::common::ocifs::{Mounted, Ocifs, Said, bounded, program};

/// Time that a command may take if it asks a process that cannot answer.
const ANSWER: Duration = Duration::from_secs(2);

/// Returns the program, and an image with a file `hello`.
fn setup() -> (Ocifs, String) {
    let ocifs = Ocifs::new();
    let tar = Tar::new().file("hello", b"hello, world\n").dir("empty/");
    let image = oci_layout::write(&ocifs.home().join("image"), &[Blob::gzip(&tar.finish())]);
    (ocifs, image)
}

/// Runs a command that must end within [`ANSWER`].
fn quick(command: &mut Command) -> Said {
    let started = Instant::now();
    let said = bounded(command);
    let took = started.elapsed();
    assert!(took < ANSWER, "{took:?} for {command:?}: {said:?}");
    said
}

/// Runs `umount`, which must end within [`ANSWER`].
fn umount(mount: &Mounted, options: &[&str]) -> Said {
    quick(plain().arg("umount").args(options).arg(mount.path()))
}

/// Returns the program without a store, for commands that need none.
fn plain() -> Command {
    program(Path::new("/nonexistent"))
}

/// Returns the rows of `list --json` for a mount point.
fn rows(path: &Path) -> Vec<Value> {
    let said = quick(plain().args(["list", "--json"]));
    assert_eq!(said.code, Some(0), "{said:?}");
    let rows = said.json().as_array().unwrap().clone();
    rows.into_iter()
        .filter(|row| row["mountpoint"] == path.to_str().unwrap())
        .collect()
}

/// Returns the only row of `list --json` for a mount point.
fn row(path: &Path) -> Value {
    let rows = rows(path);
    assert_eq!(rows.len(), 1, "{rows:?}");
    rows[0].clone()
}

fn problem(row: &Value) -> &str {
    row["problem"].as_str().unwrap_or_default()
}
