//! Reads that wait for a registry that does not answer, and how they end.

use std::io::BufRead as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::RwLockWriteGuard;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::Signal;

use crate::common::layers::{Blob, Tar, noise, push};
use crate::common::namespace::no_copies;
use crate::common::ocifs::{
    Mounted, Ocifs, Running, Tmpfs, alive, eventually, mounted_type, send, tool, unmount, until_not_copied, wait,
};
use crate::common::registry::TestRegistry;

const SIZE: usize = 256 << 10;

/// A mount of an indexed image without data, whose registry stops answering for the layer.
struct Scene {
    registry: TestRegistry,
    layer: Blob,
    _ocifs: Ocifs,
    mount: Mounted,
    /// A directory that can be the upper layer of an overlay.
    scratch: Tmpfs,
    /// The process for which the kernel reads ahead.
    ahead: Option<Running>,
    _no_copies: RwLockWriteGuard<'static, ()>,
}

impl Scene {
    fn new(timeout: &str) -> Self {
        Self::with(&["--via", "fuse"], timeout)
    }

    fn with(options: &[&str], timeout: &str) -> Self {
        let no_copies = no_copies();
        let registry = TestRegistry::start();
        let layer = Blob::gzip(&Tar::new().file("f", noise(6, SIZE)).finish());
        push(&registry, "app", "1", std::slice::from_ref(&layer));
        let image = format!("{}/app:1", registry.host());
        let ocifs = Ocifs::with(&["--timeout", timeout]);
        drop(ocifs.mount(&image));
        ocifs.ok(["cache", "drop"]);
        let mount = ocifs.mount_with(&image, options);
        registry.clear_log();
        registry.hold(&layer.path());
        Self {
            registry,
            layer,
            _ocifs: ocifs,
            mount,
            scratch: Tmpfs::new("4m"),
            ahead: None,
            _no_copies: no_copies,
        }
    }

    /// A scene in which the kernel reads ahead and waits for the registry. No program waits for the bytes.
    fn reading_ahead(options: &[&str], timeout: &str) -> Self {
        const ADVISE: &str = "import os, sys
file = os.open(sys.argv[1], os.O_RDONLY)
os.posix_fadvise(file, 0, 0, os.POSIX_FADV_WILLNEED)
os.close(file)
print('closed', flush=True)
sys.stdin.read()";
        let mut scene = Self::with(options, timeout);
        // This process does not do it itself: children that other tests start have all of its open files until they run
        // their program. The child stays, because reads for a thread that is gone end at once.
        let mut child = Command::new("python3");
        child.args(["-c", ADVISE]).arg(scene.mount.join("f"));
        let mut child = child.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut said = String::new();
        let output = child.stdout.as_mut().unwrap();
        std::io::BufReader::new(output).read_line(&mut said).unwrap();
        assert_eq!(said, "closed\n");
        scene.ahead = Some(Running(child));
        scene.awaits_read();
        eventually("the layer is asked for", || {
            scene.registry.count(&scene.layer.path()) > 0
        });
        scene
    }

    fn awaits_read(&self) {
        eventually("the read waits", || self.mount.status()["reads"]["waiting"] != 0);
    }

    /// Unmounts with success.
    fn umount(&self, options: &[&str]) {
        let said = self.mount.umount(options);
        assert_eq!(said.code, Some(0), "{said:?}");
    }

    /// Lets more time pass than the process takes to find out that only unwanted reads are left.
    fn outlasts_looks(&self) {
        std::thread::sleep(Duration::from_secs(2));
    }

