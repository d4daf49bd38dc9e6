//! Arguments that are not images, and platforms that an image does not have.

use std::fs;
use std::path::Path;

use crate::common::closed_port::ClosedPort;
use crate::common::layers::{Blob, Tar, config, descriptor, push_with};
use crate::common::oci_layout;
use crate::common::ocifs::{Ocifs, tool};
use crate::common::registry::{INDEX, TestRegistry};

fn layer() -> Blob {
    Blob::gzip(&Tar::new().file("hello", b"hello, world\n").finish())
}

/// Runs a command about an image in a directory of its own. Returns its error.
fn error(directory: &Path, image: &str) -> String {
    let ocifs = Ocifs::with(&["--timeout", "1s"]);
    let mut command = ocifs.command(["ls", image]);
    // A proxy that refuses connections keeps the command from the network.
    let closed = ClosedPort::new();
    let nowhere = format!("http://{}", closed.address());
    command
        .current_dir(directory)
        .env("https_proxy", &nowhere)
        .env("http_proxy", &nowhere);
    let said = crate::common::ocifs::bounded(&mut command);
    assert_eq!(said.code, Some(1), "{image}: {said:?}");
    assert_eq!(said.stderr.lines().count(), 1, "{said:?}");
    said.stderr
}

#[test]
fn a_path_in_place_of_an_image_is_looked_at() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    oci_layout::write(&directory.path().join("layout"), &[layer()]);
    let pack = |name: &str, files: &[&str], option: &str| {
        let root = directory.path().join(format!("{name}.d"));
        for file in files {
            let path = root.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "[]").unwrap();
        }
        tool("tar", ["-C", root.to_str().unwrap(), option, &at(name), "."]);
    };
    pack("saved.tar", &["abc/layer.tar", "manifest.json"], "-cf");
    pack("saved.tgz", &["abc/layer.tar", "manifest.json"], "-czf");
    pack("oci.tar", &["blobs/x", "oci-layout", "index.json"], "-cf");
    pack("other.tar", &["a", "b"], "-cf");
    fs::write(at("text"), "FROM scratch\n").unwrap();
    fs::write(at("empty"), "").unwrap();
    fs::create_dir(at("plain")).unwrap();
    fs::create_dir(at("skopeo")).unwrap();
    fs::write(at("skopeo/manifest.json"), "{}").unwrap();
    fs::write(at("skopeo/version"), "Directory Transport Version: 1.1\n").unwrap();
    for (image, words) in [
        ("layout", &["`layout` is an OCI layout", "write oci:layout"][..]),
        ("layout:v1", &["write oci:layout:v1"]),
        ("./layout/", &["write oci:./layout/"]),
        (&at("layout"), &[&format!("write oci:{}", at("layout"))]),
        ("saved.tar", &["a docker archive", "write docker-archive:saved.tar"]),
        ("./saved.tar", &["write docker-archive:./saved.tar"]),
        ("./saved.tgz", &["compressed", "write docker-archive:./saved.tgz"]),
        ("saved.tar.d", &["unpacked docker archive", "tar"]),
        ("oci.tar", &["an OCI archive", "write oci-archive:oci.tar"]),
        ("other.tar", &["a tar archive, but none of an image"]),
        ("plain", &["a directory, but no OCI layout"]),
        ("skopeo", &["skopeo copy"]),
        ("./text", &["no image", "oci:DIR", "docker-archive:FILE"]),
        ("./empty", &["no image"]),
    ] {
        let said = error(directory.path(), image);
        for word in words {
            assert!(said.contains(word), "{image}: {said}");
        }
    }
    let said = error(directory.path(), "./missing");
    assert!(!said.contains("on this machine"), "{said}");
}

#[test]
fn a_platform_that_the_image_does_not_have_is_an_error() {
    let registry = TestRegistry::start();
    let mut foreign = config(&[layer()]);
    foreign["architecture"] = "s390x".into();
    let digest = push_with(&registry, "app", "s390x", &[layer()], &foreign);
    let mut silent = config(&[layer()]);
    silent["architecture"] = "".into();
    push_with(&registry, "app", "silent", &[layer()], &silent);
    let entry = |platform: Option<&str>| {
        let mut entry = descriptor(crate::common::registry::MANIFEST, b"");
        entry["digest"] = digest.to_string().into();
        entry["size"] = (-1).into();
        if let Some(architecture) = platform {
            entry["platform"] = serde_json::json!({"os": "linux", "architecture": architecture});
        }
        entry
    };
    for (tag, platform) in [("index", Some("s390x")), ("bare", None)] {
        let index = serde_json::json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [entry(platform)]});
        registry.add_manifest("app", Some(tag), INDEX, index.to_string());
    }
    let ocifs = Ocifs::new();
    for tag in ["s390x", "index", "bare"] {
        let image = format!("{}/app:{tag}", registry.host());
        ocifs.ok(["ls", "--platform", "linux/s390x", &image]);
        for wrong in ["linux/arm64", "linux/s309x", "s390", "linux-s390x", "windows/s390x"] {
            let error = ocifs.fails(["ls", "--platform", wrong, &image]);
            assert!(error.contains("linux/s390x"), "{tag} {wrong}: {error}");
            let error = ocifs.mount_fails(&image, &["--platform", wrong]);
            assert!(error.contains("linux/s390x"), "{tag} {wrong}: {error}");
        }
    }
    // Without `--platform`, the only image is used. With it, an image that does not name its platform is used too.
    let image = format!("{}/app:s390x", registry.host());
    assert!(ocifs.ok(["ls", &image]).stderr.contains("another platform"));
    assert_eq!(ocifs.ok(["-q", "ls", &image]).stderr, "");
    ocifs.ok([
        "ls",
        "--platform",
        "linux/arm64",
        &format!("{}/app:silent", registry.host()),
    ]);
}

#[test]
fn a_local_image_of_another_platform_is_refused_to_who_wants_one() {
    let directory = tempfile::tempdir().unwrap();
    let image = oci_layout::write(directory.path(), &[layer()]);
    let error = Ocifs::new().fails(["inspect", "--platform", "linux/mips64le", &image]);
    assert!(
        error.contains("linux/mips64le") && error.contains("there is only one, for linux/"),
        "{error}"
    );
}
