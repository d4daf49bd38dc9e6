//! Pushes: nothing bad is pushed, nothing good is lost. And `verify` compares all that a place has.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use super::damage::{forge, shift};
use super::{Keys, Scene, authorities, files, trusting};
use crate::common::layers::push;
use crate::common::ocifs::{Ocifs, bounded};
use crate::common::registry::TestRegistry;

fn name(scene: &Scene, layer: usize) -> String {
    format!("sha256-{}.ocifs", scene.layers[layer].digest().hex())
}

#[test]
fn only_usable_indexes_are_pushed() {
    let scene = Scene::new();
    let place = scene.indexes();
    let before = files(place.path());
    let host = Ocifs::new();
    let push = |from: &Path| {
        let from = from.to_str().unwrap();
        let place = place.path().to_str().unwrap();
        let push = ["index", "push", "--replace", &scene.image, place, "--from", from];
        host.fails(push)
    };
    let cut = scene.indexes();
    let path = cut.path().join(name(&scene, 1));
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..300]).unwrap();
    assert!(push(cut.path()).contains(&name(&scene, 1)));
    let swapped = scene.indexes();
    std::fs::write(swapped.path().join(name(&scene, 0)), &bytes).unwrap();
    assert!(push(swapped.path()).contains("of another layer"));
    let odd = scene.indexes();
    forge(odd.path(), &scene.layers[0], |file| file.toc.clear());
    assert!(push(odd.path()).contains(&name(&scene, 0)));
    let fifo = scene.indexes();
    std::fs::remove_file(fifo.path().join(name(&scene, 2))).unwrap();
    nix::unistd::mkfifo(&fifo.path().join(name(&scene, 2)), nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(push(fifo.path()).contains("no regular file"));
    assert!(files(place.path()) == before);
}

#[test]
fn a_push_of_a_directory_may_lack_some_indexes_and_not_all() {
    let scene = Scene::new();
    let from = scene.indexes();
    std::fs::remove_file(from.path().join(name(&scene, 1))).unwrap();
    let place = tempfile::tempdir().unwrap();
    let push = |from: &Path| {
        let (place, from) = (place.path().to_str().unwrap(), from.to_str().unwrap());
        Ocifs::new().run(["index", "push", "--json", &scene.image, place, "--from", from])
    };
    let said = push(from.path());
    assert_eq!(said.json()["written"], 2);
    assert!(said.stderr.contains(&name(&scene, 1)), "{said:?}");
    let nothing = tempfile::tempdir().unwrap();
    let said = push(nothing.path());
    assert_eq!(said.code, Some(1));
    assert!(said.stderr.contains("no index of this image"), "{said:?}");
}

#[test]
fn a_push_without_signatures_keeps_those_that_are_there() {
    let scene = Scene::new();
    let keys = Keys::new();
    let signed = scene.indexes();
    keys.sign(signed.path());
    let target = TestRegistry::start();
    let repository = format!("oci://{}/indexes", target.host());
    let directory = tempfile::tempdir().unwrap();
    for place in [&*repository, directory.path().to_str().unwrap()] {
        let host = Ocifs::new();
        let from = signed.path().to_str().unwrap();
        host.ok(["index", "push", &scene.image, place, "--from", from]);
        let again = host.ok(["index", "push", "--json", &scene.image, place]).json();
        assert_eq!((&again["written"], &again["present"]), (&0.into(), &3.into()));
        let mount = keys.believing(place).mount(&scene.image);
        assert_eq!(authorities(&mount), ["key ci"; 3], "{place}");
    }
}

#[test]
fn other_bytes_are_overwritten_only_on_request() {
    let scene = Scene::new();
    let keys = Keys::new();
    let other = scene.indexes();
    forge(other.path(), &scene.layers[0], shift);
    keys.sign(other.path());
    let target = TestRegistry::start();
    let repository = format!("oci://{}/indexes", target.host());
    let directory = tempfile::tempdir().unwrap();
    for place in [&*repository, directory.path().to_str().unwrap()] {
        let host = Ocifs::new();
        let from = other.path().to_str().unwrap();
        host.ok(["index", "push", &scene.image, place, "--from", from]);
        let error = host.fails(["index", "push", &scene.image, place]);
        assert!(
            error.contains("--replace") && error.contains(&name(&scene, 0)),
            "{error}"
        );
        let mount = keys.believing(place).mount(&scene.image);
        assert_eq!(authorities(&mount), ["key ci"; 3], "{place}");
        drop(mount);
        let pushed = host.ok(["index", "push", "--json", "--replace", &scene.image, place]);
        assert_eq!(pushed.json()["written"], 1);
        // The signature of the other bytes is gone, and those of the rest are there.
        let mount = keys.believing(place).mount(&scene.image);
        assert_eq!(authorities(&mount), ["pass", "key ci", "key ci"], "{place}");
        assert!(mount.log().contains("has no signature"), "{}", mount.log());
        trusting(place).ok(["index", "verify", &scene.image]);
    }
    assert!(!directory.path().join(format!("{}.minisig", name(&scene, 0))).exists());
}

