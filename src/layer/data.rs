//! The data of one layer that all mounts of a process share: its spans, its data device, and its flights.
//!
//! A process has one [`LayerData`] per layer, however many images have the layer. The data lives as long as one of
//! these images is open ([`SharedLayers`]). So each span is fetched once for all images, and the locks of the data
//! device have one holder. Only a layer whose index could not be kept in the store is not shared.
//!
//! `LayerData` fetches nothing itself: a flight belongs to the [`super::Layer`] whose reader started it.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use tokio::sync::Semaphore;

use super::Landing;
use super::disk::{LayerDisk, Miss};
use super::health::Health;
use super::memory::SpanMemory;
use super::regions::Regions;
use super::stripes::Ahead;
use super::windows::Windows;
use crate::device::{CacheBudget, DataDevice};
use crate::fetch::{Board, Flights, Lanes, Spans as _};
use crate::memory::{Allowance, Charge, TABLES};
use crate::oci::{DiffId, Digest};
use crate::published::Locations;
use crate::span::SpanMap;
use crate::store::{Authority, IndexName, LayerDir, Store, StoreError};

/// Number of layers that are streamed at the same time. The number exceeds the number of cores, because many small
/// layers wait for round trips, not for cores.
const PASSES: usize = 8;

/// The objects that all layers of a process share.
#[derive(Debug, Clone)]
pub struct LayerContext {
    /// The store of indexes and data devices.
    pub store: Store,
    /// Decoded spans in memory.
    pub(crate) memory: Arc<SpanMemory>,
    /// Memory limit of the image's tables, besides the spans in memory.
    pub(crate) tables: Arc<Allowance>,
    /// Disk space limit of the data devices.
    pub(crate) budget: Arc<CacheBudget>,
    /// Problems that the mount works around.
    pub health: Arc<Health>,
    /// Whether to retry failed requests of a layer that is being streamed without a deadline.
    pub(super) patient: bool,
    /// The timeout of reads, if they have one.
    pub(super) timeout: Option<Duration>,
    pub(super) passes: Arc<Semaphore>,
    pub(super) windows: Windows,
    pub(super) shared: Arc<SharedLayers>,
    pub(super) ahead: Ahead,
    /// The queues in which requests wait for their passes.
    pub(crate) lanes: Arc<Lanes>,
    /// Where indexes that somebody else has made are looked for.
    pub locations: Locations,
}

impl LayerContext {
    /// A context with `memory` bytes for decoded spans and `cache` bytes for data devices.
    pub fn new(store: Store, memory: usize, cache: u64) -> Self {
        let tables = Allowance::new(TABLES + memory as u64);
        Self {
            budget: CacheBudget::new(store.clone(), cache),
            store,
            memory: Arc::new(SpanMemory::new(memory)),
            windows: Windows::new(tables.clone()),
            tables,
            health: Arc::default(),
            patient: false,
            timeout: None,
            passes: Arc::new(Semaphore::new(PASSES)),
            ahead: Ahead::default(),
            shared: Arc::default(),
            lanes: Arc::default(),
            locations: Locations::default(),
        }
    }

    /// Returns this context with places where indexes are looked for.
    pub fn with_locations(self, locations: Locations) -> Self {
        Self { locations, ..self }
    }

    /// Who may vouch for the index of a layer, best first.
    pub(crate) fn authorities(&self) -> Vec<Authority> {
        [vec![Authority::Pass], self.locations.authorities()].concat()
    }

    /// Returns this context with retries without a deadline for layers that are being streamed, whatever the timeout
    /// is. Readers that wait for such a layer get an error from the mount when the wait takes too long.
    pub fn patient(self) -> Self {
        Self { patient: true, ..self }
    }

    /// Returns this context with the timeout of reads. What a layer can do without takes only a part of that time.
    pub fn with_timeout(self, timeout: Option<Duration>) -> Self {
        Self { timeout, ..self }
    }

    /// Removes a stored index, so that the next opening makes it again. Images that are open keep the index that they
    /// have.
    pub fn forget(&self, index: &IndexName) -> Result<(), StoreError> {
        self.shared.forget(index);
        self.store.index(index).map_or(Ok(()), |dir| dir.forget())
    }
}

/// One layer, without a source to fetch it from.
#[derive(Debug)]
pub(super) struct LayerData {
    pub(super) digest: Digest,
    pub(super) diff_id: DiffId,
    /// Names the index that `spans` comes from.
    pub(super) index: IndexName,
    pub(super) authority: Authority,
    pub(super) spans: Box<dyn SpanMap>,
    /// Memory charge of the span map.
    pub(super) _charge: Charge,
    pub(super) disk: LayerDisk,
    /// Directory of the device, to make a new device when the old one is damaged as a whole.
    pub(super) home: Option<LayerDir>,
    pub(super) context: LayerContext,
    pub(super) flights: Arc<Flights<Landing>>,
    /// How much of each region was read by readers that keep it.
    pub(super) regions: Regions,
}

impl LayerData {
    /// Whether a range of the device has any content.
    pub(super) fn has_content(&self, range: Range<u64>) -> bool {
        self.spans.content(range).is_some()
    }

    /// Whether fetched spans are expected to be kept on disk. The disk may still be full, or become full.
    pub(super) fn keeps(&self) -> bool {
        self.disk.keeps()
    }

