//! The log of a background process.

use std::fs::{self, File};
use std::io::{Read as _, Seek as _, Write as _};

use super::{plain, quick, setup};
use crate::common::layers::{Blob, Tar, noise, push};
use crate::common::ocifs::{Ocifs, bounded, eventually};
use crate::common::registry::{Fault, TestRegistry};

/// Returns an image of many files. From here on the registry sends its layer damaged.
fn damaged(registry: &TestRegistry, ocifs: &Ocifs) -> String {
    let tar = (0..8).fold(Tar::new(), |tar, i| tar.file(format!("f{i}"), noise(i, 300_000)));
    let layer = Blob::gzip(&tar.finish());
    push(registry, "app", "1", std::slice::from_ref(&layer));
    let image = format!("{}/app:1", registry.host());
    drop(ocifs.mount_with(&image, &["--wait", "ready", "--prefetch", "none"]));
    ocifs.ok(["cache", "drop"]);
    registry.fault(&layer.path(), usize::MAX, Fault::Corrupt(1000));
    image
}

#[test]
fn status_names_the_log() {
    let (ocifs, image) = setup();
    let mount = ocifs.mount(&image);
    let log = mount.registration().join("log");
    assert_eq!(mount.status()["log"], log.to_str().unwrap());
    let said = quick(plain().arg("status").arg(mount.path()));
    assert!(
        said.text().contains(&format!("log         {}", log.display())),
        "{said:?}"
    );
    drop(mount);

    let directory = crate::common::ocifs::mountpoint();
    let mut command = ocifs.command(["mount", "--foreground", &image, directory.path().to_str().unwrap()]);
    let mut child = command.spawn().unwrap();
    eventually("it is up", || {
        super::rows(directory.path()).iter().any(|row| row["state"] == "ready")
    });
    assert_eq!(super::row(directory.path())["log"], serde_json::Value::Null);
    ocifs.ok(["umount", directory.path().to_str().unwrap()]);
    child.wait().unwrap();
}

#[test]
fn what_repeats_is_logged_once_with_a_count() {
    for format in ["text", "json"] {
        let registry = TestRegistry::start();
        let ocifs = Ocifs::with(&["--log-format", format]);
        let image = damaged(&registry, &ocifs);
        let mount = ocifs.mount_with(&image, &["--wait", "ready", "--prefetch", "none"]);
        let mut log = File::open(mount.registration().join("log")).unwrap();
        for _ in 0..25 {
            mount.read_error("f0");
        }
        let mut text = String::new();
        log.read_to_string(&mut text).unwrap();
        let told = text.matches("answering a read with an error").count();
        // The kernel may read parts of the file separately, and they may fail differently.
        assert!((1..=4).contains(&told), "{told} times: {text}");
        assert!(text.lines().count() < 25, "{text}");
        // The end of the process logs the remaining counts.
        assert_eq!(mount.umount(&[]).code, Some(0));
        mount.assert_gone();
        log.rewind().unwrap();
        text.clear();
        log.read_to_string(&mut text).unwrap();
        assert!(text.contains("repeated: ") && text.contains("times"), "{text}");
        if format == "json" {
            for line in text.lines() {
                serde_json::from_str::<serde_json::Value>(line).unwrap_or_else(|e| panic!("{e}: {line}"));
            }
        }
    }
}

#[test]
fn the_log_is_bounded() {
    let registry = TestRegistry::start();
    let ocifs = Ocifs::new();
    let image = damaged(&registry, &ocifs);
    let mount = ocifs.mount_with(&image, &["--wait", "ready", "--prefetch", "none"]);
    let path = mount.registration().join("log");
    // As many lines as weeks of failures would write.
    let mut log = File::options().append(true).open(&path).unwrap();
    for i in 0..100_000 {
        writeln!(log, "an old line, number {i}, that nobody needs any more").unwrap();
    }
    let before = fs::metadata(&path).unwrap().len();
    mount.read_error("f0");
    eventually("the log is cut", || fs::metadata(&path).unwrap().len() < before);
    assert!(fs::metadata(&path).unwrap().len() <= 4 << 20);
    let text = fs::read_to_string(&path).unwrap();
    assert!(text.starts_with("an old line, number"), "whole lines are left");
    assert!(
        text.contains("number 99999,") && text.contains("ERROR"),
        "the end is left"
    );
}

#[test]
fn the_log_of_a_mount_that_died_is_named() {
    let (ocifs, image) = setup();
    let mount = ocifs.mount(&image);
    crate::common::ocifs::send(mount.pid, nix::sys::signal::Signal::SIGKILL);
    eventually("the process is dead", || !crate::common::ocifs::alive(mount.pid));
    let said = bounded(plain().args(["status", "--json"]).arg(mount.path()));
    assert_eq!(said.code, Some(1));
    assert_eq!(said.json()["log"], mount.registration().join("log").to_str().unwrap());
}
