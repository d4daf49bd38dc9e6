//! Requests of a virtio block device (virtio specification, section 5.2.6).
//!
//! A request is a chain of descriptors. The device reads the first ones and writes the others:
//! ```text
//! header: type u32 | reserved u32 | sector u64        | data ...          | status u8
//! ```
//! How the parts are split into descriptors is up to the driver.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::dirty::DirtyLog;
use crate::disk::LONGEST_READ;

/// Bytes of a sector, the unit of positions.
pub(super) const SECTOR: u64 = 512;
/// Most descriptors of a request. A driver that keeps to the device's limits uses far fewer.
const MOST_DESCRIPTORS: u32 = 1024;
/// Bytes of the header.
const HEADER: usize = 16;
/// Bytes of a descriptor in memory.
const DESCRIPTOR: u64 = 16;

/// A chain of descriptors that is no request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BadChain;

/// A range of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Segment {
    address: GuestAddress,
    length: u32,
}

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BlockCommand {
    /// To read bytes from this offset on.
    Read {
        /// Offset on the disk in bytes.
        offset: u64,
    },
    /// To flush. There is nothing to flush.
    Flush,
    /// To tell the name of the device.
    Id,
    /// To write, which is refused, or to read beyond the end of the disk or too many bytes at once.
    Refused,
    /// Something that the device does not know.
    Unknown,
}

/// A request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct BlockRequest {
    /// Index of the first descriptor, by which the driver recognises the answer.
    pub(super) head: u16,
    pub(super) command: BlockCommand,
    /// Where the data goes.
    data: Vec<Segment>,
    /// Bytes of the data.
    pub(super) length: u32,
    /// Where the status goes.
    status: GuestAddress,
}

impl BlockRequest {
    /// Reads the request whose first descriptor is `head` in the table at `table` with `entries` descriptors.
    pub(super) fn read(
        memory: &GuestMemoryMmap,
        table: GuestAddress,
        entries: u16,
        head: u16,
        disk_size: u64,
    ) -> Result<Self, BadChain> {
        let Chain { readable, mut writable } = Chain::read(memory, table, entries.into(), head.into())?;
        let header = header(memory, &readable)?;
        let (kind, sector) = (
            u32::from_le_bytes(header[..4].try_into().expect("four bytes")),
            u64::from_le_bytes(header[8..].try_into().expect("eight bytes")),
        );
        let last = writable.last_mut().ok_or(BadChain)?;
        last.length -= 1;
        let status = last.address.0.checked_add(last.length.into()).ok_or(BadChain)?;
        let length: u64 = writable.iter().map(|segment| u64::from(segment.length)).sum();
        let offset = sector.checked_mul(SECTOR);
        let end = offset.and_then(|offset| offset.checked_add(length));
        let length = u32::try_from(length).unwrap_or(u32::MAX);
        let command = match (kind, offset) {
            (VIRTIO_BLK_T_IN, Some(offset)) => {
                let fits = length <= LONGEST_READ && end.is_some_and(|end| end <= disk_size);
                if fits {
                    BlockCommand::Read { offset }
                } else {
                    BlockCommand::Refused
                }
            }
            (VIRTIO_BLK_T_IN | VIRTIO_BLK_T_OUT, _) => BlockCommand::Refused,
            (VIRTIO_BLK_T_FLUSH, _) => BlockCommand::Flush,
            (VIRTIO_BLK_T_GET_ID, _) => BlockCommand::Id,
            _ => BlockCommand::Unknown,
        };
        Ok(Self {
            head,
            command,
            data: writable,
            length,
            status: GuestAddress(status),
        })
    }

    /// Writes an answer into the memory of the guest: the data and the status of success, or the status of a failure.
    /// Returns the number of bytes that were written.
    pub(super) fn answer(&self, memory: &GuestMemoryMmap, result: Result<&[u8], ()>, dirty: Option<&DirtyLog>) -> u32 {
        let (mut status, mut written) = (VIRTIO_BLK_S_OK, 0);
        match result {
            Ok(mut bytes) => {
                for segment in &self.data {
                    let (now, later) = bytes.split_at(bytes.len().min(segment.length as usize));
                    bytes = later;
                    if memory.write_slice(now, segment.address).is_err() {
                        status = VIRTIO_BLK_S_IOERR;
                        break;
                    }
                    written += now.len() as u32;
                    if let Some(dirty) = dirty {
                        dirty.mark(segment.address.0, now.len() as u64);
                    }
                }
            }
            Err(()) if self.command == BlockCommand::Unknown => status = VIRTIO_BLK_S_UNSUPP,
            Err(()) => status = VIRTIO_BLK_S_IOERR,
        }
        if memory.write_obj(status as u8, self.status).is_err() {
            return written;
        }
        if let Some(dirty) = dirty {
            dirty.mark(self.status.0, 1);
        }
        written + 1
    }
}

