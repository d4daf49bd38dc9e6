//! Mounts that are in more than one mount namespace, and namespaces that end.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::Signal;

use super::{plain, problem, quick, row, rows, setup, umount};
use crate::common::namespace::{LEAVE_OTHERS, copies};
use crate::common::ocifs::{
    Ocifs, alive, bounded, eventually, mounted_type, mountpoint, program, send, tool, unmount, wait,
};

/// Starts a shell in a mount namespace of its own. The test writes lines to the shell.
pub(super) fn inside(script: &str, path: &Path) -> Child {
    let script = format!("{LEAVE_OTHERS}leave_others \"$0\"; {script}");
    let _copies = copies();
    let mut child = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-ec", &script])
        .arg(path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut started = [0; 3];
    child.stdout.as_mut().unwrap().read_exact(&mut started).unwrap();
    assert_eq!(&started, b"in\n");
    child
}

#[test]
fn a_mount_that_another_namespace_has_stays_known() {
    let (ocifs, image) = setup();
    for options in [&["--wait", "ready"][..], &["--writable"]] {
        let mount = ocifs.mount_with(&image, options);
        let mut user = inside("echo in; read line; cat \"$0/hello\"; read line", mount.path());
        let said = umount(&mount, &[]);
        assert_eq!(said.code, Some(0), "{said:?}");
        let who = format!("{} sh", user.id());
        for part in ["another mount namespace", &who] {
            assert!(said.stderr.contains(part), "{part}: {said:?}");
        }
        assert_eq!(mounted_type(mount.path()), None);
        let seen = row(mount.path());
        assert_eq!((&seen["state"], &seen["pid"]), (&"detached".into(), &mount.pid.into()));
        assert!(problem(&seen).contains(&who), "{seen}");
        let text = quick(plain().arg("list"));
        assert!(
            text.text().contains("detached") && text.text().contains(&who),
            "{text:?}"
        );
        let said = quick(plain().arg("status").arg(mount.path()));
        assert!(said.code == Some(1) && said.text().contains(&who), "{said:?}");
        let said = umount(&mount, &[]);
        assert_eq!(said.code, Some(1));
        assert!(
            said.stderr.contains("it is unmounted") && said.stderr.contains(&who),
            "{said:?}"
        );

        // The mount point is free for another mount. `list` shows both.
        let path = mount.path().to_str().unwrap();
        ocifs.ok(["mount", "--wait", "ready", &image, path]);
        let states: Vec<_> = rows(mount.path()).into_iter().map(|row| row["state"].clone()).collect();
        assert!(
            states.contains(&"detached".into()) && states.contains(&"ready".into()),
            "{states:?}"
        );
        ocifs.ok(["umount", path]);
        // A namespace that another test has made meanwhile has a copy of the second mount as long as it lives.
        eventually("only the first is left", || rows(mount.path()).len() == 1);
        assert_eq!(row(mount.path())["pid"], mount.pid);

        let mut stdin = user.stdin.take().unwrap();
        stdin.write_all(b"go\n").unwrap();
        let mut content = [0; 13];
        user.stdout.as_mut().unwrap().read_exact(&mut content).unwrap();
        assert_eq!(&content, b"hello, world\n");
        drop(stdin);
        user.wait().unwrap();
        mount.assert_gone();
        eventually("nothing is listed", || rows(mount.path()).is_empty());
    }
}

#[test]
fn a_mount_that_others_unmounted_stays_known_as_well() {
    let (ocifs, image) = setup();
    let mount = ocifs.mount(&image);
    let mut user = inside("echo in; read line", mount.path());
    unmount(mount.path());
    assert_eq!(row(mount.path())["state"], "detached");
    drop(user.stdin.take());
    user.wait().unwrap();
    mount.assert_gone();

    let mount = ocifs.mount(&image);
    let copy = mountpoint();
    tool("mount", [Path::new("--bind"), mount.path(), copy.path()]);
    let file = File::open(copy.path().join("hello")).unwrap();
    let said = umount(&mount, &[]);
    assert_eq!(said.code, Some(0), "{said:?}");
    let seen = row(mount.path());
    assert!(problem(&seen).contains(copy.path().to_str().unwrap()), "{seen}");
    drop(file);
    unmount(copy.path());
    mount.assert_gone();
}

/// Runs a script in a mount namespace that ends with the script. The script prints the ids of processes that have to
/// end with the namespace. Returns what it wrote to standard error.
fn ends(ocifs: &Ocifs, unshare: &[&str], image: &str, script: &str) -> String {
    let directory = mountpoint();
    let script = format!("{LEAVE_OTHERS}leave_others \"$0\"\n{script}");
    let _copies = copies();
    let mut command = Command::new("unshare");
    command
        .args(unshare)
        .args(["--propagation", "private", "sh", "-ec", &script]);
    command.arg(directory.path()).arg(image);
    let binary = program(ocifs.home());
    command
        .env_clear()
        .env("HOME", ocifs.home())
        .env("OCIFS_CONFIG", "/dev/null");
    command.env("PATH", std::env::var_os("PATH").unwrap());
    command
        .env("OCIFS", binary.get_program())
        .env("OCIFS_STORE", ocifs.store());
    // Root of a user namespace has no /run. Its run directory is one that no other process uses.
    command.env("XDG_RUNTIME_DIR", ocifs.home());
    let said = bounded(&mut command);
    assert_eq!(said.code, Some(0), "{said:?}");
    let pids: Vec<u32> = said.text().lines().filter_map(|line| line.parse().ok()).collect();
    assert!(!pids.is_empty(), "{said:?}");
    for pid in pids {
        eventually("the process ends with its namespace", || !alive(pid));
    }
    assert!(rows(directory.path()).is_empty());
    said.stderr
}

const MOUNT: &str = r#"
"$OCIFS" mount --json --wait ready $OPTIONS "$1" "$0" | sed -n 's/.*"pid":\([0-9]*\).*/\1/p'
test "$(cat "$0/hello")" = "hello, world"
"#;

#[test]
fn a_mount_ends_with_its_namespace() {
    let (ocifs, image) = setup();
    for options in ["", "--writable", "--prefetch=all"] {
        ends(&ocifs, &["--mount"], &image, &format!("OPTIONS={options}\n{MOUNT}"));
    }
    // Two mounts do not keep each other alive.
    let two = format!(
        "{MOUNT}\nmount -t tmpfs tmpfs /mnt; mkdir /mnt/2; set -- \"$1\"; \"$OCIFS\" mount --json \"$1\" /mnt/2 | sed -n 's/.*\"pid\":\\([0-9]*\\).*/\\1/p'"
    );
    ends(&ocifs, &["--mount"], &image, &two);
    // With a run directory of its own, no other process could ever see the mount.
    ends(
        &ocifs,
        &["--mount"],
        &image,
        &format!("mount -t tmpfs tmpfs /run\n{MOUNT}"),
    );
    ends(&ocifs, &["--user", "--map-root-user", "--mount"], &image, MOUNT);
}

/// A zombie is in no namespace, and the mount cannot wait for its end. The mount ignores it and keeps looking for
/// other users, without a busy loop.
#[test]
fn a_zombie_keeps_no_mount_and_no_processor_busy() {
    let (ocifs, image) = setup();
    let mut zombie = Command::new("true").spawn().unwrap();
    let stat = format!("/proc/{}/stat", zombie.id());
    eventually("it is a zombie", || {
        std::fs::read_to_string(&stat).unwrap().contains(") Z ")
    });
    let script = format!(
        "{MOUNT}\npid=$(\"$OCIFS\" status --json \"$0\" | sed -n 's/^ *\"pid\": \\([0-9]*\\),/\\1/p')\nsleep 2\ncut -d ' ' -f 14,15 /proc/$pid/stat | sed 's/^/ticks /' >&2; exit 0"
    );
    let ticks = ends(&ocifs, &["--mount"], &image, &script);
    let ticks: u64 = ticks
        .split_whitespace()
        .filter_map(|word| word.parse::<u64>().ok())
        .sum();
    assert!(ticks < 60, "{ticks} of 200");
    zombie.wait().unwrap();
}

#[test]
fn a_mount_lives_as_long_as_anybody_is_in_its_namespace() {
    let (ocifs, image) = setup();
    let directory = mountpoint();
    let script = r#"
        "$OCIFS" mount --json --wait ready "$1" "$0" | sed -n 's/.*"pid":\([0-9]*\).*/\1/p'
        (read line; cat "$0/hello"; read line) <&3 &
        echo $!
    "#;
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "bash", "-ec"]);
    command
        .arg(format!("exec 3<&0\n{LEAVE_OTHERS}leave_others \"$0\"\n{script}"))
        .arg(directory.path())
        .arg(&image);
    command
        .env("OCIFS", env!("CARGO_BIN_EXE_ocifs"))
        .env("OCIFS_STORE", ocifs.store());
    command.env("OCIFS_CONFIG", "/dev/null").env("HOME", ocifs.home());
    let _copies = copies();
    let mut shell = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdout = std::io::BufReader::new(shell.stdout.take().unwrap());
    let mut line = || {
        let mut line = String::new();
        std::io::BufRead::read_line(&mut stdout, &mut line).unwrap();
        line.trim_end().to_owned()
    };
    let (server, user): (u32, u32) = (line().parse().unwrap(), line().parse().unwrap());
    let mut stdin = shell.stdin.take().unwrap();
    assert!(wait(&mut shell, "the shell that mounted").success());
    assert!(alive(server) && alive(user));
    assert_eq!(row(directory.path())["state"], "ready", "it is seen from outside");
    stdin.write_all(b"go\n").unwrap();
    assert_eq!(line(), "hello, world");
    assert!(alive(server));
    drop(stdin);
    eventually("the process ends with the last one who could use it", || !alive(server));
    assert!(rows(directory.path()).is_empty());
}

