//! Reads that wait for a registry that does not answer, and how they end.

use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, Stdio};

use nix::errno::Errno;
use nix::sys::signal::Signal;

use crate::common::layers::{Blob, Tar, noise, push};
use crate::common::ocifs::{Mounted, Ocifs, eventually, mounted_type, send, wait};
use crate::common::registry::TestRegistry;

const SIZE: usize = 256 << 10;

/// A mount of an indexed image without data, whose registry stops answering for the layer.
struct Scene {
    registry: TestRegistry,
    layer: Blob,
    _ocifs: Ocifs,
    mount: Mounted,
}

impl Scene {
    fn new(timeout: &str) -> Self {
        let registry = TestRegistry::start();
        let layer = Blob::gzip(&Tar::new().file("f", noise(6, SIZE)).finish());
        push(&registry, "app", "1", std::slice::from_ref(&layer));
        let image = format!("{}/app:1", registry.host());
        let ocifs = Ocifs::with(&["--timeout", timeout]);
        drop(ocifs.mount(&image));
        ocifs.ok(["cache", "drop"]);
        let mount = ocifs.mount(&image);
        registry.clear_log();
        registry.hold(&layer.path());
        Self {
            registry,
            layer,
            _ocifs: ocifs,
            mount,
        }
    }

    /// Starts a process whose read waits for the registry.
    fn reader(&self) -> Child {
        let before = self.registry.count(&self.layer.path());
        let reader = Command::new("env")
            .args(["--default-signal=INT", "cat"])
            .arg(self.mount.join("f"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        eventually("the layer is asked for", || {
            self.registry.count(&self.layer.path()) > before
        });
        reader
    }
}

#[test]
fn a_read_that_waits_too_long_fails_and_the_next_one_does_not() {
    let scene = Scene::new("2s");
    let reading = std::thread::spawn({
        let path = scene.mount.join("f");
        move || std::fs::read(path)
    });
    eventually("the read ends", || reading.is_finished());
    let error = reading
        .join()
        .unwrap()
        .expect_err("nobody answers")
        .raw_os_error()
        .unwrap();
    assert!([Errno::ETIMEDOUT as i32, Errno::EIO as i32].contains(&error), "{error}");
    assert_ne!(scene.registry.count(&scene.layer.path()), 0);
    scene.registry.release();
    eventually("it can be read again", || std::fs::read(scene.mount.join("f")).is_ok());
    assert!(scene.mount.read("f") == noise(6, SIZE));
}

#[test]
fn a_waiting_read_can_be_killed() {
    for signal in [Signal::SIGINT, Signal::SIGKILL] {
        let scene = Scene::new("never");
        let mut reader = scene.reader();
        send(reader.id(), signal);
        let status = wait(&mut reader, "a reader after a signal");
        assert_eq!(status.signal(), Some(signal as i32));
        scene.registry.release();
        eventually("it can be read", || std::fs::read(scene.mount.join("f")).is_ok());
        assert!(scene.mount.read("f") == noise(6, SIZE));
    }
}

#[test]
fn a_lazy_unmount_with_a_waiting_read_is_gone_when_its_reader_is() {
    let scene = Scene::new("never");
    let mut reader = scene.reader();
    let said = scene.mount.umount(&["--lazy"]);
    assert_eq!(said.code, Some(0), "{said:?}");
    assert_eq!(mounted_type(scene.mount.path()), None);
    assert!(reader.try_wait().unwrap().is_none(), "the reader still waits");
    send(reader.id(), Signal::SIGINT);
    let status = wait(&mut reader, "the reader after a signal");
    assert_eq!(status.signal(), Some(Signal::SIGINT as i32));
    // The mount ends although the registry has not answered.
    scene.mount.assert_gone();
}

#[test]
fn a_signal_to_the_process_ends_a_read_that_would_wait_for_ever() {
    let scene = Scene::new("never");
    let mut reader = scene.reader();
    send(scene.mount.pid, Signal::SIGTERM);
    assert!(!wait(&mut reader, "the reader").success());
    scene.mount.assert_gone();
}
