//! `ocifs snapshotter` below a real containerd: pulls by CRI, containers, commits, crashes.

use std::process::Command;

use crate::common::containerd::{ContainerHost, names_below};
use crate::common::layers::{Blob, Tar, config, header, noise, push_with};
use crate::common::ocifs::{bounded, eventually, tool};
use crate::common::registry::TestRegistry;

/// Layers of images that have a shell.
fn base() -> Blob {
    let busybox = std::fs::read("/bin/busybox").expect("these tests need busybox (busybox-static)");
    let program = header(b"bin/busybox", tar::EntryType::Regular, 0o755, busybox.len() as u64);
    let scratch = header(b"tmp/", tar::EntryType::Directory, 0o1777, 0);
    let mut layer = Tar::new().dir("bin/").raw(program, &busybox).raw(scratch, &[]);
    for name in [
        "sh",
        "cat",
        "id",
        "ls",
        "sleep",
        "touch",
        "rm",
        "echo",
        "sha256sum",
        "true",
    ] {
        layer = layer.link(tar::EntryType::Symlink, &format!("bin/{name}"), "busybox");
    }
    Blob::gzip(&layer.finish())
}

/// A layer with one file, and one that is removed from the layers below.
fn layer(name: &str, content: &str, removed: Option<&str>) -> Blob {
    let tar = Tar::new().file(format!("data-{name}"), content);
    let tar = match removed {
        Some(removed) => tar.file(format!(".wh.data-{removed}"), ""),
        None => tar,
    };
    Blob::gzip(&tar.finish())
}

/// Pushes an image to a registry. Returns its name.
fn pushed(registry: &TestRegistry, name: &str, layers: &[Blob]) -> String {
    let mut whole = config(layers);
    whole["config"] =
        serde_json::json!({"Cmd": ["/bin/sh"], "Env": ["PATH=/bin"], "WorkingDir": "/tmp", "User": "12:34"});
    push_with(registry, name, "1", layers, &whole);
    format!("{}/{name}:1", registry.host())
}

/// Returns how many requests for blobs of layers were not made by ocifs.
fn fetched_by_containerd(registry: &TestRegistry, layers: &[Blob]) -> usize {
    let log = registry.log();
    let is_layer = |target: &str| layers.iter().any(|layer| target.contains(&layer.digest().to_string()));
    let others = log.iter().filter(|request| {
        let agent = request
            .headers
            .get("user-agent")
            .map(String::as_str)
            .unwrap_or_default();
        request.method == "GET" && is_layer(&request.target) && !agent.starts_with("ocifs")
    });
    others.count()
}

#[test]
fn a_pulled_image_is_mounted_and_not_fetched() {
    let registry = TestRegistry::start();
    let layers = [base(), layer("a", "one", None), layer("b", "two", Some("a"))];
    let image = pushed(&registry, "app", &layers);
    let host = ContainerHost::new();
    host.pull(&image);
    assert_eq!(fetched_by_containerd(&registry, &layers), 0);
    assert_eq!(host.snapshots().len(), 3);
    let said = host.run(
        &image,
        "first",
        &["/bin/sh", "-c", "pwd; id -u; id -g; cat /data-b; ls /; touch /tmp/x"],
    );
    assert_eq!(said, "/tmp\n12\n34\ntwobin\ndata-b\ndev\netc\nproc\nrun\nsys\ntmp\n");
    // containerd makes some directories in the root; the image itself has none of them.
    let mounts = host.mounts();
    assert_eq!(mounts.len(), 1);
    let names = names_below(mounts[0]["mountpoint"].as_str().unwrap().as_ref());
    let outside: Vec<&String> = names.iter().filter(|name| !name.starts_with("bin/")).collect();
    assert_eq!(outside, ["bin", "data-b", "tmp"]);
}