/// Returns the name of the device, padded with zeros, as an answer to [`BlockCommand::Id`].
pub(super) fn device_id(name: &str) -> [u8; VIRTIO_BLK_ID_BYTES as usize] {
    let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
    for (byte, letter) in id.iter_mut().zip(name.bytes()) {
        *byte = letter;
    }
    id
}

/// Copies the header from the first bytes that the device may read.
fn header(memory: &GuestMemoryMmap, readable: &[Segment]) -> Result<[u8; HEADER], BadChain> {
    let mut header = [0; HEADER];
    let mut rest = &mut header[..];
    for segment in readable {
        let (now, later) = rest.split_at_mut(rest.len().min(segment.length as usize));
        memory.read_slice(now, segment.address).map_err(|_| BadChain)?;
        rest = later;
    }
    rest.is_empty().then_some(header).ok_or(BadChain)
}

/// The memory that a chain of descriptors names, without empty ranges.
#[derive(Debug, Default)]
struct Chain {
    readable: Vec<Segment>,
    writable: Vec<Segment>,
}

impl Chain {
    fn read(memory: &GuestMemoryMmap, table: GuestAddress, entries: u32, head: u32) -> Result<Self, BadChain> {
        let mut chain = Self::default();
        let (mut table, mut entries, mut next) = (table, entries, head);
        let mut is_indirect = false;
        for _ in 0..MOST_DESCRIPTORS {
            if next >= entries {
                return Err(BadChain);
            }
            let at = table.0.checked_add(u64::from(next) * DESCRIPTOR).ok_or(BadChain)?;
            let descriptor: Descriptor = memory.read_obj(GuestAddress(at)).map_err(|_| BadChain)?;
            if descriptor.refers_to_indirect_table() {
                // A table within a table, or one that is followed by others, is against the specification.
                if is_indirect || descriptor.has_next() || !descriptor.len().is_multiple_of(DESCRIPTOR as u32) {
                    return Err(BadChain);
                }
                (table, entries, next) = (descriptor.addr(), descriptor.len() / DESCRIPTOR as u32, 0);
                is_indirect = true;
                continue;
            }
            let segment = Segment {
                address: descriptor.addr(),
                length: descriptor.len(),
            };
            if segment.length > 0 {
                match descriptor.is_write_only() {
                    true => chain.writable.push(segment),
                    false if chain.writable.is_empty() => chain.readable.push(segment),
                    false => return Err(BadChain),
                }
            }
            if !descriptor.has_next() {
                return Ok(chain);
            }
            next = descriptor.next().into();
        }
        Err(BadChain)
    }
}

#[cfg(test)]
mod tests {
    use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

    use super::*;

