//! What goes wrong outside: bytes that are not the right ones, registries that misbehave.

use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::common::layers::{Blob, Tar, noise, push};
use crate::common::ocifs::{Mounted, Ocifs, eventually};
use crate::common::registry::{Fault, Guard, TestRegistry, Tokens};

const FILE: usize = 256 << 10;

/// An indexed image of two layers with nothing of its content in the store, mounted.
struct Scene {
    registry: TestRegistry,
    image: String,
    /// Has `a0`..`a7`.
    layer: Blob,
    ocifs: Ocifs,
}

impl Scene {
    fn new(options: &[&str]) -> Self {
        let files = |prefix: char, seed: u64, count: u64| {
            (0..count).fold(Tar::new(), |tar, i| {
                tar.file(format!("{prefix}{i}"), noise(seed + i, FILE))
            })
        };
        let layer = Blob::gzip(&files('a', 100, 8).finish());
        let other = Blob::zstd(&files('b', 200, 1).finish());
        let registry = TestRegistry::start();
        push(&registry, "app", "1", &[layer.clone(), other]);
        let image = format!("{}/app:1", registry.host());
        let ocifs = Ocifs::with(options);
        Self {
            registry,
            image,
            layer,
            ocifs,
        }
    }

    fn mount(&self) -> Mounted {
        drop(self.ocifs.mount(&self.image));
        self.ocifs.ok(["cache", "drop"]);
        let mount = self.ocifs.mount(&self.image);
        self.registry.clear_log();
        mount
    }

    /// The next `times` answers for the layer go wrong.
    fn fault(&self, times: usize, fault: Fault) {
        self.registry.fault(&self.layer.path(), times, fault);
    }

    fn layer_requests(&self) -> usize {
        self.registry.count(&self.layer.path())
    }
}

/// Whether file `a<i>` has its content.
fn good(mount: &Mounted, i: u64) -> bool {
    mount.read(&format!("a{i}")) == noise(100 + i, FILE)
}

#[test]
fn a_wrong_byte_is_fetched_again() {
    let scene = Scene::new(&[]);
    let mount = scene.mount();
    scene.fault(1, Fault::Corrupt(5000));
    assert!(good(&mount, 3));
    assert!(scene.layer_requests() >= 2);
    assert_eq!(mount.status()["state"], "ready");
}

#[test]
fn bytes_that_stay_wrong_are_an_error_and_hurt_nobody_else() {
    let scene = Scene::new(&[]);
    let mount = scene.mount();
    scene.fault(usize::MAX, Fault::Corrupt(5000));
    assert_eq!(mount.read_error("a0"), Errno::EIO as i32);
    assert!(mount.read("b0") == noise(200, FILE));
    scene.registry.clear_faults();
    assert!(good(&mount, 0), "it recovers with the registry");
    for i in 0..8 {
        assert!(good(&mount, i));
    }
    // Nothing wrong was kept either.
    drop(mount);
    let mount = scene.ocifs.mount(&scene.image);
    for i in 0..8 {
        assert!(good(&mount, i));
    }
}

#[test]
fn answers_that_break_off_or_come_short_are_resumed() {
    let scene = Scene::new(&[]);
    let mount = scene.mount();
    for (i, fault) in [
        Fault::Truncate(1000),
        Fault::Short(1000),
        Fault::Hangup,
        Fault::NoLength,
        Fault::Slow(16 << 10, Duration::from_millis(1)),
    ]
    .into_iter()
    .enumerate()
    {
        scene.fault(2, fault.clone());
        assert!(good(&mount, i as u64), "{fault:?}");
        scene.registry.clear_faults();
    }
}

#[test]
fn a_registry_without_ranges_is_served_from_the_whole_layer() {
    for fault in [Fault::IgnoreRange, Fault::status(416)] {
        let scene = Scene::new(&[]);
        let mount = scene.mount();
        scene.fault(usize::MAX, fault.clone());
        if matches!(fault, Fault::Status { .. }) {
            // 416 to a range within the blob, always: there is no way to the bytes, but to the others.
            assert_eq!(mount.read_error("a3"), Errno::EIO as i32);
            scene.registry.clear_faults();
            scene.fault(1, fault.clone());
            let _ = std::fs::read(mount.join("a3"));
            scene.registry.clear_faults();
        }
        assert!(good(&mount, 3), "{fault:?}");
        assert!(mount.read("b0") == noise(200, FILE));
    }
}

#[test]
fn wrong_content_ranges_are_not_believed() {
    let scene = Scene::new(&[]);
    let mount = scene.mount();
    for (i, range) in ["bytes 0-99/100", "", "bytes 7-999/1000000", "nonsense"]
        .iter()
        .enumerate()
    {
        scene.fault(1, Fault::ContentRange((*range).to_owned()));
        // An answer that makes no sense may end a read, but never gives wrong bytes, and the next one works.
        if let Ok(bytes) = std::fs::read(mount.join(format!("a{i}"))) {
            assert!(bytes == noise(100 + i as u64, FILE), "{range}");
        }
        scene.registry.clear_faults();
        assert!(good(&mount, i as u64), "{range}");
    }
}

