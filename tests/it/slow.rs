//! A slow connection, host or process delays nothing else.

use std::time::{Duration, Instant};

use crate::common::layers::{Blob, Tar, noise, push};
use crate::common::ocifs::{Mounted, Ocifs, eventually};
use crate::common::registry::{Fault, TestRegistry};

const FILE: usize = 512 << 10;

/// Pushes an image of two layers with files `a0`.. and `b0`... Returns its name and its layers.
fn image(registry: &TestRegistry) -> (String, [Blob; 2]) {
    let layers = [('a', 100), ('b', 200)].map(|(prefix, seed)| {
        let tar = (0..16).fold(Tar::new(), |tar, i| {
            tar.file(format!("{prefix}{i}"), noise(seed + i, FILE))
        });
        Blob::gzip(&tar.finish())
    });
    push(registry, "app", "1", &layers);
    (format!("{}/app:1", registry.host()), layers)
}

const MOUNT: &[&str] = &["--wait", "ready", "--prefetch", "none"];

fn hedges(mount: &Mounted) -> u64 {
    let layers = mount.status()["layers"].clone();
    let layers = layers.as_array().unwrap().iter();
    layers.map(|layer| layer["hedges"].as_u64().unwrap()).sum()
}

#[test]
fn a_slow_connection_is_overtaken_by_another_one() {
    let registry = TestRegistry::start();
    let (image, [layer, _]) = image(&registry);
    let ocifs = Ocifs::with(&["--timeout", "10s"]).learns(&image);
    for fault in [
        Fault::Slow(100, Duration::from_millis(100)),
        Fault::Stall(2_000),
        Fault::Silence,
    ] {
        ocifs.ok(["cache", "drop"]);
        let mount = ocifs.mount_with(&image, MOUNT);
        assert!(mount.read("a8") == noise(108, FILE));
        assert_eq!(hedges(&mount), 0, "{fault:?}");
        registry.fault(&layer.path(), 1, fault.clone());
        let start = Instant::now();
        assert!(mount.read("a0") == noise(100, FILE), "{fault:?}");
        assert!(
            start.elapsed() < Duration::from_secs(6),
            "{fault:?}: {:?}",
            start.elapsed()
        );
        assert_eq!(registry.faults_left(), 0, "{fault:?}");
        // Readahead may have used the bad connection instead.
        eventually("there was a second request", || hedges(&mount) >= 1);
        eventually("no second request is under way", || {
            mount.status()["in_flight"]["hedges"] == 0
        });
    }
}

#[test]
fn a_slow_link_is_not_asked_twice() {
    let registry = TestRegistry::start();
    let (image, layers) = image(&registry);
    let ocifs = Ocifs::new().learns(&image);
    // All answers arrive at 400 kB/s: slow but steady.
    for layer in &layers {
        registry.fault(&layer.path(), usize::MAX, Fault::Slow(4_000, Duration::from_millis(10)));
    }
    let mount = ocifs.mount_with(&image, MOUNT);
    for i in 0..4 {
        assert!(mount.read(&format!("a{i}")) == noise(100 + i, FILE));
    }
    assert_eq!(hedges(&mount), 0);
}

#[test]
fn readers_that_wait_for_another_process_keep_nobody_from_the_link() {
    let registry = TestRegistry::start();
    let (image, [layer, _]) = image(&registry);
    let patient = Ocifs::with(&["--timeout", "never"]).learns(&image);
    let first = patient.mount_with(&image, MOUNT);
    let second = Ocifs::at(patient.store()).mount_with(&image, MOUNT);
    registry.clear_log();
    registry.hold(&layer.path());
    let demand = |mount: &Mounted| mount.status()["in_flight"]["demand"].as_u64().unwrap();
    std::thread::scope(|scope| {
        let read_all = |mount: &Mounted| {
            for i in (0..16).step_by(2) {
                let path = mount.join(format!("a{i}"));
                scope.spawn(move || std::fs::read(path));
            }
        };
        read_all(&first);
        eventually("it has as many requests under way as it may", || demand(&first) == 8);
        // The readers of the first mount have their locks before they send requests.
        eventually("the layer is asked for", || registry.count(&layer.path()) >= 8);
        read_all(&second);
        eventually("all of them wait", || {
            second.status()["reads"]["waiting"].as_u64() >= Some(8)
        });
        let start = Instant::now();
        assert!(second.read("b0") == noise(200, FILE));
        let took = start.elapsed();
        registry.release();
        assert!(took < Duration::from_secs(3), "{took:?}");
    });
    assert!(second.read("a0") == noise(100, FILE));
}

#[test]
fn requests_that_hang_keep_nobody_from_the_link() {
    let registry = TestRegistry::start();
    let (image, [layer, _]) = image(&registry);
    let ocifs = Ocifs::new().learns(&image);
    let mount = ocifs.mount_with(&image, MOUNT);
    registry.hold(&layer.path());
    std::thread::scope(|scope| {
        for i in 0..16 {
            let path = mount.join(format!("a{i}"));
            scope.spawn(move || std::fs::read(path));
        }
        eventually("all of them wait", || {
            mount.status()["reads"]["waiting"].as_u64() >= Some(16)
        });
        let start = Instant::now();
        assert!(mount.read("b0") == noise(200, FILE));
        let took = start.elapsed();
        registry.release();
        assert!(took < Duration::from_secs(6), "{took:?}");
    });
}
