//! Makes the tables of a layer from the entries of the table that the layer carries.
//!
//! A regular file is an entry, followed by an entry for each further chunk of its content. The assembly collects the
//! chunks of one file, and gives the file to the builder when the next file begins. The dialects differ in how they say
//! where the compressed bytes of a chunk end ([`Dialect`]).

use std::collections::HashSet;
use std::ops::Range;

use base64::Engine as _;

use super::annotations::Dialect;
use super::json::JsonEntry;
use super::{CarriedError, CarriedTables, LANDMARK, TableRef, time};
use crate::memory::Charge;
use crate::toc::builder::{Builder, Item};
use crate::toc::chunks::{Chunk, ChunkTable, MAX_CHUNK};
use crate::toc::error::shown;
use crate::toc::xattr::{Holder, RawXattrs};
use crate::toc::{EntryKind, Limits, Metadata, path};

/// The character that Go puts in the place of bytes that are no UTF-8. The name is lost then.
const LOST: char = '\u{fffd}';
/// Farthest place of a chunk in the output of its member. A larger limit lets a read decode more bytes that it does not
/// need; writers share members of at most a few megabytes.
const MAX_INNER: u64 = 1 << 30;
/// Memory in bytes that is charged for each name, which is kept as a hash.
const NAME: usize = 40;

/// Tables under construction.
#[derive(Debug)]
pub(super) struct Assembly {
    dialect: Dialect,
    builder: Builder,
    chunks: Vec<Chunk>,
    /// Number of chunks at the end of `chunks` whose members have no end yet.
    endless: usize,
    /// Offset in the blob where the next member may begin, and the bytes of the present member that are taken.
    reached: Reached,
    /// Where content ends in the blob.
    data_end: u64,
    file: Option<PendingFile>,
    /// A hash of each name that has come.
    names: HashSet<[u8; 16]>,
    first: u64,
    charge: Charge,
}

/// How far the chunks have come in the blob.
#[derive(Debug, Default)]
struct Reached {
    /// Offset at which the last chunk's member begins.
    member: Option<u64>,
    /// Offset up to which the last chunk takes the output of its member.
    inner: u64,
    /// Offset in the blob before which no further member may begin.
    end: u64,
}

/// A regular file whose chunks are not all known yet.
#[derive(Debug)]
struct PendingFile {
    item: Item,
    size: u64,
    /// Where the file's last member ends in the blob, if the table says so.
    end: Option<u64>,
    digest: Option<[u8; 32]>,
    chunks: Vec<PendingChunk>,
    /// Bytes of the file that the chunks cover.
    covered: u64,
}

#[derive(Debug)]
struct PendingChunk {
    /// The bytes in the file.
    file: Range<u64>,
    offset: u64,
    inner: u64,
    digest: Option<[u8; 32]>,
    zeros: bool,
}

impl Assembly {
    pub(super) fn new(dialect: Dialect, data_end: u64, limits: Limits, tables: Charge, charge: Charge) -> Self {
        Self {
            dialect,
            builder: Builder::new(limits, tables),
            chunks: Vec::new(),
            endless: 0,
            reached: Reached::default(),
            data_end,
            file: None,
            names: HashSet::new(),
            first: 0,
            charge,
        }
    }

    /// Adds the next entry of the table.
    pub(super) fn entry(&mut self, mut entry: JsonEntry) -> Result<(), CarriedError> {
        if entry.kind == "chunk" {
            return self.add_chunk(&entry);
        }
        self.close_file()?;
        let name = entry.name.take().unwrap_or_default();
        let refused = |reason| refused(&name, reason);
        let link = entry.link_name.take().unwrap_or_default();
        if name.contains(LOST) || link.contains(LOST) {
            return Err(refused("has a name that is no UTF-8, which the table cannot have"));
        }
        self.first_of_its_name(&name)?;
        let item = self.item(&name, &mut entry)?;
        match entry.kind.as_str() {
            "dir" => self.builder.directory(item)?,
            "symlink" => self.builder.symlink(item, link.as_bytes())?,
            "hardlink" => self.builder.hardlink(item, link.as_bytes())?,
            "fifo" => self.builder.special(item, EntryKind::Fifo)?,
            kind @ ("char" | "block") => {
                let (major, minor) = (entry.dev_major, entry.dev_minor);
                let number = self.builder.device_number(major, minor, name.as_bytes());
                let kind = match kind {
                    "char" => EntryKind::CharDevice(number),
                    _ => EntryKind::BlockDevice(number),
                };
                self.builder.special(item, kind)?;
            }
            "reg" => return self.begin_file(item, &entry),
            _ => return Err(refused("is of an unknown type")),
        }
        Ok(())
    }

    /// Checks that no entry had this name before.
    fn first_of_its_name(&mut self, name: &str) -> Result<(), CarriedError> {
        // A bad name is an error when the builder gets it.
        let canonical = path::canonical(name.as_bytes()).unwrap_or_else(|_| name.as_bytes().into());
        let hash = blake3::hash(&canonical);
        let mut short = [0; 16];
        short.copy_from_slice(&hash.as_bytes()[..16]);
        if !self.names.insert(short) {
            return Err(refused(name, "comes twice"));
        }
        self.cover()
    }

