//! Bytes of published files, mapped read-only, or what would have been their content.

use std::fs::File;
use std::io;
use std::path::Path;

use memmap2::Mmap;

/// Content of a store file.
#[derive(Debug)]
pub enum FileBytes {
    /// Mapped from the store.
    Mapped(Mmap),
    /// In memory, because there is no store to keep it in.
    Owned(Vec<u8>),
}

impl AsRef<[u8]> for FileBytes {
    fn as_ref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Owned(bytes) => bytes,
        }
    }
}

/// Maps a published file. Only for files that are complete when they get their name and are never written again.
#[allow(unsafe_code)]
pub fn map_file(path: &Path) -> io::Result<FileBytes> {
    let file = File::open(path)?;
    // SAFETY: published files are replaced by rename or unlinked, never written or truncated in place, so the mapped
    // inode does not change for as long as the mapping lives.
    let map = unsafe { Mmap::map(&file) }?;
    Ok(FileBytes::Mapped(map))
}
