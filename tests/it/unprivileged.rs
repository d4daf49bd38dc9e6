//! Mounts of ordinary users (through fusermount3 and fuse-overlayfs), and of root of a user namespace.
//!
//! Each test runs a script as a user that it makes up. The script runs in a mount namespace where the user exists and
//! may open /dev/fuse, as on distributions.

mod run;

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::common::layers::{Blob, Tar, header};
use crate::common::namespace::{LEAVE_OTHERS, copies};
use crate::common::oci_layout;
use crate::common::ocifs::{alive, bounded, eventually};

/// A user id that no user has, a little below nobody's.
const UID: u32 = 64_321;

/// An access control list that lets the owner and user 1 read.
const ACL: &[u8] = b"\x02\0\0\0\x01\0\x06\0\xff\xff\xff\xff\x02\0\x04\0\x01\0\0\0\
    \x04\0\0\0\xff\xff\xff\xff\x10\0\x04\0\xff\xff\xff\xff\x20\0\0\0\xff\xff\xff\xff";

/// A script that prepares the namespace and then becomes the user. Its arguments are the user's id, the user's
/// directory, the program and the script.
const SETUP: &str = r#"
set -eu
umask 022
uid=$1 dir=$2 program=$3
leave_others "$dir"
mount -t tmpfs -o mode=755 tmpfs "$dir/system"
mknod -m 666 "$dir/system/fuse" c 10 229
mount --bind "$dir/system/fuse" /dev/fuse
{ cat /etc/passwd; echo "ocifs-test:x:$uid:$uid::$dir/home:/bin/sh"; } > "$dir/system/passwd"
mount --bind "$dir/system/passwd" /etc/passwd
echo "$FUSE_CONF" > "$dir/system/fuse.conf"
mount --bind "$dir/system/fuse.conf" /etc/fuse.conf
# The user may not be allowed to run what the caller built.
install -m 755 "$program" "$dir/system/ocifs"
# A configuration of this machine is none of the test's.
touch "$dir/system/empty"
[ ! -e /etc/ocifs.toml ] || mount --bind "$dir/system/empty" /etc/ocifs.toml
# crun refuses to run on machines with controllers in both versions of cgroups.
[ ! -d /sys/fs/cgroup/unified ] || umount -l /sys/fs/cgroup/unified
cd "$dir/home"
exec setpriv --reuid "$uid" --regid "$uid" --clear-groups env -i HOME="$dir/home" XDG_RUNTIME_DIR="$dir/run" \
    PATH="$dir/system:/usr/sbin:/usr/bin:/sbin:/bin" IMAGE="oci:$dir/image" DIR="$dir" bash -euc "$HELPERS$4"
"#;

/// Shell functions that the scripts share. `$pids` are the processes that have to end.
const HELPERS: &str = r#"
pid() { ocifs status --json "$1" | sed -n 's/^ *"pid": \([0-9]*\),/\1/p'; }
line() { grep " $PWD/$1 " /proc/self/mountinfo; }
fails() { if said=$("$@" 2>&1); then echo "should have failed: $*"; exit 1; fi; echo "$said"; }
not_mounted() { if line "$1"; then echo "$1 is still mounted"; exit 1; fi; }
mkdir -p m
"#;

/// A user with a home and an image.
struct User {
    directory: TempDir,
    fuse_conf: &'static str,
}

impl User {
    fn new() -> Self {
        assert!(
            nix::unistd::geteuid().is_root(),
            "tests that become another user need root"
        );
        for program in ["fusermount3", "fuse-overlayfs", "setpriv", "unshare"] {
            let found = std::env::split_paths("/usr/sbin:/usr/bin:/sbin:/bin").any(|dir| dir.join(program).exists());
            assert!(
                found,
                "tests of unprivileged mounts need {program} (fuse3, fuse-overlayfs, util-linux)"
            );
        }
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        for name in ["home", "run", "system"] {
            fs::create_dir(at(name)).unwrap();
        }
        for name in ["home", "run"] {
            chown(at(name), Some(UID), Some(UID)).unwrap();
        }
        let tar = Tar::new()
            .dir("etc/")
            .file("etc/hosts", b"127.0.0.1 localhost\n")
            .raw(header(b"etc/shadow", tar::EntryType::Regular, 0o600, 7), b"secret\n")
            .pax(&[("SCHILY.xattr.system.posix_acl_access", ACL)])
            .raw(header(b"etc/listed", tar::EntryType::Regular, 0o640, 7), b"listed\n")
            .dir("data/")
            .file("data/one", b"one\n")
            .file("data/two", b"two\n")
            .raw(
                header(b"run", tar::EntryType::Regular, 0o755, 21),
                b"#!/bin/sh\necho I ran\n",
            );
        oci_layout::write(&at("image"), &[Blob::gzip(&tar.finish())]);
        make_readable(&at("image"));
        Self {
            directory,
            fuse_conf: "",
        }
    }

