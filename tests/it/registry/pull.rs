//! The five operations of the client for embedding programs.

use futures::TryStreamExt as _;
use ocifs::blob::BlobError;
use ocifs::oci::{Digest, ReferenceSelector};
use ocifs::registry::Puller;

use super::client;
use crate::common::registry::{Fault, INDEX, MANIFEST, TestRegistry, architecture};

fn layers() -> Vec<Vec<u8>> {
    vec![vec![1; 100_000], vec![2; 5]]
}

/// Adds an index with an attestation, an image of another platform, and an image for this machine.
fn add_index(registry: &TestRegistry) -> Digest {
    let ours = registry.add_image("org/app", "single", &layers());
    let entry = |digest: &Digest, os: &str, architecture: &str| {
        serde_json::json!({
            "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest, "size": 2,
            "platform": {"os": os, "architecture": architecture},
        })
    };
    let index = serde_json::json!({
        "schemaVersion": 2, "mediaType": INDEX,
        "manifests": [
            entry(&Digest::of(b"attestation"), "unknown", "unknown"),
            entry(&Digest::of(b"other"), "linux", "s390x"),
            entry(&ours, "linux", architecture()),
        ],
    });
    registry.add_manifest("org/app", Some("latest"), INDEX, index.to_string());
    ours
}

async fn bytes(stream: ocifs::blob::ByteStream) -> Vec<u8> {
    stream.try_collect::<Vec<_>>().await.unwrap().concat()
}

#[tokio::test]
async fn documents_by_tag_and_digest() {
    let registry = TestRegistry::start();
    let ours = add_index(&registry);
    let puller = Puller::new(client(), &registry.host());
    let latest = || ReferenceSelector::tag("latest");
    assert_eq!(
        puller.fetch_index("org/app", latest()).await.unwrap().manifests().len(),
        3
    );
    let single = puller.fetch_index("org/app", &ours).await.unwrap();
    assert_eq!(single.manifests().len(), 1);
    assert_eq!(single.manifests()[0].digest().to_string(), ours.to_string());
    let manifest = puller.fetch_manifest("org/app", latest()).await.unwrap();
    assert_eq!(manifest.layers().len(), 2);
    assert_eq!(puller.fetch_manifest("org/app", &ours).await.unwrap(), manifest);
    let config: Digest = manifest.config().digest().to_string().parse().unwrap();
    let by_tag = puller.fetch_config("org/app", latest()).await.unwrap();
    assert_eq!(by_tag, puller.fetch_config("org/app", &config).await.unwrap());
    let other = ocifs::oci::Platform {
        os: "linux".to_owned(),
        architecture: "riscv64".to_owned(),
        ..Default::default()
    };
    let error = puller
        .with_platform(other)
        .fetch_manifest("org/app", latest())
        .await
        .unwrap_err();
    assert!(error.to_string().contains("linux/s390x"), "{error}");
}

#[tokio::test]
async fn nested_indexes_are_followed_to_a_depth() {
    let registry = TestRegistry::start();
    let mut nested = registry.add_image("org/app", "manifest", &layers());
    for depth in 1..=5 {
        let index = serde_json::json!({
            "schemaVersion": 2, "mediaType": INDEX, "annotations": {"depth": depth.to_string()},
            "manifests": [{
                "mediaType": if depth == 1 { MANIFEST } else { INDEX }, "digest": nested, "size": -1,
                "platform": {"os": "linux", "architecture": architecture()},
            }],
        });
        nested = registry.add_manifest("org/app", Some(&format!("deep{depth}")), INDEX, index.to_string());
    }
    let puller = Puller::new(client(), &registry.host());
    let manifest = puller
        .fetch_manifest("org/app", ReferenceSelector::tag("deep4"))
        .await
        .unwrap();
    assert_eq!(manifest.layers().len(), 2);
    registry.clear_log();
    let error = puller
        .fetch_manifest("org/app", ReferenceSelector::tag("deep5"))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("more than 4 deep"), "{error}");
    assert_eq!(registry.log().len(), 5, "the fifth index is not opened");
}

#[tokio::test]
async fn a_layer_an_image_has_twice_is_fetched_once() {
    let registry = TestRegistry::start();
    let twice = [vec![3; 5000], vec![4; 10], vec![3; 5000]];
    registry.add_image("org/app", "twice", &twice);
    let directory = tempfile::tempdir().unwrap();
    Puller::new(client(), &registry.host())
        .pull_image("org/app", ReferenceSelector::tag("twice"), directory.path())
        .await
        .unwrap();
    assert_eq!(registry.count(&Digest::of(&twice[0]).to_string()), 1);
    assert_eq!(registry.count(&Digest::of(&twice[1]).to_string()), 1);
}

