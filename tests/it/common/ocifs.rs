//! Runs the real program with a store of its own, and makes real mounts. Needs root and /dev/fuse.
#![allow(dead_code)]

use std::ffi::{OsStr, OsString};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

/// Time within which an awaited event must happen, also on a busy machine. A larger value makes failing tests slower;
/// a smaller one makes tests fail on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Polls until `done` returns true. Panics after [`PATIENCE`].
pub fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    poll(|| if done() { Ok(()) } else { Err(what) });
}

/// Polls until `attempt` is `Ok`, at most for [`PATIENCE`]. Panics with the last error.
fn poll<E: std::fmt::Display>(mut attempt: impl FnMut() -> Result<(), E>) {
    let deadline = Instant::now() + PATIENCE;
    while let Err(error) = attempt() {
        assert!(Instant::now() < deadline, "never happened: {error}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Exit status and output of a command.
#[derive(Debug)]
pub struct Said {
    pub code: Option<i32>,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

impl Said {
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.stdout).unwrap()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.stdout).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }
}

impl From<Output> for Said {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: output.stdout,
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// Runs a command that must end within [`PATIENCE`].
pub fn bounded(command: &mut Command) -> Said {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let mut stdout = child.stdout.take().unwrap();
    let mut stderr = child.stderr.take().unwrap();
    let reading = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        stdout.read_to_end(&mut bytes).unwrap();
        bytes
    });
    let complaining = std::thread::spawn(move || {
        let mut text = Vec::new();
        stderr.read_to_end(&mut text).unwrap();
        String::from_utf8_lossy(&text).into_owned()
    });
    let status = wait(&mut child, &format!("{command:?}"));
    Said {
        code: status.code(),
        stdout: reading.join().unwrap(),
        stderr: complaining.join().unwrap(),
    }
}

