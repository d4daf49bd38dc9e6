//! Prefetching: learned starts, programs and their libraries, the rest of the image.

use std::path::Path;
use std::process::Command;

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::common::layers::{Blob, Tar, header, noise, push};
use crate::common::ocifs::{Mounted, Ocifs, Tmpfs, alive, bounded, eventually, send};
use crate::common::registry::{Fault, TestRegistry};

const FILE: usize = 1 << 20;

/// Returns a layer of files `PREFIX0`... of 1 MiB each. Each file has about two spans.
fn layer(prefix: &str, seed: u64, files: u64) -> Blob {
    let add = |tar: Tar, i| tar.file(format!("{prefix}{i}"), noise(seed + i, FILE));
    Blob::gzip(&(0..files).fold(Tar::new(), add).finish())
}

struct Scene {
    registry: TestRegistry,
    layers: Vec<Blob>,
    image: String,
    ocifs: Ocifs,
}

impl Scene {
    fn new() -> Self {
        Self::of(vec![layer("a", 100, 8), layer("b", 200, 8)])
    }

    /// Returns a scene whose store has the index of the image, and none of its data.
    fn of(layers: Vec<Blob>) -> Self {
        let registry = TestRegistry::start();
        push(&registry, "app", "1", &layers);
        let image = format!("{}/app:1", registry.host());
        let ocifs = Ocifs::knowing(&image);
        registry.clear_log();
        Self {
            registry,
            layers,
            image,
            ocifs,
        }
    }

    fn cold(&self) {
        self.ocifs.ok(["cache", "drop"]);
        self.registry.clear_log();
    }

    fn mount(&self, prefetch: &str) -> Mounted {
        self.ocifs
            .mount_with(&self.image, &["--wait", "ready", "--prefetch", prefetch])
    }

    fn layer_requests(&self) -> usize {
        self.layers.iter().map(|layer| self.registry.count(&layer.path())).sum()
    }

    /// Runs a start that reads these files in this order and then ends.
    fn start(&self, files: &[&str]) {
        let mount = self.mount("profile");
        for file in files {
            mount.read(file);
        }
    }
}

fn local(mount: &Mounted) -> u64 {
    mount.status()["local"].as_u64().unwrap()
}

fn prefetched(mount: &Mounted) -> bool {
    mount.status()["prefetch"]["state"] == "done"
}

#[test]
fn a_start_is_learned_and_comes_before_it_is_read_the_next_time() {
    let scene = Scene::new();
    scene.start(&["b6", "a2"]);
    let used = |mount: &Mounted| mount.status()["used"].as_u64().unwrap();
    scene.cold();
    let mount = scene.mount("profile");
    eventually("the profile is replayed", || prefetched(&mount));
    eventually("its bytes are here", || mount.status()["in_flight"]["others"] == 0);
    let (before, here) = (scene.layer_requests(), local(&mount));
    assert!(before > 0 && here > 0 && used(&mount) == 0);
    assert_eq!(mount.status()["prefetch"]["runs"], 1);
    assert!(mount.read("b6") == noise(206, FILE) && mount.read("a2") == noise(102, FILE));
    assert_eq!(scene.layer_requests(), before, "all of it was there");
    // Little more than the files was fetched: a file begins and ends within spans.
    assert!(here < 8 * u64::try_from(FILE).unwrap() / 2, "{here}");
}

#[test]
fn nothing_is_fetched_unasked_without_prefetching() {
    let scene = Scene::new();
    scene.start(&["b6", "a2"]);
    scene.cold();
    let mount = scene.mount("none");
    assert!(prefetched(&mount));
    assert_eq!((scene.layer_requests(), local(&mount)), (0, 0));
    mount.read("a2");
    assert!(scene.layer_requests() > 0);
}

