//! The content of an image, as every door reads it.
//!
//! A door (a FUSE directory, a disk) maps the requested bytes to ranges of the layers' data devices. Then it asks this
//! module for these ranges. Local bytes come at once; for other bytes the reader waits.
//!
//! This module decides what is the same for the readers of all doors:
//! - How long a read may wait (`asked`).
//! - How reading times are counted (`latency`).
//! - Which reading problems `status` shows (`trouble`).
//! - When a read starts a program, so that the files of the program are fetched (`Image::started`).
//!
//! Invariants:
//! - The time from the first request for some bytes to the last answer is at most the timeout and a moment
//!   (`asked`).
//! - A read of local bytes takes no lock of this module, unless a problem is being shown.

mod asked;
mod latency;
mod trouble;

use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

pub use latency::ReadStatus;
use latency::Reads;

use self::asked::{DeviceRange, FailedRanges};
use self::trouble::ReadTrouble;
use crate::erofs::Mapping;
use crate::image::Image;
use crate::layer::LayerError;

/// Why content could not be read.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum ContentError {
    /// A layer could not deliver the content.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// The content did not come before the deadline.
    #[error("no data within {}s", timeout.as_secs_f32())]
    Timeout {
        /// The timeout that passed.
        timeout: Duration,
    },
}

impl ContentError {
    /// Whether the content itself is wrong, as opposed to a failure to fetch it.
    fn is_of_content(&self) -> bool {
        matches!(self, Self::Layer(LayerError::Corrupt { .. }))
    }
}

/// The bytes of an image's files.
#[derive(Debug)]
pub struct Content {
    image: Arc<Image>,
    timeout: Option<Duration>,
    /// Whether readers keep what they get.
    kept: bool,
    asked: FailedRanges,
    reads: Reads,
    trouble: ReadTrouble,
}

impl Content {
    /// Serves the content of `image`. A read that waits longer than `timeout` fails; without a timeout it waits for
    /// ever. Further reads of the same bytes right after such a failure fail at once, because the kernel repeats
    /// failed reads.
    pub fn new(image: Arc<Image>, timeout: Option<Duration>) -> Self {
        Self {
            image,
            timeout,
            kept: false,
            asked: FailedRanges::default(),
            reads: Reads::default(),
            trouble: ReadTrouble::default(),
        }
    }

    /// States that the readers keep what they get. The kernel does so when it reads files through FUSE. The data devices'
    /// own pages are then released.
    pub fn kept_by_readers(self) -> Self {
        Self { kept: true, ..self }
    }

    /// How long a read may wait. `None` means for ever.
    pub(crate) fn timeout(&self) -> Option<Duration> {
        self.timeout
    }

    /// The image.
    pub fn image(&self) -> &Arc<Image> {
        &self.image
    }

    /// How many reads there were, and how long they took.
    pub fn reads(&self) -> ReadStatus {
        self.reads.snapshot()
    }

    /// Whether a read waits.
    pub(crate) fn has_waiting_reads(&self) -> bool {
        self.reads.waiting() > 0
    }

    /// Describes the present problem with reading, if there is one.
    pub fn problem(&self) -> Option<String> {
        self.trouble.problem(self.image.landed())
    }

    /// Fills `buf` with the bytes of `parts` and returns true if all of them are local. Otherwise returns false, and
    /// the contents of `buf` are undefined. The parts together must be at least as long as `buf`. Returns the first
    /// error of `parts`.
    pub fn read_local<E>(
        &self,
        parts: impl Iterator<Item = Result<Mapping, E>>,
        mut buf: &mut [u8],
    ) -> Result<bool, E> {
        let start = Instant::now();
        let mut first = None;
        for part in parts {
            let part = part?;
            let (now, later) = buf.split_at_mut(buf.len().min(clamp(part.bytes())));
            match part {
                Mapping::Hole { .. } => now.fill(0),
                Mapping::Device { layer, offset, .. } => {
                    if !self.image.layer(layer).read_local(offset, now) {
                        return Ok(false);
                    }
                    let place = DeviceRange::new(layer, offset, now.len());
                    if self.kept {
                        self.image.layer(layer).kept_by_reader(place.device.clone());
                    }
                    self.image.started(layer, offset);
                    first.get_or_insert(place);
                }
            }
            buf = later;
        }
        self.reads.at_once(start);
        if self.trouble.is_any()
            && let Some(place) = first
        {
            self.trouble.read_worked(self.run_of(&place));
        }
        Ok(true)
    }

