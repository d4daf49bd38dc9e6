//! A layer's data device on disk: one sparse file that fills as spans are decoded, with a checksum for every block.
//!
//! Several processes share the file without a daemon. These rules keep a wrong byte from being served:
//!
//! * A process that fills a span has checked its bytes against the span's digest. It records a CRC-32C for each
//!   *fragment* of the span (a block of 4096 bytes, cut where a span begins; see the module `geometry`). The checksum
//!   begins with the layer's digest and the fragment's place.
//! * Every read compares every fragment that it touches with the recorded checksum ([`DataDevice::read`]). It
//!   therefore finds any change of the file before a reader sees it, on this or any other machine: a flipped bit, a
//!   lost write, a page of zeros, an older copy, another layer's file.
//! * To fill a span, a process writes the bytes, then the checksums, then sets the span's record to present. To evict
//!   a span, it sets the record to absent, clears the checksums, then punches the hole. A reader that meets either
//!   half-way finds a checksum of 0. Otherwise it looks at the checksum again, and finds that it changed. The span
//!   then counts as absent.
//! * A process fills or evicts a span only while it holds the span's open-file-description lock
//!   ([`DataDevice::try_lock`]). The evictor uses a file descriptor of its own, so that it also conflicts with
//!   fillers of its own process. A process that breaks this rule costs a fetch and never a wrong byte.
//! * A reader drops a span whose fragment does not match (`DataDevice::drop_span`), and fetches it again.
//!
//! A file gets its name when it is complete: empty (no span is present) or whole (every span is present, written by a
//! pass that verified the layer). A device belongs to one span index. A device that cannot be written is only read.

mod budget;
mod checksum;
mod evict;
mod file;
mod fragment;
mod geometry;
mod handle;
mod joined;
mod verify;
mod writer;

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use budget::{CacheBudget, Evictions};
pub use evict::{Evicted, Scope, evict_to};
pub use file::SpanLock;
pub use verify::{Verified, verify};
pub use writer::DeviceWriter;

use checksum::{Checksummer, recorded};
use file::DeviceFile;
use fragment::{Check, Fragment, Seed};
use geometry::Geometry;
use joined::{Joined, footprint};

use crate::os::{clear_way, gone, is_denied, is_foreign, is_symlink, open_regular};
use crate::span::{Piece, SpanMap};
use crate::store::{LayerDir, Store};

/// How often a read looks again before a span counts as damaged. It is also how often opening a device is tried while
/// other processes make the device. A larger number reports real damage later. A smaller one reports damage in a span
/// that other processes evict and fill.
const LOOKS: usize = 3;

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
    /// Returns whether the disk, or the user's share of it, is full.
    pub fn is_full(&self) -> bool {
        matches!(
            self.source.kind(),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
        )
    }

    fn at(path: &Path) -> impl Fn(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self {
            path: path.clone(),
            source,
        }
    }
}

/// A sparse file with a layer's content, and with records and checksums of the content.
#[derive(Debug)]
pub struct DataDevice {
    file: Arc<DeviceFile>,
}

/// What a read of the device found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// The bytes, all of them checked.
    Bytes,
    /// Some of the bytes are not on the device.
    Absent,
    /// This span is on the device, but its bytes are not those that were written.
    Damaged(u32),
}

impl DataDevice {
    /// Opens the device of a layer with these spans. Makes an empty device if there is none. Replaces a device that
    /// has other spans, or is damaged as a whole, by an empty one. A device that may not be written is opened for
    /// reading, if it is there.
    pub fn open(store: &Store, dir: &LayerDir, spans: &dyn SpanMap) -> Result<Self, DeviceError> {
        let path = dir.data();
        Self::open_or_create(store, &path, Geometry::of(spans)).map_err(DeviceError::at(&path))
    }

    fn open_or_create(store: &Store, path: &Path, geometry: Geometry) -> io::Result<Self> {
        for _ in 0..LOOKS {
            let (file, writable) = match open_regular(File::options().read(true).write(true), path) {
                Err(e) if is_denied(&e) => (open_regular(File::options().read(true), path), false),
                opened => (opened, true),
            };
            match file {
                Err(e) if is_foreign(&e) => clear_way(path)?,
                Ok(file) => match DeviceFile::open(file, path, writable, geometry.clone())? {
                    Some(file) => return Ok(Self { file: Arc::new(file) }),
                    None => gone(std::fs::remove_file(path))?,
                },
                Err(e) if e.kind() == io::ErrorKind::NotFound => {
                    if is_symlink(path) {
                        // The link leads nowhere, and is in the way.
                        clear_way(path)?;
                    }
                    let draft = store.draft().map_err(io::Error::other)?;
                    DeviceFile::write(draft.file(), &geometry, None)?;
                    draft.publish_new(path)?;
                }
                Err(e) => return Err(e),
            }
        }
        Err(io::Error::other("something else keeps coming in its place"))
    }

