//! Reads packed tables of contents from untrusted bytes.

use std::fmt;
use std::io::{self, BufRead, BufReader, Read as _, Take, Write};

use super::{HASH, HEAD, MAGIC, PackedToc, RATIO_MAX, VERSION, WHAT, after, tag, u32_at};
use crate::memory::Charge;
use crate::toc::limits::SYMLINK_MAX;
use crate::toc::{
    Attribute, AttributeId, DEVICE_BLOCK, DataLayout, DeviceNumber, EntryKind, Extent, ExtentTable, FileData, Limits,
    Metadata, Toc, TocEntry, TocError, extents, path, xattr,
};

/// Largest zstd window, as a binary logarithm: 8 MiB. The frames written here need at most 2 MiB. A larger limit
/// would let a hostile frame take more memory.
const WINDOW_LOG_MAX: u32 = 23;
/// Longest warning in bytes. Warnings written here are shorter, because they contain shortened names.
const WARNING_MAX: u64 = 8192;
/// Most warnings of one table. Tables written here have far fewer.
const WARNINGS_MAX: u32 = 1024;
const PATH_MAX: u64 = 4096;
/// Bytes that the decoder unpacks at once.
const BUFFER: usize = 64 << 10;

impl Toc {
    /// Reads what [`Toc::encode`] wrote. The bytes may be untrusted: the result keeps all invariants of the type.
    /// Whether the table describes the layer is not checked.
    pub fn decode(bytes: &[u8]) -> Result<Self, TocError> {
        PackedToc::open(bytes.to_vec())?.unpack()
    }

    /// Writes the table in the form that [`Toc::decode`] reads.
    pub fn encode(&self, out: &mut impl Write) -> io::Result<()> {
        self.pack().map_err(io::Error::other)?.write(out)
    }
}

impl PackedToc {
    /// Takes what [`PackedToc::write`] wrote. Checks magic, version, length and checksum; the reader of the entries
    /// checks the rest.
    pub fn open(mut bytes: Vec<u8>) -> Result<Self, TocError> {
        let head = *bytes.first_chunk::<HEAD>().ok_or(TocError::Format { what: WHAT })?;
        if &head[..8] != MAGIC || u32_at(&head, 8) != VERSION {
            return Err(TocError::Format { what: WHAT });
        }
        let body_len = u64::from(u32_at(&head, 32)) | u64::from(u32_at(&head, 36)) << 32;
        if (bytes.len() - HEAD).checked_sub(HASH).map(|len| len as u64) != Some(body_len) {
            return Err(corrupt("its length is wrong"));
        }
        let (content, hash) = bytes.split_at(bytes.len() - HASH);
        if blake3::hash(content).as_bytes() != hash {
            return Err(corrupt("its checksum does not match"));
        }
        bytes.truncate(bytes.len() - HASH);
        bytes.drain(..HEAD);
        Ok(Self { head, body: bytes })
    }

