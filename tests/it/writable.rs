//! Writable mounts: what can be changed, where the changes go, and that nothing is left, whatever ends the mount.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::Signal;

use crate::common::layers::{Blob, Tar, header};
use crate::common::namespace::{LEAVE_OTHERS, copies};
use crate::common::oci_layout;
use crate::common::ocifs::{Mounted, Ocifs, alive, bounded, eventually, mounted_type, mountpoint, send, tool, wait};

const REGULAR: tar::EntryType = tar::EntryType::Regular;

/// Returns the program and an image of one layer.
fn setup() -> (Ocifs, String) {
    let note: &[(&str, &[u8])] = &[("SCHILY.xattr.user.note", b"hello")];
    let mut owned = header(b"etc/secret", REGULAR, 0o640, 7);
    owned.set_uid(1000);
    owned.set_gid(1001);
    let tar = Tar::new()
        .dir("etc/")
        .file("etc/hosts", b"127.0.0.1 localhost\n")
        .raw(owned, b"secret\n")
        .pax(note)
        .file("etc/noted", b"noted\n")
        .dir("data/")
        .dir("data/deep/");
    let tar = (0..20).fold(tar, |tar, i| {
        tar.file(format!("data/deep/{i}"), format!("content {i}\n"))
    });
    let tar = tar
        .file("data/one", b"linked\n")
        .link(tar::EntryType::Link, "data/two", "data/one");
    let ocifs = Ocifs::new();
    let image = oci_layout::write(&ocifs.home().join("image"), &[Blob::gzip(&tar.finish())]);
    (ocifs, image)
}

fn uppers(ocifs: &Ocifs) -> Vec<PathBuf> {
    let entries = fs::read_dir(ocifs.store().join("uppers")).unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
}

/// Waits until nothing is left: no mount, no process, no registration, no changes. Mount namespaces of other programs
/// hold copies of this mount as long as they live.
fn assert_all_gone(ocifs: &Ocifs, mount: &Mounted) {
    eventually("the process ends", || !alive(mount.pid));
    mount.assert_gone();
    assert_eq!(uppers(ocifs), [] as [PathBuf; 0]);
    assert_eq!(fs::read_dir(mount.path()).unwrap().count(), 0);
}

fn ok(said: crate::common::ocifs::Said) {
    assert_eq!(said.code, Some(0), "{said:?}");
}

/// Returns the line of a mount in mountinfo.
fn mount_line(path: &Path) -> String {
    let table = fs::read("/proc/self/mountinfo").unwrap();
    let table = String::from_utf8_lossy(&table).into_owned();
    let line = table.lines().rfind(|line| line.split(' ').nth(4) == path.to_str());
    line.unwrap_or_else(|| panic!("{path:?} is no mount point")).to_owned()
}

#[test]
fn changes_are_private_and_one_umount_takes_everything_down() {
    let (ocifs, image) = setup();
    let mount = ocifs.mount_with(&image, &["--writable"]);
    assert_eq!(mounted_type(mount.path()).as_deref(), Some("overlay"));
    assert_eq!(mount.status()["writable"], true);
    fs::write(mount.join("new"), "new\n").unwrap();
    fs::write(mount.join("etc/hosts"), "changed\n").unwrap();

    // The image's own mount is hidden, and other users cannot read the changes.
    assert_eq!(mounted_type(&mount.registration().join("lower")), None);
    let [scratch] = uppers(&ocifs).try_into().unwrap();
    assert_eq!(fs::read(scratch.join("upper/new")).unwrap(), b"new\n");
    for private in [Path::new("/run/ocifs"), &mount.registration(), &scratch] {
        assert_eq!(fs::metadata(private).unwrap().mode() & 0o7777, 0o700, "{private:?}");
    }

    ok(mount.umount(&[]));
    assert_all_gone(&ocifs, &mount);
    let again = ocifs.mount_with(&image, &["--writable"]);
    assert_eq!(again.read("etc/hosts"), b"127.0.0.1 localhost\n");
    assert!(!again.join("new").exists());
}

