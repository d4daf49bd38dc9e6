//! What all mounts of a process share of one layer: its spans, its data device, and the flights under way.
//!
//! Each layer has one [`LayerData`] in a process, however many images have the layer, and it lives as long as one of them is
//! open ([`SharedLayers`]). So a span is fetched once for all of them, and the locks of the data device have one holder. It
//! fetches nothing by itself: a flight belongs to the [`super::Layer`] whose reader began it.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, Weak};

use tokio::sync::Semaphore;

use super::disk::{LayerDisk, Miss};
use super::health::Health;
use super::memory::SpanMemory;
use super::stripes::Ahead;
use super::windows::Windows;
use super::Landing;
use crate::device::{CacheBudget, DataDevice};
use crate::fetch::{Board, Flights, Lanes, Spans as _};
use crate::memory::{Allowance, Charge, TABLES};
use crate::oci::{DiffId, Digest};
use crate::span::SpanMap;
use crate::store::{LayerDir, Store};

/// Layers streamed side by side. More than the cores need, because many small layers wait for round trips, not for cores.
const PASSES: usize = 8;

/// What all layers of a process share.
#[derive(Debug, Clone)]
pub struct LayerContext {
    /// Where indexes and data devices are kept.
    pub store: Store,
    /// Decoded spans in memory.
    pub memory: Arc<SpanMemory>,
    /// What the tables of the image may take beside that.
    pub tables: Arc<Allowance>,
    /// Limit of the data devices.
    pub budget: Arc<CacheBudget>,
    /// What stopped working without stopping the mount.
    pub health: Arc<Health>,
    /// Layers that are streamed are asked for until they come.
    pub(super) patient: bool,
    pub(super) passes: Arc<Semaphore>,
    pub(super) windows: Windows,
    pub(super) shared: Arc<SharedLayers>,
    pub(super) ahead: Ahead,
    /// Who may send a request now.
    pub lanes: Arc<Lanes>,
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
            passes: Arc::new(Semaphore::new(PASSES)),
            ahead: Ahead::default(),
            shared: Arc::default(),
            lanes: Arc::default(),
        }
    }

    /// With layers that are streamed asked for until they come, whatever the timeout is: whoever waits for them is told
    /// otherwise when that takes too long.
    pub fn patient(self) -> Self {
        Self { patient: true, ..self }
    }
}

/// One layer, without a way to fetch it.
#[derive(Debug)]
pub(super) struct LayerData {
    pub(super) digest: Digest,
    pub(super) diff_id: DiffId,
    pub(super) spans: Box<dyn SpanMap>,
    /// Memory of the span map.
    pub(super) _charge: Charge,
    pub(super) disk: LayerDisk,
    /// Where the device is kept, to make a new one when it is damaged as a whole.
    pub(super) home: Option<LayerDir>,
    pub(super) context: LayerContext,
    pub(super) flights: Arc<Flights<Landing>>,
}

impl LayerData {
    /// Whether a range of the device has any content.
    pub(super) fn has_content(&self, range: Range<u64>) -> bool {
        self.spans.content(range).is_some()
    }

    /// Whether what is fetched is kept on disk, as far as one knows: that may be full, or come to be.
    pub(super) fn keeps(&self) -> bool {
        self.disk.keeps()
    }

    /// Spans that need no fetch, and their compressed bytes.
    pub(super) fn local(&self) -> (u32, u64) {
        local(&*self.spans, &self.present())
    }

    /// For each span whether it is on the device.
    pub(super) fn present(&self) -> Vec<bool> {
        self.disk.present(self.spans.span_count())
    }

    /// Whether a read of the span needs no flight.
    pub(super) fn is_local(&self, span: u32) -> bool {
        self.disk.is_present(span)
    }

    /// Whether memory has a span that the device could not take.
    pub(super) fn is_in_memory(&self, span: u32) -> bool {
        self.context.memory.contains(&self.digest, span)
    }

    /// Whether nobody has the span or is about to.
    pub(super) fn is_missing(&self, board: &Board<'_, Landing>, span: u32) -> bool {
        !board.is_flying(span) && !self.is_local(span) && !self.is_in_memory(span)
    }

    /// Reads checked bytes from the device; false if not all of them are there. What is damaged there is dropped, so that it
    /// is fetched again.
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
            // A span that is being fetched is about to be written, and its lock is not to be taken by anybody else here.
            let board = self.flights.board();
            if !board.is_flying(span) {
                self.disk.drop_span(span);
            }
        }
        false
    }

    /// Makes an empty device in place of one that is damaged as a whole.
    fn replace_device(&self, damaged: &Arc<DataDevice>) {
        let Some(dir) = &self.home else { return };
        self.disk.replace(damaged, || {
            let opened = DataDevice::open(&self.context.store, dir, &*self.spans);
            opened.map_err(|error| self.context.health.store_lost(&error)).ok()
        });
    }

    /// What a flight for `span` brings: all of its group, since decoding passes over it anyway; if it cannot be kept only as
    /// much as memory can hold beside what others read, for the rest would be gone before anybody asks for it.
    pub(super) fn wanted_of_group(&self, span: u32, end: u32) -> Range<u32> {
        let group = self.spans.group(span);
        if self.keeps() {
            return group;
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
pub(super) struct SharedLayers(Mutex<HashMap<Digest, Weak<LayerData>>>);

impl SharedLayers {
    /// The layer, if it is open.
    pub(super) fn get(&self, digest: &Digest) -> Option<Arc<LayerData>> {
        self.0.lock().expect("no panic while locked").get(digest)?.upgrade()
    }

    /// Shares a layer that was opened; if another one was faster, that one is the layer.
    pub(super) fn share(&self, data: LayerData) -> Arc<LayerData> {
        let mut layers = self.0.lock().expect("no panic while locked");
        if let Some(first) = layers.get(&data.digest).and_then(Weak::upgrade) {
            return first;
        }
        layers.retain(|_, layer| layer.strong_count() > 0);
        let digest = data.digest.clone();
        let data = Arc::new(data);
        layers.insert(digest, Arc::downgrade(&data));
        data
    }
}

/// How many spans of a layer are there, of each of which `present` says whether it is, and their compressed bytes.
pub(super) fn local(map: &dyn SpanMap, present: &[bool]) -> (u32, u64) {
    let here = |span: u32| present[span as usize];
    let (mut spans, mut bytes, mut start) = (0, 0, 0);
    // By stretches, because neighbours share a byte where one ends within it.
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
