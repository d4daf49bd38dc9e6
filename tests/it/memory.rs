//! Resources of a process: decoded data in memory without a store, tables of large images, windows of decoders, and
//! open files.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::process::{Command, Stdio};
use std::time::Instant;

use nix::libc;

use crate::common::layers::{Blob, Tar, noise, push};
use crate::common::oci_layout;
use crate::common::ocifs::{Mounted, Ocifs, PATIENCE, alive, bounded, eventually, isolate, mountpoint, tool};
use crate::common::registry::TestRegistry;

const BIG: usize = 8 << 20;
const LIMIT: u64 = 1 << 20;
const BLOCK: usize = 4096;

/// Reads one page of a file from the process, past the page cache.
fn read_direct(file: &File, offset: u64) -> Vec<u8> {
    let mut buffer = [0_u8; 2 * BLOCK];
    let aligned = buffer.as_ptr().align_offset(BLOCK);
    file.read_exact_at(&mut buffer[aligned..][..BLOCK], offset).unwrap();
    buffer[aligned..][..BLOCK].to_vec()
}

#[test]
fn memory_keeps_what_was_read_last_and_no_more_than_it_may() {
    let tar = Tar::new().file("big", noise(3, BIG)).finish();
    for layer in [Blob::gzip(&tar), Blob::plain(tar.clone())] {
        let registry = TestRegistry::start();
        push(&registry, "app", "1", std::slice::from_ref(&layer));
        let file = tempfile::NamedTempFile::new().unwrap();
        let ocifs = Ocifs::at(&file.path().join("store"));
        let mount = ocifs.mount_with(
            &format!("{}/app:1", registry.host()),
            &["--memory", "1MiB", "--wait", "ready", "--via", "fuse"],
        );
        let problem = mount.status()["problem"].clone();
        assert!(problem.as_str().is_some_and(|p| p.contains("store")), "{problem}");
        let memory = || mount.status()["memory"].as_u64().unwrap();
        let content = noise(3, BIG);
        let file = File::options()
            .read(true)
            .custom_flags(libc::O_DIRECT)
            .open(mount.join("big"))
            .unwrap();
        let offsets = || (0..BIG).step_by(64 << 10);
        for offset in offsets() {
            assert!(
                read_direct(&file, offset as u64) == content[offset..][..BLOCK],
                "{offset} {}",
                layer.media_type
            );
            assert!(memory() <= LIMIT, "{}", memory());
        }
        assert!(memory() > 0, "nothing is kept: {}", layer.media_type);
        let last = offsets().next_back().unwrap();
        registry.clear_log();
        for _ in 0..3 {
            assert!(read_direct(&file, last as u64) == content[last..][..BLOCK]);
        }
        assert_eq!(
            registry.count(&layer.path()),
            0,
            "the last span again: {}",
            layer.media_type
        );
        // The first span was evicted for it.
        assert!(read_direct(&file, 0) == content[..BLOCK]);
        assert_ne!(registry.count(&layer.path()), 0, "{}", layer.media_type);
        let mut before = 0;
        eventually("what is read ahead has come", || {
            let load = &mount.status()["in_flight"];
            let now = registry.count(&layer.path());
            load["others"] == 0 && load["waiting"] == 0 && std::mem::replace(&mut before, now) == now
        });
        registry.clear_log();
        assert!(read_direct(&file, 0) == content[..BLOCK]);
        assert_eq!(
            registry.count(&layer.path()),
            0,
            "the first span again: {}",
            layer.media_type
        );
        assert!(memory() <= LIMIT, "{}", memory());
    }
}

/// MiB that README.md promises as the limit beyond `--memory`.
const CONSTANT: u64 = 256;

/// Returns the peak memory of a process so far, in MiB.
fn peak(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().unwrap() / 1024)
}

fn peak_of(mount: &Mounted) -> u64 {
    peak(mount.pid).unwrap()
}

/// Runs a command that must fail. Returns its standard error and its peak memory in MiB.
fn fails_within(ocifs: &Ocifs, arguments: &[&str]) -> (String, u64) {
    let mut child = ocifs
        .command(arguments)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + PATIENCE;
    let mut most = 0;
    let status = loop {
        most = most.max(peak(child.id()).unwrap_or(0));
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        assert!(Instant::now() < deadline, "{arguments:?} does not end");
        std::thread::sleep(std::time::Duration::from_millis(2));
    };
    assert_eq!(status.code(), Some(1));
    let mut text = String::new();
    child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    (text, most)
}

