//! A queue for fuzz targets, without its thread.

use vm_memory::Bytes as _;

use super::worker::Next;
use super::*;
use crate::disk::LONGEST_AT_ONCE;
use crate::vhost_blk::inflight::Inflight;

const ENTRIES: u16 = 16;
const MEMORY: usize = 64 << 10;
/// Bytes of the record of requests in flight.
pub const INFLIGHT: usize = 320;

/// Carries out the requests in the memory of a guest.
pub fn carry_out(disk: &Disk, runtime: &Handle, inflight: &[u8], memory: &[u8]) {
    let guest = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("memory");
    let memory = &memory[..memory.len().min(MEMORY)];
    guest
        .write_slice(memory, GuestAddress(0))
        .expect("it lies in the memory");
    let queue = Queue::new(disk.clone(), runtime.clone()).expect("a queue");
    queue.set_memory(Arc::new(guest));
    queue.set_size(ENTRIES.into()).expect("a size");
    queue.set_addresses(0, 0x100, 0x200).expect("addresses");
    let (file, made) = Inflight::create(1, ENTRIES).expect("a record");
    std::os::unix::fs::FileExt::write_all_at(&file, inflight, 0).expect("it fits");
    let kept = Inflight::map(&made, file).expect("a record");
    queue.state().begin(kept.queue(0, ENTRIES)).expect("a queue");
    queue.enable(true);
    let mut buffer = vec![0; LONGEST_AT_ONCE];
    loop {
        match queue.worker.next() {
            Next::Begin(request) => queue.worker.begin(request, &mut buffer),
            Next::Skip => {}
            Next::Wait | Next::End => return,
        }
    }
}
