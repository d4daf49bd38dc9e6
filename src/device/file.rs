//! The device file on disk: content, then what is recorded about it.
//!
//! ```text
//! offset        size
//! 0 .. size           content
//! tail             8  magic "OCIFSDV3"
//! tail + 8         8  size of the content
//! tail + 16        8  number of spans, n
//! tail + 24       32  key of the layer's geometry
//! tail + 56       32  BLAKE3 of the 56 bytes before and the heads
//! tail + 128     8 n  heads: the device address at which each span begins
//! records       16 n  record of each span
//! checks           4  for each block of 4096 bytes of the content: checksum of the fragment that it begins with
//! end             16  tail (8), magic "OCIFSDV3"
//!
//! record: CRC-32C of the fragment that begins at the span's head inside a block (4), state (4: 0 absent, 1 present),
//!         seconds since the epoch when the span was last used (8)
//! ```
//! `tail` is the next multiple of 64 KiB behind the content. The records follow the heads, and the checks follow the
//! records. All numbers are little-endian. A checksum of 0 stands for a fragment that is not there.
//!
//! The file is never mapped. The kernel's page cache makes a write of one process visible to all others at once. A
//! full disk is an error of a write. A file that was cut short is an error of a read.
//!
//! The open-file-description lock of span i covers the byte `records + i`. The content of that byte does not matter
//! to the lock.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::fcntl::{FallocateFlags, PosixFadviseAdvice, fallocate, posix_fadvise};

use super::fragment::{Check, Seed};
use super::geometry::Geometry;
use super::handle::Handle;
use crate::os::{lock_bytes, unlock_bytes};
use crate::toc::DEVICE_BLOCK;

const MAGIC: &[u8; 8] = b"OCIFSDV3";
const HEADER: u64 = 128;
const DESCRIBED: usize = 56;
const HEAD: u64 = 8;
const RECORD: u64 = 16;
const CHECK: u64 = 4;
const END: u64 = 16;
/// Most bytes of content in a device. No file system takes a larger file, and sums of places do not overflow below
/// the bound.
const LARGEST: u64 = 1 << 60;
const PRESENT: u32 = 1;
/// Most blocks whose checksums are cleared by one write; for more, a hole is punched. A span of real files has fewer
/// blocks. A larger bound costs a larger buffer of zeros.
const CLEARED_BY_WRITING: u64 = 16 << 10;
/// Uses of a span that are closer together than this share one time stamp. A larger value makes the order of eviction
/// coarser. A smaller one makes hot reads write more often.
const TOUCH_SECONDS: u32 = 30;

/// What is recorded about a span.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Record {
    /// Checksum of the fragment that begins at the span's head, if the head lies inside a block.
    pub(super) head: u32,
    pub(super) present: bool,
    /// Seconds since the epoch.
    pub(super) last_used: u64,
}

impl Record {
    fn decode(bytes: &[u8]) -> Self {
        Self {
            head: u32_at(bytes, 0),
            present: u32_at(bytes, 4) == PRESENT,
            last_used: u64_at(bytes, 8),
        }
    }

    fn encode(self) -> [u8; RECORD as usize] {
        let mut bytes = [0; RECORD as usize];
        bytes[..4].copy_from_slice(&self.head.to_le_bytes());
        bytes[4..8].copy_from_slice(&u32::from(self.present).to_le_bytes());
        bytes[8..].copy_from_slice(&self.last_used.to_le_bytes());
        bytes
    }
}

/// An open device file.
#[derive(Debug)]
pub(super) struct DeviceFile {
    handle: Handle,
    geometry: Geometry,
    /// For each span, when this process last stamped its use, in seconds since `opened`, plus one.
    stamps: Vec<AtomicU32>,
    opened: u64,
}

impl DeviceFile {
    /// Writes everything behind the content of a file that no other process knows yet. Without `checks`, all spans
    /// are absent. With `checks`, all spans are present and have these checksums.
    pub(super) fn write(file: &File, geometry: &Geometry, checks: Option<&Checks>) -> io::Result<()> {
        if geometry.size > LARGEST {
            return Err(io::Error::new(
                io::ErrorKind::FileTooLarge,
                "the layer is larger than any file",
            ));
        }
        let mut bytes = header(geometry);
        let last_used = now();
        for span in 0..geometry.spans() {
            let record = Record {
                head: checks
                    .and_then(|checks| checks.heads.get(span as usize))
                    .copied()
                    .unwrap_or(0),
                present: checks.is_some(),
                last_used,
            };
            bytes.extend_from_slice(&record.encode());
        }
        file.write_all_at(&bytes, tail(geometry.size))?;
        file.set_len(length(geometry.size, geometry.spans()))?;
        for (block, run) in checks.iter().flat_map(|checks| checks.blocks()) {
            write_checks(file, geometry, block, run)?;
        }
        let end = [&tail(geometry.size).to_le_bytes()[..], MAGIC].concat();
        file.write_all_at(&end, length(geometry.size, geometry.spans()) - END)
    }