    fn home(&self) -> PathBuf {
        self.directory.path().join("home")
    }

    /// Runs a script that must succeed. Returns its output.
    fn run(&self, script: &str) -> String {
        let _copies = copies();
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "bash", "-c"]);
        command.args([&[LEAVE_OTHERS, SETUP].concat(), "setup"]);
        command.arg(UID.to_string()).arg(self.directory.path());
        command.arg(env!("CARGO_BIN_EXE_ocifs")).arg(script);
        command.env("HELPERS", HELPERS).env("FUSE_CONF", self.fuse_conf);
        let said = bounded(&mut command);
        assert_eq!(said.code, Some(0), "{}\n{}", said.text(), said.stderr);
        // The scripts unmount everything at their end, so no process can be left.
        for pid in said.text().lines().filter_map(|line| line.strip_prefix("pid ")) {
            let pid = pid.parse().unwrap();
            eventually("the process ends", || !alive(pid));
        }
        let registrations = fs::read_dir(self.directory.path().join("run/ocifs")).unwrap();
        let mut registrations = registrations
            .map(|e| e.unwrap().path())
            .filter(|path| path.join("log").exists());
        assert_eq!(registrations.next(), None);
        said.text().to_owned()
    }
}

/// Makes a tree readable for everyone, whatever umask it was made with.
fn make_readable(path: &Path) {
    let mode = if path.is_dir() { 0o755 } else { 0o644 };
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    if path.is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            make_readable(&entry.unwrap().path());
        }
    }
}

fn assert_empty(directory: &Path) {
    let left: Vec<_> = fs::read_dir(directory).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(left, [] as [PathBuf; 0]);
}

#[test]
fn an_ordinary_user_mounts_through_fusermount() {
    let user = User::new();
    let said = user.run(
        r#"
        ocifs mount "$IMAGE" m
        line m
        echo "pid $(pid m)"
        cat m/etc/hosts
        # The bytes are the user's, whatever the modes in the image say.
        cat m/etc/shadow m/etc/listed
        m/run
        # No mode makes the owner of the mount read what is no program as one, or write.
        test -x m/run && test -r m/etc/shadow
        fails test -x m/etc/hosts
        fails test -w m/etc/hosts
        ocifs list
        ocifs umount m
        not_mounted m
        "#,
    );
    assert!(said.contains("ro,nosuid,nodev,noatime - fuse.ocifs"), "{said}");
    assert!(
        said.contains(&format!("user_id={UID}")) && !said.contains("allow_other"),
        "{said}"
    );
    for expected in ["localhost", "secret", "listed", "I ran", "ready"] {
        assert!(said.contains(expected), "no {expected}: {said}");
    }
    assert!(user.home().join(".local/share/ocifs/layers").is_dir());
    let said = user.run(
        r#"
        export XDG_DATA_HOME=$HOME/data
        ocifs mount "$IMAGE" m
        pid=$(pid m) && echo "pid $pid" && kill "$pid"
        until ! line m; do sleep 0.05; done
        ls data/ocifs
        "#,
    );
    assert!(said.contains("layers"), "{said}");
}

#[test]
fn what_an_ordinary_user_may_not_do_is_said() {
    let user = User::new();
    let said = user.run(
        r#"
        fails ocifs mount -o allow_other "$IMAGE" m
        fails ocifs mount -o suid "$IMAGE" m
        PATH=$DIR/system fails ocifs mount "$IMAGE" m
        mkdir bin && ln -s /usr/bin/fusermount3 bin
        PATH=$DIR/system:$PWD/bin fails ocifs mount --writable "$IMAGE" m
        not_mounted m
        ocifs mount -o noexec "$IMAGE" m
        fails m/run
        ocifs umount m
        ocifs mount -o default_permissions "$IMAGE" m
        cat m/etc/hosts
        fails cat m/etc/listed
        ocifs umount m
        "#,
    );
    for expected in [
        "user_allow_other",
        "only root may mount with the options suid and dev",
        "install the fuse3 package",
        "install the fuse-overlayfs package",
        "m/run: Permission denied",
        "m/etc/listed: Permission denied",
    ] {
        assert!(said.contains(expected), "no {expected}: {said}");
    }
    assert_empty(&user.home().join(".local/share/ocifs/uppers"));
}

