//! Permissions: access control lists and ID-mapped mounts.

use std::ffi::CString;
use std::fs::{self, File};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use super::image;
use crate::common::layers::{Tar, header};
use crate::common::ocifs::{Ocifs, bounded, eventually, mountpoint, tool, unmount};

const NOBODY: u32 = u32::MAX;
const ACCESS: &str = "SCHILY.xattr.system.posix_acl_access";

/// Returns an access control list with these entries (tag, permissions, id).
fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut value = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        value.extend_from_slice(&tag.to_le_bytes());
        value.extend_from_slice(&permissions.to_le_bytes());
        value.extend_from_slice(&id.to_le_bytes());
    }
    value
}

/// Returns a list that lets user 1000 read.
fn grant() -> Vec<u8> {
    acl(&[
        (1, 6, NOBODY),
        (2, 4, 1000),
        (4, 0, NOBODY),
        (16, 4, NOBODY),
        (32, 0, NOBODY),
    ])
}

/// Returns a list that lets all read except user 1001 and members of group 1002.
fn deny() -> Vec<u8> {
    acl(&[
        (1, 6, NOBODY),
        (2, 0, 1001),
        (4, 4, NOBODY),
        (8, 0, 1002),
        (16, 4, NOBODY),
        (32, 4, NOBODY),
    ])
}

fn listed() -> (Ocifs, String) {
    let file = |tar: Tar, name: &str, mode, value: &[u8]| {
        let header = header(name.as_bytes(), tar::EntryType::Regular, mode, 5);
        tar.pax(&[(ACCESS, value)]).raw(header, b"text\n")
    };
    let tar = file(Tar::new(), "grant", 0o640, &grant());
    let tar = file(tar, "deny", 0o644, &deny());
    // The list decides, whatever mode the entry has.
    let tar = file(tar, "other-mode", 0o644, &grant());
    // A list that no file system accepts is ignored: the file's mode decides.
    let tar = file(tar, "damaged", 0o644, &grant()[..23]);
    let tar = file(
        tar,
        "disordered",
        0o644,
        &acl(&[
            (2, 0, 1001),
            (1, 6, NOBODY),
            (4, 0, NOBODY),
            (16, 4, NOBODY),
            (32, 0, NOBODY),
        ]),
    );
    let tar = file(tar, "other-version", 0o644, &[1, 0, 0, 0]);
    let directory = header(b"dir/", tar::EntryType::Directory, 0o750, 0);
    let enter = acl(&[
        (1, 7, NOBODY),
        (2, 5, 1000),
        (4, 5, NOBODY),
        (16, 5, NOBODY),
        (32, 0, NOBODY),
    ]);
    let tar = tar
        .pax(&[(ACCESS, &enter)])
        .raw(directory, b"")
        .file("dir/inside", b"text\n");
    let tar = tar.file("plain", b"text\n");
    image(vec![tar.finish()])
}

const FILES: [&str; 8] = [
    "grant",
    "deny",
    "other-mode",
    "damaged",
    "disordered",
    "other-version",
    "dir/inside",
    "plain",
];

/// Returns which of the files each of three users can read.
fn readable(root: &Path) -> Vec<String> {
    let mut rows = Vec::new();
    for id in [1000, 1001, 1002] {
        for name in FILES {
            let mut cat = Command::new("cat");
            cat.arg(root.join(name)).uid(id).gid(id);
            let said = bounded(&mut cat);
            match said.code {
                Some(0) => rows.push(format!("{id} reads {name}")),
                _ => assert!(said.stderr.contains("Permission denied"), "{id} {name}: {said:?}"),
            }
        }
    }
    rows
}

