//! Mounts as services: what the process in the foreground tells the service manager, and the units.

use std::ffi::OsString;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use nix::sys::signal::Signal;

use crate::common::layers::{Blob, Tar, push};
use crate::common::ocifs::{
    Ocifs, PATIENCE, Running, bounded, eventually, mounted_type, mountpoint, send, unmount, wait,
};
use crate::common::registry::TestRegistry;

const UNIT: &str = include_str!("../../scripts/units/ocifs@.service");

/// A service manager that listens.
struct Manager {
    socket: UnixDatagram,
    name: OsString,
    _directory: tempfile::TempDir,
}

impl Manager {
    fn at_a_path() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        Self::with(UnixDatagram::bind(&path).unwrap(), path.into(), directory)
    }

    fn at_an_abstract_name() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let name = format!("ocifs-test{}", directory.path().display());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let socket = UnixDatagram::bind_addr(&address).unwrap();
        Self::with(socket, format!("@{name}").into(), directory)
    }

    fn with(socket: UnixDatagram, name: OsString, directory: tempfile::TempDir) -> Self {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Self {
            socket,
            name,
            _directory: directory,
        }
    }

    /// Returns the assignments of the next message.
    fn next(&self) -> Vec<String> {
        let mut message = [0; 4096];
        let length = self.socket.recv(&mut message).expect("a message");
        let text = std::str::from_utf8(&message[..length]).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    /// Fails if a message has come that was not read.
    fn has_nothing_more(&self) {
        self.socket.set_nonblocking(true).unwrap();
        let more = self.socket.recv(&mut [0; 4096]);
        assert_eq!(more.unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
        self.socket.set_nonblocking(false).unwrap();
    }
}

struct Scene {
    registry: TestRegistry,
    layer: Blob,
    image: String,
    ocifs: Ocifs,
    directory: tempfile::TempDir,
}

impl Scene {
    fn new() -> Self {
        let registry = TestRegistry::start();
        let layer = Blob::gzip(&Tar::new().file("hello", b"hello, world\n").finish());
        push(&registry, "app", "1", std::slice::from_ref(&layer));
        Self {
            image: format!("{}/app:1", registry.host()),
            registry,
            layer,
            ocifs: Ocifs::new(),
            directory: mountpoint(),
        }
    }

    fn path(&self) -> &str {
        self.directory.path().to_str().unwrap()
    }

    fn start(&self, manager: &Manager, options: &[&str]) -> Running {
        let arguments = [&["mount", "--foreground"], options, &[&self.image, self.path()]].concat();
        let mut command = self.ocifs.command(&arguments);
        command.env("NOTIFY_SOCKET", &manager.name);
        Running(command.stdin(Stdio::null()).spawn().unwrap())
    }
}

#[test]
fn a_service_is_ready_when_the_image_is_mounted_and_says_when_it_ends() {
    for manager in [Manager::at_a_path(), Manager::at_an_abstract_name()] {
        let scene = Scene::new();
        scene.registry.hold(&scene.layer.path());
        let mut service = scene.start(&manager, &["--via", "fuse"]);
        assert_eq!(manager.next(), ["READY=1", "STATUS=the image is being prepared"]);
        assert_eq!(mounted_type(scene.directory.path()).as_deref(), Some("fuse.ocifs"));
        scene.registry.release();
        assert_eq!(manager.next(), ["READY=1", "STATUS=the image can be read"]);
        assert_eq!(
            std::fs::read(scene.directory.path().join("hello")).unwrap(),
            b"hello, world\n"
        );
        send(service.0.id(), Signal::SIGTERM);
        assert_eq!(manager.next(), ["STOPPING=1", "STATUS=taking it down"]);
        assert!(wait(&mut service.0, "the service").success());
        assert_eq!(mounted_type(scene.directory.path()), None);
        manager.has_nothing_more();
    }
}

#[test]
fn a_service_that_waits_is_ready_later() {
    let scene = Scene::new();
    let manager = Manager::at_a_path();
    scene.registry.hold(&scene.layer.path());
    let mut service = scene.start(&manager, &["--wait", "complete", "--via", "fuse"]);
    assert_eq!(manager.next(), ["STATUS=the image is being prepared"]);
    manager.has_nothing_more();
    scene.registry.release();
    assert_eq!(manager.next(), ["STATUS=the image can be read"]);
    assert_eq!(manager.next(), ["READY=1", "STATUS=all of the image is in the store"]);
    unmount(scene.path());
    assert_eq!(manager.next()[0], "STOPPING=1");
    assert!(wait(&mut service.0, "the service").success());
}

#[test]
fn a_service_says_why_it_fails() {
    let scene = Scene::new();
    let manager = Manager::at_a_path();
    let missing = format!("{}/app:missing", scene.registry.host());
    let mut command = scene.ocifs.command(["mount", "--foreground", &missing, scene.path()]);
    let said = bounded(command.env("NOTIFY_SOCKET", &manager.name));
    assert_eq!(said.code, Some(1), "{said:?}");
    let message = manager.next();
    assert!(message.len() == 1 && message[0].contains("app:missing"), "{message:?}");
}

#[test]
fn nobody_else_speaks_for_the_service() {
    // A process in the background is no part of the service that started it.
    let scene = Scene::new();
    let manager = Manager::at_a_path();
    let mut command = scene
        .ocifs
        .command(["mount", "--json", "--wait", "ready", &scene.image, scene.path()]);
    let said = bounded(command.env("NOTIFY_SOCKET", &manager.name));
    let environment = std::fs::read(format!("/proc/{}/environ", said.json()["pid"])).unwrap();
    let environment = String::from_utf8_lossy(&environment);
    assert!(
        environment.contains("OCIFS_SERVE=") && !environment.contains("NOTIFY_SOCKET"),
        "{environment}"
    );
    scene.ocifs.ok(["umount", scene.path()]);
    manager.has_nothing_more();

    // Neither is a credential helper. This one writes down its environment.
    let home = scene.ocifs.home();
    let (helper, seen) = (home.join("docker-credential-x"), home.join("seen"));
    std::fs::write(
        &helper,
        "#!/bin/sh\nenv >\"$HOME/seen.part\"; mv \"$HOME/seen.part\" \"$HOME/seen\"; exit 1\n",
    )
    .unwrap();
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&helper, executable).unwrap();
    std::fs::create_dir(home.join(".docker")).unwrap();
    std::fs::write(home.join(".docker/config.json"), r#"{"credsStore": "x"}"#).unwrap();
    scene
        .registry
        .guard(crate::common::registry::Guard::Basic("me".into(), "hunter2".into()));
    let path = format!("{}:{}", home.display(), std::env::var("PATH").unwrap());
    let mut command = scene
        .ocifs
        .command(["mount", "--foreground", "--pull", "always", &scene.image, scene.path()]);
    let said = bounded(command.env("NOTIFY_SOCKET", &manager.name).env("PATH", path));
    assert_eq!(said.code, Some(1), "{said:?}");
    let environment = std::fs::read_to_string(seen).unwrap();
    assert!(
        environment.contains("HOME=") && !environment.contains("NOTIFY_SOCKET"),
        "{environment}"
    );
}

#[test]
fn a_manager_that_does_not_listen_stops_nobody() {
    let scene = Scene::new();
    for name in ["/nowhere/notify", "odd", "@"] {
        let arguments = ["mount", "--foreground", "--wait", "ready", &scene.image, scene.path()];
        let mut command = scene.ocifs.command(arguments);
        let mut service = Running(
            command
                .env("NOTIFY_SOCKET", name)
                .stderr(Stdio::piped())
                .spawn()
                .unwrap(),
        );
        eventually("it can be read", || scene.directory.path().join("hello").exists());
        unmount(scene.path());
        assert!(wait(&mut service.0, "the service").success());
        let mut said = String::new();
        std::io::Read::read_to_string(service.0.stderr.as_mut().unwrap(), &mut said).unwrap();
        assert!(said.contains("NOTIFY_SOCKET"), "{name}: {said}");
    }
}

/// Other programs see a mount before its process has registered it.
#[test]
fn an_unmount_as_soon_as_the_mount_is_seen_is_final() {
    let scene = Scene::new();
    for _ in 0..20 {
        let arguments = ["mount", "--foreground", "--wait", "ready", &scene.image, scene.path()];
        let mut service = Running(scene.ocifs.command(arguments).spawn().unwrap());
        // A pause between two looks would give the process time to register the mount.
        let deadline = Instant::now() + PATIENCE;
        while !scene.directory.path().join("hello").exists() {
            assert!(Instant::now() < deadline, "it cannot be read");
        }
        unmount(scene.path());
        assert!(wait(&mut service.0, "the service").success());
        assert!(!scene.directory.path().join("hello").exists());
    }
}

/// Returns the values of a setting of the unit.
fn setting(name: &str) -> Vec<&'static str> {
    let values = UNIT
        .lines()
        .filter_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    values.collect()
}

