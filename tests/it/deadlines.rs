//! A read gets its answer within the timeout and a second. The time counts from the first byte that the program asks
//! for, however often the kernel repeats the request. That holds before and after the image is ready.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::common::layers::{Blob, Tar, header, noise, push};
use crate::common::ocifs::{Mounted, Ocifs, eventually, wait};
use crate::common::reader::{Reader, WAYS};
use crate::common::registry::{Fault, TestRegistry};

const TIMEOUT: Duration = Duration::from_secs(3);
/// The second that a read may take beyond the timeout, plus the time that a busy machine needs to end a process.
const SLACK: Duration = Duration::from_millis(1_500);
const FILE: usize = 512 << 10;

/// Mounts an image with a file for each way to read. The store knows the image and has none of its data.
fn scene() -> (TestRegistry, Blob, Ocifs, Mounted) {
    let registry = TestRegistry::start();
    let tar = WAYS.iter().zip(1..).fold(Tar::new(), |tar, (way, seed)| {
        let content = noise(seed, FILE);
        tar.raw(
            header(way.as_bytes(), tar::EntryType::Regular, 0o755, FILE as u64),
            &content,
        )
    });
    let layer = Blob::gzip(&tar.finish());
    push(&registry, "app", "1", std::slice::from_ref(&layer));
    let image = format!("{}/app:1", registry.host());
    let ocifs = Ocifs::with(&["--timeout", "3s"]).learns(&image);
    let mount = ocifs.mount_with(&image, &["--wait", "ready", "--prefetch", "none"]);
    (registry, layer, ocifs, mount)
}

/// Asserts that all readers end at the timeout and get no bytes.
fn end_in_time(readers: Vec<Reader>) {
    for (i, reader) in readers.into_iter().enumerate() {
        let ended = reader.end();
        let took = ended.took.unwrap_or_else(|| panic!("reader {i} did not begin"));
        assert!(!ended.read, "reader {i}: {ended:?}");
        assert!(
            took >= TIMEOUT - SLACK && took <= TIMEOUT + SLACK,
            "reader {i}: {ended:?}"
        );
    }
}

#[test]
fn every_way_to_read_ends_with_the_timeout_and_the_next_access_gets_the_bytes() {
    let (registry, layer, _ocifs, mount) = scene();
    registry.hold(&layer.path());
    end_in_time(WAYS.iter().map(|&way| Reader::start(way, &mount.join(way))).collect());
    registry.release();
    for (way, seed) in WAYS.iter().zip(1..) {
        let path = mount.join(way);
        eventually("it can be read", || std::fs::read(&path).is_ok());
        assert!(mount.read(way) == noise(seed, FILE));
    }
}

#[test]
fn many_readers_of_one_file_end_together() {
    let (registry, layer, _ocifs, mount) = scene();
    registry.hold(&layer.path());
    let ways = ["pread", "mmap", "whole", "pread", "mmap", "splice", "random"];
    end_in_time(
        ways.iter()
            .map(|&way| Reader::start(way, &mount.join("pread")))
            .collect(),
    );
}

#[test]
fn more_readers_than_fuse_takes_at_once_by_itself_end_with_the_timeout() {
    let (registry, layer, _ocifs, mount) = scene();
    registry.hold(&layer.path());
    // Each reader reads at an offset of its own.
    let paths: Vec<PathBuf> = WAYS.iter().map(|way| mount.join(way)).collect();
    let start = Instant::now();
    std::thread::scope(|scope| {
        for i in 0..160_u64 {
            let path = &paths[i as usize % paths.len()];
            scope.spawn(move || {
                use std::os::unix::fs::FileExt as _;
                let file = std::fs::File::open(path).unwrap();
                file.read_at(&mut [0; 10], i / 8 * 25_000).unwrap_err();
            });
        }
    });
    assert!(start.elapsed() <= TIMEOUT + SLACK, "{:?}", start.elapsed());
}

/// Mounts an image of one layer that no store knows, from a registry with these faults.
fn first_contact(faults: &[Fault], options: &[&str]) -> (TestRegistry, Blob, Ocifs, Mounted) {
    let (registry, layer, image) = unknown_image(faults);
    let ocifs = Ocifs::with(&["--timeout", "3s"]);
    let mount = ocifs.mount_with(&image, options);
    (registry, layer, ocifs, mount)
}

fn unknown_image(faults: &[Fault]) -> (TestRegistry, Blob, String) {
    let registry = TestRegistry::start();
    let layer = Blob::gzip(&Tar::new().file("f", noise(1, 1 << 20)).finish());
    push(&registry, "app", "1", std::slice::from_ref(&layer));
    for fault in faults {
        registry.fault(&layer.path(), usize::MAX, fault.clone());
    }
    let image = format!("{}/app:1", registry.host());
    (registry, layer, image)
}

/// Returns a fault that sends 2 kB a second.
fn trickle() -> Fault {
    Fault::Slow(200, Duration::from_millis(100))
}

