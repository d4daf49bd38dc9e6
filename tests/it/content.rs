//! The content of a layer decides its compression, not its media type.

use crate::common::layers::{Blob, Tar, noise, push};
use crate::common::oci_layout;
use crate::common::ocifs::Ocifs;
use crate::common::registry::TestRegistry;

const LABELS: [&str; 6] = [
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/octet-stream",
    "application/x-tar; charset=binary",
];

const SIZE: usize = 300_000;

/// Makes a layer with one file for every compression under every media type. Returns the layers, and the files' names
/// and seeds.
fn layers() -> (Vec<Blob>, Vec<(String, u64)>) {
    type Make = fn(&[u8]) -> Blob;
    let kinds: [(&str, Make); 3] = [
        ("plain", |tar| Blob::plain(tar.to_vec())),
        ("gzip", Blob::gzip),
        ("zstd", Blob::zstd),
    ];
    let mut layers = Vec::new();
    let mut files = Vec::new();
    for (kind, make) in kinds {
        for (i, media_type) in LABELS.into_iter().enumerate() {
            let (name, seed) = (format!("{kind}-{i}"), files.len() as u64);
            let tar = Tar::new().file(&name, noise(seed, SIZE)).finish();
            layers.push(Blob {
                media_type,
                ..make(&tar)
            });
            files.push((name, seed));
        }
    }
    (layers, files)
}

#[test]
fn a_layer_is_what_its_bytes_say() {
    let registry = TestRegistry::start();
    let (layers, files) = layers();
    push(&registry, "app", "1", &layers);
    let directory = tempfile::tempdir().unwrap();
    let layout = oci_layout::write(&directory.path().join("layout"), &layers);
    for image in [format!("{}/app:1", registry.host()), layout] {
        let ocifs = Ocifs::new();
        for round in ["streamed", "by its index"] {
            let mount = ocifs.mount(&image);
            for (name, seed) in &files {
                assert!(mount.read(name) == noise(*seed, SIZE), "{image} {name} {round}");
            }
            drop(mount);
            ocifs.ok(["cache", "drop"]);
        }
    }
}
