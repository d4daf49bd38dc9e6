//! Images that cannot be mounted, and the errors: names that do not exist, images that are none, broken and hostile
//! layers.

use std::io::Write as _;

use nix::errno::Errno;
use ocifs::oci::Digest;
use serde_json::json;

use crate::common::closed_port::ClosedPort;
use crate::common::layers::{Blob, Tar, config, descriptor, header, manifest, noise, push, push_with};
use crate::common::ocifs::Ocifs;
use crate::common::registry::{Fault, Guard, INDEX, MANIFEST, TestRegistry, architecture};

const FILE: usize = 256 << 10;

#[test]
fn unknown_names_are_answered_with_what_exists() {
    let registry = TestRegistry::start();
    push(
        &registry,
        "app",
        "1.0",
        &[Blob::plain(Tar::new().file("x", "x").finish())],
    );
    let host = registry.host();
    let ocifs = Ocifs::new();
    let error = ocifs.mount_fails(&format!("{host}/app:2.0"), &[]);
    assert!(
        error.contains("app:2.0") && error.contains("not found") && error.contains("1.0"),
        "{error}"
    );
    let error = ocifs.mount_fails(&format!("{host}/missing:1.0"), &[]);
    assert!(error.contains("missing") && error.contains("not found"), "{error}");
    let error = ocifs.mount_fails("not a reference", &[]);
    assert!(error.contains("not a reference"), "{error}");

    let platform = |architecture: &str| {
        let layer = Blob::plain(Tar::new().file("arch", architecture).finish());
        let mut config = config(std::slice::from_ref(&layer));
        config["architecture"] = architecture.into();
        let config = config.to_string().into_bytes();
        let manifest = manifest(&config, std::slice::from_ref(&layer)).to_string();
        registry.add_blob(config);
        registry.add_blob(layer.bytes);
        registry.add_manifest("multi", None, MANIFEST, manifest.clone());
        let mut descriptor = descriptor(MANIFEST, manifest.as_bytes());
        descriptor["platform"] = json!({"os": "linux", "architecture": architecture});
        descriptor
    };
    let manifests = [platform("s390x"), platform(architecture())];
    let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests});
    registry.add_manifest("multi", Some("1"), INDEX, index.to_string());
    let multi = format!("{host}/multi:1");
    let error = ocifs.mount_fails(&multi, &["--platform", "linux/riscv64"]);
    assert!(
        error.contains("linux/riscv64") && error.contains("linux/s390x"),
        "{error}"
    );
    let mount = ocifs.mount_with(&multi, &["--wait", "ready", "--platform", "linux/s390x"]);
    assert_eq!(mount.read("arch"), b"s390x");
    let mount = ocifs.mount(&multi);
    assert_eq!(mount.read("arch"), architecture().as_bytes());
}

