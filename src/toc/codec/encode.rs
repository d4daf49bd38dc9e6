//! Writing.

use std::io::{self, Write};

use super::{HEAD, MAGIC, RATIO_MAX, VERSION, after, tag};
use crate::toc::{DEVICE_BLOCK, DataLayout, EntryKind, FileData, Metadata, Toc, TocEntry};

const LEVEL: i32 = 3;

impl Toc {
    /// Writes the table as [`Toc::decode`] reads it.
    pub fn encode(&self, out: &mut impl Write) -> io::Result<()> {
        let count = |len: usize| u32::try_from(len).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput));
        let mut body = zstd::Encoder::new(Vec::new(), LEVEL)?;
        let mut encoder = Encoder::default();
        for entry in &self.entries {
            encoder.entry(entry);
            encoder.flush(&mut body)?;
        }
        let (mut tar, mut device) = (0, 0);
        for extent in &self.extents {
            for number in [
                extent.tar.wrapping_sub(tar),
                extent.device.wrapping_sub(device),
                extent.len,
            ] {
                encoder.number(number);
            }
            (tar, device) = (
                extent.tar.wrapping_add(extent.len),
                extent.device.wrapping_add(extent.len),
            );
            encoder.flush(&mut body)?;
        }
        for warning in &self.warnings {
            encoder.bytes(warning.as_bytes());
        }
        encoder.flush(&mut body)?;
        let mut body = body.finish()?;
        let least = usize::try_from(encoder.flushed.div_ceil(RATIO_MAX)).map_err(io::Error::other)?;
        body.resize(body.len().max(least), 0);

        let mut head = Vec::with_capacity(HEAD);
        head.extend_from_slice(MAGIC);
        head.extend_from_slice(&VERSION.to_le_bytes());
        for len in [self.entries.len(), self.extents.len(), self.warnings.len()] {
            head.extend_from_slice(&count(len)?.to_le_bytes());
        }
        head.extend_from_slice(&self.device_size.to_le_bytes());
        head.extend_from_slice(&(body.len() as u64).to_le_bytes());
        let hash = blake3::Hasher::new().update(&head).update(&body).finalize();
        out.write_all(&head)?;
        out.write_all(&body)?;
        out.write_all(hash.as_bytes())
    }
}

#[derive(Debug, Default)]
pub(super) struct Encoder {
    pub out: Vec<u8>,
    path: Vec<u8>,
    device: u64,
    /// Bytes that have left `out`.
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
        self.path.clear();
        self.path.extend_from_slice(&entry.path);
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
            self.bytes(name);
            self.bytes(value);
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
