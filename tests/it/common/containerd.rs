//! A real containerd with `ocifs snapshotter` as its proxy plugin. Dropping it ends both and removes what they have left.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::ocifs::{Ocifs, Running, Said, bounded, eventually, program, tool};

/// The namespace that CRI pulls images into.
const NAMESPACE: &str = "k8s.io";

/// A host that runs containers.
pub struct ContainerHost {
    pub ocifs: Ocifs,
    /// A tmpfs: an overlay's changes cannot be on another overlay, which the directory for temporary files may be.
    scratch: PathBuf,
    snapshotter: Option<Running>,
    containerd: Option<Running>,
}

impl ContainerHost {
    pub fn new() -> Self {
        let ocifs = Ocifs::with(&["--log-format", "json"]);
        let scratch = ocifs.home().join("s");
        std::fs::create_dir(&scratch).unwrap();
        tool("mount", ["-t", "tmpfs", "tmpfs", scratch.to_str().unwrap()]);
        let mut host = Self {
            ocifs,
            scratch,
            snapshotter: None,
            containerd: None,
        };
        host.start_snapshotter();
        host.start_containerd();
        host
    }

    pub fn path(&self, name: &str) -> String {
        self.scratch.join(name).to_str().unwrap().to_owned()
    }

    /// The directory of the snapshots.
    pub fn root(&self) -> PathBuf {
        self.scratch.join("snapshots")
    }