    /// Returns a reader of the entries, in archive order.
    pub fn entries(&self) -> Result<TocEntries<'_>, TocError> {
        let limits = Limits::default();
        let counts = [12, 16, 20].map(|at| self.count(at));
        let too_many = counts.iter().any(|&count| count as usize > limits.entries) || counts[2] > WARNINGS_MAX;
        if too_many || self.device_size() > limits.device_size {
            return Err(corrupt("it is larger than any layer may be"));
        }
        let no_zstd = |_| corrupt("its body is no zstd frame");
        let mut zstd = zstd::Decoder::with_buffer(&self.body[..])
            .map_err(no_zstd)?
            .single_frame();
        zstd.window_log_max(WINDOW_LOG_MAX).map_err(no_zstd)?;
        let unfolded = zstd.take(RATIO_MAX.saturating_mul(self.body.len() as u64));
        Ok(TocEntries {
            decoder: TocDecoder::new(BufReader::with_capacity(BUFFER, unfolded), self.device_size()),
            left: counts[0],
        })
    }

    /// Returns the extents alone, after a check of the whole table.
    pub fn extent_table(&self) -> Result<ExtentTable, TocError> {
        self.extent_table_within(Charge::default())
    }

    /// Returns the extents alone like [`PackedToc::extent_table`]. All memory that this takes meanwhile is charged before it
    /// is taken.
    pub fn extent_table_within(&self, charge: Charge) -> Result<ExtentTable, TocError> {
        Ok(self.behind_entries(charge)?.extent_table())
    }

    /// Returns the oddities of the tar that the reader tolerated.
    pub fn warnings(&self) -> Result<Vec<String>, TocError> {
        Ok(self.behind_entries(Charge::default())?.warnings)
    }

    /// Reads everything, and returns a table without the entries.
    fn behind_entries(&self, charge: Charge) -> Result<Toc, TocError> {
        let mut toc = Toc {
            device_size: self.device_size(),
            ..Toc::default()
        };
        let mut entries = self.entries()?;
        entries.decoder.memory.charge = charge;
        while entries.next()?.is_some() {}
        entries
            .rest(&mut toc, self.count(16), self.count(20))
            .map_err(corrupt)?;
        Ok(toc)
    }

    /// Returns the whole table as values.
    pub fn unpack(&self) -> Result<Toc, TocError> {
        let mut toc = Toc {
            device_size: self.device_size(),
            ..Toc::default()
        };
        let mut attributes: Vec<Attribute> = Vec::new();
        let mut entries = self.entries()?;
        while let Some(entry) = entries.next()? {
            let xattrs = entry.xattrs.iter().map(|xattr| match xattr {
                AttributeRef::Known(id) => attributes[*id as usize].clone(),
                AttributeRef::New(attribute) => {
                    attributes.push(attribute.clone());
                    attribute.clone()
                }
            });
            toc.entries.push(TocEntry {
                xattrs: xattrs.collect(),
                path: entry.path.into(),
                kind: entry.kind,
                meta: entry.meta,
            });
        }
        entries
            .rest(&mut toc, self.count(16), self.count(20))
            .map_err(corrupt)?;
        Ok(toc)
    }
}

fn corrupt(reason: &'static str) -> TocError {
    TocError::Corrupt { what: WHAT, reason }
}

type Decoded<T> = Result<T, &'static str>;
type Unfolded<'a> = BufReader<Take<zstd::Decoder<'a, &'a [u8]>>>;

/// Reads the entries of a [`PackedToc`]; made by [`PackedToc::entries`].
pub struct TocEntries<'a> {
    decoder: TocDecoder<Unfolded<'a>>,
    left: u32,
}

impl fmt::Debug for TocEntries<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TocEntries")
            .field("left", &self.left)
            .finish_non_exhaustive()
    }
}

/// An entry as [`TocEntries`] reads it.
#[derive(Debug)]
pub struct PackedEntry<'a> {
    /// See [`TocEntry::path`].
    pub path: &'a [u8],
    /// Type of the entry, and what belongs to the type.
    pub kind: EntryKind,
    /// Mode, owner and time.
    pub meta: Metadata,
    /// Extended attributes, sorted by name.
    pub xattrs: &'a [AttributeRef],
}

/// An extended attribute as [`TocEntries`] reads it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AttributeRef {
    /// An attribute that occurred before. The first new attribute of the table has number 0, the next new one 1, and
    /// so on.
    Known(AttributeId),
    /// An attribute that occurs for the first time.
    New(Attribute),
}

impl TocEntries<'_> {
    /// Returns the next entry, or `None` after the last one.
    #[allow(clippy::should_implement_trait)] // It lends.
    pub fn next(&mut self) -> Result<Option<PackedEntry<'_>>, TocError> {
        let Some(left) = self.left.checked_sub(1) else {
            return Ok(None);
        };
        self.left = left;
        self.decoder.entry().map(Some).map_err(corrupt)
    }

    /// Reads what follows the entries: extents, warnings and padding.
    fn rest(mut self, toc: &mut Toc, extents: u32, warnings: u32) -> Decoded<()> {
        let decoder = &mut self.decoder;
        let (mut tar, mut device) = (0u64, 0u64);
        for _ in 0..extents {
            tar = tar.wrapping_add(decoder.number()?);
            device = device.wrapping_add(decoder.number()?);
            let len = decoder.number()?;
            decoder.memory.take(EXTENT)?;
            toc.extents.push(Extent { tar, device, len });
            (tar, device) = (tar.wrapping_add(len), device.wrapping_add(len));
        }
        extents::check(toc.extents.iter().copied(), toc.device_size)?;
        for _ in 0..warnings {
            let warning = String::from_utf8(decoder.bytes(WARNING_MAX)?.into()).map_err(|_| "a warning is no text")?;
            toc.warnings.push(warning);
        }
        let is_at_end = decoder.input.fill_buf().is_ok_and(|rest| rest.is_empty());
        let padding = self.decoder.input.into_inner().into_inner().finish();
        if !is_at_end || padding.iter().any(|&b| b != 0) {
            return Err("something follows the last item");
        }
        Ok(())
    }
}

