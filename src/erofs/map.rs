//! From bytes of a file to bytes of a layer's data device.

use crate::erofs::format::{BLOCK, Layout, NULL_BLOCK, u32_at};
use crate::erofs::{ErofsError, FileType, Inode, Nid, Reader};
use crate::tree::LayerIdx;

/// Most chunks that one call of [`Reader::map`] looks at. With the smallest chunks this is the most that one FUSE
/// read can ask for (1 MiB). With more chunks, reading a long run of a sparse file piece by piece would take
/// quadratic time.
const MAX_CHUNK_RUN: u64 = 256;

/// Where a run of a file's bytes comes from. Never empty, never beyond the end of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mapping {
    /// Zeros that are stored nowhere.
    Hole {
        /// Bytes.
        len: u64,
    },
    /// Bytes of a layer's data device.
    Device {
        /// The layer.
        layer: LayerIdx,
        /// Offset in its data device.
        offset: u64,
        /// Bytes.
        len: u64,
    },
}

impl Mapping {
    /// Bytes in the run.
    pub fn bytes(self) -> u64 {
        match self {
            Self::Hole { len } | Self::Device { len, .. } => len,
        }
    }

    fn resized(self, len: u64) -> Self {
        match self {
            Self::Hole { .. } => Self::Hole { len },
            Self::Device { layer, offset, .. } => Self::Device { layer, offset, len },
        }
    }

    /// Whether `next` goes on where this run ends.
    fn continues_with(self, next: Self) -> bool {
        match (self, next) {
            (Self::Hole { .. }, Self::Hole { .. }) => true,
            (
                Self::Device { layer, offset, len },
                Self::Device {
                    layer: l, offset: o, ..
                },
            ) => layer == l && offset.checked_add(len) == Some(o),
            _ => false,
        }
    }
}

impl<B: AsRef<[u8]>> Reader<B> {
    /// Where the bytes of the regular file `nid` from `offset` on come from, as far as they come from one place; `None` at the
    /// end of the file and behind it. A long run may come in pieces.
    pub fn map(&self, nid: Nid, offset: u64) -> Result<Option<Mapping>, ErofsError> {
        let inode = self.typed(nid, FileType::Regular, "regular file")?;
        let left = match inode.size.checked_sub(offset) {
            None | Some(0) => return Ok(None),
            Some(left) => left,
        };
        match inode.raw.layout {
            Layout::Plain => {
                let outside = ErofsError::Corrupt {
                    nid: nid.0,
                    what: "content lies outside the data devices",
                };
                let start = u64::from(inode.raw.union);
                self.on_device(start, offset, left).ok_or(outside).map(Some)
            }
            Layout::Chunked => self.map_chunks(&inode, offset).map(Some),
            Layout::Inline => Err(ErofsError::Corrupt {
                nid: nid.0,
                what: "content of a file lies behind its inode",
            }),
        }
    }

    fn map_chunks(&self, inode: &Inode, offset: u64) -> Result<Mapping, ErofsError> {
        let chunk_bits = inode.raw.union;
        if chunk_bits > 31 {
            return Err(ErofsError::Corrupt {
                nid: inode.nid.0,
                what: "chunk format",
            });
        }
        let chunk = BLOCK << chunk_bits;
        let mut run = self.map_chunk(inode, chunk, offset)?;
        for _ in 1..MAX_CHUNK_RUN {
            let next = offset + run.bytes();
            if next >= inode.size {
                break;
            }
            let more = self.map_chunk(inode, chunk, next)?;
            if !run.continues_with(more) {
                break;
            }
            run = run.resized(run.bytes() + more.bytes());
        }
        Ok(run)
    }

    /// The part of one chunk from `offset`, which is below the size, on.
    fn map_chunk(&self, inode: &Inode, chunk: u64, offset: u64) -> Result<Mapping, ErofsError> {
        let corrupt = || ErofsError::Corrupt {
            nid: inode.nid.0,
            what: "chunk map",
        };
        let (number, within) = (offset / chunk, offset % chunk);
        let len = (chunk - within).min(inode.size - offset);
        let entry = number
            .checked_mul(4)
            .and_then(|at| at.checked_add(u64::from(inode.raw.xattr_size)));
        let entry = entry.and_then(|at| self.behind(inode, at, 4)).ok_or_else(corrupt)?;
        match u32_at(entry, 0).ok_or_else(corrupt)? {
            NULL_BLOCK => Ok(Mapping::Hole { len }),
            start => self.on_device(u64::from(start), within, len).ok_or_else(corrupt),
        }
    }

    /// `len` bytes at `offset` behind the start of a block of the disk, if they lie in one data device.
    fn on_device(&self, start: u64, offset: u64, len: u64) -> Option<Mapping> {
        // Empty devices share their start with the next one, which is why the last candidate is the right one.
        let layer = self
            .device_starts
            .partition_point(|first| *first <= start)
            .checked_sub(1)?;
        let end = *self.device_starts.get(layer + 1)?;
        let offset = ((start - self.device_starts[layer]) * BLOCK).checked_add(offset)?;
        let device_size = (end - self.device_starts[layer]) * BLOCK;
        (offset.checked_add(len)? <= device_size).then_some(Mapping::Device {
            layer: LayerIdx(layer as u32),
            offset,
            len,
        })
    }
}