#[test]
fn an_expired_token_is_replaced() {
    let scene = Scene::new(&[]);
    scene.registry.guard(Guard::Bearer(Tokens::default()));
    let mount = scene.mount();
    assert!(good(&mount, 0));
    scene.registry.revoke_tokens();
    scene.registry.clear_log();
    assert!(good(&mount, 7));
    assert!(scene.registry.count("/token") >= 1);
    assert!(scene.registry.log().iter().any(|l| l.status == 401));
}

#[test]
fn an_expired_redirect_is_asked_for_again() {
    let scene = Scene::new(&[]);
    let storage = TestRegistry::start();
    scene.registry.redirect_blobs(&storage, 1, "signature=x", 1);
    let mount = scene.mount();
    for i in [0, 3, 7] {
        assert!(good(&mount, i));
    }
    assert!(storage.log().iter().any(|l| l.status == 206));
}

#[test]
fn a_rate_limit_is_waited_for() {
    let scene = Scene::new(&[]);
    let mount = scene.mount();
    let limited = Fault::Status {
        code: 429,
        headers: vec![("Retry-After".to_owned(), "1".to_owned())],
        body: String::new(),
    };
    scene.fault(1, limited);
    let started = Instant::now();
    assert!(good(&mount, 2));
    assert!(
        started.elapsed() >= Duration::from_millis(900),
        "{:?}",
        started.elapsed()
    );
}

#[test]
fn bursts_of_server_errors_are_outlasted() {
    let scene = Scene::new(&[]);
    let mount = scene.mount();
    for code in [500, 502, 503] {
        scene.fault(1, Fault::status(code));
    }
    assert!(good(&mount, 2));
    assert!(scene.layer_requests() >= 4);
}

#[test]
fn a_stall_ends_with_the_timeout_and_holds_up_nobody_else() {
    let scene = Scene::new(&["--timeout", "3s"]);
    let mount = scene.mount();
    scene.fault(usize::MAX, Fault::Silence);
    std::thread::scope(|scope| {
        let started = Instant::now();
        let stalled = scope.spawn(|| mount.read_error("a2"));
        assert!(mount.read("b0") == noise(200, FILE));
        let other = started.elapsed();
        let error = stalled.join().unwrap();
        let took = started.elapsed();
        assert!([Errno::ETIMEDOUT as i32, Errno::EIO as i32].contains(&error), "{error}");
        // The kernel asks once for its readahead and once for the page itself.
        assert!(took < Duration::from_secs(9), "{took:?}");
        assert!(other < Duration::from_secs(2), "{other:?}");
    });
    scene.registry.clear_faults();
    // A flight that the kernel's readahead began before may have to time out first.
    eventually("the file can be read again", || std::fs::read(mount.join("a2")).is_ok());
    assert!(good(&mount, 2));
}

#[test]
fn a_registry_that_is_gone_is_an_error_until_it_is_back() {
    let scene = Scene::new(&["--timeout", "2s"]);
    let mount = scene.mount();
    assert!(good(&mount, 0));
    scene.fault(usize::MAX, Fault::Hangup);
    assert!(mount.read_error("a7") != 0);
    assert!(good(&mount, 0), "what is here stays");
    scene.registry.clear_faults();
    assert!(good(&mount, 7));
}

#[test]
fn a_first_pass_goes_on_where_it_was_interrupted() {
    let scene = Scene::new(&[]);
    scene.registry.guard(Guard::Bearer(Tokens {
        uses: 3,
        ..Tokens::default()
    }));
    let storage = TestRegistry::start();
    scene.registry.redirect_blobs(&storage, 1, "signature=x", 1);
    scene.fault(1, Fault::status(503));
    let path = scene.layer.digest().to_string();
    storage.fault(&path, 1, Fault::Truncate(100_000));
    let mount = scene.ocifs.mount(&scene.image);
    for i in 0..8 {
        assert!(good(&mount, i));
    }
    let ranges: Vec<_> = storage
        .log()
        .iter()
        .filter(|l| l.target.contains(&path))
        .filter_map(|l| l.headers.get("range").cloned())
        .collect();
    assert!(
        ranges.iter().any(|range| range.starts_with("bytes=100000-")),
        "{ranges:?}"
    );
}

#[test]
fn a_byte_that_was_wrong_on_the_way_costs_the_first_mount_a_second_pass() {
    let ocifs = Ocifs::new();
    let registry = TestRegistry::start();
    let layer = Blob::gzip(&Tar::new().file("f", noise(1, FILE)).finish());
    push(&registry, "app", "1", std::slice::from_ref(&layer));
    registry.fault(&layer.path(), 1, Fault::Corrupt(4));
    let mount = ocifs.mount(&format!("{}/app:1", registry.host()));
    assert!(mount.read("f") == noise(1, FILE));
    assert_eq!(registry.count(&layer.path()), 2);
}

#[test]
fn a_server_that_refuses_ranges_is_asked_for_the_whole() {
    let scene = Scene::new(&[]);
    let mount = scene.mount();
    scene.fault(1, Fault::status(416));
    assert!(good(&mount, 3));
}