#[tokio::test]
async fn blobs_by_any_range() {
    let registry = TestRegistry::start();
    let digest = registry.add_blob((0..=255).collect::<Vec<u8>>());
    let empty = registry.add_blob(Vec::new());
    let puller = Puller::new(client(), &registry.host());
    let all: Vec<u8> = (0..=255).collect();
    let get = |digest: Digest, range: (std::ops::Bound<u64>, std::ops::Bound<u64>)| {
        let puller = puller.clone();
        async move { bytes(puller.fetch_image_blob("org/app", &digest, range).await.unwrap()).await }
    };
    use std::ops::Bound::{Excluded, Included, Unbounded};
    assert_eq!(get(digest.clone(), (Unbounded, Unbounded)).await, all);
    assert_eq!(get(digest.clone(), (Included(250), Unbounded)).await, all[250..]);
    assert_eq!(get(digest.clone(), (Unbounded, Excluded(0))).await, b"");
    assert_eq!(get(digest.clone(), (Included(10), Included(u64::MAX))).await, all[10..]);
    assert_eq!(get(digest, (Included(300), Excluded(400))).await, b"");
    assert_eq!(get(empty, (Unbounded, Unbounded)).await, b"");
    let missing = puller.fetch_image_blob("org/app", &Digest::of(b"?"), ..).await;
    assert!(matches!(missing.err(), Some(BlobError::NotFound { .. })));
}

#[tokio::test]
async fn a_pulled_image_is_a_layout_of_verified_blobs() {
    let registry = TestRegistry::start();
    let ours = add_index(&registry);
    let puller = Puller::new(client(), &registry.host());
    let directory = tempfile::tempdir().unwrap();
    let pull = || puller.pull_image("org/app", ReferenceSelector::tag("latest"), directory.path());
    registry.fault("/blobs/", 1, Fault::Truncate(10));
    let image = pull().await.unwrap();
    assert_eq!(image.digest, ours);
    assert!(ours.matches(&image.manifest_bytes));
    let blobs = directory.path().join("blobs/sha256");
    let names: Vec<_> = std::fs::read_dir(&blobs).unwrap().map(|entry| entry.unwrap()).collect();
    assert_eq!(names.len(), 4, "manifest, config and two layers, no leftovers");
    for entry in names {
        let content = Digest::of(&std::fs::read(entry.path()).unwrap());
        assert_eq!(content.hex(), entry.file_name().to_str().unwrap());
    }
    registry.clear_log();
    pull().await.unwrap();
    assert_eq!(registry.count("/blobs/"), 1, "only the config is asked for again");
    inspect_with_skopeo(directory.path(), &ours);
}

/// Asserts that another implementation reads the layout.
fn inspect_with_skopeo(directory: &std::path::Path, digest: &Digest) {
    let output = std::process::Command::new("skopeo")
        .args(["inspect", "--format", "{{.Digest}}"])
        .arg(format!("oci:{}", directory.display()))
        .output()
        .unwrap_or_else(|e| panic!("tests of layouts need skopeo (skopeo): {e}"));
    assert_eq!(
        String::from_utf8_lossy(&output.stdout).trim(),
        digest.to_string(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[tokio::test]
async fn a_corrupt_layer_leaves_nothing_behind() {
    let registry = TestRegistry::start();
    add_index(&registry);
    let layer = Digest::of(&layers()[0]);
    registry.fault(&layer.to_string(), 1, Fault::Corrupt(50_000));
    let directory = tempfile::tempdir().unwrap();
    let puller = Puller::new(client(), &registry.host());
    let error = puller
        .pull_image("org/app", ReferenceSelector::tag("latest"), directory.path())
        .await
        .unwrap_err();
    assert!(matches!(error, BlobError::Corrupt { .. }), "{error}");
    let left: Vec<String> = std::fs::read_dir(directory.path().join("blobs/sha256"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert!(
        !left
            .iter()
            .any(|name| name.contains(layer.hex()) || name.ends_with(".part")),
        "{left:?}"
    );
    assert!(!directory.path().join("index.json").exists());
}
