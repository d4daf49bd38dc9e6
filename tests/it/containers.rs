//! `ocifs run` and `ocifs bundle`: containers of a real runtime, whose roots are mounts.

use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::common::layers::{Blob, Tar, config, header, push_with};
use crate::common::ocifs::{Ocifs, bounded, isolate};
use crate::common::registry::TestRegistry;

/// An image of busybox whose program says as whom and where it runs.
struct Scene {
    _registry: TestRegistry,
    image: String,
}

impl Scene {
    fn new() -> Self {
        Self::with(serde_json::json!({
            "User": "app", "WorkingDir": "/srv/app", "Env": ["GREETING=hello"], "Volumes": {"/data": {}, "/etc": {}},
            "Entrypoint": ["/bin/sh", "-c"],
            "Cmd": ["echo $GREETING $HOME $(pwd) $(id -u):$(id -g):$(id -G)"], "StopSignal": "SIGINT",
        }))
    }

    fn with(run: serde_json::Value) -> Self {
        let busybox = std::fs::read("/bin/busybox").expect("these tests need busybox (busybox-static)");
        let program = header(b"bin/busybox", tar::EntryType::Regular, 0o755, busybox.len() as u64);
        let mut layer = Tar::new()
            .dir("bin/")
            .raw(program, &busybox)
            .file(
                "etc/passwd",
                "root:x:0:0::/root:/bin/sh\napp:x:1234:1235::/home/app:/bin/sh\n",
            )
            .file("etc/group", "app:x:1235:\nvideo:x:44:app\n");
        for name in ["sh", "cat", "id", "ls", "sleep", "touch", "hostname"] {
            layer = layer.link(tar::EntryType::Symlink, &format!("bin/{name}"), "busybox");
        }
        let layers = [Blob::gzip(&layer.finish())];
        let registry = TestRegistry::start();
        let mut whole = config(&layers);
        whole["config"] = run;
        push_with(&registry, "busybox", "1", &layers, &whole);
        let image = format!("{}/busybox:1", registry.host());
        Self {
            _registry: registry,
            image,
        }
    }
}

/// The runtime of these tests. It runs wherever they do, which crun does not: it refuses machines with controllers in both
/// versions of cgroups.
const RUNTIME: &str = "--runtime=runc";

/// The image is not mounted any more.
fn nothing_is_left(host: &Ocifs, scene: &Scene) {
    let mounts = host.ok(["list", "--json"]).json();
    let mounts = mounts.as_array().unwrap();
    assert!(!mounts.iter().any(|mount| mount["image"] == *scene.image), "{mounts:?}");
}

#[test]
fn a_program_runs_as_the_image_says() {
    let scene = Scene::new();
    let host = Ocifs::new();
    let said = host.ok(["run", RUNTIME, &scene.image]);
    assert_eq!(said.text(), "hello /home/app /srv/app 1234:1235:1235 44\n");
    nothing_is_left(&host, &scene);
}

#[test]
fn the_command_line_outranks_the_image() {
    let scene = Scene::new();
    let host = Ocifs::new();
    let run = |arguments: &[&str], command: &[&str]| {
        host.run([&["run", RUNTIME], arguments, &[&scene.image], command].concat())
    };
    let said = run(
        &["--entrypoint", "sh", "--user", "0", "--hostname", "box"],
        &["-c", "hostname; id -u; exit 7"],
    );
    assert_eq!((said.code, said.text()), (Some(7), "box\n0\n"));
    let said = run(&["--env", "GREETING=bye", "--workdir", "/"], &["echo $GREETING; pwd"]);
    assert_eq!((said.code, said.text()), (Some(0), "bye\n/\n"));
    // Changes are possible and thrown away, or not possible.
    let said = run(&["--user", "root"], &["touch /new && ls /new && ls /data"]);
    assert_eq!((said.code, said.text()), (Some(0), "/new\n"));
    let said = run(
        &["--read-only", "--user", "root", "--workdir", "/"],
        &["touch /data/new && touch /new"],
    );
    assert_eq!(said.code, Some(1), "{said:?}");
    let error = host.fails(["run", RUNTIME, "--user", "nobody", &scene.image]);
    assert!(error.contains("no user \"nobody\""), "{error}");
    nothing_is_left(&host, &scene);
}

#[test]
fn signals_reach_the_program() {
    let scene = Scene::new();
    let host = Ocifs::new();
    let script = "trap 'exit 9' USR1; echo ready; while :; do sleep 0.1; done";
    let mut running = host
        .interruptible(["run", RUNTIME, &scene.image, script])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = BufReader::new(running.stdout.take().unwrap());
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    kill(Pid::from_raw(running.id().cast_signed()), Signal::SIGUSR1).unwrap();
    output.read_to_string(&mut line).unwrap();
    assert_eq!(running.wait().unwrap().code(), Some(9));
    nothing_is_left(&host, &scene);
}

