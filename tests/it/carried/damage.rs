//! Content that does not match the table: a fault of the source for a while, or a table that lies.

use nix::errno::Errno;
use ocifs::oci::Digest;
use serde_json::json;

use super::scene::{BIG, Scene, dialect_adds, dump, plain_dump, tar};
use crate::common::bound::read_only;
use crate::common::carried::{Dialect, Writer};
use crate::common::layers::noise;
use crate::common::registry::Fault;

/// A scene whose table states another digest for one file than its content has.
fn lying(dialect: Dialect) -> Scene {
    let writer = Writer {
        change: Box::new(|entries| {
            let entry = entries.iter_mut().find(|entry| entry["name"] == "many/7").unwrap();
            for key in ["digest", "chunkDigest"] {
                entry[key] = json!(Digest::of(b"something else").to_string());
            }
        }),
        ..Writer::new(dialect)
    };
    Scene::of(writer.write(&tar(dialect_adds(dialect))))
}

#[test]
fn a_damaged_chunk_is_fetched_again() {
    for dialect in Dialect::ALL {
        let scene = Scene::new(dialect);
        let mount = scene.mount();
        scene.registry.fault(&scene.layer.blob.path(), 1, Fault::Corrupt(1000));
        assert!(mount.read("big") == noise(3, BIG), "{dialect:?}");
        assert_eq!(scene.registry.faults_left(), 0);
    }
}

#[test]
fn a_damaged_table_is_fetched_again() {
    for dialect in [Dialect::Containers, Dialect::StargzZstd] {
        let scene = Scene::new(dialect);
        scene.registry.fault(&scene.layer.blob.path(), 1, Fault::Corrupt(100));
        let mount = scene.mount();
        assert_eq!(scene.authority(&mount), "manifest", "{dialect:?}: {}", mount.log());
        assert_eq!(scene.registry.faults_left(), 0);
    }
}

#[test]
fn a_layer_that_contradicts_its_table_is_streamed() {
    for dialect in Dialect::ALL {
        let scene = lying(dialect);
        let mount = scene.mount();
        assert_eq!(scene.authority(&mount), "manifest", "{dialect:?}");
        assert!(mount.read("many/7") == noise(7, 700), "{dialect:?}");
        for said in [
            "bytes of the layer are not what its index says",
            "the whole layer has the right digest",
        ] {
            assert!(mount.log().contains(said), "{dialect:?}: {}", mount.log());
        }
        assert!(mount.read("many/8") == noise(8, 700));
        drop(mount);
        let mount = scene.mount();
        assert_eq!(scene.authority(&mount), "pass", "{dialect:?}");
        assert!(mount.read("many/7") == noise(7, 700));
    }
}

#[test]
fn all_of_a_layer_that_contradicts_its_table_can_be_pulled() {
    for dialect in [Dialect::Estargz, Dialect::Containers] {
        let scene = lying(dialect);
        scene.ocifs.ok(["pull", &scene.image]);
        scene.registry.fault("/blobs/", usize::MAX, Fault::status(404));
        let mount = scene.mount();
        assert_eq!(scene.authority(&mount), "pass", "{dialect:?}");
        assert!(mount.read("many/7") == noise(7, 700) && mount.read("big") == noise(3, BIG));
    }
}

#[test]
fn a_layer_that_contradicts_its_table_is_streamed_without_a_store_too() {
    for dialect in Dialect::ALL {
        let scene = lying(dialect);
        std::fs::create_dir_all(scene.ocifs.store()).unwrap();
        let _bound = read_only(scene.ocifs.store());
        let mount = scene.mount();
        assert_eq!(scene.authority(&mount), "manifest", "{dialect:?}");
        assert!(mount.read("many/7") == noise(7, 700), "{dialect:?}");
        assert!(mount.read("many/8") == noise(8, 700) && mount.read("last") == noise(6, 3000));
    }
}

#[test]
fn a_source_that_is_wrong_for_a_while_leaves_nothing_behind() {
    let expected = plain_dump();
    for dialect in [Dialect::Estargz, Dialect::Containers] {
        for is_diff_id_right in [true, false] {
            let mut layer = Writer::new(dialect).write(&tar(dialect_adds(dialect)));
            if !is_diff_id_right {
                layer.blob.diff_id = Digest::of(b"another tar");
            }
            let scene = Scene::of(layer);
            let digest = scene.layer.blob.digest();
            let mut damaged = scene.layer.blob.bytes.clone();
            // Most of the blob is the content of one file.
            let middle = damaged.len() / 2;
            damaged[middle] ^= 1;
            scene.registry.replace_blob(&digest, damaged);
            for attempt in 0..2 {
                let mount = scene.mount();
                assert_eq!(scene.authority(&mount), "manifest", "{dialect:?} {attempt}");
                assert_eq!(mount.read_error("big"), Errno::EIO as i32, "{dialect:?} {attempt}");
                assert!(mount.read("last") == noise(6, 3000), "{dialect:?} {attempt}");
            }
            let mount = scene.mount();
            assert_eq!(mount.read_error("big"), Errno::EIO as i32);
            scene.registry.replace_blob(&digest, scene.layer.blob.bytes.clone());
            assert!(mount.read("big") == noise(3, BIG), "{dialect:?}: the same mount");
            drop(mount);
            scene.ocifs.ok(["cache", "drop"]);
            let mount = scene.mount();
            assert_eq!(scene.authority(&mount), "manifest", "{dialect:?} {is_diff_id_right}");
            assert_eq!(dump(mount.path()), expected, "{dialect:?} {is_diff_id_right}");
        }
    }
}
