//! The presence map: records at the end of a device file, mapped and shared by all processes that use the layer.
//!
//! ```text
//! offset     size
//!      0        8  magic "OCIFSDV1"
//!      8        8  number of spans
//!     16       16  id of the boot (kernel.random.boot_id) in which the records are to be believed
//!     32       16  key of the span index that the records are about
//!     48       16  zero
//!     64     16*i  record of span i: word 0, word 1
//!
//! word 0: bits 0-31 CRC-32 of the span's content bytes, 32-61 generation, 62-63 state (0 absent, 1 present, 2 unchecked)
//! word 1: seconds since the epoch when the span was last used
//! ```
//! Offsets count from [`Shape::tail`]. The open-file-description lock of span i covers the byte `64 + i` from there; locks do
//! not care what the bytes say.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use memmap2::{MmapOptions, MmapRaw};
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

const MAGIC: &[u8; 8] = b"OCIFSDV1";
const HEADER: u64 = 64;
const RECORD: u64 = 16;
/// Uses closer together than this share one time stamp, so that hot reads do not dirty the map.
const TOUCH_SECONDS: u64 = 30;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Absent,
    Present,
    Unchecked,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) state: State,
    pub(super) generation: u32,
    pub(super) crc: u32,
}

const GENERATION_MASK: u32 = (1 << 30) - 1;

impl Record {
    fn unpack(word: u64) -> Self {
        Self {
            state: match word >> 62 {
                1 => State::Present,
                2 => State::Unchecked,
                _ => State::Absent,
            },
            generation: (word >> 32) as u32 & GENERATION_MASK,
            crc: word as u32,
        }
    }

    fn pack(self) -> u64 {
        let state = match self.state {
            State::Absent => 0,
            State::Present => 1,
            State::Unchecked => 2,
        };
        state << 62 | u64::from(self.generation & GENERATION_MASK) << 32 | u64::from(self.crc)
    }
}

/// What tells the device of one layer, indexed one way, from all others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    /// Bytes of content.
    pub(super) size: u64,
    pub(super) spans: u32,
    /// Hash over the places and digests of all spans.
    pub(super) key: [u8; 16],
}

impl Shape {
    /// Where the map begins: at a border of the largest pages there are, so that it can be mapped.
    pub(super) fn tail(&self) -> u64 {
        self.size.next_multiple_of(64 << 10)
    }

    fn length(&self) -> u64 {
        self.tail() + HEADER + RECORD * u64::from(self.spans)
    }

    fn header(&self, boot: [u8; 16]) -> [u8; HEADER as usize] {
        let mut header = [0; HEADER as usize];
        header[..8].copy_from_slice(MAGIC);
        header[8..16].copy_from_slice(&u64::from(self.spans).to_le_bytes());
        header[16..32].copy_from_slice(&boot);
        header[32..48].copy_from_slice(&self.key);
        header
    }
}

#[derive(Debug)]
pub(super) struct PresenceMap {
    file: File,
    map: MmapRaw,
    shape: Shape,
}

impl PresenceMap {
    /// Writes the map of a file that nobody knows yet: all spans present with these checksums, or all absent without.
    pub(super) fn write(file: &File, shape: Shape, crcs: Option<&[u32]>) -> io::Result<()> {
        let mut map = shape.header(boot_id()?).to_vec();
        for span in 0..shape.spans as usize {
            let record = Record {
                state: if crcs.is_some() { State::Present } else { State::Absent },
                generation: 0,
                crc: crcs.map_or(0, |crcs| crcs[span]),
            };
            map.extend_from_slice(&record.pack().to_le_bytes());
            map.extend_from_slice(&now().to_le_bytes());
        }
        // Written, not only sized: touching a page of a mapped file that a full disk has no block for is fatal (SIGBUS).
        file.write_all_at(&map, shape.tail())
    }

    /// Opens the map in `file`; none if it is not of this shape.
    pub(super) fn open(file: File, shape: Shape) -> io::Result<Option<Self>> {
        if file.metadata()?.len() != shape.length() {
            return Ok(None);
        }
        let mut header = [0; HEADER as usize];
        file.read_exact_at(&mut header, shape.tail())?;
        let mut found = [0; 16];
        found.copy_from_slice(&header[16..32]);
        if header != shape.header(found) {
            return Ok(None);
        }
        let map = MmapOptions::new()
            .offset(shape.tail())
            .len((shape.length() - shape.tail()) as usize)
            .map_raw(&file)?;
        let boot = boot_id()?;
        let presence = Self { file, map, shape };
        if found != boot {
            // Every process that sees the old id does this before it reads a record, whoever is the first to write the new id.
            presence.distrust();
            presence.file.write_all_at(&boot, shape.tail() + 16)?;
        }
        Ok(Some(presence))
    }

    /// The file, content and map.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// The machine was restarted since the records were made: any of them may be older or newer than the data.
    fn distrust(&self) {
        for span in 0..self.shape.spans {
            let record = self.get(span);
            if record.state == State::Present {
                let state = State::Unchecked;
                self.exchange(span, record, Record { state, ..record });
            }
        }
    }

    pub(super) fn len(&self) -> u32 {
        self.shape.spans
    }

