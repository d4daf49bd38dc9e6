//! The whole life of a mount: what it needs, how it ends, and who may share it.

mod mountpoint;
mod store;

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::libc;
use nix::sys::signal::Signal;

use crate::common::layers::{Blob, Tar, noise, push};
use crate::common::ocifs::{Mounted, Ocifs, alive, eventually, mounted_type, mountpoint, send, tool, unmount, wait};
use crate::common::registry::{Fault, TestRegistry};

/// Returns a layer with files `f0`.. of 512 KiB each. `seed` determines their content.
fn big_layer(seed: u64, files: u64) -> Blob {
    let tar = (0..files).fold(Tar::new().file("small", b"small\n"), |tar, i| {
        tar.file(format!("f{i}"), noise(seed + i, 512 << 10))
    });
    Blob::gzip(&tar.finish())
}

fn hello() -> Blob {
    Blob::gzip(&Tar::new().file("hello", b"hello, world\n").finish())
}

/// Returns a registry with a small image, the image's reference, and its layer.
fn hello_image() -> (TestRegistry, String, Blob) {
    let registry = TestRegistry::start();
    let layer = hello();
    push(&registry, "app", "1", std::slice::from_ref(&layer));
    let image = format!("{}/app:1", registry.host());
    (registry, image, layer)
}

fn targets(registry: &TestRegistry) -> Vec<String> {
    registry.log().into_iter().map(|l| l.target).collect()
}

/// Starts `stat` on a file of a mount that does not answer yet. Returns once `stat` waits inside the kernel.
fn waiting_stat(mount: &Mounted) -> Child {
    // A shell that starts the tests in the background makes them ignore SIGINT, and `stat` would inherit that.
    let mut child = Command::new("env")
        .args(["--default-signal=INT", "stat", "--format", "%s"])
        .arg(mount.join("hello"))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let stat = mount.join("hello").into_os_string().into_encoded_bytes();
    eventually("stat waits for the mount", || {
        assert!(child.try_wait().unwrap().is_none(), "stat does not wait");
        let read = |name: &str| std::fs::read(format!("/proc/{}/{name}", child.id())).unwrap_or_default();
        let command = read("cmdline");
        let state = String::from_utf8_lossy(&read("stat")).into_owned();
        let sleeping = state.rsplit_once(") ").is_some_and(|(_, s)| s.starts_with(['S', 'D']));
        // Numbers of statx(2) and newfstatat(2) on x86-64 and arm64.
        let call = String::from_utf8_lossy(&read("syscall")).into_owned();
        let call = call.split(' ').next().unwrap_or_default();
        command.windows(stat.len()).any(|w| w == stat) && sleeping && ["332", "262", "291", "79"].contains(&call)
    });
    child
}

#[test]
fn is_up_after_manifest_and_config_and_waiting_processes_can_be_killed() {
    let (registry, image, layer) = hello_image();
    registry.hold(&layer.path());
    let ocifs = Ocifs::new();
    let mount = ocifs.mount_with(&image, &[]);
    assert_eq!(mounted_type(mount.path()).as_deref(), Some("fuse.ocifs"));
    let status = mount.status();
    assert_eq!(status["state"], "preparing");
    assert_eq!(status["layers"][0]["index_source"], "pending");
    for signal in [Signal::SIGKILL, Signal::SIGINT] {
        let mut child = waiting_stat(&mount);
        send(child.id(), signal);
        let status = wait(&mut child, "stat after a signal");
        assert_eq!(status.signal(), Some(signal as i32), "{}", mount.status());
    }
    let mut child = waiting_stat(&mount);
    registry.release();
    assert!(wait(&mut child, "stat after the registry answered").success());
    let mut said = String::new();
    child.stdout.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(said, "13\n");
    assert_eq!(mount.read("hello"), b"hello, world\n");
    assert_eq!(mount.status()["state"], "ready");
    let targets = targets(&registry);
    assert_eq!(targets.len(), 3, "{targets:?}");
    assert_eq!(targets[0], "/v2/app/manifests/1");
    assert!(
        targets[1].contains("/blobs/") && !targets[1].contains(&layer.path()),
        "{targets:?}"
    );
    assert!(targets[2].contains(&layer.path()), "{targets:?}");
}