    pub fn start_snapshotter(&mut self) {
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.path("snapshotter.log"))
            .unwrap();
        let child = self
            .ocifs
            .command([
                "snapshotter",
                "--idle",
                "1s",
                "--address",
                &self.path("snapshotter.sock"),
            ])
            .args(["--root", self.root().to_str().unwrap()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.snapshotter = Some(Running(child));
        eventually("the snapshotter listens", || {
            std::os::unix::net::UnixStream::connect(self.path("snapshotter.sock")).is_ok()
        });
        if self.containerd.is_some() {
            // After a failed attempt, containerd waits a little before it connects again.
            let list = ["snapshots", "--snapshotter", "ocifs", "list"];
            eventually("containerd reaches the snapshotter", || self.ctr(&list).code == Some(0));
        }
    }

    /// Kills the snapshotter, as SIGKILL does.
    pub fn kill_snapshotter(&mut self) {
        drop(self.snapshotter.take());
    }

    pub fn snapshotter_pid(&self) -> u32 {
        self.snapshotter.as_ref().unwrap().0.id()
    }

    pub fn start_containerd(&mut self) {
        let config = format!(
            r#"
version = 2
root = "{root}"
state = "{state}"
disabled_plugins = ["io.containerd.internal.v1.opt"]
[grpc]
address = "{socket}"
[ttrpc]
address = "{socket}.ttrpc"
[proxy_plugins.ocifs]
type = "snapshot"
address = "{snapshotter}"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "none"
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "ocifs"
disable_snapshot_annotations = false
"#,
            root = self.path("root"),
            state = self.path("state"),
            socket = self.path("containerd.sock"),
            snapshotter = self.path("snapshotter.sock"),
        );
        std::fs::write(self.path("config.toml"), config).unwrap();
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.path("containerd.log"))
            .unwrap();
        let child = Command::new("containerd")
            .args(["--config", &self.path("config.toml"), "--log-level", "debug"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap_or_else(|e| panic!("these tests need containerd (containerd): {e}"));
        self.containerd = Some(Running(child));
        eventually("containerd answers", || self.ctr(&["version"]).code == Some(0));
    }

    /// Kills containerd, as SIGKILL does.
    pub fn kill_containerd(&mut self) {
        drop(self.containerd.take());
    }

    pub fn ctr(&self, arguments: &[&str]) -> Said {
        let socket = self.path("containerd.sock");
        bounded(
            Command::new("ctr")
                .args(["--address", &socket, "--namespace", NAMESPACE])
                .args(arguments),
        )
    }

    /// Runs a command of ctr that must succeed. Returns what it prints.
    pub fn ctr_ok(&self, arguments: &[&str]) -> String {
        let said = self.ctr(arguments);
        assert_eq!(said.code, Some(0), "{said:?}\n{}", self.logs());
        said.text().to_owned()
    }

    pub fn logs(&self) -> String {
        let read = |name: &str| std::fs::read_to_string(self.path(name)).unwrap_or_default();
        format!(
            "snapshotter:\n{}\ncontainerd:\n{}",
            read("snapshotter.log"),
            read("containerd.log")
        )
    }

    /// Pulls an image as a kubelet does.
    pub fn pull(&self, image: &str) {
        // PullImageRequest { image: ImageSpec { image } }
        let text = [&[0x0a, u8::try_from(image.len()).unwrap()], image.as_bytes()].concat();
        let message = [&[0x0a, u8::try_from(text.len()).unwrap()], text.as_slice()].concat();
        let framed = [&[0, 0, 0, 0, u8::try_from(message.len()).unwrap()], message.as_slice()].concat();
        let body = self.path("pull");
        std::fs::write(&body, framed).unwrap();
        let socket = self.path("containerd.sock");
        let said = bounded(Command::new("curl").args([
            "--silent",
            "--show-error",
            "--http2-prior-knowledge",
            "--unix-socket",
            &socket,
            "--header",
            "content-type: application/grpc",
            "--header",
            "te: trailers",
            "--data-binary",
            &format!("@{body}"),
            "--output",
            "/dev/null",
            "--dump-header",
            "-",
            "http://localhost/runtime.v1.ImageService/PullImage",
        ]));
        let trailers = said.text().to_ascii_lowercase();
        assert!(trailers.contains("grpc-status: 0"), "{said:?}\n{}", self.logs());
    }

    /// Runs a program in a container of an image and waits for it. Returns what it prints.
    pub fn run(&self, image: &str, name: &str, command: &[&str]) -> String {
        self.ctr_ok(
            &[
                &["run", "--rm", "--snapshotter", "ocifs", "--net-host", image, name],
                command,
            ]
            .concat(),
        )
    }

    /// Starts a container that goes on in the background.
    pub fn start(&self, image: &str, name: &str, command: &[&str]) {
        self.ctr_ok(
            &[
                &["run", "--detach", "--snapshotter", "ocifs", "--net-host", image, name],
                command,
            ]
            .concat(),
        );
    }

    /// Runs a program in a running container. Returns what it prints.
    ///
    /// On a busy machine, ctr loses the output of short programs now and then, whatever the snapshotter. So a shell says when
    /// the program has ended, and what does not say so is run again.
    pub fn exec(&self, name: &str, command: &[&str]) -> String {
        const END: &str = "\nthe program has ended";
        let script = format!("\"$@\" && echo '{END}'");
        let mut output = None;
        eventually("the output of a program in a container", || {
            let id = format!("exec-{}", fastrand::u32(..));
            let exec = ["tasks", "exec", "--exec-id", &id, name, "/bin/sh", "-c", &script, "sh"];
            let said = self.ctr_ok(&[&exec, command].concat());
            output = said.trim_end().strip_suffix(END).map(str::to_owned);
            output.is_some()
        });
        output.expect("it has come")
    }

    /// Kills a container and removes it.
    pub fn remove(&self, name: &str) {
        self.ctr(&["tasks", "kill", "--signal", "SIGKILL", name]);
        eventually("the container has ended", || {
            let said = self.ctr(&["tasks", "delete", name]);
            said.code == Some(0) || said.stderr.contains("not found")
        });
        self.ctr_ok(&["containers", "delete", name]);
    }

    /// Removes all images, and what only they use. CRI gives each image further names.
    pub fn remove_images(&self) {
        let listed = self.ctr_ok(&["images", "list", "--quiet"]);
        let names: Vec<&str> = listed.lines().collect();
        self.ctr_ok(&[&["images", "remove", "--sync"], names.as_slice()].concat());
    }

    /// Returns the mounts of this host's images, as `ocifs list` shows them.
    pub fn mounts(&self) -> Vec<serde_json::Value> {
        let said = bounded(program(self.ocifs.home()).args(["list", "--json"])).json();
        let own = |mount: &serde_json::Value| {
            mount["mountpoint"]
                .as_str()
                .unwrap_or_default()
                .starts_with(&self.path(""))
        };
        said.as_array()
            .unwrap()
            .iter()
            .filter(|mount| own(mount))
            .cloned()
            .collect()
    }

    /// Returns the name of the only snapshot that is no other's parent.
    pub fn top_snapshot(&self) -> String {
        let listed = self.ctr_ok(&["snapshots", "--snapshotter", "ocifs", "list"]);
        let mut top = self.snapshots();
        top.retain(|name| listed.matches(name.as_str()).count() == 1);
        assert_eq!(top.len(), 1, "{listed}");
        top.remove(0)
    }

    /// Returns the names of the snapshots, as containerd lists them.
    pub fn snapshots(&self) -> Vec<String> {
        let listed = self.ctr_ok(&["snapshots", "--snapshotter", "ocifs", "list"]);
        let names = listed.lines().skip(1).filter_map(|line| line.split_whitespace().next());
        names.map(str::to_owned).collect()
    }
}

impl Drop for ContainerHost {
    fn drop(&mut self) {
        if self.containerd.is_some() {
            let socket = self.path("containerd.sock");
            let ctr = |arguments: &[&str]| {
                let mut command = Command::new("ctr");
                command
                    .args(["--address", &socket, "--namespace", NAMESPACE])
                    .args(arguments);
                command.stdin(Stdio::null()).output()
            };
            if let Ok(listed) = ctr(&["tasks", "list", "--quiet"]) {
                for name in String::from_utf8_lossy(&listed.stdout).lines() {
                    let _ = ctr(&["tasks", "kill", "--signal", "SIGKILL", name]);
                    let _ = ctr(&["tasks", "delete", "--force", name]);
                }
            }
        }
        self.kill_containerd();
        self.kill_snapshotter();
        for mount in self.mounts() {
            let path = mount["mountpoint"].as_str().unwrap().to_owned();
            let _ = program(self.ocifs.home()).args(["umount", "--lazy", &path]).output();
        }
        let below = format!("{}/", self.scratch.display());
        let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let points = table.lines().filter_map(|line| line.split(' ').nth(4));
        let mut points: Vec<&str> = points.filter(|point| point.starts_with(&below)).collect();
        points.sort_unstable();
        for point in points.into_iter().rev().chain(self.scratch.to_str()) {
            let _ = Command::new("umount").args(["--lazy", point]).output();
        }
    }
}

/// Returns whether a path exists in a directory tree, as a person would say it: relative names, sorted.
pub fn names_below(path: &Path) -> Vec<String> {
    let listed = tool("find", [path.to_str().unwrap(), "-mindepth", "1", "-printf", "%P\\n"]);
    let mut names: Vec<String> = String::from_utf8(listed).unwrap().lines().map(str::to_owned).collect();
    names.sort();
    names
}
