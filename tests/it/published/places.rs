//! Fresh hosts with indexes in directories, on web servers and in registries.

use std::collections::HashSet;
use std::io::Write as _;
use std::time::{Duration, Instant};

use super::web::{Page, PlainServer, WebServer};
use super::{Keys, Scene, authorities, files, trusting};
use crate::common::docker_registry::{DockerRegistry, Setup};
use crate::common::layers::{Blob, Tar, noise, push};
use crate::common::ocifs::{Ocifs, eventually};
use crate::common::registry::{Fault, Guard, TestRegistry, Tokens};

#[test]
fn a_fresh_host_fetches_only_what_it_reads() {
    let scene = Scene::new();
    let indexes = scene.indexes();
    let plain = Ocifs::new().ok(["export", &scene.image, "--format", "erofs"]).stdout;
    scene.registry.clear_log();
    let location = indexes.path().to_str().unwrap();
    let host = trusting(location);
    let mount = host.mount_with(&scene.image, &["--wait", "ready", "--prefetch", "none"]);
    assert_eq!(mount.read("etc/last1"), b"end\n");
    let whole: usize = scene.layers.iter().map(|layer| layer.bytes.len()).sum();
    assert!(scene.sent() < whole / 8, "{} of {whole}", scene.sent());
    assert_eq!(authorities(&mount), vec![format!("location {location}"); 3]);
    let status = mount.status();
    assert_eq!(status["layers"][0]["index_source"], "location");
    scene.check(&mount);
    drop(mount);
    // The same tree, as a disk and as a file system that is mounted again from the store.
    assert!(host.ok(["export", &scene.image, "--format", "erofs"]).stdout == plain);
    let again = host.mount(&scene.image);
    assert_eq!(again.status()["layers"][0]["index_source"], "store");
    scene.check(&again);
    let list = host.ok(["cache", "list", "--json"]).json();
    assert!(
        list.as_array()
            .unwrap()
            .iter()
            .all(|row| row["authority"] == format!("location {location}"))
    );
    let inspected = host.ok(["inspect", "--json", &scene.image]).json();
    assert_eq!(inspected["indexes"][0]["authority"], format!("location {location}"));
}

#[test]
fn an_index_of_a_location_that_is_not_named_any_more_is_not_used() {
    let scene = Scene::new();
    let indexes = scene.indexes();
    let host = trusting(indexes.path().to_str().unwrap());
    drop(host.mount(&scene.image));
    let host = Ocifs::at(host.store());
    let mount = host.mount(&scene.image);
    assert_eq!(authorities(&mount), ["pass"; 3]);
    scene.check(&mount);
}

#[test]
fn a_pass_outranks_a_location() {
    let scene = Scene::new();
    let indexes = scene.indexes();
    let host = Ocifs::new();
    drop(host.mount(&scene.image));
    let options = ["--index", indexes.path().to_str().unwrap(), "--index-trust-location"];
    let host = Ocifs::at(host.store()).options(&options);
    assert_eq!(authorities(&host.mount(&scene.image)), ["pass"; 3]);
}

#[test]
fn two_hosts_make_the_same_files() {
    let scene = Scene::new();
    let first = files(scene.indexes().path());
    // The bytes come in other pieces, and only a part of them can be kept.
    scene.registry.latency(Duration::from_millis(3));
    for layer in &scene.layers {
        scene
            .registry
            .fault_ranges(&layer.path(), Fault::Slow(8 << 10, Duration::from_micros(100)));
    }
    let other = tempfile::tempdir().unwrap();
    let host = Ocifs::with(&["--cache-size", "5MiB"]);
    host.ok(["index", "build", &scene.image, "-o", other.path().to_str().unwrap()]);
    let other = files(other.path());
    assert_eq!(first.keys().collect::<Vec<_>>(), other.keys().collect::<Vec<_>>());
    assert_eq!(first.len(), 3);
    for (name, bytes) in &first {
        assert!(other[name] == *bytes, "{name}");
    }
}

