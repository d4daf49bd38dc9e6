//! Reading, from bytes nobody vouches for.

use std::io::{BufRead, BufReader, Read};

use super::{HASH, HEAD, MAGIC, RATIO_MAX, VERSION, WHAT, after, tag};
use crate::toc::builder::SYMLINK_MAX;
use crate::toc::{
    DEVICE_BLOCK, DataLayout, DeviceNumber, EntryKind, Extent, FileData, Limits, Metadata, Toc, TocEntry, TocError,
    extents, path, xattr,
};

/// 8 MiB; the frames written here need 2 MiB, and a hostile frame may not ask for more.
const WINDOW_LOG_MAX: u32 = 23;
/// More than any warning written here has, names being shortened.
const WARNING_MAX: u64 = 8192;
const PATH_MAX: u64 = 4096;

impl Toc {
    /// Reads what [`Toc::encode`] wrote. The bytes need not be trusted, the result keeps all invariants of the type; whether it
    /// describes the layer is another question.
    pub fn decode(bytes: &[u8]) -> Result<Self, TocError> {
        let head = bytes.first_chunk::<HEAD>().ok_or(TocError::Format { what: WHAT })?;
        if &head[..8] != MAGIC || u32_at(head, 8) != VERSION {
            return Err(TocError::Format { what: WHAT });
        }
        let corrupt = |reason| TocError::Corrupt { what: WHAT, reason };
        let body_len = u64_at(head, 32);
        if (bytes.len() - HEAD).checked_sub(HASH).map(|len| len as u64) != Some(body_len) {
            return Err(corrupt("its length is wrong"));
        }
        let (content, hash) = bytes.split_at(bytes.len() - HASH);
        if blake3::hash(content).as_bytes() != hash {
            return Err(corrupt("its checksum does not match"));
        }
        let counts = [12, 16, 20].map(|at| u32_at(head, at));
        decode_body(&content[HEAD..], counts, u64_at(head, 24)).map_err(corrupt)
    }
}

fn u32_at(head: &[u8; HEAD], at: usize) -> u32 {
    u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]])
}

fn u64_at(head: &[u8; HEAD], at: usize) -> u64 {
    u64::from(u32_at(head, at)) | u64::from(u32_at(head, at + 4)) << 32
}

type Decoded<T> = Result<T, &'static str>;

pub(super) fn decode_body(body: &[u8], counts: [u32; 3], device_size: u64) -> Decoded<Toc> {
    const NO_ZSTD: &str = "its body is no zstd frame";
    let limits = Limits::default();
    if counts.iter().any(|&count| count as usize > limits.entries) || device_size > limits.device_size {
        return Err("it is larger than any layer may be");
    }
    let mut zstd = zstd::Decoder::with_buffer(body).map_err(|_| NO_ZSTD)?.single_frame();
    zstd.window_log_max(WINDOW_LOG_MAX).map_err(|_| NO_ZSTD)?;
    let mut decoder = Decoder {
        input: BufReader::new(zstd.take(RATIO_MAX.saturating_mul(body.len() as u64))),
        path: Vec::new(),
        device: 0,
        device_size,
        pieces: limits.entries,
    };
    let mut toc = Toc {
        device_size,
        ..Toc::default()
    };
    for _ in 0..counts[0] {
        toc.entries.push(decoder.entry()?);
    }
    let (mut tar, mut device) = (0u64, 0u64);
    for _ in 0..counts[1] {
        tar = tar.wrapping_add(decoder.number()?);
        device = device.wrapping_add(decoder.number()?);
        let len = decoder.number()?;
        toc.extents.push(Extent { tar, device, len });
        (tar, device) = (tar.wrapping_add(len), device.wrapping_add(len));
    }
    extents::check(toc.extents.iter().copied(), device_size)?;
    for _ in 0..counts[2] {
        let warning = String::from_utf8(decoder.bytes(WARNING_MAX)?.into()).map_err(|_| "a warning is no text")?;
        toc.warnings.push(warning);
    }
    let is_at_end = decoder.input.fill_buf().is_ok_and(|rest| rest.is_empty());
    let padding = decoder.input.into_inner().into_inner().finish();
    if !is_at_end || padding.iter().any(|&b| b != 0) {
        return Err("something follows the last item");
    }
    Ok(toc)
}

pub(super) struct Decoder<R> {
    pub input: R,
    pub path: Vec<u8>,
    pub device: u64,
    pub device_size: u64,
    /// Chunks that may still come; as many as entries, in all.
    pub pieces: usize,
}

impl<R: Read> Decoder<R> {
    fn byte(&mut self) -> Decoded<u8> {
        let mut byte = [0];
        self.input
            .read_exact(&mut byte)
            .map_err(|_| "its body is cut short or no zstd frame")?;
        Ok(byte[0])
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

    fn small(&mut self) -> Decoded<u32> {
        u32::try_from(self.number()?).map_err(|_| "a number is out of range")
    }

    fn bytes(&mut self, max: u64) -> Decoded<Box<[u8]>> {
        let len = self.below(max + 1)?;
        let mut bytes = vec![0; len as usize];
        self.input
            .read_exact(&mut bytes)
            .map_err(|_| "its body is cut short or no zstd frame")?;
        Ok(bytes.into())
    }

    fn entry(&mut self) -> Decoded<TocEntry> {
        let tag = self.byte()?;
        let shared = self.below(self.path.len() as u64 + 1)?;
        let rest = self.bytes(PATH_MAX)?;
        self.path.truncate(shared as usize);
        self.path.extend_from_slice(&rest);
        let may_be_root = matches!(tag, tag::DIRECTORY | tag::OPAQUE);
        if !path::is_canonical(&self.path) || self.path.is_empty() && !may_be_root {
            return Err("a path is not canonical");
        }
        let meta = Metadata {
            mode: self.below(0o10000)? as u16,
            uid: self.small()?,
            gid: self.small()?,
            mtime: self.signed()?,
            mtime_nsec: self.below(1_000_000_000)? as u32,
        };
        let mut xattrs = Vec::new();
        for _ in 0..self.below(1 << 16)? {
            xattrs.push((self.bytes(255)?, self.bytes(65535)?));
        }
        if !xattr::is_valid(&xattrs) {
            return Err("extended attributes are out of order or not allowed");
        }
        let kind = self.kind(tag)?;
        Ok(TocEntry {
            path: self.path.as_slice().into(),
            kind,
            meta,
            xattrs,
        })
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

    /// A device offset with room for `used` bytes; the next one is expected `size` bytes on.
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
