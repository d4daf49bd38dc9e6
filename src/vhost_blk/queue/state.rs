//! The state of a virtqueue: its ring, and how far its requests are.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use virtio_queue::{Queue as Ring, QueueOwnedT as _, QueueT as _};
use vm_memory::GuestMemoryMmap;

use crate::vhost_blk::dirty::DirtyLog;
use crate::vhost_blk::eventfd::EventDescriptor;
use crate::vhost_blk::inflight::InflightQueue;
use crate::vhost_blk::request::BlockRequest;

/// Largest number of entries of a ring.
pub(in crate::vhost_blk) const MOST_ENTRIES: u16 = 1024;
/// Bytes of a used ring before its entries, and bytes of an entry.
const USED_HEAD: u64 = 4;
const USED_ENTRY: u64 = 8;

/// What the thread of a queue does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum QueueMode {
    /// It has not started, or is to end.
    Stopped,
    /// It takes requests.
    Running,
    /// It takes no new requests, and carries out those that it has taken.
    Draining,
}

/// The ring of a queue, and how far its requests are.
#[derive(Debug)]
pub(super) struct QueueState {
    pub(super) ring: Ring,
    pub(super) memory: Arc<GuestMemoryMmap>,
    pub(super) dirty: Option<DirtyLog>,
    pub(super) call: Option<EventDescriptor>,
    pub(super) inflight: Option<InflightQueue>,
    /// Whether the monitor lets the queue run.
    pub(super) enabled: bool,
    pub(super) mode: QueueMode,
    /// Requests that were taken and not begun.
    pub(super) taken: VecDeque<u16>,
    /// Whether too many bytes wait. The thread then begins no request until a read is done.
    pub(super) starved: bool,
    /// Reads that wait.
    pub(super) waiting: usize,
}

impl QueueState {
    /// The state of a queue that is stopped.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            ring: Ring::new(MOST_ENTRIES).map_err(io::Error::other)?,
            memory: Arc::default(),
            dirty: None,
            call: None,
            inflight: None,
            enabled: false,
            mode: QueueMode::Stopped,
            taken: VecDeque::new(),
            starved: false,
            waiting: 0,
        })
    }

    /// Makes everything ready to take requests, first those that an earlier process has not answered. `inflight` has
    /// the record of them.
    pub(super) fn begin(&mut self, mut inflight: Option<InflightQueue>) -> io::Result<()> {
        let used = self.ring.next_used();
        self.starved = false;
        self.taken.clear();
        if let Some(unanswered) = inflight.as_mut().and_then(|inflight| inflight.unanswered(used)) {
            // The earlier process has taken these and all that were answered.
            self.ring.set_next_avail(used.wrapping_add(unanswered.len() as u16));
            self.taken.extend(unanswered);
        }
        self.inflight = inflight;
        self.ring.set_ready(true);
        if !self.ring.is_valid(&*self.memory) {
            self.ring.set_ready(false);
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the ring lies outside the memory",
            ));
        }
        self.mode = QueueMode::Running;
        Ok(())
    }

    /// Takes a request and records it. Returns the index of its first descriptor. If there is none, the guest will
    /// signal the next one.
    pub(super) fn take(&mut self) -> Option<u16> {
        if let Some(head) = self.taken.pop_front() {
            return Some(head);
        }
        for _ in 0..2 {
            let next = self.ring.iter(&*self.memory).ok().and_then(|mut chains| chains.next());
            if let Some(chain) = next {
                let head = chain.head_index();
                if let Some(inflight) = &mut self.inflight {
                    inflight.take(head);
                }
                return Some(head);
            }
            // A request may have come just before the guest saw that it has to signal. Then the second look finds it,
            // unless the ring cannot be read.
            if !self.ring.enable_notification(&*self.memory).unwrap_or(false) {
                return None;
            }
        }
        tracing::debug!("a virtqueue says that there are requests, and they cannot be read");
        None
    }

    /// Answers a request, unless the queue is stopped.
    pub(super) fn answer(&mut self, request: &BlockRequest, result: Result<&[u8], ()>) {
        if self.mode != QueueMode::Stopped {
            let written = request.answer(&self.memory, result, self.dirty.as_ref());
            self.put_used(request.head, written);
        }
    }

    /// Puts a request into the used ring and signals the guest if it wants that.
    pub(super) fn put_used(&mut self, head: u16, written: u32) {
        if let Some(inflight) = &self.inflight {
            inflight.answering(head);
        }
        if let Err(error) = self.ring.add_used(&*self.memory, head, written) {
            tracing::debug!(%error, "a virtqueue takes no answer");
            return;
        }
        if let Some(inflight) = &self.inflight {
            inflight.answered(head, self.ring.next_used());
        }
        if let Some(dirty) = &self.dirty {
            dirty.mark(
                self.ring.used_ring(),
                USED_HEAD + USED_ENTRY * u64::from(self.ring.size()),
            );
        }
        if self.ring.needs_notification(&*self.memory).unwrap_or(true)
            && let Some(call) = &self.call
        {
            call.signal();
        }
    }
}