#[test]
fn containers_of_an_image_share_its_mount_and_nothing_else() {
    let registry = TestRegistry::start();
    let image = pushed(&registry, "app", &[base(), layer("a", "one", None)]);
    let host = ContainerHost::new();
    host.pull(&image);
    let names: Vec<String> = (0..10).map(|number| format!("box-{number}")).collect();
    for name in &names {
        host.start(&image, name, &["/bin/sh", "-c", "echo $$ >/tmp/own; sleep 1000"]);
    }
    assert_eq!(host.mounts().len(), 1);
    for name in &names {
        assert_eq!(host.exec(name, &["/bin/cat", "/data-a"]), "one");
        host.exec(name, &["/bin/touch", &format!("/tmp/{name}")]);
        assert_eq!(host.exec(name, &["/bin/ls", "/tmp"]), format!("{name}\nown\n"));
    }
    // An image can be removed while its containers run.
    host.remove_images();
    assert_eq!(host.exec(&names[0], &["/bin/cat", "/data-a"]), "one");
    for name in &names {
        host.remove(name);
    }
    eventually("nothing is left", || {
        host.snapshots().is_empty()
            && host.mounts().is_empty()
            && names_below(&host.root().join("snapshots")).is_empty()
            && names_below(&host.root().join("images")).is_empty()
    });
}

#[test]
fn a_mount_that_no_container_uses_is_ended_and_made_again() {
    let registry = TestRegistry::start();
    let image = pushed(&registry, "app", &[base(), layer("a", "one", None)]);
    let host = ContainerHost::new();
    host.pull(&image);
    eventually("the mount is ended", || host.mounts().is_empty());
    registry.clear_log();
    assert_eq!(host.run(&image, "late", &["/bin/cat", "/data-a"]), "one");
    // What the store knows is not asked for again.
    assert_eq!(registry.count("/manifests/"), 0);
}

#[test]
fn no_container_needs_the_snapshotter_to_live() {
    let registry = TestRegistry::start();
    let content = String::from_utf8(noise(7, 3 << 20).into_iter().map(|b| b'a' + b % 26).collect()).unwrap();
    let image = pushed(&registry, "app", &[base(), layer("a", &content, None)]);
    let mut host = ContainerHost::new();
    host.pull(&image);
    let sum = tool("sha256sum", ["/bin/busybox"]);
    let sum = String::from_utf8(sum).unwrap()[..64].to_owned();
    host.start(&image, "before", &["/bin/sleep", "1000"]);
    for round in 0..5 {
        host.kill_snapshotter();
        let said = host.exec("before", &["/bin/sha256sum", "/bin/busybox"]);
        assert!(said.starts_with(&sum), "{said}");
        host.start_snapshotter();
        let name = format!("after-{round}");
        host.start(&image, &name, &["/bin/sleep", "1000"]);
        assert_eq!(host.exec(&name, &["/bin/cat", "/data-a"]).len(), content.len());
        host.remove(&name);
    }
    assert_eq!(host.mounts().len(), 1);
    host.kill_containerd();
    host.kill_snapshotter();
    host.start_snapshotter();
    host.start_containerd();
    assert_eq!(host.exec("before", &["/bin/cat", "/data-a"]).len(), content.len());
    host.remove("before");
}

#[test]
fn mounts_are_made_again_after_a_start_of_the_machine() {
    let registry = TestRegistry::start();
    let image = pushed(&registry, "app", &[base(), layer("a", "one", None)]);
    let mut host = ContainerHost::new();
    host.pull(&image);
    host.ctr_ok(&[
        "containers",
        "create",
        "--snapshotter",
        "ocifs",
        "--net-host",
        &image,
        "kept",
        "/bin/cat",
        "/data-a",
    ]);
    host.kill_snapshotter();
    let path = host.mounts()[0]["mountpoint"].as_str().unwrap().to_owned();
    host.ocifs.ok(["umount", &path]);
    host.start_snapshotter();
    eventually("the image is mounted", || {
        host.mounts().first().is_some_and(|mount| mount["state"] == "ready")
    });
    assert_eq!(host.ctr_ok(&["tasks", "start", "kept"]), "one");
}

#[test]
fn a_mount_whose_process_died_is_replaced_for_new_containers() {
    let registry = TestRegistry::start();
    let image = pushed(&registry, "app", &[base(), layer("a", "one", None)]);
    let host = ContainerHost::new();
    host.pull(&image);
    host.start(&image, "before", &["/bin/sleep", "1000"]);
    let pid = host.mounts()[0]["pid"].as_u64().unwrap();
    crate::common::ocifs::send(u32::try_from(pid).unwrap(), nix::sys::signal::Signal::SIGKILL);
    assert_eq!(host.run(&image, "after", &["/bin/cat", "/data-a"]), "one");
}