    fn item(&mut self, name: &str, entry: &mut JsonEntry) -> Result<Item, CarriedError> {
        let (mtime, mtime_nsec) = match entry.modtime.as_deref() {
            None | Some("") => (0, 0),
            Some(text) => time::parse(text).ok_or_else(|| refused(name, "has a time that cannot be read"))?,
        };
        let bytes = name.as_bytes();
        let mut meta = Metadata {
            mode: (entry.mode & 0o7777) as u16,
            uid: self.builder.owner(entry.uid, "uid", bytes),
            gid: self.builder.owner(entry.gid, "gid", bytes),
            mtime,
            mtime_nsec,
        };
        let holder = match entry.kind.as_str() {
            "symlink" => Holder::Symlink,
            "dir" => Holder::Directory,
            "char" | "block" | "fifo" => Holder::Special,
            _ => Holder::File,
        };
        let mut raw = RawXattrs::new();
        for (attribute, value) in entry.xattrs.take().unwrap_or_default() {
            if attribute.contains(LOST) {
                return Err(refused(name, "has an attribute whose name is no UTF-8"));
            }
            let value = base64::engine::general_purpose::STANDARD.decode(value);
            let value = value.map_err(|_| refused(name, "has an attribute that is no base64"))?;
            raw.insert(attribute.into_bytes().into(), value.into());
        }
        let xattrs = self
            .builder
            .attributes([raw, RawXattrs::new()], holder, &mut meta, bytes);
        Ok(Item {
            // Errors name a place. The entry has no header, so its content stands for it.
            offset: u64::try_from(entry.offset).unwrap_or(0),
            name: bytes.to_vec(),
            meta,
            xattrs,
        })
    }

    fn begin_file(&mut self, item: Item, entry: &JsonEntry) -> Result<(), CarriedError> {
        let size = number(&item.name, entry.size)?;
        if size == 0 {
            // Such a file has no place in the device. If its name is that of a marker, it is one.
            self.builder.regular_in_runs(item, 0, &[])?;
            return Ok(());
        }
        let end = match self.dialect {
            Dialect::Stargz => None,
            Dialect::Containers => Some(number(&item.name, entry.end_offset)?),
        };
        let digest = digest(&item.name, entry.digest.as_deref())?;
        self.file = Some(PendingFile {
            item,
            size,
            end,
            digest,
            chunks: Vec::new(),
            covered: 0,
        });
        self.add_chunk(entry)
    }

    /// Adds a chunk to the file that came last.
    fn add_chunk(&mut self, entry: &JsonEntry) -> Result<(), CarriedError> {
        let Some(file) = &mut self.file else {
            let name = entry.name.as_deref().unwrap_or_default();
            return Err(refused(name, "is a chunk of no file"));
        };
        let name = &file.item.name;
        let refused = |reason| Err(refused_bytes(name, reason));
        let (start, len) = (number(name, entry.chunk_offset)?, number(name, entry.chunk_size)?);
        let left = file.size - file.covered;
        if start != file.covered || left == 0 || len > left {
            return refused("has chunks that do not follow each other");
        }
        let len = if len == 0 { left } else { len };
        let zeros = match entry.chunk_type.as_deref() {
            None | Some("") => false,
            Some("zeros") => true,
            Some(_) => return refused("has a chunk of an unknown type"),
        };
        file.covered += len;
        let chunk = PendingChunk {
            file: start..file.covered,
            offset: number(name, entry.offset)?,
            inner: number(name, entry.inner_offset)?,
            digest: digest(name, entry.chunk_digest.as_deref())?,
            zeros,
        };
        file.chunks.push(chunk);
        let pending = size_of_val(&*file.chunks);
        self.cover_with(pending)
    }

    /// Gives the file that came last to the builder.
    fn close_file(&mut self) -> Result<(), CarriedError> {
        let Some(mut file) = self.file.take() else {
            return Ok(());
        };
        let name = file.item.name.clone();
        let refused = |reason| refused_bytes(&name, reason);
        if file.covered != file.size {
            return Err(refused("has chunks that do not make up the whole file"));
        }
        if let [only] = file.chunks.as_mut_slice() {
            // The digest of the file is that of its only chunk.
            only.digest = only.digest.or(file.digest);
        }
        let mut runs: Vec<Range<u64>> = Vec::new();
        for chunk in file.chunks.iter().filter(|chunk| !chunk.zeros) {
            match runs.last_mut() {
                Some(last) if last.end == chunk.file.start => last.end = chunk.file.end,
                _ => runs.push(chunk.file.clone()),
            }
        }
        let is_landmark = path::canonical(&name).is_ok_and(|path| *path == *LANDMARK);
        let device = self.builder.regular_in_runs(file.item, file.size, &runs)?;
        if is_landmark && let Some(device) = device {
            self.first = device;
        }
        let ends: Vec<Option<u64>> = match file.end {
            None => vec![None; file.chunks.len()],
            Some(end) => {
                let next = file.chunks.iter().skip(1).map(|chunk| Some(chunk.offset));
                next.chain([Some(end)]).collect()
            }
        };
        for (chunk, end) in file.chunks.into_iter().zip(ends) {
            self.reach(&name, &chunk, end)?;
            let Some(device) = device.filter(|_| !chunk.zeros) else {
                continue;
            };
            let len = chunk.file.end - chunk.file.start;
            let digest = chunk.digest.ok_or_else(|| refused("has content without a digest"))?;
            if len > MAX_CHUNK {
                return Err(refused("has a chunk that is too long"));
            }
            self.endless += usize::from(end.is_none());
            self.chunks.push(Chunk {
                device: device + chunk.file.start,
                member: chunk.offset..end.unwrap_or(self.data_end),
                inner: chunk.inner,
                // A chunk is at most `MAX_CHUNK` long.
                len: len as u32,
                digest,
            });
        }
        self.cover()
    }

