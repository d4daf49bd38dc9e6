//! Tables of which no tree can be made, in layers that are sound: the layers are streamed.

use serde_json::json;

use super::scene::{Scene, base, dialect_adds, dump, plain_dump, tar};
use crate::common::carried::{CarriedBlob, Change, Dialect, Writer, push};
use crate::common::layers::{Blob, Tar};
use crate::common::ocifs::Ocifs;
use crate::common::registry::{Fault, TestRegistry};

/// Returns a scene whose table is changed, and whose tar is that of all scenes.
fn scene(dialect: Dialect, change: Change) -> Scene {
    let writer = Writer {
        change,
        ..Writer::new(dialect)
    };
    Scene::of(writer.write(&tar(dialect_adds(dialect))))
}

/// Adds a hard link to the table.
fn link(target: &'static str) -> Change {
    Box::new(move |entries| {
        entries.push(json!({
            "type": "hardlink", "name": "link-of-table", "linkName": target, "mode": 0o644,
            "modtime": "2020-01-01T00:00:00Z",
        }));
    })
}

/// Adds so many directories to the table that their tree exceeds the memory limit.
fn crowd() -> Change {
    Box::new(|entries| {
        let deep = "a/".repeat(400);
        entries.extend((0..8000).map(|i| {
            json!({
                "type": "dir", "name": format!("{i}/{deep}"), "mode": 0o755, "modtime": "2020-01-01T00:00:00Z",
            })
        }));
    })
}

/// Adds symlinks that lead from one to the next to the table, and an entry behind them.
fn maze() -> Change {
    Box::new(|entries| {
        let attributes = |kind: &str, name: String| {
            json!({
                "type": kind, "name": name, "mode": 0o777, "modtime": "2020-01-01T00:00:00Z",
            })
        };
        entries.extend((0..1000).map(|i| {
            let mut link = attributes("symlink", format!("s{i}"));
            link["linkName"] = json!(format!("s{}", i + 1));
            link
        }));
        entries.push(attributes("dir", "s0/x".to_owned()));
    })
}

#[test]
fn a_layer_with_a_table_that_no_tree_can_have_is_streamed() {
    let expected = plain_dump();
    type Changing = fn() -> Change;
    let changes: [(&str, Changing); 5] = [
        ("which does not exist", || link("nothing")),
        ("which is a directory", || link("bin")),
        ("leads back to itself", || link("link-of-table")),
        ("cannot be followed", maze),
        ("the files of the image take", crowd),
    ];
    for (reason, change) in changes {
        let scene = scene(Dialect::Containers, change());
        let mount = scene.mount();
        assert_eq!(scene.authority(&mount), "pass", "{reason}");
        let (log, digest) = (mount.log(), scene.layer.blob.digest().to_string());
        let lines: Vec<&str> = log
            .lines()
            .filter(|line| line.contains("streaming the layer"))
            .collect();
        assert_eq!(lines.len(), 1, "{reason}: {log}");
        assert!(lines[0].contains(reason) && lines[0].contains(&digest), "{log}");
        assert_eq!(dump(mount.path()), expected, "{reason}");
        drop(mount);

        // The store has what the pass found.
        scene.registry.fault("/blobs/", usize::MAX, Fault::status(404));
        let mount = scene.mount();
        assert_eq!(dump(mount.path()), expected, "{reason}");
        assert!(!mount.log().contains("streaming the layer"), "{}", mount.log());
    }
}

#[test]
fn other_layers_keep_their_tables() {
    let registry = TestRegistry::start();
    let good = Writer::new(Dialect::Estargz).write(&Tar::new().file("good", "good").finish());
    let wrong = Writer {
        change: link("nothing"),
        ..Writer::new(Dialect::Containers)
    };
    let wrong = wrong.write(&Tar::new().file("wrong", "wrong").finish());
    push(&registry, "app", "1", &[good, wrong, base()]);
    let mount = Ocifs::new().mount(&format!("{}/app:1", registry.host()));
    let authorities = mount.status()["layers"].clone();
    let authorities: Vec<_> = authorities
        .as_array()
        .unwrap()
        .iter()
        .map(|layer| &layer["authority"])
        .collect();
    assert_eq!(authorities, ["manifest", "pass", "pass"]);
    assert_eq!(
        (mount.read("good"), mount.read("wrong")),
        (b"good".to_vec(), b"wrong".to_vec())
    );
}

#[test]
fn a_fault_of_the_tar_too_is_an_error_of_the_image() {
    let tar = Tar::new()
        .file("f", "f")
        .link(tar::EntryType::Link, "h", "nothing")
        .finish();
    let mut said = Vec::new();
    for layer in [
        Writer::new(Dialect::Containers).write(&tar),
        CarriedBlob::plain(Blob::zstd(&tar)),
    ] {
        let registry = TestRegistry::start();
        push(&registry, "app", "1", &[layer]);
        let ocifs = Ocifs::new();
        said.push(ocifs.mount_fails(&format!("{}/app:1", registry.host()), &["--wait", "ready"]));
    }
    assert!(said[0].contains("hard link /h points at /nothing"), "{said:?}");
    assert_eq!(said[0], said[1]);
}
