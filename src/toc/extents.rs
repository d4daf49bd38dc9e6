//! The extent table: where a layer's content lies, in a form that is used without decoding.
//!
//! ```text
//!  0  magic "ocifsEXT"
//!  8  version u32 = 1, then u32 = 0
//! 16  number of extents u64
//! 24  device size u64
//! 32  extents, 24 bytes each: tar offset u64, device offset u64, length u64
//!     BLAKE3 of all bytes before, 32 bytes
//! ```
//! All numbers are little-endian. Extents ascend both in the tar and in the device, and do not overlap in either.
//! [`ExtentTable::open`] checks the order once. Lookups then find records by binary search in the bytes themselves,
//! which can be a memory map.

use std::io::{self, Write};
use std::ops::Range;

use super::{DEVICE_BLOCK, Extent, Toc, TocError};

const MAGIC: &[u8; 8] = b"ocifsEXT";
const VERSION: u32 = 1;
const HEAD: usize = 32;
const RECORD: usize = 24;
const HASH: usize = 32;
const WHAT: &str = "extent table";

/// The extents of one layer, in tar order, which is also device order.
#[derive(Debug, Clone)]
pub struct ExtentTable<B = Vec<u8>> {
    /// The encoded table, already checked.
    bytes: B,
}

impl Toc {
    /// Returns the extents alone, as the mount uses them.
    pub fn extent_table(&self) -> ExtentTable {
        ExtentTable::new(&self.extents, self.device_size)
    }
}

impl ExtentTable {
    /// Makes a table of `extents`, which must be in order, in a device of `device_size` bytes.
    pub(super) fn new(extents: &[Extent], device_size: u64) -> Self {
        let mut bytes = Vec::with_capacity(HEAD + extents.len() * RECORD + HASH);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&(extents.len() as u64).to_le_bytes());
        bytes.extend_from_slice(&device_size.to_le_bytes());
        for extent in extents {
            for number in [extent.tar, extent.device, extent.len] {
                bytes.extend_from_slice(&number.to_le_bytes());
            }
        }
        let hash = blake3::hash(&bytes);
        bytes.extend_from_slice(hash.as_bytes());
        Self { bytes }
    }
}

impl<B: AsRef<[u8]>> ExtentTable<B> {
    /// Uses the bytes of [`ExtentTable::encode`] in place. Checks all of them first: hash and order.
    pub fn open(bytes: B) -> Result<Self, TocError> {
        let all = bytes.as_ref();
        let head = all.first_chunk::<HEAD>().ok_or(TocError::Format { what: WHAT })?;
        if &head[..8] != MAGIC || head[8..12] != VERSION.to_le_bytes() {
            return Err(TocError::Format { what: WHAT });
        }
        let corrupt = |reason| TocError::Corrupt { what: WHAT, reason };
        let records = all.len() - HEAD;
        let records = records.checked_sub(HASH).ok_or_else(|| corrupt("it is cut short"))?;
        if records % RECORD != 0 || number(head, 16) != (records / RECORD) as u64 {
            return Err(corrupt("its length does not match the number of extents"));
        }
        let (content, hash) = all.split_at(HEAD + records);
        if blake3::hash(content).as_bytes() != hash {
            return Err(corrupt("its checksum does not match"));
        }
        let table = Self { bytes };
        check(table.iter(), table.device_size()).map_err(corrupt)?;
        Ok(table)
    }

    /// Returns the encoded table.
    pub fn bytes(&self) -> &[u8] {
        self.bytes.as_ref()
    }

    /// Writes the table in the form that [`ExtentTable::open`] reads.
    pub fn encode(&self, out: &mut impl Write) -> io::Result<()> {
        out.write_all(self.bytes.as_ref())
    }

    /// Returns the length of the data device in bytes.
    pub fn device_size(&self) -> u64 {
        number(self.bytes.as_ref(), 24)
    }

    /// Returns the tar offset at which the last content ends.
    pub(crate) fn tar_end(&self) -> u64 {
        let last = self.len().checked_sub(1).map(|last| self.extent(last));
        last.map_or(0, |extent| extent.tar + extent.len)
    }

    /// Returns the number of extents.
    pub fn len(&self) -> usize {
        (self.bytes.as_ref().len() - HEAD - HASH) / RECORD
    }

    /// Whether the layer has no content at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns all extents in order.
    pub fn iter(&self) -> impl Iterator<Item = Extent> {
        (0..self.len()).map(|index| self.extent(index))
    }