#[test]
fn the_size_of_the_cache_changes_no_index() {
    let registry = TestRegistry::start();
    let shell = std::fs::read("/bin/sh").unwrap();
    let mut tar = Tar::new();
    for i in 0..6 {
        tar = tar
            .file(format!("lib/program{i}.so"), &shell)
            .file(format!("noise{i}"), noise(i, 2 << 20));
    }
    let layers = [Blob::gzip(&tar.finish())];
    push(&registry, "programs", "1", &layers);
    let image = format!("{}/programs:1", registry.host());
    let build = |host: Ocifs| {
        let directory = tempfile::tempdir().unwrap();
        host.ok(["index", "build", &image, "-o", directory.path().to_str().unwrap()]);
        directory
    };
    let first = build(Ocifs::new());
    for size in ["0", "1MiB", "5MiB"] {
        let other = build(Ocifs::with(&["--cache-size", size, "--memory", "1MiB"]));
        assert!(files(first.path()) == files(other.path()), "{size}");
        let location = first.path().to_str().unwrap();
        let host = trusting(location).options(&["--cache-size", size]);
        let verified = host.ok(["index", "verify", "--json", &image]).json();
        assert_eq!(verified["compared"], 1, "{size}: {verified}");
    }
}

/// With less memory than a frame's window needs, a host finds fewer restarts than other hosts.
#[test]
fn an_index_made_while_memory_was_short_is_not_for_other_hosts() {
    let registry = TestRegistry::start();
    let tar = Tar::new()
        .file("zeros", vec![0; 180 << 20])
        .file("noise", noise(1, 1 << 20))
        .finish();
    let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
    encoder.window_log(27).unwrap();
    encoder.write_all(&tar).unwrap();
    let layers = [Blob {
        bytes: encoder.finish().unwrap(),
        ..Blob::zstd(&tar)
    }];
    push(&registry, "long", "1", &layers);
    let image = format!("{}/long:1", registry.host());
    let output = tempfile::tempdir().unwrap();
    let build = ["index", "build", &image, "-o", output.path().to_str().unwrap()];
    let error = Ocifs::with(&["--memory", "1MiB"]).fails(build);
    assert!(error.contains("memory was short"), "{error}");
    Ocifs::with(&["--memory", "1GiB"]).ok(build);
    assert_eq!(files(output.path()).len(), 1);
}

#[test]
fn an_index_travels_through_a_registry() {
    let scene = Scene::new();
    let registry = DockerRegistry::start(&Setup {
        login: Some(("ci".to_owned(), "secret".to_owned())),
        ..Setup::default()
    });
    let location = format!("oci://{}/team/indexes", registry.host());
    let host = || {
        let host = trusting(&location);
        let login = serde_json::json!({"auths": {registry.host(): {"username": "ci", "password": "secret"}}});
        std::fs::create_dir_all(host.home().join(".docker")).unwrap();
        std::fs::write(host.home().join(".docker/config.json"), login.to_string()).unwrap();
        host
    };
    let maker = host();
    let pushed = maker.ok(["index", "push", "--json", &scene.image, &location]).json();
    assert_eq!(pushed["written"], 3);
    let again = maker.ok(["index", "push", "--json", &scene.image, &location]).json();
    assert_eq!((&again["written"], &again["present"]), (&0.into(), &3.into()));
    scene.registry.clear_log();
    let fresh = host();
    let mount = fresh.mount_with(&scene.image, &["--wait", "ready", "--prefetch", "none"]);
    assert_eq!(mount.read("etc/first2"), b"layer 2\n");
    assert!(scene.sent() < scene.layers[1].bytes.len() / 2, "{}", scene.sent());
    assert_eq!(authorities(&mount), vec![format!("location {location}"); 3]);
    scene.check(&mount);
    // Without the login, the image is streamed.
    let mount = trusting(&location).mount(&scene.image);
    assert_eq!(authorities(&mount), ["pass"; 3]);
}

/// A new connection costs round trips and begins slowly.
#[test]
fn reads_use_the_connections_that_brought_the_index() {
    let scene = Scene::new();
    let location = format!("oci://{}/indexes", scene.registry.host());
    Ocifs::new().ok(["index", "push", &scene.image, &location]);
    scene.registry.clear_log();
    let host = trusting(&location);
    let mount = host.mount_with(&scene.image, &["--wait", "ready", "--prefetch", "none"]);
    assert_eq!(mount.read("etc/last1"), b"end\n");
    let used_by = |what: &dyn Fn(&str) -> bool| -> HashSet<usize> {
        let requests = scene.registry.log().into_iter().filter(|r| what(&r.target));
        requests.map(|r| r.connection).collect()
    };
    // Connections are made in advance for indexes alone, by requests for the base of the API.
    let indexes = used_by(&|target| target == "/v2/" || target.starts_with("/v2/indexes/"));
    let image = used_by(&|target| target.starts_with("/v2/app/"));
    assert!(!indexes.is_disjoint(&image), "{indexes:?} {image:?}");
}

