//! A layer's data device on disk: one sparse file that fills as spans are decoded, and at its end the map of which spans it
//! holds.
//!
//! ```text
//! 0 .. size        content: the layer's data device
//! tail .. end      presence map, from the next multiple of 64 KiB on
//! ```
//! Content and map are one file, so that neither can be lost, replaced or left behind without the other. A file gets its name
//! when it is complete: empty (nothing present) or whole (everything present, written by a pass that verified the layer).
//!
//! Several processes share it without a daemon. The rules that keep a wrong byte from being served:
//!
//! * A span is *filled* or *evicted* only while holding its open-file-description lock ([`DataDevice::try_lock`]); the evictor uses
//!   a descriptor of its own, so it conflicts with fillers of its own process too.
//! * Fill: write the bytes, then set the record to present. Evict: set the record to absent with the next generation, then
//!   punch the hole.
//! * Read: look at the record, read the bytes, look again. If it is present with the same generation both times, no hole
//!   was punched before the bytes were read ([`DataDevice::read`]).
//! * After a reboot, bytes may be lost whose records were not (or the other way round): all present records become
//!   *unchecked*, and the checksum in the record decides when the span is next used ([`DataDevice::check`]).
//!
//! A device belongs to one span index: the record of span i is about the content bytes in the tar range of span i.

mod budget;
mod evict;
mod presence;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

pub use budget::CacheBudget;
pub use evict::{Evicted, evict_to};
pub use presence::SpanLock;
use presence::{PresenceMap, Shape, State};

use crate::index::SpanIndex;
use crate::store::{Draft, LayerDir, Store, gone};

/// Why the data device cannot be used. The layer goes on without it.
#[derive(Debug, thiserror::Error)]
#[error("data device {}: {source}", path.display())]
pub struct DeviceError {
    /// The file.
    path: PathBuf,
    /// The system's answer.
    source: io::Error,
}

impl DeviceError {
    fn at(path: &Path) -> impl Fn(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self {
            path: path.clone(),
            source,
        }
    }
}

/// A sparse file with a layer's content and its presence map.
#[derive(Debug)]
pub struct DataDevice {
    presence: Arc<PresenceMap>,
}

/// Where one run of a span's content lies: bytes `span` of the span are bytes `device..` of the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Offset in the span's uncompressed bytes.
    pub span: u64,
    /// Offset in the data device.
    pub device: u64,
    /// Bytes.
    pub len: u64,
}

impl DataDevice {
    /// Opens the device of a layer with this index and `size` bytes of content; makes an empty one if there is none, or one
    /// that is not of this index.
    pub fn open(store: &Store, dir: &LayerDir, index: &SpanIndex, size: u64) -> Result<Self, DeviceError> {
        let path = dir.data();
        Self::open_or_create(store, &path, shape(index, size)).map_err(DeviceError::at(&path))
    }

