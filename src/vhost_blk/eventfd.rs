//! Event descriptors that a monitor passes (eventfd(2)).

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::eventfd::{EfdFlags, EventFd};

/// An event descriptor. Signalling and clearing it never blocks.
#[derive(Debug)]
pub(super) struct EventDescriptor(File);

impl EventDescriptor {
    /// Takes a descriptor from a monitor. Fails if it is anything else than an event descriptor, which could block or be
    /// readable for ever.
    pub(super) fn from_monitor(file: File) -> io::Result<Self> {
        let kind = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        if kind.as_os_str() != "anon_inode:[eventfd]" {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the descriptor is no eventfd",
            ));
        }
        let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL)?);
        fcntl(&file, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(Self(file))
    }

    /// A new event.
    pub(super) fn new() -> io::Result<Self> {
        let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        Ok(Self(File::from(std::os::fd::OwnedFd::from(event))))
    }

    /// Signals the event.
    pub(super) fn signal(&self) {
        // It fails only if the event has been signalled 2^64 - 2 times and was not cleared.
        let _ = (&self.0).write(&1u64.to_ne_bytes());
    }

    /// Clears the event.
    pub(super) fn clear(&self) {
        // It fails only if the event is clear.
        let _ = (&self.0).read(&mut [0; 8]);
    }
}

impl AsFd for EventDescriptor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_descriptors_are_refused() {
        assert!(EventDescriptor::from_monitor(File::open("/dev/zero").unwrap()).is_err());
        let event = EventDescriptor::new().unwrap();
        event.signal();
        let copy = EventDescriptor::from_monitor(event.0.try_clone().unwrap()).unwrap();
        copy.clear();
        copy.clear();
    }
}
