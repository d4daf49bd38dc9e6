//! Mirrors that fail or lie are left for the next place, without a wrong byte and without a long wait.

use std::time::{Duration, Instant};

use crate::common::closed_port::ClosedPort;
use crate::common::layers::{Blob, Tar, noise, push};
use crate::common::ocifs::Mounted;
use crate::common::registry::{Fault, Guard, TestRegistry};

use super::{Machine, good, registry};

/// Faults of a mirror that has nothing good.
fn faults() -> Vec<Fault> {
    vec![
        Fault::status(500),
        Fault::status(503),
        Fault::status(404),
        Fault::status(400),
        Fault::status(401),
        Fault::status(403),
        Fault::status(429),
        Fault::Hangup,
        Fault::Truncate(10),
        Fault::Corrupt(5),
        Fault::Silence,
        Fault::Stall(10),
        Fault::Slow(1000, Duration::from_millis(100)),
        Fault::Slow(1, Duration::from_millis(100)),
    ]
}

#[test]
fn a_mirror_that_never_works_is_left_for_the_next_place() {
    for fault in faults() {
        let (origin, bad, second) = (registry(), registry(), registry());
        bad.fault("/v2/", usize::MAX, fault.clone());
        let machine = Machine::new();
        machine.mirrored(&origin.host(), &[&bad.host(), &second.host()]);
        let started = Instant::now();
        good(&machine.cat(&origin.host()));
        assert!(
            started.elapsed() < Duration::from_secs(12),
            "{fault:?}: {:?}",
            started.elapsed()
        );
        assert!(bad.count("/v2/") > 0, "{fault:?}");
        assert!(origin.log().is_empty(), "{fault:?}: the second mirror has everything");
        second.fault("/v2/", usize::MAX, fault.clone());
        good(&machine.cat(&origin.host()));
        assert!(!origin.log().is_empty(), "{fault:?}");
    }
}

#[test]
fn a_mirror_that_is_not_there_costs_one_attempt() {
    let (origin, port) = (registry(), ClosedPort::new());
    let hanging = registry();
    hanging.fault("/v2/", usize::MAX, Fault::Silence);
    let machine = Machine::new();
    machine.mirrored(&origin.host(), &[&port.address().to_string(), &hanging.host()]);
    let started = Instant::now();
    good(&machine.cat(&origin.host()));
    assert!(started.elapsed() < Duration::from_secs(8), "{:?}", started.elapsed());
    assert_eq!(hanging.count("/v2/"), 1, "it is left alone afterwards");
    // A name without an address, and a TLS server that has none.
    machine.hosts(
        &origin.host(),
        &format!(
            "[host.\"https://no-such-host.invalid\"]\n[host.\"https://{}\"]\n",
            hanging.host()
        ),
    );
    good(&machine.cat(&origin.host()));
}

#[test]
fn a_wrong_manifest_of_a_tag_is_not_believed() {
    let (origin, mirror) = (registry(), registry());
    mirror.fault("/manifests/", usize::MAX, Fault::Corrupt(30));
    let machine = Machine::new();
    machine.mirrored(&origin.host(), &[&mirror.host()]);
    good(&machine.cat(&origin.host()));
    assert_eq!(origin.count("/manifests/"), 1);
    assert_eq!(origin.count("/blobs/"), 0, "the mirror's blobs are good");
}

#[test]
fn when_nothing_else_works_all_mirrors_are_asked_again() {
    let (origin, mirror) = (registry(), registry());
    let machine = Machine::new();
    machine.mirrored(&origin.host(), &[&mirror.host()]);
    origin.fault("/v2/", usize::MAX, Fault::status(503));
    mirror.fault("/v2/", 2, Fault::status(503));
    good(&machine.cat(&origin.host()));
    assert_eq!(mirror.faults_left(), 0);
}

#[test]
fn errors_are_those_of_the_registry() {
    let (origin, mirror) = (TestRegistry::start(), TestRegistry::start());
    let machine = Machine::new();
    machine.mirrored(&origin.host(), &[&mirror.host()]);
    let said = machine.cat(&origin.host());
    assert_eq!(said.code, Some(1));
    assert!(
        said.stderr.contains("not found") && said.stderr.contains(&origin.host()),
        "{said:?}"
    );
    assert_eq!(mirror.count("/manifests/"), 1);
}

const FILE: usize = 256 << 10;

/// A mount of an image of two layers by way of a mirror. The store has its indexes, and none of its data.
struct Scene {
    origin: TestRegistry,
    mirror: TestRegistry,
    layer: Blob,
    mount: Mounted,
    // Kept until the mount has ended.
    _ocifs: crate::common::ocifs::Ocifs,
    _machine: Machine,
}