    /// Reads the first `length` bytes of the parts. Waits for missing bytes, at most for the timeout, whereas
    /// [`Content::read_local`] never waits.
    pub async fn read(&self, parts: &[Mapping], length: usize) -> Result<Vec<u8>, ContentError> {
        self.read_since(Instant::now(), parts, length).await
    }

    /// Reads like [`Content::read`]. The timeout counts from `began`, because the reader has waited since then.
    pub(crate) async fn read_since(
        &self,
        began: Instant,
        parts: &[Mapping],
        length: usize,
    ) -> Result<Vec<u8>, ContentError> {
        let places = places(parts, length);
        let Some(timeout) = self.timeout else {
            return self.read_until(None, &places, parts, length).await;
        };
        let wait = self.asked.wait(places.clone(), timeout, began);
        if wait.is_over() {
            return Err(ContentError::Timeout { timeout });
        }
        let result = self.read_until(Some(wait.deadline), &places, parts, length).await;
        if result.is_err() {
            self.asked.failed(wait, Instant::now());
        }
        result
    }

    async fn read_until(
        &self,
        deadline: Option<Instant>,
        places: &[DeviceRange],
        parts: &[Mapping],
        length: usize,
    ) -> Result<Vec<u8>, ContentError> {
        let waiting = self.reads.wait();
        let mut reading = std::pin::pin!(self.read_waiting(parts, length));
        // The first poll requests the bytes that the reader waits for. Bytes that the program may load are requested
        // after it.
        let first = futures::poll!(&mut reading);
        for place in places {
            self.image.started(place.layer, place.device.start);
        }
        let late = ContentError::Timeout {
            timeout: self.timeout.unwrap_or_default(),
        };
        let result = match (first, deadline) {
            (Poll::Ready(result), _) => result,
            (Poll::Pending, None) => reading.await,
            (Poll::Pending, Some(deadline)) => tokio::time::timeout_at(deadline.into(), reading)
                .await
                .unwrap_or(Err(late)),
        };
        tracing::debug!(?places, took_ms = waiting.elapsed().as_secs_f64() * 1e3, "read waited");
        if let Some(place) = places.first() {
            let run = self.run_of(place);
            match &result {
                Ok(_) => self.trouble.read_worked(run),
                Err(error) => {
                    let landed = self.image.landed();
                    self.trouble.read_failed(run, error.is_of_content(), error, landed);
                }
            }
        }
        result
    }

    async fn read_waiting(&self, parts: &[Mapping], length: usize) -> Result<Vec<u8>, ContentError> {
        let mut buf = vec![0; length];
        let mut done = 0;
        for part in parts {
            let end = length.min(done + clamp(part.bytes()));
            if let Mapping::Device { layer, offset, .. } = *part {
                self.image.layer(layer).read(offset, &mut buf[done..end]).await?;
            }
            done = end;
        }
        Ok(buf)
    }

    /// The layer and the start of the run of content around a place. A run is mostly one file.
    fn run_of(&self, place: &DeviceRange) -> (u32, u64) {
        let run = self.image.layer(place.layer).spans().run_around(place.device.start);
        (place.layer.0, run.map_or(place.device.start, |run| run.start))
    }
}

/// The places of the first `length` bytes of `parts`, without holes.
fn places(parts: &[Mapping], length: usize) -> Vec<DeviceRange> {
    let mut left = length;
    let mut places = Vec::new();
    for part in parts {
        let len = left.min(clamp(part.bytes()));
        if let Mapping::Device { layer, offset, .. } = *part
            && len > 0
        {
            places.push(DeviceRange::new(layer, offset, len));
        }
        left -= len;
    }
    places
}

fn clamp(len: u64) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}