fn with_xattr(tar: Tar, name: &str, value: &[u8]) -> Tar {
    tar.pax(&[("SCHILY.xattr.user.a", value)]).file(name, "")
}

#[test]
fn equal_attributes_of_many_files_are_kept_once() {
    let value = noise(1, 60_000);
    let tar = (0..3000).fold(Tar::new(), |tar, number| with_xattr(tar, &format!("f{number}"), &value));
    let directory = tempfile::tempdir().unwrap();
    let image = oci_layout::write(directory.path(), &[Blob::gzip(&tar.finish())]);
    let ocifs = Ocifs::new();
    for _ in 0..2 {
        let mount = ocifs.mount(&image);
        // The values of all files are 170 MiB.
        assert!(peak_of(&mount) < 120, "{} MiB", peak_of(&mount));
        for name in ["f0", "f1777", "f2999"] {
            let path = mount.join(name);
            let found = tool("getfattr", ["--only-values", "-n", "user.a", path.to_str().unwrap()]);
            assert!(found == value, "{name}: {} bytes", found.len());
        }
    }
}

#[test]
fn an_image_that_says_too_much_is_refused() {
    let value = |number: usize| format!("{number:060000}").into_bytes();
    let tar = |from: usize| {
        let files = from..from + 1500;
        files.fold(Tar::new(), |tar, number| {
            with_xattr(tar, &format!("f{number}"), &value(number))
        })
    };
    let one: Vec<_> = [0].map(|from| Blob::gzip(&tar(from).finish())).into();
    let three: Vec<_> = [0, 1500, 3000].map(|from| Blob::gzip(&tar(from).finish())).into();
    let directory = tempfile::tempdir().unwrap();
    let ocifs = Ocifs::with(&["--memory", "1MiB"]);
    // No layer is too large alone, but together they are. They are read in parallel, so the refused layer varies.
    let image = oci_layout::write(&directory.path().join("three"), &three);
    let (error, most) = fails_within(&ocifs, &["ls", &image]);
    let wanted = ["layer ", "f", "193 MiB", "--memory"];
    assert!(wanted.iter().all(|part| error.contains(part)), "{error}");
    assert!(most <= 1 + CONSTANT, "{most} MiB");
    let enough = Ocifs::with(&["--memory", "128MiB"]);
    assert_eq!(enough.ok(["ls", &image]).text().lines().count(), 4500);
    // Without a store the tables stay in memory, in packed form.
    let file = tempfile::NamedTempFile::new().unwrap();
    let homeless = Ocifs::at(&file.path().join("store"));
    let image = oci_layout::write(&directory.path().join("one"), &one);
    assert_eq!(homeless.ok(["ls", &image]).text().lines().count(), 1500);
}

/// Compresses a tar as one frame without a content size and with a window of 2 GiB.
fn long_zstd(tar: &[u8]) -> Blob {
    let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
    encoder.long_distance_matching(true).unwrap();
    encoder.window_log(31).unwrap();
    encoder.write_all(tar).unwrap();
    Blob {
        bytes: encoder.finish().unwrap(),
        ..Blob::zstd(tar)
    }
}

#[test]
fn a_window_takes_what_it_holds_and_no_more_than_is_allowed() {
    let directory = tempfile::tempdir().unwrap();
    let small = long_zstd(&Tar::new().file("small", "content").finish());
    let image = oci_layout::write(&directory.path().join("small"), &[small]);
    let ocifs = Ocifs::with(&["--memory", "1MiB"]);
    let mount = ocifs.mount(&image);
    assert_eq!(mount.read("small"), b"content");
    assert!(peak_of(&mount) < 100, "{} MiB", peak_of(&mount));

    let zeros = vec![0; 220 << 20];
    let large = long_zstd(&Tar::new().file("large", &zeros).finish());
    let image = oci_layout::write(&directory.path().join("large"), &[large]);
    let (error, most) = fails_within(&ocifs, &["ls", &image]);
    let wanted = ["window", "193 MiB", "--memory"];
    assert!(wanted.iter().all(|part| error.contains(part)), "{error}");
    assert!(most <= 1 + CONSTANT, "{most} MiB");
    let enough = Ocifs::with(&["--memory", "128MiB"]);
    assert!(enough.ok(["ls", &image]).text().trim().ends_with("large"));
}

