//! Layers that are read in parallel, and layers that images share.

use crate::common::layers::{Blob, Tar, noise, push};
use crate::common::ocifs::{Mounted, Ocifs, eventually};
use crate::common::registry::TestRegistry;

/// Name and size of the file of each layer, smallest first.
const FILES: [(&str, usize); 3] = [("small", 1000), ("middle", 100_000), ("large", 2 << 20)];

fn layers() -> Vec<Blob> {
    let file = |&(name, size): &(&str, usize)| Blob::gzip(&Tar::new().file(name, noise(size as u64, size)).finish());
    FILES.iter().map(file).collect()
}

fn check_files(mount: &Mounted) {
    for (name, size) in FILES {
        assert!(mount.read(name) == noise(size as u64, size), "{name}");
    }
}

/// Returns `index_source` of every layer, base first.
fn sources(mount: &Mounted) -> Vec<String> {
    let status = mount.status();
    let layers = status["layers"].as_array().unwrap();
    let source = |layer: &serde_json::Value| layer["index_source"].as_str().unwrap().to_owned();
    layers.iter().map(source).collect()
}

#[test]
fn all_layers_are_asked_for_before_any_of_them_comes() {
    let registry = TestRegistry::start();
    let layers = layers();
    push(&registry, "app", "1", &layers);
    for layer in &layers {
        registry.hold(&layer.path());
    }
    let ocifs = Ocifs::new();
    let mount = ocifs.mount_with(&format!("{}/app:1", registry.host()), &[]);
    eventually("all layers are requested", || {
        layers.iter().all(|layer| registry.count(&layer.path()) == 1)
    });
    assert_eq!(mount.status()["state"], "preparing");
    assert_eq!(sources(&mount), ["pending"; 3]);
    registry.release();
    mount.reaches("ready");
    check_files(&mount);
}

#[test]
fn small_layers_are_ready_while_the_largest_still_comes() {
    let registry = TestRegistry::start();
    let layers = layers();
    push(&registry, "app", "1", &layers);
    registry.hold(&layers[2].path());
    let ocifs = Ocifs::new();
    let mount = ocifs.mount_with(&format!("{}/app:1", registry.host()), &[]);
    eventually("the small layers are indexed", || {
        sources(&mount) == ["streamed", "streamed", "pending"]
    });
    assert_eq!(registry.count(&layers[2].path()), 1);
    assert_eq!(mount.status()["state"], "preparing");
    registry.release();
    mount.reaches("ready");
    assert_eq!(sources(&mount), ["streamed"; 3]);
    check_files(&mount);
}

#[test]
fn a_layer_of_another_image_is_not_fetched_again() {
    let registry = TestRegistry::start();
    let layers = layers();
    push(&registry, "app", "1", &layers);
    let own = Blob::zstd(&Tar::new().file("own", "own\n").finish());
    push(&registry, "team/other", "2", &[own.clone(), layers[2].clone()]);
    let ocifs = Ocifs::new();
    drop(ocifs.mount(&format!("{}/app:1", registry.host())));
    registry.clear_log();
    let mount = ocifs.mount(&format!("{}/team/other:2", registry.host()));
    assert_eq!(sources(&mount), ["streamed", "store"]);
    let (name, size) = FILES[2];
    assert!(mount.read(name) == noise(size as u64, size));
    assert_eq!(mount.read("own"), b"own\n");
    assert_eq!(registry.count(&own.path()), 1);
    assert_eq!(registry.count(&layers[2].path()), 0, "requests for the shared layer");
    let status = mount.status();
    assert_eq!(
        (&status["layers"][1]["fetched"], &status["layers"][1]["requests"]),
        (&0.into(), &0.into())
    );
}