    const TABLE: GuestAddress = GuestAddress(0);
    const ENTRIES: u16 = 16;
    const DISK: u64 = 1 << 20;
    const WRITE: u32 = VRING_DESC_F_WRITE;
    const NEXT: u32 = VRING_DESC_F_NEXT;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 16)]).unwrap()
    }

    fn put(memory: &GuestMemoryMmap, at: u64, descriptors: &[(u64, u32, u32, u16)]) {
        for (i, &(address, length, flags, next)) in descriptors.iter().enumerate() {
            let descriptor = Descriptor::new(address, length, flags as u16, next);
            memory
                .write_obj(descriptor, GuestAddress(at + i as u64 * DESCRIPTOR))
                .unwrap();
        }
    }

    fn put_header(memory: &GuestMemoryMmap, kind: u32, sector: u64) {
        memory.write_obj(kind, GuestAddress(0x1000)).unwrap();
        memory.write_obj(sector, GuestAddress(0x1008)).unwrap();
    }

    fn read(memory: &GuestMemoryMmap) -> Result<BlockRequest, BadChain> {
        BlockRequest::read(memory, TABLE, ENTRIES, 0, DISK)
    }

    #[test]
    fn a_read_is_answered_with_data_and_status() {
        let memory = memory();
        put(
            &memory,
            0,
            &[
                (0x1000, 16, NEXT, 1),
                (0x2000, 512, NEXT | WRITE, 2),
                (0x3000, 513, WRITE, 0),
            ],
        );
        put_header(&memory, VIRTIO_BLK_T_IN, 3);
        let request = read(&memory).unwrap();
        assert_eq!(
            (request.command, request.length),
            (BlockCommand::Read { offset: 1536 }, 1024)
        );
        assert_eq!(request.answer(&memory, Ok(&[7; 1024]), None), 1025);
        let mut bytes = [0; 513];
        memory.read_slice(&mut bytes, GuestAddress(0x3000)).unwrap();
        assert_eq!((bytes[511], bytes[512]), (7, VIRTIO_BLK_S_OK as u8));
        assert_eq!(request.answer(&memory, Err(()), None), 1);
        memory.read_slice(&mut bytes, GuestAddress(0x3000)).unwrap();
        assert_eq!(bytes[512], VIRTIO_BLK_S_IOERR as u8);
    }

    #[test]
    fn a_table_of_its_own_and_a_split_header_are_understood() {
        let memory = memory();
        put(&memory, 0, &[(0x4000, 5 * 16, VRING_DESC_F_INDIRECT, 0)]);
        let parts = [
            (0x1000, 8, NEXT, 1),
            (0, 0, NEXT, 2),
            (0x1008, 8, NEXT, 3),
            (0x2000, 512, NEXT | WRITE, 4),
            (0x3000, 1, WRITE, 0),
        ];
        put(&memory, 0x4000, &parts);
        put_header(&memory, VIRTIO_BLK_T_IN, 0);
        assert_eq!(read(&memory).unwrap().length, 512);
        put_header(&memory, VIRTIO_BLK_T_OUT, 0);
        assert_eq!(read(&memory).unwrap().command, BlockCommand::Refused);
        put_header(&memory, 77, u64::MAX);
        assert_eq!(read(&memory).unwrap().command, BlockCommand::Unknown);
    }

    #[test]
    fn reads_beyond_the_disk_are_refused() {
        let memory = memory();
        put(&memory, 0, &[(0x1000, 16, NEXT, 1), (0x2000, 513, WRITE, 0)]);
        for sector in [DISK / SECTOR, u64::MAX / SECTOR, u64::MAX] {
            put_header(&memory, VIRTIO_BLK_T_IN, sector);
            assert_eq!(read(&memory).unwrap().command, BlockCommand::Refused, "{sector}");
        }
        put_header(&memory, VIRTIO_BLK_T_IN, DISK / SECTOR - 1);
        assert_eq!(
            read(&memory).unwrap().command,
            BlockCommand::Read { offset: DISK - SECTOR }
        );
        put(
            &memory,
            0,
            &[
                (0x1000, 16, NEXT, 1),
                (0x2000, u32::MAX, NEXT | WRITE, 2),
                (0x2000, u32::MAX, WRITE, 0),
            ],
        );
        assert_eq!(read(&memory).unwrap().command, BlockCommand::Refused);
    }

    #[test]
    fn bad_chains_are_refused() {
        let memory = memory();
        put_header(&memory, VIRTIO_BLK_T_IN, 0);
        let indirect = VRING_DESC_F_INDIRECT;
        let chains: [&[(u64, u32, u32, u16)]; 9] = [
            // It has no end, leaves the table, or leaves the memory.
            &[(0x1000, 16, NEXT, 0)],
            &[(0x1000, 16, NEXT, 16)],
            &[(u64::MAX - 3, 16, NEXT, 1), (0x2000, 1, WRITE, 0)],
            // There is no status, or no header.
            &[(0x1000, 16, 0, 0)],
            &[(0x1000, 15, NEXT, 1), (0x2000, 1, WRITE, 0)],
            // A descriptor that the device reads comes after one that it writes.
            &[(0x2000, 1, WRITE | NEXT, 1), (0x1000, 16, 0, 0)],
            // A table of descriptors that cannot be.
            &[(0x4000, 15, indirect, 0)],
            &[(0x4000, 16, indirect | NEXT, 1), (0x2000, 1, WRITE, 0)],
            &[(0, 16, indirect, 0)],
        ];
        for chain in chains {
            put(&memory, 0, chain);
            assert_eq!(read(&memory), Err(BadChain), "{chain:x?}");
        }
    }
}
