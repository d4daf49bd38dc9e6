//! The blob of a layer as it arrives for the first pass: first the bytes that an interrupted pass kept, then the rest
//! from the source.
//!
//! ```text
//! partial ──kept bytes──┐
//! source ───the rest────┴─▶ pass
//!              └──────────▶ thread that appends it to the partial
//! ```
//! A separate thread writes the arriving bytes to the disk. The thread gets them in batches, because waking it costs
//! more than writing. The queue of batches is short, so memory is bounded.

use std::sync::Arc;

use bytes::Bytes;
use futures::stream::{self, StreamExt as _};
use tokio::sync::mpsc;

use super::race::Origin;
use super::stats::FetchPurpose;
use super::stripes::{self, Ahead};
use crate::blob::{BlobError, ByteStream};
use crate::device::CacheBudget;
use crate::store::Partial;

/// Bytes of the partial that are read at once.
const PIECE: u64 = 512 << 10;
/// Bytes that are written at once. `QUEUE` is the number of batches that wait for the thread. A smaller blob that
/// arrives whole is never written to the partial.
const BATCH: u64 = 256 << 10;
const QUEUE: usize = 4;

/// A blob that is read from its start to its end.
pub(super) struct Arrival {
    origin: Origin,
    ahead: Ahead,
    /// Number of bytes passed on so far.
    position: u64,
    kept: Option<(Partial, Arc<CacheBudget>)>,
    /// The stream of the rest, once it is needed.
    rest: Option<ByteStream>,
    keeper: Option<Keeper>,
}

impl Arrival {
    /// Starts with the bytes that `kept` has. The rest is added to `kept` as far as the budget has room.
    pub(super) fn new(origin: Origin, ahead: Ahead, kept: Option<(Partial, Arc<CacheBudget>)>) -> Self {
        Self {
            origin,
            ahead,
            position: 0,
            kept,
            rest: None,
            keeper: None,
        }
    }

    pub(super) fn into_stream(self) -> ByteStream {
        let stream = stream::try_unfold(self, |mut arrival| async move {
            let bytes = arrival.next().await?;
            Ok(bytes.map(|bytes| (bytes, arrival)))
        });
        stream.boxed()
    }

    async fn next(&mut self) -> Result<Option<Bytes>, BlobError> {
        if let Some(bytes) = self.next_kept().await {
            self.position += bytes.len() as u64;
            self.origin.stats.resumed_more(bytes.len());
            return Ok(Some(bytes));
        }
        let rest = match &mut self.rest {
            Some(rest) => rest,
            None if self.position > 0 && self.position == self.origin.blob.size() => return Ok(None),
            None => {
                let reading = stripes::read(self.origin.clone(), self.position, &self.ahead);
                let rest = self.origin.stats.waiting(reading).await?;
                self.keeper = self
                    .kept
                    .take()
                    .map(|kept| Keeper::start(kept, self.origin.blob.size()));
                self.rest.insert(rest)
            }
        };
        let Some(bytes) = self.origin.stats.waiting(rest.next()).await.transpose()? else {
            return Ok(None);
        };
        self.position += bytes.len() as u64;
        self.origin.stats.fetched_more(bytes.len(), FetchPurpose::Pass);
        if let Some(keeper) = &mut self.keeper {
            keeper.keep(bytes.clone()).await;
        }
        Ok(Some(bytes))
    }

    /// Returns the next kept bytes. If they cannot be read, the rest comes from the source.
    async fn next_kept(&mut self) -> Option<Bytes> {
        let (partial, _) = self.kept.as_ref()?;
        let (offset, end) = (self.position, partial.start());
        if offset >= end {
            return None;
        }
        let reader = partial.clone();
        let length = (end - offset).min(PIECE) as usize;
        let reading = tokio::task::spawn_blocking(move || reader.read(offset, length));
        match reading.await.unwrap_or_else(|error| Err(error.into())) {
            Ok(bytes) => Some(bytes),
            Err(error) => {
                tracing::warn!(layer = %self.origin.blob.digest(), %error, "cannot read what was kept of a layer, fetching it again");
                partial.discard();
                self.kept = None;
                None
            }
        }
    }
}

/// Sends the arriving bytes to the thread that writes them.
struct Keeper {
    batches: mpsc::Sender<Vec<Bytes>>,
    batch: Vec<Bytes>,
    length: u64,
    /// Bytes of the blob that have not arrived.
    missing: u64,
}

impl Keeper {
    /// Starts the thread that writes.
    fn start((partial, budget): (Partial, Arc<CacheBudget>), size: u64) -> Self {
        let (sender, mut batches) = mpsc::channel::<Vec<Bytes>>(QUEUE);
        let mut at = partial.start();
        let missing = size.saturating_sub(at);
        tokio::task::spawn_blocking(move || {
            while let Some(batch) = batches.blocking_recv() {
                let length = batch.iter().map(|piece| piece.len() as u64).sum();
                let Some(_reserved) = budget.reserve(length) else {
                    return;
                };
                if !partial.append(at, &batch) {
                    return;
                }
                at += length;
            }
        });
        Self {
            batches: sender,
            batch: Vec::new(),
            length: 0,
            missing,
        }
    }

    async fn keep(&mut self, bytes: Bytes) {
        self.length += bytes.len() as u64;
        self.missing = self.missing.saturating_sub(bytes.len() as u64);
        self.batch.push(bytes);
        // The last bytes are not written: after them the blob is indexed in a moment.
        if self.length >= BATCH && self.missing > 0 {
            self.length = 0;
            let batch = std::mem::take(&mut self.batch);
            if self.batches.send(batch).await.is_err() {
                // The thread gave up, so all further bytes are dropped.
                self.missing = 0;
            }
        }
        if self.missing == 0 {
            self.batch.clear();
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        // The pass was interrupted. If the disk is too slow for the queue, the last bytes are lost.
        if !self.batch.is_empty()
            && let Err(error) = self.batches.try_send(std::mem::take(&mut self.batch))
        {
            tracing::debug!(%error, "the last bytes that came are not kept");
        }
    }
}
