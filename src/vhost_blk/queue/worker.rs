//! The thread of a virtqueue, and the tasks of its reads that wait.

use std::io;
use std::os::fd::AsFd as _;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::runtime::Handle;
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::JoinSet;
use virtio_queue::QueueT as _;
use vm_memory::GuestAddress;

use super::state::{QueueMode, QueueState};
use crate::disk::{ClientShares, Disk, LONGEST_AT_ONCE};
use crate::vhost_blk::eventfd::EventDescriptor;
use crate::vhost_blk::request::{BlockCommand, BlockRequest, device_id};

/// Carries out the requests of a queue. The queue, its thread and the tasks of its reads share it.
#[derive(Debug)]
pub(super) struct QueueWorker {
    disk: Disk,
    runtime: Handle,
    state: Mutex<QueueState>,
    /// The tasks of reads that wait. They take the lock of `state` when they end.
    tasks: Mutex<JoinSet<()>>,
    /// Signals that fewer reads wait.
    pub(super) fewer: Condvar,
    /// Wakes the thread.
    pub(super) wake: EventDescriptor,
    shares: ClientShares,
}

/// What the thread does next.
pub(super) enum Next {
    /// Carries out a request.
    Begin(BlockRequest),
    /// Goes on to the next request: this one was none.
    Skip,
    /// Waits until it is woken.
    Wait,
    /// Ends.
    End,
}

impl QueueWorker {
    pub(super) fn new(disk: Disk, runtime: Handle, state: QueueState) -> io::Result<Self> {
        Ok(Self {
            disk,
            runtime,
            state: Mutex::new(state),
            tasks: Mutex::default(),
            fewer: Condvar::new(),
            wake: EventDescriptor::new()?,
            shares: ClientShares::default(),
        })
    }

    pub(super) fn state(&self) -> MutexGuard<'_, QueueState> {
        self.state.lock().expect("no panic while locked")
    }

    pub(super) fn tasks(&self) -> MutexGuard<'_, JoinSet<()>> {
        self.tasks.lock().expect("no panic while locked")
    }

    /// Carries out requests until the queue is stopped.
    pub(super) fn run(self: &Arc<Self>, kick: &EventDescriptor) {
        let mut buffer = vec![0; LONGEST_AT_ONCE];
        let events = [kick, &self.wake];
        loop {
            let mut polled = events.map(|event| PollFd::new(event.as_fd(), PollFlags::POLLIN));
            match poll(&mut polled, PollTimeout::NONE) {
                Ok(_) | Err(nix::Error::EINTR) => {}
                Err(error) => {
                    tracing::error!(%error, "a virtqueue cannot be watched");
                    return;
                }
            }
            for (event, polled) in events.iter().zip(polled) {
                if polled.any().unwrap_or(false) {
                    event.clear();
                }
            }
            loop {
                match self.next() {
                    Next::Begin(request) => self.begin(request, &mut buffer),
                    Next::Skip => {}
                    Next::Wait => break,
                    Next::End => return,
                }
            }
        }
    }

    /// Takes the next request.
    pub(super) fn next(&self) -> Next {
        let mut state = self.state();
        match state.mode {
            QueueMode::Stopped => return Next::End,
            QueueMode::Draining if state.taken.is_empty() => return Next::End,
            _ if state.starved => return Next::Wait,
            QueueMode::Running if !state.enabled => return Next::Wait,
            QueueMode::Running | QueueMode::Draining => {}
        }
        let Some(head) = state.take() else {
            return Next::Wait;
        };
        let (table, entries) = (GuestAddress(state.ring.desc_table()), state.ring.size());
        match BlockRequest::read(&state.memory, table, entries, head, self.disk.size()) {
            Ok(request) => Next::Begin(request),
            Err(_) => {
                tracing::debug!(head, "a guest sent a chain of descriptors that is not a request");
                state.put_used(head, 0);
                Next::Skip
            }
        }
    }

    /// Carries out a request: at once if its bytes are local, otherwise in a task.
    pub(super) fn begin(self: &Arc<Self>, request: BlockRequest, buffer: &mut [u8]) {
        let answer = |request, result| self.state().answer(request, result);
        match request.command {
            BlockCommand::Read { offset } => {
                // A read that is too long for the buffer becomes a task too.
                let bytes = buffer.get_mut(..request.length as usize).and_then(|bytes| {
                    self.disk.read_local(offset, bytes)?;
                    Some(bytes)
                });
                match bytes {
                    Some(bytes) => answer(&request, Ok(bytes)),
                    None => self.wait(request, offset),
                }
            }
            BlockCommand::Flush => answer(&request, Ok(&[])),
            BlockCommand::Id => {
                let digest = &self.disk.image().resolved().manifest_document.digest;
                answer(&request, Ok(&device_id(digest.hex())));
            }
            BlockCommand::Refused | BlockCommand::Unknown => answer(&request, Err(())),
        }
    }

    /// Starts a task for a read that has to wait. If too many bytes wait already, leaves the request for later.
    fn wait(self: &Arc<Self>, request: BlockRequest, offset: u64) {
        let mut state = self.state();
        let Some(share) = self.shares.try_take(request.length) else {
            state.taken.push_front(request.head);
            state.starved = true;
            return;
        };
        state.waiting += 1;
        let waiting = WaitingRead {
            worker: self.clone(),
            share: Some(share),
        };
        drop(state);
        let mut tasks = self.tasks();
        while tasks.try_join_next().is_some() {}
        tasks.spawn_on(waiting.read(request, offset), &self.runtime);
    }
}

/// A read that waits. It counts until it is dropped.
struct WaitingRead {
    worker: Arc<QueueWorker>,
    share: Option<OwnedSemaphorePermit>,
}

impl WaitingRead {
    async fn read(self, request: BlockRequest, offset: u64) {
        // The content logs errors.
        let read = self.worker.disk.read(offset, request.length as usize).await;
        self.worker.state().answer(&request, read.as_deref().map_err(|_| ()));
    }
}

impl Drop for WaitingRead {
    fn drop(&mut self) {
        self.share = None;
        let mut state = self.worker.state();
        state.waiting -= 1;
        self.worker.fewer.notify_all();
        if std::mem::take(&mut state.starved) {
            self.worker.wake.signal();
        }
    }
}
