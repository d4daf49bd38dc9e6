//! System calls that may wait for a read from this very process.
//!
//! The kernel's EROFS reads from a disk that this process serves over FUSE. mount(2) reads the superblock. The last
//! umount2(2) waits until all reads under way have ended, and no signal ends that wait. If such a call was made by an
//! ordinary thread of this process, SIGKILL could not end the process: the thread would stay in the kernel, waiting for an
//! answer over /dev/fuse, and would itself keep /dev/fuse open. Then nobody answers, and sync(2) hangs on the whole
//! machine.
//!
//! So the call is made in a thread with a descriptor table of its own, in which nothing else is open. When the process
//! ends, /dev/fuse closes, the kernel fails the reads, and the call returns.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, RawFd};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;
use nix::sched::{CloneFlags, unshare};

/// A call that was started and may still be in the kernel. Dropping it leaves the call to itself.
#[derive(Debug)]
pub(super) struct KernelCall<T> {
    thread: JoinHandle<()>,
    answer: Receiver<T>,
}

impl<T: Send + 'static> KernelCall<T> {
    /// Makes the call in a thread of its own. In that thread, only the descriptor `keep` is open. It stays open until the
    /// call returns, as /proc/thread-self/fd/N, even if the caller closes it. Paths of the form /proc/self/fd/N name the
    /// descriptors of the process.
    ///
    /// Where a sandbox forbids a descriptor table of its own, the thread has that of the process.
    pub(super) fn start(keep: Option<BorrowedFd<'_>>, call: impl FnOnce() -> T + Send + 'static) -> io::Result<Self> {
        let (sender, answer) = sync_channel(1);
        let (ready, is_ready) = sync_channel::<()>(1);
        let keep = keep.map(|fd| fd.as_raw_fd());
        let work = move || {
            // Nothing is ever sent: the caller waits until this end is dropped.
            close_all_but(keep, || drop(ready));
            // Nobody may wait for the result any more.
            let _ = sender.send(call());
        };
        let thread = std::thread::Builder::new().name("kernel-call".to_owned()).spawn(work)?;
        // From then on, the caller may close `keep`.
        let _ = is_ready.recv();
        Ok(Self { thread, answer })
    }

    /// Waits for the result, at most for `limit`. `None` if the call has not returned by then.
    pub(super) fn wait(&self, limit: Duration) -> io::Result<Option<T>> {
        match self.answer.recv_timeout(limit) {
            Ok(result) => Ok(Some(result)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(panicked()),
        }
    }

    /// Waits for the result without a limit.
    pub(super) fn join(self) -> io::Result<T> {
        self.answer.recv().map_err(|_| panicked())
    }

    /// Whether the call has returned.
    pub(super) fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }
}

fn panicked() -> io::Error {
    io::Error::other("the thread of a system call ended without a result")
}

/// Gives this thread a descriptor table of its own, in which only `keep` is open. The other threads keep theirs. Calls
/// `separated` as soon as the thread has its own table: to close a descriptor may take time, because it may flush a file.
fn close_all_but(keep: Option<RawFd>, separated: impl FnOnce()) {
    // Descriptors above `keep` are not even copied, so nothing is flushed for them.
    let above = keep.map_or(0, |keep| keep.cast_unsigned() + 1);
    match close_range(above, u32::MAX, libc::CLOSE_RANGE_UNSHARE) {
        Ok(()) => {
            separated();
            if let Some(below) = above.checked_sub(2) {
                // The range is valid, so the call cannot fail.
                let _ = close_range(0, below, 0);
            }
        }
        // Before Linux 5.9.
        Err(_) => close_each_but(keep, separated),
    }
}

/// Closes all descriptors in a range (close_range(2)). Not every C library has a function for this call.
#[allow(unsafe_code)]
fn close_range(first: u32, last: u32, flags: libc::c_uint) -> Result<(), Errno> {
    // SAFETY: the call takes three numbers. Of the process's own table it closes nothing: it is made with
    // `CLOSE_RANGE_UNSHARE`, or after such a call.
    Errno::result(unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) }).map(drop)
}

/// Does the work of [`close_all_but`] without close_range(2).
fn close_each_but(keep: Option<RawFd>, separated: impl FnOnce()) {
    let is_separate = unshare(CloneFlags::CLONE_FILES).is_ok();
    separated();
    // If that is forbidden, nothing may be closed, because the table is that of all threads.
    if !is_separate {
        return;
    }
    // If the descriptors cannot be listed, they stay open, as if the call was made by an ordinary thread.
    let Ok(open) = std::fs::read_dir("/proc/thread-self/fd") else {
        return;
    };
    let numbers = open
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    for number in numbers.collect::<Vec<RawFd>>() {
        if Some(number) != keep {
            // The descriptor of the listing itself is closed already.
            let _ = nix::unistd::close(number);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::os::fd::AsFd as _;

    use super::*;

    fn open() -> Vec<RawFd> {
        let open = std::fs::read_dir("/proc/thread-self/fd").unwrap();
        let numbers = open.map(|entry| entry.unwrap().file_name().to_str().unwrap().parse().unwrap());
        let mut numbers: Vec<RawFd> = numbers.collect();
        numbers.sort();
        numbers
    }

    #[test]
    fn the_call_has_no_descriptor_but_the_one_to_keep() {
        let (kept, _other) = io::pipe().unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        let (release, released) = sync_channel::<()>(0);
        let number = kept.as_raw_fd();
        let call = KernelCall::start(Some(kept.as_fd()), move || {
            released.recv().unwrap();
            open()
        });
        let call = call.unwrap();
        drop((writer, kept));
        // The pipe is closed although the call has not returned.
        assert_eq!(reader.read(&mut [0]).unwrap(), 0);
        assert!(call.wait(Duration::ZERO).unwrap().is_none() && !call.is_finished());
        release.send(()).unwrap();
        let seen = call.join().unwrap();
        // The listing sees its own descriptor.
        assert!(seen.contains(&number) && seen.len() == 2, "{seen:?}");
        assert_eq!(KernelCall::start(None, open).unwrap().join().unwrap().len(), 1);
    }

    #[test]
    fn descriptors_are_closed_one_by_one_on_old_kernels() {
        let (kept, _other) = io::pipe().unwrap();
        let number = kept.as_raw_fd();
        let thread = std::thread::spawn(move || {
            close_each_but(Some(number), || ());
            open()
        });
        let seen = thread.join().unwrap();
        assert!(seen.contains(&number) && seen.len() == 2, "{seen:?}");
    }
}