/// Returns the expected rows: what the lists grant and deny. Files with invalid lists go by their modes.
fn expected() -> Vec<String> {
    let of = |id: u32, names: &[&str]| {
        names
            .iter()
            .map(|name| format!("{id} reads {name}"))
            .collect::<Vec<_>>()
    };
    let modes = ["damaged", "disordered", "other-version"];
    [
        of(
            1000,
            &[&["grant", "deny", "other-mode"][..], &modes, &["dir/inside", "plain"]].concat(),
        ),
        of(1001, &[&modes[..], &["plain"]].concat()),
        of(1002, &[&modes[..], &["plain"]].concat()),
    ]
    .concat()
}

#[test]
fn access_control_lists_are_enforced_on_every_mount() {
    let (ocifs, image) = listed();
    for via in ["fuse", "erofs"] {
        let mount = ocifs.mount_with(&image, &["--wait", "ready", "--via", via]);
        assert_eq!(readable(mount.path()), expected(), "{via}");
        let shown = tool("getfacl", ["-pcnE", mount.join("deny").to_str().unwrap()]);
        let shown = String::from_utf8(shown).unwrap();
        assert_eq!(
            shown.trim(),
            "user::rw-\nuser:1001:---\ngroup::r--\ngroup:1002:---\nmask::r--\nother::r--"
        );
        assert_eq!(fs::metadata(mount.join("other-mode")).unwrap().mode() & 0o7777, 0o640);
    }
    for via in ["fuse", "erofs"] {
        let mount = ocifs.mount_with(&image, &["--wait", "ready", "--writable", "--via", via]);
        assert_eq!(readable(mount.path()), expected(), "{via}");
        // Lists are copied up with their file, and can be changed.
        fs::write(mount.join("grant"), "text\n").unwrap();
        fs::write(mount.join("deny"), "text\n").unwrap();
        assert_eq!(readable(mount.path()), expected(), "{via}");
        let file = mount.join("grant");
        tool("setfacl", ["-m", "u:1001:r", file.to_str().unwrap()]);
        assert!(readable(mount.path()).contains(&"1001 reads grant".to_owned()), "{via}");
    }
}

#[test]
fn the_kernels_erofs_enforces_the_same_lists() {
    let (ocifs, image) = listed();
    let disk = ocifs.home().join("disk");
    ocifs.ok([
        "export",
        "--format",
        "erofs",
        "--output",
        disk.to_str().unwrap(),
        &image,
    ]);
    let directory = mountpoint();
    let path = directory.path().to_str().unwrap();
    tool("mount", ["-t", "erofs", "-o", "loop,ro", disk.to_str().unwrap(), path]);
    let seen = readable(directory.path());
    unmount(path);
    assert_eq!(seen, expected());
}

#[test]
fn odd_attributes_do_not_spoil_their_file() {
    let bad: &[(&str, &[u8])] = &[
        ("SCHILY.xattr.security.capability", b"odd"),
        ("SCHILY.xattr.system.posix_acl_default", &[2, 0, 0, 0]),
        ("SCHILY.xattr.user.fine", b"1"),
    ];
    let tar = Tar::new()
        .pax(bad)
        .file("file", b"text\n")
        .pax(&[("SCHILY.xattr.user.none", b"1")])
        .link(tar::EntryType::Symlink, "symlink", "file");
    let (ocifs, image) = image(vec![tar.finish()]);
    let mount = ocifs.mount_with(&image, &["--wait", "ready", "--writable"]);
    let attributes = |name: &str| {
        let path = mount.join(name);
        String::from_utf8(tool("getfattr", ["-hdm-", "--absolute-names", path.to_str().unwrap()])).unwrap()
    };
    assert!(attributes("file").contains("user.fine=\"1\"\n") && !attributes("file").contains("security"));
    assert_eq!(attributes("symlink"), "");
    fs::write(mount.join("file"), "copied up\n").unwrap();
    assert_eq!(mount.read("symlink"), b"copied up\n");
}

/// A user namespace in which root is user 100000.
struct Mapped(Child);

