//! vhost-user-blk server: serves a [`Disk`] as a virtio block device of virtual machines. In the words of the vhost-user
//! specification it is the back-end.
//!
//! A virtual machine monitor connects to a Unix socket and speaks vhost-user (docs/interop/vhost-user.rst of QEMU). It
//! passes the memory of its guest, and for each virtqueue two event descriptors: the guest kicks one when it has put
//! requests into the queue, and ocifs signals the other when it has answered. The data goes directly into the memory of
//! the guest. The device is that of the virtio specification (version 1.2, section 5.2), read-only.
//!
//! ```text
//! connection (thread) ── messages ──▶ Device: features, memory, queues
//!                                       │ one for each queue
//! kick ──▶ queue (thread): take a request ──▶ local? answer at once : task ──▶ answer ──▶ call
//! ```
//! Each queue has a thread, which never waits for the network: a read that has to wait becomes a task. At most
//! [`disk::IN_FLIGHT`](crate::disk::IN_FLIGHT) bytes of a queue wait at a time. Then the thread takes no further requests
//! until an answer is there.
//!
//! The requests of a queue that are in flight are recorded in memory that the monitor keeps. If this process ends, the
//! next one finds there what is still to be answered.
//!
//! Invariants:
//! - Descriptors, ring indexes and messages are checked. A guest or a monitor that breaks the rules gets an error, or
//!   loses its connection, and no other client notices. But a monitor is trusted with the files that it passes: one that
//!   cuts its guest's memory short ends this process.
//! - A read that fails is an error of that request.
//! - After the end of a connection, nothing is written into the memory of its guest.

mod device;
mod dirty;
mod eventfd;
mod guest;
mod inflight;
mod queue;
mod request;
mod shared;

use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use tokio::runtime::Handle;
use vhost::vhost_user::{BackendReqHandler, Error as MessageError};

use self::device::Device;
use crate::disk::Disk;

#[cfg(fuzzing)]
pub mod fuzzing {
    //! For fuzz targets: a virtqueue that is carried out without its thread.

    pub use super::queue::fuzzing::{INFLIGHT, carry_out};
}

/// Why a connection ended before the monitor closed it.
#[derive(Debug, thiserror::Error)]
#[error("vhost-user: {0}")]
pub struct VhostBlkError(#[from] MessageError);

/// Serves one connection until the monitor closes it. Blocks the thread, which must not belong to a runtime. Reads that
/// have to wait run on `runtime`.
pub fn serve(disk: &Disk, runtime: &Handle, stream: UnixStream) -> Result<(), VhostBlkError> {
    let device = Arc::new(Mutex::new(Device::new(disk.clone(), runtime.clone())));
    let mut messages = BackendReqHandler::from_stream(stream, device.clone());
    let result = loop {
        match messages.handle_request() {
            Ok(()) => {}
            Err(MessageError::Disconnected | MessageError::PartialMessage | MessageError::SocketBroken(_)) => {
                break Ok(());
            }
            Err(error) => break Err(error.into()),
        }
    };
    device.lock().expect("no panic while locked").close();
    result
}
