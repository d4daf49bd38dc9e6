//! Writes packed tables of contents: the packer packs each entry as it comes.

use std::fmt;
use std::io::{self, Write};

use super::{HEAD, MAGIC, PackedToc, RATIO_MAX, VERSION, after, tag};
use crate::toc::{
    Attributes, DEVICE_BLOCK, DataLayout, EntryKind, Extent, FileData, Metadata, Toc, TocEntry, TocError,
};

/// Level of zstd, the fastest of the regular ones. The default level makes the table a few per cent smaller and takes
/// three times as long.
const LEVEL: i32 = 1;
/// Bytes that the packer collects before it compresses them.
const COLLECT: usize = 64 << 10;

impl Toc {
    /// Returns the table as bytes.
    pub fn pack(&self) -> Result<PackedToc, TocError> {
        let mut packer = Packer::default();
        for entry in &self.entries {
            packer.add(entry)?;
        }
        packer.finish(&self.extents, &self.warnings, self.device_size)
    }
}

/// A table that is being packed.
#[derive(Default)]
pub(in crate::toc) struct Packer {
    encoder: Encoder,
    /// The compressor, made when there is something to compress.
    body: Option<zstd::Encoder<'static, Vec<u8>>>,
    entries: usize,
}

impl fmt::Debug for Packer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Packer")
            .field("entries", &self.entries)
            .field("bytes", &self.bytes())
            .finish_non_exhaustive()
    }
}

impl Packer {
    /// Returns the number of entries so far.
    pub fn len(&self) -> usize {
        self.entries
    }

    /// Returns the memory in bytes that grows with the packed entries.
    pub fn bytes(&self) -> usize {
        let packed = self.body.as_ref().map_or(0, |body| body.get_ref().len());
        packed + self.encoder.out.len() + self.encoder.attributes.bytes()
    }

    pub fn add(&mut self, entry: &TocEntry) -> Result<(), TocError> {
        self.encoder.entry(entry);
        self.entries += 1;
        if self.encoder.out.len() >= COLLECT {
            self.flush().map_err(failed)?;
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<&mut zstd::Encoder<'static, Vec<u8>>> {
        let body = match &mut self.body {
            Some(body) => body,
            body => body.insert(zstd::Encoder::new(Vec::new(), LEVEL)?),
        };
        self.encoder.flush(body)?;
        Ok(body)
    }

    pub fn finish(self, extents: &[Extent], warnings: &[String], device_size: u64) -> Result<PackedToc, TocError> {
        self.seal(extents, warnings, device_size).map_err(failed)
    }

    fn seal(mut self, extents: &[Extent], warnings: &[String], device_size: u64) -> io::Result<PackedToc> {
        // The attributes have their numbers, and their bytes are in the body, so the packer frees them.
        self.encoder.attributes = Attributes::default();
        let (mut tar, mut device) = (0, 0);
        for extent in extents {
            for number in [
                extent.tar.wrapping_sub(tar),
                extent.device.wrapping_sub(device),
                extent.len,
            ] {
                self.encoder.number(number);
            }
            (tar, device) = (
                extent.tar.wrapping_add(extent.len),
                extent.device.wrapping_add(extent.len),
            );
            if self.encoder.out.len() >= COLLECT {
                self.flush()?;
            }
        }
        for warning in warnings {
            self.encoder.bytes(warning.as_bytes());
        }
        self.flush()?;
        let mut body = self.body.take().map_or(Ok(Vec::new()), zstd::Encoder::finish)?;
        let least = usize::try_from(self.encoder.flushed.div_ceil(RATIO_MAX)).map_err(io::Error::other)?;
        body.resize(body.len().max(least), 0);

        let count = |len: usize| u32::try_from(len).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput));
        let mut head = [0; HEAD];
        head[..8].copy_from_slice(MAGIC);
        head[8..12].copy_from_slice(&VERSION.to_le_bytes());
        for (at, len) in [(12, self.entries), (16, extents.len()), (20, warnings.len())] {
            head[at..at + 4].copy_from_slice(&count(len)?.to_le_bytes());
        }
        head[24..32].copy_from_slice(&device_size.to_le_bytes());
        head[32..40].copy_from_slice(&(body.len() as u64).to_le_bytes());
        Ok(PackedToc { head, body })
    }
}

