//! Processes that read a file in one of several ways and report how long that took.
#![allow(dead_code)]

use std::io::Read as _;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use super::ocifs::wait;

/// The script reports when it begins. So the measured time is that of the access, without the start of the
/// interpreter.
const SCRIPT: &str = r#"
import mmap, os, signal, sys, time
how, path = sys.argv[1], sys.argv[2]
if how == "handler":
    signal.signal(signal.SIGINT, signal.default_int_handler)
elif how == "alarm":
    def late(*_): raise InterruptedError("alarm")
    signal.signal(signal.SIGALRM, late)
    signal.alarm(1)
else:
    for s in (signal.SIGINT, signal.SIGTERM): signal.signal(s, signal.SIG_DFL)
f = os.open(path, os.O_RDONLY)
print(time.time(), flush=True)
if how == "random": os.posix_fadvise(f, 0, 0, os.POSIX_FADV_RANDOM)
if how == "mmap": mmap.mmap(f, 0, prot=mmap.PROT_READ)[100000]
elif how == "sendfile": os.sendfile(os.open("/dev/null", os.O_WRONLY), f, 0, 1 << 20)
elif how == "splice":
    r, w = os.pipe()
    os.splice(f, w, 65536)
elif how == "exec": os.execv(path, [path])
elif how == "direct":
    f = os.open(path, os.O_RDONLY | os.O_DIRECT)
    os.preadv(f, [mmap.mmap(-1, 1 << 16)], 0)
elif how == "whole": open(path, "rb").read()
else: os.pread(f, 100, 70000)
print("read", flush=True)
"#;

/// Names of all ways to read.
pub const WAYS: [&str; 8] = [
    "pread", "random", "mmap", "sendfile", "splice", "exec", "direct", "whole",
];

/// A process that reads.
pub struct Reader {
    pub child: Child,
    how: &'static str,
}

/// Result of a reader.
#[derive(Debug)]
pub struct Ended {
    /// Duration of the access; none if it never began.
    pub took: Option<Duration>,
    /// Whether the reader got the bytes.
    pub read: bool,
    pub status: ExitStatus,
}

impl Reader {
    pub fn start(how: &'static str, path: &Path) -> Self {
        Self::start_by(Command::new("python3"), how, path)
    }

    /// Starts a reader through a command that runs its arguments, such as `unshare`.
    pub fn start_by(mut command: Command, how: &'static str, path: &Path) -> Self {
        let child = command
            .args(["-c", SCRIPT, how])
            .arg(path)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self { child, how }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn end(mut self) -> Ended {
        let status = wait(&mut self.child, self.how);
        let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs_f64();
        let mut said = String::new();
        self.child.stdout.take().unwrap().read_to_string(&mut said).unwrap();
        let begun = said.lines().next().and_then(|line| line.parse::<f64>().ok());
        Ended {
            took: begun.map(|begun| Duration::from_secs_f64((now - begun).max(0.0))),
            read: said.lines().any(|line| line == "read"),
            status,
        }
    }
}
