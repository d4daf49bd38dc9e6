//! How much of each region of a data device was read by readers that keep what they get.
//!
//! The kernel keeps the pages of a file that it reads through FUSE or EROFS. The bytes come from the data device, whose
//! pages the kernel keeps too. So that the bytes are not in memory twice, the pages of a region are released when as
//! many bytes were read as the region has. Single pages are not released as they are read: the kernel reads ahead and
//! keeps neighbouring pages together, and the next reader would find nothing.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

/// Bytes of a region. A larger value holds more bytes twice. With a smaller one, pages that were read ahead are released
/// before they are read.
const REGION: u64 = 4 << 20;

/// The regions of one device.
#[derive(Debug)]
pub(super) struct Regions {
    /// Bytes of each region that were read since its pages were released.
    read: Box<[AtomicU32]>,
    size: u64,
}

impl Regions {
    /// The regions of a device of `size` bytes.
    pub(super) fn new(size: u64) -> Self {
        let count = size.div_ceil(REGION);
        Self {
            read: (0..count).map(|_| AtomicU32::new(0)).collect(),
            size,
        }
    }

    /// Counts a read. Returns the regions that were read as a whole by now, and begins to count them anew.
    pub(super) fn count(&self, device: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let end = device.end.min(self.size);
        (device.start / REGION..end.div_ceil(REGION)).filter_map(move |number| {
            let region = number * REGION..((number + 1) * REGION).min(self.size);
            let bytes = end.min(region.end).saturating_sub(device.start.max(region.start)) as u32;
            let read = self.read.get(number as usize)?;
            let before = read.fetch_add(bytes, Ordering::Relaxed);
            let whole = u64::from(before) + u64::from(bytes) >= region.end - region.start;
            whole.then(|| {
                read.store(0, Ordering::Relaxed);
                region
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_is_released_when_all_of_it_was_read() {
        let regions = Regions::new(2 * REGION + 100);
        let count = |range| regions.count(range).collect::<Vec<_>>();
        assert_eq!(count(0..REGION - 1), []);
        assert_eq!(count(REGION - 1..REGION + 1), std::slice::from_ref(&(0..REGION)));
        assert_eq!(count(0..REGION - 1), [], "it counts anew");
        assert_eq!(
            count(REGION + 1..2 * REGION + 100),
            [REGION..2 * REGION, 2 * REGION..2 * REGION + 100]
        );
        assert_eq!(count(2 * REGION + 100..u64::MAX), []);
        assert_eq!(Regions::new(0).count(0..10).count(), 0);
    }
}
