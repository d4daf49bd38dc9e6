//! Files that are not what they should be: nothing wrong is served, and `verify` finds those who lie.

use std::path::Path;

use ocifs::index::SpanIndex;
use ocifs::oci::Digest;
use ocifs::published::IndexFile;
use ocifs::toc::{EntryKind, Toc, TocEntry};

use super::{Scene, authorities, files, trusting};
use crate::common::layers::Blob;

type Damage = fn(&[u8]) -> Vec<u8>;
type Change = fn(&mut IndexFile);

/// Changes the index of a layer in a directory, and makes all of its checksums right.
pub(super) fn forge(directory: &Path, layer: &Blob, change: impl FnOnce(&mut IndexFile)) {
    let digest = layer.digest();
    let path = directory.join(format!("sha256-{}.ocifs", digest.hex()));
    let bytes = std::fs::read(&path).unwrap();
    let mut file = IndexFile::decode("x", &bytes, &digest, layer.bytes.len() as u64).unwrap();
    change(&mut file);
    std::fs::write(path, file.encode()).unwrap();
}

/// Shifts the content of every file by 16 bytes.
pub(super) fn shift(file: &mut IndexFile) {
    let mut toc = Toc::decode(&file.toc).unwrap();
    for extent in &mut toc.extents {
        extent.tar += 16;
    }
    file.toc.clear();
    toc.encode(&mut file.toc).unwrap();
}

#[test]
fn damaged_files_cost_a_pass_and_no_mount() {
    let scene = Scene::new();
    let good = scene.indexes();
    let good = files(good.path());
    let damages: [(&str, Damage); 5] = [
        ("empty", |_| Vec::new()),
        ("cut short", |bytes| bytes[..bytes.len() / 2].to_vec()),
        ("a bit", |bytes| {
            let mut bytes = bytes.to_vec();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 4;
            bytes
        }),
        ("no index", |_| b"<html>not found</html>".to_vec()),
        ("another version", |bytes| {
            let mut bytes = bytes[..bytes.len() - 32].to_vec();
            bytes[8] = 99;
            let hash = blake3::hash(&bytes);
            bytes.extend_from_slice(hash.as_bytes());
            bytes
        }),
    ];
    for (what, damage) in damages {
        let directory = tempfile::tempdir().unwrap();
        for (name, bytes) in &good {
            std::fs::write(directory.path().join(name), damage(bytes)).unwrap();
        }
        let mount = trusting(directory.path().to_str().unwrap()).mount(&scene.image);
        assert_eq!(authorities(&mount), ["pass"; 3], "{what}");
        assert!(mount.log().contains("is no usable index"), "{what}: {}", mount.log());
        scene.check(&mount);
    }
}

#[test]
fn the_index_of_another_layer_is_not_used() {
    let scene = Scene::new();
    let directory = scene.indexes();
    let all = files(directory.path());
    let names: Vec<&String> = all.keys().collect();
    for (i, name) in names.iter().enumerate() {
        std::fs::write(directory.path().join(name), &all[names[(i + 1) % names.len()]]).unwrap();
    }
    let mount = trusting(directory.path().to_str().unwrap()).mount(&scene.image);
    assert_eq!(authorities(&mount), ["pass"; 3]);
    scene.check(&mount);
}

#[test]
fn parts_that_do_not_belong_together_are_not_used() {
    let scene = Scene::new();
    let changes: [(&str, Change); 4] = [
        ("diffID", |file| file.diff_id.0 = Digest::of(b"other")),
        ("no spans", |file| file.spans.clear()),
        ("no table", |file| file.toc.clear()),
        ("extents beyond the end", |file| {
            let mut toc = Toc::decode(&file.toc).unwrap();
            toc.extents.last_mut().unwrap().tar += 1 << 30;
            file.toc.clear();
            toc.encode(&mut file.toc).unwrap();
        }),
    ];
    for (what, change) in changes {
        let directory = scene.indexes();
        forge(directory.path(), &scene.layers[0], change);
        let mount = trusting(directory.path().to_str().unwrap()).mount(&scene.image);
        assert_eq!(authorities(&mount)[0], "pass", "{what}");
        scene.check(&mount);
    }
}