/// Memory of an extent while the extent table is made.
const EXTENT: u64 = 2 * size_of::<Extent>() as u64;

/// The memory that grows with what the decoder has read.
#[derive(Debug, Default)]
struct TableMemory {
    charge: Charge,
    bytes: u64,
}

impl TableMemory {
    fn take(&mut self, more: u64) -> Decoded<()> {
        self.bytes = self.bytes.saturating_add(more);
        let covered = self.charge.cover(self.bytes);
        covered.map_err(|_| "it takes more memory than is allowed")
    }
}

/// What the decoder keeps of an attribute to check later entries that refer to it.
#[derive(Debug)]
struct Known {
    name: Box<[u8]>,
    value_len: usize,
}

#[derive(Debug)]
pub(super) struct TocDecoder<R> {
    input: R,
    path: Vec<u8>,
    device: u64,
    device_size: u64,
    /// Chunks that may still come. In all there may be as many chunks as entries.
    pieces: usize,
    attributes: Vec<Known>,
    /// Memory of the attributes and the extents.
    memory: TableMemory,
    /// Attributes of the entry read last.
    xattrs: Vec<AttributeRef>,
}

const CUT: &str = "its body is cut short or no zstd frame";

impl<R: BufRead> TocDecoder<R> {
    pub fn new(input: R, device_size: u64) -> Self {
        Self {
            input,
            path: Vec::new(),
            device: 0,
            device_size,
            pieces: Limits::default().entries,
            attributes: Vec::new(),
            memory: TableMemory::default(),
            xattrs: Vec::new(),
        }
    }

    fn byte(&mut self) -> Decoded<u8> {
        let byte = *self.input.fill_buf().map_err(|_| CUT)?.first().ok_or(CUT)?;
        self.input.consume(1);
        Ok(byte)
    }

