//! Directory blocks: an array of 12-byte entries {nid u64, name offset u16, type u8, 0}, then the names back to back.
//!
//! Entries are sorted by name as bytes, over the whole directory. `.` and `..` are among them.

use crate::erofs::ErofsError;
use crate::erofs::format::{BLOCK, u16_at, u64_at};

/// Bytes of an entry without its name.
pub(super) const DIRENT: usize = 12;

/// Type of an inode as directory entries state it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FileType {
    /// Regular file.
    Regular,
    /// Directory.
    Directory,
    /// Character device.
    CharDevice,
    /// Block device.
    BlockDevice,
    /// Named pipe.
    Fifo,
    /// Symbolic link.
    Symlink,
}

impl FileType {
    /// Returns the number in a directory entry. Sockets (6) cannot be in a tar.
    fn number(self) -> u8 {
        match self {
            Self::Regular => 1,
            Self::Directory => 2,
            Self::CharDevice => 3,
            Self::BlockDevice => 4,
            Self::Fifo => 5,
            Self::Symlink => 7,
        }
    }

    fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            1 => Self::Regular,
            2 => Self::Directory,
            3 => Self::CharDevice,
            4 => Self::BlockDevice,
            5 => Self::Fifo,
            7 => Self::Symlink,
            _ => return None,
        })
    }

    /// Returns the type bits of `st_mode`.
    pub fn mode_bits(self) -> u16 {
        match self {
            Self::Regular => 0o100_000,
            Self::Directory => 0o040_000,
            Self::CharDevice => 0o020_000,
            Self::BlockDevice => 0o060_000,
            Self::Fifo => 0o010_000,
            Self::Symlink => 0o120_000,
        }
    }

    /// Returns the type that `st_mode` states.
    pub(super) fn from_mode(mode: u16) -> Option<Self> {
        Some(match mode & 0o170_000 {
            0o100_000 => Self::Regular,
            0o040_000 => Self::Directory,
            0o020_000 => Self::CharDevice,
            0o060_000 => Self::BlockDevice,
            0o010_000 => Self::Fifo,
            0o120_000 => Self::Symlink,
            _ => return None,
        })
    }
}

/// Measures the names of a directory, taken in the order in which they will be stored.
#[derive(Debug, Default)]
pub(super) struct Measure {
    full_blocks: u64,
    used: u64,
}

impl Measure {
    /// Adds the next name. Returns whether the block before it is full, so that the name begins another block.
    pub fn add(&mut self, name: &[u8]) -> bool {
        let size = DIRENT as u64 + name.len() as u64;
        let turn = self.used + size > BLOCK;
        if turn {
            self.full_blocks += 1;
            self.used = 0;
        }
        self.used += size;
        turn
    }

    /// Returns the number of whole blocks, and the bytes used in a last block that is not full.
    pub fn finish(self) -> (u64, u64) {
        if self.used == BLOCK {
            (self.full_blocks + 1, 0)
        } else {
            (self.full_blocks, self.used)
        }
    }
}

/// Appends one block of entries as stored, without padding.
pub(super) fn encode(entries: &[(&[u8], u64, FileType)], out: &mut Vec<u8>) {
    let mut name_offset = entries.len() * DIRENT;
    for (name, nid, file_type) in entries {
        out.extend_from_slice(&nid.to_le_bytes());
        out.extend_from_slice(&(name_offset as u16).to_le_bytes());
        out.extend_from_slice(&[file_type.number(), 0]);
        name_offset += name.len();
    }
    for (name, _, _) in entries {
        out.extend_from_slice(name);
    }
}

/// A directory block that is being read.
#[derive(Debug, Clone, Copy)]
pub(super) struct DirBlock<'a> {
    dir: u64,
    bytes: &'a [u8],
    count: usize,
}

impl<'a> DirBlock<'a> {
    /// Opens a block of the directory `dir`. `bytes` ends with the block or with the directory.
    pub fn new(dir: u64, bytes: &'a [u8]) -> Result<Self, ErofsError> {
        let names = usize::from(u16_at(bytes, DIRENT - 4).unwrap_or(0));
        if names < DIRENT || !names.is_multiple_of(DIRENT) || names >= bytes.len() {
            return Err(corrupt(dir, "directory block"));
        }
        Ok(Self {
            dir,
            bytes,
            count: names / DIRENT,
        })
    }

    pub fn count(&self) -> usize {
        self.count
    }

    /// Returns the name of entry `index`, which must be below the count.
    pub fn name(&self, index: usize) -> Result<&'a [u8], ErofsError> {
        let offset = |index: usize| u16_at(self.bytes, index * DIRENT + 8).map(usize::from);
        let start = offset(index).unwrap_or(0);
        let last = index + 1 >= self.count;
        let end = if last {
            Some(self.bytes.len())
        } else {
            offset(index + 1)
        };
        let mut name = match end {
            Some(end) if start >= self.count * DIRENT => self.bytes.get(start..end).unwrap_or(&[]),
            _ => &[],
        };
        if last && let Some(nul) = name.iter().position(|byte| *byte == 0) {
            name = &name[..nul];
        }
        if name.is_empty() || name.len() > 255 {
            return Err(corrupt(self.dir, "name in a directory"));
        }
        Ok(name)
    }

    /// Returns nid and type of entry `index`, which must be below the count.
    pub fn target(&self, index: usize) -> Result<(u64, FileType), ErofsError> {
        let at = index * DIRENT;
        let nid = u64_at(self.bytes, at);
        let file_type = self
            .bytes
            .get(at + 10)
            .and_then(|number| FileType::from_number(*number));
        nid.zip(file_type)
            .ok_or_else(|| corrupt(self.dir, "entry type in a directory"))
    }

    /// Returns the index of the entry called `name`.
    pub fn find(&self, name: &[u8]) -> Result<Option<usize>, ErofsError> {
        let (mut low, mut high) = (0, self.count);
        while low < high {
            let middle = low.midpoint(high);
            match self.name(middle)?.cmp(name) {
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Equal => return Ok(Some(middle)),
                std::cmp::Ordering::Greater => high = middle,
            }
        }
        Ok(None)
    }
}

fn corrupt(nid: u64, what: &'static str) -> ErofsError {
    ErofsError::Corrupt { nid, what }
}
