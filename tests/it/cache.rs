//! The limit of the store: eviction, the `cache` commands, and reads that run at the same time.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use ocifs::device::DataDevice;
use ocifs::index::{BitPosition, Compression, DecodeSink as _, Identity, SpanId, SpanIndexBuilder, SpanStart};
use ocifs::oci::{DiffId, Digest};
use ocifs::span::IndexedSpans;
use ocifs::store::Store;
use ocifs::toc::{Limits, TarReader};

use crate::common::layers::{Blob, Tar, noise, push};
use crate::common::ocifs::{Mounted, Ocifs, Tmpfs, eventually};
use crate::common::registry::TestRegistry;

const FILES: u64 = 24;
const FILE: usize = 384 << 10;

fn image() -> (TestRegistry, String) {
    let registry = TestRegistry::start();
    let layer = |seed: u64, prefix: &str| {
        let tar = (0..FILES / 2).fold(Tar::new(), |tar, i| {
            tar.file(format!("{prefix}{i}"), noise(seed + i, FILE))
        });
        tar.finish()
    };
    push(
        &registry,
        "app",
        "1",
        &[Blob::gzip(&layer(0, "a")), Blob::plain(layer(100, "b"))],
    );
    let image = format!("{}/app:1", registry.host());
    (registry, image)
}

/// Reads all files, past the page cache. `turn` determines the order.
fn read_all(mount: &Mounted, turn: u64) {
    for step in 0..FILES {
        let i = (step * 7 + turn * 5) % FILES;
        let (name, seed) = match i < FILES / 2 {
            true => (format!("a{i}"), i),
            false => (format!("b{}", i - FILES / 2), 100 + i - FILES / 2),
        };
        assert!(mount.read(&name) == noise(seed, FILE), "{name}");
        mount.forget(&name);
    }
}

/// Returns the bytes on disk that count against the limit: data devices, trees and drafts.
fn counted(store: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    let files = |name: &str| std::fs::read_dir(store.join(name)).into_iter().flatten().flatten();
    let sizes = files("tmp")
        .chain(files("trees"))
        .filter_map(|entry| entry.metadata().ok());
    usage(store) + sizes.map(|m| m.blocks() * 512).sum::<u64>()
}

/// Returns the bytes on disk of all data devices.
fn usage(store: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    let layers = std::fs::read_dir(store.join("layers")).into_iter().flatten();
    let data = layers.map(|layer| std::fs::metadata(layer.unwrap().path().join("data")));
    data.map(|m| m.map_or(0, |m| m.blocks() * 512)).sum()
}

/// Returns all files of a store but the data devices: indexes, trees and documents.
fn made(store: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut directories: Vec<_> = ["layers", "trees", "documents"].map(|name| store.join(name)).into();
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else if path.file_name().unwrap() != "data" {
                found.insert(
                    path.strip_prefix(store).unwrap().to_owned(),
                    std::fs::read(&path).unwrap(),
                );
            }
        }
    }
    found
}

#[test]
fn the_cache_stays_near_its_limit_while_two_mounts_read() {
    let (_registry, image) = image();
    let limit = 3 << 20;
    let ocifs = Ocifs::with(&["--cache-size", "3MiB"]);
    let mounts = [ocifs.mount(&image), ocifs.mount(&image)];
    let done = AtomicBool::new(false);
    let most = std::thread::scope(|scope| {
        let readers: Vec<_> = (0..4)
            .map(|i| {
                let mount = &mounts[i % 2];
                scope.spawn(move || (0..2).for_each(|turn| read_all(mount, turn * 4 + i as u64)))
            })
            .collect();
        let watching = scope.spawn(|| {
            let mut most = 0;
            eventually("the readers are done", || {
                most = most.max(counted(ocifs.store()));
                done.load(Ordering::SeqCst)
            });
            most
        });
        let read: Vec<_> = readers.into_iter().map(|reader| reader.join()).collect();
        done.store(true, Ordering::SeqCst);
        let most = watching.join().unwrap();
        read.into_iter().for_each(|r| r.unwrap());
        most
    });
    assert!(most <= limit + (1 << 20), "{most}");
}

