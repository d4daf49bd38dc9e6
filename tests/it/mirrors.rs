//! Registries as the files of the machine describe them: mirrors that work, fail and lie, certificates, headers.

mod certificates;
mod failing;
mod proxies;

use std::fs;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use tempfile::TempDir;

use crate::common::docker_registry::{DockerRegistry, Setup, skopeo_copy};
use crate::common::layers::{Blob, Tar, noise, push};
use crate::common::oci_layout;
use crate::common::ocifs::{Ocifs, Said};
use crate::common::registry::{Guard, Logged, TestRegistry, Tokens};

const SIZE: usize = 200_000;
/// A public key of minisign.
const KEY: &str = "RWQf6LRCGA9i53mlYecO4IzT51TGPpvWucNSCh1CBM0QTaLn73Y7GFO3";

fn layer() -> Blob {
    Blob::gzip(&Tar::new().file("f", noise(4, SIZE)).finish())
}

/// The files of a machine about registries, in a directory of their own.
struct Machine {
    directory: TempDir,
}

impl Machine {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name).display().to_string();
        let settings = format!(
            "containerd-certs-dir = '{}'\nregistries-conf = '{}'\ncerts-dirs = ['{}', '{}']\n",
            at("containerd"),
            at("registries.conf"),
            at("docker"),
            at("containers")
        );
        fs::write(directory.path().join("ocifs.toml"), settings).unwrap();
        Self { directory }
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.directory.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        path
    }

    /// Writes containerd's file for a registry.
    fn hosts(&self, registry: &str, text: &str) {
        self.write(&format!("containerd/{registry}/hosts.toml"), text);
    }

    /// Makes these the mirrors of a registry, as containerd has them.
    fn mirrored(&self, registry: &str, mirrors: &[&str]) {
        let tables: Vec<String> = mirrors
            .iter()
            .map(|mirror| format!("[host.\"http://{mirror}\"]\ncapabilities = [\"pull\", \"resolve\"]\n"))
            .collect();
        self.hosts(registry, &tables.concat());
    }

    /// Returns the program with these files.
    fn ocifs(&self) -> Ocifs {
        let settings = self.directory.path().join("ocifs.toml");
        Ocifs::with(&["--config", settings.to_str().unwrap()])
    }

    fn cat(&self, registry: &str) -> Said {
        self.ocifs().run(["cat", &format!("{registry}/app:1"), "f"])
    }
}

/// Returns a registry with the image `app:1`.
fn registry() -> TestRegistry {
    let registry = TestRegistry::start();
    push(&registry, "app", "1", &[layer()]);
    registry
}

#[track_caller]
fn good(said: &Said) {
    assert!(said.code == Some(0) && said.stdout == noise(4, SIZE), "{}", said.stderr);
}

fn targets(log: &[Logged]) -> Vec<&str> {
    log.iter().map(|logged| logged.target.as_str()).collect()
}

#[test]
fn a_pull_through_cache_has_the_image_without_the_registry() {
    for file in ["hosts.toml", "registries.conf"] {
        let origin = DockerRegistry::start(&Setup::default());
        let directory = tempfile::tempdir().unwrap();
        let image = oci_layout::write(directory.path(), &[layer()]);
        let host = origin.host();
        skopeo_copy(&["--dest-tls-verify=false"], &image, &format!("docker://{host}/app:1"));
        let cache = DockerRegistry::start(&Setup {
            cache_of: Some(format!("http://{host}")),
            ..Setup::default()
        });
        let machine = Machine::new();
        match file {
            "hosts.toml" => machine.mirrored(&host, &[&cache.host()]),
            _ => {
                let mirror = format!("[[registry.mirror]]\nlocation = \"{}\"\n", cache.host());
                machine.write(
                    "registries.conf",
                    &format!("[[registry]]\nlocation = \"{host}\"\n{mirror}"),
                );
            }
        }
        good(&machine.cat(&host));
        assert!(cache.log().contains("/v2/app/blobs/"), "{file}: {}", cache.log());
        // The cache keeps a blob once it has served all of it.
        skopeo_copy(
            &["--src-tls-verify=false"],
            &format!("docker://{}/app:1", cache.host()),
            &format!("dir:{}", directory.path().join("copy").display()),
        );
        drop(origin);
        good(&machine.cat(&host));
        let said = machine
            .ocifs()
            .options(&["--hosts-from", "none"])
            .run(["cat", &format!("{host}/app:1"), "f"]);
        assert_eq!(
            said.code,
            Some(1),
            "{file}: without the mirror there is nobody: {said:?}"
        );
    }
}

