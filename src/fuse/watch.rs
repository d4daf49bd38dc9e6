//! Ends the wait of a reader that got a signal.
//!
//! The kernel sends a FUSE server INTERRUPT when the process behind a request has a signal. fuser 0.18 itself answers
//! INTERRUPT with "not implemented" and has no hook. After that answer the kernel sends no further INTERRUPT. The
//! process then waits for its request in a state in which no signal ends the wait.
//!
//! So this module looks in /proc (proc_pid_status(5)), every tenth of a second, at the thread behind each request
//! that waits. The module answers the request with EINTR in these cases:
//!
//! - The thread is being killed. On any fatal signal the kernel makes SIGKILL pending for all threads of the process.
//! - A signal is pending that will end the process as soon as the request lets it.
//! - The thread waits in a system call, and has a pending *stop signal* that it handles: a signal that people send to
//!   stop a program.
//! - The thread has waited in a page fault for two seconds with a pending stop signal that it handles. EINTR in a
//!   page fault makes the process die of SIGBUS, so the fault first continues for that time. If the bytes come
//!   meanwhile, the program can handle the signal.
//! - The thread is gone.
//!
//! Signals that only stop a process do not end a request. Neither do signals that programs use for themselves (timers
//! of profilers, children, windows).
//!
//! A request carries the thread's number in the PID namespace of the mount. A thread outside that namespace has no
//! number, so its requests are not watched. Readahead is answered like any other read: if another reader waits for
//! the same page, the kernel asks again.
//!
//! One task watches all requests that wait. The task sleeps while no request waits, and looks at a bounded number of
//! threads at a time.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use nix::libc;
use tokio::sync::{Notify, oneshot};

/// How often the task looks at threads, and how long a request waits before the task looks at its thread. A smaller
/// value costs more processor time; a larger one delays the end of a process that was killed.
const LOOK: Duration = Duration::from_millis(100);
/// How long a page fault goes on after a signal that the program handles.
const FAULT: Duration = Duration::from_secs(2);
/// Number of threads that the task looks at in one go. The others follow in the next go.
const MOST: usize = 256;

/// Signals that do not end a process without a handler: they do nothing, or only stop or continue the process.
const HARMLESS: u64 = bit(libc::SIGCHLD)
    | bit(libc::SIGCONT)
    | bit(libc::SIGURG)
    | bit(libc::SIGWINCH)
    | bit(libc::SIGSTOP)
    | bit(libc::SIGTSTP)
    | bit(libc::SIGTTIN)
    | bit(libc::SIGTTOU);
/// Signals that people send to stop what a program is doing.
const STOPPING: u64 =
    bit(libc::SIGINT) | bit(libc::SIGTERM) | bit(libc::SIGHUP) | bit(libc::SIGQUIT) | bit(libc::SIGALRM);

const fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

/// The requests that wait.
#[derive(Debug, Default)]
pub(super) struct Watch {
    state: Mutex<WatchState>,
    came: Notify,
}

#[derive(Debug, Default)]
struct WatchState {
    next: u64,
    waiting: HashMap<u64, WaitingThread>,
}

#[derive(Debug)]
struct WaitingThread {
    thread: u32,
    since: Instant,
    /// When the task first saw a pending signal that the thread handles.
    signalled: Option<Instant>,
    /// Whether only the end of the thread ends the request.
    until_end: bool,
    interrupt: oneshot::Sender<()>,
}

/// A request that is watched until this guard is dropped.
#[derive(Debug)]
pub(super) struct Watched {
    watch: Arc<Watch>,
    id: u64,
    interrupted: oneshot::Receiver<()>,
}

impl Watched {
    /// Waits until a signal should end the request. Waits for ever if no signal comes.
    pub(super) async fn interrupted(&mut self) {
        if (&mut self.interrupted).await.is_err() {
            // The watching task has ended.
            std::future::pending::<()>().await;
        }
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.watch.state().waiting.remove(&self.id);
    }
}