fn failed(error: io::Error) -> TocError {
    TocError::Pack {
        reason: error.to_string(),
    }
}

#[derive(Debug, Default)]
pub(super) struct Encoder {
    pub out: Vec<u8>,
    path: Vec<u8>,
    device: u64,
    attributes: Attributes,
    /// Number of bytes flushed from `out`.
    flushed: u64,
}

impl Encoder {
    fn flush(&mut self, to: &mut impl Write) -> io::Result<()> {
        to.write_all(&self.out)?;
        self.flushed += self.out.len() as u64;
        self.out.clear();
        Ok(())
    }

    pub fn number(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.out.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.out.push(value as u8);
    }

    pub fn signed(&mut self, value: i64) {
        self.number((value << 1 ^ value >> 63) as u64);
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.number(bytes.len() as u64);
        self.out.extend_from_slice(bytes);
    }

    fn entry(&mut self, entry: &TocEntry) {
        self.out.push(kind_tag(&entry.kind));
        let shared = self.path.iter().zip(&entry.path).take_while(|(a, b)| a == b).count();
        self.number(shared as u64);
        self.bytes(&entry.path[shared..]);
        self.path.truncate(shared);
        self.path.extend_from_slice(&entry.path[shared..]);
        let Metadata {
            mode,
            uid,
            gid,
            mtime,
            mtime_nsec,
        } = entry.meta;
        self.number(mode.into());
        self.number(uid.into());
        self.number(gid.into());
        self.signed(mtime);
        self.number(mtime_nsec.into());
        self.number(entry.xattrs.len() as u64);
        for (name, value) in &entry.xattrs {
            match self.attributes.intern(name, value) {
                (_, true) => {
                    self.number(0);
                    self.bytes(name);
                    self.bytes(value);
                }
                (id, false) => self.number(u64::from(id) + 1),
            }
        }
        match &entry.kind {
            EntryKind::Directory | EntryKind::Fifo | EntryKind::Whiteout | EntryKind::Opaque => {}
            EntryKind::Symlink(target) | EntryKind::Hardlink(target) => self.bytes(target),
            EntryKind::CharDevice(device) | EntryKind::BlockDevice(device) => {
                self.number(device.major.into());
                self.number(device.minor.into());
            }
            EntryKind::Regular(data) | EntryKind::Hidden(data) => self.data(data),
        }
    }

    fn data(&mut self, data: &FileData) {
        self.number(data.size);
        match &data.layout {
            DataLayout::Flat { device } => {
                if data.size > 0 {
                    self.device(*device, data.size);
                }
            }
            DataLayout::Chunked { chunk_bits, chunks } => {
                self.out.push(*chunk_bits);
                self.number(chunks.len() as u64);
                let mut next = 0;
                for (number, device) in chunks {
                    self.number(number.wrapping_sub(next).into());
                    self.device(*device, DEVICE_BLOCK << chunk_bits);
                    next = number.wrapping_add(1);
                }
            }
        }
    }

    fn device(&mut self, device: u64, size: u64) {
        self.signed(device.wrapping_sub(self.device) as i64);
        self.device = after(device, size);
    }
}

fn kind_tag(kind: &EntryKind) -> u8 {
    let flat = |data: &FileData| matches!(data.layout, DataLayout::Flat { .. });
    match kind {
        EntryKind::Directory => tag::DIRECTORY,
        EntryKind::Regular(data) if flat(data) => tag::REGULAR,
        EntryKind::Regular(_) => tag::REGULAR_CHUNKED,
        EntryKind::Symlink(_) => tag::SYMLINK,
        EntryKind::Hardlink(_) => tag::HARDLINK,
        EntryKind::CharDevice(_) => tag::CHAR_DEVICE,
        EntryKind::BlockDevice(_) => tag::BLOCK_DEVICE,
        EntryKind::Fifo => tag::FIFO,
        EntryKind::Whiteout => tag::WHITEOUT,
        EntryKind::Opaque => tag::OPAQUE,
        EntryKind::Hidden(data) if flat(data) => tag::HIDDEN,
        EntryKind::Hidden(_) => tag::HIDDEN_CHUNKED,
    }
}
