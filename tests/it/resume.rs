//! An interrupted fetch resumes where it stopped.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::common::layers::{Blob, Tar, noise, push};
use crate::common::ocifs::{Ocifs, Said, Tmpfs, eventually, send, wait};
use crate::common::registry::{Fault, TestRegistry};

const SIZE: usize = 8 << 20;
/// Bytes that may be lost between the socket and the disk.
const SLACK: u64 = 512 << 10;

struct Scene {
    registry: TestRegistry,
    image: String,
    layer: Blob,
    content: Vec<u8>,
}

impl Scene {
    fn new(size: usize) -> Self {
        let registry = TestRegistry::start();
        let content = noise(11, size);
        let layer = Blob::gzip(&Tar::new().file("f", &content).finish());
        push(&registry, "app", "1", std::slice::from_ref(&layer));
        Self {
            image: format!("{}/app:1", registry.host()),
            registry,
            layer,
            content,
        }
    }

    fn size(&self) -> u64 {
        self.layer.bytes.len() as u64
    }

    /// Returns the offset at which the next answer for the layer ends.
    fn cut(&self) -> usize {
        self.layer.bytes.len() * 7 / 10
    }

    /// Returns the bytes of the layer that were sent since the log was cleared.
    fn sent(&self) -> u64 {
        let log = self.registry.log();
        let layer = self.layer.path();
        let of_layer = log.iter().filter(|logged| logged.target.contains(&layer));
        of_layer.map(|logged| logged.sent as u64).sum()
    }

    /// Starts a pull whose layer stalls after 70 %. Returns once the fetched part is on disk.
    fn stalled(&self, ocifs: &Ocifs) -> Child {
        self.registry.fault(&self.layer.path(), 1, Fault::Stall(self.cut()));
        let pull = start(ocifs, &["pull", &self.image]);
        eventually("most of the layer is kept", || {
            partial(ocifs.store()) + SLACK >= self.cut() as u64
        });
        pull
    }

    /// Runs a pull and kills it after 70 % of the layer.
    fn killed(&self, ocifs: &Ocifs) {
        let mut pull = self.stalled(ocifs);
        send(pull.id(), Signal::SIGKILL);
        wait(&mut pull, "a killed pull");
        self.registry.clear_faults();
        self.registry.clear_log();
    }

    /// Asserts that only the missing part was sent since, and that the content is right.
    fn assert_resumed(&self, ocifs: &Ocifs) {
        let rest = self.size() - self.cut() as u64;
        let sent = self.sent();
        assert!((rest..=rest + SLACK).contains(&sent), "{sent} of {rest}");
        eventually("what was kept of the layer goes when it is indexed", || {
            partial(ocifs.store()) == 0
        });
        assert!(ocifs.ok(["cat", &self.image, "f"]).stdout == self.content);
        assert_eq!(self.sent(), sent, "nothing comes twice");
    }
}

