//! A signal ends a reader that waits for a registry, however it reads, and even without a timeout.

use std::os::unix::process::ExitStatusExt as _;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::common::layers::{Blob, Tar, header, noise, push};
use crate::common::ocifs::{Mounted, Ocifs, eventually, send};
use crate::common::reader::{Reader, WAYS};
use crate::common::registry::TestRegistry;

const FILE: usize = 256 << 10;
/// Time that a reader may take to end after its signal.
const SOON: Duration = Duration::from_secs(2);

struct Scene {
    registry: TestRegistry,
    _ocifs: Ocifs,
    mount: Mounted,
}

impl Scene {
    /// Mounts an image without a timeout, from a registry that stops answering. The image has files `f0`...
    fn new() -> Self {
        Self::via("fuse")
    }

    fn via(via: &str) -> Self {
        let registry = TestRegistry::start();
        let tar = (0..40).fold(Tar::new(), |tar, i| {
            let name = format!("f{i}");
            let header = header(name.as_bytes(), tar::EntryType::Regular, 0o755, FILE as u64);
            tar.raw(header, &noise(i + 1, FILE))
        });
        let layer = Blob::gzip(&tar.finish());
        push(&registry, "app", "1", std::slice::from_ref(&layer));
        let image = format!("{}/app:1", registry.host());
        let ocifs = Ocifs::with(&["--timeout", "never"]).learns(&image);
        let mount = ocifs.mount_with(&image, &["--wait", "ready", "--prefetch", "none", "--via", via]);
        registry.hold(&layer.path());
        Self {
            registry,
            _ocifs: ocifs,
            mount,
        }
    }

    fn waiting(&self) -> u64 {
        self.mount.status()["reads"]["waiting"].as_u64().unwrap()
    }

    /// Starts a reader of a file that no other process reads. Returns once the reader waits.
    fn reader(&self, start: impl FnOnce(&std::path::Path) -> Reader, file: usize) -> Reader {
        eventually("nothing else waits", || self.waiting() == 0);
        let reader = start(&self.mount.join(format!("f{file}")));
        eventually("it waits", || self.waiting() > 0);
        reader
    }
}

#[test]
fn every_way_to_read_ends_with_a_fatal_signal() {
    for via in ["fuse", "erofs"] {
        end_every_way_to_read(via);
    }
}

fn end_every_way_to_read(via: &str) {
    let scene = Scene::via(via);
    let mut file = 0;
    // The kernel's EROFS has no direct I/O on a file system that lies in a file.
    for way in WAYS.into_iter().filter(|way| (*way, via) != ("direct", "erofs")) {
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGKILL] {
            let reader = scene.reader(|path| Reader::start(way, path), file);
            file += 1;
            send(reader.pid(), signal);
            let start = Instant::now();
            let ended = reader.end();
            assert!(start.elapsed() < SOON, "{way} {signal}: {:?}", start.elapsed());
            assert_eq!(ended.status.signal(), Some(signal as i32), "{way}: {ended:?}");
        }
    }
    eventually("nothing waits", || scene.waiting() == 0);
    scene.registry.release();
    eventually("it can be read", || std::fs::read(scene.mount.join("f0")).is_ok());
    assert!(scene.mount.read("f0") == noise(1, FILE));
}

#[test]
fn a_program_that_handles_signals_gets_them_while_it_reads() {
    let scene = Scene::new();
    let reader = scene.reader(|path| Reader::start("handler", path), 0);
    send(reader.pid(), Signal::SIGINT);
    let start = Instant::now();
    let ended = reader.end();
    assert!(start.elapsed() < SOON, "{:?}", start.elapsed());
    // Python reports "KeyboardInterrupt" and ends by the same signal.
    assert!(!ended.read && !ended.status.success(), "{ended:?}");
    let reader = scene.reader(|path| Reader::start("alarm", path), 1);
    let ended = reader.end();
    assert_eq!(ended.status.code(), Some(1), "{ended:?}");
    assert!(ended.took.unwrap() < Duration::from_secs(1) + SOON, "{ended:?}");
}

#[test]
fn a_program_that_handles_signals_gets_its_bytes_from_erofs() {
    let scene = Scene::via("erofs");
    let reader = scene.reader(|path| Reader::start("alarm", path), 0);
    // The alarm comes after a second. The process checks for signals several times within this pause.
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(scene.waiting(), 1);
    scene.registry.release();
    let ended = reader.end();
    assert!(ended.took.is_some(), "{ended:?}");
    assert!(scene.mount.read("f0") == noise(1, FILE));
}

#[test]
fn signals_that_end_nothing_let_a_reader_wait() {
    let scene = Scene::new();
    let reader = scene.reader(|path| Reader::start("pread", path), 0);
    for signal in [Signal::SIGWINCH, Signal::SIGURG, Signal::SIGSTOP, Signal::SIGCONT] {
        send(reader.pid(), signal);
    }
    // The process checks for signals several times within this pause.
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(scene.waiting(), 1);
    scene.registry.release();
    let ended = reader.end();
    assert!(ended.read && ended.status.success(), "{ended:?}");
}

#[test]
fn a_reader_in_another_pid_namespace_ends_too() {
    let scene = Scene::new();
    let start = |path: &std::path::Path| {
        let mut command = Command::new("unshare");
        // The first process of a PID namespace ignores signals without a handler, so the reader is its child.
        command.args(["--pid", "--fork", "sh", "-c", "python3 \"$@\"; exit $?", "sh"]);
        Reader::start_by(command, "random", path)
    };
    for (file, signal) in [(0, Signal::SIGTERM), (1, Signal::SIGINT), (2, Signal::SIGKILL)] {
        let reader = scene.reader(start, file);
        let child = |parent: u32| -> u32 {
            let children = std::fs::read_to_string(format!("/proc/{parent}/task/{parent}/children"));
            children.unwrap().trim().parse().unwrap()
        };
        send(child(child(reader.pid())), signal);
        let start = Instant::now();
        let ended = reader.end();
        assert!(start.elapsed() < SOON && !ended.read, "{signal}: {:?}", start.elapsed());
    }
    eventually("nothing waits", || scene.waiting() == 0);
}

#[test]
fn others_that_wait_for_the_same_page_wait_on() {
    let scene = Scene::new();
    let killed = scene.reader(|path| Reader::start("pread", path), 0);
    let other = Reader::start("pread", &scene.mount.join("f0"));
    eventually("it waits too", || {
        std::fs::read_to_string(format!("/proc/{}/stat", other.pid()))
            .is_ok_and(|stat| stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('D')))
    });
    send(killed.pid(), Signal::SIGKILL);
    killed.end();
    std::thread::sleep(Duration::from_millis(300));
    scene.registry.release();
    let ended = other.end();
    assert!(ended.read, "{ended:?}");
}
