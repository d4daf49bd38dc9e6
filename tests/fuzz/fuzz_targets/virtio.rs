//! What a virtual machine and its monitor may say to a virtio block device: the device does not panic.
//!
//! If the first byte is even, the rest is messages of a monitor. Otherwise the rest is the memory of a guest, with a
//! virtqueue in it: 16 descriptors at 0, the available ring at 0x100, the used ring at 0x200. Before the memory come the
//! 320 bytes in which an earlier process has recorded its requests in flight.
#![no_main]

#[path = "../disk.rs"]
mod disk;

use std::io::Write as _;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use libfuzzer_sys::fuzz_target;
use ocifs::vhost_blk;

fuzz_target!(|data: &[u8]| {
    let served = disk::served();
    let handle = served.runtime.handle();
    let Some((kind, data)) = data.split_first() else { return };
    if kind % 2 == 0 {
        let (mut monitor, device) = UnixStream::pair().expect("a socket");
        // More than the socket takes would wait for the device.
        let data = &data[..data.len().min(4096)];
        monitor.write_all(data).expect("the socket takes it");
        monitor.shutdown(Shutdown::Write).expect("it is open");
        let _ = vhost_blk::serve(&served.disk, handle, device);
    } else if let Some((inflight, memory)) = data.split_at_checked(vhost_blk::fuzzing::INFLIGHT) {
        vhost_blk::fuzzing::carry_out(&served.disk, handle, inflight, memory);
    }
});
