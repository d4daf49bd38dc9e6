//! Images with such layers, mounted: they are lazy at once, and look like images without tables.

use std::fs;
use std::path::Path;

use ocifs::oci::Digest;
use serde_json::json;

use super::scene::{BIG, Scene, base, dialect_adds, dump, plain_dump, tar};
use crate::common::carried::{CarriedBlob, Dialect, STARGZ_DIGEST, Writer, push};
use crate::common::disk::ServedDisk;
use crate::common::layers::{Blob, Tar, config, descriptor, noise};
use crate::common::ocifs::{Ocifs, eventually, tool};
use crate::common::registry::{Fault, MANIFEST, TestRegistry};

const MIB: usize = 1 << 20;

#[test]
fn an_image_with_a_table_is_lazy_at_once() {
    let expected = plain_dump();
    for dialect in Dialect::ALL {
        let scene = Scene::new(dialect);
        let all = scene.layer.blob.bytes.len();
        let mount = scene.mount();
        assert_eq!(scene.authority(&mount), "manifest", "{dialect:?}");
        let (requests, table) = scene.fetched();
        let most = scene.layer.table.len().max(all / 64) + 100;
        assert!(
            requests <= if dialect == Dialect::Estargz { 2 } else { 1 },
            "{dialect:?}: {requests}"
        );
        assert!(
            table <= most,
            "{dialect:?}: {table} of {all}, the table has {}",
            scene.layer.table.len()
        );

        tool("find", [mount.path().as_os_str(), "-ls".as_ref()]);
        assert_eq!(scene.fetched(), (0, 0), "{dialect:?}: the names are here");
        assert!(mount.read("last") == noise(6, 3000));
        let (requests, bytes) = scene.fetched();
        assert!(requests >= 1 && bytes <= MIB, "{dialect:?}: {bytes} for the first file");
        assert_eq!(dump(mount.path()), expected, "{dialect:?}");
        assert_eq!(
            tool(
                "getfattr",
                [
                    "--only-values",
                    "-n",
                    "user.note",
                    mount.join("noted").to_str().unwrap()
                ]
            ),
            b"hello"
        );
        drop(mount);

        // The store has the table and the content now.
        scene.registry.clear_log();
        scene
            .registry
            .fault(&scene.layer.blob.path(), usize::MAX, Fault::status(404));
        let mount = scene.mount();
        assert_eq!(scene.authority(&mount), "manifest");
        assert_eq!(dump(mount.path()), expected, "{dialect:?}: from the store");
        let said = scene.ocifs.ok(["cache", "verify", "--json"]).json();
        assert_eq!(said["removed"], json!([]), "{said}");
    }
}

#[test]
fn the_store_keeps_the_table_without_the_content() {
    for dialect in Dialect::ALL {
        let scene = Scene::new(dialect);
        drop(scene.mount());
        scene.registry.clear_log();
        let mount = scene.mount();
        assert_eq!(mount.status()["layers"][1]["index_source"], "store");
        tool("find", [mount.path().as_os_str(), "-ls".as_ref()]);
        assert_eq!(scene.fetched(), (0, 0), "{dialect:?}");
        assert!(mount.read("first") == noise(2, 100_000));
    }
}

#[test]
fn a_table_that_cannot_be_used_is_no_obstacle() {
    let expected = plain_dump();
    for dialect in Dialect::ALL {
        let mut wrong = Writer::new(dialect).write(&tar(dialect_adds(dialect)));
        for (key, value) in &mut wrong.annotations {
            if !key.ends_with("position") {
                *value = Digest::of(b"other").to_string();
            }
        }
        let without_digests = Writer {
            change: Box::new(|entries| {
                for entry in entries {
                    entry["chunkDigest"] = json!(null);
                    entry["digest"] = json!(null);
                }
            }),
            ..Writer::new(dialect)
        };
        for (layer, warns) in [
            (wrong, true),
            (without_digests.write(&tar(dialect_adds(dialect))), false),
        ] {
            let scene = Scene::of(layer);
            let mount = scene.mount();
            assert_eq!(scene.authority(&mount), "pass", "{dialect:?}");
            assert_eq!(dump(mount.path()), expected, "{dialect:?}");
            assert_eq!(
                mount.log().contains("own table of contents"),
                warns,
                "{dialect:?}: {}",
                mount.log()
            );
        }
    }
}

#[test]
fn files_with_the_names_of_added_ones_belong_to_ordinary_images() {
    let names = ["stargz.index.json", ".prefetch.landmark", ".no.prefetch.landmark"];
    let tar = names.iter().fold(Tar::new().dir("d/"), |tar, name| {
        tar.file(name, "mine").file(format!("d/{name}"), "mine")
    });
    let tar = tar.finish();
    let mut layers = vec![CarriedBlob::plain(Blob::gzip(&tar))];
    layers.push(Writer::new(Dialect::Containers).write(&tar));
    layers.push(Writer::new(Dialect::Estargz).write(&tar));
    let mut streamed = layers[2].clone();
    streamed
        .annotations
        .insert(STARGZ_DIGEST.to_owned(), Digest::of(b"other").to_string());
    layers.push(streamed);
    for (layer, shown) in layers.into_iter().zip([true, true, false, false]) {
        let scene = Scene::of(layer);
        let mount = scene.mount();
        for name in names {
            assert_eq!(mount.join(name).exists(), shown, "{name}");
            assert_eq!(mount.read(&format!("d/{name}")), b"mine");
        }
    }
}