#[test]
fn an_image_that_ocifs_cannot_have_is_unpacked_by_containerd() {
    let registry = TestRegistry::start();
    let layers = [base(), layer("a", "one", None), layer("b", "two", Some("a"))];
    let image = pushed(&registry, "app", &layers);
    let host = ContainerHost::new();
    // Without CRI's labels nobody knows of which image a layer is.
    host.ctr_ok(&["images", "pull", "--plain-http", "--snapshotter", "ocifs", &image]);
    assert!(fetched_by_containerd(&registry, &layers) >= 3);
    assert!(host.mounts().is_empty());
    assert_eq!(
        host.run(
            &image,
            "plain",
            &["/bin/sh", "-c", "cat /data-b; ls /data-a || echo gone"]
        ),
        "twogone\n"
    );
    host.remove_images();
    eventually("nothing is left", || {
        names_below(&host.root().join("snapshots")).is_empty()
    });
}

#[test]
fn images_with_layers_in_common_have_each_their_own_tree() {
    let registry = TestRegistry::start();
    let (base, a, b) = (base(), layer("a", "one", None), layer("b", "two", Some("a")));
    let long = pushed(&registry, "long", &[base.clone(), a.clone(), b]);
    let short = pushed(&registry, "short", &[base.clone(), a.clone()]);
    let other = pushed(&registry, "other", &[base, a, layer("c", "three", None)]);
    let host = ContainerHost::new();
    // The layers of the second image are snapshots of the first already, so containerd asks for none of them.
    host.pull(&long);
    host.pull(&short);
    host.pull(&other);
    let names = ["/bin/sh", "-c", "cd /; echo data-*"];
    assert_eq!(host.run(&long, "long", &names), "data-b\n");
    assert_eq!(host.run(&short, "short", &names), "data-a\n");
    assert_eq!(host.run(&other, "other", &names), "data-a data-c\n");
}

#[test]
fn changes_can_be_committed_on_an_image() {
    let registry = TestRegistry::start();
    let image = pushed(
        &registry,
        "app",
        &[base(), layer("a", "one", None), layer("b", "two", None)],
    );
    let host = ContainerHost::new();
    host.pull(&image);
    let snapshots = ["snapshots", "--snapshotter", "ocifs"];
    let snapshots = |arguments: &[&str]| host.ctr_ok(&[&snapshots[..], arguments].concat());
    let top = host.top_snapshot();
    snapshots(&["prepare", "work", &top]);
    let directory = host.path("work");
    std::fs::create_dir(&directory).unwrap();
    let commands = snapshots(&["mounts", &directory, "work"]);
    tool("sh", ["-euc", &commands]);
    std::fs::remove_file(format!("{directory}/data-a")).unwrap();
    std::fs::write(format!("{directory}/data-c"), "three").unwrap();
    tool("umount", [&directory]);
    snapshots(&["commit", "done", "work"]);
    assert!(snapshots(&["usage", "done"]).contains("done"));
    let parent = snapshots(&["info", "done"]);
    assert!(parent.contains("\"Committed\"") && parent.contains(&top), "{parent}");
    snapshots(&["view", "look", "done"]);
    let commands = snapshots(&["mounts", &directory, "look"]);
    tool("sh", ["-euc", &commands]);
    let names = names_below(directory.as_ref());
    assert!(
        std::fs::write(format!("{directory}/new"), "").is_err(),
        "a view can be written to"
    );
    tool("umount", [&directory]);
    let names: Vec<&str> = names
        .iter()
        .map(String::as_str)
        .filter(|name| name.starts_with("data"))
        .collect();
    assert_eq!(names, ["data-b", "data-c"]);
    snapshots(&["label", "done", "a=b", "c=d"]);
    snapshots(&["label", "done", "c="]);
    let labels = snapshots(&["info", "done"]);
    assert!(labels.contains("\"a\": \"b\"") && !labels.contains("\"c\""), "{labels}");
    // A parent cannot be removed before its children.
    let said = host.ctr(&["snapshots", "--snapshotter", "ocifs", "remove", "done"]);
    assert_ne!(said.code, Some(0), "{said:?}");
    snapshots(&["remove", "look"]);
    snapshots(&["remove", "done"]);
}

#[test]
fn an_image_of_128_layers_runs() {
    let registry = TestRegistry::start();
    let mut layers = vec![base()];
    layers.extend((1..128).map(|number| layer(&number.to_string(), "x", None)));
    let image = pushed(&registry, "deep", &layers);
    let host = ContainerHost::new();
    host.pull(&image);
    assert_eq!(fetched_by_containerd(&registry, &layers), 0);
    let said = host.run(&image, "deep", &["/bin/sh", "-c", "cd /; set -- data-*; echo $#"]);
    assert_eq!(said, "127\n");
}

