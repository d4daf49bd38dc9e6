//! Outside failures: wrong bytes, and registries that misbehave.

mod ranges;

use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::common::layers::{Blob, Tar, noise, push};
use crate::common::ocifs::{Mounted, Ocifs, PATIENCE, bounded, eventually};
use crate::common::registry::{Fault, Guard, TestRegistry, Tokens};

const FILE: usize = 256 << 10;

/// An image of two layers. The store has their indexes once it is mounted, and none of their data.
struct Scene {
    registry: TestRegistry,
    image: String,
    /// The layer with the files `a0`..`a11`. It is longer than a client reads past instead of asking for the whole
    /// layer.
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
        let layer = Blob::gzip(&files('a', 100, 12).finish());
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

    /// Mounts the image with no data in the store or in memory, and without prefetching.
    fn mount(&self) -> Mounted {
        drop(self.ocifs.mount(&self.image));
        self.ocifs.ok(["cache", "drop"]);
        let mount = self
            .ocifs
            .mount_with(&self.image, &["--wait", "ready", "--prefetch", "none"]);
        self.registry.clear_log();
        mount
    }

    /// Applies a fault to the next `times` answers for the layer.
    fn fault(&self, times: usize, fault: Fault) {
        self.registry.fault(&self.layer.path(), times, fault);
    }

    fn layer_requests(&self) -> usize {
        self.registry.count(&self.layer.path())
    }

    /// Returns whether the registry got a request for the layer without a range and sent all of it.
    fn sent_whole(&self) -> bool {
        let log = self.registry.log();
        let mut of_layer = log.iter().filter(|l| l.target.contains(&self.layer.path()));
        // The reader closes the connection when it has what it needs.
        of_layer.any(|l| !l.headers.contains_key("range") && l.status == 200)
    }
}

/// Returns whether file `a<i>` has its content.
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
    // The store has no wrong bytes either.
    drop(mount);
    let mount = scene.ocifs.mount(&scene.image);
    for i in 0..8 {
        assert!(good(&mount, i));
    }
}

#[test]
fn answers_that_break_off_or_come_short_are_resumed() {
    let scene = Scene::new(&[]);
    // The fault, how many answers have it, and the least number of requests.
    for (fault, times, requests) in [
        (Fault::Truncate(1000), 2, 3),
        (Fault::Short(1000), 2, 3),
        (Fault::Hangup, 2, 3),
        (Fault::NoLength, 1, 1),
        (Fault::Slow(16 << 10, Duration::from_millis(1)), 1, 1),
    ] {
        let mount = scene.mount();
        scene.fault(times, fault.clone());
        assert!(good(&mount, 3), "{fault:?}");
        assert_eq!(scene.registry.faults_left(), 0, "{fault:?}");
        let asked = scene.layer_requests();
        assert!(asked >= requests, "{fault:?}: {asked}");
    }
}

#[test]
fn documents_are_decoded_within_their_limits() {
    let label = || Fault::Header("Content-Encoding".to_owned(), "gzip".to_owned());
    let layer = Blob::gzip(&Tar::new().file("f", noise(1, FILE)).finish());
    for fault in [
        Fault::Compress("gzip"),
        Fault::Compress("deflate"),
        Fault::Compress("zstd"),
        // The label without the encoding.
        label(),
    ] {
        let registry = TestRegistry::start();
        push(&registry, "app", "1", std::slice::from_ref(&layer));
        for path in ["/manifests/", "/blobs/"] {
            registry.fault(path, usize::MAX, fault.clone());
        }
        let said = Ocifs::new().run(["cat", &format!("{}/app:1", registry.host()), "f"]);
        assert_eq!(said.code, Some(0), "{fault:?}: {}", said.stderr);
        assert!(said.stdout == noise(1, FILE), "{fault:?}");
    }
    // A small compressed document that unpacks to a gigabyte.
    let registry = TestRegistry::start();
    registry.add_manifest(
        "bomb",
        Some("1"),
        "application/vnd.oci.image.manifest.v1+json",
        vec![b' '; 1 << 30],
    );
    registry.fault("/manifests/", usize::MAX, Fault::Compress("gzip"));
    let ocifs = Ocifs::new();
    let inspect = ocifs.command(["inspect", &format!("{}/bomb:1", registry.host())]);
    let mut limited = std::process::Command::new("prlimit");
    limited
        .arg("--as=600000000")
        .arg(inspect.get_program())
        .args(inspect.get_args());
    let said = bounded(&mut limited);
    assert_eq!(said.code, Some(1), "{said:?}");
    assert!(said.stderr.starts_with("ocifs: "), "{said:?}");
}