/// Opens a small image that unpacks to many times the limit, in several processes at once.
#[test]
fn no_image_takes_more_than_the_limit_at_any_time() {
    let registry = TestRegistry::start();
    let layers: Vec<Blob> = (0..3)
        .map(|i| Blob::gzip(&Tar::new().file(format!("zeros{i}"), vec![0; (40 + i) << 20]).finish()))
        .collect();
    push(&registry, "app", "1", &layers);
    let image = format!("{}/app:1", registry.host());
    let limit = 16 << 20;
    let ocifs = Ocifs::with(&["--cache-size", "16MiB"]);
    let done = AtomicBool::new(false);
    let most = std::thread::scope(|scope| {
        let watching = scope.spawn(|| {
            let mut most = 0;
            while !done.load(Ordering::SeqCst) {
                most = most.max(counted(ocifs.store()));
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            most
        });
        let mounts: Vec<_> = (0..3).map(|_| scope.spawn(|| ocifs.mount(&image))).collect();
        let mounts: Vec<Mounted> = mounts.into_iter().map(|mount| mount.join().unwrap()).collect();
        for (i, mount) in mounts.iter().enumerate() {
            assert!(mount.read(&format!("zeros{i}")) == vec![0; (40 + i) << 20]);
        }
        drop(mounts);
        done.store(true, Ordering::SeqCst);
        watching.join().unwrap()
    });
    // Each process may exceed the limit by one step.
    assert!(most <= limit + (4 << 20), "{most}");
    assert!(counted(ocifs.store()) <= limit + (1 << 20));
    assert!(most > limit / 2, "{most}");
}

#[test]
fn reads_go_on_whatever_the_cache_commands_delete() {
    let (_registry, image) = image();
    let ocifs = Ocifs::new();
    let mount = ocifs.mount(&image);
    let rows = ocifs.ok(["cache", "list", "--json"]).json();
    let rows = rows.as_array().unwrap();
    assert_eq!(rows.len(), 2);
    for row in rows {
        assert!(row["layer"].as_str().unwrap().starts_with("sha256:"), "{row}");
        assert!(row["index_bytes"].as_u64().unwrap() > 0, "{row}");
        let data = row["data_bytes"].as_u64().unwrap();
        let content = FILES / 2 * FILE as u64;
        assert!((content..content + (1 << 20)).contains(&data), "{row}");
    }
    assert!(ocifs.ok(["cache", "list"]).text().contains("2 layers"));

    ocifs.ok(["cache", "prune", "--to", "2MiB"]);
    assert!(usage(ocifs.store()) <= 2 << 20);
    read_all(&mount, 0);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let dropping = scope.spawn(|| {
            let mut turns = 0;
            while !done.load(Ordering::SeqCst) {
                let command: &[&str] = [&["cache", "drop"][..], &["cache", "prune", "--to", "1MiB"]][turns % 2];
                ocifs.ok(command);
                turns += 1;
            }
            turns
        });
        let read = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            (0..2).for_each(|turn| read_all(&mount, turn))
        }));
        done.store(true, Ordering::SeqCst);
        assert!(dropping.join().unwrap() > 0);
        read.unwrap();
    });
    let kept = made(ocifs.store());
    for kind in ["layers", "trees", "documents"] {
        assert!(
            kept.keys().any(|path| path.starts_with(kind)),
            "no {kind}: {:?}",
            kept.keys()
        );
    }
    ocifs.ok(["cache", "drop"]);
    // The map of present spans of each of the two layers stays.
    assert!(usage(ocifs.store()) <= 2 * (16 << 10), "{}", usage(ocifs.store()));
    assert!(made(ocifs.store()) == kept, "indexes, trees and documents stay");

    ocifs.ok(["cache", "drop", "--all"]);
    assert_eq!(ocifs.ok(["cache", "list", "--json"]).text().trim(), "[]");
    assert_eq!(made(ocifs.store()).into_keys().collect::<Vec<_>>(), [] as [PathBuf; 0]);
    read_all(&mount, 3);
    // Another mount starts from the empty store.
    let other = ocifs.mount(&image);
    assert_eq!(other.status()["layers"][0]["index_source"], "streamed");
    read_all(&other, 1);
    read_all(&mount, 2);
}

#[test]
fn small_files_are_evicted_to_the_last_block() {
    let content = |i: u64| noise(i, 700 + (i as usize * 97) % 9000);
    let tar = (0..800).fold(Tar::new(), |tar, i| tar.file(format!("s{i}"), content(i)));
    let registry = TestRegistry::start();
    push(&registry, "app", "1", &[Blob::gzip(&tar.finish())]);
    let ocifs = Ocifs::new();
    let mount = ocifs.mount(&format!("{}/app:1", registry.host()));
    let full = usage(ocifs.store());
    ocifs.ok(["cache", "prune", "--to", "2MiB"]);
    let pruned = usage(ocifs.store());
    assert!(pruned <= 2 << 20 && pruned > 1 << 20, "{pruned} of {full}");
    for i in 0..800 {
        assert!(mount.read(&format!("s{i}")) == content(i), "s{i}");
    }
    ocifs.ok(["cache", "drop"]);
    // The map of present spans stays, with room for checksums.
    assert!(usage(ocifs.store()) <= 16 << 10, "{}", usage(ocifs.store()));
}