#[test]
fn everything_comes_from_the_first_mirror_which_is_told_the_registry() {
    let (origin, first, second) = (registry(), registry(), registry());
    let machine = Machine::new();
    machine.mirrored(&origin.host(), &[&first.host(), &second.host()]);
    good(&machine.cat(&origin.host()));
    assert!(origin.log().is_empty() && second.log().is_empty());
    let log = first.log();
    assert!(log.len() >= 3);
    let told = format!("ns={}", origin.host().replace(':', "%3A"));
    for target in targets(&log) {
        assert!(target.ends_with(&told), "{target}");
    }
    // The registry itself is not told, also if its file names it.
    machine.hosts(&origin.host(), &format!("server = \"http://{}\"\n", origin.host()));
    good(&machine.cat(&origin.host()));
    assert!(targets(&origin.log()).iter().all(|target| !target.contains("ns=")));
}

#[test]
fn the_api_of_a_mirror_may_be_elsewhere() {
    let (origin, mirror) = (registry(), TestRegistry::start());
    push(&mirror, "hub/app", "1", &[layer()]);
    let machine = Machine::new();
    let table = format!("[host.\"http://{}/v2/hub\"]\noverride_path = true\n", mirror.host());
    machine.hosts(&origin.host(), &table);
    good(&machine.cat(&origin.host()));
    assert!(origin.log().is_empty());
    let conf = format!(
        "[[registry]]\nprefix = \"{0}/app\"\nlocation = \"{0}/app\"\n[[registry.mirror]]\nlocation = \"{1}/hub/app\"\n",
        origin.host(),
        mirror.host()
    );
    let machine = Machine::new();
    machine.write("registries.conf", &conf);
    mirror.clear_log();
    good(&machine.cat(&origin.host()));
    assert!(origin.log().is_empty());
    assert!(
        targets(&mirror.log())
            .iter()
            .all(|target| target.starts_with("/v2/hub/app/") && !target.contains("ns="))
    );
}

#[test]
fn a_mirror_that_does_not_resolve_is_not_asked_for_tags() {
    for file in ["hosts.toml", "registries.conf"] {
        let (origin, mirror) = (registry(), registry());
        let machine = Machine::new();
        match file {
            "hosts.toml" => machine.hosts(
                &origin.host(),
                &format!("[host.\"http://{}\"]\ncapabilities = [\"pull\"]\n", mirror.host()),
            ),
            _ => {
                let text = format!(
                    "[[registry]]\nlocation = \"{}\"\n[[registry.mirror]]\nlocation = \"{}\"\npull-from-mirror = \"digest-only\"\n",
                    origin.host(),
                    mirror.host()
                );
                machine.write("registries.conf", &text);
            }
        }
        good(&machine.cat(&origin.host()));
        assert_eq!(targets(&origin.log()), ["/v2/app/manifests/1"], "{file}");
        let asked = mirror.log();
        assert!(asked.iter().all(|logged| logged.target.contains("/blobs/")), "{file}");
        assert!(asked.len() >= 2, "{file}");
    }
}

#[test]
fn a_registry_may_be_blocked() {
    let origin = registry();
    let machine = Machine::new();
    let text = format!("[[registry]]\nlocation = \"{}\"\nblocked = true\n", origin.host());
    let path = machine.write("registries.conf", &text);
    let said = machine.cat(&origin.host());
    assert_eq!(said.code, Some(1));
    assert!(said.stderr.contains(&format!("{} blocks", path.display())), "{said:?}");
    assert!(origin.log().is_empty());
}

#[test]
fn files_that_say_nothing_of_a_registry_cost_no_request() {
    let asked = |ocifs: Ocifs| {
        let origin = registry();
        good(&ocifs.run(["cat", &format!("{}/app:1", origin.host()), "f"]));
        let log = origin.log();
        log.iter()
            .map(|logged| (logged.method.clone(), logged.target.clone()))
            .collect::<Vec<_>>()
    };
    let without = asked(Ocifs::with(&["--hosts-from", "none"]));
    assert_eq!(asked(Machine::new().ocifs()), without);
    let machine = Machine::new();
    machine.mirrored("other.lan", &["mirror.lan"]);
    machine.write("registries.conf", "[[registry]]\nlocation = \"third.lan\"\n");
    assert_eq!(asked(machine.ocifs()), without);
}

/// Writes a file of logins with these hosts. Returns its directory.
fn logins(directory: &Path, hosts: &[(&str, &str)]) -> PathBuf {
    let entries: Vec<(String, serde_json::Value)> = hosts
        .iter()
        .map(|(host, login)| {
            let auth = base64::engine::general_purpose::STANDARD.encode(login);
            (host.to_string(), serde_json::json!({ "auth": auth }))
        })
        .collect();
    let auths: serde_json::Map<String, serde_json::Value> = entries.into_iter().collect();
    fs::write(
        directory.join("config.json"),
        serde_json::json!({ "auths": auths }).to_string(),
    )
    .unwrap();
    directory.to_owned()
}

