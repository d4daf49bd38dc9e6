//! Signatures, and places that are trusted without one.

use std::os::unix::fs::PermissionsExt as _;

use super::{Keys, Scene, authorities, files, trusting};
use crate::common::ocifs::Ocifs;
use crate::common::registry::TestRegistry;

#[test]
fn a_signed_index_is_believed_from_anywhere() {
    let scene = Scene::new();
    let indexes = scene.indexes();
    let keys = Keys::new();
    keys.sign(indexes.path());
    // Anybody may write here, and the key is what counts.
    std::fs::set_permissions(indexes.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
    let location = indexes.path().to_str().unwrap();
    let mount = keys.believing(location).mount(&scene.image);
    assert_eq!(authorities(&mount), ["key ci"; 3]);
    scene.check(&mount);
    drop(mount);
    // Through a registry, with the signatures in the list.
    let target = TestRegistry::start();
    let place = format!("oci://{}/indexes", target.host());
    Ocifs::new().ok(["index", "push", &scene.image, &place, "--from", location]);
    let host = keys.believing(&place);
    let mount = host.mount(&scene.image);
    assert_eq!(authorities(&mount), ["key ci"; 3]);
    scene.check(&mount);
}

#[test]
fn an_index_is_not_believed_without_the_right_signature() {
    let scene = Scene::new();
    let (keys, others) = (Keys::new(), Keys::new());
    let unsigned = scene.indexes();
    let by_another = scene.indexes();
    others.sign(by_another.path());
    let changed = scene.indexes();
    keys.sign(changed.path());
    for (name, mut bytes) in files(changed.path()) {
        if name.ends_with(".ocifs") {
            bytes[100] ^= 1;
            std::fs::write(changed.path().join(name), bytes).unwrap();
        }
    }
    // A signature of another file.
    let swapped = scene.indexes();
    keys.sign(swapped.path());
    let signatures: Vec<_> = files(swapped.path())
        .into_iter()
        .filter(|(name, _)| name.ends_with(".minisig"))
        .collect();
    for (i, (name, _)) in signatures.iter().enumerate() {
        std::fs::write(swapped.path().join(name), &signatures[(i + 1) % signatures.len()].1).unwrap();
    }
    for (what, directory) in [
        ("unsigned", &unsigned),
        ("by another key", &by_another),
        ("changed", &changed),
        ("swapped", &swapped),
    ] {
        let host = keys.believing(directory.path().to_str().unwrap());
        let mount = host.mount(&scene.image);
        assert_eq!(authorities(&mount), ["pass"; 3], "{what}");
        assert!(mount.log().contains("sign"), "{what}: {}", mount.log());
        scene.check(&mount);
    }
}

#[test]
fn a_directory_that_others_can_change_is_not_trusted() {
    let scene = Scene::new();
    let indexes = scene.indexes();
    let location = indexes.path().to_str().unwrap();
    std::fs::set_permissions(indexes.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
    let mount = trusting(location).mount(&scene.image);
    assert_eq!(authorities(&mount), ["pass"; 3]);
    assert!(mount.log().contains("others can write to it"), "{}", mount.log());
}

#[test]
fn a_location_says_who_is_believed() {
    let scene = Scene::new();
    let error = Ocifs::with(&["--index", "/srv/indexes"]).fails(["inspect", &scene.image]);
    assert!(
        error.contains("--index-key") && error.contains("--index-trust-location"),
        "{error}"
    );
    let error =
        Ocifs::with(&["--index", "http://127.0.0.1/x/", "--index-trust-location"]).fails(["inspect", &scene.image]);
    assert!(error.contains("TLS"), "{error}");
    let error = Ocifs::with(&["--index", "s3://x", "--index-trust-location"]).fails(["inspect", &scene.image]);
    assert!(error.contains("oci://HOST/REPOSITORY"), "{error}");
    let error = Ocifs::with(&["--index", "/x", "--index-key", "/no/such.pub"]).fails(["inspect", &scene.image]);
    assert!(error.contains("/no/such.pub"), "{error}");
}

#[test]
fn the_configuration_file_names_locations() {
    let scene = Scene::new();
    let indexes = scene.indexes();
    let keys = Keys::new();
    keys.sign(indexes.path());
    let file = tempfile::NamedTempFile::new().unwrap();
    let location = indexes.path().to_str().unwrap();
    let config =
        |index: &str| std::fs::write(file.path(), format!("[[index]]\nlocation = \"{location}\"\n{index}\n")).unwrap();
    let path = file.path().to_str().unwrap().to_owned();
    config(&format!("key = \"{}\"", keys.public()));
    let mount = Ocifs::with(&["--config", &path]).mount(&scene.image);
    assert_eq!(authorities(&mount), ["key ci"; 3]);
    drop(mount);
    config("trust = \"location\"");
    let mount = Ocifs::with(&["--config", &path]).mount(&scene.image);
    assert_eq!(authorities(&mount), vec![format!("location {location}"); 3]);
    drop(mount);
    config("");
    let error = Ocifs::with(&["--config", &path]).fails(["inspect", &scene.image]);
    assert!(error.contains("trust = \"location\""), "{error}");
}
