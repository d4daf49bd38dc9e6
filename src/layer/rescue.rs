//! Reads of a layer whose bytes are not what its index says.
//!
//! An index that no pass on this host made may state digests that the content does not have. Or the source sends wrong bytes,
//! for a while or for ever. The layer is then streamed once, like a layer without an index. That tells the two cases apart:
//! - The pass succeeds. Then the whole blob was here and had the right digest. The pass finds the same files. If they have
//!   the same places in the data device, the layer that was streamed answers the reads from then on. Otherwise the reads fail.
//!   The store has the index of the pass, which outranks all others. So the other index is not used any more.
//! - The pass fails. The index may still be right, so it stays. The read fails, and the next read that gets wrong bytes begins
//!   anew.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use futures::FutureExt as _;
use futures::future::{BoxFuture, Shared};

use super::opening::ToOpen;
use super::{FirstPassError, Layer, LayerError, OpenError, open, stored_toc};
use crate::memory::Charge;
use crate::task::{TaskError, joined};
use crate::toc::{EntryKind, FileData, PackedToc, TocError};

/// The pass in place of an index, from when it begins. None before that, and after a pass that failed.
pub(super) type Rescue = Mutex<Option<Shared<BoxFuture<'static, Passed>>>>;

/// The outcome of a pass in place of an index.
#[derive(Debug, Clone)]
pub(super) enum Passed {
    /// The layer that the pass opened. It has the same files at the same places.
    Instead(Arc<Layer>),
    /// The layer cannot be used without its index, and another pass would find the same.
    Useless,
    /// The pass failed. Another one may succeed.
    Failed,
}

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
            let layer = self.by_pass(error).await?;
            buf.fill(0);
            layer.read(offset, buf).await
        }
        .boxed()
    }

    /// Returns the layer that a pass opens in place of this one, whose bytes are not what its index says. Streams the layer
    /// first if nobody did so. Returns `error` if that does not help.
    pub(crate) async fn by_pass(self: &Arc<Self>, error: LayerError) -> Result<Arc<Self>, LayerError> {
        let streaming = {
            let mut rescue = self.rescue.lock().expect("no panic while locked");
            let begin = || {
                let layer = self.clone();
                let streaming = async move { stream_instead(layer).await }.boxed().shared();
                // The pass goes on if its readers give up.
                self.runtime.spawn(streaming.clone());
                streaming
            };
            rescue.get_or_insert_with(begin).clone()
        };
        match streaming.clone().await {
            Passed::Instead(layer) => Ok(layer),
            Passed::Useless => Err(error),
            Passed::Failed => {
                let mut rescue = self.rescue.lock().expect("no panic while locked");
                if rescue.as_ref().is_some_and(|present| present.ptr_eq(&streaming)) {
                    *rescue = None;
                }
                Err(error)
            }
        }
    }

    /// Keeps the table of contents of an index that the store does not have, with its memory charge. Without the table, the
    /// index cannot be compared with a pass.
    pub(crate) fn hold_toc(&self, toc: (PackedToc, Charge)) {
        self.toc.get_or_init(|| toc);
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

async fn stream_instead(layer: Arc<Layer>) -> Passed {
    let data = layer.data.clone();
    let (digest, authority) = (layer.digest().clone(), &data.authority);
    tracing::warn!(layer = %digest, %authority, "bytes of the layer are not what its index says, streaming the layer");
    let to_open = ToOpen::by_pass(layer.blob.clone(), data.diff_id.clone(), layer.stats.clone());
    let opened = match open(&data.context, to_open).await {
        Ok(opened) => opened,
        Err(error) => {
            tracing::warn!(layer = %digest, %error, "the layer cannot be streamed either");
            return match is_final(&error) {
                true => Passed::Useless,
                false => Passed::Failed,
            };
        }
    };
    let (index, pass, toc) = (layer.clone(), opened.layer.clone(), opened.toc);
    let comparing = tokio::task::spawn_blocking(move || {
        let read = |layer: &Layer| stored_toc(layer.digest(), layer.home());
        let pass = match toc {
            Some((toc, _)) => toc,
            None => read(&pass)?,
        };
        let is_same = match index.toc.get() {
            Some((toc, _)) => have_same_places(toc, &pass),
            None => have_same_places(&read(&index)?, &pass),
        };
        Ok::<_, Incomparable>(is_same?)
    });
    let compared = joined(comparing).await.unwrap_or_else(|error| Err(error.into()));
    match compared {
        Ok(true) => {
            tracing::warn!(layer = %digest, %authority, "the whole layer has the right digest, using what a pass over it found in place of its index");
            return Passed::Instead(opened.layer);
        }
        Ok(false) => tracing::warn!(layer = %digest, %authority, "the layer has other files than its index says"),
        Err(error) => tracing::warn!(layer = %digest, %error, "cannot compare the index with the layer"),
    }
    Passed::Useless
}

/// Whether another pass would fail in the same way: neither the source nor the bytes were to blame.
fn is_final(error: &OpenError) -> bool {
    match error {
        OpenError::FirstPass(FirstPassError::Blob(_) | FirstPassError::Task { .. }) => false,
        OpenError::FirstPass(error) => !error.is_corruption(),
        OpenError::TooMuchMemory { .. } => true,
        OpenError::Toc { .. } | OpenError::Task(_) => false,
    }
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