#[test]
fn a_second_mount_fetches_only_the_spans_it_reads() {
    let registry = TestRegistry::start();
    let layer = big_layer(1, 16);
    push(&registry, "app", "1", std::slice::from_ref(&layer));
    let image = format!("{}/app:1", registry.host());
    let ocifs = Ocifs::new();
    drop(ocifs.mount(&image));
    ocifs.ok(["cache", "drop"]);
    registry.clear_log();

    let mount = ocifs.mount(&image);
    let log = targets(&registry);
    assert_eq!(log, ["/v2/app/manifests/1"], "the config is in the store");
    assert_eq!(mount.status()["layers"][0]["index_source"], "store");
    assert!(mount.read("f9") == noise(10, 512 << 10));
    let ranged: Vec<_> = registry.log().split_off(1);
    assert!(
        !ranged.is_empty()
            && ranged
                .iter()
                .all(|l| l.headers.contains_key("range") && l.status == 206)
    );
    let sent: usize = ranged.iter().map(|l| l.sent).sum();
    assert!(
        sent < layer.bytes.len() / 3,
        "{sent} of {} bytes for 1 of 16 files",
        layer.bytes.len()
    );
    assert_eq!(mount.status()["fetched"], sent);
    registry.clear_log();
    assert!(mount.read("f9") == noise(10, 512 << 10));
    assert_eq!(registry.log().len(), 0);
    for i in 0..16 {
        assert!(mount.read(&format!("f{i}")) == noise(1 + i, 512 << 10), "f{i}");
    }
}

#[test]
fn what_was_pulled_needs_no_registry() {
    let registry = TestRegistry::start();
    let layers = [hello(), big_layer(3, 3)];
    let digest = push(&registry, "app", "1", &layers);
    let host = registry.host();
    let ocifs = Ocifs::new();
    let said = ocifs.ok(["pull", "--json", &format!("{host}/app:1")]).json();
    assert_eq!(said["digest"], digest.to_string());
    assert_eq!(said["fetched"], said["size"]);
    drop(registry);
    let mount = ocifs.mount(&format!("{host}/app@{digest}"));
    assert_eq!(mount.read("hello"), b"hello, world\n");
    assert!(mount.read("f2") == noise(5, 512 << 10));
    assert_eq!(mount.status()["fetched"], 0);
}

#[test]
fn a_mount_waited_for_until_complete_needs_no_registry() {
    let registry = TestRegistry::start();
    let layer = big_layer(5, 3);
    push(&registry, "app", "1", std::slice::from_ref(&layer));
    let image = format!("{}/app:1", registry.host());
    let ocifs = Ocifs::new();
    drop(ocifs.mount(&image));
    ocifs.ok(["cache", "drop"]);
    let mount = ocifs.mount_with(&image, &["--wait", "complete"]);
    drop(registry);
    for i in 0..3 {
        assert!(mount.read(&format!("f{i}")) == noise(5 + i, 512 << 10));
    }
}

#[test]
fn signals_to_the_process_unmount() {
    let (_registry, image, _) = hello_image();
    let ocifs = Ocifs::new();
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mount = ocifs.mount(&image);
        assert!(mount.registration().exists());
        send(mount.pid, signal);
        mount.assert_gone();
    }
}

#[test]
fn a_killed_process_leaves_a_mount_that_is_dead_and_can_be_cleared() {
    let (_registry, image, _) = hello_image();
    let ocifs = Ocifs::new();
    for (via, fs_type) in [("fuse", "fuse.ocifs"), ("erofs", "erofs")] {
        kill_and_clear(&ocifs, &image, via, fs_type);
    }
}

fn kill_and_clear(ocifs: &Ocifs, image: &str, via: &str, fs_type: &str) {
    let mount = ocifs.mount_with(image, &["--via", via]);
    send(mount.pid, Signal::SIGKILL);
    eventually("the process is dead", || !alive(mount.pid));
    assert_eq!(mounted_type(mount.path()).as_deref(), Some(fs_type));
    let status = mount.status();
    assert_eq!(status["state"], "dead");
    assert!(status["problem"].as_str().unwrap().contains("ocifs umount"), "{status}");
    let list = ocifs.ok(["list", "--json"]).json();
    let row = list
        .as_array()
        .unwrap()
        .iter()
        .find(|m| m["mountpoint"] == mount.path().to_str().unwrap());
    assert_eq!(row.unwrap()["state"], "dead");
    assert!(ocifs.ok(["list"]).text().contains("dead"));
    assert_eq!(mount.umount(&[]).code, Some(0));
    assert_eq!(mounted_type(mount.path()), None);
    assert!(!mount.registration().exists());

    let path = mount.path().to_str().unwrap();
    ocifs.ok(["mount", "--wait", "ready", image, path]);
    assert_eq!(mount.read("hello"), b"hello, world\n");
    assert_eq!(mount.umount(&[]).code, Some(0));
}

