//! Places that are slow or hang: no mount waits for them for long.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::web::{Page, PlainServer};
use super::{Keys, Scene, authorities, files, trusting};
use crate::common::layers::{Blob, Tar, push};
use crate::common::ocifs::{Ocifs, send};
use crate::common::registry::Fault;

/// A server that sends each index with 4000 bytes per second.
fn trickling() -> PlainServer {
    PlainServer::start(|name| {
        if !name.ends_with(".ocifs") {
            return Page::found(b"x".to_vec());
        }
        Page {
            rate: Some(400),
            ..Page::found(vec![0; 1 << 20])
        }
    })
}

#[test]
fn a_place_that_trickles_holds_up_no_mount() {
    let scene = Scene::new();
    let keys = Keys::new();
    let server = trickling();
    let host = keys.believing(&server.location());
    let start = Instant::now();
    let mount = host.mount(&scene.image);
    assert!(start.elapsed() < Duration::from_secs(12), "{:?}", start.elapsed());
    assert_eq!(authorities(&mount), ["pass"; 3]);
    scene.check(&mount);
    drop(mount);
    // The next mount does not ask it again.
    std::fs::remove_dir_all(host.store().join("layers")).unwrap();
    let asked = server.requests();
    drop(host.mount(&scene.image));
    assert_eq!(server.requests(), asked);
}

#[test]
fn a_short_timeout_leaves_time_to_stream() {
    let scene = Scene::new();
    let keys = Keys::new();
    let server = trickling();
    let host = keys.believing(&server.location()).options(&["--timeout", "4s"]);
    host.ok(["pull", &scene.image]);
    let host = keys.believing(&server.location()).options(&["--timeout", "4s"]);
    let start = Instant::now();
    host.ok(["export", &scene.image, "--format", "erofs"]);
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
}

#[test]
fn a_good_later_place_is_used_before_a_slow_first_one() {
    let scene = Scene::new();
    let keys = Keys::new();
    let indexes = scene.indexes();
    keys.sign(indexes.path());
    let server = trickling();
    let host = Ocifs::with(&[
        "--index",
        &server.location(),
        "--index",
        indexes.path().to_str().unwrap(),
        "--index-key",
        &keys.public(),
    ]);
    let start = Instant::now();
    let mount = host.mount(&scene.image);
    assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
    assert_eq!(authorities(&mount), ["key ci"; 3]);
    assert!(mount.log().contains("slow"), "{}", mount.log());
    scene.check(&mount);
}

#[test]
fn an_index_that_comes_before_the_layer_is_used_although_it_is_late() {
    let scene = Scene::new();
    let keys = Keys::new();
    let indexes = scene.indexes();
    keys.sign(indexes.path());
    // Too slow to be waited for, and much sooner than the layers.
    let server = PlainServer::of(indexes.path(), 404, |content| Page {
        rate: Some(content.len().div_ceil(50).max(1000)),
        ..Page::found(content)
    });
    for layer in &scene.layers {
        scene.registry.fault(
            &layer.path(),
            usize::MAX,
            Fault::Slow(16 << 10, Duration::from_millis(200)),
        );
    }
    let host = keys.believing(&server.location());
    let mount = host.mount_with(&scene.image, &["--wait", "ready", "--prefetch", "none"]);
    assert_eq!(authorities(&mount), ["key ci"; 3], "{}", mount.log());
    scene.registry.clear_faults();
    scene.check(&mount);
}

#[test]
fn a_directory_that_hangs_holds_up_no_mount() {
    let scene = Scene::new();
    let indexes = scene.indexes();
    // The directory is in a mount whose process is stopped. It hangs like a network file system whose server is gone.
    let mut tar = Tar::new().dir("indexes/");
    for (name, content) in files(indexes.path()) {
        tar = tar.file(format!("indexes/{name}"), content);
    }
    push(&scene.registry, "indexes", "1", &[Blob::plain(tar.finish())]);
    let server = Ocifs::new();
    let shelf = server.mount_with(
        &format!("{}/indexes:1", scene.registry.host()),
        &["--wait", "ready", "--via", "fuse"],
    );
    let location = shelf.join("indexes");
    send(shelf.pid, Signal::SIGSTOP);
    let host = trusting(location.to_str().unwrap());
    let mount = host.mount(&scene.image);
    send(shelf.pid, Signal::SIGCONT);
    scene.check(&mount);
    assert_eq!(authorities(&mount), ["pass", "pass", "pass"]);
}
