//! The disk of an image: one read-only block device with the EROFS file system of the image.
//!
//! The disk has the metadata of the tree first, and then the data device of every layer, base first:
//!
//! ```text
//! | metadata | device of layer 0 | device of layer 1 | ...
//! ```
//!
//! These are the bytes that `ocifs export --format erofs` writes. They are the same on every host and from every
//! source, because the tree and the data devices are. A door (a file, NBD, vhost-user-blk) asks for a range of
//! the disk. The metadata is in memory. The rest comes from [`crate::content`], as for the files of a mount, so a
//! read fetches what a read of the same bytes through a file would fetch.
//!
//! Invariants:
//! - A read of metadata never waits and never fails.
//! - A failed read says nothing about the next one: each one tries again (within the rule of [`crate::content`] for
//!   reads right after a timeout).

mod client;

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

pub use self::client::{ClientShares, IN_FLIGHT, LONGEST_AT_ONCE, LONGEST_READ};
use crate::content::{Content, ContentError};
use crate::erofs::Mapping;
use crate::image::Image;
use crate::tree::LayerIdx;

/// Bytes of a block of the disk. The size of the disk is a multiple of it.
pub const BLOCK: u64 = crate::toc::DEVICE_BLOCK;

/// Bytes of reads that wait, over all clients of a disk. A larger value lets many clients together take more memory; with
/// a smaller one, fewer reads wait for the network at a time.
pub const WAITING: u32 = 256 << 20;

/// The disk of one image.
#[derive(Debug, Clone)]
pub struct Disk {
    content: Arc<Content>,
    /// Where the device of each layer ends on the disk.
    ends: Arc<[u64]>,
    /// What is left of [`WAITING`].
    waiting: Arc<Semaphore>,
}

impl Disk {
    /// The disk of the image with this content.
    pub fn new(content: Arc<Content>) -> Self {
        let image = content.image();
        let mut end = image.tree().image().len() as u64;
        let ends = image.layers().iter().map(|layer| {
            end += layer.spans().device_size();
            end
        });
        Self {
            ends: ends.collect(),
            waiting: Arc::new(Semaphore::new(WAITING as usize)),
            content: content.clone(),
        }
    }

    /// The image.
    pub fn image(&self) -> &Arc<Image> {
        self.content.image()
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.ends.last().copied().unwrap_or(self.metadata().len() as u64)
    }

    /// The part of the disk that is always in memory.
    fn metadata(&self) -> &[u8] {
        self.image().tree().image()
    }

    /// Returns the part of a range that lies on the disk.
    fn clip(&self, offset: u64, length: usize) -> Range<u64> {
        let size = self.size();
        let start = offset.min(size);
        start..start.saturating_add(length as u64).min(size)
    }

    /// Copies the metadata of a range to the front of `buf`. Returns the part of the range that lies behind it.
    fn copy_metadata(&self, range: Range<u64>, buf: &mut [u8]) -> Range<u64> {
        let metadata = self.metadata();
        let end = range.end.min(metadata.len() as u64);
        if range.start >= end {
            return range;
        }
        let part = &metadata[range.start as usize..end as usize];
        buf[..part.len()].copy_from_slice(part);
        end..range.end
    }

    /// The places of a range behind the metadata, in the layers' data devices.
    fn places(&self, range: Range<u64>) -> impl Iterator<Item = Mapping> {
        let mut at = range.start;
        let mut layer = self.ends.partition_point(|&end| end <= at);
        std::iter::from_fn(move || {
            if at >= range.end {
                return None;
            }
            // An empty device has no place of its own.
            while self.ends[layer] <= at {
                layer += 1;
            }
            let start = match layer {
                0 => self.metadata().len() as u64,
                layer => self.ends[layer - 1],
            };
            let len = self.ends[layer].min(range.end) - at;
            let place = Mapping::Device {
                layer: LayerIdx(layer as u32),
                offset: at - start,
                len,
            };
            at += len;
            Some(place)
        })
    }

    /// Requests the bytes of a range that are missing. Returns when the requests are in flight.
    pub async fn fetch_ahead(&self, offset: u64, length: usize) {
        let range = self.clip(offset, length);
        let start = range.start.max(self.metadata().len() as u64);
        let places: Vec<Mapping> = self.places(start..range.end).collect();
        for place in places {
            if let Mapping::Device { layer, offset, len } = place {
                self.image().layer(layer).fetch_ahead(offset..offset + len).await;
            }
        }
    }

    /// Fills `buf` with the bytes from `offset` on if all of them are local. Returns the number of bytes, which is
    /// smaller than `buf` only at the end of the disk. Returns `None` if the read would have to wait.
    pub fn read_local(&self, offset: u64, buf: &mut [u8]) -> Option<usize> {
        let range = self.clip(offset, buf.len());
        let length = (range.end - range.start) as usize;
        let rest = self.copy_metadata(range, buf);
        if !rest.is_empty() {
            let behind = &mut buf[length - (rest.end - rest.start) as usize..length];
            let places = self.places(rest).map(Ok::<_, std::convert::Infallible>);
            let Ok(here) = self.content.read_local(places, behind);
            if !here {
                return None;
            }
        }
        Some(length)
    }

    /// Reads like [`Disk::read_local`], but waits: for its part of [`WAITING`], and then for missing bytes. Both together
    /// take at most the timeout of the content.
    pub async fn read(&self, offset: u64, length: usize) -> Result<Vec<u8>, ContentError> {
        let began = Instant::now();
        let range = self.clip(offset, length);
        let length = (range.end - range.start) as usize;
        let _share = self.share(length).await?;
        let start = range.start;
        let behind = start.max(self.metadata().len() as u64)..range.end;
        let missing = behind.end.saturating_sub(behind.start) as usize;
        let mut bytes = match missing {
            0 => Vec::new(),
            _ => {
                let places: Vec<Mapping> = self.places(behind).collect();
                self.content.read_since(began, &places, missing).await?
            }
        };
        if missing < length {
            let end = start as usize + length - missing;
            bytes.splice(..0, self.metadata()[start as usize..end].iter().copied());
        }
        Ok(bytes)
    }

    /// Takes the part of [`WAITING`] for a read.
    async fn share(&self, length: usize) -> Result<OwnedSemaphorePermit, ContentError> {
        let bytes = u32::try_from(length).unwrap_or(u32::MAX).min(WAITING);
        let share = self.waiting.clone().acquire_many_owned(bytes);
        let share = match self.content.timeout() {
            None => share.await,
            Some(timeout) => match tokio::time::timeout(timeout, share).await {
                Ok(share) => share,
                Err(_) => return Err(ContentError::Timeout { timeout }),
            },
        };
        Ok(share.expect("no code closes the semaphore"))
    }
}