#[test]
fn records_that_do_not_fit_are_an_error_and_are_begun_again() {
    let tar = Tar::new().file("f", [7; 512]).finish();
    let mut reader = TarReader::new(Limits::default());
    reader.push(&tar, &mut |_, _| ()).unwrap();
    let extents = reader.finish().unwrap().extents;
    // Spans of one byte, so that there are many records.
    let count = tar.len() as u32;
    let tmpfs = Tmpfs::new("24k");
    let store = Store::open(tmpfs.path()).unwrap();
    let dir = store.layer(&Digest::of(b"layer")).unwrap();
    let mut spans = SpanIndexBuilder::new(Compression::Tar).unwrap();
    for span in 0..count {
        spans.span(SpanStart {
            span: SpanId(span),
            tar_offset: span.into(),
            position: BitPosition(u64::from(span) * 8),
            restart: true,
        });
        spans.bytes(&tar[span as usize..][..1]);
    }
    let index = spans.finish(Identity {
        blob: Digest::of(b"layer"),
        blob_size: count.into(),
        diff_id: DiffId(Digest::of(b"layer")),
    });
    let spans = IndexedSpans::new(index.unwrap(), extents);
    let error = DataDevice::open(&store, &dir, &spans).unwrap_err();
    assert!(error.to_string().contains("No space left"), "{error}");
    tmpfs.resize("1m");
    let device = DataDevice::open(&store, &dir, &spans).unwrap();
    let last = count - 1;
    let (lock, _) = device.try_lock(&[last]).unwrap();
    assert!(device.fill(&lock, last, &[], b"").unwrap());
    assert!(device.is_present(last).unwrap());
}

#[test]
fn a_store_that_vanishes_does_not_disturb_a_mount() {
    let (_registry, image) = image();
    let ocifs = Ocifs::new();
    let mount = ocifs.mount(&image);
    ocifs.ok(["cache", "drop"]);
    std::fs::remove_dir_all(ocifs.store()).unwrap();
    read_all(&mount, 0);
    read_all(&mount, 1);
}

#[test]
fn damaged_indexes_are_made_again() {
    let (registry, image) = image();
    let ocifs = Ocifs::new();
    drop(ocifs.mount(&image));
    let files = |name: &str| -> Vec<_> {
        let layers = std::fs::read_dir(ocifs.store().join("layers")).unwrap();
        layers.map(|layer| layer.unwrap().path().join(name)).collect()
    };
    // The damaged file, and whether the layers have to be streamed again.
    for (name, streamed) in [
        ("spans", true),
        ("toc", true),
        ("extents", true),
        ("data", false),
        ("tree", false),
    ] {
        // Drops the cached data. Otherwise intact data would hide that a bad index is used. Damaged data has to stay.
        if name != "data" {
            ocifs.ok(["cache", "drop"]);
        }
        registry.clear_log();
        for path in files(name).into_iter().filter(|path| path.exists()) {
            let mut bytes = std::fs::read(&path).unwrap();
            // A truncated data device is discarded when it is opened. Wrong bytes in a data device are found when
            // they are read; another test does that.
            match name {
                "data" => bytes.truncate(bytes.len() - 1),
                _ => {
                    let middle = bytes.len() / 2;
                    bytes[middle] ^= 0x10;
                }
            }
            std::fs::write(&path, bytes).unwrap();
        }
        for tree in std::fs::read_dir(ocifs.store().join("trees")).unwrap() {
            std::fs::write(tree.unwrap().path(), b"no tree").unwrap();
        }
        // Without prefetching, the mount fetches nothing before it is read.
        let mount = ocifs.mount_with(&image, &["--wait", "ready", "--prefetch", "none"]);
        let status = mount.status();
        let layers = status["layers"].as_array().unwrap();
        assert_eq!(layers.len(), 2);
        // Returns the number of requests for a layer, without a range and with one.
        let requests = |layer: &serde_json::Value| {
            let digest = layer["digest"].as_str().unwrap();
            let log = registry.log();
            let (ranged, whole): (Vec<_>, Vec<_>) = log
                .iter()
                .filter(|logged| logged.target.contains(digest))
                .partition(|logged| logged.headers.contains_key("range"));
            (whole.len(), ranged.len())
        };
        for layer in layers {
            assert_eq!(requests(layer), (usize::from(streamed), 0), "{name}: {layer}");
        }
        read_all(&mount, 0);
        for layer in layers {
            let (whole, ranged) = requests(layer);
            assert_eq!((whole == 1, ranged > 0), (streamed, !streamed), "{name}: {layer}");
        }
    }
}
