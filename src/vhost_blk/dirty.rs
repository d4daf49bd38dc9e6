//! The log of pages that were written into the memory of a guest, while a monitor saves or moves the guest.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use vhost::vhost_user::message::VhostUserLog;
use vm_memory::{MmapRegion, VolatileMemory as _};

use super::shared;

/// Bytes of guest memory for each bit of the log (`VHOST_LOG_PAGE` of the specification).
const PAGE: u64 = 4096;

/// A log in memory that is shared with the monitor: one bit for each page of guest memory.
#[derive(Debug, Clone)]
pub(super) struct DirtyLog(Arc<MmapRegion>);

impl DirtyLog {
    /// Maps a log.
    pub(super) fn map(log: &VhostUserLog, file: File) -> std::io::Result<Self> {
        Ok(Self(Arc::new(shared::map(file, log.mmap_offset, log.mmap_size)?)))
    }

    /// Marks the pages of `length` bytes at a guest address. Pages beyond the end of the log are left out.
    pub(super) fn mark(&self, address: u64, length: u64) {
        if length == 0 {
            return;
        }
        let last = address.saturating_add(length - 1) / PAGE;
        for page in address / PAGE..=last {
            let Ok(byte) = usize::try_from(page / 8) else { return };
            match self.0.get_atomic_ref::<AtomicU8>(byte) {
                Ok(bits) => drop(bits.fetch_or(1 << (page % 8), Ordering::SeqCst)),
                Err(_) => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes as _;

    use super::*;

    #[test]
    fn pages_are_marked_and_the_end_is_kept() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let log = DirtyLog::map(&VhostUserLog::new(2, 0), file.try_clone().unwrap()).unwrap();
        log.mark(4095, 2);
        log.mark(9 * 4096, 4096);
        log.mark(9 * 4096, 0);
        log.mark(u64::MAX - 5, u64::MAX);
        let mut bits = [0; 2];
        log.0.as_volatile_slice().read_slice(&mut bits, 0).unwrap();
        assert_eq!(bits, [0b11, 0b10]);
        assert!(
            DirtyLog::map(&VhostUserLog::new(8192, 0), file).is_err(),
            "longer than the file"
        );
    }
}