#[test]
fn a_push_needs_the_scope_of_a_push() {
    let scene = Scene::new();
    let target = TestRegistry::start();
    target.guard(Guard::Bearer(Tokens::default()));
    let location = format!("oci://{}/indexes", target.host());
    Ocifs::new().ok(["index", "push", &scene.image, &location]);
    let scopes: Vec<String> = target
        .log()
        .iter()
        .filter(|r| r.target.starts_with("/token"))
        .map(|r| r.target.clone())
        .collect();
    assert!(scopes.iter().any(|scope| scope.contains("push")), "{scopes:?}");
    let mount = trusting(&location).mount(&scene.image);
    assert_eq!(authorities(&mount), vec![format!("location {location}"); 3]);
    scene.check(&mount);
}

#[test]
fn another_image_uses_the_indexes_of_the_layers_that_it_shares() {
    let scene = Scene::new();
    let target = TestRegistry::start();
    let location = format!("oci://{}/indexes", target.host());
    Ocifs::new().ok(["index", "push", &scene.image, &location]);
    let other = crate::common::layers::Blob::gzip(&crate::common::layers::Tar::new().file("new", "new\n").finish());
    let layers = [scene.layers[0].clone(), other];
    crate::common::layers::push(&scene.registry, "other", "1", &layers);
    let image = format!("{}/other:1", scene.registry.host());
    let mount = trusting(&location).mount(&image);
    assert_eq!(authorities(&mount), [format!("location {location}"), "pass".to_owned()]);
    assert_eq!(mount.read("new"), b"new\n");
    assert_eq!(mount.read("etc/first1"), b"layer 1\n");
}

#[test]
fn what_a_location_lacks_is_not_asked_for_again() {
    let scene = Scene::new();
    let target = TestRegistry::start();
    let location = format!("oci://{}/indexes", target.host());
    let host = trusting(&location);
    drop(host.mount(&scene.image));
    assert!(target.count("/manifests/ocifs1-") > 0);
    // The layers are known now, so nothing is looked for at all; a second image with unknown layers asks for its own.
    host.ok(["cache", "drop", "--all"]);
    target.clear_log();
    drop(host.mount(&scene.image));
    assert!(
        target.count("/manifests/ocifs1-") > 0,
        "dropping all forgets what is lacking"
    );
    let index = host.store().join("layers");
    std::fs::remove_dir_all(index).unwrap();
    target.clear_log();
    drop(host.mount(&scene.image));
    assert_eq!(target.count("/manifests/ocifs1-"), 0);
}

#[test]
fn nothing_is_asked_without_a_location() {
    let scene = Scene::new();
    let paths =
        |log: Vec<crate::common::registry::Logged>| log.into_iter().filter(|r| !r.target.contains("/blobs/")).count();
    drop(Ocifs::new().mount(&scene.image));
    let requests = scene.registry.take_log();
    assert!(requests.iter().all(|request| !request.target.contains("ocifs1")));
    // The manifest, and nothing else that is not a blob.
    assert_eq!(paths(requests), 1);
}

#[test]
fn a_location_that_does_not_answer_holds_up_no_mount() {
    let scene = Scene::new();
    let target = TestRegistry::start();
    target.hold("/");
    let location = format!("oci://{}/indexes", target.host());
    let host = trusting(&location);
    let start = Instant::now();
    let mount = host.mount(&scene.image);
    assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
    assert_eq!(authorities(&mount), ["pass"; 3]);
    scene.check(&mount);
    drop(mount);
    // The next mount does not ask it again.
    std::fs::remove_dir_all(host.store().join("layers")).unwrap();
    target.clear_log();
    drop(host.mount(&scene.image));
    assert_eq!(target.log().len(), 0);
    target.release();
}