    /// Starts a file for a pass that writes the whole layer. The file becomes the layer's device in
    /// [`DeviceWriter::finish`].
    pub fn create(store: &Store, dir: &LayerDir) -> Result<DeviceWriter, DeviceError> {
        let path = dir.data();
        let draft = store.layer_draft(dir).map_err(io::Error::other);
        let seed = dir.digest().as_ref().map(Seed::of).unwrap_or_default();
        Ok(DeviceWriter::new(draft.map_err(DeviceError::at(&path))?, path, seed))
    }

    /// Returns whether spans can be written to the device.
    pub(crate) fn is_writable(&self) -> bool {
        self.file.is_writable()
    }

    /// Returns whether the span is recorded as present.
    pub fn is_present(&self, span: u32) -> io::Result<bool> {
        Ok(self.file.record(span)?.present)
    }

    /// Returns whether each of some spans is recorded as present.
    pub fn present(&self, spans: Range<u32>) -> io::Result<Vec<bool>> {
        let records = self.file.read_records(&*self.file.file()?, spans)?;
        Ok(records.into_iter().map(|record| record.present).collect())
    }

    /// Fills `buf` with checked bytes from device offset `offset`. Unless the result is [`Found::Bytes`], `buf` is
    /// garbage. `has_content` says whether a range of the device has any content. A range without content reads as
    /// zeros.
    pub fn read(&self, offset: u64, buf: &mut [u8], has_content: impl Fn(Range<u64>) -> bool) -> io::Result<Found> {
        let found = self.read_unnoticed(offset, buf, &has_content)?;
        if found == Found::Bytes {
            for span in self.file.geometry().spans_of(offset..offset + buf.len() as u64) {
                self.file.touch(span);
            }
        }
        Ok(found)
    }

    /// Tells the kernel that the pages of a range need not be kept. Pages that are not written to the disk yet stay.
    pub fn release_pages(&self, range: Range<u64>) {
        self.file.release_pages(range);
    }

    /// Reads like [`DataDevice::read`], but does not count as a use of the spans.
    fn read_unnoticed(
        &self,
        offset: u64,
        buf: &mut [u8],
        has_content: &impl Fn(Range<u64>) -> bool,
    ) -> io::Result<Found> {
        let mut found = self.read_once(offset, buf, has_content)?;
        for _ in 0..LOOKS {
            // A span that another process evicted and filled again in the meantime looks damaged once.
            if !matches!(found, Found::Damaged(_)) {
                break;
            }
            found = self.read_once(offset, buf, has_content)?;
        }
        Ok(found)
    }

    fn read_once(&self, offset: u64, buf: &mut [u8], has_content: &impl Fn(Range<u64>) -> bool) -> io::Result<Found> {
        let end = offset + buf.len() as u64;
        let geometry = self.file.geometry();
        let fragments: Vec<Fragment> = geometry.fragments(offset..end).collect();
        let (Some(first), Some(last)) = (fragments.first(), fragments.last()) else {
            buf.fill(0);
            return Ok(Found::Bytes);
        };
        let file = self.file.file()?;
        let expected = self.expected(&file, &fragments)?;
        // Read the fragments at both ends as a whole, since only whole fragments can be checked.
        let mut before = vec![0; (offset - first.range.start) as usize];
        let mut behind = vec![0; last.range.end.saturating_sub(end) as usize];
        let beyond = end.saturating_sub(last.range.end) as usize;
        let (content, rest) = buf.split_at_mut(buf.len() - beyond);
        rest.fill(0);
        let start = first.range.start;
        let mut buffers = [&mut before[..], &mut *content, &mut behind[..]].map(IoSliceMut::new);
        self.file.read_content(&file, start, &mut buffers)?;
        let mut bytes = Buffers([&before, content, &behind]);
        let mut gaps = Vec::new();
        for (fragment, expected) in fragments.iter().zip(expected) {
            let length = (fragment.range.end - fragment.range.start) as usize;
            let crc = recorded(bytes.checksum(geometry.seed.start(fragment.check), length));
            if expected == crc {
                continue;
            }
            if expected != 0 || has_content(fragment.range.clone()) {
                return self.mismatch(fragment, expected);
            }
            gaps.push(fragment.range.clone());
        }
        for gap in gaps {
            let within = |address: u64| (address.clamp(offset, end) - offset) as usize;
            buf[within(gap.start)..within(gap.end)].fill(0);
        }
        Ok(Found::Bytes)
    }

