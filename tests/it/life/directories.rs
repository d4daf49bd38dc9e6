//! The mount point, the run directory and the directories of changes. They are dead, moved or replaced, or another
//! user tries to read them.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::sys::signal::Signal;

use super::{plain, quick, row, setup};
use crate::common::layers::{Blob, Tar, push};
use crate::common::namespace::{LEAVE_OTHERS, copies};
use crate::common::ocifs::{Ocifs, alive, bounded, eventually, mounted_type, mountpoint, send, tool, unmount, wait};
use crate::common::registry::TestRegistry;

#[test]
fn a_mount_replaces_a_dead_one() {
    let (ocifs, image) = setup();
    for options in [&["--wait", "ready"][..], &["--writable"]] {
        for lost in [false, true] {
            let dead = ocifs.mount_with(&image, options);
            // An open file of the dead mount does not keep it mounted.
            let user = File::open(dead.join("hello")).unwrap();
            send(dead.pid, Signal::SIGKILL);
            eventually("the process is dead", || !alive(dead.pid));
            if lost && options.len() == 2 {
                fs::remove_dir_all(dead.registration()).unwrap();
            }
            let path = dead.path().to_str().unwrap();
            // With a slash at the end, most programs access the mounted directory.
            ocifs.ok([&["mount"], options, &[&image, &format!("{path}/")]].concat());
            assert_eq!(dead.read("hello"), b"hello, world\n");
            let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
            assert_eq!(table.matches(&format!(" {path} ")).count(), 1, "{table}");
            let pid = row(dead.path())["pid"].as_u64().unwrap() as u32;
            assert_ne!(pid, dead.pid);
            drop(user);
            assert_eq!(dead.umount(&[]).code, Some(0));
            eventually("the process ends", || !alive(pid));
            dead.assert_gone();
        }
    }
    let uppers = ocifs.store().join("uppers");
    assert_eq!(fs::read_dir(uppers).unwrap().count(), 0);
}

#[test]
fn a_mount_is_found_where_it_is() {
    let (ocifs, image) = setup();
    let top = mountpoint();
    let (before, after) = (top.path().join("before"), top.path().join("after"));
    for options in [&["--wait", "ready"][..], &["--writable"]] {
        fs::create_dir_all(before.join("m")).unwrap();
        let path = before.join("m");
        ocifs.ok([&["mount"], options, &[&image, path.to_str().unwrap()]].concat());
        fs::rename(&before, &after).unwrap();
        let moved = after.join("m");
        let moved = moved.to_str().unwrap();
        let status = ocifs.ok(["status", "--json", moved]).json();
        assert_eq!(status["state"], "ready");
        ocifs.ok(["umount", moved]);
        assert_eq!(mounted_type(Path::new(moved)), None);
        let pid = status["pid"].as_u64().unwrap() as u32;
        eventually("the process ends", || !alive(pid));

        // A dead mount is known by its old path, even if that path leads nowhere.
        fs::rename(&after, &before).unwrap();
        let dead = ocifs.ok([&["mount", "--json"], options, &[&image, path.to_str().unwrap()]].concat());
        let pid = dead.json()["pid"].as_u64().unwrap() as u32;
        send(pid, Signal::SIGKILL);
        eventually("the process is dead", || !alive(pid));
        fs::rename(&before, &after).unwrap();
        ocifs.ok(["umount", path.to_str().unwrap()]);
        assert_eq!(mounted_type(Path::new(moved)), None);
        fs::remove_dir_all(&after).unwrap();
    }
}

#[test]
fn a_mount_point_that_is_replaced_by_a_symlink_is_not_followed() {
    let registry = TestRegistry::start();
    let layer = Blob::gzip(&Tar::new().file("hello", b"hello, world\n").finish());
    push(&registry, "app", "1", std::slice::from_ref(&layer));
    let image = format!("{}/app:1", registry.host());
    let top = mountpoint();
    let at = |name: &str| top.path().join(name);
    let victim = at("victim");
    for deep in [false, true] {
        let ocifs = Ocifs::new();
        fs::create_dir_all(at("a/m")).unwrap();
        fs::create_dir_all(victim.join("m")).unwrap();
        registry.clear_log();
        registry.hold("/manifests/");
        let mut command = ocifs.command(["mount", "--wait", "ready", &image, at("a/m").to_str().unwrap()]);
        let child = command.stderr(Stdio::piped()).spawn().unwrap();
        eventually("it asks for the manifest", || registry.count("/manifests/") > 0);
        let replaced = if deep { at("a") } else { at("a/m") };
        fs::rename(&replaced, at("moved")).unwrap();
        symlink(&victim, &replaced).unwrap();
        registry.release();
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{said}");
        assert!(said.contains("cannot mount on"), "{said}");
        for path in [victim.clone(), victim.join("m")] {
            assert_eq!(mounted_type(&path), None);
        }
        fs::remove_file(&replaced).unwrap();
        fs::remove_dir_all(at("moved")).unwrap();
        let _ = fs::remove_dir_all(at("a"));
    }
}