    /// Checks that nothing of the mount is left, although the registry has not answered.
    fn assert_gone(&self) {
        self.mount.assert_gone();
        // A process that has ended may be a zombie. A thread that is still in the kernel would be listed beside it.
        let threads = || std::fs::read_dir(format!("/proc/{}/task", self.mount.pid)).map_or(0, Iterator::count);
        eventually("no thread of the process is left", || threads() <= 1);
        assert_ne!(self.registry.count(&self.layer.path()), 0);
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

/// Options that lead to different mounts.
const WAYS: [&[&str]; 4] = [
    &["--via", "fuse"],
    &["--via", "erofs"],
    &["--via", "fuse", "--writable"],
    &["--via", "erofs", "--writable"],
];

/// The kernel's EROFS cannot be unmounted before all its reads have ended.
#[test]
fn readahead_that_nobody_waits_for_holds_up_no_unmount() {
    for options in WAYS {
        for lazy in [&[][..], &["--lazy"]] {
            let scene = Scene::reading_ahead(options, "never");
            scene.umount(lazy);
            scene.assert_gone();
        }
    }
}

#[test]
fn readahead_that_nobody_waits_for_holds_up_no_end_of_the_process() {
    for options in WAYS {
        for signal in [Signal::SIGTERM, Signal::SIGKILL] {
            let scene = Scene::reading_ahead(options, "never");
            send(scene.mount.pid, signal);
            eventually("the process ends", || !alive(scene.mount.pid));
            let said = scene.mount.umount(&[]);
            assert_eq!(said.code == Some(0), signal == Signal::SIGKILL, "{options:?}: {said:?}");
            scene.assert_gone();
        }
    }
}

#[test]
fn readahead_that_nobody_waits_for_holds_up_no_unmount_of_a_stopped_process() {
    for options in WAYS {
        let scene = Scene::reading_ahead(options, "never");
        send(scene.mount.pid, Signal::SIGSTOP);
        let said = until_not_copied(|| scene.mount.umount(&[]));
        assert_eq!(said.code, Some(0), "{said:?}");
        scene.assert_gone();
    }
}

/// Over EROFS, another program's unmount waits for the reads, which end in time.
#[test]
fn readahead_that_nobody_waits_for_ends_in_time_when_another_program_unmounts() {
    for options in WAYS {
        let scene = Scene::reading_ahead(options, "2s");
        let mut umount = Command::new("umount").arg(scene.mount.path()).spawn().unwrap();
        assert!(wait(&mut umount, "umount").success(), "{options:?}");
        scene.assert_gone();
    }
}

/// Users keep a mount alive however long they wait, also if it is unmounted everywhere.
#[test]
fn a_reader_gets_its_bytes_after_a_lazy_unmount() {
    for options in WAYS {
        let scene = Scene::with(options, "never");
        let mut reader = scene.reader();
        scene.umount(&["--lazy"]);
        scene.outlasts_looks();
        assert!(
            reader.try_wait().unwrap().is_none(),
            "{options:?}: the reader still waits"
        );
        scene.registry.release();
        assert!(wait(&mut reader, "the reader").success(), "{options:?}");
        scene.mount.assert_gone();
    }
}

/// An overlay of another program is a user that nobody can see.
#[test]
fn an_overlay_on_a_mount_keeps_it_alive() {
    for via in ["fuse", "erofs"] {
        let scene = Scene::with(&["--via", via], "never");
        let [upper, work, merged] = ["upper", "work", "merged"].map(|name| {
            let path = scene.scratch.path().join(name);
            std::fs::create_dir(&path).unwrap();
            path
        });
        let lower = scene.mount.path().display();
        let overlay = format!(
            "lowerdir={lower},upperdir={},workdir={}",
            upper.display(),
            work.display()
        );
        tool(
            "mount",
            ["-t", "overlay", "-o", &overlay, "overlay", merged.to_str().unwrap()],
        );
        let reading = std::thread::spawn({
            let path = merged.join("f");
            move || std::fs::read(path)
        });
        scene.awaits_read();
        scene.umount(&[]);
        scene.outlasts_looks();
        assert!(alive(scene.mount.pid) && !reading.is_finished(), "{via}");
        scene.registry.release();
        assert!(reading.join().unwrap().unwrap() == noise(6, SIZE), "{via}");
        unmount(&merged);
        scene.mount.assert_gone();
    }
}