#[test]
fn programs_of_an_image_have_profiles_of_their_own() {
    let scene = Scene::new();
    for (label, file) in [("web", "a1"), ("job", "b1")] {
        let mount = scene
            .ocifs
            .mount_with(&scene.image, &["--wait", "ready", "--profile", label]);
        mount.read(file);
    }
    let shown = scene.ocifs.ok(["profile", "show", "--json", &scene.image]).json();
    let labels: Vec<&Value> = shown.as_array().unwrap().iter().map(|p| &p["label"]).collect();
    assert_eq!(labels, ["job", "web"]);
    for profile in shown.as_array().unwrap() {
        let layer = if profile["label"] == "web" { 0 } else { 1 };
        let ranges = profile["ranges"].as_array().unwrap();
        assert!(
            !ranges.is_empty() && ranges.iter().all(|range| range[0] == layer),
            "{profile}"
        );
    }
    let text = scene.ocifs.ok(["profile", "show", "--profile", "web", &scene.image]);
    assert!(
        text.text().contains("web") && text.text().contains("1 run "),
        "{text:?}"
    );
    let unknown = scene
        .ocifs
        .fails(["profile", "export", "--profile", "none", &scene.image]);
    assert!(unknown.contains("no start of"), "{unknown}");
}

#[test]
fn a_profile_moves_to_another_machine() {
    let scene = Scene::new();
    scene.start(&["b3"]);
    let file = scene.ocifs.home().join("profile.json");
    let path = file.to_str().unwrap();
    scene.ocifs.ok(["profile", "export", "--output", path, &scene.image]);
    let other = Ocifs::new();
    let said = other.ok(["profile", "import", &scene.image, path]);
    assert!(said.stderr.contains("taken over"), "{said:?}");
    // The other store knows the profile before it has anything of the image.
    let mount = other.mount(&scene.image);
    assert_eq!(mount.status()["prefetch"]["runs"], 1);
    drop(mount);
    // A profile of other layers is refused.
    let stranger = layer("x", 900, 1);
    push(&scene.registry, "stranger", "1", &[stranger]);
    let error = other.fails([
        "profile",
        "import",
        &format!("{}/stranger:1", scene.registry.host()),
        path,
    ]);
    assert!(error.contains("no layer of"), "{error}");
    std::fs::write(&file, "{}").unwrap();
    let error = other.fails(["profile", "import", &scene.image, path]);
    assert!(error.contains("not a profile"), "{error}");
}

/// Profiles of version 1 of the format name ranges of tars.
#[test]
fn a_profile_of_the_first_version_is_replayed_and_continued() {
    const BLOCK: usize = 128 << 10;
    let scene = Scene::new();
    scene.start(&["b6"]);
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("profile.json");
    let path = file.to_str().unwrap();
    let export = || -> Value {
        scene.ocifs.ok(["profile", "export", "--output", path, &scene.image]);
        serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap()
    };
    let mut profile = export();
    assert_eq!(profile["ocifs-profile"], 2);
    // The file a5 in the first layer. Each file of the tar has a header of 512 bytes.
    let start = 5 * (FILE + 512) + 512;
    let (from, to) = (start / BLOCK * BLOCK, (start + FILE).next_multiple_of(BLOCK));
    profile["ocifs-profile"] = 1.into();
    profile["ranges"] = serde_json::json!([[0, from, to - from, 0, 2]]);
    std::fs::write(&file, profile.to_string()).unwrap();
    scene.ocifs.ok(["profile", "import", &scene.image, path]);
    scene.cold();
    {
        let mount = scene.mount("profile");
        eventually("the profile is replayed", || prefetched(&mount));
        eventually("its bytes are here", || mount.status()["in_flight"]["others"] == 0);
        let before = scene.layer_requests();
        assert!(mount.read("a5") == noise(105, FILE));
        assert_eq!(
            (scene.layer_requests(), before > 0),
            (before, true),
            "all of it was there"
        );
    }
    // The next version names the places of a5 in the data device, where files begin at blocks of 4096 bytes.
    let continued = export();
    assert_eq!(continued["ocifs-profile"], 2);
    let ranges = continued["ranges"].as_array().unwrap();
    let scored = |at: usize| {
        let holds = |range: &&Value| {
            let (start, length) = (range[1].as_u64().unwrap(), range[2].as_u64().unwrap());
            range[0] == 0 && (start..start + length).contains(&(at as u64))
        };
        ranges.iter().find(holds).map(|range| range[4].as_u64().unwrap())
    };
    assert!(
        (5 * FILE..6 * FILE).step_by(BLOCK).all(|at| scored(at) == Some(3)),
        "{continued}"
    );
}