#[test]
fn an_ordinary_user_may_share_a_mount_where_the_machine_allows_it() {
    let user = User {
        fuse_conf: "user_allow_other",
        ..User::new()
    };
    let said = user.run(
        r#"
        ocifs mount -o allow_other "$IMAGE" m
        line m
        # Others come, so modes count.
        fails cat m/etc/shadow
        ocifs umount m
        "#,
    );
    assert!(
        said.contains("allow_other") && said.contains("default_permissions"),
        "{said}"
    );
    assert!(said.contains("shadow: Permission denied"), "{said}");
}

#[test]
fn an_ordinary_user_writes_through_fuse_overlayfs() {
    let user = User::new();
    let said = user.run(
        r#"
        fuse_overlayfs() { pgrep -u "$(id -u)" -f "fuse-overlayfs .* $PWD/m"; }
        ocifs mount --writable "$IMAGE" m
        line m
        echo "pid $(pid m)" && echo "pid $(fuse_overlayfs)"
        echo more >> m/etc/shadow
        cat m/etc/shadow
        rm -r m/data && mkdir m/data && ls -A m/data
        mv m/etc m/moved && cat m/moved/hosts
        chmod 500 m/moved
        m/run
        cd m && fails ocifs umount . && cd ..
        ocifs umount m
        not_mounted m

        ocifs mount --writable "$IMAGE" m
        echo "pid $(pid m)" && echo "pid $(fuse_overlayfs)"
        cat m/data/one
        fusermount3 -u m

        ocifs mount --writable "$IMAGE" m
        pid=$(pid m) && echo "pid $pid" && echo "pid $(fuse_overlayfs)"
        kill -KILL "$pid"
        until ocifs list | grep dead; do sleep 0.05; done
        ocifs umount m
        not_mounted m
        "#,
    );
    assert!(said.contains("rw,nosuid,nodev,noatime - fuse.fuse-overlayfs"), "{said}");
    for expected in ["secret\nmore\n127.0.0.1 localhost\nI ran\n", "is busy", "one\n"] {
        assert!(said.contains(expected), "no {expected}: {said}");
    }
    let uppers = user.home().join(".local/share/ocifs/uppers");
    eventually("the changes are gone", || fs::read_dir(&uppers).unwrap().count() == 0);
}

#[test]
fn root_of_a_user_namespace_needs_no_helper() {
    let user = User::new();
    let said = user.run(
        r#"
        export PATH=$DIR/system:$PATH
        exec unshare --user --map-root-user --mount bash -euc "$(declare -f)"'
        mkdir bin
        for tool in cat grep ls mkdir rm id sed; do ln -s "$(command -v "$tool")" bin; done
        PATH=$DIR/system:$PWD/bin
        id -u
        ocifs mount "$IMAGE" m
        line m && echo "pid $(pid m)"
        cat m/etc/shadow
        ocifs umount m
        not_mounted m

        ocifs mount --writable "$IMAGE" m
        line m && echo "pid $(pid m)"
        rm -r m/data && mkdir m/data && ls -A m/data
        echo new > m/new && cat m/new
        ocifs umount m
        not_mounted m

        ocifs mount --upper upper --work work "$IMAGE" m
        rm -r m/data && mkdir m/data && echo kept > m/data/new
        ocifs umount m
        ocifs mount --upper upper --work work "$IMAGE" m
        ls m/data && cat m/data/new
        ocifs umount m
        '
        "#,
    );
    assert!(said.starts_with("0\n"), "{said}");
    assert!(
        said.contains(" ro,noatime - fuse.ocifs") && said.contains("userxattr"),
        "{said}"
    );
    assert!(said.contains("secret\n") && said.contains("new\n"), "{said}");
    assert!(said.ends_with("new\nkept\n"), "{said}");
    assert_empty(&user.home().join(".local/share/ocifs/uppers"));
}
