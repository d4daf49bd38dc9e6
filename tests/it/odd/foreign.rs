//! Foreign layers: their media type says that they may not be distributed.

use std::fs;

use serde_json::{Value, json};

use crate::common::layers::{Blob, Tar, config, manifest};
use crate::common::oci_layout;
use crate::common::ocifs::Ocifs;
use crate::common::registry::{MANIFEST, TestRegistry};

const OCI: &str = "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip";
const DOCKER: &str = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";

fn layer(media_type: &'static str, content: &str) -> Blob {
    Blob {
        media_type,
        ..Blob::gzip(&Tar::new().file("file", content).finish())
    }
}

/// Pushes an image whose manifest names further URLs of its layer. The layer is not in the registry.
fn push_without_layer(registry: &TestRegistry, layer: &Blob, urls: &Value) {
    let config = config(std::slice::from_ref(layer)).to_string().into_bytes();
    let mut manifest = manifest(&config, std::slice::from_ref(layer));
    manifest["layers"][0]["urls"] = urls.clone();
    registry.add_blob(config);
    registry.add_manifest("app", Some("1"), MANIFEST, manifest.to_string());
}

#[test]
fn a_foreign_layer_that_is_here_is_read() {
    for media_type in [OCI, DOCKER] {
        let ocifs = Ocifs::new();
        let image = oci_layout::write(&ocifs.home().join("image"), &[layer(media_type, "here\n")]);
        assert_eq!(ocifs.mount(&image).read("file"), b"here\n");

        let registry = TestRegistry::start();
        let layer = layer(media_type, "here\n");
        // The mount does not use this URL.
        push_without_layer(&registry, &layer, &json!(["http://127.0.0.1:9/none"]));
        registry.add_blob(layer.bytes.clone());
        let mount = ocifs.mount(&format!("{}/app:1", registry.host()));
        assert_eq!(mount.read("file"), b"here\n");
    }
}

#[test]
fn a_foreign_layer_that_is_not_here_is_said_to_be_one() {
    let ocifs = Ocifs::new();
    let layer = layer(OCI, "elsewhere\n");
    let image = oci_layout::write(&ocifs.home().join("image"), std::slice::from_ref(&layer));
    let blob = ocifs.home().join("image/blobs/sha256").join(layer.digest().hex());
    fs::remove_file(blob).unwrap();
    let error = ocifs.mount_fails(&image, &[]);
    assert!(
        error.contains("not found") && error.contains("foreign layer"),
        "{error}"
    );
}

#[test]
fn other_places_are_asked_only_if_their_host_is_allowed() {
    let (registry, place) = (TestRegistry::start(), TestRegistry::start());
    let layer = layer(DOCKER, "elsewhere\n");
    let digest = place.add_blob(layer.bytes.clone());
    let url = format!("http://{}/v2/base/blobs/{digest}", place.host());
    push_without_layer(&registry, &layer, &json!(["ftp://example.com/x", url]));
    let image = format!("{}/app:1", registry.host());

    let ocifs = Ocifs::new();
    for options in [&[][..], &["--foreign-layers-from", "127.0.0.1"]] {
        let error = ocifs.mount_fails(&image, options);
        assert!(
            error.contains("foreign layer") && error.contains("--foreign-layers-from"),
            "{error}"
        );
        assert!(place.log().is_empty());
    }
    let mount = ocifs.mount_with(&image, &["--wait", "ready", "--foreign-layers-from", &place.host()]);
    assert_eq!(mount.read("file"), b"elsewhere\n");
    // Bytes from another host are checked like all others.
    let other = self::layer(DOCKER, "another\n");
    let wrong = place.add_blob(other.bytes.clone());
    let url = format!("http://{}/v2/base/blobs/{wrong}", place.host());
    push_without_layer(&registry, &layer, &json!([url]));
    let error = Ocifs::new().mount_fails(&image, &["--foreign-layers-from", &place.host()]);
    assert!(error.contains(&layer.digest().to_string()), "{error}");
}
