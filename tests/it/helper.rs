//! `mount.ocifs`: images mounted by mount(8), from the command line and from lines of fstab(5).

use std::path::Path;
use std::process::Command;

use crate::common::layers::{Blob, Tar};
use crate::common::namespace::{LEAVE_OTHERS, copies};
use crate::common::oci_layout;
use crate::common::ocifs::{Ocifs, Said, bounded, isolate, mountpoint};

/// A mount namespace in which the helper is installed, an image, a store and a directory to mount on.
struct Scene {
    /// Holds the layout of the image.
    images: tempfile::TempDir,
    image: String,
    ocifs: Ocifs,
    directory: tempfile::TempDir,
}

/// Makes a layer above /usr/sbin in which mount(8) finds the helper. The directories are `$D`, where the image is mounted, and
/// `$T`, which is removed afterwards. `$P` is the program and `$S` the store.
const INSTALL: &str = r#"
leave_others "$D"
mkdir "$T/sbin"
mount -t tmpfs tmpfs "$T/sbin"
mkdir "$T/sbin/up" "$T/sbin/work"
ln -s "$P" "$T/sbin/up/mount.ocifs"
mount -t overlay -o "lowerdir=/usr/sbin,upperdir=$T/sbin/up,workdir=$T/sbin/work" overlay /usr/sbin
pid() { "$P" list --json | python3 -c 'import json, sys
print(*[m["pid"] for m in json.load(sys.stdin) if m["mountpoint"] == sys.argv[1]])' "$D"; }
"#;

impl Scene {
    fn new() -> Self {
        let images = tempfile::tempdir().unwrap();
        let layer = Blob::gzip(&Tar::new().file("hello", b"hello, world\n").finish());
        let image = oci_layout::write(images.path(), &[layer]);
        Self {
            images,
            image,
            ocifs: Ocifs::new(),
            directory: mountpoint(),
        }
    }

    /// Runs a shell script in a namespace where the helper is installed. `$I` is the image, `$O` the options that every
    /// mount needs here.
    fn script(&self, script: &str) -> Said {
        let temporary = mountpoint();
        let script = format!("set -e\n{LEAVE_OTHERS}{INSTALL}{script}");
        let _copies = copies();
        let mut command = Command::new("unshare");
        isolate(&mut command, self.ocifs.home());
        command
            .args(["--mount", "--propagation", "private", "sh", "-c", &script])
            .env("OCIFS_CONFIG", "/dev/null")
            .env("D", self.directory.path())
            .env("T", temporary.path())
            .env("P", env!("CARGO_BIN_EXE_ocifs"))
            .env("S", self.ocifs.store())
            .env("I", &self.image)
            .env("O", format!("store={}", self.ocifs.store().display()));
        bounded(&mut command)
    }

    fn ok(&self, script: &str) -> Said {
        let said = self.script(script);
        assert_eq!(said.code, Some(0), "{said:?}");
        said
    }
}

/// Returns the fields that findmnt(8) printed in the line that begins with `label`.
fn line<'a>(said: &'a Said, label: &str) -> &'a str {
    let line = said.text().lines().find_map(|line| line.strip_prefix(label));
    line.unwrap_or_else(|| panic!("{label}: {said:?}"))
}