#[test]
fn a_profile_of_another_version_is_left_as_it_is() {
    let scene = Scene::new();
    scene.start(&["b3"]);
    let profiles = std::fs::read_dir(scene.ocifs.store().join("profiles")).unwrap();
    let files = profiles
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_file());
    let [file] = files.collect::<Vec<_>>().try_into().unwrap();
    let later = std::fs::read_to_string(&file)
        .unwrap()
        .replace("profile\":2", "profile\":3");
    assert!(later.contains("profile\":3"));
    std::fs::write(&file, &later).unwrap();
    scene.start(&["a1"]);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), later);
}

#[test]
fn another_tag_of_the_repository_starts_with_what_is_known_of_shared_layers() {
    let scene = Scene::new();
    scene.start(&["b6", "a2"]);
    let own = Blob::gzip(&Tar::new().file("own", "own\n").finish());
    push(&scene.registry, "app", "2", &[scene.layers[0].clone(), own]);
    let image = format!("{}/app:2", scene.registry.host());
    drop(
        scene
            .ocifs
            .mount_with(&image, &["--wait", "ready", "--prefetch", "none", "--profile", "other"]),
    );
    scene.cold();
    let mount = scene.ocifs.mount(&image);
    eventually("the profile is replayed", || prefetched(&mount));
    eventually("its bytes are here", || mount.status()["in_flight"]["others"] == 0);
    assert_eq!(mount.status()["prefetch"]["runs"], 0);
    let before = scene.registry.count(&scene.layers[0].path());
    assert!(before > 0);
    assert!(mount.read("a2") == noise(102, FILE));
    assert_eq!(scene.registry.count(&scene.layers[0].path()), before);
}

#[test]
fn a_tag_that_moved_shows_the_new_image() {
    let scene = Scene::new();
    scene.start(&["b6"]);
    scene.cold();
    let new = vec![scene.layers[0].clone(), layer("b", 700, 8)];
    push(&scene.registry, "app", "1", &new);
    let mount = scene.mount("profile");
    assert!(mount.read("b6") == noise(706, FILE));
    assert!(mount.read("a2") == noise(102, FILE));
}

#[test]
fn all_of_the_image_comes_in_the_background_and_then_no_registry_is_needed() {
    let scene = Scene::new();
    let mount = scene.mount("all");
    eventually("all is here", || prefetched(&mount));
    let status = mount.status();
    assert_eq!(
        (&status["local"], &status["prefetch"]["problem"]),
        (&status["size"], &Value::Null)
    );
    let requests = scene.layer_requests();
    for (prefix, seed) in [("a", 100), ("b", 200)] {
        for i in 0..8 {
            assert!(mount.read(&format!("{prefix}{i}")) == noise(seed + i, FILE));
        }
    }
    assert_eq!(scene.layer_requests(), requests);
    // Each byte was fetched once, except for bytes that two adjacent requests share.
    let (fetched, size) = (status["fetched"].as_u64().unwrap(), status["size"].as_u64().unwrap());
    assert!(fetched <= size + 64, "{fetched} of {size}");
}

/// Asserts that `--prefetch all` without room for the image fetches no byte twice. The rest is read on demand.
fn completes_without_room(scene: &Scene) {
    let mount = scene.mount("all");
    eventually("as much as can be is here", || prefetched(&mount));
    let status = mount.status();
    let problem = status["prefetch"]["problem"].as_str();
    assert!(problem.is_some_and(|p| p.contains("could not be kept")), "{status}");
    let (fetched, size) = (status["fetched"].as_u64().unwrap(), status["size"].as_u64().unwrap());
    assert!(fetched <= size + 64, "{fetched} of {size}");
    for i in 0..8 {
        assert!(mount.read(&format!("a{i}")) == noise(100 + i, FILE));
    }
}

