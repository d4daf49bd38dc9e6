//! Processes that do not answer because they are stopped, frozen, just killed, or cut off.

use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::Signal;

use super::namespaces::inside;
use super::{plain, problem, quick, row, rows, setup, umount};
use crate::common::layers::{Blob, Tar, push};
use crate::common::ocifs::{
    Mounted, Ocifs, PATIENCE, Said, alive, eventually, mounted_type, send, until_not_copied, wait,
};
use crate::common::registry::TestRegistry;

fn stop(mount: &Mounted) {
    send(mount.pid, Signal::SIGSTOP);
    eventually("the process is stopped", || {
        let stat = fs::read_to_string(format!("/proc/{}/stat", mount.pid)).unwrap();
        stat.rsplit_once(") ").unwrap().1.starts_with('T')
    });
}

/// `umount` of a mount whose process is stopped.
fn end(mount: &Mounted, options: &[&str]) -> Said {
    until_not_copied(|| umount(mount, options))
}

#[test]
fn a_stopped_process_is_ended_when_its_last_user_is_gone() {
    let (ocifs, image) = setup();
    let mount = ocifs.mount(&image);
    let mut user = inside("echo in; read line", mount.path());
    stop(&mount);
    let said = umount(&mount, &[]);
    assert_eq!(said.code, Some(0), "{said:?}");
    for part in ["another mount namespace", &format!("{} sh", user.id())] {
        assert!(said.stderr.contains(part), "{part}: {said:?}");
    }
    assert_eq!(row(mount.path())["state"], "detached");
    drop(user.stdin.take());
    wait(&mut user, "the user");
    let said = end(&mount, &[]);
    assert_eq!(said.code, Some(0), "{said:?}");
    assert!(said.stderr.contains("was ended"), "{said:?}");
    mount.assert_gone();
}

/// The kernel gives the numbers of a mount that is gone to the next one. A process that learns late that its mount is
/// gone must not unmount the next one.
#[test]
fn a_process_leaves_a_later_mount_with_the_numbers_of_its_own_alone() {
    let (ocifs, image) = setup();
    for signal in [None, Some(Signal::SIGTERM)].repeat(8) {
        let first = ocifs.mount(&image);
        assert!(first.join("hello").exists());
        stop(&first);
        umount2(first.path(), MntFlags::MNT_DETACH).unwrap();
        let second = ocifs.mount(&image);
        assert!(second.join("hello").exists());
        // The process finds both at once: the end of its mount, and a reason to take it down.
        let unmounting = signal.is_none().then(|| umount(&first, &["--lazy"]));
        if let Some(signal) = signal {
            send(first.pid, signal);
        }
        if alive(first.pid) {
            send(first.pid, Signal::SIGCONT);
        }
        eventually("the first process has ended", || !alive(first.pid));
        assert!(second.join("hello").exists(), "{signal:?} {unmounting:?}");
        assert_eq!(second.umount(&[]).code, Some(0));
    }
}

/// The kernel gives the numbers of a mount that is gone to the next one, also while the process of the former is alive.
#[test]
fn a_mount_that_lost_its_registration_is_not_taken_for_a_former_one() {
    let (ocifs, image) = setup();
    for _ in 0..8 {
        let first = ocifs.mount(&image);
        stop(&first);
        umount2(first.path(), MntFlags::MNT_DETACH).unwrap();
        let second = ocifs.mount(&image);
        fs::remove_dir_all(second.registration()).unwrap();
        let said = umount(&second, &[]);
        assert_eq!((said.code, mounted_type(second.path())), (Some(0), None), "{said:?}");
        send(first.pid, Signal::SIGCONT);
        eventually("the first process has ended", || !alive(first.pid));
        second.assert_gone();
    }
}

#[test]
fn stopped_processes_hold_up_nobody() {
    let (ocifs, image) = setup();
    let mounts: Vec<Mounted> = (0..4).map(|_| ocifs.mount(&image)).collect();
    mounts.iter().for_each(stop);
    // `list` asks all processes at once.
    let text = quick(plain().arg("list"));
    for mount in &mounts {
        let row = row(mount.path());
        assert_eq!(
            (&row["state"], &row["pid"]),
            (&"unresponsive".into(), &mount.pid.into())
        );
        assert!(problem(&row).contains(&format!("kill -CONT {}", mount.pid)), "{row}");
        let line = text
            .text()
            .lines()
            .find(|line| line.contains(mount.path().to_str().unwrap()));
        assert!(line.is_some_and(|line| line.starts_with("no answer")), "{text:?}");
        let said = quick(plain().args(["status", "--json"]).arg(mount.path()));
        assert_eq!((said.code, &said.json()["state"]), (Some(1), &"unresponsive".into()));
    }
    for (mount, options) in mounts.iter().zip([&[][..], &["--lazy"], &["--json"], &[]]) {
        let said = end(mount, options);
        assert_eq!(said.code, Some(0), "{said:?}");
        let told = [said.text(), &said.stderr].concat();
        assert!(
            told.contains("did not answer") && told.contains("was ended"),
            "{said:?}"
        );
        mount.assert_gone();
        assert!(rows(mount.path()).is_empty());
    }
}