    /// Returns what it means that a fragment of content does not match `expected`. Another process may be filling or
    /// evicting its span.
    fn mismatch(&self, fragment: &Fragment, expected: u32) -> io::Result<Found> {
        let owner = self.file.geometry().owner(fragment);
        let present = self.file.record(owner)?.present;
        // An evictor clears the record first, and a filler writes it last. A span that is recorded as present should
        // therefore be here.
        let stays = self.file.check(fragment.check)? == expected && (present || expected != 0);
        Ok(if stays { Found::Damaged(owner) } else { Found::Absent })
    }

    /// Returns the recorded checksums of consecutive fragments.
    fn expected(&self, file: &File, fragments: &[Fragment]) -> io::Result<Vec<u32>> {
        let blocks = || {
            fragments.iter().filter_map(|fragment| match fragment.check {
                Check::Block(block) => Some(block),
                Check::Head(_) => None,
            })
        };
        let heads = || {
            fragments.iter().filter_map(|fragment| match fragment.check {
                Check::Head(span) => Some(span),
                Check::Block(_) => None,
            })
        };
        let (first_block, first_head) = (blocks().next().unwrap_or(0), heads().next().unwrap_or(0));
        let of_blocks = self.file.read_checks(
            file,
            first_block..blocks().next_back().map_or(first_block, |last| last + 1),
        )?;
        let of_heads = match heads().next_back() {
            Some(last) => self.file.read_records(file, first_head..last + 1)?,
            None => Vec::new(),
        };
        let expected = fragments.iter().map(|fragment| match fragment.check {
            Check::Block(block) => of_blocks[(block - first_block) as usize],
            Check::Head(span) => of_heads[(span - first_head) as usize].head,
        });
        Ok(expected.collect())
    }

    /// Takes the locks of those of `spans` (ascending) that no other process fills or evicts at the moment. Only the
    /// holder of a span's lock may fill the span. Also returns the spans whose locks it got. The spans of two holders
    /// in one process must not overlap, because the kernel takes both for one holder.
    pub fn try_lock(&self, spans: &[u32]) -> io::Result<(SpanLock, Vec<u32>)> {
        let mut ranges: Vec<Range<u32>> = Vec::new();
        for &span in spans {
            match ranges.last_mut() {
                Some(last) if last.end == span => last.end += 1,
                _ => ranges.push(span..span + 1),
            }
        }
        let lock = self.file.try_lock(&ranges)?;
        let held = lock.spans().collect();
        Ok((lock, held))
    }

    /// Returns the bytes on disk that the content of a span takes, in whole blocks. The pieces ascend.
    pub(crate) fn footprint(pieces: &[Piece]) -> u64 {
        footprint(pieces.iter().map(|piece| (piece.device, piece.len)))
    }

    /// Writes a span's content and marks the span present. `bytes` are the span's uncompressed bytes, verified.
    /// `pieces` says which of them are content, and where that goes. Returns false if the lock is one of another
    /// file, which replaced this file or was replaced by it.
    pub fn fill(&self, lock: &SpanLock, span: u32, pieces: &[Piece], bytes: &[u8]) -> io::Result<bool> {
        if !lock.is_of(&self.file) {
            return Ok(false);
        }
        if self.is_present(span)? {
            return Ok(true);
        }
        let mut checks = file::Checks::default();
        let mut head = 0;
        let mut done = |check, crc| match check {
            Check::Head(_) => head = crc,
            Check::Block(_) => checks.add(check, crc),
        };
        let mut summer = Checksummer::new(self.file.geometry().seed);
        summer.span(span);
        let (file, mut joined) = (self.file.file()?, Joined::default());
        for piece in pieces {
            let content = &bytes[piece.span as usize..(piece.span + piece.len) as usize];
            summer.content(piece.device, content, &mut done);
            joined.add(&file, piece.device, content)?;
        }
        joined.write(&file)?;
        summer.close(self.file.geometry().range(span).end, &mut done);
        for (block, run) in checks.blocks() {
            self.file.write_checks(block, run)?;
        }
        self.file.write_record(span, true, head)?;
        Ok(true)
    }

    /// Marks a damaged span absent, so that a reader fetches it again. The caller holds the span's lock. Does nothing
    /// if the lock is one of another file.
    pub(crate) fn drop_span(&self, lock: &SpanLock, span: u32) -> io::Result<()> {
        match lock.is_of(&self.file) {
            true => evict::clear(&self.file, span),
            false => Ok(()),
        }
    }
}

/// Bytes in three buffers, one behind the other.
struct Buffers<'a>([&'a [u8]; 3]);

impl Buffers<'_> {
    /// Returns the CRC-32C of the next `count` bytes, continued from `crc`.
    fn checksum(&mut self, mut crc: u32, mut count: usize) -> u32 {
        for part in &mut self.0 {
            let (now, later) = part.split_at(part.len().min(count));
            crc = crc32c::crc32c_append(crc, now);
            count -= now.len();
            *part = later;
        }
        crc
    }
}

#[cfg(test)]
mod tests;