impl Watch {
    fn state(&self) -> MutexGuard<'_, WatchState> {
        self.state.lock().expect("no panic while locked")
    }

    /// Watches the thread behind a request that waits. With thread number 0, no thread is watched.
    pub(super) fn add(self: &Arc<Self>, thread: u32) -> Watched {
        self.watch(thread, false)
    }

    /// Watches like [`Watch::add`], but signals that the thread handles do not end the request. For a request of another
    /// file system, which would make an I/O error of the interruption.
    pub(super) fn add_until_end(self: &Arc<Self>, thread: u32) -> Watched {
        self.watch(thread, true)
    }

    fn watch(self: &Arc<Self>, thread: u32, until_end: bool) -> Watched {
        let (interrupt, interrupted) = oneshot::channel();
        let mut state = self.state();
        let id = state.next;
        state.next += 1;
        let waiting = WaitingThread {
            thread,
            since: Instant::now(),
            signalled: None,
            until_end,
            interrupt,
        };
        if thread != 0 {
            state.waiting.insert(id, waiting);
        }
        drop(state);
        self.came.notify_one();
        Watched {
            watch: self.clone(),
            id,
            interrupted,
        }
    }

    /// Watches all requests that wait, for ever. Returns at once if /proc belongs to another PID namespace.
    pub(super) async fn run(self: Arc<Self>) {
        let me = std::fs::read_link("/proc/self").ok();
        if me.is_none_or(|me| me.as_os_str() != std::process::id().to_string().as_str()) {
            tracing::warn!("/proc is not that of this process, readers cannot be interrupted by signals");
            return;
        }
        let mut after = 0;
        loop {
            if self.state().waiting.is_empty() {
                self.came.notified().await;
            }
            tokio::time::sleep(LOOK).await;
            let due = self.due(&mut after);
            if due.is_empty() {
                continue;
            }
            let looking = tokio::task::spawn_blocking(move || {
                let look = |thread: u32| (thread, Thread::look(thread));
                due.into_iter().map(look).collect::<Vec<_>>()
            });
            // The runtime is shutting down.
            let Ok(seen) = looking.await else { return };
            self.tell(&seen.into_iter().collect());
        }
    }

    /// The threads to look at in this go, at most [`MOST`]: those behind requests that have waited for [`LOOK`].
    fn due(&self, after: &mut u32) -> Vec<u32> {
        let now = Instant::now();
        let state = self.state();
        let due = state.waiting.values().filter(|w| now.duration_since(w.since) >= LOOK);
        let mut due: Vec<u32> = due.map(|w| w.thread).collect();
        due.sort_unstable();
        due.dedup();
        let start = due.partition_point(|&thread| thread <= *after);
        due.rotate_left(start);
        due.truncate(MOST);
        *after = due.last().copied().unwrap_or(0);
        due
    }

    /// Ends the requests whose threads have a signal that should end them.
    fn tell(&self, seen: &BTreeMap<u32, Thread>) {
        let now = Instant::now();
        let mut state = self.state();
        let mut interrupted = Vec::new();
        for (id, waiting) in &mut state.waiting {
            let end = match seen.get(&waiting.thread) {
                // The task did not look at this thread in this go.
                None => false,
                Some(Thread::Waits) => {
                    waiting.signalled = None;
                    false
                }
                Some(Thread::Ends) => true,
                Some(Thread::Handles { .. }) if waiting.until_end => false,
                Some(Thread::Handles { in_call: true }) => true,
                Some(Thread::Handles { in_call: false }) => {
                    let since = *waiting.signalled.get_or_insert(now);
                    now.duration_since(since) >= FAULT
                }
            };
            if end {
                interrupted.push(*id);
            }
        }
        for id in interrupted {
            if let Some(waiting) = state.waiting.remove(&id) {
                // The request may just have been answered.
                let _ = waiting.interrupt.send(());
            }
        }
    }
}

/// What /proc says about a thread that waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Thread {
    /// No signal should end its request.
    Waits,
    /// The thread is gone, or will end as soon as the request lets it.
    Ends,
    /// A signal is pending that the thread handles.
    Handles {
        /// Whether the thread waits in a system call, as opposed to a page fault.
        in_call: bool,
    },
}

impl Thread {
    fn look(thread: u32) -> Self {
        match std::fs::read_to_string(format!("/proc/{thread}/status")) {
            Ok(status) => match Self::from_status(&status) {
                Self::Handles { .. } => Self::Handles {
                    in_call: is_in_call(thread),
                },
                other => other,
            },
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Self::Ends,
            // ESRCH: the thread ended while the file was being read.
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Self::Ends,
            Err(error) => {
                tracing::debug!(thread, %error, "cannot look at a reader");
                Self::Waits
            }
        }
    }

    fn from_status(status: &str) -> Self {
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|value| value.strip_prefix(':')).map(str::trim)
        };
        let mask = |name| u64::from_str_radix(field(name).unwrap_or_default(), 16).unwrap_or(0);
        if field("State").is_some_and(|state| state.starts_with(['Z', 'X'])) {
            return Self::Ends;
        }
        let pending = mask("SigPnd") | mask("ShdPnd");
        if pending & bit(libc::SIGKILL) != 0 {
            return Self::Ends;
        }
        let due = pending & !mask("SigBlk") & !mask("SigIgn");
        let handled = mask("SigCgt");
        if due & !handled & !HARMLESS != 0 {
            return Self::Ends;
        }
        match due & handled & STOPPING {
            0 => Self::Waits,
            _ => Self::Handles { in_call: false },
        }
    }
}

