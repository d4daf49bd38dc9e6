//! How much of a layer is on the disk.

use std::fs;

use crate::device::DataDevice;
use crate::oci::Digest;
use crate::store::{LayerDir, Store};

/// How much of a layer the store has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KeptOfLayer {
    /// Whether the layer needs no more fetches.
    pub is_whole: bool,
    /// Compressed bytes that need not be fetched again.
    pub bytes: u64,
}

/// Returns how much of a layer the store has, whether the layer is indexed or its first pass was interrupted.
pub fn kept_of_layer(store: &Store, digest: &Digest) -> KeptOfLayer {
    let dirs = store.layers().unwrap_or_else(|error| {
        tracing::debug!(%error, "cannot see what is there of a layer");
        Vec::new()
    });
    let of_layer = dirs.iter().filter(|dir| dir.digest().as_ref() == Some(digest));
    let kept = of_layer.map(|dir| kept_in(store, dir, digest));
    kept.max_by_key(|kept| (kept.is_whole, kept.bytes)).unwrap_or_default()
}

/// Returns how much of a layer one of its directories has.
pub fn kept_in(store: &Store, dir: &LayerDir, digest: &Digest) -> KeptOfLayer {
    let Some(spans) = super::stored::stored_map(dir, digest) else {
        return KeptOfLayer {
            is_whole: false,
            bytes: fs::metadata(dir.partial()).map_or(0, |partial| partial.len()),
        };
    };
    let opened = dir.data().exists().then(|| DataDevice::open(store, dir, &*spans));
    let device = opened.transpose().unwrap_or_else(|error| {
        tracing::debug!(%error, "cannot see what is there of a layer");
        None
    });
    let count = spans.span_count();
    // A device that cannot be read counts as empty.
    let present = device.and_then(|device| device.present(0..count).ok());
    let present = present.unwrap_or_else(|| vec![false; count as usize]);
    let (here, bytes) = super::data::local(&*spans, &present);
    KeptOfLayer {
        is_whole: here == count,
        bytes,
    }
}