#[test]
fn unreachable_and_unwilling_registries_are_named() {
    let ocifs = Ocifs::with(&["--timeout", "5s"]);
    let closed = ClosedPort::new();
    let host = closed.address().to_string();
    let error = ocifs.mount_fails(&format!("{host}/app:1"), &[]);
    assert!(error.contains("cannot reach") && error.contains(&host), "{error}");
    let error = ocifs.mount_fails("registry.invalid/app:1", &[]);
    assert!(error.contains("registry.invalid"), "{error}");

    let registry = TestRegistry::start();
    push(
        &registry,
        "app",
        "1",
        &[Blob::plain(Tar::new().file("x", "x").finish())],
    );
    let host = registry.host();
    let image = format!("{host}/app:1");
    registry.guard(Guard::Basic("me".into(), "secret".into()));
    let docker = ocifs.home().join(".docker");
    std::fs::create_dir(&docker).unwrap();
    // A file without a login for this registry, so that files of this machine do not matter.
    std::fs::write(docker.join("config.json"), r#"{"auths": {}}"#).unwrap();
    let error = ocifs.mount_fails(&image, &[]);
    assert!(
        error.contains("wants a login") && error.contains(".docker/config.json has no entry for"),
        "{error}"
    );
    let login = |password: &str| {
        use base64::Engine as _;
        let auth = base64::engine::general_purpose::STANDARD.encode(format!("me:{password}"));
        std::fs::write(
            docker.join("config.json"),
            json!({"auths": {host.clone(): {"auth": auth}}}).to_string(),
        )
        .unwrap();
    };
    login("wrong");
    let error = ocifs.mount_fails(&image, &[]);
    assert!(
        error.contains("wants a login") && error.contains(".docker/config.json"),
        "{error}"
    );
    assert!(!error.contains("wrong"), "{error}");
    login("secret");
    assert_eq!(ocifs.mount(&image).read("x"), b"x");
    // The login is right but has no access to this repository.
    let challenge = Fault::Status {
        code: 401,
        headers: vec![("WWW-Authenticate".to_owned(), "Basic realm=\"test\"".to_owned())],
        body: String::new(),
    };
    registry.fault("/manifests/", 1, challenge);
    registry.fault("/manifests/", usize::MAX, Fault::status(403));
    let error = ocifs.mount_fails(&image, &[]);
    assert!(
        error.contains("denies access") && error.contains(".docker/config.json"),
        "{error}"
    );
}

/// Mounts an image whose only layer is these bytes, without success. Returns the error. The same tag then gets a good
/// layer, which must mount in spite of the earlier failure.
fn bad_layer(bytes: Vec<u8>, media_type: &'static str, diff_id: Digest) -> String {
    let registry = TestRegistry::start();
    let blob = Blob {
        bytes,
        media_type,
        diff_id,
    };
    push(&registry, "app", "1", std::slice::from_ref(&blob));
    let image = format!("{}/app:1", registry.host());
    let ocifs = Ocifs::new();
    let error = ocifs.mount_fails(&image, &[]);
    assert!(error.contains(&blob.digest().to_string()), "which layer: {error}");
    // A mount without `--wait` fails every operation and reports the reason.
    let mount = ocifs.mount_with(&image, &[]);
    assert_eq!(mount.read_error("x"), Errno::EIO as i32);
    let status = mount.status();
    assert_eq!(status["state"], "failed");
    assert_eq!(status["problem"].as_str(), Some(error.as_str()));
    drop(mount);
    push(
        &registry,
        "app",
        "1",
        &[Blob::gzip(&Tar::new().file("x", "good").finish())],
    );
    assert_eq!(ocifs.mount(&image).read("x"), b"good");
    error
}

fn some_tar() -> Vec<u8> {
    (0..3)
        .fold(Tar::new(), |tar, i| tar.file(format!("f{i}"), noise(i, FILE)))
        .finish()
}

const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";

#[test]
fn broken_layers_are_refused() {
    let tar = some_tar();
    let good = Blob::gzip(&tar);
    let error = bad_layer(good.bytes.clone(), GZIP, Digest::of(b"something else"));
    assert!(
        error.contains("diffID") && error.contains(&good.diff_id.to_string()),
        "{error}"
    );

    let cut = good.bytes[..good.bytes.len() / 2].to_vec();
    let error = bad_layer(cut, GZIP, good.diff_id.clone());
    assert!(error.contains("decompress"), "{error}");

    let mut flipped = good.bytes.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 0x40;
    bad_layer(flipped, GZIP, good.diff_id.clone());

    let zstd = Blob::zstd(&tar);
    let cut = zstd.bytes[..zstd.bytes.len() - 100].to_vec();
    let error = bad_layer(cut, ZSTD, zstd.diff_id.clone());
    assert!(error.contains("decompress"), "{error}");

    let text = noise(1, 100_000);
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(&text).unwrap();
    let error = bad_layer(encoder.finish().unwrap(), GZIP, Digest::of(&text));
    assert!(error.contains("tar"), "{error}");

    let mut cut_tar = tar.clone();
    cut_tar.truncate(FILE);
    let blob = Blob::gzip(&cut_tar);
    let error = bad_layer(blob.bytes, GZIP, blob.diff_id);
    assert!(error.contains("truncated tar"), "{error}");
}

#[test]
fn documents_and_blobs_that_do_not_match_their_digests_are_refused() {
    let ocifs = Ocifs::new();
    let registry = TestRegistry::start();
    let layer = Blob::gzip(&some_tar());
    let digest = push(&registry, "app", "1", std::slice::from_ref(&layer));
    let image = format!("{}/app:1", registry.host());
    let pinned = format!("{}/app@{digest}", registry.host());
    registry.fault("/manifests/", usize::MAX, Fault::Corrupt(20));
    let error = ocifs.mount_fails(&pinned, &[]);
    assert!(error.contains(&digest.to_string()), "{error}");
    registry.clear_faults();
    let config = Digest::of(config(std::slice::from_ref(&layer)).to_string().as_bytes());
    registry.fault(&config.to_string(), usize::MAX, Fault::Corrupt(20));
    let error = ocifs.mount_fails(&image, &[]);
    assert!(
        error.contains(&config.to_string()) && error.contains("corrupt"),
        "{error}"
    );
    registry.clear_faults();
    // Decoders ignore this byte of the gzip header, so only the digest shows the damage.
    registry.fault(&layer.path(), usize::MAX, Fault::Corrupt(4));
    let error = ocifs.mount_fails(&image, &[]);
    assert!(
        error.contains(&layer.digest().to_string()) && error.contains("corrupt"),
        "{error}"
    );
    registry.clear_faults();
    let mount = ocifs.mount(&image);
    assert!(mount.read("f1") == noise(1, FILE));
}

#[test]
fn what_is_no_image_is_refused_with_a_reason() {
    let registry = TestRegistry::start();
    let ocifs = Ocifs::new();
    let layer = Blob::gzip(&some_tar());
    registry.add_blob(layer.bytes.clone());
    let image_config = config(std::slice::from_ref(&layer)).to_string().into_bytes();
    registry.add_blob(image_config.clone());
    let helm = br#"{"name":"chart","version":"1.0.0","apiVersion":"v2"}"#.to_vec();
    registry.add_blob(helm.clone());

    let schema1 =
        json!({"schemaVersion": 1, "name": "app", "tag": "1", "architecture": "amd64", "fsLayers": [], "history": []});
    let mut encrypted = manifest(&image_config, std::slice::from_ref(&layer));
    encrypted["layers"][0]["mediaType"] = "application/vnd.oci.image.layer.v1.tar+gzip+encrypted".into();
    let mut chart = manifest(&helm, std::slice::from_ref(&layer));
    chart["config"]["mediaType"] = "application/vnd.cncf.helm.config.v1+json".into();
    chart["layers"][0]["mediaType"] = "application/vnd.cncf.helm.chart.content.v1.tar+gzip".into();
    let cases = [
        (
            "schema1",
            "application/vnd.docker.distribution.manifest.v1+prettyjws",
            schema1,
            "schema 1",
        ),
        ("encrypted", MANIFEST, encrypted, "encrypted"),
        ("chart", MANIFEST, chart, "elm"),
    ];
    for (name, media_type, document, expected) in cases {
        registry.add_manifest(name, Some("1"), media_type, document.to_string());
        let error = ocifs.mount_fails(&format!("{}/{name}:1", registry.host()), &[]);
        assert!(error.contains(expected) && error.contains(name), "{error}");
    }
    let mut windows = config(std::slice::from_ref(&layer));
    windows["os"] = "windows".into();
    push_with(&registry, "windows", "1", std::slice::from_ref(&layer), &windows);
    let error = ocifs.mount_fails(&format!("{}/windows:1", registry.host()), &[]);
    assert!(error.contains("indows"), "{error}");
    registry.add_manifest("junk", Some("1"), MANIFEST, "{\"schemaVersion\": 2,");
    let error = ocifs.mount_fails(&format!("{}/junk:1", registry.host()), &[]);
    assert!(error.contains("junk"), "{error}");
}

#[test]
fn paths_cannot_leave_the_root() {
    let tar = Tar::new()
        .file("../../outside", "1")
        .file("/absolute", "2")
        .file("dir/../../up", "3")
        .link(tar::EntryType::Symlink, "link", "../../../etc")
        .link(tar::EntryType::Link, "hard", "../../outside")
        .finish();
    let registry = TestRegistry::start();
    push(&registry, "app", "1", &[Blob::gzip(&tar)]);
    let ocifs = Ocifs::new();
    let mount = ocifs.mount(&format!("{}/app:1", registry.host()));
    let mut names: Vec<_> = std::fs::read_dir(mount.path())
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort_unstable();
    for (name, content) in [("outside", "1"), ("absolute", "2"), ("up", "3"), ("hard", "1")] {
        assert!(names.iter().any(|n| n == name), "{names:?}");
        assert_eq!(mount.read(name), content.as_bytes());
    }
    assert_eq!(
        std::fs::read_link(mount.join("link")).unwrap().to_str(),
        Some("../../../etc")
    );
    assert!(!mount.path().parent().unwrap().join("outside").exists());
}

#[test]
fn hostile_tars_end_in_an_error_or_a_sound_tree() {
    let registry = TestRegistry::start();
    let ocifs = Ocifs::new();
    let mount = |name: &str, tar: Vec<u8>| {
        push(&registry, name, "1", &[Blob::gzip(&tar)]);
        let image = format!("{}/{name}:1", registry.host());
        let directory = crate::common::ocifs::mountpoint();
        let path = directory.path().to_str().unwrap();
        let said = ocifs.run(["mount", "--wait", "ready", &image, path]);
        match said.code {
            Some(0) => {
                let listing = crate::common::ocifs::tool("find", [path, "-ls"]);
                ocifs.ok(["umount", path]);
                Ok(String::from_utf8_lossy(&listing).into_owned())
            }
            Some(1) => {
                assert_eq!(said.stderr.lines().count(), 1, "{said:?}");
                assert_eq!(crate::common::ocifs::mounted_type(directory.path()), None);
                Err(said.stderr)
            }
            _ => panic!("{name}: {said:?}"),
        }
    };
    let cycle = Tar::new()
        .link(tar::EntryType::Link, "a", "b")
        .link(tar::EntryType::Link, "b", "a")
        .link(tar::EntryType::Link, "self", "self")
        .file("after", "x")
        .finish();
    let error = mount("cycle", cycle).unwrap_err();
    assert!(error.contains("leads back to itself"), "{error}");
    // A GNU.sparse file of an exbibyte with one byte at its start.
    let sparse = Tar::new().sparse("exbibyte", 1 << 60, &[(0, b"!")]).finish();
    let error = mount("sparse", sparse).unwrap_err();
    assert!(error.contains("exbibyte") && error.contains("does not fit"), "{error}");
    // A sparse file of a tebibyte is valid.
    let sparse = Tar::new().sparse("tebibyte", 1 << 40, &[(0, b"!")]).finish();
    let listing = mount("large", sparse).unwrap();
    assert!(listing.contains("1099511627776"), "{listing}");
    let mut huge = header(b"huge", tar::EntryType::XHeader, 0o644, 0);
    huge.set_size(0o77_777_777_777);
    let error = mount("pax", Tar::new().raw(huge, b"").finish()).unwrap_err();
    assert!(error.contains("pax"), "{error}");
}