#[test]
fn an_image_larger_than_the_cache_may_be_comes_once() {
    let mut scene = Scene::new();
    scene.ocifs = Ocifs::with(&["--cache-size", "4MiB"]).learns(&scene.image);
    completes_without_room(&scene);
}

#[test]
fn what_a_full_disk_cannot_hold_is_not_fetched_for_it() {
    let tmpfs = Tmpfs::new("4m");
    let mut scene = Scene::new();
    // Memory cannot hold the image either.
    scene.ocifs = Ocifs::at(&tmpfs.path().join("store"))
        .options(&["--memory", "1MiB"])
        .learns(&scene.image);
    completes_without_room(&scene);
}

#[test]
fn a_start_that_cannot_be_replayed_is_read_like_any_other() {
    let scene = Scene::of(vec![Blob::gzip(&Tar::new().file("big", noise(1, 8 * FILE)).finish())]);
    let path = scene.layers[0].path();
    scene.start(&["big"]);
    scene.cold();
    scene.registry.fault(&path, usize::MAX, Fault::status(403));
    let mount = scene.mount("profile");
    eventually("replaying has ended", || prefetched(&mount));
    assert!(mount.status()["prefetch"]["problem"].is_string());
    assert_eq!(local(&mount), 0);
    scene.registry.clear_faults();
    let mut start = vec![0; 2 * FILE];
    std::io::Read::read_exact(&mut std::fs::File::open(mount.join("big")).unwrap(), &mut start).unwrap();
    assert!(start == noise(1, 8 * FILE)[..2 * FILE]);
    // Readahead works: the profile does not hold it back after the replay failed.
    eventually("more comes than was read", || {
        let status = mount.status();
        status["local"].as_u64() > status["used"].as_u64()
    });
}

#[test]
fn what_runs_on_the_side_ends_with_a_lazy_unmount() {
    let scene = Scene::new();
    let mount = scene.mount("profile");
    mount.read("a2");
    let held = std::fs::File::open(mount.join("a0")).unwrap();
    scene.ocifs.ok(["umount", "--lazy", mount.path().to_str().unwrap()]);
    // The mount learned its start.
    let shown = scene.ocifs.ok(["profile", "show", "--json", &scene.image]).json();
    assert_eq!(shown[0]["runs"], 1, "{shown}");
    let mut content = Vec::new();
    std::io::Read::read_to_end(&mut &held, &mut content).unwrap();
    assert!(
        alive(mount.pid) && content == noise(100, FILE),
        "whoever has a file open is served"
    );
}

#[test]
fn a_reader_does_not_wait_for_what_is_fetched_in_the_background() {
    let scene = Scene::new();
    scene.registry.hold(&scene.layers[0].path());
    let mount = scene.mount("all");
    // Waits until as many bytes are in flight as may be. None gets an answer.
    let asked = || mount.status()["in_flight"]["bytes"].as_u64().unwrap();
    let mut before = 0;
    eventually("no more is asked for", || {
        let now = asked();
        now > 0 && std::mem::replace(&mut before, now) == now
    });
    let layer = scene.layers[0].bytes.len() as u64;
    assert!(asked() < layer / 2, "{} of {layer}", asked());
    let requests = || scene.registry.count(&scene.layers[0].path());
    let held = requests();
    assert!(mount.read("b3") == noise(203, FILE));
    // No background request was given up, not even while the reader waited.
    assert!(asked() > 0 && mount.status()["in_flight"]["waiting"].as_u64() > Some(0));
    assert_eq!(requests(), held);
    scene.registry.release();
    eventually("all is here", || prefetched(&mount));
}

