//! Bytes of the EROFS superblock and inodes (kernel: `fs/erofs/erofs_fs.h`). All numbers are little-endian.
//!
//! ```text
//! block 0                                                      data device of layer 0, 1, ...
//! |1024 x 0|superblock|root|inode|inode...|directory blocks    |content            |content
//! 0        1024       1152 (nid 36)       (block boundary)     metadata blocks
//! ```

use std::ops::Range;

use crate::erofs::ErofsError;

/// Bytes of a block. The block size is the smallest page size, so every kernel since 5.4 mounts the image on x86-64
/// and on arm64 with 4 KiB pages.
pub(super) const BLOCK: u64 = crate::toc::DEVICE_BLOCK;
pub(super) const BLOCK_BITS: u8 = 12;
/// Unit of a nid in bytes.
pub(super) const SLOT: u64 = 32;
/// Bytes of an extended inode. The compact form is not used, because it has no room for 32-bit owners and
/// nanoseconds.
pub(super) const INODE: u64 = 64;
/// Block number of a hole in a chunk map.
pub(super) const NULL_BLOCK: u32 = u32::MAX;

pub(super) const SUPER_OFFSET: u64 = 1024;
const SUPER_SIZE: u64 = 128;
const MAGIC: u32 = 0xE0F5_E1E2;
const COMPAT_CHECKSUM: u32 = 1;
/// Flag: inodes have times of their own.
const COMPAT_MTIME: u32 = 2;
/// Flag: some file is chunk-based. Kernels before 5.15 do not know such files.
pub(super) const INCOMPAT_CHUNKED: u32 = 4;

/// Offset of the first inode, which is the root. The root lies right behind the superblock, so its nid fits the
/// superblock's 16-bit field.
pub(super) const FIRST_INODE: u64 = SUPER_OFFSET + SUPER_SIZE;

/// Which extended attributes the inodes of an image have. The volume name states it, so a reader need not look at all
/// inodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum AttributeKinds {
    None,
    /// Some attributes, but no access control list.
    Plain,
    AccessControl,
}

impl AttributeKinds {
    /// Returns the volume name. Raise the number in the name when a new version makes another tree from equal layers.
    /// Stored images are then made again.
    fn label(self) -> &'static [u8; 16] {
        match self {
            Self::None => b"ocifs2:noxattr\0\0",
            Self::Plain => b"ocifs2:xattr\0\0\0\0",
            Self::AccessControl => b"ocifs2:acl\0\0\0\0\0\0",
        }
    }

    fn from_label(label: &[u8]) -> Option<Self> {
        let all = [Self::None, Self::Plain, Self::AccessControl];
        all.into_iter().find(|attributes| attributes.label() == label)
    }
}

pub(super) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// The fields of the superblock that differ between images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Superblock {
    pub root_nid: u16,
    pub inodes: u64,
    /// Blocks of the whole disk: metadata and all data devices.
    pub blocks: u32,
    pub uuid: [u8; 16],
    /// Attributes of the inodes; `None` if another version or program wrote the image.
    pub attributes: Option<AttributeKinds>,
    pub incompat: u32,
    /// First block of the attributes that inodes share; 0 if there are none.
    pub xattr_block: u32,
}

impl Superblock {
    /// Writes the superblock into `block` and adds the checksum. `block` is the first block of the image, and
    /// everything else in it must be in place.
    pub fn encode(&self, block: &mut [u8; BLOCK as usize]) {
        let bytes = &mut block[SUPER_OFFSET as usize..];
        put(bytes, 0, &MAGIC.to_le_bytes());
        put(bytes, 8, &(COMPAT_CHECKSUM | COMPAT_MTIME).to_le_bytes());
        bytes[12] = BLOCK_BITS;
        put(bytes, 14, &self.root_nid.to_le_bytes());
        put(bytes, 16, &self.inodes.to_le_bytes());
        put(bytes, 36, &self.blocks.to_le_bytes());
        put(bytes, 44, &self.xattr_block.to_le_bytes());
        put(bytes, 48, &self.uuid);
        let label = self.attributes.map_or(&[0; 16], AttributeKinds::label);
        put(bytes, 64, label);
        put(bytes, 80, &self.incompat.to_le_bytes());
        let sum = checksum(bytes);
        put(bytes, 4, &sum.to_le_bytes());
    }

    /// Reads and checks the superblock of an image.
    pub fn decode(image: &[u8]) -> Result<Self, ErofsError> {
        let truncated = || ErofsError::Truncated {
            size: image.len() as u64,
            expected: BLOCK,
        };
        let bytes = image.get(SUPER_OFFSET as usize..BLOCK as usize).ok_or_else(truncated)?;
        let u32_of = |at| u32_at(bytes, at).ok_or_else(truncated);
        if u32_of(0)? != MAGIC {
            return Err(ErofsError::NotErofs { magic: u32_of(0)? });
        }
        if u32_of(8)? & COMPAT_CHECKSUM == 0 {
            return Err(ErofsError::Foreign { what: "no checksum" });
        }
        let (found, computed) = (u32_of(4)?, checksum(bytes));
        if found != computed {
            return Err(ErofsError::Checksum { found, computed });
        }
        let incompat = u32_of(80)?;
        if incompat & !INCOMPAT_CHUNKED != 0 {
            return Err(ErofsError::Foreign {
                what: "an incompatible feature other than chunked files",
            });
        }
        if bytes[12] != BLOCK_BITS || bytes[13] != 0 || bytes[90] != 0 {
            return Err(ErofsError::Foreign {
                what: "a block size other than 4096, or a longer superblock",
            });
        }
        if u32_of(40)? != 0 || u16_at(bytes, 86) != Some(0) {
            return Err(ErofsError::Foreign {
                what: "metadata that does not begin at block 0, or a device table",
            });
        }
        Ok(Self {
            root_nid: u16_at(bytes, 14).ok_or_else(truncated)?,
            inodes: u64_at(bytes, 16).ok_or_else(truncated)?,
            blocks: u32_of(36)?,
            xattr_block: u32_of(44)?,
            uuid: *bytes.get(48..).and_then(<[u8]>::first_chunk).ok_or_else(truncated)?,
            attributes: AttributeKinds::from_label(&bytes[64..80]),
            incompat,
        })
    }
}