impl Mapped {
    fn new() -> Self {
        let mut command = Command::new("unshare");
        command.args(["--user", "sleep", "1000"]).stdin(Stdio::null());
        let child = command.spawn().unwrap();
        let of = |name: &str| format!("/proc/{}/{name}", child.id());
        let own = fs::read_link("/proc/self/ns/user").unwrap();
        eventually("a user namespace", || {
            fs::read_link(of("ns/user")).is_ok_and(|other| other != own)
        });
        for name in ["uid_map", "gid_map"] {
            fs::write(of(name), "0 100000 65536").unwrap();
        }
        Self(child)
    }

    fn namespace(&self) -> File {
        File::open(format!("/proc/{}/ns/user", self.0.id())).unwrap()
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Mounts `from` on `to` with users mapped as in the namespace, as container runtimes do.
#[allow(unsafe_code)]
fn bind_mapped(from: &Path, to: &Path, namespace: &File) -> std::io::Result<()> {
    use nix::libc;
    let path = |path: &Path| CString::new(path.as_os_str().as_bytes()).unwrap();
    let (from, to) = (path(from), path(to));
    let check = |result: libc::c_long| match result {
        -1 => Err(std::io::Error::last_os_error()),
        result => Ok(result as i32),
    };
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
    // SAFETY: `from` is a NUL-terminated string that lives until the call returns.
    let tree = check(unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, from.as_ptr(), flags) })?;
    // SAFETY: open_tree(2) returned a new descriptor that nothing else owns.
    let tree = unsafe { OwnedFd::from_raw_fd(tree) };
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        userns_fd: namespace.as_raw_fd().cast_unsigned().into(),
    };
    // SAFETY: the path is an empty string. The structure lives until the call returns, and its size is the one
    // passed.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    })?;
    // SAFETY: both paths are NUL-terminated strings that live until the call returns.
    check(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            to.as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH,
        )
    })?;
    Ok(())
}

#[test]
fn mounts_can_be_id_mapped() {
    let mut owned = header(b"owned", tar::EntryType::Regular, 0o600, 5);
    owned.set_uid(1000);
    owned.set_gid(1001);
    let listed = header(b"listed", tar::EntryType::Regular, 0o640, 5);
    let tar = Tar::new()
        .raw(owned, b"text\n")
        .file("roots", b"text\n")
        .pax(&[(ACCESS, &grant())])
        .raw(listed, b"text\n");
    let (ocifs, image) = image(vec![tar.finish()]);
    let mapped = Mapped::new();
    for options in [
        &["--via", "fuse"][..],
        &["--via", "erofs"],
        &["--via", "fuse", "--writable"],
        &["--via", "erofs", "--writable"],
    ] {
        let mount = ocifs.mount_with(&image, &[&["--wait", "ready"], options].concat());
        let target = mountpoint();
        match bind_mapped(mount.path(), target.path(), &mapped.namespace()) {
            Ok(()) => {}
            // Some kernels cannot map an overlay, whatever its layers are.
            Err(error) if options.contains(&"--writable") && error.raw_os_error() == Some(nix::libc::EINVAL) => {
                continue;
            }
            Err(error) => panic!("{options:?}: {error}"),
        }
        let owner = |name: &str| {
            let stat = fs::metadata(target.path().join(name)).unwrap();
            (stat.uid(), stat.gid())
        };
        let owners = [owner("roots"), owner("owned")];
        let reads = |id: u32, name: &str| {
            let mut cat = Command::new("cat");
            cat.arg(target.path().join(name)).uid(id).gid(id);
            bounded(&mut cat).code == Some(0)
        };
        // The mapped owner may read the file; the unmapped user with the same number may not. Lists are mapped too.
        let access = [
            reads(101_000, "owned"),
            reads(1000, "owned"),
            reads(101_000, "listed"),
            reads(1000, "listed"),
        ];
        unmount(target.path());
        assert_eq!(owners, [(100_000, 100_000), (101_000, 101_001)]);
        assert_eq!(access, [true, false, true, false]);
    }
}
