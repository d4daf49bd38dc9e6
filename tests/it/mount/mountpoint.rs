//! The directory on which an image is mounted.

use std::path::Path;

use super::hello_image;
use crate::common::ocifs::{Ocifs, mounted_type, mountpoint, tool, unmount};

#[test]
fn a_mount_point_can_be_used_again_at_once() {
    let (_registry, image, _) = hello_image();
    let ocifs = Ocifs::new();
    let directory = mountpoint();
    let path = directory.path().to_str().unwrap();
    for _ in 0..5 {
        ocifs.ok(["mount", "--wait", "ready", &image, path]);
        assert_eq!(
            std::fs::read(directory.path().join("hello")).unwrap(),
            b"hello, world\n"
        );
        unmount(path);
    }
    ocifs.ok(["mount", "--wait", "ready", &image, path]);
    ocifs.ok(["umount", path]);
    let error = ocifs.fails(["status", path]);
    assert!(error.contains("is not an ocifs mount"), "{error}");
}

#[test]
fn one_of_two_mounts_on_one_directory_wins() {
    let (_registry, image, _) = hello_image();
    let ocifs = Ocifs::new();
    for _ in 0..5 {
        let directory = mountpoint();
        let path = directory.path().to_str().unwrap();
        let mount = || ocifs.run(["mount", "--wait", "ready", &image, path]);
        let said = std::thread::scope(|scope| {
            let other = scope.spawn(mount);
            [mount(), other.join().unwrap()]
        });
        let won = said.iter().filter(|s| s.code == Some(0)).count();
        assert_eq!(won, 1, "{said:?}");
        assert_eq!(
            std::fs::read(directory.path().join("hello")).unwrap(),
            b"hello, world\n"
        );
        ocifs.ok(["umount", path]);
        assert_eq!(mounted_type(directory.path()), None);
    }
}

#[test]
fn what_others_mount_is_left_alone() {
    let (_registry, image, _) = hello_image();
    let ocifs = Ocifs::new();
    let mount = ocifs.mount(&image);
    let path = mount.path().to_str().unwrap();
    tool("mount", ["-t", "tmpfs", "tmpfs", path]);
    let said = mount.umount(&[]);
    assert!(said.code == Some(1) && said.stderr.contains("covered"), "{said:?}");
    assert_eq!(mounted_type(mount.path()).as_deref(), Some("tmpfs"));
    unmount(path);
    assert_eq!(mount.read("hello"), b"hello, world\n");
    assert_eq!(mount.umount(&[]).code, Some(0));
    mount.assert_gone();
}

#[test]
fn mount_points_need_not_be_text() {
    use std::os::unix::ffi::OsStrExt as _;
    let (_registry, image, _) = hello_image();
    let ocifs = Ocifs::new();
    let directory = mountpoint();
    for name in [&b"latin1 \xe9"[..], b"new\nline", b"back\\slash, comma", b"#hash"] {
        let path = directory.path().join(std::ffi::OsStr::from_bytes(name));
        std::fs::create_dir(&path).unwrap();
        let arguments = ["mount", "--wait", "ready", &image].map(std::ffi::OsStr::new);
        ocifs.ok(arguments.into_iter().chain([path.as_os_str()]));
        assert_eq!(std::fs::read(path.join("hello")).unwrap(), b"hello, world\n");
        ocifs.ok([Path::new("status"), &path]);
        ocifs.ok([Path::new("list"), Path::new("--json")]);
        ocifs.ok([Path::new("umount"), &path]);
        std::fs::remove_dir(&path).unwrap();
    }
}

#[test]
fn unusable_mount_points_are_refused() {
    let (_registry, image, _) = hello_image();
    let ocifs = Ocifs::new();
    let directory = mountpoint();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let error = ocifs.fails(["mount", &image, &path("missing")]);
    assert!(error.contains("missing") && error.contains("does not exist"), "{error}");
    std::fs::write(path("file"), b"").unwrap();
    let error = ocifs.fails(["mount", &image, &path("file")]);
    assert!(error.contains("not a directory"), "{error}");
    let error = ocifs.fails(["mount", &image, directory.path().to_str().unwrap()]);
    assert!(error.contains("not empty") && error.contains("nonempty"), "{error}");
    let mount = ocifs.mount(&image);
    let error = ocifs.fails(["mount", &image, mount.path().to_str().unwrap()]);
    assert!(error.contains("already") && error.contains(&image), "{error}");
    assert_eq!(
        mount.status()["pid"],
        mount.pid,
        "the refused one left the registration alone"
    );
    assert_eq!(mount.read("hello"), b"hello, world\n");
    let error = ocifs.fails(["umount", directory.path().to_str().unwrap()]);
    assert!(error.contains("is not an ocifs mount"), "{error}");
    let error = ocifs.fails(["mount", "-o", "rw", &image, mountpoint().path().to_str().unwrap()]);
    assert!(error.contains("unknown mount option `rw`"), "{error}");
}