#[test]
fn refused_requests_for_a_layer_do_not_hurt_the_others() {
    let scene = Scene::new(&[]);
    let mount = scene.mount();
    // Requests without a range fail too, so there is no way to get the bytes.
    scene.fault(usize::MAX, Fault::status(416));
    assert_eq!(mount.read_error("a3"), Errno::EIO as i32);
    assert!(mount.read("b0") == noise(200, FILE));
    scene.registry.clear_faults();
    assert!(good(&mount, 3));
}

#[test]
fn a_mount_outlives_its_login() {
    for code in [400, 401, 403] {
        let home = tempfile::tempdir().unwrap();
        let mut scene = Scene::new(&[]);
        let host = scene.registry.host();
        let log_in = |password: &str| {
            use base64::Engine as _;
            let login = base64::engine::general_purpose::STANDARD.encode(format!("AWS:{password}"));
            let file = serde_json::json!({"auths": {host.clone(): {"auth": login}}});
            std::fs::write(home.path().join("config.json"), file.to_string()).unwrap();
        };
        scene.ocifs = scene.ocifs.env("DOCKER_CONFIG", home.path());
        scene
            .registry
            .guard(Guard::Basic("AWS".to_owned(), "morning".to_owned()));
        scene.registry.refuse_with(code);
        log_in("morning");
        let mount = scene.mount();
        assert!(good(&mount, 0), "{code}");
        scene
            .registry
            .guard(Guard::Basic("AWS".to_owned(), "evening".to_owned()));
        assert_eq!(mount.read_error("a11"), Errno::EIO as i32);
        let problem = mount.status()["problem"].to_string();
        assert!(problem.contains("Reauthenticate and try again"), "{code}: {problem}");
        log_in("evening");
        assert!(good(&mount, 11), "{code}");
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
    storage.clear_log();
    for i in [0, 5, 11] {
        assert!(good(&mount, i));
    }
    let statuses: Vec<u16> = storage.log().iter().map(|l| l.status).collect();
    assert!(statuses.contains(&206) && statuses.contains(&403), "{statuses:?}");
    let redirects = scene.registry.log();
    let redirects = redirects.iter().filter(|l| l.target.contains(&scene.layer.path()));
    assert!(redirects.filter(|l| l.status == 307).count() >= 2);
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
fn a_stall_holds_up_nobody_else() {
    let scene = Scene::new(&[]);
    let mount = scene.mount();
    scene.registry.hold(&scene.layer.path());
    std::thread::scope(|scope| {
        let stalled = scope.spawn(|| good(&mount, 2));
        eventually("the layer is asked for", || scene.layer_requests() > 0);
        let other = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| mount.read("b0")));
        let waits = !stalled.is_finished();
        scene.registry.release();
        assert!(stalled.join().unwrap());
        assert!(other.unwrap() == noise(200, FILE));
        assert!(waits, "the other file came only after the stalled one");
    });
}

#[test]
fn a_stall_ends_with_the_timeout() {
    let scene = Scene::new(&["--timeout", "3s"]);
    let mount = scene.mount();
    scene.fault(usize::MAX, Fault::Silence);
    let started = Instant::now();
    let error = mount.read_error("a2");
    assert!([Errno::ETIMEDOUT as i32, Errno::EIO as i32].contains(&error), "{error}");
    assert!(started.elapsed() < PATIENCE, "{:?}", started.elapsed());
    scene.registry.clear_faults();
    // A flight that the kernel's readahead started before may have to time out first.
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
    // The kernel may repeat the failed request for a moment.
    eventually("the file can be read again", || std::fs::read(mount.join("a7")).is_ok());
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
fn a_moment_of_wrong_bytes_does_not_end_a_mount() {
    let registry = TestRegistry::start();
    // The tar as it is: nothing but its headers and the digest tells that bytes are wrong.
    let tar = (0..3).fold(Tar::new(), |tar, i| tar.file(format!("f{i}"), noise(i, FILE)));
    let layer = Blob::plain(tar.finish());
    push(&registry, "app", "1", std::slice::from_ref(&layer));
    registry.fault(&layer.path(), 2, Fault::Corrupt(150));
    registry.fault(&layer.path(), 2, Fault::Corrupt(4000));
    let ocifs = Ocifs::new();
    let mount = ocifs.mount_with(&format!("{}/app:1", registry.host()), &[]);
    assert!(mount.read("f2") == noise(2, FILE));
    let status = mount.status();
    assert_eq!(
        (&status["state"], &status["problem"]),
        (&"ready".into(), &serde_json::Value::Null)
    );
    assert_eq!(registry.count(&layer.path()), 5);
}
