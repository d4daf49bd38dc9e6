//! How much of a layer is on the disk.

use std::fs;

use crate::device::DataDevice;
use crate::oci::Digest;
use crate::span::SpanMap;
use crate::store::Store;

/// What the store has of a layer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KeptOfLayer {
    /// Nothing has to be fetched any more.
    pub is_whole: bool,
    /// Compressed bytes that need not be fetched again.
    pub bytes: u64,
}

/// What the store has of a layer, indexed or still coming in.
pub fn kept_of_layer(store: &Store, digest: &Digest) -> KeptOfLayer {
    let Some(dir) = store.layer(digest) else {
        return KeptOfLayer::default();
    };
    let Some(spans) = super::open::stored_spans(&dir, digest) else {
        return KeptOfLayer {
            is_whole: false,
            bytes: fs::metadata(dir.partial()).map_or(0, |partial| partial.len()),
        };
    };
    let opened = dir.data().exists().then(|| DataDevice::open(store, &dir, &spans));
    let device = opened.transpose().unwrap_or_else(|error| {
        tracing::debug!(%error, "cannot see what is there of a layer");
        None
    });
    let count = spans.span_count();
    // What cannot be read is not there.
    let present = device.and_then(|device| device.present(0..count).ok());
    let present = present.unwrap_or_else(|| vec![false; count as usize]);
    let (here, bytes) = super::data::local(&spans, &present);
    KeptOfLayer {
        is_whole: here == count,
        bytes,
    }
}