#[test]
fn files_of_the_image_change_like_any_others() {
    let (ocifs, image) = setup();
    let mount = ocifs.mount_with(&image, &["--writable"]);
    assert_eq!(fs::metadata(mount.path()).unwrap().mode() & 0o7777, 0o755);

    let secret = mount.join("etc/secret");
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o4711)).unwrap();
    let changed = fs::metadata(&secret).unwrap();
    assert_eq!(
        (changed.mode() & 0o7777, changed.uid(), changed.gid()),
        (0o4711, 1000, 1001)
    );
    chown(&secret, Some(7), Some(8)).unwrap();
    let changed = fs::metadata(&secret).unwrap();
    assert_eq!((changed.uid(), changed.gid(), changed.mtime()), (7, 8, 1_000_000_000));
    File::options()
        .append(true)
        .open(&secret)
        .unwrap()
        .write_all(b"more\n")
        .unwrap();
    assert_eq!(mount.read("etc/secret"), b"secret\nmore\n");

    fs::hard_link(mount.join("etc/hosts"), mount.join("etc/hosts2")).unwrap();
    assert_eq!(fs::metadata(mount.join("etc/hosts2")).unwrap().nlink(), 2);
    fs::rename(mount.join("etc/hosts"), mount.join("data/hosts")).unwrap();
    assert!(!mount.join("etc/hosts").exists());
    symlink("../data/hosts", mount.join("etc/hosts")).unwrap();
    assert_eq!(mount.read("etc/hosts"), b"127.0.0.1 localhost\n");

    let (one, two) = (mount.join("data/one"), mount.join("data/two"));
    fs::remove_file(&one).unwrap();
    assert_eq!(fs::read(&two).unwrap(), b"linked\n");

    // Overlay does not rename directories of a lower layer. Programs then copy them, as between file systems.
    let renamed = fs::rename(mount.join("data/deep"), mount.join("moved")).unwrap_err();
    assert_eq!(renamed.raw_os_error(), Some(Errno::EXDEV as i32));
    tool("mv", [mount.join("data/deep"), mount.join("moved")]);
    assert_eq!(mount.read("moved/19"), b"content 19\n");
    fs::remove_dir_all(mount.join("moved")).unwrap();
    fs::remove_dir_all(mount.join("data")).unwrap();
    fs::create_dir(mount.join("data")).unwrap();
    assert_eq!(fs::read_dir(mount.join("data")).unwrap().count(), 0);

    let noted = mount.join("etc/noted");
    let noted = noted.to_str().unwrap();
    let attribute = |name: &str| tool("getfattr", ["--only-values", "--absolute-names", "-n", name, noted]);
    assert_eq!(attribute("user.note"), b"hello");
    tool("setfattr", ["-n", "user.note", "-v", "changed", noted]);
    // The value that setcap writes: revision 2, cap_net_raw permitted and effective.
    let capability = "0x0100000200200000000000000000000000000000";
    tool("setfattr", ["-n", "security.capability", "-v", capability, noted]);
    assert_eq!(attribute("user.note"), b"changed");
    assert_eq!(attribute("security.capability").len(), 20);
}

#[test]
fn whatever_ends_the_mount_nothing_is_left() {
    let (ocifs, image) = setup();
    type End = fn(&Mounted);
    let ends: [(&str, End); 5] = [
        ("SIGTERM", |mount| send(mount.pid, Signal::SIGTERM)),
        ("SIGINT", |mount| send(mount.pid, Signal::SIGINT)),
        ("umount(2)", |mount| umount2(mount.path(), MntFlags::empty()).unwrap()),
        ("lazy umount(2)", |mount| {
            umount2(mount.path(), MntFlags::MNT_DETACH).unwrap()
        }),
        ("SIGKILL, then ocifs umount", |mount| {
            send(mount.pid, Signal::SIGKILL);
            eventually("the process is dead", || !alive(mount.pid));
            assert_eq!(mount.status()["state"], "dead");
            ok(mount.umount(&[]));
        }),
    ];
    for (name, end) in ends {
        println!("{name}");
        let mount = ocifs.mount_with(&image, &["--writable"]);
        fs::write(mount.join("new"), "new\n").unwrap();
        end(&mount);
        eventually("the changes are gone", || uppers(&ocifs).is_empty());
        assert_all_gone(&ocifs, &mount);
    }
}

#[test]
fn what_a_killed_process_left_goes_with_the_next_mount_and_living_ones_stay() {
    let (ocifs, image) = setup();
    let living = ocifs.mount_with(&image, &["--writable"]);
    let killed = ocifs.mount_with(&image, &["--writable"]);
    send(killed.pid, Signal::SIGKILL);
    eventually("the process is dead", || !alive(killed.pid));
    umount2(killed.path(), MntFlags::MNT_DETACH).unwrap();
    assert_eq!(uppers(&ocifs).len(), 2);
    let next = ocifs.mount_with(&image, &["--writable"]);
    assert_eq!(uppers(&ocifs).len(), 2);
    for mount in [&living, &next] {
        fs::write(mount.join("new"), "new\n").unwrap();
    }
    assert_eq!(fs::read_dir(killed.path()).unwrap().count(), 0);
}