#[test]
fn a_foreign_manifest_is_overwritten_only_on_request() {
    let scene = Scene::new();
    let target = TestRegistry::start();
    let place = format!("oci://{}/indexes", target.host());
    let host = Ocifs::new();
    let digest = host.ok(["inspect", "--json", &scene.image]).json()["digest"].clone();
    let tag = format!("ocifs1-{}", digest.as_str().unwrap().replacen(':', "-", 1));
    push(&target, "indexes", &tag, &scene.layers[..1]);
    let error = host.fails(["index", "push", &scene.image, &place]);
    assert!(error.contains("--replace") && error.contains(&tag), "{error}");
    host.ok(["index", "push", "--replace", &scene.image, &place]);
    let mount = trusting(&place).mount(&scene.image);
    assert_eq!(authorities(&mount), vec![format!("location {place}"); 3]);
}

#[test]
fn a_built_directory_is_trusted_whatever_the_umask() {
    let scene = Scene::new();
    let above = tempfile::tempdir().unwrap();
    let directory = above.path().join("indexes");
    let host = Ocifs::new();
    let build = host.command(["index", "build", &scene.image, "-o", directory.to_str().unwrap()]);
    let mut shell = std::process::Command::new("sh");
    shell
        .args(["-c", "umask 002; exec \"$@\"", "sh"])
        .arg(build.get_program());
    shell.args(build.get_args());
    let set = build.get_envs().filter_map(|(name, value)| Some((name, value?)));
    shell.envs(set);
    assert_eq!(bounded(&mut shell).code, Some(0));
    assert_eq!(
        std::fs::metadata(&directory).unwrap().permissions().mode() & 0o777,
        0o755
    );
    let location = directory.to_str().unwrap();
    let mount = trusting(location).mount(&scene.image);
    assert_eq!(authorities(&mount), vec![format!("location {location}"); 3]);
}

#[test]
fn verify_compares_all_places_although_one_cannot_be_asked() {
    let scene = Scene::new();
    let liar = scene.indexes();
    forge(liar.path(), &scene.layers[0], shift);
    let lying = liar.path().to_str().unwrap();
    let host = trusting(lying);
    drop(host.mount(&scene.image));
    let closed = "https://127.0.0.1:1/";
    for order in [[closed, lying], [lying, closed]] {
        let host =
            Ocifs::at(host.store()).options(&["--index", order[0], "--index", order[1], "--index-trust-location"]);
        let said = host.run(["index", "verify", "--json", &scene.image]);
        assert_eq!(said.code, Some(1), "{said:?}");
        let said = said.json();
        assert_eq!(said["differences"].as_array().unwrap().len(), 1, "{said}");
        assert_eq!(said["differences"][0]["location"], lying);
        assert_eq!(said["troubles"].as_array().unwrap().len(), 3, "{said}");
    }
    // A place that cannot be asked is no difference, and still no success.
    let host = trusting(closed);
    let said = host.run(["index", "verify", &scene.image]);
    assert_eq!(said.code, Some(1));
    assert!(said.stderr.contains("cannot be asked"), "{said:?}");
}

#[test]
fn verify_finds_what_only_the_list_of_a_layer_says() {
    let scene = Scene::new();
    let target = TestRegistry::start();
    let place = format!("oci://{}/indexes", target.host());
    let host = Ocifs::new();
    host.ok(["index", "push", &scene.image, &place]);
    // Another image has the layer too. Pushing its indexes changes the list of the layer, and not that of the first image.
    push(&scene.registry, "other", "1", &scene.layers[..1]);
    let other = format!("{}/other:1", scene.registry.host());
    let lies = scene.indexes();
    forge(lies.path(), &scene.layers[0], shift);
    let from = lies.path().to_str().unwrap();
    host.ok(["index", "push", "--replace", &other, &place, "--from", from]);
    let said = trusting(&place).run(["index", "verify", "--json", &scene.image]);
    assert_eq!(said.code, Some(1), "{said:?}");
    let said = said.json();
    assert_eq!(said["differences"].as_array().unwrap().len(), 1, "{said}");
    assert_eq!(said["differences"][0]["layer"], scene.layers[0].digest().to_string());
}