#[test]
fn the_profile_of_a_start_travels_with_the_indexes() {
    let scene = Scene::new();
    let maker = Ocifs::new();
    let mount = maker.mount(&scene.image);
    mount.read("etc/first1");
    mount.read("large2");
    drop(mount);
    let directory = tempfile::tempdir().unwrap();
    let location = directory.path().to_str().unwrap();
    maker.ok(["index", "build", &scene.image, "-o", location]);
    let names = files(directory.path()).into_keys();
    let profiles: Vec<String> = names.filter(|name| name.ends_with(".default.profile")).collect();
    assert_eq!(profiles.len(), 1);
    // The same file can be taken by hand.
    let profile = directory.path().join(&profiles[0]);
    let other = Ocifs::new();
    other.ok(["profile", "import", &scene.image, profile.to_str().unwrap()]);
    let exported = |host: &Ocifs| host.ok(["profile", "export", &scene.image]).json();
    assert_eq!(exported(&other), exported(&maker));
    scene.registry.clear_log();
    let fresh = trusting(location);
    let mount = fresh.mount(&scene.image);
    let local = || mount.status()["layers"][1]["local"].as_u64().unwrap();
    // Nobody reads.
    eventually("the profile is replayed", || {
        local() as usize > scene.layers[1].bytes.len() / 2
    });
    assert_eq!(mount.status()["layers"][2]["local"], 0);
    eventually("the status says so", || {
        mount.status()["prefetch"]["profile_bytes"].as_u64() > Some(0)
    });
    let shown = fresh.ok(["profile", "show", "--json", &scene.image]).json();
    assert_eq!(shown.as_array().unwrap().len(), 1);
}

#[test]
fn a_disk_uses_an_index() {
    let scene = Scene::new();
    let indexes = scene.indexes();
    scene.registry.clear_log();
    let location = indexes.path().to_str().unwrap();
    let host = trusting(location);
    let disk = crate::common::disk::ServedDisk::serve(&host, &scene.image, &["--prefetch", "none"]);
    let whole: usize = scene.layers.iter().map(|layer| layer.bytes.len()).sum();
    assert!(scene.sent() < whole / 8, "{} of {whole}", scene.sent());
    let plain = Ocifs::new().ok(["export", &scene.image, "--format", "erofs"]).stdout;
    assert!(std::fs::read(disk.file()).unwrap() == plain);
}

#[test]
fn an_index_comes_from_a_web_server() {
    let scene = Scene::new();
    let indexes = scene.indexes();
    let keys = tempfile::tempdir().unwrap();
    let server = WebServer::start(indexes.path(), keys.path());
    let location = format!("https://127.0.0.1:{}/", server.port);
    let host = trusting(&location).options(&["--ca", server.authority.to_str().unwrap()]);
    scene.registry.clear_log();
    let mount = host.mount_with(&scene.image, &["--wait", "ready", "--prefetch", "none"]);
    assert_eq!(mount.read("etc/last3"), b"end\n");
    let whole: usize = scene.layers.iter().map(|layer| layer.bytes.len()).sum();
    assert!(scene.sent() < whole / 8, "{} of {whole}", scene.sent());
    assert_eq!(authorities(&mount), vec![format!("location {location}"); 3]);
    scene.check(&mount);
    // Nobody vouches for the server.
    let mount = trusting(&location).mount(&scene.image);
    assert_eq!(authorities(&mount), ["pass"; 3]);
}

#[test]
fn a_layer_that_carries_a_table_needs_no_index() {
    let scene = Scene::new();
    let layers = [
        crate::common::carried::CarriedBlob::plain(scene.layers[0].clone()),
        crate::common::carried::Writer::new(crate::common::carried::Dialect::Containers)
            .write(&crate::common::layers::Tar::new().file("table", "table\n").finish()),
    ];
    crate::common::carried::push(&scene.registry, "mixed", "1", &layers);
    let image = format!("{}/mixed:1", scene.registry.host());
    let directory = tempfile::tempdir().unwrap();
    let location = directory.path().to_str().unwrap();
    let host = Ocifs::new();
    host.ok(["index", "build", &image, "-o", location]);
    assert_eq!(files(directory.path()).len(), 1);
    let other = tempfile::tempdir().unwrap();
    host.ok([
        "index",
        "push",
        &image,
        other.path().to_str().unwrap(),
        "--from",
        location,
    ]);
    let mount = trusting(other.path().to_str().unwrap()).mount(&image);
    assert_eq!(
        authorities(&mount),
        [format!("location {}", other.path().display()), "manifest".to_owned()]
    );
    assert_eq!(mount.read("table"), b"table\n");
    let verified = trusting(location).ok(["index", "verify", "--json", &image]).json();
    assert_eq!(verified["compared"], 1);
}