#[test]
fn a_first_pass_that_trickles_fails_reads_until_it_comes_on() {
    let (registry, layer, _ocifs, mount) = first_contact(&[trickle()], &[]);
    let start = Instant::now();
    // The open waits, because there is no tree to look the name up in.
    assert_eq!(mount.read_error("f"), nix::libc::ETIMEDOUT);
    assert!(start.elapsed() <= TIMEOUT + SLACK, "{:?}", start.elapsed());
    let status = mount.status();
    assert_eq!(status["state"], "stalled", "{status}");
    assert!(status["stalled_seconds"].as_f64() >= Some(2.0), "{status}");
    let said = _ocifs.ok(["status", mount.path().to_str().unwrap()]);
    assert!(said.text().contains("stalled, reads fail"), "{said:?}");
    // While the mount is stalled, reads fail at once.
    let start = Instant::now();
    std::fs::read_dir(mount.path()).unwrap_err();
    assert!(start.elapsed() < TIMEOUT / 2, "{:?}", start.elapsed());
    // The registry recovers, but the slow connection does not. The mount does not wait for it.
    registry.clear_faults();
    mount.reaches("ready");
    assert!(mount.read("f") == noise(1, 1 << 20));
    assert!(registry.count(&layer.path()) > 1);
}

#[test]
fn a_first_pass_that_gets_on_is_waited_for_however_often_it_stalls() {
    // Each connection sends 200 kB and hangs. Resuming each in time makes a useful rate.
    let (registry, layer, _ocifs, mount) = first_contact(&[Fault::Stall(200_000)], &[]);
    assert!(mount.read("f") == noise(1, 1 << 20));
    assert!(registry.count(&layer.path()) >= 3);
    assert_eq!(mount.status()["state"], "ready");
}

#[test]
fn whoever_waits_for_the_tree_hears_of_a_trickle() {
    let (_registry, _layer, image) = unknown_image(&[trickle()]);
    let start = Instant::now();
    for options in [&["--wait", "ready"][..], &["--writable"]] {
        let error = Ocifs::with(&["--timeout", "3s"]).mount_fails(&image, options);
        assert!(error.contains("nothing useful"), "{error}");
    }
    assert!(start.elapsed() <= 2 * (TIMEOUT + SLACK), "{:?}", start.elapsed());
}

#[test]
fn a_registry_that_is_silent_during_the_first_pass_is_an_error_in_time() {
    let (_registry, _layer, _ocifs, mount) = first_contact(&[Fault::Silence], &[]);
    let start = Instant::now();
    std::fs::read(mount.join("f")).unwrap_err();
    assert!(start.elapsed() <= TIMEOUT + SLACK, "{:?}", start.elapsed());
}

#[test]
fn a_registry_that_is_silent_from_the_start_is_an_error_in_time() {
    let (registry, layer, image) = unknown_image(&[]);
    let config = "/blobs/";
    for held in ["/manifests/", config] {
        registry.hold(held);
        let start = Instant::now();
        Ocifs::with(&["--timeout", "3s"]).mount_fails(&image, &[]);
        assert!(start.elapsed() <= TIMEOUT + SLACK, "{held}: {:?}", start.elapsed());
        registry.release();
    }
    assert_eq!(registry.count(&layer.path()), 0);
}

#[test]
fn another_process_that_stalls_with_the_layer_is_not_waited_for_beyond_the_timeout() {
    let (registry, layer, image) = unknown_image(&[]);
    registry.hold(&layer.path());
    let patient = Ocifs::with(&["--timeout", "never"]);
    let first = patient.mount_with(&image, &[]);
    eventually("it streams the layer", || registry.count(&layer.path()) == 1);
    let second = Ocifs::at(patient.store()).options(&["--timeout", "3s"]);
    let mount = second.mount_with(&image, &[]);
    let start = Instant::now();
    std::fs::read(mount.join("f")).unwrap_err();
    assert!(start.elapsed() <= TIMEOUT + SLACK, "{:?}", start.elapsed());
    assert_eq!(mount.status()["state"], "stalled");
    assert_eq!(first.status()["state"], "preparing");
    registry.release();
    for mount in [&first, &mount] {
        mount.reaches("ready");
        assert!(mount.read("f") == noise(1, 1 << 20));
    }
}

#[test]
fn what_waits_after_a_stall_can_be_killed() {
    let (registry, layer, _ocifs, mount) = first_contact(&[trickle()], &[]);
    mount.reaches("stalled");
    // The layer arrives again, slowly.
    registry.change_fault(&layer.path(), Fault::Slow(5_000, Duration::from_millis(100)));
    mount.reaches("preparing");
    let mut child = std::process::Command::new("stat")
        .arg(mount.join("f"))
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert!(child.try_wait().unwrap().is_none(), "it waits: {}", mount.status());
    crate::common::ocifs::send(child.id(), nix::sys::signal::Signal::SIGTERM);
    let start = Instant::now();
    assert!(!wait(&mut child, "stat after a signal").success());
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    assert_eq!(mount.status()["state"], "preparing");
    registry.clear_faults();
}