/// A mount. Dropping it detaches it, with all that is mounted in it, however the test ends.
struct Detached<'a>(&'a Path);

impl Drop for Detached<'_> {
    fn drop(&mut self) {
        let ended = Command::new("umount").arg("--lazy").arg(self.0).status();
        assert!(std::thread::panicking() || ended.is_ok_and(|ended| ended.success()));
    }
}

#[test]
fn a_mount_that_is_seen_elsewhere_outlives_its_namespace() {
    let (ocifs, image) = setup();
    let shared = mountpoint();
    let path = shared.path().to_str().unwrap();
    tool("mount", ["-t", "tmpfs", "tmpfs", path]);
    let _shared = Detached(shared.path());
    tool("mount", ["--make-shared", path]);
    let inner = shared.path().join("m");
    std::fs::create_dir(&inner).unwrap();
    let mut command = Command::new("unshare");
    let script = r#""$OCIFS" mount --json --wait ready "$1" "$0" | sed -n 's/.*"pid":\([0-9]*\).*/\1/p'"#;
    command
        .args(["--mount", "--propagation", "unchanged", "sh", "-ec", script])
        .arg(&inner)
        .arg(&image);
    command
        .env("OCIFS", env!("CARGO_BIN_EXE_ocifs"))
        .env("OCIFS_STORE", ocifs.store());
    command.env("OCIFS_CONFIG", "/dev/null").env("HOME", ocifs.home());
    let said = bounded(&mut command);
    let pid: u32 = said.text().trim().parse().unwrap();
    // By then the process has looked for users: the other mount, which has none, is gone.
    ends(&ocifs, &["--mount"], &image, MOUNT);
    assert_eq!(std::fs::read(inner.join("hello")).unwrap(), b"hello, world\n");
    assert_eq!(row(&inner)["state"], "ready");
    ocifs.ok(["umount", inner.to_str().unwrap()]);
    eventually("the process ends", || !alive(pid));
}

#[test]
fn a_process_in_the_foreground_is_its_starters_business() {
    let (ocifs, image) = setup();
    let directory = mountpoint();
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private"]);
    command
        .arg(env!("CARGO_BIN_EXE_ocifs"))
        .args(["mount", "--foreground", &image])
        .arg(directory.path());
    command
        .env("OCIFS_STORE", ocifs.store())
        .env("OCIFS_CONFIG", "/dev/null")
        .env("HOME", ocifs.home());
    let mut server = command.spawn().unwrap();
    eventually("it is ready", || {
        rows(directory.path()).iter().any(|row| row["state"] == "ready")
    });
    ends(&ocifs, &["--mount"], &image, MOUNT);
    assert!(alive(server.id()));
    send(server.id(), Signal::SIGTERM);
    assert!(wait(&mut server, "the mount in the foreground").success());
}