    #[allow(unsafe_code)]
    fn word(&self, span: u32, word: usize) -> &AtomicU64 {
        assert!(span < self.shape.spans, "span {span} of {}", self.shape.spans);
        let offset = HEADER as usize + RECORD as usize * span as usize + 8 * word;
        // SAFETY: the map is HEADER + RECORD * spans bytes long (so is the file behind it), starts at a page boundary, and HEADER and RECORD are multiples of 8, so the word is in bounds and aligned; it lives as long as `self.map`.
        // All access to it, from every process, is atomic. Nobody truncates the file.
        unsafe { AtomicU64::from_ptr(self.map.as_mut_ptr().add(offset).cast()) }
    }

    pub(super) fn get(&self, span: u32) -> Record {
        Record::unpack(self.word(span, 0).load(Ordering::SeqCst))
    }

    fn exchange(&self, span: u32, old: Record, new: Record) -> bool {
        let word = self.word(span, 0);
        word.compare_exchange(old.pack(), new.pack(), Ordering::SeqCst, Ordering::SeqCst)
            .is_ok()
    }

    pub(super) fn set_present(&self, span: u32, crc: u32) {
        let record = Record {
            state: State::Present,
            crc,
            ..self.get(span)
        };
        self.word(span, 0).store(record.pack(), Ordering::SeqCst);
        self.touch(span);
    }

    /// Ends the unchecked state of `record`, unless somebody else did.
    pub(super) fn settle(&self, span: u32, record: Record, good: bool) {
        let new = if good {
            Record {
                state: State::Present,
                ..record
            }
        } else {
            absent_after(record)
        };
        self.exchange(span, record, new);
    }

    /// Marks a span absent; false if it changed in the meantime. The caller holds the span's lock.
    pub(super) fn evict(&self, span: u32) -> bool {
        let record = self.get(span);
        record.state != State::Absent && self.exchange(span, record, absent_after(record))
    }

    pub(super) fn touch(&self, span: u32) {
        let now = now();
        let word = self.word(span, 1);
        if now.saturating_sub(word.load(Ordering::Relaxed)) >= TOUCH_SECONDS {
            word.store(now, Ordering::Relaxed);
        }
    }

    pub(super) fn last_used(&self, span: u32) -> u64 {
        self.word(span, 1).load(Ordering::Relaxed)
    }

    /// The lock of one span if it is free.
    pub(super) fn try_lock_one(self: &Arc<Self>, span: u32) -> io::Result<Option<SpanLock>> {
        let lock = self.try_lock(std::slice::from_ref(&(span..span + 1)))?;
        Ok((!lock.ranges.is_empty()).then_some(lock))
    }

    /// The locks of those spans that are free: whole ranges where possible, span by span where somebody holds part of one.
    pub(super) fn try_lock(self: &Arc<Self>, ranges: &[Range<u32>]) -> io::Result<SpanLock> {
        let mut lock = SpanLock {
            presence: self.clone(),
            ranges: Vec::with_capacity(ranges.len()),
        };
        for range in ranges {
            if lock_range(self, range, LockAction::Try)? {
                lock.ranges.push(range.clone());
                continue;
            }
            for span in range.clone() {
                if lock_range(self, &(span..span + 1), LockAction::Try)? {
                    lock.ranges.push(span..span + 1);
                }
            }
        }
        Ok(lock)
    }
}

fn absent_after(record: Record) -> Record {
    Record {
        state: State::Absent,
        generation: record.generation.wrapping_add(1) & GENERATION_MASK,
        crc: 0,
    }
}

/// What to do with the open-file-description lock of some spans.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LockAction {
    Try,
    Release,
}

/// Whether it was done: false if somebody else has part of it.
fn lock_range(presence: &PresenceMap, spans: &Range<u32>, action: LockAction) -> io::Result<bool> {
    let kind = match action {
        LockAction::Try => libc::F_WRLCK,
        LockAction::Release => libc::F_UNLCK,
    };
    let lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: (presence.shape.tail() + HEADER) as i64 + i64::from(spans.start),
        l_len: i64::from(spans.end) - i64::from(spans.start),
        l_pid: 0,
    };
    match fcntl(&presence.file, FcntlArg::F_OFD_SETLK(&lock)) {
        Ok(_) => Ok(true),
        Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EACCES) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// The right to fill or evict some spans; given back when dropped, also by the kernel when the process dies.
#[derive(Debug)]
pub struct SpanLock {
    presence: Arc<PresenceMap>,
    ranges: Vec<Range<u32>>,
}

impl SpanLock {
    /// The spans locked, in ascending order.
    pub(super) fn spans(&self) -> impl Iterator<Item = u32> {
        self.ranges.iter().cloned().flatten()
    }
}

impl Drop for SpanLock {
    fn drop(&mut self) {
        for range in &self.ranges {
            let unlocked = lock_range(&self.presence, range, LockAction::Release);
            if let Err(error) = unlocked {
                tracing::error!(%error, "cannot release a span lock");
            }
        }
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

fn boot_id() -> io::Result<[u8; 16]> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let digits = text.trim().replace('-', "");
    let id = u128::from_str_radix(&digits, 16).map_err(|_| io::Error::other("boot_id is not hex"))?;
    Ok(id.to_be_bytes())
}
