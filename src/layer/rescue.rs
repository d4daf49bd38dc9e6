//! Reads of a layer whose index turned out to be wrong.
//!
//! An index that no pass on this host made may state digests that the content does not have. The layer is then streamed once,
//! like a layer without an index. The pass finds the same files. If they have the same places in the data device, the layer
//! that was streamed answers the reads from then on. Otherwise the reads fail.

use std::collections::HashMap;
use std::sync::Arc;

use futures::FutureExt as _;
use futures::future::{BoxFuture, Shared};

use super::opening::ToOpen;
use super::{Layer, LayerError, OpenError, open, stored_toc};
use crate::store::{Authority, LayerDir};
use crate::task::{TaskError, joined};
use crate::toc::{EntryKind, FileData, PackedToc, TocError};

/// The layer that a pass opened in place of one with a wrong index. None if it cannot be used.
pub(super) type Passed = Shared<BoxFuture<'static, Option<Arc<Layer>>>>;

impl Layer {
    /// Fills `buf` like [`Layer::read`], for a read that failed with `error` because the bytes are not what the index says.
    /// Streams the layer first if no other read did so. Returns `error` if that does not help.
    pub(super) fn read_by_pass<'a>(
        self: &'a Arc<Self>,
        offset: u64,
        buf: &'a mut [u8],
        error: LayerError,
    ) -> BoxFuture<'a, Result<(), LayerError>> {
        async move {
            let passed = self.passed.get_or_init(|| {
                let layer = self.clone();
                let streaming = async move { stream_instead(layer).await }.boxed().shared();
                // The pass goes on if its readers give up.
                self.runtime.spawn(streaming.clone());
                streaming
            });
            match passed.clone().await {
                Some(layer) => {
                    buf.fill(0);
                    layer.read(offset, buf).await
                }
                None => Err(error),
            }
        }
        .boxed()
    }
}

/// Why an index and a pass cannot be compared.
#[derive(Debug, thiserror::Error)]
enum Incomparable {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Toc(#[from] TocError),
    #[error(transparent)]
    Task(#[from] TaskError),
}

async fn stream_instead(layer: Arc<Layer>) -> Option<Arc<Layer>> {
    let data = layer.data.clone();
    let digest = layer.digest();
    tracing::warn!(layer = %digest, authority = %data.authority, "the layer is not what its index says, streaming it");
    let to_open = ToOpen {
        blob: layer.blob.clone(),
        diff_id: data.diff_id.clone(),
        stats: layer.stats.clone(),
        authorities: vec![Authority::Pass],
        lookups: Arc::default(),
        table: None,
    };
    let opened = match open(&data.context, to_open).await {
        Ok(opened) => opened,
        Err(error) => {
            tracing::warn!(layer = %digest, %error, "the layer cannot be streamed either");
            return None;
        }
    };
    let (index, pass) = (layer.home().cloned(), opened.layer.home().cloned());
    let (digest, toc) = (digest.clone(), opened.toc);
    let comparing = tokio::task::spawn_blocking(move || {
        let read = |dir: Option<LayerDir>| stored_toc(&digest, dir.as_ref());
        let pass = match toc {
            Some((toc, _)) => toc,
            None => read(pass)?,
        };
        Ok::<_, Incomparable>(have_same_places(&read(index)?, &pass)?)
    });
    let compared = joined(comparing).await.unwrap_or_else(|error| Err(error.into()));
    let layer = layer.digest();
    match compared {
        Ok(true) => return Some(opened.layer),
        Ok(false) => tracing::warn!(%layer, "the layer has other files than its index says"),
        Err(error) => tracing::warn!(%layer, %error, "cannot compare the index with the layer"),
    }
    None
}

/// Whether every file of `index` is in `pass`, with the same content at the same places of the data device.
fn have_same_places(index: &PackedToc, pass: &PackedToc) -> Result<bool, TocError> {
    if index == pass {
        return Ok(true);
    }
    let mut places: HashMap<Vec<u8>, FileData> = HashMap::new();
    let mut entries = pass.entries()?;
    while let Some(entry) = entries.next()? {
        if let EntryKind::Regular(data) = entry.kind {
            places.insert(entry.path.to_vec(), data);
        }
    }
    let mut entries = index.entries()?;
    while let Some(entry) = entries.next()? {
        if let EntryKind::Regular(data) = entry.kind
            && places.get(entry.path) != Some(&data)
        {
            return Ok(false);
        }
    }
    Ok(true)
}