#[test]
fn users_of_a_stopped_process_keep_what_they_have() {
    let (ocifs, image) = setup();
    let mount = ocifs.mount(&image);
    // The file is open in another process. If the test opened it, every program that the test starts would have to
    // close it. A stopped mount process would block that.
    let mut user = Command::new("sh")
        .args(["-c", "exec 3< \"$0\"; echo in; read line; cat <&3"])
        .arg(mount.join("hello"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut started = [0; 3];
    user.stdout.as_mut().unwrap().read_exact(&mut started).unwrap();
    let who = format!("process {} sh", user.id());
    stop(&mount);
    let said = umount(&mount, &[]);
    assert_eq!(said.code, Some(1), "{said:?}");
    for part in ["does not answer", "busy", "--lazy"] {
        assert!(said.stderr.contains(part), "{part}: {said:?}");
    }
    // When the process goes on, it does not carry out the umount request that had failed.
    send(mount.pid, Signal::SIGCONT);
    eventually("it answers", || row(mount.path())["state"] == "ready");
    assert!(mounted_type(mount.path()).is_some());
    stop(&mount);
    let said = umount(&mount, &["--lazy"]);
    assert_eq!(said.code, Some(0), "{said:?}");
    assert!(said.stderr.contains(&who), "{said:?}");
    assert_eq!(mounted_type(mount.path()), None);
    let seen = row(mount.path());
    assert_eq!(seen["state"], "detached", "{seen}");
    assert!(problem(&seen).contains(&who), "{seen}");
    send(mount.pid, Signal::SIGCONT);
    drop(user.stdin.take());
    assert_eq!(user.wait_with_output().unwrap().stdout, b"hello, world\n");
    mount.assert_gone();
}

#[test]
fn changes_outlive_a_stopped_process() {
    let (ocifs, image) = setup();
    let (upper, work) = (ocifs.home().join("upper"), ocifs.home().join("work"));
    let kept = ["--upper", upper.to_str().unwrap(), "--work", work.to_str().unwrap()];
    let mount = ocifs.mount_with(&image, &kept);
    fs::write(mount.join("new"), "new\n").unwrap();
    stop(&mount);
    let said = end(&mount, &[]);
    assert_eq!(said.code, Some(0), "{said:?}");
    mount.assert_gone();
    assert_eq!(fs::read(upper.join("new")).unwrap(), b"new\n");
    // The directories can be used again.
    let again = ocifs.mount_with(&image, &kept);
    assert_eq!(again.read("new"), b"new\n");

    let private = ocifs.mount_with(&image, &["--writable"]);
    fs::write(private.join("new"), "new\n").unwrap();
    stop(&private);
    assert_eq!(end(&private, &[]).code, Some(0));
    private.assert_gone();
    assert_eq!(fs::read_dir(ocifs.store().join("uppers")).unwrap().count(), 0);
}

#[test]
fn a_stopped_process_that_prepares_is_taken_down() {
    let registry = TestRegistry::start();
    let layer = Blob::gzip(&Tar::new().file("hello", b"hello, world\n").finish());
    push(&registry, "app", "1", std::slice::from_ref(&layer));
    registry.hold(&layer.path());
    let ocifs = Ocifs::new();
    let mount = ocifs.mount_with(&format!("{}/app:1", registry.host()), &[]);
    stop(&mount);
    assert_eq!(end(&mount, &[]).code, Some(0));
    mount.assert_gone();
}

/// A frozen control group with one process. None if this machine has no freezer. Dropping it thaws the process.
struct Freezer(PathBuf);

impl Freezer {
    fn new(pid: u32) -> Option<Self> {
        // Where version 1 is in use beside version 2, a group of version 2 may have no freezer.
        let roots = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/freezer"].map(Path::new);
        let group = roots
            .into_iter()
            .filter(|root| root.join("cgroup.procs").exists())
            .find_map(|root| {
                let group = root.join(format!("ocifs-test-{pid}"));
                fs::create_dir(&group).unwrap();
                let can = ["cgroup.freeze", "freezer.state"]
                    .iter()
                    .any(|file| group.join(file).exists());
                if !can {
                    fs::remove_dir(&group).unwrap();
                }
                can.then_some(group)
            })?;
        let freezer = Self(group);
        fs::write(freezer.0.join("cgroup.procs"), pid.to_string()).unwrap();
        freezer.set(true);
        Some(freezer)
    }

    fn set(&self, frozen: bool) {
        let (file, value) = match self.0.join("cgroup.freeze").exists() {
            true => ("cgroup.freeze", if frozen { "1" } else { "0" }),
            false => ("freezer.state", if frozen { "FROZEN" } else { "THAWED" }),
        };
        fs::write(self.0.join(file), value).unwrap();
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        self.set(false);
        let pids = fs::read_to_string(self.0.join("cgroup.procs")).unwrap();
        for pid in pids.lines() {
            // The process may have just ended.
            let _ = fs::write(self.0.with_file_name("cgroup.procs"), pid);
        }
        let deadline = Instant::now() + PATIENCE;
        while fs::remove_dir(&self.0).is_err() && Instant::now() < deadline {
            std::thread::yield_now();
        }
    }
}

#[test]
fn a_frozen_process_holds_up_nobody() {
    let (ocifs, image) = setup();
    let mount = ocifs.mount(&image);
    let Some(freezer) = Freezer::new(mount.pid) else {
        eprintln!("skipped: no control group with a freezer here");
        return;
    };
    eventually("it is frozen", || problem(&row(mount.path())).contains("frozen"));
    assert_eq!(umount(&mount, &[]).code, Some(0));
    assert_eq!(mounted_type(mount.path()), None);
    drop(freezer);
    mount.assert_gone();
}

#[test]
fn a_mount_whose_process_was_killed_a_moment_ago_comes_down() {
    let (ocifs, image) = setup();
    for i in 0..15 {
        let options: &[&str] = if i % 3 == 0 {
            &["--writable"]
        } else {
            &["--wait", "ready"]
        };
        let mount = ocifs.mount_with(&image, options);
        send(mount.pid, Signal::SIGKILL);
        let said = umount(&mount, &[]);
        assert_eq!(said.code, Some(0), "{i}: {said:?}");
        assert_eq!(mounted_type(mount.path()), None);
        if said.stderr.contains("does not end") {
            // A busy machine may take some time to end a process.
            eventually("the process is dead", || !alive(mount.pid));
            assert_eq!(umount(&mount, &[]).code, Some(0));
        }
        mount.assert_gone();
    }
    for _ in 0..5 {
        let mount = ocifs.mount(&image);
        send(mount.pid, Signal::SIGKILL);
        assert!(["dead", "ready"].contains(&row(mount.path())["state"].as_str().unwrap()));
        eventually("the process is dead", || !alive(mount.pid));
        let said = quick(plain().arg("status").arg(mount.path()));
        assert_eq!(said.code, Some(1), "{said:?}");
        assert!(said.text().contains("state       dead"), "{said:?}");
    }
}

#[test]
fn several_unmounts_at_once_do_not_disturb_each_other() {
    let (ocifs, image) = setup();
    for _ in 0..8 {
        let mount = ocifs.mount(&image);
        let said = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| mount.umount(&[]))).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect::<Vec<_>>()
        });
        assert!(said.iter().any(|said| said.code == Some(0)), "{said:?}");
        for said in said {
            // A later umount finds nothing. For a moment, a namespace that another test has just made may have a
            // copy.
            let over = ["is not an ocifs mount", "it is unmounted"];
            assert!(
                said.code == Some(0) || over.iter().any(|part| said.stderr.contains(part)),
                "{said:?}"
            );
        }
        mount.assert_gone();
    }
}

#[test]
fn a_process_that_lost_its_files_can_be_taken_down() {
    let (ocifs, image) = setup();
    let mount = ocifs.mount(&image);
    fs::remove_file(mount.registration().join("control")).unwrap();
    let seen = row(mount.path());
    assert_eq!(seen["state"], "unresponsive");
    assert!(problem(&seen).contains("control"), "{seen}");
    assert_eq!(umount(&mount, &[]).code, Some(0));
    mount.assert_gone();

    let mount = ocifs.mount(&image);
    fs::remove_dir_all(mount.registration()).unwrap();
    assert_eq!(mount.read("hello"), b"hello, world\n");
    assert_eq!(umount(&mount, &[]).code, Some(0));
    mount.assert_gone();
}
