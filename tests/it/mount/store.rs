//! The store that mounts share, and mounts without a store.

use std::path::Path;

use nix::sys::signal::Signal;

use super::{big_layer, hello};
use crate::common::bound::{Bound, read_only};
use crate::common::layers::{noise, push};
use crate::common::ocifs::{Mounted, Ocifs, Tmpfs, alive, eventually, send, tool};
use crate::common::registry::{Fault, TestRegistry};

/// Mounts an image `count` times at once and checks every mount.
fn mount_together(count: usize) {
    let registry = TestRegistry::start();
    let layers = [big_layer(20, 4), hello()];
    push(&registry, "app", "1", &layers);
    let image = format!("{}/app:1", registry.host());
    let ocifs = Ocifs::new();
    let mounts: Vec<Mounted> = std::thread::scope(|scope| {
        let mounting: Vec<_> = (0..count).map(|_| scope.spawn(|| ocifs.mount(&image))).collect();
        mounting.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for mount in &mounts {
        assert_eq!(mount.read("hello"), b"hello, world\n");
        assert!(mount.read("f3") == noise(23, 512 << 10));
    }
    for layer in &layers {
        assert_eq!(registry.count(&layer.path()), 1, "downloads of a layer");
    }
    std::thread::scope(|scope| {
        for mount in mounts {
            scope.spawn(move || drop(mount));
        }
    });
}

#[test]
fn two_mounts_at_once_download_each_layer_once() {
    mount_together(2);
}

#[test]
fn twenty_mounts_at_once_download_each_layer_once() {
    mount_together(20);
}

#[test]
fn a_first_pass_that_was_killed_leaves_nothing_that_is_believed() {
    let registry = TestRegistry::start();
    let layer = big_layer(60, 6);
    push(&registry, "app", "1", &[hello(), layer.clone()]);
    let image = format!("{}/app:1", registry.host());
    let ocifs = Ocifs::new();
    registry.fault(&layer.path(), 1, Fault::Stall(layer.bytes.len() / 2));
    let mount = ocifs.mount_with(&image, &[]);
    eventually("half of the layer is there", || {
        mount.status()["layers"][1]["fetched"].as_u64() == Some(layer.bytes.len() as u64 / 2)
    });
    send(mount.pid, Signal::SIGKILL);
    eventually("the process is dead", || !alive(mount.pid));
    assert_eq!(mount.umount(&[]).code, Some(0));
    let mount = ocifs.mount(&image);
    for i in 0..6 {
        assert!(mount.read(&format!("f{i}")) == noise(60 + i, 512 << 10), "f{i}");
    }
    assert_eq!(mount.status()["problem"], serde_json::Value::Null);
}

#[test]
fn a_store_that_cannot_be_written_does_not_keep_an_image_from_being_mounted() {
    let registry = TestRegistry::start();
    push(&registry, "app", "1", &[big_layer(30, 3), hello()]);
    let image = format!("{}/app:1", registry.host());
    let file = tempfile::NamedTempFile::new().unwrap();
    let below_a_file = file.path().join("store");
    for store in [below_a_file.as_path(), Path::new("/proc/ocifs-store")] {
        let ocifs = Ocifs::at(store);
        let mount = ocifs.mount(&image);
        assert_eq!(mount.read("hello"), b"hello, world\n");
        for i in 0..3 {
            assert!(mount.read(&format!("f{i}")) == noise(30 + i, 512 << 10));
        }
        let problem = mount.status()["problem"].clone();
        assert!(problem.as_str().is_some_and(|p| p.contains("store")), "{problem}");
        let said = ocifs.run(["pull", &image]);
        assert!(
            said.code == Some(1) && said.stderr.contains("nothing can be kept"),
            "{said:?}"
        );
    }
}

#[test]
fn a_full_store_does_not_keep_an_image_from_being_read() {
    let registry = TestRegistry::start();
    push(&registry, "app", "1", &[big_layer(40, 6), hello()]);
    let image = format!("{}/app:1", registry.host());
    // The sizes have room for nothing, for the index alone, or for some of the data.
    for size in ["4k", "8k", "32k", "64k", "100k", "1m", "3m"] {
        let tmpfs = Tmpfs::new(size);
        let ocifs = Ocifs::at(&tmpfs.path().join("store"));
        let mount = ocifs.mount(&image);
        for round in 0..2 {
            for i in 0..6 {
                let name = format!("f{i}");
                assert!(
                    mount.read(&name) == noise(40 + i, 512 << 10),
                    "{size}, round {round}, {name}"
                );
                mount.forget(&name);
            }
        }
        let status = mount.status();
        assert!(
            status["problem"].as_str().is_some_and(|p| p.contains("store")),
            "{size}: {status}"
        );
        drop(mount);
        // The files that the first mount left do not harm the next mount.
        let mount = ocifs.mount(&image);
        assert_eq!(mount.read("hello"), b"hello, world\n");
        assert!(mount.read("f5") == noise(45, 512 << 10), "{size}");
    }
}

#[test]
fn a_complete_store_that_is_read_only_serves_without_fetching() {
    let registry = TestRegistry::start();
    let layer = big_layer(50, 6);
    push(&registry, "app", "1", &[layer.clone(), hello()]);
    let image = format!("{}/app:1", registry.host());
    let ocifs = Ocifs::new();
    ocifs.ok(["pull", &image]);
    let before = std::fs::read_dir(ocifs.store()).unwrap().count();
    let _bound = read_only(ocifs.store());
    registry.clear_log();
    for options in [&["--wait", "ready"][..], &["--writable"]] {
        let mount = ocifs.mount_with(&image, options);
        assert_eq!(mount.read("hello"), b"hello, world\n");
        for i in 0..6 {
            assert!(mount.read(&format!("f{i}")) == noise(50 + i, 512 << 10), "f{i}");
        }
        if options.contains(&"--writable") {
            std::fs::write(mount.join("new"), b"new").unwrap();
            assert_eq!(mount.read("new"), b"new");
        }
        assert_eq!(mount.status()["problem"], serde_json::Value::Null);
    }
    assert_eq!(registry.count(&layer.path()), 0);
    assert_eq!(std::fs::read_dir(ocifs.store()).unwrap().count(), before);
}

#[test]
fn a_read_only_store_without_the_data_is_read_from_the_registry() {
    let registry = TestRegistry::start();
    push(&registry, "app", "1", &[big_layer(50, 6), hello()]);
    let image = format!("{}/app:1", registry.host());
    let ocifs = Ocifs::knowing(&image);
    let _bound = read_only(ocifs.store());
    let mount = ocifs.mount(&image);
    for _ in 0..2 {
        for i in 0..6 {
            let name = format!("f{i}");
            mount.forget(&name);
            assert!(mount.read(&name) == noise(50 + i, 512 << 10), "{name}");
        }
    }
    push(&registry, "other", "1", &[big_layer(60, 2)]);
    let other = ocifs.mount(&format!("{}/other:1", registry.host()));
    assert!(other.read("f1") == noise(61, 512 << 10));
}

/// On a full copy-on-write file system, a write fails even where the file has blocks. So the mount cannot record that
/// a span was used.
#[test]
fn a_full_copy_on_write_file_system_harms_no_mount() {
    if !std::fs::read_to_string("/proc/filesystems").unwrap().contains("btrfs") {
        eprintln!("SKIPPED: this kernel has no btrfs");
        return;
    }
    let registry = TestRegistry::start();
    push(&registry, "app", "1", &[big_layer(70, 6), hello()]);
    let image = format!("{}/app:1", registry.host());
    let directory = tempfile::tempdir().unwrap();
    let (disk, path) = (directory.path().join("disk"), directory.path().join("mnt"));
    std::fs::create_dir(&path).unwrap();
    std::fs::File::create(&disk).unwrap().set_len(200 << 20).unwrap();
    tool("mkfs.btrfs", ["-q", disk.to_str().unwrap()]);
    tool("mount", ["-o", "loop", disk.to_str().unwrap(), path.to_str().unwrap()]);
    let _bound = Bound(path.clone());
    let ocifs = Ocifs::at(&path.join("store"));
    ocifs.ok(["pull", &image]);
    // Fills the file system to the last block.
    let fill = |size: usize| {
        let mut fill = std::fs::File::create(path.join(format!("fill{size}"))).unwrap();
        while std::io::Write::write_all(&mut fill, &vec![1; size]).is_ok() {}
        let _ = fill.sync_all();
    };
    fill(1 << 20);
    fill(4096);
    let mount = ocifs.mount_with(&image, &["--wait", "ready", "--prefetch", "none"]);
    for round in 0..2 {
        for i in 0..6 {
            let name = format!("f{i}");
            mount.forget(&name);
            assert!(mount.read(&name) == noise(70 + i, 512 << 10), "{round} {name}");
        }
        if round > 0 {
            continue;
        }
        // The mount cannot rewrite damaged data on the full file system, and still serves the right bytes. Cutting a
        // file needs a little space too.
        std::fs::remove_file(path.join(format!("fill{}", 1 << 20))).unwrap();
        for layer in std::fs::read_dir(ocifs.store().join("layers")).unwrap() {
            let data = layer.unwrap().path().join("data");
            let file = std::fs::File::options().write(true).open(data).unwrap();
            file.set_len(1 << 20).unwrap();
        }
        fill(1 << 20);
        fill(4096);
    }
    assert!(alive(mount.pid));
}

#[test]
fn what_the_store_has_is_for_its_owner_alone_whoever_made_the_directory() {
    use std::os::unix::fs::PermissionsExt as _;
    let registry = TestRegistry::start();
    push(&registry, "app", "1", &[big_layer(80, 2), hello()]);
    let image = format!("{}/app:1", registry.host());
    let directory = tempfile::tempdir().unwrap();
    std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let ocifs = Ocifs::at(directory.path());
    let mut command = std::process::Command::new("sh");
    let pull = ocifs.command(["pull", &image]);
    command
        .args(["-c", "umask 0; exec \"$@\"", "sh"])
        .arg(pull.get_program())
        .args(pull.get_args());
    assert_eq!(crate::common::ocifs::bounded(&mut command).code, Some(0));
    let mut directories = vec![directory.path().to_owned()];
    let mut seen = 0;
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let entry = entry.unwrap();
            let mode = entry.metadata().unwrap().permissions().mode() & 0o777;
            let wanted = if entry.path().is_dir() { 0o700 } else { 0o600 };
            assert_eq!(mode, wanted, "{mode:o} {}", entry.path().display());
            directories.extend(entry.path().is_dir().then(|| entry.path()));
            seen += 1;
        }
    }
    assert!(seen > 15, "{seen}");
}