impl Scene {
    fn new() -> Self {
        let files = |seed: u64| (0..12).fold(Tar::new(), |tar, i| tar.file(format!("a{i}"), noise(seed + i, FILE)));
        let layer = Blob::gzip(&files(100).finish());
        let (origin, mirror) = (TestRegistry::start(), TestRegistry::start());
        for registry in [&origin, &mirror] {
            push(registry, "app", "1", std::slice::from_ref(&layer));
        }
        let machine = Machine::new();
        machine.mirrored(&origin.host(), &[&mirror.host()]);
        let image = format!("{}/app:1", origin.host());
        let ocifs = machine.ocifs();
        drop(ocifs.mount(&image));
        ocifs.ok(["cache", "drop"]);
        let mount = ocifs.mount_with(&image, &["--wait", "ready", "--prefetch", "none"]);
        mirror.clear_log();
        origin.clear_log();
        Self {
            origin,
            mirror,
            layer,
            mount,
            _ocifs: ocifs,
            _machine: machine,
        }
    }

    fn good(&self, i: u64) -> bool {
        self.mount.read(&format!("a{i}")) == noise(100 + i, FILE)
    }
}

#[test]
fn reads_go_on_at_the_registry_when_the_mirror_fails() {
    for fault in faults().into_iter().chain([
        Fault::IgnoreRange,
        Fault::OtherBytes,
        Fault::Slow(100, Duration::from_millis(50)),
    ]) {
        let scene = Scene::new();
        assert!(scene.good(0), "{fault:?}");
        assert!(
            scene.mirror.count(&scene.layer.path()) > 0 && scene.origin.log().is_empty(),
            "{fault:?}"
        );
        scene.mirror.fault(&scene.layer.path(), usize::MAX, fault.clone());
        let started = Instant::now();
        for i in [11, 7, 3, 9, 5] {
            assert!(scene.good(i), "{fault:?} {i}");
        }
        assert!(
            started.elapsed() < Duration::from_secs(15),
            "{fault:?}: {:?}",
            started.elapsed()
        );
        assert!(scene.origin.count(&scene.layer.path()) > 0, "{fault:?}");
        assert_eq!(scene.mount.status()["state"], "ready", "{fault:?}");
    }
}

#[test]
fn a_mirror_that_goes_away_leaves_a_mount_alone() {
    let mut scene = Scene::new();
    assert!(scene.good(0));
    scene.mirror = TestRegistry::start();
    for i in 1..12 {
        assert!(scene.good(i));
    }
    assert!(scene.origin.count(&scene.layer.path()) > 0);
}

#[test]
fn a_mirror_whose_login_ends_leaves_a_mount_alone() {
    let scene = Scene::new();
    assert!(scene.good(0));
    scene
        .mirror
        .guard(Guard::Basic("nobody".to_owned(), "knows".to_owned()));
    for i in 1..12 {
        assert!(scene.good(i));
    }
    assert!(scene.origin.count(&scene.layer.path()) > 0);
}

#[test]
fn a_mirror_that_loses_connections_now_and_then_is_not_left() {
    let scene = Scene::new();
    scene.mirror.fault(&scene.layer.path(), 1, Fault::Hangup);
    assert!(scene.good(3));
    scene.mirror.fault(&scene.layer.path(), 2, Fault::Truncate(50_000));
    for i in 0..12 {
        assert!(scene.good(i));
    }
    assert_eq!(scene.mirror.faults_left(), 0);
    assert_eq!(scene.origin.log().len(), 0);
}

#[test]
fn the_first_pass_over_a_layer_goes_on_at_the_registry() {
    for fault in [Fault::Truncate(1000), Fault::Stall(100_000), Fault::Corrupt(100_000)] {
        let files = (0..4).fold(Tar::new(), |tar, i| tar.file(format!("a{i}"), noise(i, FILE)));
        let layer = Blob::gzip(&files.finish());
        let (origin, mirror) = (TestRegistry::start(), TestRegistry::start());
        for registry in [&origin, &mirror] {
            push(registry, "app", "1", std::slice::from_ref(&layer));
        }
        mirror.fault(&layer.path(), usize::MAX, fault.clone());
        let machine = Machine::new();
        machine.mirrored(&origin.host(), &[&mirror.host()]);
        let said = machine.ocifs().run(["cat", &format!("{}/app:1", origin.host()), "a3"]);
        assert!(
            said.code == Some(0) && said.stdout == noise(3, FILE),
            "{fault:?}: {}",
            said.stderr
        );
        assert!(
            mirror.count(&layer.path()) > 0 && origin.count(&layer.path()) > 0,
            "{fault:?}"
        );
    }
}
