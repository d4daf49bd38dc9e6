//! Sealed files: store files that are checked as a whole whenever they are read.
//!
//! ```text
//! 0 .. n        content
//! n .. n + 8    magic "ocifsSEA"
//! n + 8 .. end  BLAKE3 of the file's place in the store, a zero byte, and the content
//! ```
//! The place is the name of the file and of its directory, such as `trees/sha256-HEX.erofs`. The hash covers the
//! place. A reader therefore also notices a file that was copied or moved to the place of another layer or image.
//!
//! A sealed file is read into memory and not mapped. The checked bytes stay as they are, even if the file changes
//! later. A file that is cut short cannot kill the process, as it could below a mapping.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use super::StoreError;
use crate::os::{is_foreign, open_regular};

const MAGIC: &[u8; 8] = b"ocifsSEA";
const HASH: usize = 32;
const TRAILER: usize = MAGIC.len() + HASH;
/// Most bytes of a sealed file that is read. The tree of ten million files is about half as long. A larger bound lets
/// a damaged file take more memory; a smaller one refuses larger trees.
const LONGEST: u64 = 4 << 30;
/// Bytes that are read and hashed at a time. A larger piece does not fit into the processor's cache; a smaller one
/// costs more system calls.
const PIECE: u64 = 256 << 10;

/// Returns a hasher that has hashed the place of a file at `path`.
fn hasher(path: &Path) -> blake3::Hasher {
    let mut hasher = blake3::Hasher::new();
    let directory = path.parent().and_then(Path::file_name).unwrap_or_default();
    let name = path.file_name().unwrap_or_default();
    hasher.update(directory.as_encoded_bytes());
    hasher.update(b"/");
    hasher.update(name.as_encoded_bytes());
    hasher.update(&[0]);
    hasher
}

/// Writes content and hashes it at the same time.
pub(super) struct SealingWriter<'a, W> {
    out: &'a mut W,
    hasher: blake3::Hasher,
}

impl<'a, W: Write> SealingWriter<'a, W> {
    /// Begins to seal a file that will be published at `path`.
    pub(super) fn new(path: &Path, out: &'a mut W) -> Self {
        Self {
            out,
            hasher: hasher(path),
        }
    }

    /// Writes the seal behind the content.
    pub(super) fn finish(self) -> io::Result<()> {
        self.out.write_all(MAGIC)?;
        self.out.write_all(self.hasher.finalize().as_bytes())
    }
}

impl<W: Write> Write for SealingWriter<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Returns the content of the sealed file at `path`. Returns none if there is no file. Fails with
/// [`StoreError::Damaged`] if the file is damaged or not sealed.
pub(crate) fn read_sealed(path: &Path) -> Result<Option<Vec<u8>>, StoreError> {
    let damaged = |reason| StoreError::Damaged {
        path: path.to_owned(),
        reason,
    };
    let mut file = match open_regular(File::options().read(true), path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) if is_foreign(&e) => return Err(damaged("it is no regular file")),
        Err(e) => return Err(StoreError::io("open", path, e)),
    };
    let io = |e| StoreError::io("read", path, e);
    let length = file.metadata().map_err(io)?.len();
    if length > LONGEST {
        return Err(damaged("it is longer than any such file"));
    }
    // A sparse file can have any length. Check its end before the rest is read.
    let mut end = [0; MAGIC.len()];
    let Some(end_at) = length.checked_sub(TRAILER as u64) else {
        return Err(damaged("it is cut short"));
    };
    file.read_exact_at(&mut end, end_at).map_err(io)?;
    if end != *MAGIC {
        return Err(damaged("it does not end with a seal"));
    }
    let mut bytes = Vec::new();
    bytes
        .try_reserve_exact(usize::try_from(length).unwrap_or(usize::MAX))
        .map_err(|e| io(io::Error::other(e)))?;
    let content = usize::try_from(length).unwrap_or(usize::MAX).saturating_sub(TRAILER);
    let mut hasher = hasher(path);
    // Each piece is hashed while it is in the processor's cache.
    loop {
        let start = bytes.len();
        if Read::by_ref(&mut file)
            .take(PIECE)
            .read_to_end(&mut bytes)
            .map_err(io)?
            == 0
        {
            break;
        }
        hasher.update(&bytes[start.min(content)..bytes.len().min(content)]);
        if bytes.len() as u64 > length {
            return Err(damaged("it grew while it was read"));
        }
    }
    if bytes.len() < TRAILER || bytes.len() as u64 != length {
        return Err(damaged("it is cut short"));
    }
    let (magic, hash) = bytes[content..].split_at(MAGIC.len());
    if magic != MAGIC {
        return Err(damaged("it does not end with a seal"));
    }
    if hasher.finalize() != *hash {
        return Err(damaged("its content does not match its seal"));
    }
    bytes.truncate(content);
    Ok(Some(bytes))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::{Durability, Store};
    use super::*;

    fn damage(path: &Path) -> Option<&'static str> {
        match read_sealed(path) {
            Err(StoreError::Damaged { reason, .. }) => Some(reason),
            Ok(_) => None,
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn content_comes_back_and_any_other_bit_or_place_is_damage() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let path = dir.path().join("trees/a");
        assert!(read_sealed(&path).unwrap().is_none());
        store
            .publish_sealed(&path, Durability::Lazy, |out| out.write_all(b"content"))
            .unwrap();
        assert_eq!(read_sealed(&path).unwrap().unwrap(), b"content");
        let whole = fs::read(&path).unwrap();
        for byte in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[byte] ^= 0x10;
            fs::write(&path, bytes).unwrap();
            assert!(damage(&path).is_some(), "{byte}");
        }
        for length in 0..whole.len() {
            fs::write(&path, &whole[..length]).unwrap();
            assert!(damage(&path).is_some(), "{length}");
        }
        let elsewhere = dir.path().join("trees/b");
        fs::write(&elsewhere, &whole).unwrap();
        assert_eq!(damage(&elsewhere), Some("its content does not match its seal"));
        fs::write(&path, &whole).unwrap();
        assert_eq!(damage(&path), None);
        File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(LONGEST + 1)
            .unwrap();
        assert_eq!(damage(&path), Some("it is longer than any such file"));
    }
}