#[test]
fn an_image_may_mix_all_kinds_of_layers() {
    let layer = |number: u64| {
        let tar = Tar::new().file(format!("f{number}"), noise(number, 300_000));
        tar.file("shared", format!("{number}")).finish()
    };
    let mut layers: Vec<CarriedBlob> = Vec::new();
    for (number, dialect) in (0..).zip(Dialect::ALL) {
        layers.push(Writer::new(dialect).write(&layer(number)));
    }
    for (number, blob) in [
        (4, Blob::gzip(&layer(4))),
        (5, Blob::zstd(&layer(5))),
        (6, Blob::plain(layer(6))),
    ] {
        layers.insert(number as usize % 3, CarriedBlob::plain(blob));
    }
    let last = layers
        .iter()
        .position(|layer| layer.annotations.contains_key(STARGZ_DIGEST))
        .unwrap();
    layers.rotate_left(last);
    let registry = TestRegistry::start();
    push(&registry, "app", "1", &layers);
    let ocifs = Ocifs::new();
    let mount = ocifs.mount(&format!("{}/app:1", registry.host()));
    for number in 0..7 {
        assert!(mount.read(&format!("f{number}")) == noise(number, 300_000), "{number}");
    }
    let status = mount.status();
    let layers = status["layers"].as_array().unwrap();
    let carried = layers.iter().filter(|layer| layer["authority"] == "manifest").count();
    assert_eq!((carried, layers.len()), (4, 7), "{status}");
}

#[test]
fn layouts_and_disks_use_tables_too() {
    let expected = plain_dump();
    for dialect in Dialect::ALL {
        let layers = [base(), Writer::new(dialect).write(&tar(dialect_adds(dialect)))];
        let directory = tempfile::tempdir().unwrap();
        let image = layout(directory.path(), &layers);
        let ocifs = Ocifs::new();
        let mount = ocifs.mount(&image);
        assert_eq!(mount.status()["layers"][1]["authority"], "manifest", "{dialect:?}");
        assert_eq!(dump(mount.path()), expected, "{dialect:?}");
        drop(mount);

        let ocifs = Ocifs::new();
        let disk = ServedDisk::serve(&ocifs, &image, &[]);
        tool("fsck.erofs", [disk.file()]);
        let exported = tempfile::tempdir().unwrap();
        tool(
            "fsck.erofs",
            [
                format!("--extract={}", exported.path().display()).as_ref(),
                "--overwrite".as_ref(),
                disk.file().as_os_str(),
            ],
        );
        assert!(
            fs::read(exported.path().join("big")).unwrap() == noise(3, BIG),
            "{dialect:?}"
        );
        assert!(!exported.path().join(".prefetch.landmark").exists());
    }
}

#[test]
fn all_of_an_image_with_a_table_can_be_pulled() {
    for dialect in Dialect::ALL {
        let scene = Scene::new(dialect);
        scene.ocifs.ok(["pull", &scene.image]);
        scene.registry.fault("/blobs/", usize::MAX, Fault::status(404));
        let mount = scene.mount();
        assert!(mount.read("big") == noise(3, BIG) && mount.read("last") == noise(6, 3000));
        let layer = &mount.status()["layers"][1];
        assert_eq!(layer["spans"], layer["local_spans"], "{dialect:?}");
    }
}

#[test]
fn what_the_writer_recommends_is_fetched_first() {
    let scene = Scene::new(Dialect::Estargz);
    let mount = scene.ocifs.mount(&scene.image);
    eventually("the recommended content is here", || {
        mount.status()["prefetch"]["state"] == "done"
    });
    scene.registry.clear_log();
    assert!(mount.read("first") == noise(2, 100_000));
    assert_eq!(scene.fetched(), (0, 0));
    assert!(mount.read("last") == noise(6, 3000));
    assert_ne!(scene.fetched(), (0, 0));
}

#[test]
fn a_server_without_ranges_streams_the_layer() {
    let expected = plain_dump();
    let scene = Scene::new(Dialect::Containers);
    scene.registry.fault_ranges("/blobs/", Fault::IgnoreRange);
    let mount = scene.mount();
    assert_eq!(dump(mount.path()), expected);
}

/// Writes an image of these layers as an OCI layout. Returns its name.
fn layout(directory: &Path, layers: &[CarriedBlob]) -> String {
    let blobs = directory.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let put = |bytes: &[u8]| fs::write(blobs.join(Digest::of(bytes).hex()), bytes).unwrap();
    let plain: Vec<Blob> = layers.iter().map(|layer| layer.blob.clone()).collect();
    let config = config(&plain).to_string().into_bytes();
    let manifest = json!({
        "schemaVersion": 2, "mediaType": MANIFEST,
        "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
        "layers": layers.iter().map(CarriedBlob::descriptor).collect::<Vec<_>>(),
    });
    let manifest = manifest.to_string().into_bytes();
    let index = json!({"schemaVersion": 2, "manifests": [descriptor(MANIFEST, &manifest)]});
    for bytes in plain.iter().map(|blob| &blob.bytes).chain([&config, &manifest]) {
        put(bytes);
    }
    fs::write(directory.join("index.json"), index.to_string()).unwrap();
    fs::write(directory.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    format!("oci:{}", directory.display())
}