    /// Number of spans on the device, and their compressed bytes.
    pub(super) fn local(&self) -> (u32, u64) {
        local(&*self.spans, &self.present())
    }

    /// Returns for each span whether it is on the device.
    pub(super) fn present(&self) -> Vec<bool> {
        self.disk.present(self.spans.span_count())
    }

    /// Whether the span is on the device, so that a read of it needs no flight.
    pub(super) fn is_local(&self, span: u32) -> bool {
        self.disk.is_present(span)
    }

    /// Whether the memory cache has the span.
    pub(super) fn is_in_memory(&self, span: u32) -> bool {
        self.context.memory.contains(&self.index, span)
    }

    /// Whether the span is neither local, nor in memory, nor in flight.
    pub(super) fn is_missing(&self, board: &Board<'_, Landing>, span: u32) -> bool {
        !board.is_flying(span) && !self.is_local(span) && !self.is_in_memory(span)
    }

    /// Reads verified bytes from the device. Returns false if not all of them are there. Drops damaged spans from the
    /// device, so that they are fetched again.
    pub(super) fn read_device(&self, offset: u64, buf: &mut [u8]) -> bool {
        let read = self.disk.read(offset, buf, |range| self.has_content(range));
        let damaged = match read {
            Ok(()) => return true,
            Err(Miss::Absent) => return false,
            Err(Miss::Lost(device)) => {
                self.replace_device(&device);
                return false;
            }
            Err(Miss::Damaged(span)) => span..span + 1,
            Err(Miss::Unreadable) => self.spans.spans(offset..offset + buf.len() as u64),
        };
        for span in damaged {
            // A span in flight is about to be written, and only its flight may use its lock.
            let board = self.flights.board();
            if !board.is_flying(span) {
                self.disk.drop_span(span);
            }
        }
        false
    }

    /// Replaces a device that is damaged as a whole with an empty one.
    fn replace_device(&self, damaged: &Arc<DataDevice>) {
        let Some(dir) = &self.home else { return };
        self.disk.replace(damaged, || {
            let opened = DataDevice::open(&self.context.store, dir, &*self.spans);
            opened.map_err(|error| self.context.health.store_lost(&error)).ok()
        });
    }

    /// Returns the spans that a flight for the spans from `span` to `end` should deliver. All lie in the group of `span`.
    ///
    /// If spans can be kept on disk, they begin with the group, because decoding passes over all spans before `span`.
    /// The first flight in a group ends at `end`. A later one fetches and decodes again what the earlier ones did. So it
    /// goes on at least twice as far, and all flights in a group fetch at most about three times its bytes.
    ///
    /// If spans cannot be kept on disk, they begin with `span`. Spans from `end` on are added only while all fit into half
    /// of the memory cache. Further ones would be evicted before a reader asks for them.
    pub(super) fn wanted_of_group(&self, span: u32, end: u32) -> Range<u32> {
        let group = self.spans.group(span);
        if self.keeps() {
            let end = end.max(span + 1);
            let again = self.is_local(group.start) && span > group.start;
            let further = if again { end - group.start } else { 0 };
            return group.start..end.saturating_add(further).min(group.end);
        }
        let mut room = (self.context.memory.budget() / 2) as u64;
        let fits = |&other: &u32| {
            let left = room.checked_sub(self.spans.decoded_size(other));
            room = left.unwrap_or_default();
            other < end || left.is_some()
        };
        span..(span..group.end).take_while(fits).last().unwrap_or(span) + 1
    }
}

/// The layers that are open in a process.
#[derive(Debug, Default)]
pub(super) struct SharedLayers(Mutex<HashMap<IndexName, Weak<LayerData>>>);

impl SharedLayers {
    /// Returns the layer if it is open.
    pub(super) fn get(&self, index: &IndexName) -> Option<Arc<LayerData>> {
        self.0.lock().expect("no panic while locked").get(index)?.upgrade()
    }

    /// Ends the sharing of a layer. Images that have it open keep it.
    fn forget(&self, index: &IndexName) {
        self.0.lock().expect("no panic while locked").remove(index);
    }

    /// Shares a layer that was just opened. If the layer is shared already, returns the shared one.
    pub(super) fn share(&self, data: LayerData) -> Arc<LayerData> {
        let mut layers = self.0.lock().expect("no panic while locked");
        if let Some(first) = layers.get(&data.index).and_then(Weak::upgrade) {
            return first;
        }
        layers.retain(|_, layer| layer.strong_count() > 0);
        let index = data.index.clone();
        let data = Arc::new(data);
        layers.insert(index, Arc::downgrade(&data));
        data
    }
}

/// Returns the number of spans of a layer that are present, and their compressed bytes. `present` says for each span
/// whether it is present.
pub(super) fn local(map: &dyn SpanMap, present: &[bool]) -> (u32, u64) {
    let here = |span: u32| present[span as usize];
    let (mut spans, mut bytes, mut start) = (0, 0, 0);
    // Bytes are added up per stretch: if a span ends within a byte, its neighbour shares that byte.
    for span in 0..=map.span_count() {
        if span < map.span_count() && here(span) {
            spans += 1;
        } else {
            bytes += map.bytes(start..span);
            start = span + 1;
        }
    }
    // Headers and trailers belong to no span.
    let whole = spans == map.span_count();
    (spans, if whole { map.blob_size() } else { bytes })
}
