//! Ctrl-C ends every command, at every point where it waits.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Stdio};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::common::layers::{Blob, Tar, config, noise, push};
use crate::common::ocifs::{Ocifs, eventually, mounted_type, mountpoint, registration, send, tool, wait};
use crate::common::registry::{Fault, TestRegistry};
use ocifs::oci::Digest;

const SIZE: usize = 4 << 20;

struct Scene {
    registry: TestRegistry,
    image: String,
    layer: Blob,
    config: String,
}

impl Scene {
    fn new() -> Self {
        let registry = TestRegistry::start();
        let layer = Blob::gzip(&Tar::new().file("f", noise(5, SIZE)).finish());
        let layers = std::slice::from_ref(&layer);
        push(&registry, "app", "1", layers);
        let config = Digest::of(config(layers).to_string().as_bytes());
        Self {
            image: format!("{}/app:1", registry.host()),
            config: format!("/blobs/{config}"),
            registry,
            layer,
        }
    }

    /// Returns parts of the targets of the requests at which the test interrupts a command.
    fn requests(&self) -> [String; 3] {
        ["/manifests/".to_owned(), self.config.clone(), self.layer.path()]
    }
}

/// Returns the program without a timeout, so that only a signal ends its waiting.
fn patient() -> Ocifs {
    Ocifs::with(&["--timeout", "never"])
}

/// Starts a command in a process group of its own, as a shell does.
fn start(ocifs: &Ocifs, arguments: &[&str]) -> Child {
    ocifs
        .interruptible(arguments)
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// A directory to mount on. Dropping it takes down whatever is mounted there.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(mountpoint())
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if mounted_type(self.path()).is_some() {
            tool("umount", [Path::new("--lazy"), self.path()]);
        }
    }
}

/// Returns the bytes on disk of everything below a directory.
fn usage(directory: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(directory) else { return 0 };
    let sizes = entries.flatten().map(|entry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => usage(&entry.path()),
        Ok(metadata) => metadata.blocks() * 512,
        Err(_) => 0,
    });
    sizes.sum()
}

/// Returns the three commands that wait for a registry. They mount on `path`.
fn commands<'a>(image: &'a str, path: &'a str) -> [Vec<&'a str>; 3] {
    [
        vec!["mount", "--wait", "ready", image, path],
        vec!["mount", "--foreground", image, path],
        vec!["pull", image],
    ]
}

/// Runs a command to its end and checks the content of the image. A mount is taken down once it is ready.
fn succeeds(ocifs: &Ocifs, arguments: &[&str], image: &str, path: &Path) {
    let mount = arguments[0] == "mount";
    let mut child = start(ocifs, arguments);
    if mount {
        eventually("the mount is ready", || {
            let said = ocifs.run(["status", "--json", path.to_str().unwrap()]);
            said.code == Some(0) && said.json()["state"] == "ready"
        });
        assert!(fs::read(path.join("f")).unwrap() == noise(5, SIZE), "{arguments:?}");
        ocifs.ok(["umount", path.to_str().unwrap()]);
    }
    assert!(
        wait(&mut child, "a command that is not interrupted").success(),
        "{arguments:?}"
    );
    assert!(ocifs.ok(["cat", image, "f"]).stdout == noise(5, SIZE), "{arguments:?}");
}

/// Interrupts all processes of a command, as a terminal does. Asserts that no mount and no registration is left.
fn interrupt(mut child: Child, path: &Path, what: &str) {
    killpg(Pid::from_raw(child.id().cast_signed()), Signal::SIGINT).unwrap();
    let status = wait(&mut child, &format!("{what} after SIGINT"));
    // A signal ends a finished mount in the foreground with success, so any status is accepted there. A command that
    // still waits ends with 130.
    let expected = if what.contains("--foreground") {
        status.code()
    } else {
        Some(130)
    };
    assert_eq!(status.code(), expected, "{what}: {status}");
    assert_eq!(mounted_type(path), None, "{what}");
    assert!(!registration(path).exists(), "{what}");
}

#[test]
fn ctrl_c_leaves_nothing_whatever_is_waited_for() {
    let scene = Scene::new();
    for request in scene.requests() {
        let directory = Place::new();
        let path = directory.path();
        for arguments in commands(&scene.image, path.to_str().unwrap()) {
            let ocifs = patient();
            let what = format!("{arguments:?} at {request}");
            scene.registry.clear_log();
            scene.registry.hold(&request);
            let child = start(&ocifs, &arguments);
            eventually(&what, || scene.registry.count(&request) > 0);
            interrupt(child, path, &what);
            scene.registry.release();
            succeeds(&ocifs, &arguments, &scene.image, path);
        }
    }
}

#[test]
fn ctrl_c_in_the_middle_of_a_layer_leaves_nothing_that_is_believed() {
    let scene = Scene::new();
    let directory = Place::new();
    let path = directory.path();
    for arguments in commands(&scene.image, path.to_str().unwrap()) {
        let ocifs = patient();
        let half = scene.layer.bytes.len() / 2;
        scene.registry.fault(&scene.layer.path(), 1, Fault::Stall(half));
        let child = start(&ocifs, &arguments);
        eventually("a part of the layer is on the disk", || {
            usage(ocifs.store()) > SIZE as u64 / 4
        });
        interrupt(child, path, &format!("{arguments:?} in the layer"));
        succeeds(&ocifs, &arguments, &scene.image, path);
    }
}

#[test]
fn ctrl_c_ends_a_command_whose_output_nobody_takes() {
    let scene = Scene::new();
    let ocifs = Ocifs::new();
    let arguments: [&[&str]; 2] = [&["cat", &scene.image, "f"], &["export", &scene.image]];
    for arguments in arguments {
        let mut child = ocifs
            .interruptible(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let waits = || {
            let state = fs::read_to_string(format!("/proc/{}/wchan", child.id())).unwrap_or_default();
            state.contains("pipe")
        };
        eventually("it waits for somebody to read", waits);
        send(child.id(), Signal::SIGINT);
        let status = wait(&mut child, "a command that writes to nobody");
        assert_eq!(status.code(), Some(130), "{arguments:?}");
    }
}

#[test]
fn a_mount_in_the_foreground_serves_until_it_is_interrupted() {
    let scene = Scene::new();
    let ocifs = Ocifs::new();
    let directory = Place::new();
    let path = directory.path();
    let mut child = start(&ocifs, &["mount", "--foreground", &scene.image, path.to_str().unwrap()]);
    eventually("it is mounted", || mounted_type(path).as_deref() == Some("fuse.ocifs"));
    assert!(fs::read(path.join("f")).unwrap() == noise(5, SIZE));
    assert!(child.try_wait().unwrap().is_none(), "it stays");
    let status = ocifs.ok(["status", "--json", path.to_str().unwrap()]).json();
    assert_eq!(status["pid"], child.id());
    send(child.id(), Signal::SIGINT);
    assert!(wait(&mut child, "a mount in the foreground").success());
    assert_eq!(mounted_type(path), None);
    assert!(!registration(path).exists());
}