    /// Checks that a chunk is behind all chunks before it in the blob. Ends the members that end where this one begins.
    fn reach(&mut self, name: &[u8], chunk: &PendingChunk, end: Option<u64>) -> Result<(), CarriedError> {
        let refused = |reason| refused_bytes(name, reason);
        let (reached, len) = (&mut self.reached, chunk.file.end - chunk.file.start);
        let shares = end.is_none() && reached.member == Some(chunk.offset);
        let follows = match shares {
            true => chunk.inner >= reached.inner,
            false => chunk.offset >= reached.end && reached.member.is_none_or(|before| chunk.offset > before),
        };
        let inside = chunk.offset < self.data_end && end.is_none_or(|end| chunk.offset <= end && end <= self.data_end);
        // A frame of zeros is never read, so its size does not matter.
        let is_empty = end == Some(chunk.offset) && !chunk.zeros;
        let taken = chunk.inner.checked_add(len);
        let Some(taken) = taken.filter(|_| follows && inside && !is_empty && chunk.inner <= MAX_INNER) else {
            return Err(refused("has content that is out of order, or outside the blob"));
        };
        if !shares {
            for before in self.chunks.iter_mut().rev().take(self.endless) {
                before.member.end = chunk.offset;
            }
            self.endless = 0;
        }
        *reached = Reached {
            member: Some(chunk.offset),
            inner: taken,
            end: end.unwrap_or(chunk.offset),
        };
        Ok(())
    }

    fn cover(&mut self) -> Result<(), CarriedError> {
        self.cover_with(0)
    }

    /// Charges for everything that was added, and for `more` bytes.
    fn cover_with(&mut self, more: usize) -> Result<(), CarriedError> {
        let bytes = size_of_val(&*self.chunks) + self.names.len() * NAME + more;
        Ok(self.charge.cover(bytes as u64)?)
    }

    /// Returns the tables, after the last entry.
    pub(super) fn finish(mut self, table: &TableRef) -> Result<CarriedTables, CarriedError> {
        self.close_file()?;
        drop(self.names);
        self.chunks.shrink_to_fit();
        let tables = self.builder.finish()?;
        let chunks = ChunkTable {
            chunks: self.chunks,
            codec: table.codec,
            device_size: tables.toc.device_size(),
            blob_size: table.blob_size,
            first: self.first,
            source: table.source(),
        };
        chunks.check().map_err(|reason| CarriedError::Unusable { reason })?;
        self.charge.exactly(chunks.bytes())?;
        Ok(CarriedTables {
            tables,
            chunks,
            charge: self.charge,
        })
    }
}

fn refused(name: &str, reason: &'static str) -> CarriedError {
    refused_bytes(name.as_bytes(), reason)
}

fn refused_bytes(name: &[u8], reason: &'static str) -> CarriedError {
    CarriedError::Entry {
        entry: shown(name),
        reason,
    }
}

/// Reads a number that must not be negative.
fn number(name: &[u8], number: i64) -> Result<u64, CarriedError> {
    u64::try_from(number).map_err(|_| refused_bytes(name, "has a negative size or offset"))
}

/// Reads the digest of some content: none, or a SHA-256.
fn digest(name: &[u8], text: Option<&str>) -> Result<Option<[u8; 32]>, CarriedError> {
    let Some(text) = text.filter(|text| !text.is_empty()) else {
        return Ok(None);
    };
    let hex = text
        .strip_prefix("sha256:")
        .filter(|hex| hex.len() == 64 && hex.is_ascii());
    let bytes = hex.and_then(|hex| {
        let mut bytes = [0; 32];
        for (byte, digits) in bytes.iter_mut().zip(hex.as_bytes().chunks_exact(2)) {
            let value = |digit: u8| char::from(digit).to_digit(16);
            *byte = (value(digits[0])? * 16 + value(digits[1])?) as u8;
        }
        Some(bytes)
    });
    bytes
        .map(Some)
        .ok_or_else(|| refused_bytes(name, "has a digest that is no SHA-256"))
}