    fn open_or_create(store: &Store, path: &Path, shape: Shape) -> io::Result<Self> {
        loop {
            match File::options().read(true).write(true).open(path) {
                Ok(file) => match PresenceMap::open(file, shape)? {
                    Some(presence) => {
                        return Ok(Self {
                            presence: Arc::new(presence),
                        });
                    }
                    None => gone(std::fs::remove_file(path))?,
                },
                Err(e) if e.kind() == io::ErrorKind::NotFound => {
                    let draft = store.draft().map_err(io::Error::other)?;
                    PresenceMap::write(draft.file(), shape, None)?;
                    draft.publish_new(path)?;
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// Starts a file for a pass that writes the whole layer. Nobody sees it before [`DeviceWriter::finish`].
    pub fn create(store: &Store, dir: &LayerDir) -> Result<DeviceWriter, DeviceError> {
        let path = dir.data();
        let draft = store
            .draft()
            .map_err(io::Error::other)
            .map_err(DeviceError::at(&path))?;
        Ok(DeviceWriter {
            draft,
            start: 0,
            buffer: Vec::new(),
            path,
        })
    }

    /// Whether the span can be read from the device right now (an unchecked one cannot, yet).
    pub fn is_present(&self, span: u32) -> bool {
        self.presence.get(span).state == State::Present
    }

    /// Whether the span is there but was not checked since the machine started.
    pub fn is_unchecked(&self, span: u32) -> bool {
        self.presence.get(span).state == State::Unchecked
    }

    /// Whether the span is neither present nor unchecked.
    pub fn is_absent(&self, span: u32) -> bool {
        self.presence.get(span).state == State::Absent
    }

    /// Fills `buf` from device offset `offset` if all `spans` are present throughout; false if any is not, then `buf` is garbage.
    pub fn read(&self, spans: Range<u32>, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        // Each record is loaded once in a round: state and generation belong together. Generations only grow, so an equal sum
        // means that none changed.
        let look = || {
            spans.clone().try_fold(0, |sum, span| {
                let record = self.presence.get(span);
                (record.state == State::Present).then_some(sum + u64::from(record.generation))
            })
        };
        let Some(before) = look() else { return Ok(false) };
        self.presence.file().read_exact_at(buf, offset)?;
        // The second look must not be done before the bytes were read.
        fence(Ordering::SeqCst);
        if look() != Some(before) {
            return Ok(false);
        }
        for span in spans {
            self.presence.touch(span);
        }
        Ok(true)
    }

    /// Takes the locks of those of `spans` (ascending) that nobody else fills or evicts at the moment; only their holder may
    /// fill them. Returns the spans it got as well. Within a process no two holders may overlap: the kernel takes them for one.
    pub fn try_lock(&self, spans: &[u32]) -> io::Result<(SpanLock, Vec<u32>)> {
        let mut ranges: Vec<Range<u32>> = Vec::new();
        for &span in spans {
            match ranges.last_mut() {
                Some(last) if last.end == span => last.end += 1,
                _ => ranges.push(span..span + 1),
            }
        }
        let lock = self.presence.try_lock(&ranges)?;
        let held = lock.spans().collect();
        Ok((lock, held))
    }

    /// Writes a span's content and marks it present. `bytes` are the span's uncompressed bytes, verified; `pieces` says which
    /// of them are content, and where it goes.
    pub fn fill(&self, _lock: &SpanLock, span: u32, pieces: &[Piece], bytes: &[u8]) -> io::Result<()> {
        if self.presence.get(span).state == State::Present {
            return Ok(());
        }
        let mut crc = crc32fast::Hasher::new();
        for piece in pieces {
            let content = &bytes[piece.span as usize..(piece.span + piece.len) as usize];
            crc.update(content);
            self.presence.file().write_all_at(content, piece.device)?;
        }
        self.presence.set_present(span, crc.finalize());
        Ok(())
    }

    /// Decides about an unchecked span by its checksum. Afterwards it is present or absent.
    pub fn check(&self, span: u32, pieces: &[Piece]) -> io::Result<()> {
        let record = self.presence.get(span);
        if record.state != State::Unchecked {
            return Ok(());
        }
        let mut crc = crc32fast::Hasher::new();
        let mut buffer = Vec::new();
        for piece in pieces {
            buffer.resize(piece.len as usize, 0);
            self.presence.file().read_exact_at(&mut buffer, piece.device)?;
            crc.update(&buffer);
        }
        self.presence.settle(span, record, crc.finalize() == record.crc);
        Ok(())
    }
}

/// Bytes collected before one write: large enough that a layer of small files costs few system calls.
const WRITE_BUFFER: usize = 1 << 20;

/// Writes a whole device in order, joining small files into large writes.
#[derive(Debug)]
pub struct DeviceWriter {
    draft: Draft,
    start: u64,
    buffer: Vec<u8>,
    path: PathBuf,
}

impl DeviceWriter {
    /// Adds content at a device offset not below any earlier one.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        let end = self.start + self.buffer.len() as u64;
        let gap = offset.saturating_sub(end);
        // Padding between two files is below a block and zero anyway; anything longer is a hole worth keeping.
        if self.buffer.is_empty() || gap >= crate::toc::DEVICE_BLOCK {
            self.flush()?;
            self.start = offset;
        } else {
            self.buffer.resize(self.buffer.len() + gap as usize, 0);
        }
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= WRITE_BUFFER {
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), DeviceError> {
        let written = self.draft.file().write_all_at(&self.buffer, self.start);
        written.map_err(DeviceError::at(&self.path))?;
        self.start += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }

    /// Publishes a device whose every span was written; `crcs` are the checksums of the spans' content, in order. It takes the
    /// place of an older one, which whoever has it open keeps.
    pub fn finish(self, index: &SpanIndex, size: u64, crcs: &[u32]) -> Result<DataDevice, DeviceError> {
        self.finish_as(shape(index, size), crcs)
    }

    fn finish_as(mut self, shape: Shape, crcs: &[u32]) -> Result<DataDevice, DeviceError> {
        self.flush()?;
        let path = self.path.clone();
        let publish = || {
            PresenceMap::write(self.draft.file(), shape, Some(crcs))?;
            let file = self.draft.publish(&path)?;
            PresenceMap::open(file, shape)?.ok_or_else(|| io::Error::other("it changed while it was written"))
        };
        let presence = Arc::new(publish().map_err(DeviceError::at(&path))?);
        Ok(DataDevice { presence })
    }
}

fn shape(index: &SpanIndex, size: u64) -> Shape {
    let mut hasher = blake3::Hasher::new();
    for span in index.spans() {
        hasher.update(&index.tar_range(span).start.to_le_bytes());
        hasher.update(index.digest(span));
    }
    let mut key = [0; 16];
    key.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    Shape {
        size,
        spans: index.len() as u32,
        key,
    }
}

#[cfg(test)]
mod tests;