    /// Takes the file that was opened at `path`. None if the file is not of this geometry.
    pub(super) fn open(file: File, path: &Path, writable: bool, geometry: Geometry) -> io::Result<Option<Self>> {
        if geometry.size > LARGEST || file.metadata()?.len() != length(geometry.size, geometry.spans()) {
            return Ok(None);
        }
        let expected = header(&geometry);
        let mut found = vec![0; expected.len()];
        file.read_exact_at(&mut found, tail(geometry.size))?;
        if found != expected {
            return Ok(None);
        }
        Ok(Some(Self::new(Handle::new(file, path, writable)?, geometry)))
    }

    /// Takes the file that was opened at `path` without knowing its layer's index. None if the file is no device, or
    /// is damaged.
    pub(super) fn open_unknown(file: File, path: &Path) -> io::Result<Option<Self>> {
        let all = file.metadata()?.len();
        let mut end = [0; END as usize];
        let Some(end_at) = all.checked_sub(END) else {
            return Ok(None);
        };
        file.read_exact_at(&mut end, end_at)?;
        let tail = u64_at(&end, 0);
        if end[8..] != *MAGIC || tail > all - HEADER.min(all) {
            return Ok(None);
        }
        let mut head = [0; HEADER as usize];
        file.read_exact_at(&mut head, tail)?;
        let (size, spans) = (u64_at(&head, 8), u64_at(&head, 16));
        let spans = u32::try_from(spans).ok().filter(|_| size <= LARGEST);
        let Some(spans) = spans.filter(|&spans| length(size, spans) == all) else {
            return Ok(None);
        };
        // The heads take at most the length of the file.
        let mut heads = vec![0; (HEAD * u64::from(spans)) as usize];
        file.read_exact_at(&mut heads, tail + HEADER)?;
        let mut key = [0; 32];
        key.copy_from_slice(&head[24..DESCRIBED]);
        let geometry = Geometry {
            size,
            heads: heads.chunks_exact(HEAD as usize).map(|head| u64_at(head, 0)).collect(),
            key,
            // A caller that does not know the layer never reads content.
            seed: Seed::default(),
        };
        let ascending = geometry.heads.is_sorted() && geometry.heads.last().is_none_or(|&last| last <= size);
        let expected = header(&geometry);
        if !ascending || expected[..HEADER as usize] != head {
            return Ok(None);
        }
        Ok(Some(Self::new(Handle::new(file, path, true)?, geometry)))
    }

    fn new(handle: Handle, geometry: Geometry) -> Self {
        read_ahead(&handle, &geometry);
        Self {
            handle,
            stamps: geometry.heads.iter().map(|_| AtomicU32::new(0)).collect(),
            opened: now(),
            geometry,
        }
    }

    /// Returns the bytes that stand for some spans in locks.
    fn lock_range(&self, spans: &Range<u32>) -> Range<u64> {
        let byte = |span: u32| self.records() + u64::from(span);
        byte(spans.start)..byte(spans.end)
    }

    pub(super) fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Returns the open file. It stays open for as long as the caller has it.
    pub(super) fn file(&self) -> io::Result<Arc<File>> {
        self.handle.file()
    }

    /// Returns whether the file can be written.
    pub(super) fn is_writable(&self) -> bool {
        self.handle.is_writable()
    }

