//! Bounds for one client of a disk: an NBD connection or a virtqueue.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Longest read in bytes. A larger value lets one read hold more memory; with a smaller one, clients that ignore the
/// limit of the protocol get errors.
pub const LONGEST_READ: u32 = 32 << 20;
/// Longest read in bytes that the thread of a client answers itself. A longer one becomes a task, even if its bytes are
/// local. The thread keeps a buffer of this size, so a larger value takes more memory for each client; with a smaller
/// one, more reads cost a task.
pub const LONGEST_AT_ONCE: usize = 1 << 20;
/// Bytes of reads that wait, for each client. A larger value lets one client take more memory; with a smaller one, fewer
/// reads wait for the network at a time.
pub const IN_FLIGHT: u32 = 64 << 20;
/// Bytes that a read counts at least, so that short reads cannot make too many tasks.
const LEAST: u32 = 16 << 10;

/// What one client has left of [`IN_FLIGHT`].
#[derive(Debug, Clone)]
pub struct ClientShares(Arc<Semaphore>);

impl Default for ClientShares {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(IN_FLIGHT as usize)))
    }
}

impl ClientShares {
    fn bytes(length: u32) -> u32 {
        length.clamp(LEAST, IN_FLIGHT)
    }

    /// Takes the share of a read of `length` bytes. Waits until earlier reads leave enough.
    pub async fn take(&self, length: u32) -> OwnedSemaphorePermit {
        let taken = self.0.clone().acquire_many_owned(Self::bytes(length)).await;
        taken.expect("no code closes the semaphore")
    }

    /// Takes the share of a read of `length` bytes, if earlier reads leave enough.
    pub fn try_take(&self, length: u32) -> Option<OwnedSemaphorePermit> {
        self.0.clone().try_acquire_many_owned(Self::bytes(length)).ok()
    }
}
