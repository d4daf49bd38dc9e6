//! The record of requests in flight, in memory that the monitor keeps (vhost-user specification, "Inflight I/O tracking",
//! split virtqueues).
//!
//! ```text
//! each queue:   features u64 | version u16 | entries u16 | last u16 | used index u16 | entry ...
//! each entry:   in flight u8 | padding | next u16 | counter u64          16 bytes, one for each descriptor
//! ```
//! A request is recorded before it is carried out. When it is answered, its descriptor becomes `last`, then the used
//! ring gets it, then its entry is cleared, and then the used index is recorded. If the process ends in between, the
//! next one can tell from the two used indexes whether the entry of `last` is still to be cleared.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost::vhost_user::message::VhostUserInflight;
use vm_memory::{Bytes as _, MmapRegion, VolatileMemory as _};

use super::shared;

/// Bytes before the entries.
const HEAD: usize = 16;
/// Bytes of an entry.
const ENTRY: usize = 16;
/// Regions of queues begin at multiples of this.
const ALIGN: usize = 64;

const VERSION_AT: usize = 8;
const ENTRIES_AT: usize = 10;
const LAST_AT: usize = 12;
const USED_AT: usize = 14;
const COUNTER_AT: usize = 8;

/// The only version of the format.
const VERSION: u16 = 1;

fn region_bytes(queue_size: u16) -> usize {
    (HEAD + ENTRY * usize::from(queue_size)).next_multiple_of(ALIGN)
}

/// The records of all queues of a device.
#[derive(Debug, Clone)]
pub(super) struct Inflight {
    region: Arc<MmapRegion>,
    queues: u16,
    queue_size: u16,
}

impl Inflight {
    /// Makes memory for the records. Returns its file and description, which the monitor keeps.
    pub(super) fn create(queues: u16, queue_size: u16) -> io::Result<(File, VhostUserInflight)> {
        let bytes = region_bytes(queue_size) * usize::from(queues);
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = File::from(memfd_create(c"ocifs-inflight", flags)?);
        file.set_len(bytes as u64)?;
        Ok((file, VhostUserInflight::new(bytes as u64, 0, queues, queue_size)))
    }

    /// Maps the records that the monitor has kept.
    pub(super) fn map(kept: &VhostUserInflight, file: File) -> io::Result<Self> {
        let bytes = region_bytes(kept.queue_size) * usize::from(kept.num_queues);
        if (kept.mmap_size as usize) < bytes {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let region = shared::map(file, kept.mmap_offset, bytes as u64)?;
        Ok(Self {
            region: Arc::new(region),
            queues: kept.num_queues,
            queue_size: kept.queue_size,
        })
    }

    /// The record of one queue, if there is one for a queue of this size.
    pub(super) fn queue(&self, index: u16, size: u16) -> Option<InflightQueue> {
        (index < self.queues && size <= self.queue_size).then(|| InflightQueue {
            region: self.region.clone(),
            start: region_bytes(self.queue_size) * usize::from(index),
            entries: size,
            counter: 0,
        })
    }
}

/// The record of one queue.
#[derive(Debug)]
pub(super) struct InflightQueue {
    region: Arc<MmapRegion>,
    start: usize,
    entries: u16,
    /// Position of the next request in the order of arrival.
    counter: u64,
}

impl InflightQueue {
    /// Returns the requests that an earlier process has taken and not answered, in their order. `used` is the used index
    /// of the queue. Returns `None` if the record is new.
    pub(super) fn unanswered(&mut self, used: u16) -> Option<Vec<u16>> {
        if self.load::<u16>(VERSION_AT) != VERSION {
            self.store(VERSION_AT, VERSION);
            self.store(ENTRIES_AT, self.entries);
            self.store(USED_AT, used);
            return None;
        }
        if self.load::<u16>(USED_AT) != used {
            // The process ended after the answer and before it cleared the entry.
            let last = self.load::<u16>(LAST_AT);
            if last < self.entries {
                self.store(entry(last), 0u8);
            }
            self.store(USED_AT, used);
        }
        let taken = (0..self.entries).filter(|&head| self.load::<u8>(entry(head)) == 1);
        let mut taken: Vec<(u64, u16)> = taken.map(|head| (self.load(entry(head) + COUNTER_AT), head)).collect();
        taken.sort_unstable();
        self.counter = taken.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        Some(taken.into_iter().map(|(_, head)| head).collect())
    }

    /// Records that a request was taken.
    pub(super) fn take(&mut self, head: u16) {
        if head < self.entries {
            self.store(entry(head) + COUNTER_AT, self.counter);
            self.counter = self.counter.wrapping_add(1);
            self.store(entry(head), 1u8);
        }
    }

    /// Records that a request is about to be put into the used ring.
    pub(super) fn answering(&self, head: u16) {
        self.store(LAST_AT, head);
    }

    /// Records that a request was answered. `used` is the used index after it.
    pub(super) fn answered(&self, head: u16, used: u16) {
        if head < self.entries {
            self.store(entry(head), 0u8);
        }
        self.store(USED_AT, used);
    }

    fn load<T: vm_memory::AtomicAccess>(&self, at: usize) -> T {
        let slice = self.region.as_volatile_slice();
        slice
            .load(self.start + at, Ordering::SeqCst)
            .expect("it lies in the region")
    }

    fn store<T: vm_memory::AtomicAccess>(&self, at: usize, value: T) {
        let slice = self.region.as_volatile_slice();
        slice
            .store(value, self.start + at, Ordering::SeqCst)
            .expect("it lies in the region");
    }
}

/// Where the entry of a descriptor is.
fn entry(head: u16) -> usize {
    HEAD + ENTRY * usize::from(head)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_in_flight_survive_their_process() {
        let (file, kept) = Inflight::create(2, 8).unwrap();
        let again = || Inflight::map(&kept, file.try_clone().unwrap()).unwrap();
        let mut queue = again().queue(1, 8).unwrap();
        assert_eq!(queue.unanswered(65535), None);
        for head in [5, 3, 7] {
            queue.take(head);
        }
        queue.answering(3);
        queue.answered(3, 0);
        assert_eq!(again().queue(1, 8).unwrap().unanswered(0).unwrap(), [5, 7]);
        // The process ends between the answer and the end of its record.
        queue.answering(7);
        let mut next = again().queue(1, 8).unwrap();
        assert_eq!(next.unanswered(1).unwrap(), [5]);
        next.take(2);
        assert_eq!(again().queue(1, 8).unwrap().unanswered(1).unwrap(), [5, 2]);
        assert_eq!(again().queue(0, 8).unwrap().unanswered(1), None);
    }

    #[test]
    fn records_that_do_not_fit_are_refused() {
        let (file, kept) = Inflight::create(1, 8).unwrap();
        assert!(Inflight::map(&VhostUserInflight { num_queues: 2, ..kept }, file.try_clone().unwrap()).is_err());
        let longer = VhostUserInflight {
            mmap_size: u64::MAX,
            num_queues: 9,
            ..kept
        };
        assert!(
            Inflight::map(&longer, file.try_clone().unwrap()).is_err(),
            "the file is shorter"
        );
        let inflight = Inflight::map(&kept, file).unwrap();
        assert!(inflight.queue(1, 8).is_none());
        assert!(inflight.queue(0, 16).is_none());
    }
}