/// Whether a thread waits in a system call (proc_pid_syscall(5)). If the file cannot be read, the thread counts as
/// waiting in a page fault.
fn is_in_call(thread: u32) -> bool {
    let call = std::fs::read_to_string(format!("/proc/{thread}/syscall"));
    call.is_ok_and(|call| call.starts_with(|c: char| c.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(state: char, pending: &[i32], blocked: &[i32], ignored: &[i32], handled: &[i32]) -> Thread {
        let mask = |signals: &[i32]| signals.iter().fold(0, |mask, &s| mask | bit(s));
        Thread::from_status(&format!(
            "Name:\tcat\nState:\t{state} (x)\nPid:\t7\nSigPnd:\t{:016x}\nShdPnd:\t{:016x}\nSigBlk:\t{:016x}\nSigIgn:\t{:016x}\nSigCgt:\t{:016x}\n",
            mask(&pending[..pending.len() / 2]),
            mask(&pending[pending.len() / 2..]),
            mask(blocked),
            mask(ignored),
            mask(handled)
        ))
    }

    #[test]
    fn signals_that_end_a_reader_are_told_from_those_that_do_not() {
        use libc::*;
        let handles = Thread::Handles { in_call: false };
        for (pending, blocked, ignored, handled, expected) in [
            (&[][..], &[][..], &[][..], &[][..], Thread::Waits),
            (&[SIGTERM], &[], &[], &[], Thread::Ends),
            (&[SIGUSR1], &[], &[], &[], Thread::Ends),
            (&[40], &[], &[], &[], Thread::Ends),
            (&[SIGTERM, SIGKILL], &[SIGTERM], &[], &[], Thread::Ends),
            (&[SIGTERM], &[SIGTERM], &[], &[], Thread::Waits),
            (&[SIGHUP], &[], &[SIGHUP], &[], Thread::Waits),
            (&[SIGINT], &[], &[], &[SIGINT], handles),
            (&[SIGINT], &[], &[], &[SIGTERM], Thread::Ends),
            (&[SIGUSR1, SIGPROF], &[], &[], &[SIGUSR1, SIGPROF], Thread::Waits),
            (&[SIGSTOP, SIGTSTP], &[], &[], &[], Thread::Waits),
            (&[SIGCHLD, SIGWINCH, SIGURG, SIGCONT], &[], &[], &[], Thread::Waits),
        ] {
            assert_eq!(status('S', pending, blocked, ignored, handled), expected, "{pending:?}");
        }
        assert_eq!(status('Z', &[], &[], &[], &[]), Thread::Ends);
    }

    #[test]
    fn this_thread_waits_for_nothing_and_one_that_never_was_is_gone() {
        assert_eq!(
            Thread::look(nix::unistd::gettid().as_raw().cast_unsigned()),
            Thread::Waits
        );
        assert_eq!(Thread::look(u32::MAX), Thread::Ends);
        assert!(!is_in_call(u32::MAX));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_request_ends_with_its_thread_and_others_wait_on() {
        let watch: Arc<Watch> = Arc::default();
        let watching = tokio::spawn(watch.clone().run());
        let mut gone = watch.add(u32::MAX);
        let mut here = watch.add(std::process::id());
        let mut unknown = watch.add(0);
        gone.interrupted().await;
        let others = async {
            tokio::select! {
                () = here.interrupted() => {},
                () = unknown.interrupted() => {},
            }
        };
        assert!(tokio::time::timeout(3 * LOOK, others).await.is_err());
        drop((gone, here, unknown));
        assert!(watch.state().waiting.is_empty());
        watching.abort();
    }

    #[test]
    fn no_more_than_some_threads_are_looked_at_in_one_go() {
        let watch: Arc<Watch> = Arc::default();
        let threads = 2 * MOST as u32 + 10;
        let watched: Vec<_> = (1..=threads).map(|thread| watch.add(thread)).collect();
        for waiting in watch.state().waiting.values_mut() {
            waiting.since -= LOOK;
        }
        let mut seen = std::collections::BTreeSet::new();
        let mut after = 0;
        for _ in 0..3 {
            let due = watch.due(&mut after);
            assert!(due.len() <= MOST);
            seen.extend(due);
        }
        assert_eq!(seen.len(), threads as usize, "all of them in turn");
        drop(watched);
    }

    #[test]
    fn a_page_fault_with_a_handled_signal_goes_on_for_a_while() {
        let watch: Arc<Watch> = Arc::default();
        let mut watched = watch.add(7);
        let seen = |in_call| BTreeMap::from([(7, Thread::Handles { in_call })]);
        watch.tell(&seen(false));
        assert!(watched.interrupted.try_recv().is_err());
        for waiting in watch.state().waiting.values_mut() {
            waiting.signalled = waiting.signalled.map(|since| since - FAULT);
        }
        watch.tell(&seen(false));
        assert!(watched.interrupted.try_recv().is_ok());
        let mut watched = watch.add(7);
        watch.tell(&seen(true));
        assert!(watched.interrupted.try_recv().is_ok());
    }
}