#[test]
fn a_mirror_gets_its_own_login_and_no_other() {
    for guard in [
        Guard::Basic("mirror".to_owned(), "hunter2".to_owned()),
        Guard::Bearer(Tokens {
            login: Some(("mirror".to_owned(), "hunter2".to_owned())),
            ..Tokens::default()
        }),
    ] {
        let (origin, mirror) = (registry(), registry());
        origin.guard(Guard::Basic("origin".to_owned(), "s3cret".to_owned()));
        mirror.guard(guard.clone());
        let machine = Machine::new();
        machine.mirrored(&origin.host(), &[&mirror.host()]);
        let home = tempfile::tempdir().unwrap();
        let cat = || {
            let ocifs = machine.ocifs().env("DOCKER_CONFIG", home.path());
            ocifs.run(["cat", "-vv", &format!("{}/app:1", origin.host()), "f"])
        };
        logins(home.path(), &[(&origin.host(), "origin:s3cret")]);
        let said = cat();
        good(&said);
        assert!(!said.stderr.contains("s3cret"));
        let sent = |registry: &TestRegistry| {
            let log = registry.log();
            log.iter()
                .filter_map(|logged| logged.headers.get("authorization").cloned())
                .collect::<Vec<_>>()
        };
        let of_origin = base64::engine::general_purpose::STANDARD.encode("origin:s3cret");
        assert!(
            sent(&mirror).iter().all(|value| !value.contains(&of_origin)),
            "{guard:?}"
        );
        assert!(sent(&origin).iter().all(|value| value.contains(&of_origin)));
        assert!(
            !sent(&origin).is_empty(),
            "the mirror refused, so the registry was asked"
        );

        origin.clear_log();
        logins(
            home.path(),
            &[(&origin.host(), "origin:s3cret"), (&mirror.host(), "mirror:hunter2")],
        );
        good(&cat());
        assert!(origin.log().is_empty(), "{guard:?}: the mirror has everything");
    }
}

#[test]
fn headers_go_to_the_mirror_alone() {
    let (origin, mirror, storage) = (registry(), registry(), registry());
    mirror.redirect_blobs(&storage, usize::MAX, "", 1);
    let machine = Machine::new();
    let host = mirror.host();
    machine.hosts(
        &origin.host(),
        &format!(
            "[host.\"http://{host}\"]\n[host.\"http://{host}\".header]\nX-Team = \"s3cret\"\nX-More = [\"a\", \"b\"]\n"
        ),
    );
    let image = format!("{}/app:1", origin.host());
    let said = machine.ocifs().run(["cat", "-vv", &image, "f"]);
    good(&said);
    assert!(!said.stderr.contains("s3cret"), "{}", said.stderr);
    assert!(mirror.log().iter().all(|logged| logged.headers["x-team"] == "s3cret"));
    let stored = storage.log();
    assert!(!stored.is_empty() && stored.iter().all(|logged| !logged.headers.contains_key("x-team")));
    mirror.fault("/", usize::MAX, crate::common::registry::Fault::status(503));
    good(&machine.ocifs().run(["cat", &image, "f"]));
    let asked = origin.log();
    assert!(!asked.is_empty() && asked.iter().all(|logged| !logged.headers.contains_key("x-team")));
}

#[test]
fn indexes_come_by_way_of_mirrors_and_go_to_the_registry() {
    let (origin, registry, mirror) = (registry(), TestRegistry::start(), TestRegistry::start());
    let machine = Machine::new();
    machine.mirrored(&registry.host(), &[&mirror.host()]);
    let image = format!("{}/app:1", origin.host());
    let place = format!("oci://{}/indexes", registry.host());
    machine.ocifs().ok(["index", "push", &image, &place]);
    assert!(mirror.log().is_empty());
    assert!(registry.log().iter().any(|logged| logged.method == "PUT"));
    let ask = |trust: &[&str]| {
        registry.clear_log();
        mirror.clear_log();
        let ocifs = machine.ocifs().options(&["--index", &place]).options(trust);
        drop(ocifs.mount(&image));
        (registry.log().len(), mirror.log().len())
    };
    let (of_registry, of_mirror) = ask(&["--index-key", KEY]);
    assert!(
        of_registry > 0 && of_mirror > 0,
        "the mirror does not have it: {of_registry} {of_mirror}"
    );
    let (of_registry, of_mirror) = ask(&["--index-trust-location"]);
    assert!(of_registry > 0 && of_mirror == 0, "only the location itself is trusted");
}