    /// Reads content into several buffers, one behind the other.
    pub(super) fn read_content(&self, file: &File, mut offset: u64, buffers: &mut [IoSliceMut<'_>]) -> io::Result<()> {
        let mut left = &mut buffers[..];
        IoSliceMut::advance_slices(&mut left, 0);
        while !left.is_empty() {
            match nix::sys::uio::preadv(file, left, offset as i64) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => {
                    offset += read as u64;
                    IoSliceMut::advance_slices(&mut left, read);
                }
                Err(nix::errno::Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Tells the kernel that the pages of a range need not be kept. The call is a hint, so a failure does not matter.
    pub(super) fn release_pages(&self, range: Range<u64>) {
        if let Ok(file) = self.handle.file() {
            let length = (range.end - range.start) as i64;
            let _ = posix_fadvise(
                &*file,
                range.start as i64,
                length,
                PosixFadviseAdvice::POSIX_FADV_DONTNEED,
            );
        }
    }

    fn records(&self) -> u64 {
        records(self.geometry.size, self.geometry.spans())
    }

    /// Returns the records of some spans.
    pub(super) fn read_records(&self, file: &File, spans: Range<u32>) -> io::Result<Vec<Record>> {
        let mut bytes = vec![0; RECORD as usize * spans.len()];
        let at = self.records() + RECORD * u64::from(spans.start);
        file.read_exact_at(&mut bytes, at)?;
        Ok(bytes.chunks_exact(RECORD as usize).map(Record::decode).collect())
    }

    /// Returns the record of a span.
    pub(super) fn record(&self, span: u32) -> io::Result<Record> {
        let mut bytes = [0; RECORD as usize];
        let at = self.records() + RECORD * u64::from(span);
        self.file()?.read_exact_at(&mut bytes, at)?;
        Ok(Record::decode(&bytes))
    }

    /// Records whether a span is present, the checksum of its head, and the present time as its last use.
    pub(super) fn write_record(&self, span: u32, present: bool, head: u32) -> io::Result<()> {
        let last_used = now();
        let record = Record {
            head,
            present,
            last_used,
        };
        let at = self.records() + RECORD * u64::from(span);
        self.file()?.write_all_at(&record.encode(), at)
    }

    /// Returns the recorded checksums of some blocks.
    pub(super) fn read_checks(&self, file: &File, blocks: Range<u64>) -> io::Result<Vec<u32>> {
        let count = usize::try_from(blocks.end.saturating_sub(blocks.start)).map_err(io::Error::other)?;
        let mut bytes = vec![0; CHECK as usize * count];
        let at = checks(self.geometry.size, self.geometry.spans()) + CHECK * blocks.start;
        file.read_exact_at(&mut bytes, at)?;
        Ok(bytes
            .chunks_exact(CHECK as usize)
            .map(|check| u32_at(check, 0))
            .collect())
    }

    /// Records checksums of consecutive blocks from `block` on.
    pub(super) fn write_checks(&self, block: u64, run: &[u32]) -> io::Result<()> {
        write_checks(&*self.file()?, &self.geometry, block, run)
    }

    /// Clears the checksums of some blocks.
    pub(super) fn clear_checks(&self, blocks: Range<u64>) -> io::Result<()> {
        let count = blocks.end.saturating_sub(blocks.start);
        if count <= CLEARED_BY_WRITING {
            return self.write_checks(blocks.start, &vec![0; count as usize]);
        }
        // Most of so long a span is a hole, and so are most of its checksums.
        let at = checks(self.geometry.size, self.geometry.spans()) + CHECK * blocks.start;
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        Ok(fallocate(&*self.file()?, mode, at as i64, (CHECK * count) as i64)?)
    }

    /// Returns the recorded checksum of one fragment.
    pub(super) fn check(&self, check: Check) -> io::Result<u32> {
        match check {
            Check::Head(span) => Ok(self.record(span)?.head),
            Check::Block(block) => Ok(self.read_checks(&*self.file()?, block..block + 1)?[0]),
        }
    }

    /// Records that a span was used. The record is a hint for eviction: a failure to write it is only logged.
    pub(super) fn touch(&self, span: u32) {
        let now = now();
        let since = u32::try_from(now.saturating_sub(self.opened)).unwrap_or(u32::MAX - 1) + 1;
        let stamp = &self.stamps[span as usize];
        let before = stamp.load(Ordering::Relaxed);
        if !self.is_writable() || (before != 0 && since - before.min(since) < TOUCH_SECONDS) {
            return;
        }
        stamp.store(since, Ordering::Relaxed);
        let at = self.records() + RECORD * u64::from(span) + 8;
        let noted = self.file().and_then(|file| file.write_all_at(&now.to_le_bytes(), at));
        if let Err(error) = noted {
            tracing::debug!(%error, span, "cannot note the use of a span");
        }
    }

    /// Takes the locks of those spans that are free: whole ranges where possible, else span by span.
    pub(super) fn try_lock(self: &Arc<Self>, ranges: &[Range<u32>]) -> io::Result<SpanLock> {
        let mut lock = SpanLock {
            device: self.clone(),
            file: self.file()?,
            ranges: Vec::with_capacity(ranges.len()),
        };
        for range in ranges {
            if lock_bytes(&lock.file, self.lock_range(range))? {
                lock.ranges.push(range.clone());
                continue;
            }
            for span in range.clone() {
                if lock_bytes(&lock.file, self.lock_range(&(span..span + 1)))? {
                    lock.ranges.push(span..span + 1);
                }
            }
        }
        Ok(lock)
    }

    /// Takes the lock of one span, if it is free.
    pub(super) fn try_lock_one(self: &Arc<Self>, span: u32) -> io::Result<Option<SpanLock>> {
        let lock = self.try_lock(std::slice::from_ref(&(span..span + 1)))?;
        Ok((!lock.ranges.is_empty()).then_some(lock))
    }
}

/// Asks the kernel to read all records and checksums in the background. Otherwise each first read of a place would
/// read one page of them. They are a thousandth of the content, and every read needs some. The call is a hint, so a
/// failure does not matter.
fn read_ahead(handle: &Handle, geometry: &Geometry) {
    let (start, end) = (tail(geometry.size), length(geometry.size, geometry.spans()));
    if let Ok(file) = handle.file() {
        let _ = posix_fadvise(
            &*file,
            start as i64,
            (end - start) as i64,
            PosixFadviseAdvice::POSIX_FADV_WILLNEED,
        );
    }
}

/// Checksums of a whole device.
#[derive(Debug, Default)]
pub(super) struct Checks {
    /// Checksum of the fragment at each span's head; 0 if the fragment does not begin inside a block.
    pub(super) heads: Vec<u32>,
    /// Checksums of blocks, in ascending order of the blocks.
    sums: Vec<u32>,
    /// Runs of consecutive blocks: the first block of each run, and where its checksum is in `sums`.
    runs: Vec<(u64, usize)>,
}

impl Checks {
    /// Adds a checksum. Checksums of blocks come in ascending order, and so do checksums of heads.
    pub(super) fn add(&mut self, check: Check, crc: u32) {
        match check {
            Check::Head(span) => {
                self.heads.resize(self.heads.len().max(span as usize + 1), 0);
                self.heads[span as usize] = crc;
            }
            Check::Block(block) => {
                let goes_on = |&(first, at): &(u64, usize)| first + (self.sums.len() - at) as u64 == block;
                if !self.runs.last().is_some_and(goes_on) {
                    self.runs.push((block, self.sums.len()));
                }
                self.sums.push(crc);
            }
        }
    }

    /// Returns the runs of consecutive blocks: the first block of each, and the checksums of the run.
    pub(super) fn blocks(&self) -> impl Iterator<Item = (u64, &[u32])> {
        let ends = self.runs.iter().skip(1).map(|&(_, at)| at).chain([self.sums.len()]);
        let runs = self.runs.iter().zip(ends);
        runs.map(|(&(first, at), end)| (first, &self.sums[at..end]))
    }
}

fn write_checks(file: &File, geometry: &Geometry, block: u64, run: &[u32]) -> io::Result<()> {
    let bytes: Vec<u8> = run.iter().flat_map(|check| check.to_le_bytes()).collect();
    let at = checks(geometry.size, geometry.spans()) + CHECK * block;
    file.write_all_at(&bytes, at)
}

fn header(geometry: &Geometry) -> Vec<u8> {
    let mut bytes = vec![0; HEADER as usize];
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..16].copy_from_slice(&geometry.size.to_le_bytes());
    bytes[16..24].copy_from_slice(&u64::from(geometry.spans()).to_le_bytes());
    bytes[24..DESCRIBED].copy_from_slice(&geometry.key);
    let heads = geometry.heads.iter().flat_map(|head| head.to_le_bytes());
    bytes.extend(heads);
    let mut hasher = blake3::Hasher::new();
    hasher.update(&bytes[..DESCRIBED]).update(&bytes[HEADER as usize..]);
    bytes[DESCRIBED..DESCRIBED + 32].copy_from_slice(hasher.finalize().as_bytes());
    bytes
}

fn tail(size: u64) -> u64 {
    size.next_multiple_of(64 << 10)
}

fn records(size: u64, spans: u32) -> u64 {
    tail(size) + HEADER + HEAD * u64::from(spans)
}

fn checks(size: u64, spans: u32) -> u64 {
    records(size, spans) + RECORD * u64::from(spans)
}

fn length(size: u64, spans: u32) -> u64 {
    checks(size, spans) + CHECK * (size / DEVICE_BLOCK) + END
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("a slice of four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("a slice of eight bytes"))
}

/// The right to fill or evict some spans. Dropping it gives the right back, and so does the kernel when the process
/// dies.
#[derive(Debug)]
pub struct SpanLock {
    device: Arc<DeviceFile>,
    /// A lock belongs to the file descriptor with which it was taken, and ends with it.
    file: Arc<File>,
    ranges: Vec<Range<u32>>,
}

impl SpanLock {
    /// Returns the locked spans, in ascending order.
    pub(super) fn spans(&self) -> impl Iterator<Item = u32> {
        self.ranges.iter().cloned().flatten()
    }

    /// Returns whether this is a lock on spans of `device`.
    pub(super) fn is_of(&self, device: &Arc<DeviceFile>) -> bool {
        Arc::ptr_eq(&self.device, device)
    }
}

impl Drop for SpanLock {
    fn drop(&mut self) {
        for range in &self.ranges {
            let unlocked = unlock_bytes(&self.file, self.device.lock_range(range));
            if let Err(error) = unlocked {
                tracing::error!(%error, "cannot release a span lock");
            }
        }
    }
}