#[test]
fn a_writable_mount_goes_where_it_was_checked() {
    let registry = TestRegistry::start();
    let layer = Blob::gzip(&Tar::new().file("hello", b"hello, world\n").finish());
    push(&registry, "app", "1", std::slice::from_ref(&layer));
    let image = format!("{}/app:1", registry.host());
    let ocifs = Ocifs::new();
    let top = mountpoint();
    let at = |name: &str| top.path().join(name);
    fs::create_dir(at("m")).unwrap();
    fs::create_dir(at("victim")).unwrap();
    registry.hold(&layer.path());
    let mut command = ocifs.command(["mount", "--writable", &image, at("m").to_str().unwrap()]);
    let mut child = command.spawn().unwrap();
    eventually("it asks for the layer", || registry.count(&layer.path()) > 0);
    fs::rename(at("m"), at("moved")).unwrap();
    symlink(at("victim"), at("m")).unwrap();
    registry.release();
    assert!(wait(&mut child, "mount").success());
    assert_eq!(mounted_type(&at("victim")), None);
    assert_eq!(mounted_type(&at("moved")).as_deref(), Some("overlay"));
    ocifs.ok(["umount", at("moved").to_str().unwrap()]);
    assert_eq!(mounted_type(&at("moved")), None);
}

#[test]
fn the_run_directory_is_private_whatever_the_umask() {
    let (ocifs, image) = setup();
    let directory = mountpoint();
    for umask in ["0", "777"] {
        let script = format!(
            r#"
            mount -t tmpfs -o mode=755 tmpfs /run
            mkdir -m 755 /run/ocifs
            umask {umask}
            "$OCIFS" mount --wait ready "$1" "$0"
            "$OCIFS" list > /proc/self/fd/1
            find /run/ocifs -printf '%y %m %P\n'
            "$OCIFS" umount "$0"
            "#
        );
        ocifs.ok(["pull", &image]);
        let script = format!("{LEAVE_OTHERS}leave_others \"$0\"\n{script}");
        let _copies = copies();
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-ec", &script]);
        command.arg(directory.path()).arg(&image);
        command
            .env("OCIFS", env!("CARGO_BIN_EXE_ocifs"))
            .env("OCIFS_STORE", ocifs.store());
        command.env("OCIFS_CONFIG", "/dev/null").env("HOME", ocifs.home());
        let said = bounded(&mut command);
        assert_eq!(said.code, Some(0), "{said:?}");
        let found: Vec<&str> = said.text().lines().filter(|line| line.as_bytes()[1] == b' ').collect();
        assert!(found.len() > 5 && said.text().contains("control"), "{said:?}");
        for line in found {
            assert!(
                line.starts_with("d 700 ") || line.starts_with("f 600 ") || line.starts_with("s 600 "),
                "{line}"
            );
        }
    }
}

#[test]
fn a_covered_dead_mount_is_not_forgotten() {
    let (ocifs, image) = setup();
    let mount = ocifs.mount(&image);
    send(mount.pid, Signal::SIGKILL);
    eventually("the process is dead", || !alive(mount.pid));
    tool("mount", ["-t", "tmpfs", "tmpfs", mount.path().to_str().unwrap()]);
    let said = quick(plain().arg("umount").arg(mount.path()));
    assert!(said.code == Some(1) && said.stderr.contains("covered"), "{said:?}");
    assert_eq!(mounted_type(mount.path()).as_deref(), Some("tmpfs"));
    unmount(mount.path());
    assert_eq!(mount.umount(&[]).code, Some(0));
    mount.assert_gone();
}
