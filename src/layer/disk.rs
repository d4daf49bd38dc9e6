//! The data device of a layer, with detection and repair of damage: a read finds the damage, and a fetch repairs it.
//!
//! - A span that is not what was written is dropped from the device. Its reader then fetches it like any absent span.
//! - A span that is damaged again and again, or that cannot be dropped, is *distrusted*. This process does not use
//!   the device for a distrusted span.
//! - A file that was cut short is replaced by an empty one.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};

use super::Health;
use crate::device::{CacheBudget, DataDevice, Found, SpanLock};
use crate::oci::Digest;
use crate::span::Piece;

/// A span that is damaged more often than this is distrusted.
const MOST_HEALS: u32 = 3;

/// The damage history of one span.
#[derive(Debug, Clone, Copy, Default)]
struct Damage {
    times: u32,
    /// The span was dropped and has not been written again.
    dropped: bool,
    distrusted: bool,
}

/// The data device of one layer, if there is one.
#[derive(Debug)]
pub(super) struct LayerDisk {
    layer: Digest,
    device: RwLock<Option<Arc<DataDevice>>>,
    damage: Mutex<HashMap<u32, Damage>>,
    /// Whether the device took the last span that was to be written to it.
    keeps: AtomicBool,
    budget: Arc<CacheBudget>,
    health: Arc<Health>,
    /// Number of spans that were damaged and are on the device again. A device that was replaced counts as one.
    healed: AtomicU64,
}

/// Why a read of the device did not get its bytes.
#[derive(Debug)]
pub(super) enum Miss {
    /// The bytes are not on the device.
    Absent,
    /// This span is damaged.
    Damaged(u32),
    /// No bytes of the range can be read from the file.
    Unreadable,
    /// The file of this device was cut short, or is not at its place.
    Lost(Arc<DataDevice>),
}

impl LayerDisk {
    pub(super) fn new(
        layer: Digest,
        device: Option<DataDevice>,
        budget: Arc<CacheBudget>,
        health: Arc<Health>,
    ) -> Self {
        Self {
            layer,
            keeps: AtomicBool::new(device.as_ref().is_some_and(DataDevice::is_writable)),
            device: RwLock::new(device.map(Arc::new)),
            damage: Mutex::default(),
            budget,
            health,
            healed: AtomicU64::new(0),
        }
    }

    /// Number of damaged spans that are on the device again.
    pub(super) fn healed(&self) -> u64 {
        self.healed.load(Ordering::Relaxed)
    }

    /// The device, if it can be used.
    pub(super) fn device(&self) -> Option<Arc<DataDevice>> {
        self.device.read().expect("no panic while locked").clone()
    }

    /// Whether fetched spans are expected to be kept on disk. The disk may still be full, or become full.
    pub(super) fn keeps(&self) -> bool {
        self.keeps.load(Ordering::Relaxed) && self.device().is_some()
    }

    /// Records that fetched spans cannot be kept at present.
    pub(super) fn cannot_keep(&self) {
        self.keeps.store(false, Ordering::Relaxed);
    }

    /// Whether the span is on the device and is not distrusted.
    pub(super) fn is_present(&self, span: u32) -> bool {
        let present = self
            .device()
            .is_some_and(|device| device.is_present(span).unwrap_or(false));
        present && !self.is_distrusted(span)
    }

    /// Returns for each span of the layer whether it is on the device and is not distrusted.
    pub(super) fn present(&self, count: u32) -> Vec<bool> {
        let records = self.device().and_then(|device| device.present(0..count).ok());
        let mut present = records.unwrap_or_else(|| vec![false; count as usize]);
        for (&span, damage) in &*self.damage.lock().expect("no panic while locked") {
            present[span as usize] &= !damage.distrusted;
        }
        present
    }

    fn is_distrusted(&self, span: u32) -> bool {
        let damage = self.damage.lock().expect("no panic while locked");
        damage.get(&span).is_some_and(|damage| damage.distrusted)
    }

    /// Fills `buf` from the device. `has_content` says whether a range of the device has any content.
    pub(super) fn read(
        &self,
        offset: u64,
        buf: &mut [u8],
        has_content: impl Fn(Range<u64>) -> bool,
    ) -> Result<(), Miss> {
        let device = self.device().ok_or(Miss::Absent)?;
        match device.read(offset, buf, has_content) {
            Ok(Found::Bytes) => Ok(()),
            Ok(Found::Absent) => Err(Miss::Absent),
            Ok(Found::Damaged(span)) => {
                tracing::warn!(layer = %self.layer, span, "a span on the data device is not what was written, fetching it again");
                Err(Miss::Damaged(span))
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::NotFound) => {
                tracing::warn!(layer = %self.layer, %error, "the data device is lost, opening it anew");
                Err(Miss::Lost(device))
            }
            Err(error) => {
                tracing::warn!(layer = %self.layer, offset, %error, "cannot read the data device, fetching again what is there");
                Err(Miss::Unreadable)
            }
        }
    }

    /// Drops a damaged span from the device. The caller must make sure that no flight of this process has the span's
    /// lock.
    pub(super) fn drop_span(&self, span: u32) {
        let Some(device) = self.device() else { return };
        let dropped = device.try_lock(&[span]).and_then(|(lock, held)| {
            // Another process has the lock, and will write or drop the span.
            match held.is_empty() {
                true => Ok(()),
                false => device.drop_span(&lock, span),
            }
        });
        let mut all = self.damage.lock().expect("no panic while locked");
        let damage = all.entry(span).or_default();
        damage.times += 1;
        damage.dropped = true;
        damage.distrusted |= damage.times > MOST_HEALS;
        if let Err(error) = dropped {
            tracing::warn!(layer = %self.layer, span, %error, "cannot drop a damaged span, going on without it");
            damage.distrusted = true;
        }
    }

    /// Puts another device in place of `old`, unless `old` was replaced already.
    pub(super) fn replace(&self, old: &Arc<DataDevice>, open: impl FnOnce() -> Option<DataDevice>) {
        let mut device = self.device.write().expect("no panic while locked");
        if device.as_ref().is_some_and(|device| Arc::ptr_eq(device, old)) {
            *device = open().map(Arc::new);
            if device.is_some() {
                self.healed.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Writes a verified span. Returns whether the span is on the device afterwards.
    pub(super) fn fill(&self, lock: Option<&SpanLock>, span: u32, pieces: &[Piece], bytes: &[u8]) -> bool {
        let (Some(device), Some(lock)) = (self.device(), lock) else {
            return false;
        };
        if self.is_distrusted(span) {
            return false;
        }
        let filled = self
            .budget
            .reserve(DataDevice::footprint(pieces))
            .is_some_and(|_reserved| {
                device.fill(lock, span, pieces, bytes).unwrap_or_else(|error| {
                    self.health
                        .store_failed(&format!("data device of layer {}: {error}", self.layer));
                    false
                })
            });
        self.keeps.store(filled, Ordering::Relaxed);
        if filled {
            self.health.store_works();
        }
        let mut damage = self.damage.lock().expect("no panic while locked");
        if filled
            && let Some(damage) = damage.get_mut(&span)
            && std::mem::take(&mut damage.dropped)
        {
            self.healed.fetch_add(1, Ordering::Relaxed);
        }
        filled
    }
}
