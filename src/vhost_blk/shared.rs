//! Memory that is shared with a monitor by files.

use std::fs::File;
use std::io;

use vm_memory::{FileOffset, MmapRegion};

/// Maps `size` bytes of a file from `offset` on. Fails if the file is shorter: an access behind the end of a file would
/// end this process. (A monitor that cuts its file short later ends it all the same.)
pub(super) fn map(file: File, offset: u64, size: u64) -> io::Result<MmapRegion> {
    let found = file.metadata()?;
    if found.is_file() && offset.checked_add(size).is_none_or(|end| end > found.len()) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "the file of shared memory is too short",
        ));
    }
    let size = usize::try_from(size).map_err(io::Error::other)?;
    MmapRegion::from_file(FileOffset::new(file, offset), size).map_err(io::Error::other)
}
