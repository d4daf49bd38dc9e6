//! One virtqueue, as the messages of the monitor set it up, start it and stop it.

#[cfg(fuzzing)]
pub mod fuzzing;
mod state;
mod worker;

use std::io;
use std::sync::{Arc, MutexGuard};
use std::thread::JoinHandle;

use tokio::runtime::Handle;
use virtio_queue::QueueT as _;
use vm_memory::{GuestAddress, GuestMemoryMmap};

pub(super) use self::state::MOST_ENTRIES;
use self::state::{QueueMode, QueueState};
use self::worker::QueueWorker;
use super::dirty::DirtyLog;
use super::eventfd::EventDescriptor;
use super::inflight::InflightQueue;
use crate::disk::Disk;

/// A virtqueue. Dropping it ends its thread, and then nothing is written into the memory of the guest any more.
#[derive(Debug)]
pub(super) struct Queue {
    worker: Arc<QueueWorker>,
    thread: Option<JoinHandle<()>>,
}

impl Queue {
    /// A queue that is stopped.
    pub(super) fn new(disk: Disk, runtime: Handle) -> io::Result<Self> {
        let worker = QueueWorker::new(disk, runtime, QueueState::new()?)?;
        Ok(Self {
            worker: Arc::new(worker),
            thread: None,
        })
    }

    fn state(&self) -> MutexGuard<'_, QueueState> {
        self.worker.state()
    }

    /// Sets the memory of the guest, which this queue uses from now on. A queue that runs is paused if its ring does not
    /// lie in the memory any more.
    pub(super) fn set_memory(&self, memory: Arc<GuestMemoryMmap>) {
        let mut state = self.state();
        if state.mode != QueueMode::Stopped && !state.ring.is_valid(&*memory) {
            state.enabled = false;
        }
        state.memory = memory;
    }

    /// Sets the log of written pages, or ends it.
    pub(super) fn set_dirty(&self, dirty: Option<DirtyLog>) {
        self.state().dirty = dirty;
    }

    /// Sets whether the driver and the device tell each other at which index they want to be woken.
    pub(super) fn set_event_idx(&self, enabled: bool) {
        self.state().ring.set_event_idx(enabled);
    }

    /// Sets the number of entries. Fails if the number is no power of two up to [`MOST_ENTRIES`], or if the queue runs.
    pub(super) fn set_size(&self, entries: u32) -> io::Result<()> {
        let entries = u16::try_from(entries).map_err(io::Error::other)?;
        let mut state = self.state();
        if state.mode != QueueMode::Stopped {
            return Err(running());
        }
        state.ring.try_set_size(entries).map_err(io::Error::other)
    }

    /// Sets the guest addresses of the ring. Fails if they are not aligned or lie outside the memory. Fails also if the
    /// queue runs, unless it has these addresses: monitors repeat them when they begin to log written pages.
    pub(super) fn set_addresses(&self, descriptors: u64, available: u64, used: u64) -> io::Result<()> {
        let mut state = self.state();
        if state.mode != QueueMode::Stopped {
            let ring = &state.ring;
            let same = (ring.desc_table(), ring.avail_ring(), ring.used_ring()) == (descriptors, available, used);
            return same.then_some(()).ok_or_else(running);
        }
        let ring = &mut state.ring;
        ring.try_set_desc_table_address(GuestAddress(descriptors))
            .map_err(io::Error::other)?;
        ring.try_set_avail_ring_address(GuestAddress(available))
            .map_err(io::Error::other)?;
        ring.try_set_used_ring_address(GuestAddress(used))
            .map_err(io::Error::other)?;
        let memory = state.memory.clone();
        let used = state.ring.used_idx(&*memory, std::sync::atomic::Ordering::Acquire);
        state.ring.set_next_used(used.map_err(io::Error::other)?.0);
        Ok(())
    }

    /// Sets the index of the first request to take.
    pub(super) fn set_base(&self, index: u16) {
        self.state().ring.set_next_avail(index);
    }

    /// Sets whom to signal about answers.
    pub(super) fn set_call(&self, call: Option<EventDescriptor>) {
        if let Some(call) = &call {
            // An earlier process may have answered requests, and have ended before it signalled that.
            call.signal();
        }
        self.state().call = call;
    }

    /// Lets the queue run, or pauses it.
    pub(super) fn enable(&self, enabled: bool) {
        self.state().enabled = enabled;
        self.worker.wake.signal();
    }

    /// Number of entries.
    pub(super) fn size(&self) -> u16 {
        self.state().ring.size()
    }

    /// Starts the queue, or starts it anew. The guest signals requests at `kick`. `inflight` is the record of requests
    /// in flight, which may have some of an earlier process.
    pub(super) fn start(&mut self, kick: EventDescriptor, inflight: Option<InflightQueue>) -> io::Result<()> {
        if self.thread.is_some() {
            drop(self.drain());
        }
        self.state().begin(inflight)?;
        // Requests may have come before.
        self.worker.wake.signal();
        let worker = self.worker.clone();
        let thread = std::thread::Builder::new().name("vhost-blk".to_owned());
        self.thread = Some(thread.spawn(move || worker.run(&kick))?);
        Ok(())
    }

    /// Stops the queue when all requests that it has taken are answered. Returns the index of the next request.
    pub(super) fn stop(&mut self) -> u16 {
        let mut state = self.drain();
        state.ring.set_ready(false);
        state.mode = QueueMode::Stopped;
        state.call = None;
        state.inflight = None;
        state.ring.next_avail()
    }

    /// Ends the thread when all requests that it has taken are begun, and waits until they are answered.
    fn drain(&mut self) -> MutexGuard<'_, QueueState> {
        self.end(QueueMode::Draining);
        let waiting = self.worker.fewer.wait_while(self.state(), |state| state.waiting > 0);
        waiting.expect("no panic while locked")
    }

    /// Ends the thread.
    fn end(&mut self, mode: QueueMode) {
        let Some(thread) = self.thread.take() else { return };
        self.state().mode = mode;
        self.worker.wake.signal();
        // A panic of the thread was reported.
        let _ = thread.join();
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.end(QueueMode::Stopped);
        self.state().mode = QueueMode::Stopped;
        let tasks = std::mem::take(&mut *self.worker.tasks());
        drop(tasks);
    }
}

/// Returns the error for a change that a queue must be stopped for.
fn running() -> io::Error {
    io::Error::other("the queue runs")
}