#[test]
fn readers_of_large_windows_take_no_more_together() {
    const SIZE: usize = 100 << 20;
    let layer = |number: usize| {
        let mut content = vec![0; SIZE];
        content[SIZE - 1] = number as u8;
        long_zstd(&Tar::new().file(format!("f{number}"), &content).finish())
    };
    let registry = TestRegistry::start();
    push(&registry, "app", "1", &(0..4).map(layer).collect::<Vec<_>>());
    let ocifs = Ocifs::with(&["--memory", "1MiB"]);
    let image = format!("{}/app:1", registry.host());
    let mount = ocifs.mount_with(&image, &["--wait", "ready", "--prefetch", "none"]);
    ocifs.ok(["cache", "prune", "--to", "0B"]);
    registry.clear_log();
    std::thread::scope(|scope| {
        for number in 0..4 {
            let path = mount.join(format!("f{number}"));
            scope.spawn(move || {
                let file = File::open(path).unwrap();
                let mut last = [0];
                file.read_exact_at(&mut last, SIZE as u64 - 1).unwrap();
                assert_eq!(last, [number]);
            });
        }
    });
    assert_ne!(registry.log().len(), 0, "they were decoded again");
    assert!(peak_of(&mount) <= 1 + CONSTANT, "{} MiB", peak_of(&mount));
}

/// Returns the command with a limit of open files.
fn with_files(limit: u32, direct: &Command, ocifs: &Ocifs) -> Command {
    let mut command = Command::new("prlimit");
    isolate(&mut command, ocifs.home());
    command
        .arg(format!("--nofile={limit}:{limit}"))
        .arg("--")
        .arg(direct.get_program())
        .args(direct.get_args());
    for (name, value) in direct.get_envs() {
        command.env(name, value.expect("no variable is taken away one by one"));
    }
    command
}

/// Mounts an image twice and reads all its files. Each layer has one file, named and filled by its number.
fn assert_readable_with_files(image: &str, layers: usize, files: u32) {
    let ocifs = Ocifs::new();
    for _ in 0..2 {
        let point = mountpoint();
        let path = point.path().to_str().unwrap();
        let mount = ocifs.command(["mount", "--json", "--wait", "ready", image, path]);
        let said = bounded(&mut with_files(files, &mount, &ocifs));
        assert_eq!(said.code, Some(0), "{said:?}");
        let pid = said.json()["pid"].as_u64().unwrap();
        for number in (0..layers).chain([0, layers - 1]) {
            let name = format!("f{number}");
            assert_eq!(
                std::fs::read(point.path().join(&name)).unwrap(),
                number.to_string().as_bytes()
            );
        }
        let open = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
        assert!(open < files as usize, "{open}");
        let problem = ocifs.ok(["status", "--json", path]).json()["problem"].clone();
        assert!(problem.is_null(), "{problem}");
        ocifs.ok(["umount", path]);
        eventually("the process ends", || !alive(pid as u32));
    }
    let prune = ocifs.command(["cache", "prune", "--to", "0B"]);
    let said = bounded(&mut with_files(files, &prune, &ocifs));
    assert_eq!(said.code, Some(0), "{said:?}");
}

fn small_layers(count: usize) -> Vec<Blob> {
    let tar = |number| Tar::new().file(format!("f{number}"), format!("{number}")).finish();
    (0..count).map(|number| Blob::gzip(&tar(number))).collect()
}

#[test]
fn an_image_can_have_more_layers_than_a_process_has_files() {
    let directory = tempfile::tempdir().unwrap();
    let image = oci_layout::write(directory.path(), &small_layers(2000));
    assert_readable_with_files(&image, 2000, 1024);
}

#[test]
fn so_can_one_from_a_registry() {
    let registry = TestRegistry::start();
    push(&registry, "app", "1", &small_layers(400));
    assert_readable_with_files(&format!("{}/app:1", registry.host()), 400, 256);
}

#[test]
fn so_can_one_from_an_archive() {
    let directory = tempfile::tempdir().unwrap();
    let layout = oci_layout::write(&directory.path().join("layout"), &small_layers(400));
    let archive = format!("docker-archive:{}", directory.path().join("archive.tar").display());
    tool("skopeo", ["copy", "--quiet", &layout, &format!("{archive}:app:1")]);
    assert_readable_with_files(&archive, 400, 256);
}
