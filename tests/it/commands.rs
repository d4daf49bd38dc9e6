//! Commands that manage mounts, in every state of a mount.

use std::path::Path;

use crate::common::layers::{Blob, Tar, noise, push};
use crate::common::oci_layout;
use crate::common::ocifs::{Ocifs, mountpoint};
use crate::common::registry::{Fault, TestRegistry};

fn layout(dir: &Path) -> String {
    let tar = Tar::new()
        .file("hello", b"hello, world\n")
        .file("big", noise(1, 300_000));
    oci_layout::write(dir, &[Blob::gzip(&tar.finish())])
}

#[test]
fn umount_answers_in_json_for_each_mount_point() {
    let images = tempfile::tempdir().unwrap();
    let image = layout(images.path());
    let ocifs = Ocifs::new();
    let (one, two) = (mountpoint(), mountpoint());
    ocifs.ok(["mount", &image, one.path().to_str().unwrap()]);
    let said = ocifs.run([
        "umount",
        "--json",
        one.path().to_str().unwrap(),
        two.path().to_str().unwrap(),
    ]);
    assert_eq!(said.code, Some(1), "{}", said.stderr);
    let lines: Vec<serde_json::Value> = said.text().lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(lines.len(), 2);
    assert_eq!(lines[0]["unmounted"], true);
    assert_eq!(lines[0]["problem"], serde_json::Value::Null);
    assert_eq!(lines[1]["unmounted"], false);
    assert!(lines[1]["problem"].as_str().unwrap().contains("not an ocifs mount"));
}

#[test]
fn arguments_may_be_set_apart() {
    let images = tempfile::tempdir().unwrap();
    let image = layout(images.path());
    let ocifs = Ocifs::new();
    let dir = mountpoint();
    ocifs.ok(["mount", "--wait", "ready", "--", &image, dir.path().to_str().unwrap()]);
    assert_eq!(std::fs::read(dir.path().join("hello")).unwrap(), b"hello, world\n");
    ocifs.ok(["umount", dir.path().to_str().unwrap()]);
}

#[test]
fn a_broken_configuration_does_not_keep_mounts_up() {
    let images = tempfile::tempdir().unwrap();
    let image = layout(images.path());
    let broken = images.path().join("broken.toml");
    std::fs::write(&broken, "store = [").unwrap();
    let ocifs = Ocifs::new();
    let dir = mountpoint();
    let (dir, broken) = (dir.path().to_str().unwrap(), broken.to_str().unwrap());
    ocifs.ok(["mount", &image, dir]);
    assert!(
        ocifs
            .run(["--config", broken, "ls", &image])
            .stderr
            .contains("broken.toml")
    );
    ocifs.ok(["--config", broken, "status", dir]);
    ocifs.ok(["--config", broken, "umount", dir]);
}

#[test]
fn links_that_go_in_circles_are_no_mount_point() {
    let dir = tempfile::tempdir().unwrap();
    let link = dir.path().join("loop");
    std::os::unix::fs::symlink("loop", &link).unwrap();
    let said = Ocifs::new().run(["umount", link.to_str().unwrap()]);
    assert_eq!(said.code, Some(1));
    assert!(
        said.stderr.contains("too many levels of symbolic links"),
        "{}",
        said.stderr
    );
}

#[test]
fn status_names_the_last_read_that_failed() {
    let registry = TestRegistry::start();
    let layer = Blob::gzip(&Tar::new().file("f", noise(3, 400_000)).finish());
    push(&registry, "app", "1", std::slice::from_ref(&layer));
    let image = format!("{}/app:1", registry.host());
    let ocifs = Ocifs::new();
    drop(ocifs.mount(&image));
    ocifs.ok(["cache", "drop"]);
    let mount = ocifs.mount(&image);
    assert_eq!(mount.status()["problem"], serde_json::Value::Null);
    registry.fault(&layer.path(), usize::MAX, Fault::Corrupt(1000));
    mount.read_error("f");
    let problem = mount.status()["problem"].as_str().unwrap().to_owned();
    assert!(
        problem.contains("a read failed") && problem.contains(&layer.digest().to_string()),
        "{problem}"
    );
}

#[test]
fn an_export_has_its_name_when_it_is_whole() {
    let images = tempfile::tempdir().unwrap();
    let registry = TestRegistry::start();
    let layer = Blob::gzip(&Tar::new().file("f", noise(4, 400_000)).finish());
    push(&registry, "app", "1", std::slice::from_ref(&layer));
    let image = format!("{}/app:1", registry.host());
    let ocifs = Ocifs::new();
    let output = images.path().join("disk");
    let path = output.to_str().unwrap();
    for format in ["tar", "erofs"] {
        std::fs::write(&output, "before").unwrap();
        drop(ocifs.mount(&image));
        ocifs.ok(["cache", "drop"]);
        registry.fault(&layer.path(), usize::MAX, Fault::Corrupt(1000));
        let said = ocifs.run(["export", "--format", format, "--output", path, &image]);
        assert_eq!(said.code, Some(1), "{format}");
        assert_eq!(std::fs::read(&output).unwrap(), b"before", "{format}");
        registry.clear_faults();
        ocifs.ok(["export", "--format", format, "--output", path, &image]);
        assert!(std::fs::metadata(&output).unwrap().len() > 400_000, "{format}");
        assert_eq!(
            std::fs::read_dir(images.path()).unwrap().count(),
            1,
            "{format}: something stays behind"
        );
    }
}
