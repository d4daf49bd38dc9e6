//! The memory of a guest, as the monitor has passed it.

use std::fs::File;
use std::io;
use std::sync::Arc;

use vhost::vhost_user::message::VhostUserMemoryRegion;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use super::shared;

/// The memory of a guest, mapped into this process.
#[derive(Debug, Clone, Default)]
pub(super) struct Guest {
    memory: Arc<GuestMemoryMmap>,
    /// Where the regions lie in the address space of the monitor.
    places: Vec<Place>,
}

#[derive(Debug, Clone, Copy)]
struct Place {
    monitor: u64,
    guest: u64,
    size: u64,
}

impl Place {
    fn of(region: &VhostUserMemoryRegion) -> Self {
        Self {
            monitor: region.user_addr,
            guest: region.guest_phys_addr,
            size: region.memory_size,
        }
    }
}

impl Guest {
    /// Maps all regions.
    pub(super) fn map(regions: &[VhostUserMemoryRegion], files: Vec<File>) -> io::Result<Self> {
        let mut guest = Self::default();
        for (region, file) in regions.iter().zip(files) {
            guest.add(region, file)?;
        }
        Ok(guest)
    }

    /// Maps one more region.
    pub(super) fn add(&mut self, region: &VhostUserMemoryRegion, file: File) -> io::Result<()> {
        let mapped = shared::map(file, region.mmap_offset, region.memory_size)?;
        let mapped = GuestRegionMmap::new(mapped, GuestAddress(region.guest_phys_addr));
        let mapped = mapped.ok_or(io::ErrorKind::InvalidInput)?;
        let memory = self.memory.insert_region(Arc::new(mapped)).map_err(io::Error::other)?;
        self.memory = Arc::new(memory);
        self.places.push(Place::of(region));
        Ok(())
    }

    /// Unmaps a region.
    pub(super) fn remove(&mut self, region: &VhostUserMemoryRegion) -> io::Result<()> {
        let start = GuestAddress(region.guest_phys_addr);
        let (memory, _) = self
            .memory
            .remove_region(start, region.memory_size)
            .map_err(io::Error::other)?;
        self.memory = Arc::new(memory);
        self.places.retain(|place| place.guest != region.guest_phys_addr);
        Ok(())
    }

    /// Number of regions.
    pub(super) fn regions(&self) -> u64 {
        self.places.len() as u64
    }

    /// The memory, by guest addresses.
    pub(super) fn memory(&self) -> Arc<GuestMemoryMmap> {
        self.memory.clone()
    }

    /// The guest address of an address of the monitor.
    pub(super) fn address(&self, monitor: u64) -> Option<u64> {
        let places = self.places.iter();
        let mut offsets = places.filter_map(|place| Some((place, monitor.checked_sub(place.monitor)?)));
        offsets.find_map(|(place, offset)| (offset < place.size).then(|| place.guest.checked_add(offset))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_the_monitor_are_translated() {
        let file = || {
            let file = tempfile::tempfile().unwrap();
            file.set_len(8192).unwrap();
            file
        };
        let first = VhostUserMemoryRegion::new(0, 4096, 0x7000_0000, 0);
        let second = VhostUserMemoryRegion::new(1 << 32, 8192, 0x8000_0000, 0);
        let mut guest = Guest::map(&[first, second], vec![file(), file()]).unwrap();
        assert_eq!(guest.address(0x7000_0fff), Some(0xfff));
        assert_eq!(guest.address(0x7000_1000), None);
        assert_eq!(guest.address(0x8000_1000), Some((1 << 32) + 4096));
        assert!(guest.add(&second, file()).is_err(), "it overlaps");
        guest.remove(&second).unwrap();
        assert_eq!(guest.address(0x8000_1000), None);
        let longer = VhostUserMemoryRegion::new(1 << 33, 16384, 0, 0);
        assert!(guest.add(&longer, file()).is_err(), "the file is shorter");
    }
}