#[test]
fn verify_finds_an_index_that_lies_and_removes_it() {
    let scene = Scene::new();
    let directory = scene.indexes();
    let location = directory.path().to_str().unwrap();
    let host = trusting(location);
    let verified = host.ok(["index", "verify", "--json", &scene.image]).json();
    assert_eq!((&verified["compared"], &verified["missing"]), (&3.into(), &0.into()));
    forge(directory.path(), &scene.layers[0], shift);
    // Whoever trusts a location believes it: this is what a location adds to what must be trusted.
    let host = trusting(location);
    let mount = host.mount(&scene.image);
    assert_eq!(authorities(&mount)[0], format!("location {location}"));
    assert_ne!(mount.read("etc/first1"), b"layer 1\n");
    drop(mount);
    let said = host.run(["index", "verify", "--json", &scene.image]);
    assert_eq!(said.code, Some(1), "{}", said.stderr);
    let differences = &said.json()["differences"];
    assert_eq!(differences.as_array().unwrap().len(), 1);
    assert_eq!(differences[0]["layer"], scene.layers[0].digest().to_string());
    assert_eq!(differences[0]["location"], location);
    assert_eq!(
        differences[0]["differs"],
        serde_json::json!(["table", "table kept from there"])
    );
    // The pass of `verify` outranks the location from now on.
    let mount = host.mount(&scene.image);
    assert_eq!(authorities(&mount), ["pass"; 3]);
    scene.check(&mount);
}

#[test]
fn a_profile_of_nonsense_is_no_profile() {
    let scene = Scene::new();
    let directory = scene.indexes();
    let manifest = super::Ocifs::new().ok(["inspect", "--json", &scene.image]).json();
    let digest = manifest["digest"].as_str().unwrap().replacen(':', "-", 1);
    let compressed = zstd::bulk::compress(b"{\"ocifs-profile\":2}", 1).unwrap();
    let endless = zstd::bulk::compress(&vec![b' '; 64 << 20], 1).unwrap();
    let cut = &endless[..endless.len() / 2];
    for content in [
        b"",
        &b"{}"[..],
        b"{\"ocifs-profile\":2}",
        b"not json",
        &compressed,
        &endless,
        cut,
    ] {
        std::fs::write(directory.path().join(format!("{digest}.default.profile")), content).unwrap();
        let mount = trusting(directory.path().to_str().unwrap()).mount(&scene.image);
        scene.check(&mount);
    }
}

/// Changes the digest of every span.
fn lie(file: &mut IndexFile) {
    let index = SpanIndex::open(file.spans.clone()).unwrap();
    for span in index.spans() {
        let digest = index.digest(span);
        let at = file.spans.windows(32).position(|window| window == digest).unwrap();
        file.spans[at] ^= 1;
    }
    let content = file.spans.len() - 32;
    let hash = blake3::hash(&file.spans[..content]);
    file.spans[content..].copy_from_slice(hash.as_bytes());
}

#[test]
fn an_index_with_wrong_digests_costs_a_pass_and_no_read() {
    let scene = Scene::new();
    let directory = scene.indexes();
    let location = directory.path().to_str().unwrap();
    forge(directory.path(), &scene.layers[0], lie);
    let host = trusting(location);
    let mount = host.mount_with(&scene.image, &["--wait", "ready", "--prefetch", "none"]);
    assert_eq!(authorities(&mount)[0], format!("location {location}"));
    scene.check(&mount);
    assert!(
        mount.log().contains("bytes of the layer are not what its index says"),
        "{}",
        mount.log()
    );
    drop(mount);
    // The pass outranks the index from now on.
    assert_eq!(authorities(&host.mount(&scene.image))[0], "pass");
}

#[test]
fn a_table_that_cannot_be_merged_or_takes_too_much_memory_costs_a_pass() {
    let scene = Scene::new();
    let changes: [(&str, Change); 3] = [
        ("too many warnings", |file| {
            let mut toc = Toc::decode(&file.toc).unwrap();
            toc.warnings = vec!["x".repeat(100); 200_000];
            file.toc.clear();
            toc.encode(&mut file.toc).unwrap();
        }),
        ("a link to nothing", |file| {
            let mut toc = Toc::decode(&file.toc).unwrap();
            toc.entries.last_mut().unwrap().kind = EntryKind::Hardlink((*b"none").into());
            file.toc.clear();
            toc.encode(&mut file.toc).unwrap();
        }),
        ("too many files", |file| {
            let mut toc = Toc::decode(&file.toc).unwrap();
            let last = toc.entries.last().unwrap().clone();
            toc.entries.extend((0..1_500_000).map(|i| TocEntry {
                path: format!("z{i:0200}").into_bytes().into(),
                kind: EntryKind::Fifo,
                ..last.clone()
            }));
            file.toc.clear();
            toc.encode(&mut file.toc).unwrap();
        }),
    ];
    for (what, change) in changes {
        let directory = scene.indexes();
        forge(directory.path(), &scene.layers[0], change);
        let location = directory.path().to_str().unwrap();
        let host = trusting(location);
        let mount = host.mount_with(&scene.image, &["--wait", "ready"]);
        assert_eq!(authorities(&mount)[0], "pass", "{what}");
        assert!(mount.log().contains("not using an index"), "{what}: {}", mount.log());
        assert!(mount.log().contains(location), "{what}: {}", mount.log());
        scene.check(&mount);
    }
}