/// What a client does with snapshots, one command of ctr a line; `in NAME` runs a shell command in a mounted snapshot.
const SEQUENCE: &str = "
prepare one
in one mkdir -m 1777 a; echo 1 >a/f; ln -s f a/l; ln a/f a/h; echo 5 >g; mkdir -p b/c; echo 2 >b/c/f; chown 5:6 b; chmod 4755 a/f
commit base one
prepare two base
in two rm -r b; mkdir b; echo 3 >b/new; mv a/h moved; chown 7 a; mknod null c 1 3; echo 4 >>g
commit second two
view seen second
prepare three second
in three rm -r a; rm null; mkdir null
commit third three
prepare four third
in four rmdir null; touch -d @99 moved
";

/// Does [`SEQUENCE`] with a snapshotter. Returns the trees of all snapshots that can be mounted.
fn trees(host: &ContainerHost, snapshotter: &str) -> Vec<String> {
    let snapshots =
        |arguments: &[&str]| host.ctr_ok(&[&["snapshots", "--snapshotter", snapshotter], arguments].concat());
    let directory = host.path("mounted");
    let _ = std::fs::create_dir(&directory);
    let mounted = |name: &str, work: &str| {
        let commands = snapshots(&["mounts", &directory, name]);
        tool("sh", ["-euc", &commands]);
        let said = bounded(Command::new("sh").args(["-euc", work]).current_dir(&directory));
        tool("umount", [&directory]);
        assert_eq!(said.code, Some(0), "{said:?}");
        said.text().to_owned()
    };
    for line in SEQUENCE.lines().filter(|line| !line.is_empty()) {
        match line.strip_prefix("in ").and_then(|rest| rest.split_once(' ')) {
            Some((name, work)) => drop(mounted(name, work)),
            None => drop(snapshots(&line.split(' ').collect::<Vec<_>>())),
        }
    }
    let dump = "find . -printf '%P %y %m %U:%G %n %l\\n' | sort; find . -type f | sort | xargs sha256sum; stat -c %Y moved | grep -x 99 || echo new";
    let trees = ["seen", "four"].map(|name| mounted(name, dump));
    for (name, code) in [
        ("second", false),
        ("seen", true),
        ("four", true),
        ("third", true),
        ("second", true),
        ("base", true),
    ] {
        let said = host.ctr(&["snapshots", "--snapshotter", snapshotter, "remove", name]);
        assert_eq!(said.code == Some(0), code, "{snapshotter} {name}: {said:?}");
    }
    trees.into()
}

#[test]
fn snapshots_without_an_image_are_those_of_containerds_own_snapshotter() {
    let host = ContainerHost::new();
    let ours = trees(&host, "ocifs");
    let native = trees(&host, "native");
    for (ours, native) in ours.iter().zip(&native) {
        // The native snapshotter copies files, so it loses no hard link; an overlay loses one with a change to it.
        let without_links = |tree: &str| -> Vec<String> {
            let lines = tree.lines().map(|line| line.split(' ').collect::<Vec<_>>());
            lines
                .map(|mut words| {
                    if words.len() > 5 {
                        words.remove(4);
                    }
                    words.join(" ")
                })
                .collect()
        };
        assert_eq!(without_links(ours), without_links(native));
    }
}

#[test]
fn the_check_says_what_is_missing() {
    let host = ContainerHost::new();
    let check = |config: &str| {
        host.ocifs.run([
            "snapshotter",
            "check",
            "--address",
            &host.path("snapshotter.sock"),
            "--containerd-config",
            config,
        ])
    };
    let said = check(&host.path("config.toml"));
    assert_eq!(said.code, Some(0), "{said:?}");
    assert!(!said.text().contains("missing"), "{said:?}");
    let text = std::fs::read_to_string(host.path("config.toml")).unwrap();
    let silent = text.replace("disable_snapshot_annotations = false", "");
    std::fs::write(host.path("silent.toml"), silent).unwrap();
    let said = check(&host.path("silent.toml"));
    assert_eq!(said.code, Some(1), "{said:?}");
    assert!(
        said.text().contains("set disable_snapshot_annotations = false"),
        "{said:?}"
    );
}