/// Waits for a child that must end within [`PATIENCE`].
pub fn wait(child: &mut Child, what: &str) -> std::process::ExitStatus {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("does not end: {what}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Repeats an unmount while the mount namespace of another test has a copy of the mount, which it has for a moment.
pub fn until_not_copied(mut unmount: impl FnMut() -> Said) -> Said {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let said = unmount();
        let told = [said.text(), &said.stderr].concat();
        if !told.contains("another mount namespace has it") {
            return said;
        }
        assert!(Instant::now() < deadline, "{said:?}");
    }
}

/// Unmounts like umount(8). Tries again while the mount is in use: children that other tests start have all open files of this
/// process until they run their program.
pub fn unmount(path: impl AsRef<Path>) {
    poll(|| {
        let said = bounded(Command::new("umount").arg(path.as_ref()));
        match said.code {
            Some(0) => Ok(()),
            _ if said.stderr.contains("busy") => Err(said.stderr),
            _ => panic!("{said:?}"),
        }
    });
}

/// A process that goes on until it is dropped, which kills it.
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// Runs a program that must succeed. Returns its standard output.
pub fn tool<S: AsRef<OsStr>>(program: &str, arguments: impl IntoIterator<Item = S>) -> Vec<u8> {
    let said = bounded(Command::new(program).args(arguments));
    assert_eq!(said.code, Some(0), "{program}: {said:?}");
    said.stdout
}

pub fn send(pid: u32, signal: Signal) {
    kill(Pid::from_raw(pid.cast_signed()), signal).unwrap();
}

/// Returns whether a process exists and is not a zombie.
pub fn alive(pid: u32) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else {
        return false;
    };
    stat.rsplit_once(") ")
        .is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

/// Returns the type of the file system that is mounted at exactly `path`, as this thread sees it.
pub fn mounted_type(path: &Path) -> Option<String> {
    let table = std::fs::read("/proc/thread-self/mountinfo").unwrap();
    let table = String::from_utf8_lossy(&table);
    let line = table.lines().rfind(|line| line.split(' ').nth(4) == path.to_str())?;
    line.split_once(" - ")?.1.split(' ').next().map(str::to_owned)
}

/// Returns the program without any settings of this machine and its user: an empty configuration file and no
/// environment.
pub fn program(home: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ocifs"));
    isolate(&mut command, home);
    // A test's `--config` argument overrides the variable.
    command.env("OCIFS_CONFIG", "/dev/null");
    command
}

/// Removes all environment variables but the search path. Makes `home` the only place for credential files, except
/// for /run/containers, which no variable moves.
pub fn isolate(command: &mut Command, home: &Path) {
    command.env_clear().env("HOME", home);
    if let Some(path) = std::env::var_os("PATH") {
        command.env("PATH", path);
    }
}

/// The program with a private store.
pub struct Ocifs {
    directory: TempDir,
    store: PathBuf,
    options: Vec<String>,
    environment: Vec<(String, OsString)>,
}

impl Ocifs {
    pub fn new() -> Self {
        assert!(nix::unistd::geteuid().is_root(), "tests that mount need root");
        assert!(
            Path::new("/dev/fuse").exists(),
            "tests that mount need /dev/fuse (load the fuse module)"
        );
        let directory = tempfile::tempdir().unwrap();
        Self {
            store: directory.path().join("store"),
            directory,
            options: Vec::new(),
            environment: Vec::new(),
        }
    }

    pub fn with(options: &[&str]) -> Self {
        Self::new().options(options)
    }

    /// Adds options to all commands.
    pub fn options(mut self, options: &[&str]) -> Self {
        self.options.extend(options.iter().map(|&o| o.to_owned()));
        self
    }

    /// Creates an instance with its store at this path.
    pub fn at(store: &Path) -> Self {
        Self {
            store: store.to_owned(),
            ..Self::new()
        }
    }

    /// Adds a variable to the environment of all commands.
    pub fn env(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.environment.push((name.to_owned(), value.into()));
        self
    }

    pub fn store(&self) -> &Path {
        &self.store
    }

    /// Returns the home directory of the commands. It has no logins.
    pub fn home(&self) -> &Path {
        self.directory.path()
    }

    pub fn command<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Command {
        let mut command = program(self.home());
        command
            .arg("--store")
            .arg(self.store())
            .args(&self.options)
            .args(arguments)
            .envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Returns a command that SIGINT ends as at a terminal. A shell that starts the tests in the background makes
    /// them ignore SIGINT, and their children would inherit that.
    pub fn interruptible<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Command {
        let direct = self.command(arguments);
        let mut command = Command::new("env");
        isolate(&mut command, self.home());
        command
            .arg("--default-signal=INT")
            .arg(direct.get_program())
            .args(direct.get_args());
        for (name, value) in direct.get_envs() {
            command.env(name, value.expect("no variable is taken away one by one"));
        }
        command
    }

    pub fn run<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Said {
        bounded(&mut self.command(arguments))
    }

    /// Runs a command that must succeed.
    pub fn ok<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Said {
        let said = self.run(arguments);
        assert_eq!(said.code, Some(0), "{said:?}");
        said
    }

    /// Runs a command that must fail with exit status 1 and one line on standard error. Returns that line.
    pub fn fails<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> String {
        let said = self.run(arguments);
        assert_eq!(said.code, Some(1), "{said:?}");
        assert!(said.stdout.is_empty(), "{said:?}");
        let lines: Vec<&str> = said.stderr.lines().collect();
        assert_eq!(lines.len(), 1, "{said:?}");
        let line = lines[0].strip_prefix("ocifs: ").unwrap_or_else(|| panic!("{said:?}"));
        line.to_owned()
    }

    /// Creates an instance with a new store that has the index and the tree of an image, and none of its data.
    pub fn knowing(image: &str) -> Self {
        Self::new().learns(image)
    }

    /// Adds the index and the tree of an image to this store, as [`Ocifs::knowing`] does, and drops all cached data.
    pub fn learns(self, image: &str) -> Self {
        drop(self.mount_with(image, &["--wait", "ready", "--prefetch", "none"]));
        self.ok(["cache", "drop"]);
        self
    }

    /// Mounts an image on a new directory and waits for the tree.
    pub fn mount(&self, image: &str) -> Mounted {
        self.mount_with(image, &["--wait", "ready"])
    }

    pub fn mount_with(&self, image: &str, options: &[&str]) -> Mounted {
        let directory = mountpoint();
        let mut arguments = vec!["mount", "--json"];
        arguments.extend_from_slice(options);
        arguments.push(image);
        arguments.push(directory.path().to_str().unwrap());
        let said = self.ok(&arguments).json();
        let pid = said["pid"].as_u64().unwrap() as u32;
        Mounted {
            directory,
            home: self.home().to_owned(),
            pid,
        }
    }

    /// Mounts an image; the mount must fail and leave nothing. Returns the error.
    pub fn mount_fails(&self, image: &str, options: &[&str]) -> String {
        let directory = mountpoint();
        let path = directory.path().to_str().unwrap();
        let mut arguments = vec!["mount"];
        if !options.contains(&"--wait") {
            arguments.extend_from_slice(&["--wait", "ready"]);
        }
        arguments.extend_from_slice(options);
        arguments.extend_from_slice(&[image, path]);
        let error = self.fails(&arguments);
        assert_eq!(mounted_type(directory.path()), None, "{error}");
        assert!(!registration(directory.path()).exists(), "{error}");
        error
    }
}

/// Creates an empty directory to mount on. Its path has no symbolic links.
pub fn mountpoint() -> TempDir {
    let base = std::env::temp_dir().canonicalize().unwrap();
    tempfile::Builder::new().prefix("ocifs-mnt-").tempdir_in(base).unwrap()
}

/// Returns the directory of the registration of a mount point.
pub fn registration(mountpoint: &Path) -> PathBuf {
    let hash = blake3::hash(mountpoint.as_os_str().as_encoded_bytes()).to_hex();
    Path::new("/run/ocifs").join(&hash[..16])
}

/// A mount. Dropping it takes the mount down.
pub struct Mounted {
    directory: TempDir,
    home: PathBuf,
    pub pid: u32,
}

impl Mounted {
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path().join(name)
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.join(name)).unwrap_or_else(|e| panic!("{name}: {e}; log: {}", self.log()))
    }

    /// Makes the kernel drop a file's pages, so that the next read reaches the process.
    pub fn forget(&self, name: &str) {
        let file = std::fs::File::open(self.join(name)).unwrap();
        let advice = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED;
        nix::fcntl::posix_fadvise(&file, 0, 0, advice).unwrap();
    }

    /// Reads a file, which must fail. Returns the errno.
    pub fn read_error(&self, name: &str) -> i32 {
        match std::fs::read(self.join(name)) {
            Ok(bytes) => panic!("{name}: {} bytes instead of an error", bytes.len()),
            Err(error) => error.raw_os_error().unwrap(),
        }
    }

    pub fn status(&self) -> Value {
        let said = bounded(program(&self.home).args(["status", "--json"]).arg(self.path()));
        let status = said.json();
        let works = !["dead", "unresponsive", "detached"].contains(&status["state"].as_str().unwrap());
        assert_eq!(said.code, Some(i32::from(!works)), "{said:?}");
        status
    }

    /// Waits until the mount is in this state, at most for [`PATIENCE`].
    pub fn reaches(&self, state: &str) {
        poll(|| {
            let status = self.status();
            match status["state"] == state {
                true => Ok(()),
                false => Err(format!("{state}: {status}")),
            }
        });
    }

    pub fn umount(&self, options: &[&str]) -> Said {
        bounded(program(&self.home).arg("umount").args(options).arg(self.path()))
    }

    /// Returns the directory of the registration.
    pub fn registration(&self) -> PathBuf {
        registration(self.path())
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.registration().join("log")).unwrap_or_default()
    }

    /// Waits until nothing of the mount is left: no mount, no process, no registration.
    pub fn assert_gone(&self) {
        eventually("the mount is gone", || mounted_type(self.path()).is_none());
        eventually("the process ends", || !alive(self.pid));
        let own = format!("\"pid\": {},", self.pid);
        let record = std::fs::read_to_string(self.registration().join("mount.json")).unwrap_or_default();
        assert!(!record.contains(&own), "the registration stays");
        let mut aside = self.registration().into_os_string();
        aside.push(format!("-{}", self.pid));
        assert!(!Path::new(&aside).exists(), "the registration stays");
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if mounted_type(self.path()).is_some() || self.registration().exists() {
            let said = self.umount(&["--lazy"]);
            if !std::thread::panicking() && said.code != Some(0) {
                // The mount may have ended by itself during the request.
                let ended = || mounted_type(self.path()).is_none() && !self.registration().exists();
                eventually(&format!("it is gone: {said:?}"), ended);
            }
        }
        let deadline = Instant::now() + PATIENCE;
        while alive(self.pid) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        if alive(self.pid) {
            send(self.pid, Signal::SIGKILL);
            assert!(std::thread::panicking(), "the process behind a mount does not end");
        }
    }
}

/// A tmpfs of a given size. Dropping it unmounts it.
pub struct Tmpfs(TempDir);

impl Tmpfs {
    pub fn new(size: &str) -> Self {
        let directory = mountpoint();
        let options = format!("size={size}");
        tool(
            "mount",
            [
                "-t",
                "tmpfs",
                "-o",
                &options,
                "tmpfs",
                directory.path().to_str().unwrap(),
            ],
        );
        Self(directory)
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    pub fn resize(&self, size: &str) {
        let options = format!("remount,size={size}");
        tool("mount", ["-o", &options, self.0.path().to_str().unwrap()]);
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        bounded(Command::new("umount").arg("--lazy").arg(self.0.path()));
    }
}
