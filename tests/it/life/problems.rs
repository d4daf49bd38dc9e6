//! The status shows a problem when it begins, and clears it when it is over.

use serde_json::Value;

use super::setup;
use crate::common::layers::{Blob, Tar, noise, push};
use crate::common::ocifs::{Ocifs, Tmpfs, eventually, mountpoint};
use crate::common::registry::{Fault, TestRegistry};

#[test]
fn an_unusable_store_is_said_at_once() {
    let (_kept, image) = setup();
    let file = tempfile::NamedTempFile::new().unwrap();
    let full = Tmpfs::new("4k");
    std::fs::write(full.path().join("filler"), [1; 4096]).unwrap();
    for store in [file.path().join("store"), full.path().to_owned()] {
        let ocifs = Ocifs::at(&store);
        let directory = mountpoint();
        let path = directory.path().to_str().unwrap();
        for options in [&[][..], &["--wait", "ready"], &["--writable"]] {
            let said = ocifs.ok([&["mount"], options, &[&image, path]].concat());
            assert_eq!(said.stderr.lines().count(), 1, "{said:?}");
            assert!(said.stderr.starts_with("ocifs: the store cannot be "), "{said:?}");
            assert_eq!(ocifs.ok(["umount", path]).stderr, "");
        }
    }
}

#[test]
fn trouble_with_the_store_ends_when_there_is_room() {
    let registry = TestRegistry::start();
    let tar = (0..6).fold(Tar::new(), |tar, i| tar.file(format!("f{i}"), noise(i, 512 << 10)));
    push(&registry, "app", "1", &[Blob::gzip(&tar.finish())]);
    let image = format!("{}/app:1", registry.host());
    let tmpfs = Tmpfs::new("64m");
    let ocifs = Ocifs::at(&tmpfs.path().join("store")).learns(&image);
    tmpfs.resize("1m");
    let mount = ocifs.mount_with(&image, &["--wait", "ready", "--prefetch", "none"]);
    for i in 0..6 {
        assert!(mount.read(&format!("f{i}")) == noise(i, 512 << 10));
    }
    let problem = mount.status()["problem"].clone();
    assert!(problem.as_str().is_some_and(|p| p.contains("store")), "{problem}");
    tmpfs.resize("64m");
    eventually("the trouble is over", || mount.status()["problem"] == Value::Null);
}

#[test]
fn trouble_with_reads_ends_when_reads_work() {
    let registry = TestRegistry::start();
    let layers = [1, 2].map(|i| Blob::gzip(&Tar::new().file(format!("f{i}"), noise(i, 400_000)).finish()));
    push(&registry, "app", "1", &layers);
    let image = format!("{}/app:1", registry.host());
    let ocifs = Ocifs::with(&["--timeout", "2s"]).learns(&image);
    let mount = ocifs.mount_with(&image, &["--wait", "ready", "--prefetch", "none"]);

    // The registry fails for a while. Any fetch that works clears the problem.
    registry.fault("/blobs/", usize::MAX, Fault::status(404));
    mount.read_error("f1");
    assert!(mount.status()["problem"].as_str().unwrap().contains("a read failed"));
    registry.clear_faults();
    assert!(mount.read("f2") == noise(2, 400_000));
    assert_eq!(mount.status()["problem"], Value::Null);

    // The data of one file is wrong. Only reading that file clears the problem.
    mount.forget("f2");
    ocifs.ok(["cache", "drop"]);
    registry.fault(&layers[0].path(), usize::MAX, Fault::Corrupt(1000));
    mount.read_error("f1");
    let problem = mount.status()["problem"].clone();
    assert!(
        problem.as_str().unwrap().contains(&layers[0].digest().to_string()),
        "{problem}"
    );
    assert!(mount.read("f2") == noise(2, 400_000));
    assert_eq!(mount.status()["problem"], problem);
    registry.clear_faults();
    assert!(mount.read("f1") == noise(1, 400_000));
    assert_eq!(mount.status()["problem"], Value::Null);
}
