//! The first bytes of a blob that did not come whole, compressed as they came.
//!
//! The pass over a layer appends the bytes that arrive to `layers/ALG-HEX/partial`. It deletes the file when the
//! layer is indexed. If the pass is interrupted in any way, the next pass reads this file first and requests only the
//! rest from the registry. These bytes are verified only by the digests that the pass compares at its end. If the
//! digests do not match, the pass deletes the file.
//!
//! A process locks the file while it uses the file. Two processes therefore never write it, and no process deletes it
//! under a pass.

use std::fs::{self, File};
use std::io::{self, IoSlice, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use nix::fcntl::{Flock, FlockArg};

use super::{LayerDir, StoreError, private};
use crate::os::{clear_way, gone, is_at, is_foreign, on_disk, open_or_replace, open_regular};

/// The kept bytes of one layer, in use by a pass. Clones share them.
#[derive(Debug, Clone)]
pub struct Partial {
    path: Arc<Path>,
    /// Bytes that were there when the pass began.
    start: u64,
    state: Arc<Mutex<PartialState>>,
}

#[derive(Debug)]
struct PartialState {
    /// The file, as soon as there are bytes to keep.
    file: Option<Flock<File>>,
    len: u64,
    /// Whether no more bytes are kept.
    closed: bool,
}

impl Partial {
    /// Opens the bytes that are kept of a layer whose blob has `size` bytes. Returns none if the bytes are in use.
    pub fn open(dir: &LayerDir, size: u64) -> Result<Option<Self>, StoreError> {
        let path = dir.partial();
        let file = match open_regular(File::options().read(true).append(true), &path) {
            Ok(file) => Some(file),
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            Err(e) if is_foreign(&e) => {
                clear_way(&path).map_err(|e| StoreError::io("remove", &path, e))?;
                None
            }
            Err(e) => return Err(StoreError::io("open", &path, e)),
        };
        let mut file = match file.map(|file| lock(file, &path)) {
            None => None,
            Some(Some(file)) => Some(file),
            Some(None) => return Ok(None),
        };
        let metadata = file.as_ref().map(|file| file.metadata()).transpose();
        let mut len = metadata
            .map_err(|e| StoreError::io("read", &path, e))?
            .map_or(0, |m| m.len());
        if len > size {
            // The bytes are of another blob, or damaged.
            gone(fs::remove_file(&path)).map_err(|e| StoreError::io("remove", &path, e))?;
            (file, len) = (None, 0);
        }
        let state = PartialState {
            file,
            len,
            closed: false,
        };
        Ok(Some(Self {
            path: path.into(),
            start: len,
            state: Arc::new(Mutex::new(state)),
        }))
    }

    /// Returns the number of bytes that were there when the pass began.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Reads `len` of the kept bytes from `offset` on.
    pub fn read(&self, offset: u64, len: usize) -> io::Result<Bytes> {
        let file = {
            let state = self.state.lock().expect("no panic while locked");
            let file = state.file.as_ref().ok_or(io::ErrorKind::NotFound)?;
            file.try_clone()?
        };
        let mut bytes = vec![0; len];
        file.read_exact_at(&mut bytes, offset)?;
        Ok(bytes.into())
    }

    /// Appends bytes that begin at `offset` of the blob. Returns whether more may follow. After an error, which is
    /// logged, no more bytes may follow.
    pub fn append(&self, offset: u64, pieces: &[Bytes]) -> bool {
        let mut state = self.state.lock().expect("no panic while locked");
        if state.closed {
            return false;
        }
        if let Err(error) = state.append(&self.path, offset, pieces) {
            tracing::debug!(path = %self.path.display(), %error, "cannot keep more of a layer that is coming in");
            state.closed = true;
        }
        !state.closed
    }

    /// Deletes the kept bytes, and keeps no others from then on. Returns whether there were any and they are gone.
    pub(crate) fn discard(&self) -> bool {
        let mut state = self.state.lock().expect("no panic while locked");
        state.closed = true;
        let Some(file) = state.file.take() else {
            return false;
        };
        // If the file cannot be removed, empty it.
        let discarded = gone(fs::remove_file(&self.path)).or_else(|_| file.set_len(0));
        if let Err(error) = &discarded {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove what was kept of a layer");
        }
        discarded.is_ok()
    }
}

impl PartialState {
    fn append(&mut self, path: &Path, offset: u64, pieces: &[Bytes]) -> io::Result<()> {
        if self.file.is_none() {
            let file = open_or_replace(private().create(true).read(true).append(true), path)?;
            let file = lock(file, path).ok_or(io::ErrorKind::WouldBlock)?;
            self.len = file.metadata()?.len();
            self.file = Some(file);
        }
        let Some(file) = self.file.as_deref_mut().filter(|_| self.len == offset) else {
            return Err(io::Error::other("it holds something else"));
        };
        let mut slices: Vec<IoSlice<'_>> = pieces.iter().map(|piece| IoSlice::new(piece)).collect();
        let mut left = slices.as_mut_slice();
        while !left.is_empty() {
            match file.write_vectored(left) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    self.len += written as u64;
                    IoSlice::advance_slices(&mut left, written);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

/// Locks a file that is still at `path`. Returns none if the file has gone or is in use.
fn lock(file: File, path: &Path) -> Option<Flock<File>> {
    let locked = Flock::lock(file, FlockArg::LockExclusiveNonblock).ok()?;
    is_at(locked.as_fd(), path).then_some(locked)
}

impl LayerDir {
    /// Returns the path of the first bytes of a blob that did not come whole.
    pub fn partial(&self) -> PathBuf {
        self.path().join("partial")
    }

    /// Returns the bytes on disk of the first bytes of a blob that did not come whole.
    pub fn partial_usage(&self) -> u64 {
        fs::metadata(self.partial()).map_or(0, |m| on_disk(&m))
    }

    /// Returns when the last of the kept bytes came, in seconds since 1970. Returns none if no bytes are kept.
    pub(crate) fn partial_used(&self) -> Option<u64> {
        let modified = fs::metadata(self.partial()).and_then(|m| m.modified()).ok()?;
        Some(SystemTime::duration_since(&modified, UNIX_EPOCH).map_or(0, |d| d.as_secs()))
    }

    /// Deletes the kept bytes, unless they are in use. Returns whether they are gone.
    pub(crate) fn remove_partial(&self) -> Result<bool, StoreError> {
        let path = self.partial();
        let file = match open_regular(File::options().read(true), &path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(true),
            Err(e) if is_foreign(&e) => {
                clear_way(&path).map_err(|e| StoreError::io("remove", &path, e))?;
                return Ok(true);
            }
            Err(e) => return Err(StoreError::io("open", &path, e)),
        };
        let Some(_locked) = lock(file, &path) else {
            return Ok(false);
        };
        gone(fs::remove_file(&path)).map_err(|e| StoreError::io("remove", &path, e))?;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::Digest;
    use crate::store::Store;

    fn layer(dir: &Path) -> LayerDir {
        let layer = Store::open(dir).unwrap().layer(&Digest::of(b"x")).unwrap();
        drop(layer.lock_file().unwrap());
        layer
    }

    fn pieces(parts: &[&'static [u8]]) -> Vec<Bytes> {
        parts.iter().map(|part| Bytes::from_static(part)).collect()
    }

    #[test]
    fn bytes_are_appended_and_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let layer = layer(dir.path());
        let partial = Partial::open(&layer, 10).unwrap().unwrap();
        assert!(partial.start() == 0 && !layer.partial().exists());
        assert!(partial.append(0, &pieces(&[b"ab", b"", b"cd"])) && partial.append(4, &pieces(&[b"ef"])));
        assert!(Partial::open(&layer, 10).unwrap().is_none(), "it is in use");
        assert!(!layer.remove_partial().unwrap());
        drop(partial);
        let partial = Partial::open(&layer, 10).unwrap().unwrap();
        assert_eq!(partial.start(), 6);
        assert_eq!(partial.read(1, 4).unwrap(), &b"bcde"[..]);
        // Bytes of another place in the blob are not kept.
        assert!(!partial.append(7, &pieces(&[b"h"])) && !partial.append(6, &pieces(&[b"g"])));
        assert!(partial.discard() && !partial.discard());
        assert!(!layer.partial().exists() && layer.remove_partial().unwrap());
    }

    #[test]
    fn what_is_longer_than_the_blob_is_deleted() {
        let dir = tempfile::tempdir().unwrap();
        let layer = layer(dir.path());
        fs::write(layer.partial(), b"too long").unwrap();
        assert_eq!(Partial::open(&layer, 7).unwrap().unwrap().start(), 0);
        assert!(!layer.partial().exists());
    }

    #[test]
    fn a_pass_that_comes_second_keeps_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let layer = layer(dir.path());
        let [first, second] = [0; 2].map(|_| Partial::open(&layer, 10).unwrap().unwrap());
        assert!(first.append(0, &pieces(&[b"ab"])));
        assert!(!second.append(0, &pieces(&[b"ab"])));
        drop(first);
        assert_eq!(fs::read(layer.partial()).unwrap(), b"ab");
    }
}