#[test]
fn a_busy_mount_says_so_and_a_lazy_unmount_keeps_open_files_readable() {
    let registry = TestRegistry::start();
    push(&registry, "app", "1", &[big_layer(9, 2)]);
    let ocifs = Ocifs::new();
    let mount = ocifs.mount(&format!("{}/app:1", registry.host()));
    ocifs.ok(["cache", "drop"]);
    let file = File::open(mount.join("f1")).unwrap();
    let said = mount.umount(&[]);
    assert_eq!(said.code, Some(1));
    assert!(
        said.stderr.contains("busy") && said.stderr.contains("--lazy"),
        "{said:?}"
    );
    assert_eq!(mount.status()["state"], "ready");
    assert_eq!(mount.umount(&["--lazy"]).code, Some(0));
    assert_eq!(mounted_type(mount.path()), None);
    let mut bytes = vec![0; 512 << 10];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == noise(10, 512 << 10));
    drop(file);
    mount.assert_gone();
}

/// Other commands and programs look at a mount, and so use it for a moment.
#[test]
fn a_look_at_a_mount_does_not_make_it_busy() {
    let (_registry, image, _layer) = hello_image();
    let ocifs = Ocifs::new();
    for _ in 0..16 {
        let mount = ocifs.mount(&image);
        let look = || {
            let held = File::options().read(true).custom_flags(libc::O_PATH).open(mount.path());
            std::thread::sleep(Duration::from_millis(5));
            drop(held);
            std::thread::sleep(Duration::from_millis(5));
        };
        let said = std::thread::scope(|scope| {
            let unmounting = scope.spawn(|| mount.umount(&[]));
            while !unmounting.is_finished() {
                look();
            }
            unmounting.join().unwrap()
        });
        assert_eq!(said.code, Some(0), "{said:?}");
        mount.assert_gone();
    }
}

#[test]
fn umount_by_other_programs_ends_the_process() {
    let (registry, image, layer) = hello_image();
    let ocifs = Ocifs::new();
    let mount = ocifs.mount(&image);
    unmount(mount.path());
    mount.assert_gone();
    // Unmounting also ends a process whose mount does not answer yet.
    let other = Ocifs::new();
    registry.hold(&layer.path());
    let mount = other.mount_with(&image, &[]);
    // umount(8) accesses the file system first, except with `--lazy`.
    tool("umount", [Path::new("--lazy"), mount.path()]);
    mount.assert_gone();
}

#[test]
fn a_lazy_unmount_ends_what_waits_while_nothing_is_answered() {
    let (registry, image, layer) = hello_image();
    registry.hold(&layer.path());
    let ocifs = Ocifs::with(&["--timeout", "never"]);
    let mount = ocifs.mount_with(&image, &[]);
    let mut child = waiting_stat(&mount);
    assert_eq!(mount.umount(&["--lazy"]).code, Some(0));
    assert!(!wait(&mut child, "stat of what is gone").success());
    mount.assert_gone();
}

#[test]
fn interrupting_a_waiting_mount_leaves_nothing() {
    let (registry, image, layer) = hello_image();
    registry.hold(&layer.path());
    let ocifs = Ocifs::new();
    for (signal, wait_for) in [(Signal::SIGINT, "ready"), (Signal::SIGTERM, "complete")] {
        let directory = mountpoint();
        let path = directory.path();
        let mut parent = ocifs
            .command(["mount", "--wait", wait_for, &image, path.to_str().unwrap()])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let is_listed = || ocifs.ok(["list"]).text().contains(path.to_str().unwrap());
        eventually("it is registered", is_listed);
        let list = ocifs.ok(["list", "--json"]).json();
        let row = list
            .as_array()
            .unwrap()
            .iter()
            .find(|m| m["mountpoint"] == path.to_str().unwrap());
        let pid = row.unwrap()["pid"].as_u64().unwrap() as u32;
        send(parent.id(), signal);
        let status = wait(&mut parent, "mount after a signal");
        assert!(!status.success());
        eventually("the process ends", || !alive(pid));
        assert_eq!(mounted_type(path), None);
        assert!(!ocifs.ok(["list", "--json"]).text().contains(path.to_str().unwrap()));
    }
}

#[test]
fn a_mount_that_cannot_be_completed_fails() {
    let registry = TestRegistry::start();
    let layer = big_layer(70, 6);
    push(&registry, "app", "1", std::slice::from_ref(&layer));
    let image = format!("{}/app:1", registry.host());
    let ocifs = Ocifs::with(&["--timeout", "2s"]);
    drop(ocifs.mount(&image));
    ocifs.ok(["cache", "drop"]);
    registry.fault(&layer.path(), usize::MAX, Fault::status(404));
    let error = ocifs.mount_fails(&image, &["--wait", "complete"]);
    assert!(error.contains(&layer.digest().to_string()), "{error}");
    let error = ocifs.fails(["pull", &image]);
    assert!(error.contains(&layer.digest().to_string()), "{error}");
}
