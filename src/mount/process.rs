//! Other processes: whether they are alive, why they do not answer, and how to signal only the intended one.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Returns the start time of a live process in clock ticks since boot (proc(5), stat field 22). The start time
/// tells a process from a later one with the same id. Zombies do not count as alive.
pub fn process_start(pid: u32) -> Option<u64> {
    let fields = stat(pid)?;
    if matches!(fields.first().map(String::as_str), Some("Z" | "X")) {
        return None;
    }
    fields.get(19)?.parse().ok()
}

/// Returns the fields of /proc/PID/stat, beginning with the state.
fn stat(pid: u32) -> Option<Vec<String>> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command name is in parentheses and may itself contain parentheses. So the fields are counted from the
    // last parenthesis.
    let fields = stat.rsplit_once(')')?.1.split_whitespace();
    Some(fields.map(str::to_owned).collect())
}

/// Returns the bytes of memory that this process takes (proc(5): VmRSS).
pub(super) fn resident() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let size = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = size.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

/// Returns the name of the program that a process runs.
pub(super) fn name(pid: u32) -> String {
    let name = fs::read(format!("/proc/{pid}/comm")).unwrap_or_default();
    String::from_utf8_lossy(&name).trim_end().escape_debug().to_string()
}

/// Returns why a process cannot run until another process lets it go on. `None` if it can run or does not exist.
pub(super) fn standstill(pid: u32) -> Option<String> {
    match stat(pid)?.first()?.as_str() {
        "T" => Some(format!("it is stopped, `kill -CONT {pid}` lets it go on")),
        "t" => Some("a debugger holds it".to_owned()),
        _ if is_frozen(pid) => Some("its control group is frozen".to_owned()),
        _ => None,
    }
}

/// Whether the freezer of a control group, version 1 or 2, stops a process.
fn is_frozen(pid: u32) -> bool {
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    groups.lines().any(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(group)) = (fields.next(), fields.next()) else {
            return false;
        };
        let (roots, file, frozen) = match controllers {
            // If the system also has groups of version 1, those of version 2 are in a directory of their own.
            "" => (["", "/unified"], "cgroup.events", "frozen 1"),
            _ if controllers.split(',').any(|c| c == "freezer") => (["/freezer", ""], "freezer.state", "FROZEN"),
            _ => return false,
        };
        let states = roots.map(|root| fs::read_to_string(format!("/sys/fs/cgroup{root}{group}/{file}")));
        states
            .iter()
            .flatten()
            .flat_map(|state| state.lines())
            .any(|line| line == frozen)
    })
}

/// One process, held by a descriptor. Its id can be reused for another process, its descriptor cannot.
#[derive(Debug)]
pub(super) struct Process(AsyncFd<OwnedFd>);

impl Process {
    /// Opens the process with this id if it is alive and started at `started`, in clock ticks since boot.
    pub(super) fn open(pid: u32, started: u64) -> io::Result<Option<Self>> {
        let process = Self::any(pid)?;
        // The start time is read after the descriptor was opened, so both belong to the same process.
        Ok(process.filter(|_| process_start(pid) == Some(started)))
    }

    /// Opens the process that has this id at present.
    #[allow(unsafe_code)]
    pub(super) fn any(pid: u32) -> io::Result<Option<Self>> {
        let Some(id) = Pid::from_raw(pid.cast_signed()) else {
            return Ok(None);
        };
        match pidfd_open(id, PidfdFlags::NONBLOCK) {
            // SAFETY: an `OwnedFd` names the same open descriptor as long as it lives.
            Ok(fd) => Ok(Some(Self(unsafe {
                AsyncFd::register_with_interest(fd, Interest::READABLE).map_err(io::Error::from)?
            }))),
            Err(Errno::SRCH) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Sends a signal. Succeeds also if the process has ended.
    pub(super) fn signal(&self, signal: Signal) -> io::Result<()> {
        match pidfd_send_signal(self.0.get_ref(), signal) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until the process ends.
    pub(super) async fn end(&self) -> io::Result<()> {
        self.0.readable().await.map(drop)
    }

    /// Waits until the process ends, for at most `limit`. Returns whether it has ended.
    pub(super) async fn ends_within(&self, limit: Duration) -> io::Result<bool> {
        match tokio::time::timeout(limit, self.end()).await {
            Ok(ended) => ended.map(|()| true),
            Err(_) => Ok(false),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_start_time() {
        let me = std::process::id();
        let started = process_start(me).unwrap();
        assert_eq!(process_start(me), Some(started));
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = child.id();
        child.wait().unwrap();
        assert_ne!(process_start(pid), Some(started));
    }

    #[tokio::test]
    async fn signals_reach_the_process_that_is_meant_and_no_other() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let (pid, started) = (child.id(), process_start(child.id()).unwrap());
        assert!(Process::open(pid, started + 1).unwrap().is_none());
        let process = Process::open(pid, started).unwrap().unwrap();
        process.signal(Signal::STOP).unwrap();
        while standstill(pid).is_none_or(|why| !why.contains("stopped")) {
            tokio::task::yield_now().await;
        }
        assert!(!process.ends_within(Duration::from_millis(1)).await.unwrap());
        process.signal(Signal::KILL).unwrap();
        process.end().await.unwrap();
        assert!(process.ends_within(Duration::ZERO).await.unwrap());
        assert!(Process::open(pid, started).unwrap().is_none(), "a zombie");
        child.wait().unwrap();
        process.signal(Signal::KILL).unwrap();
    }
}