fn start(ocifs: &Ocifs, arguments: &[&str]) -> Child {
    ocifs
        .interruptible(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn partials(store: &Path) -> Vec<PathBuf> {
    let layers = fs::read_dir(store.join("layers")).into_iter().flatten();
    let paths = layers.map(|layer| layer.unwrap().path().join("partial"));
    paths.filter(|path| path.exists()).collect()
}

/// Returns the bytes that the store keeps of unfinished layers.
fn partial(store: &Path) -> u64 {
    let sizes = partials(store).into_iter();
    sizes.map(|path| fs::metadata(path).map_or(0, |m| m.len())).sum()
}

/// Returns the number of files that are being written.
fn drafts(store: &Path) -> usize {
    fs::read_dir(store.join("tmp")).unwrap().count()
}

/// Returns the bytes on disk of everything below a directory.
fn usage(directory: &Path) -> u64 {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let sizes = entries.map(|entry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => usage(&entry.path()),
        Ok(metadata) => metadata.blocks() * 512,
        Err(_) => 0,
    });
    sizes.sum()
}

#[test]
fn a_killed_pull_goes_on_within_the_layer() {
    let scene = Scene::new(SIZE);
    let ocifs = Ocifs::new();
    scene.killed(&ocifs);
    let said = ocifs.ok(["pull", "--json", &scene.image]).json();
    assert_eq!(said["fetched"], scene.sent(), "{said}");
    scene.assert_resumed(&ocifs);
}

#[test]
fn a_mount_goes_on_where_a_pull_was_killed() {
    let scene = Scene::new(SIZE);
    let ocifs = Ocifs::new();
    scene.killed(&ocifs);
    let mount = ocifs.mount(&scene.image);
    assert!(mount.read("f") == scene.content);
    scene.assert_resumed(&ocifs);
}

#[test]
fn what_was_kept_of_a_layer_that_is_indexed_goes() {
    let scene = Scene::new(SIZE);
    let ocifs = Ocifs::new();
    ocifs.ok(["pull", &scene.image]);
    let layer = fs::read_dir(ocifs.store().join("layers"))
        .unwrap()
        .next()
        .unwrap()
        .unwrap();
    fs::write(layer.path().join("partial"), "left by a process that was killed").unwrap();
    ocifs.ok(["ls", &scene.image]);
    assert_eq!(partial(ocifs.store()), 0);
}

#[test]
fn a_large_layer_that_comes_in_stripes_goes_on_as_well() {
    let scene = Scene::new(40 << 20);
    assert!(scene.size() > 20 << 20);
    scene.registry.latency(Duration::from_millis(5));
    let slow = Fault::Slow(64 << 10, Duration::from_millis(20));
    scene.registry.fault(&scene.layer.path(), usize::MAX, slow);
    let ocifs = Ocifs::new();
    let mut pull = start(&ocifs, &["pull", &scene.image]);
    eventually("a part of the layer is kept", || partial(ocifs.store()) > 5 << 20);
    send(pull.id(), Signal::SIGKILL);
    wait(&mut pull, "a killed pull");
    assert!(scene.registry.count(&scene.layer.path()) > 5, "it comes in stripes");
    let kept = partial(ocifs.store());
    scene.registry.clear_faults();
    scene.registry.clear_log();
    ocifs.ok(["pull", &scene.image]);
    assert_eq!(scene.sent(), scene.size() - kept);
    assert!(ocifs.ok(["cat", &scene.image, "f"]).stdout == scene.content);
}

#[test]
fn a_lost_network_costs_what_had_not_come() {
    let scene = Scene::new(SIZE);
    let ocifs = Ocifs::with(&["--timeout", "2s"]);
    // The first answer breaks off after 70 %, and every other answer at once.
    scene
        .registry
        .fault(&scene.layer.path(), 1, Fault::Truncate(scene.cut()));
    scene
        .registry
        .fault(&scene.layer.path(), usize::MAX, Fault::Truncate(0));
    ocifs.fails(["pull", &scene.image]);
    scene.registry.clear_faults();
    scene.registry.clear_log();
    ocifs.ok(["pull", &scene.image]);
    scene.assert_resumed(&ocifs);
}

#[test]
fn a_server_without_ranges_sends_all_and_the_layer_is_right() {
    let scene = Scene::new(SIZE);
    let ocifs = Ocifs::new();
    scene.killed(&ocifs);
    scene
        .registry
        .fault(&scene.layer.path(), usize::MAX, Fault::IgnoreRange);
    ocifs.ok(["pull", &scene.image]);
    assert_eq!(partial(ocifs.store()), 0);
    assert!(ocifs.ok(["cat", &scene.image, "f"]).stdout == scene.content);
}

#[test]
fn what_was_kept_and_is_wrong_is_thrown_away() {
    // The kept bytes are damaged at the start, damaged in the middle, too long, or all zeros as after a power cut.
    type Damage = fn(&mut Vec<u8>);
    let damages: [Damage; 4] = [
        |bytes| bytes[3] ^= 0x10,
        |bytes| {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
        },
        |bytes| bytes.resize(SIZE, 7),
        |bytes| bytes.fill(0),
    ];
    let scene = Scene::new(SIZE);
    for (number, damage) in damages.into_iter().enumerate() {
        let ocifs = Ocifs::new();
        scene.killed(&ocifs);
        let path = partials(ocifs.store()).pop().unwrap();
        let mut bytes = fs::read(&path).unwrap();
        damage(&mut bytes);
        fs::write(&path, bytes).unwrap();
        // The next answer is also wrong, once.
        scene.registry.fault(&scene.layer.path(), 1, Fault::Corrupt(100_000));
        ocifs.ok(["pull", &scene.image]);
        scene.registry.clear_faults();
        assert_eq!(partial(ocifs.store()), 0, "{number}");
        assert!(ocifs.ok(["cat", &scene.image, "f"]).stdout == scene.content, "{number}");
    }
}

#[test]
fn what_dead_pulls_left_is_counted_and_goes_at_once() {
    let scene = Scene::new(SIZE);
    let ways: [&[&str]; 3] = [
        &["cache", "prune", "--to", "0"],
        &["cache", "drop"],
        &["cache", "drop", "--all"],
    ];
    for way in ways {
        let ocifs = Ocifs::new();
        for _ in 0..3 {
            scene.killed(&ocifs);
        }
        let kept = partial(ocifs.store());
        let listed = ocifs.ok(["cache", "list", "--json"]).json();
        let unfinished = listed[0]["unfinished_bytes"].as_u64().unwrap();
        assert!((kept..=kept + 8192).contains(&unfinished), "{listed}");
        assert_eq!(drafts(ocifs.store()), 0, "the drafts of dead writers are gone");
        assert!(ocifs.ok(["cache", "list"]).text().contains("UNFINISHED"));
        ocifs.ok(way);
        assert_eq!(partial(ocifs.store()), 0, "{way:?}");
        assert!(usage(ocifs.store()) < 256 << 10, "{way:?}: {}", usage(ocifs.store()));
    }
}

#[test]
fn what_is_coming_in_is_counted_and_left_alone() {
    let scene = Scene::new(SIZE);
    let ocifs = Ocifs::new();
    let mut pull = scene.stalled(&ocifs);
    eventually(
        "the compressed bytes are counted, and what they were unpacked to",
        || {
            let listed = ocifs.ok(["cache", "list", "--json"]).json();
            listed[0]["unfinished_bytes"].as_u64().unwrap() > scene.cut() as u64 + SIZE as u64 / 2
        },
    );
    let said = ocifs.run(["cache", "drop", "--all"]);
    assert_eq!(said.code, Some(1), "{said:?}");
    assert!(said.stderr.contains("1 layer is being fetched"), "{said:?}");
    assert_eq!(drafts(ocifs.store()), 1);
    assert!(partial(ocifs.store()) > 0);
    send(pull.id(), Signal::SIGKILL);
    wait(&mut pull, "a killed pull");
    scene.registry.clear_faults();
    ocifs.ok(["cache", "drop", "--all"]);
    assert!(usage(ocifs.store()) < 256 << 10, "{}", usage(ocifs.store()));
}

#[test]
fn what_is_kept_stays_within_the_cache_size() {
    let scene = Scene::new(SIZE);
    // The limit is smaller than the compressed bytes and the content together. The content has precedence.
    let limit = 6 << 20;
    let ocifs = Ocifs::with(&["--cache-size", "6MiB"]);
    scene.registry.fault(&scene.layer.path(), 1, Fault::Stall(scene.cut()));
    let mut pull = start(&ocifs, &["pull", &scene.image]);
    eventually("all that came is unpacked", || {
        let listed = ocifs.ok(["cache", "list", "--json"]).json();
        let unfinished = listed[0]["unfinished_bytes"].as_u64().unwrap_or(0);
        assert!(unfinished <= limit + SLACK, "{listed}");
        unfinished >= 4 << 20 && partial(ocifs.store()) == 0
    });
    send(pull.id(), Signal::SIGKILL);
    wait(&mut pull, "a killed pull");
    // With enough room the compressed bytes are kept.
    let ocifs = Ocifs::with(&["--cache-size", "64MiB"]);
    scene.killed(&ocifs);
    ocifs.ok(["cache", "prune", "--to", "16MiB"]);
    assert!(partial(ocifs.store()) > 0);
    ocifs.ok(["cache", "prune", "--to", "1MiB"]);
    assert_eq!(partial(ocifs.store()), 0);
}

#[test]
fn a_pull_on_a_disk_that_is_just_large_enough_succeeds() {
    let scene = Scene::new(SIZE);
    let disk = Tmpfs::new("10m");
    let ocifs = Ocifs::at(&disk.path().join("store"));
    ocifs.ok(["pull", &scene.image]);
    assert!(ocifs.ok(["cat", &scene.image, "f"]).stdout == scene.content);
    assert_eq!(partial(ocifs.store()), 0);
}

#[test]
fn an_interrupted_command_says_what_it_keeps_and_leaves_no_draft() {
    let scene = Scene::new(SIZE);
    let small = Blob::gzip(&Tar::new().file("g", b"hello").finish());
    push(&scene.registry, "app", "1", &[small, scene.layer.clone()]);
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("image.tar");
    let commands: [&[&str]; 4] = [
        &["pull"],
        &["cat"],
        &["ls"],
        &["export", "--output", output.to_str().unwrap()],
    ];
    for command in commands {
        for (signal, code) in [(Signal::SIGINT, 130), (Signal::SIGTERM, 143)] {
            let ocifs = Ocifs::new();
            scene.registry.fault(&scene.layer.path(), 1, Fault::Stall(scene.cut()));
            let mut arguments = command.to_vec();
            arguments.push(&scene.image);
            if command[0] == "cat" {
                arguments.push("f");
            }
            let child = start(&ocifs, &arguments);
            eventually("most of the layer is kept, and all of the other", || {
                let listed = ocifs.ok(["cache", "list", "--json"]).json();
                let rows = listed.as_array().unwrap().clone();
                partial(ocifs.store()) + SLACK >= scene.cut() as u64
                    && rows.iter().any(|row| row["index_bytes"].as_u64().unwrap() > 0)
            });
            send(child.id(), signal);
            let said: Said = child.wait_with_output().unwrap().into();
            scene.registry.clear_faults();
            assert_eq!(said.code, Some(code), "{arguments:?}: {said:?}");
            let says = |text: &str| said.stderr.contains(text);
            assert!(says("1 of 2 layers") && says("MiB kept"), "{arguments:?}: {said:?}");
            assert_eq!(drafts(ocifs.store()), 0, "{arguments:?}");
            assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0, "{arguments:?}");
            scene.registry.clear_log();
            ocifs.ok(["pull", &scene.image]);
            scene.assert_resumed(&ocifs);
        }
    }
}