#[test]
fn a_hangup_that_was_to_be_ignored_does_not_reach_the_program() {
    let scene = Scene::new();
    let host = Ocifs::new();
    let script = "trap 'exit 9' USR1; echo ready; while :; do sleep 0.1; done";
    // As nohup(1) starts it.
    let direct = host.command(["run", "--runtime", "runc", &scene.image, script]);
    let mut command = Command::new("env");
    isolate(&mut command, host.home());
    command
        .arg("--ignore-signal=HUP")
        .arg(direct.get_program())
        .args(direct.get_args());
    command.envs(direct.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let mut running = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut output = BufReader::new(running.stdout.take().unwrap());
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    let pid = Pid::from_raw(running.id().cast_signed());
    // The signals are handled in this order. SIGHUP would end the program, which does not catch it.
    kill(pid, Signal::SIGHUP).unwrap();
    kill(pid, Signal::SIGUSR1).unwrap();
    assert_eq!(running.wait().unwrap().code(), Some(9));
    nothing_is_left(&host, &scene);
}

#[test]
fn a_runtime_runs_a_bundle() {
    let scene = Scene::new();
    let host = Ocifs::new();
    let bundle = host.home().join("bundle");
    let directory = bundle.to_str().unwrap();
    let said = host.ok(["bundle", "--json", &scene.image, directory]).json();
    assert_eq!(said["bundle"], directory);
    let name = format!("ocifs-test-{}", std::process::id());
    let ran = bounded(Command::new("runc").args(["run", "--bundle", directory, &name]));
    assert_eq!(ran.text(), "hello /home/app /srv/app 1234:1235:1235 44\n", "{ran:?}");
    host.ok(["umount", &format!("{directory}/rootfs")]);
    nothing_is_left(&host, &scene);
}

#[test]
fn the_first_runtime_that_is_installed_runs_the_container() {
    let scene = Scene::new();
    let host = Ocifs::new();
    let bin = host.home().join("bin");
    std::fs::create_dir(&bin).unwrap();
    // crun refuses to run where both versions of cgroups are mounted, so it comes last there.
    let is_hybrid = std::path::Path::new("/sys/fs/cgroup/unified").is_dir();
    for name in ["runc", "youki", "crun"] {
        let path = bin.join(name);
        std::fs::write(
            &path,
            "#!/bin/sh\necho ${0##*/} $1 $2 ${3%/*}/ \"$(/bin/cat $3/rootfs/etc/group)\"\n",
        )
        .unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        // Without the runtimes of this machine.
        let said = bounded(host.command(["run", &scene.image]).env("PATH", &bin));
        let expected = if name == "crun" && !is_hybrid {
            "crun run --bundle /"
        } else {
            "runc run --bundle /"
        };
        assert!(
            said.text().starts_with(expected) && said.text().contains("app:x:1235:"),
            "{said:?}"
        );
    }
    nothing_is_left(&host, &scene);
}

#[test]
fn gvisor_is_told_which_network_to_use() {
    let scene = Scene::new();
    let host = Ocifs::new();
    let runsc = host.home().join("runsc");
    // Debian 12 has no runsc, so this one says what it is asked for.
    std::fs::write(&runsc, "#!/bin/sh\necho $1 $2 $3\n").unwrap();
    std::fs::set_permissions(&runsc, std::fs::Permissions::from_mode(0o755)).unwrap();
    let said = |network: &str| {
        let program = runsc.to_str().unwrap();
        let ran = host.run(["run", "--runtime", program, "--network", network, &scene.image]);
        ran.text().to_owned()
    };
    assert_eq!(said("host"), "--network=host run --bundle\n");
    assert!(said("none").starts_with("run --bundle /"));
    nothing_is_left(&host, &scene);
}

#[test]
fn root_can_use_bubblewrap() {
    let scene = Scene::new();
    let host = Ocifs::new();
    let run = |arguments: &[&str], command: &[&str]| {
        let all = [&["run", "--runtime", "bwrap"], arguments, &[&scene.image], command].concat();
        host.run(all)
    };
    let said = run(
        &["--user", "0"],
        &["echo $GREETING $(id -u) $$; touch /new && ls /new; exit 7"],
    );
    assert_eq!((said.code, said.text()), (Some(7), "hello 0 1\n/new\n"), "{said:?}");
    let said = run(&[], &[]);
    assert_eq!(said.code, Some(1));
    assert!(
        said.stderr
            .contains("bubblewrap with root cannot run a program as user 1234"),
        "{said:?}"
    );
    nothing_is_left(&host, &scene);
}

#[test]
fn labels_become_annotations() {
    let scene = Scene::with(serde_json::json!({"Cmd": ["true"], "Labels": {"org.example.team": "web"}}));
    let host = Ocifs::new();
    let bundle = host.home().join("bundle");
    host.ok(["bundle", &scene.image, bundle.to_str().unwrap()]);
    let config = std::fs::read(bundle.join("config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
    assert_eq!(config["annotations"], serde_json::json!({"org.example.team": "web"}));
    host.ok(["umount", bundle.join("rootfs").to_str().unwrap()]);
}