#[test]
fn background_completion_goes_on_after_a_kill() {
    let scene = Scene::new();
    let mount = scene.mount("none");
    for i in 0..8 {
        mount.read(&format!("a{i}"));
    }
    let here = local(&mount);
    assert!(here > 0);
    send(mount.pid, Signal::SIGKILL);
    eventually("the process is gone", || !alive(mount.pid));
    drop(mount);
    let mount = scene.mount("all");
    eventually("all is here", || prefetched(&mount));
    let status = mount.status();
    assert_eq!(status["local"], status["size"]);
    let fetched = status["fetched"].as_u64().unwrap();
    let missing = status["size"].as_u64().unwrap() - here;
    assert!(fetched <= missing + 64, "{fetched} of {missing} that were missing");
}

#[test]
fn two_processes_with_one_store_fetch_each_span_once() {
    let scene = Scene::new();
    let mounts = [scene.mount("none"), scene.mount("none")];
    std::thread::scope(|scope| {
        for mount in &mounts {
            scope.spawn(move || {
                for i in 0..8 {
                    assert!(mount.read(&format!("a{i}")) == noise(100 + i, FILE));
                }
            });
        }
    });
    let fetched: u64 = mounts.iter().map(|m| m.status()["fetched"].as_u64().unwrap()).sum();
    let whole = u64::try_from(scene.layers[0].bytes.len()).unwrap();
    // Adjacent spans may share a byte of the compressed stream. Both processes fetch such a byte.
    assert!(fetched <= whole + 64, "{fetched} of {whole}");
}

/// Adds a file of this machine to a tar.
fn copy(tar: Tar, path: &Path) -> Tar {
    let name = path.to_str().unwrap().trim_start_matches('/');
    let content = std::fs::read(path).unwrap();
    let header = header(name.as_bytes(), tar::EntryType::Regular, 0o755, content.len() as u64);
    tar.raw(header, &content)
}

#[test]
fn the_libraries_of_a_program_come_with_its_first_bytes() {
    let said = bounded(Command::new("ldd").arg("/bin/bash"));
    let paths = said.text().split_whitespace().filter(|word| word.starts_with('/'));
    let libraries: Vec<&Path> = paths.map(Path::new).collect();
    assert!(libraries.len() >= 2, "{said:?}");
    // The libraries are far from each other, so that no request fetches one by chance.
    let mut tar = copy(Tar::new(), Path::new("/bin/bash"));
    for (i, library) in (0u64..).zip(&libraries) {
        tar = copy(tar.file(format!("filler{i}"), noise(i, 8 << 20)), library);
    }
    let layer = Blob::gzip(&tar.finish());
    let registry = TestRegistry::start();
    push(&registry, "app", "1", std::slice::from_ref(&layer));
    let image = format!("{}/app:1", registry.host());
    let ocifs = Ocifs::knowing(&image);
    let begin = |mount: &Mounted| {
        let mut start = [0; 4];
        std::io::Read::read_exact(&mut std::fs::File::open(mount.join("bin/bash")).unwrap(), &mut start).unwrap();
        assert_eq!(&start, b"\x7fELF");
    };
    let absent = |mount: &Mounted, library: &Path| {
        registry.clear_log();
        let name = library.to_str().unwrap().trim_start_matches('/');
        assert!(mount.read(name) == std::fs::read(library).unwrap(), "{name}");
        registry.count(&layer.path()) > 0
    };
    let come = |mount: &Mounted| {
        let mut before = 0;
        eventually("what comes has come", || {
            let status = mount.status();
            let same = std::mem::replace(&mut before, status["fetched"].as_u64().unwrap()) == status["fetched"];
            same && status["in_flight"]["others"] == 0 && status["in_flight"]["waiting"] == 0
        });
    };
    let mount = ocifs.mount_with(&image, &["--wait", "ready", "--prefetch", "none"]);
    begin(&mount);
    come(&mount);
    for library in &libraries {
        assert!(absent(&mount, library), "{library:?} was not to come");
    }
    drop(mount);
    ocifs.ok(["cache", "drop"]);
    // Mounts with a profile that has no starts.
    let mount = ocifs.mount_with(&image, &["--wait", "ready", "--profile", "new"]);
    begin(&mount);
    come(&mount);
    for library in &libraries {
        assert!(!absent(&mount, library), "{library:?}");
    }
}