#[test]
fn the_unit_serves_what_its_file_says() {
    let scene = Scene::new();
    let manager = Manager::at_a_path();
    assert_eq!(
        (setting("Type"), setting("EnvironmentFile")),
        (vec!["notify"], vec!["/etc/ocifs/%i.conf"])
    );
    let mountpoint = format!("{}/made", scene.path());
    let variables = [
        ("IMAGE", &*scene.image),
        ("MOUNTPOINT", &mountpoint),
        ("OPTIONS", "--wait ready --prefetch all"),
    ];
    // As systemd does: `${NAME}` is one argument, and `$NAME` is split at spaces (systemd.service(5)).
    let arguments = |line: &str| -> Vec<String> {
        let words = line.split(' ').flat_map(|word| {
            let value = |name: &str| variables.iter().find(|(known, _)| *known == name).unwrap().1;
            match (word.strip_prefix("${"), word.strip_prefix('$')) {
                (Some(name), _) => vec![value(name.trim_end_matches('}'))],
                (None, Some(name)) => value(name).split(' ').collect(),
                (None, None) => vec![word],
            }
        });
        words.map(str::to_owned).collect()
    };
    for before in setting("ExecStartPre") {
        let words = arguments(before);
        assert_eq!(bounded(Command::new(&words[0]).args(&words[1..])).code, Some(0));
    }
    let words = arguments(setting("ExecStart")[0]);
    assert_eq!(words[0], "/usr/bin/ocifs");
    let mut command = scene.ocifs.command(&words[1..]);
    let mut service = Running(command.env("NOTIFY_SOCKET", &manager.name).spawn().unwrap());
    while manager.next()[0] != "READY=1" {}
    assert_eq!(
        std::fs::read(Path::new(&mountpoint).join("hello")).unwrap(),
        b"hello, world\n"
    );
    send(service.0.id(), Signal::SIGTERM);
    assert!(wait(&mut service.0, "the service").success());
}

#[test]
fn systemd_accepts_the_unit() {
    let directory = tempfile::tempdir().unwrap();
    // The program need not be installed where the tests run.
    let unit = UNIT.replace("/usr/bin/ocifs", env!("CARGO_BIN_EXE_ocifs"));
    let path = directory.path().join("ocifs@.service");
    std::fs::write(&path, unit).unwrap();
    let mut command = Command::new("systemd-analyze");
    let verified = command
        .arg("verify")
        .arg("--man=no")
        .arg(directory.path().join("ocifs@web.service"));
    std::fs::copy(&path, directory.path().join("ocifs@web.service")).unwrap();
    let said = bounded(verified);
    assert_eq!((said.code, said.stderr.as_str()), (Some(0), ""), "{said:?}");
    // It also finds what is wrong.
    std::fs::write(
        directory.path().join("ocifs@web.service"),
        UNIT.replace("Restart=on-failure", "Restart=odd"),
    )
    .unwrap();
    let said = bounded(
        Command::new("systemd-analyze")
            .arg("verify")
            .arg("--man=no")
            .arg(directory.path().join("ocifs@web.service")),
    );
    assert!(said.stderr.contains("odd"), "{said:?}");
}