/// Returns the CRC-32C of the first block from the superblock on. The checksum field (bytes 4 to 8) counts as zeros.
/// There is no final inversion, as in the kernel.
fn checksum(bytes: &[u8]) -> u32 {
    let field: Range<usize> = 4..8;
    bytes.iter().enumerate().fold(u32::MAX, |crc, (at, byte)| {
        let byte = if field.contains(&at) { 0 } else { *byte };
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            // 0x82F63B78 is the Castagnoli polynomial with its bits reversed.
            if crc & 1 == 1 {
                (crc >> 1) ^ 0x82F6_3B78
            } else {
                crc >> 1
            }
        })
    })
}

/// How the content of an inode is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    /// All content is in consecutive blocks.
    Plain,
    /// Whole blocks are stored as in `Plain`; the rest lies behind the inode.
    Inline,
    /// A map of equal chunks behind the inode says where the content is.
    Chunked,
}

impl Layout {
    fn number(self) -> u16 {
        match self {
            Self::Plain => 0,
            Self::Inline => 2,
            Self::Chunked => 4,
        }
    }
}

/// An extended inode as stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RawInode {
    pub layout: Layout,
    /// Bytes of attributes behind the inode: 0, or at least 12 and a multiple of 4. The writer makes at least 16.
    pub xattr_size: u32,
    pub mode: u16,
    pub size: u64,
    /// First block, device number or chunk format, depending on type and layout.
    pub union: u32,
    pub ino: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: i64,
    pub mtime_nsec: u32,
    pub nlink: u32,
}

/// Bytes of the header of the attribute area.
pub(super) const XATTR_HEADER: u32 = 12;

impl RawInode {
    pub fn encode(&self) -> [u8; INODE as usize] {
        let mut bytes = [0; INODE as usize];
        let xattr_count = if self.xattr_size == 0 {
            0
        } else {
            (self.xattr_size - XATTR_HEADER) / 4 + 1
        };
        let xattr_count = u16::try_from(xattr_count).expect("the plan limits attributes");
        put(&mut bytes, 0, &(1 | self.layout.number() << 1).to_le_bytes());
        put(&mut bytes, 2, &xattr_count.to_le_bytes());
        put(&mut bytes, 4, &self.mode.to_le_bytes());
        put(&mut bytes, 8, &self.size.to_le_bytes());
        put(&mut bytes, 16, &self.union.to_le_bytes());
        put(&mut bytes, 20, &self.ino.to_le_bytes());
        put(&mut bytes, 24, &self.uid.to_le_bytes());
        put(&mut bytes, 28, &self.gid.to_le_bytes());
        put(&mut bytes, 32, &self.mtime.to_le_bytes());
        put(&mut bytes, 40, &self.mtime_nsec.to_le_bytes());
        put(&mut bytes, 44, &self.nlink.to_le_bytes());
        bytes
    }

    /// Decodes an extended inode; `None` if the format or the layout is another one.
    pub fn decode(bytes: &[u8; INODE as usize]) -> Option<Self> {
        let format = u16_at(bytes, 0)?;
        let layout = match format {
            1 => Layout::Plain,
            5 => Layout::Inline,
            9 => Layout::Chunked,
            _ => return None,
        };
        let xattr_size = match u16_at(bytes, 2)? {
            0 => 0,
            count => (u32::from(count) - 1) * 4 + XATTR_HEADER,
        };
        Some(Self {
            layout,
            xattr_size,
            mode: u16_at(bytes, 4)?,
            size: u64_at(bytes, 8)?,
            union: u32_at(bytes, 16)?,
            ino: u32_at(bytes, 20)?,
            uid: u32_at(bytes, 24)?,
            gid: u32_at(bytes, 28)?,
            mtime: u64_at(bytes, 32)?.cast_signed(),
            mtime_nsec: u32_at(bytes, 40)?,
            nlink: u32_at(bytes, 44)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksum_is_castagnoli_without_inversion() {
        // The published check value of CRC-32C over "123456789" is 0xE3069283. Here bytes 4 to 8 count as zeros.
        assert_eq!(!checksum(b"1234abcd9"), crc32c(b"1234\0\0\0\09"));
        assert_eq!(crc32c(b"123456789"), 0xE306_9283);
    }

    fn crc32c(bytes: &[u8]) -> u32 {
        let mut table = [0u32; 256];
        for (at, slot) in table.iter_mut().enumerate() {
            *slot = (0..8).fold(at as u32, |c, _| if c & 1 == 1 { c >> 1 ^ 0x82F6_3B78 } else { c >> 1 });
        }
        !bytes.iter().fold(!0, |c, b| table[(c as u8 ^ b) as usize] ^ c >> 8)
    }
}