#[test]
fn a_busy_mount_says_so_and_stands() {
    let (ocifs, image) = setup();
    let mount = ocifs.mount_with(&image, &["--writable"]);
    let user = File::open(mount.join("data/deep/7")).unwrap();
    let said = mount.umount(&[]);
    assert_eq!(said.code, Some(1));
    assert!(
        said.stderr.contains("is busy") && said.stderr.contains("--lazy"),
        "{said:?}"
    );
    assert_eq!(mount.status()["state"], "ready");
    assert_eq!(mount.read("data/deep/8"), b"content 8\n");
    fs::write(mount.join("new"), "new\n").unwrap();
    drop(user);
    ok(mount.umount(&[]));
    assert_all_gone(&ocifs, &mount);
}

#[test]
fn who_holds_on_is_served_after_a_lazy_umount() {
    let (ocifs, image) = setup();
    let mount = ocifs.mount_with(&image, &["--writable"]);
    let mut user = Command::new("sh")
        .args(["-c", "read line; cat data/deep/3; echo here > new; cat new"])
        .current_dir(mount.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    ok(mount.umount(&["--lazy"]));
    assert_eq!(mounted_type(mount.path()), None);
    assert!(alive(mount.pid));
    user.stdin.take().unwrap().write_all(b"go\n").unwrap();
    assert_eq!(user.wait_with_output().unwrap().stdout, b"content 3\nhere\n");
    assert_all_gone(&ocifs, &mount);
}

#[test]
fn a_mount_namespace_keeps_its_copy() {
    let _copies = copies();
    let (ocifs, image) = setup();
    let mount = ocifs.mount_with(&image, &["--writable"]);
    let mut user = Command::new("unshare")
        .args([
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            &format!("{LEAVE_OTHERS}leave_others \"$0\"; echo in; read line; cat \"$0/data/deep/3\""),
        ])
        .arg(mount.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut started = [0; 3];
    std::io::Read::read_exact(user.stdout.as_mut().unwrap(), &mut started).unwrap();
    ok(mount.umount(&[]));
    assert_eq!(mounted_type(mount.path()), None);
    user.stdin.take().unwrap().write_all(b"go\n").unwrap();
    assert_eq!(user.wait_with_output().unwrap().stdout, b"content 3\n");
    assert_all_gone(&ocifs, &mount);
}

#[test]
fn an_upper_directory_is_kept_and_used_once_at_a_time() {
    let (ocifs, image) = setup();
    let (upper, work) = (ocifs.home().join("upper"), ocifs.home().join("work"));
    let kept = ["--upper", upper.to_str().unwrap(), "--work", work.to_str().unwrap()];
    let mount = ocifs.mount_with(&image, &kept);
    fs::write(mount.join("new"), "new\n").unwrap();
    fs::remove_file(mount.join("etc/hosts")).unwrap();
    let error = ocifs.mount_fails(&image, &kept);
    assert!(error.contains("in use by another writable mount"), "{error}");
    assert_eq!(mount.read("new"), b"new\n");
    ok(mount.umount(&[]));
    assert_all_gone(&ocifs, &mount);

    let again = ocifs.mount_with(&image, &kept);
    assert_eq!(again.read("new"), b"new\n");
    assert!(!again.join("etc/hosts").exists());
    send(again.pid, Signal::SIGKILL);
    eventually("the process is dead", || !alive(again.pid));
    ok(again.umount(&[]));
    assert_eq!(fs::read(upper.join("new")).unwrap(), b"new\n");
}

#[test]
fn upper_directories_that_cannot_be_used_are_refused() {
    let (ocifs, image) = setup();
    let other = ocifs.mount_with(&image, &["--writable"]);
    let paths: Vec<String> = ["upper", "work"]
        .map(|name| other.join(name).to_str().unwrap().to_owned())
        .into();
    let directories = ["--upper", &paths[0], "--work", &paths[1]];
    let error = ocifs.mount_fails(&image, &directories);
    assert!(
        error.contains(&paths[0]) && error.contains("no overlay or FUSE"),
        "{error}"
    );

    // The command does not take down an earlier mount on the directory.
    let there = mountpoint();
    tool("mount", ["-t", "tmpfs", "tmpfs", there.path().to_str().unwrap()]);
    let mut arguments = vec!["mount"];
    arguments.extend_from_slice(&directories);
    arguments.extend_from_slice(&[&image, there.path().to_str().unwrap()]);
    let said = ocifs.run(&arguments);
    let still = mounted_type(there.path());
    umount2(there.path(), MntFlags::MNT_DETACH).unwrap();
    assert_eq!((said.code, still.as_deref()), (Some(1), Some("tmpfs")), "{said:?}");

    for incomplete in [["--upper", "/u"], ["--work", "/w"]] {
        let said = ocifs.run(["mount", incomplete[0], incomplete[1], &image, "/mnt"]);
        assert_eq!(said.code, Some(2), "{said:?}");
    }
}

#[test]
fn private_changes_find_a_place_where_the_store_has_none() {
    let (outer, image) = setup();
    let other = outer.mount_with(&image, &["--writable"]);
    // The store lies on an overlay, as in a container.
    let ocifs = Ocifs::at(&other.join("store"));
    let mount = ocifs.mount_with(&image, &["--writable"]);
    let [scratch] = uppers(&ocifs).try_into().unwrap();
    assert_eq!(mounted_type(&scratch).as_deref(), Some("tmpfs"));
    fs::write(mount.join("new"), "new\n").unwrap();
    fs::remove_dir_all(mount.join("data")).unwrap();
    ok(mount.umount(&[]));
    assert_all_gone(&ocifs, &mount);
    assert_eq!(mounted_type(&scratch), None);

    // The store cannot be written at all.
    let ocifs = Ocifs::at(Path::new("/proc/no-store"));
    let mount = ocifs.mount_with(&image, &["--writable"]);
    fs::write(mount.join("new"), "new\n").unwrap();
    ok(mount.umount(&[]));
    eventually("the process ends", || !alive(mount.pid));
    mount.assert_gone();
    let suffix = format!("-{}", mount.pid);
    let left = fs::read_dir("/run/ocifs/changes").unwrap();
    assert!(
        !left
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .any(|name| name.ends_with(&suffix))
    );
}

#[test]
fn separators_of_overlay_options_may_be_in_paths() {
    let (outer, image) = setup();
    let ocifs = Ocifs::at(&outer.home().join("a:b,c\\d/store"));
    let mount = ocifs.mount_with(&image, &["--writable"]);
    fs::write(mount.join("new"), "new\n").unwrap();
    assert_eq!(mount.read("new"), b"new\n");
}

#[test]
fn mount_options_reach_the_kernel() {
    let (ocifs, image) = setup();
    for writable in [&[][..], &["--writable"]] {
        let mount = ocifs.mount_with(
            &image,
            &[&["-o", "nosuid,nodev", "-o", "noexec"][..], writable].concat(),
        );
        let line = mount_line(mount.path());
        let flags = if writable.is_empty() { "ro" } else { "rw" };
        assert_eq!(
            line.split(' ').nth(5),
            Some(&*format!("{flags},nosuid,nodev,noexec,noatime")),
            "{line}"
        );
        drop(mount);
        let mount = ocifs.mount_with(&image, writable);
        let line = mount_line(mount.path());
        assert_eq!(line.split(' ').nth(5), Some(&*format!("{flags},noatime")), "{line}");
    }
    let mount = ocifs.mount_with(&image, &["--via", "fuse"]);
    let line = mount_line(mount.path());
    assert!(
        line.contains("allow_other") && line.contains("default_permissions"),
        "{line}"
    );
    drop(mount);
    let mount = ocifs.mount_with(&image, &["-o", "noallow_other"]);
    let line = mount_line(mount.path());
    assert!(
        !line.contains("allow_other") && !line.contains("default_permissions"),
        "{line}"
    );
    let error = ocifs.mount_fails(&image, &["-o", "nosuid,lazy"]);
    assert!(
        error.contains("unknown mount option `lazy`: known are allow_other"),
        "{error}"
    );
}

#[test]
fn a_chroot_can_be_worked_in() {
    let (ocifs, image) = setup();
    let mount = ocifs.mount_with(&image, &["--writable"]);
    // Copies a shell of this machine and its libraries, as an installation would.
    let shell = fs::canonicalize("/bin/sh").unwrap();
    let libraries = String::from_utf8(tool("ldd", [&shell])).unwrap();
    let libraries = libraries.split_whitespace().filter(|word| word.starts_with('/'));
    for file in [shell.to_str().unwrap()].into_iter().chain(libraries) {
        let copy = mount.join(file.trim_start_matches('/'));
        fs::create_dir_all(copy.parent().unwrap()).unwrap();
        fs::copy(file, copy).unwrap();
    }
    let script =
        "cd /data && while read line; do echo \"$line\"; done < deep/4 > out && read line < out && echo \"got $line\"";
    let mut command = Command::new("chroot");
    command.arg(mount.path()).arg(&shell).args(["-c", script]);
    assert_eq!(bounded(&mut command).text(), "got content 4\n");
    let mut sleeper = Command::new("chroot")
        .arg(mount.path())
        .arg(&shell)
        .args(["-c", "read line"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let root = format!("/proc/{}/root", sleeper.id());
    eventually("the shell is inside", || {
        fs::read_link(&root).is_ok_and(|root| root == mount.path())
    });
    let said = mount.umount(&[]);
    assert!(said.stderr.contains("is busy"), "{said:?}");
    drop(sleeper.stdin.take());
    wait(&mut sleeper, "the shell");
    ok(mount.umount(&[]));
    assert_all_gone(&ocifs, &mount);
}