#[test]
fn a_redirect_to_plain_http_is_not_believed() {
    let scene = Scene::new();
    let indexes = scene.indexes();
    let plain = PlainServer::of(indexes.path(), 404, Page::found);
    let redirects = tempfile::tempdir().unwrap();
    for name in files(indexes.path()).into_keys() {
        let answer = format!(
            "HTTP/1.1 302 Found\r\nLocation: {}{name}\r\nContent-Length: 0\r\n\r\n",
            plain.location()
        );
        std::fs::write(redirects.path().join(name), answer).unwrap();
    }
    let keys = tempfile::tempdir().unwrap();
    let server = WebServer::start_as(redirects.path(), keys.path(), "-HTTP");
    let location = format!("https://127.0.0.1:{}/", server.port);
    let host = trusting(&location).options(&["--ca", server.authority.to_str().unwrap()]);
    let mount = host.mount(&scene.image);
    assert_eq!(authorities(&mount), ["pass"; 3]);
    assert!(mount.log().contains("without TLS"), "{}", mount.log());
    assert_eq!(plain.requests(), 0);
}

#[test]
fn a_registry_without_tls_is_believed_only_on_this_host() {
    let scene = Scene::new();
    let host = Ocifs::with(&[
        "--plain-http",
        "--index",
        "oci://192.0.2.1:5000/indexes",
        "--index-trust-location",
    ]);
    let error = host.fails(["pull", &scene.image]);
    assert!(error.contains("TLS") && error.contains("192.0.2.1:5000"), "{error}");
}

#[test]
fn a_server_that_refuses_a_file_is_asked_for_the_others() {
    let scene = Scene::new();
    let indexes = scene.indexes();
    let keys = Keys::new();
    keys.sign(indexes.path());
    let missing = format!("sha256-{}.ocifs", scene.layers[0].digest().hex());
    std::fs::remove_file(indexes.path().join(missing)).unwrap();
    // Object stores answer so for what is not there.
    let server = PlainServer::of(indexes.path(), 403, Page::found);
    let host = keys.believing(&server.location());
    let mount = host.mount(&scene.image);
    assert_eq!(authorities(&mount), ["pass", "key ci", "key ci"]);
    drop(mount);
    // What was refused counts as absent.
    std::fs::remove_dir_all(host.store().join("layers")).unwrap();
    let asked = server.requests();
    let mount = host.mount(&scene.image);
    assert_eq!(authorities(&mount), ["pass", "key ci", "key ci"]);
    // Two indexes and their signatures; the profile is absent too.
    assert_eq!(server.requests() - asked, 4);
}

#[test]
fn a_later_place_is_used_if_the_first_one_is_damaged() {
    let scene = Scene::new();
    let (damaged, good) = (scene.indexes(), scene.indexes());
    for (name, bytes) in files(damaged.path()) {
        std::fs::write(damaged.path().join(name), &bytes[..bytes.len() / 2]).unwrap();
    }
    let (first, second) = (damaged.path().to_str().unwrap(), good.path().to_str().unwrap());
    let host = Ocifs::with(&["--index", first, "--index", second, "--index-trust-location"]);
    let mount = host.mount(&scene.image);
    assert_eq!(authorities(&mount), vec![format!("location {second}"); 3]);
    scene.check(&mount);
}

#[test]
fn a_directory_that_is_not_there_is_mentioned_once() {
    let scene = Scene::new();
    let mount = trusting("/no/such/indexes").mount(&scene.image);
    assert_eq!(authorities(&mount), ["pass"; 3]);
    assert_eq!(mount.log().matches("no such directory").count(), 1, "{}", mount.log());
}

#[test]
fn the_profile_of_another_image_is_not_used() {
    let scene = Scene::new();
    let maker = Ocifs::new();
    let mount = maker.mount(&scene.image);
    mount.read("large2");
    drop(mount);
    let directory = tempfile::tempdir().unwrap();
    let location = directory.path().to_str().unwrap();
    maker.ok(["index", "build", &scene.image, "-o", location]);
    // The same layers in another image.
    crate::common::layers::push(&scene.registry, "other", "1", &scene.layers[1..]);
    let image = format!("{}/other:1", scene.registry.host());
    let digest = Ocifs::new().ok(["inspect", "--json", &image]).json()["digest"].clone();
    let names = files(directory.path()).into_keys();
    let profile = names.into_iter().find(|name| name.ends_with(".profile")).unwrap();
    let name = format!("{}.default.profile", digest.as_str().unwrap().replacen(':', "-", 1));
    std::fs::rename(directory.path().join(profile), directory.path().join(name)).unwrap();
    let host = trusting(location);
    let mount = host.mount(&image);
    eventually("the log says why", || mount.log().contains("of another image or label"));
}