    pub fn number(&mut self) -> Decoded<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7f);
            if bits << shift >> shift != bits {
                break;
            }
            value |= bits << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err("a number has more than 64 bits")
    }

    pub fn signed(&mut self) -> Decoded<i64> {
        let value = self.number()?;
        Ok((value >> 1) as i64 ^ -((value & 1) as i64))
    }

    fn below(&mut self, limit: u64) -> Decoded<u64> {
        let value = self.number()?;
        if value < limit {
            Ok(value)
        } else {
            Err("a number is out of range")
        }
    }

    fn device_number(&mut self) -> Decoded<DeviceNumber> {
        Ok(DeviceNumber {
            major: self.below(1 << 12)? as u32,
            minor: self.below(1 << 20)? as u32,
        })
    }

    fn bytes(&mut self, max: u64) -> Decoded<Box<[u8]>> {
        let len = self.below(max + 1)?;
        let mut bytes = vec![0; len as usize];
        self.input.read_exact(&mut bytes).map_err(|_| CUT)?;
        Ok(bytes.into())
    }

    fn entry(&mut self) -> Decoded<PackedEntry<'_>> {
        let tag = self.byte()?;
        let shared = self.below(self.path.len() as u64 + 1)? as usize;
        let len = self.below(PATH_MAX + 1)? as usize;
        self.path.truncate(shared);
        self.path.resize(shared + len, 0);
        self.input.read_exact(&mut self.path[shared..]).map_err(|_| CUT)?;
        let may_be_root = matches!(tag, tag::DIRECTORY | tag::OPAQUE);
        if !path::is_visible(&self.path) || self.path.is_empty() && !may_be_root {
            return Err("a path is not canonical");
        }
        let meta = Metadata {
            mode: self.below(0o10000)? as u16,
            uid: self.below(u64::from(u32::MAX))? as u32,
            gid: self.below(u64::from(u32::MAX))? as u32,
            mtime: self.signed()?,
            mtime_nsec: self.below(1_000_000_000)? as u32,
        };
        self.xattrs()?;
        let kind = self.kind(tag)?;
        Ok(PackedEntry {
            path: &self.path,
            kind,
            meta,
            xattrs: &self.xattrs,
        })
    }

    fn xattrs(&mut self) -> Decoded<()> {
        self.xattrs.clear();
        let mut check = xattr::ListCheck::default();
        for _ in 0..self.below(1 << 16)? {
            let number = self.below(self.attributes.len() as u64 + 1)?;
            let (id, xattr) = match usize::try_from(number)
                .map_err(|_| "a number is out of range")?
                .checked_sub(1)
            {
                Some(id) => (id, AttributeRef::Known(id as AttributeId)),
                None => {
                    let (name, value) = (self.bytes(255)?, self.bytes(65535)?);
                    if !xattr::is_sound(&name, &value) {
                        return Err("an extended attribute has a value that it cannot have");
                    }
                    let value_len = value.len();
                    self.memory.take((size_of::<Known>() + name.len()) as u64)?;
                    self.attributes.push(Known {
                        name: name.clone(),
                        value_len,
                    });
                    (self.attributes.len() - 1, AttributeRef::New((name, value)))
                }
            };
            let known = &self.attributes[id];
            if !check.allows(&known.name, known.value_len) {
                return Err("extended attributes are out of order or not allowed");
            }
            self.xattrs.push(xattr);
        }
        Ok(())
    }

    fn kind(&mut self, tag: u8) -> Decoded<EntryKind> {
        Ok(match tag {
            tag::DIRECTORY => EntryKind::Directory,
            tag::REGULAR | tag::REGULAR_CHUNKED => EntryKind::Regular(self.data(tag == tag::REGULAR_CHUNKED)?),
            tag::SYMLINK => {
                let target = self.bytes(SYMLINK_MAX as u64)?;
                if target.is_empty() || target.contains(&0) {
                    return Err("the target of a symbolic link is empty or contains NUL");
                }
                EntryKind::Symlink(target)
            }
            tag::HARDLINK => {
                let target = self.bytes(PATH_MAX)?;
                if target.is_empty() || !path::is_canonical(&target) {
                    return Err("the target of a hard link is not canonical");
                }
                EntryKind::Hardlink(target)
            }
            tag::CHAR_DEVICE => EntryKind::CharDevice(self.device_number()?),
            tag::BLOCK_DEVICE => EntryKind::BlockDevice(self.device_number()?),
            tag::FIFO => EntryKind::Fifo,
            tag::WHITEOUT => EntryKind::Whiteout,
            tag::OPAQUE => EntryKind::Opaque,
            tag::HIDDEN | tag::HIDDEN_CHUNKED => EntryKind::Hidden(self.data(tag == tag::HIDDEN_CHUNKED)?),
            _ => return Err("an entry is of no known kind"),
        })
    }

    fn data(&mut self, chunked: bool) -> Decoded<FileData> {
        let size = self.below(Limits::default().device_size + 1)?;
        if !chunked {
            let device = if size > 0 { self.device(size, size)? } else { 0 };
            return Ok(FileData {
                size,
                layout: DataLayout::Flat { device },
            });
        }
        let chunk_bits = self.byte()?;
        if chunk_bits > 31 {
            return Err("a chunk is too large");
        }
        let chunk = DEVICE_BLOCK << chunk_bits;
        let count = self.below(self.pieces as u64 + 1)?;
        self.pieces -= count as usize;
        let mut chunks = Vec::new();
        let mut next = 0u64;
        for _ in 0..count {
            let number = next.saturating_add(self.number()?);
            let start = number
                .checked_mul(chunk)
                .filter(|&start| start < size)
                .ok_or("a chunk lies behind its file")?;
            let number = u32::try_from(number).map_err(|_| "a file has too many chunks")?;
            chunks.push((number, self.device(chunk, chunk.min(size - start))?));
            next = u64::from(number) + 1;
        }
        Ok(FileData {
            size,
            layout: DataLayout::Chunked { chunk_bits, chunks },
        })
    }

    /// Reads a device offset and checks that `used` bytes fit behind it. The next offset is expected `size` bytes
    /// further on.
    fn device(&mut self, size: u64, used: u64) -> Decoded<u64> {
        let device = self.device.wrapping_add_signed(self.signed()?);
        let end = device.checked_add(used);
        if !device.is_multiple_of(DEVICE_BLOCK) || end.is_none_or(|end| end > self.device_size) {
            return Err("content lies outside of the device");
        }
        self.device = after(device, size);
        Ok(device)
    }
}
