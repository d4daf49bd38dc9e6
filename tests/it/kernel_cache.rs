//! The kernel's caches: the kernel asks only once for anything in the immutable tree.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::process::Command;

use nix::libc;
use nix::sys::signal::Signal;

use crate::common::layers::{Blob, Tar, noise, push};
use crate::common::ocifs::{Mounted, Ocifs, bounded, eventually, send};
use crate::common::registry::TestRegistry;

const BIG: usize = 3 << 20;

/// Mounts an image with many files in one directory, a large file and a symbolic link.
fn mounted() -> (TestRegistry, Ocifs, Mounted) {
    let tar = (0..300).fold(Tar::new().dir("many/"), |tar, i| tar.file(format!("many/{i:03}"), ""));
    let tar = tar
        .file("big", noise(1, BIG))
        .link(tar::EntryType::Symlink, "link", "many/007");
    let registry = TestRegistry::start();
    push(&registry, "app", "1", &[Blob::gzip(&tar.finish())]);
    let ocifs = Ocifs::new();
    let mount = ocifs.mount_with(&format!("{}/app:1", registry.host()), &["--via", "fuse"]);
    (registry, ocifs, mount)
}

/// The process behind a mount, stopped until this value is dropped.
struct Stopped(u32);

impl Stopped {
    fn new(pid: u32) -> Self {
        send(pid, Signal::SIGSTOP);
        let stopped = Self(pid);
        eventually("all threads of the process stop", || {
            let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
            tasks.map(|task| task.unwrap().path().join("stat")).all(|stat| {
                let stat = std::fs::read_to_string(stat).unwrap_or_default();
                stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with('T'))
            })
        });
        stopped
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        send(self.0, Signal::SIGCONT);
    }
}

/// Reads all that the kernel can cache, with programs that must end. Returns their output.
fn ask(mount: &Mounted) -> Vec<Vec<u8>> {
    let script = r#"cd "$1"
case $2 in
read) cat big ;;
list) ls -a many ;;
link) readlink link ;;
stat) stat --format '%n %i %f %s %Y %h' . big link many many/007 many/299 ;;
absent) for i in 1 2; do test ! -e absent && test ! -L many/absent && echo absent; done ;;
esac"#;
    let answer = |what: &&str| {
        let said = bounded(
            Command::new("bash")
                .args(["-euc", script, "ask"])
                .arg(mount.path())
                .arg(what),
        );
        assert_eq!(said.code, Some(0), "{what}: {}", said.stderr);
        said.stdout
    };
    ["read", "list", "link", "stat", "absent"].iter().map(answer).collect()
}

#[test]
fn what_was_asked_once_is_answered_without_the_process() {
    let (_registry, _ocifs, mount) = mounted();
    let first = ask(&mount);
    assert!(first[0] == noise(1, BIG));
    let listed: BTreeSet<&str> = std::str::from_utf8(&first[1]).unwrap().lines().collect();
    assert_eq!(listed.len(), 302);
    assert_eq!(first[2], b"many/007\n");
    assert_eq!(first[3].split(|b| *b == b'\n').count(), 7);
    assert_eq!(first[4], b"absent\nabsent\n");
    {
        let _stopped = Stopped::new(mount.pid);
        for (i, (again, first)) in ask(&mount).iter().zip(&first).enumerate() {
            assert!(again == first, "answer {i}");
        }
    }
    assert_eq!(mount.status()["state"], "ready");
}

#[test]
fn a_large_read_is_one_request_or_two() {
    let (_registry, _ocifs, mount) = mounted();
    let reads = || {
        let layer = &mount.status()["layers"][0];
        layer["hits"].as_u64().unwrap() + layer["misses"].as_u64().unwrap()
    };
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(mount.join("big"))
        .unwrap();
    let mut buffer = vec![0_u8; (1 << 20) + 4096];
    let aligned = buffer.as_ptr().align_offset(4096);
    for (start, expected) in [(0, 0..1 << 20), (1 << 20, 1 << 20..2 << 20)] {
        let before = reads();
        let length = file.read_at(&mut buffer[aligned..][..1 << 20], start).unwrap();
        assert_eq!(length, 1 << 20);
        assert!(buffer[aligned..][..1 << 20] == noise(1, BIG)[expected]);
        let made = reads() - before;
        assert!((1..=2).contains(&made), "{made} requests for a read of 1 MiB");
    }
}