    /// Returns the content within a range of the tar: the extents that touch the range, clipped to it, in order.
    /// Bytes of the range outside these extents are headers and padding.
    pub fn pieces_in_tar(&self, range: Range<u64>) -> impl Iterator<Item = Extent> {
        self.pieces(range, |extent| extent.tar)
    }

    /// Returns the content within a range of the data device: the extents that touch the range, clipped to it, in
    /// order. Bytes of the range outside these extents read as zeros.
    pub fn pieces_in_device(&self, range: Range<u64>) -> impl Iterator<Item = Extent> {
        self.pieces(range, |extent| extent.device)
    }

    /// Returns the part of a device range from its first byte of content to its last; `None` if the whole range reads
    /// as zeros.
    pub(crate) fn content_in_device(&self, range: Range<u64>) -> Option<Range<u64>> {
        let start = |extent: &Extent| extent.device;
        let first = self.first_behind(range.start, start);
        // `last` is the first extent that ends behind the range's last byte. The last extent that begins within the
        // range is that one or the one before it.
        let last = match range.end.checked_sub(1) {
            Some(last) => self.first_behind(last, start),
            None => return None,
        };
        let begins = |index: usize| {
            (index < self.len())
                .then(|| self.extent(index))
                .filter(|e| e.device < range.end)
        };
        let last = begins(last).or_else(|| last.checked_sub(1).and_then(begins))?;
        let first = begins(first)?;
        let content = first.device.max(range.start)..(last.device + last.len).min(range.end);
        (content.start < content.end).then_some(content)
    }

    /// Returns the device range of the extent around a device offset.
    pub(crate) fn run_around(&self, device: u64) -> Option<Range<u64>> {
        let extent = self.around_device(device)?;
        Some(extent.device..extent.device + extent.len)
    }

    /// Returns the whole extent around a device address, mostly the content of one file; `None` if the address is not
    /// content.
    fn around_device(&self, device: u64) -> Option<Extent> {
        let index = self.first_behind(device, |extent| extent.device);
        let extent = (index < self.len()).then(|| self.extent(index));
        extent.filter(|extent| extent.device <= device)
    }

    /// Returns the index of the first extent that ends behind `offset`.
    fn first_behind(&self, offset: u64, start: impl Fn(&Extent) -> u64) -> usize {
        let (mut low, mut high) = (0, self.len());
        while low < high {
            let middle = low + (high - low) / 2;
            let extent = self.extent(middle);
            if start(&extent) + extent.len <= offset {
                low = middle + 1
            } else {
                high = middle
            }
        }
        low
    }

    fn pieces(&self, range: Range<u64>, start: impl Fn(&Extent) -> u64) -> impl Iterator<Item = Extent> {
        (self.first_behind(range.start, &start)..self.len())
            .map(|index| self.extent(index))
            .map_while(move |extent| {
                let at = start(&extent);
                let (from, to) = (range.start.max(at), range.end.min(at + extent.len));
                let skip = from - at;
                (from < to).then(|| Extent {
                    tar: extent.tar + skip,
                    device: extent.device + skip,
                    len: to - from,
                })
            })
    }

    fn extent(&self, index: usize) -> Extent {
        let bytes = self.bytes.as_ref();
        let at = HEAD + index * RECORD;
        Extent {
            tar: number(bytes, at),
            device: number(bytes, at + 8),
            len: number(bytes, at + 16),
        }
    }
}

/// Checks the invariants of [`Toc::extents`].
pub(super) fn check(extents: impl Iterator<Item = Extent>, device_size: u64) -> Result<(), &'static str> {
    if !device_size.is_multiple_of(DEVICE_BLOCK) {
        return Err("the device size is no multiple of the block size");
    }
    let (mut tar, mut device) = (0, 0);
    for extent in extents {
        if extent.len == 0 || extent.tar < tar || extent.device < device {
            return Err("extents are empty, overlap or are out of order");
        }
        let end = |start: u64| start.checked_add(extent.len).ok_or("an extent ends beyond 64 bits");
        (tar, device) = (end(extent.tar)?, end(extent.device)?);
    }
    if device > device_size {
        return Err("an extent ends after the device");
    }
    Ok(())
}

fn number(bytes: &[u8], at: usize) -> u64 {
    let mut le = [0; 8];
    le.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(le)
}
