//! Locks on bytes of a file (fcntl_locking(2), open file description locks).
//!
//! A lock belongs to the open file, not to the process. The kernel gives the lock back when the file is closed, also
//! by the end of the process. The file need not have the locked bytes, and their content does not matter.

use std::fs::File;
use std::io;
use std::ops::Range;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

/// Locks bytes of a file for this open file alone. Returns false if another open file has a lock on any of the bytes.
pub(crate) fn lock_bytes(file: &File, bytes: Range<u64>) -> io::Result<bool> {
    set(file, bytes, libc::F_WRLCK)
}

/// Gives a lock back.
pub(crate) fn unlock_bytes(file: &File, bytes: Range<u64>) -> io::Result<()> {
    set(file, bytes, libc::F_UNLCK).map(drop)
}

fn set(file: &File, bytes: Range<u64>, kind: libc::c_int) -> io::Result<bool> {
    let lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: bytes.start.cast_signed(),
        l_len: (bytes.end - bytes.start).cast_signed(),
        l_pid: 0,
    };
    match fcntl(file, FcntlArg::F_OFD_SETLK(&lock)) {
        Ok(_) => Ok(true),
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(false),
        Err(error) => Err(error.into()),
    }
}
