//! What several modules need of the system: private files, locks on bytes, waiting by polling, and starting programs.

mod child;
mod lock;
pub(crate) mod private;
mod regular;
mod until;

use std::fs::{self, File};
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

pub use child::{MANAGER, program};
pub(crate) use lock::{lock_bytes, unlock_bytes};
pub(crate) use regular::{clear_way, is_foreign, is_symlink, open_or_replace, open_regular, read_open, read_regular};
pub use until::until;
pub(crate) use until::until_blocking;

/// Turns the error of a removal or rename into success if there was nothing to remove or rename.
pub fn gone(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Returns whether `path` is a name of the open file.
pub(crate) fn is_at(file: BorrowedFd<'_>, path: &Path) -> bool {
    let open = file.try_clone_to_owned().and_then(|fd| File::from(fd).metadata());
    matches!((open, fs::metadata(path)), (Ok(open), Ok(named)) if open.ino() == named.ino() && open.dev() == named.dev())
}

/// Returns whether an error means that something may not be written.
pub(crate) fn is_denied(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied
    )
}

/// Returns the bytes that a file takes on disk.
pub(crate) fn on_disk(metadata: &fs::Metadata) -> u64 {
    metadata.blocks() * 512
}
