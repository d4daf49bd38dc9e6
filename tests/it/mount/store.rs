//! The store that mounts share, and what if there is none.

use std::path::Path;

use nix::sys::signal::Signal;

use super::{big_layer, hello};
use crate::common::layers::{noise, push};
use crate::common::ocifs::{Mounted, Ocifs, Tmpfs, alive, eventually, send};
use crate::common::registry::{Fault, TestRegistry};

/// Mounts `count` times at once and checks every mount.
fn mount_together(count: usize) {
    let registry = TestRegistry::start();
    let layers = [big_layer(20, 4), hello()];
    push(&registry, "app", "1", &layers);
    let image = format!("{}/app:1", registry.host());
    let ocifs = Ocifs::new();
    let mounts: Vec<Mounted> = std::thread::scope(|scope| {
        let mounting: Vec<_> = (0..count).map(|_| scope.spawn(|| ocifs.mount(&image))).collect();
        mounting.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for mount in &mounts {
        assert_eq!(mount.read("hello"), b"hello, world\n");
        assert!(mount.read("f3") == noise(23, 512 << 10));
    }
    for layer in &layers {
        assert_eq!(registry.count(&layer.path()), 1, "downloads of a layer");
    }
    std::thread::scope(|scope| {
        for mount in mounts {
            scope.spawn(move || drop(mount));
        }
    });
}

#[test]
fn two_mounts_at_once_download_each_layer_once() {
    mount_together(2);
}

#[test]
fn twenty_mounts_at_once_download_each_layer_once() {
    mount_together(20);
}

#[test]
fn a_first_pass_that_was_killed_leaves_nothing_that_is_believed() {
    let registry = TestRegistry::start();
    let layer = big_layer(60, 6);
    push(&registry, "app", "1", &[hello(), layer.clone()]);
    let image = format!("{}/app:1", registry.host());
    let ocifs = Ocifs::new();
    registry.fault(&layer.path(), 1, Fault::Stall(layer.bytes.len() / 2));
    let mount = ocifs.mount_with(&image, &[]);
    eventually("half of the layer is there", || {
        mount.status()["layers"][1]["fetched"].as_u64() == Some(layer.bytes.len() as u64 / 2)
    });
    send(mount.pid, Signal::SIGKILL);
    eventually("the process is dead", || !alive(mount.pid));
    assert_eq!(mount.umount(&[]).code, Some(0));
    let mount = ocifs.mount(&image);
    for i in 0..6 {
        assert!(mount.read(&format!("f{i}")) == noise(60 + i, 512 << 10), "f{i}");
    }
    assert_eq!(mount.status()["problem"], serde_json::Value::Null);
}

#[test]
fn a_store_that_cannot_be_written_does_not_keep_an_image_from_being_mounted() {
    let registry = TestRegistry::start();
    push(&registry, "app", "1", &[big_layer(30, 3), hello()]);
    let image = format!("{}/app:1", registry.host());
    let file = tempfile::NamedTempFile::new().unwrap();
    let below_a_file = file.path().join("store");
    for store in [below_a_file.as_path(), Path::new("/proc/ocifs-store")] {
        let ocifs = Ocifs::at(store);
        let mount = ocifs.mount(&image);
        assert_eq!(mount.read("hello"), b"hello, world\n");
        for i in 0..3 {
            assert!(mount.read(&format!("f{i}")) == noise(30 + i, 512 << 10));
        }
        let problem = mount.status()["problem"].clone();
        assert!(problem.as_str().is_some_and(|p| p.contains("store")), "{problem}");
        let said = ocifs.run(["pull", &image]);
        assert!(
            said.code == Some(1) && said.stderr.contains("nothing can be kept"),
            "{said:?}"
        );
    }
}

#[test]
fn a_full_store_does_not_keep_an_image_from_being_read() {
    let registry = TestRegistry::start();
    push(&registry, "app", "1", &[big_layer(40, 6), hello()]);
    let image = format!("{}/app:1", registry.host());
    // From nothing at all, over an index without data, to some of the data.
    for size in ["4k", "8k", "32k", "64k", "100k", "1m", "3m"] {
        let tmpfs = Tmpfs::new(size);
        let ocifs = Ocifs::at(&tmpfs.path().join("store"));
        let mount = ocifs.mount(&image);
        for round in 0..2 {
            for i in 0..6 {
                let name = format!("f{i}");
                assert!(
                    mount.read(&name) == noise(40 + i, 512 << 10),
                    "{size}, round {round}, {name}"
                );
                mount.forget(&name);
            }
        }
        let status = mount.status();
        assert!(
            status["problem"].as_str().is_some_and(|p| p.contains("store")),
            "{size}: {status}"
        );
        drop(mount);
        // What was left behind does not harm the next mount.
        let mount = ocifs.mount(&image);
        assert_eq!(mount.read("hello"), b"hello, world\n");
        assert!(mount.read("f5") == noise(45, 512 << 10), "{size}");
    }
}