#[test]
fn mount_8_mounts_and_umount_8_ends_it() {
    let scene = Scene::new();
    let said = scene.ok(r#"
mount -t ocifs -o "$O,nosuid,_netdev,prefetch=none,wait=ready,timeout=20s,via=fuse" "$I" "$D"
cat "$D/hello"
echo "table $(findmnt -n -o FSTYPE,OPTIONS "$D")"
echo "prefetch $("$P" status "$D" | grep ^prefetch)"
pid=$(pid)
umount "$D"
while kill -0 "$pid" 2>/dev/null; do sleep 0.01; done
[ ! -e "$D/hello" ]
"#);
    assert!(said.text().starts_with("hello, world\n"), "{said:?}");
    let table = line(&said, "table ");
    assert!(table.starts_with("fuse.ocifs ") && table.contains("nosuid"), "{table}");
    assert!(line(&said, "prefetch ").contains("none"), "{said:?}");
}

#[test]
fn lines_of_fstab_are_mounted_once() {
    let scene = Scene::new();
    for via in ["fuse", "erofs"] {
        let said = scene.ok(&format!(
            r#"
echo "$I $D ocifs ro,_netdev,nofail,x-systemd.automount,user,suid,comment=x,prefetch=all,via={via},wait=ready,$O 0 0" >"$T/fstab"
mount -T "$T/fstab" "$D"
cat "$D/hello"
first=$(pid)
mount -a -T "$T/fstab"
[ "$(pid)" = "$first" ] && [ "$(grep -c " $D " /proc/self/mountinfo)" = 1 ] && echo "still one"
umount "$D"
mount -a -T "$T/fstab"
cat "$D/hello"
umount "$D"
"#
        ));
        assert_eq!(said.text(), "hello, world\nstill one\nhello, world\n", "{via}");
    }
}

#[test]
fn fuse_ocifs_works_with_and_without_a_helper_of_that_name() {
    let scene = Scene::new();
    let said = scene.ok(r#"
# mount(8) gives mount.fuse3(8) a search path of its own.
ln -s "$P" /usr/sbin/ocifs
mount -t fuse.ocifs -o "$O,nodev,wait=ready" "$I" "$D"
cat "$D/hello"
umount "$D"
ln -s "$P" /usr/sbin/mount.fuse.ocifs
mount -t fuse.ocifs -o "$O,wait=ready" "$I" "$D"
cat "$D/hello"
umount "$D"
"#);
    assert_eq!(said.text(), "hello, world\nhello, world\n");
}

#[test]
fn changes_are_allowed_where_an_option_says_so() {
    let scene = Scene::new();
    let said = scene.ok(r#"
mount -t ocifs -o "$O" "$I" "$D"
! touch "$D/new" 2>/dev/null
umount "$D"
mount -t ocifs -o "rw,writable,$O" "$I" "$D"
echo new >"$D/new"
cat "$D/new"
umount "$D"
mkdir "$T/sbin/changes" "$T/sbin/scratch"
mount -t ocifs -o "upper=$T/sbin/changes,work=$T/sbin/scratch,$O" "$I" "$D"
echo kept >"$D/kept"
umount "$D"
cat "$T/sbin/changes/kept"
"#);
    assert_eq!(said.text(), "new\nkept\n");
}

#[test]
fn failures_have_the_exit_statuses_of_mount_8() {
    let scene = Scene::new();
    let missing = format!("oci:{}:missing", scene.images.path().display());
    for (arguments, code, said) in [
        ("-o odd=1 \"$I\" \"$D\"", 1, "unknown mount option `odd=1`"),
        ("-o remount \"$I\" \"$D\"", 1, "unmount it and mount it again"),
        ("-o prefetch=some \"$I\" \"$D\"", 1, "invalid value 'some'"),
        ("\"$I\"", 1, "<DIRECTORY>"),
        (&format!("-o \"$O\" {missing} \"$D\""), 32, "missing"),
        ("-o \"$O\" \"$I\" \"$D/absent\"", 32, "create the directory first"),
        ("-s -f -o \"odd=1,$O\" \"$I\" \"$D\"", 0, ""),
    ] {
        let result = scene.script(&format!("exec /sbin/mount.ocifs {arguments}"));
        assert_eq!(result.code, Some(code), "{arguments}: {result:?}");
        assert!(result.stderr.contains(said), "{arguments}: {result:?}");
    }
    // mount(8) hands on what its helper says.
    let result = scene.script("mount -t ocifs -o odd \"$I\" \"$D\"");
    assert!(result.code == Some(1) && result.stderr.contains("`odd`"), "{result:?}");
    let said = scene.ok("mount -s -t ocifs -o \"odd,$O,wait=ready\" \"$I\" \"$D\"; cat \"$D/hello\"; umount \"$D\"");
    assert_eq!(said.text(), "hello, world\n");
}

#[test]
fn another_mount_namespace_can_be_named() {
    let scene = Scene::new();
    let said = scene.ok(r#"
mkfifo "$T/ready" "$T/go"
unshare --mount --propagation private sh -ec 'echo >"$T/ready"; read -r _ <"$T/go"; cat "$D/hello"; umount "$D"' &
other=$!
read -r _ <"$T/ready"
mount -N "$other" -t ocifs -o "$O,wait=ready" "$I" "$D"
[ ! -e "$D/hello" ]
echo >"$T/go"
wait "$other"
"#);
    assert_eq!(said.text(), "hello, world\n");
    assert!(!Path::new(&scene.directory.path().join("hello")).exists());
}
