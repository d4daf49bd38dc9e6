//! Flights: fetching, decoding and delivering spans that are not local.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use futures::StreamExt as _;
use tokio::sync::watch;

use super::{Flight, Landed, Layer, LayerError};
use crate::blob::BlobError;
use crate::device::SpanLock;
use crate::index::{IndexError, SpanId};

/// A span that fails its check is fetched this often: once more by range, then with the whole layer up to it, in case the
/// server (or a cache in front of it) is wrong about ranges only.
const ATTEMPTS: u32 = 3;

type Sender = watch::Sender<Option<Result<Landed, LayerError>>>;

/// Spans that one task fetches: whole groups, with a sender for each span that somebody may wait for. However the task ends,
/// all of them land: a flight that stayed registered would keep its span from being fetched ever again.
#[derive(Debug)]
pub(super) struct Run {
    layer: Arc<Layer>,
    spans: Range<u32>,
    waiting: HashMap<u32, Sender>,
}

impl Run {
    /// Registers flights for all spans of `group` that need one. Returns the run and the end of the group.
    pub(super) fn claim(layer: &Arc<Layer>, flights: &mut HashMap<u32, Flight>, group: Range<u32>) -> (Self, u32) {
        let mut run = Self {
            layer: layer.clone(),
            spans: group.clone(),
            waiting: HashMap::new(),
        };
        for span in group.clone() {
            if !flights.contains_key(&span) && !layer.is_local(span) {
                let (sender, receiver) = watch::channel(None);
                flights.insert(span, receiver);
                run.waiting.insert(span, sender);
            }
        }
        (run, group.end)
    }

    /// Ends the flight of a span.
    fn land(&mut self, span: u32, result: Result<Landed, LayerError>) {
        if let Some(sender) = self.waiting.remove(&span) {
            sender.send_replace(Some(result));
            self.layer.flights.lock().expect("no panic while locked").remove(&span);
        }
    }

    fn land_all(&mut self, error: &LayerError) {
        let lost: Vec<u32> = self.waiting.keys().copied().collect();
        for span in lost {
            self.land(span, Err(error.clone()));
        }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        if !self.waiting.is_empty() {
            let layer = self.layer.digest().clone();
            self.land_all(&LayerError::Closed { layer });
        }
    }
}

/// Neighbouring runs become one request.
pub(super) fn join_runs(runs: Vec<Run>) -> Vec<Run> {
    let mut joined: Vec<Run> = Vec::new();
    for mut run in runs {
        match joined.last_mut() {
            Some(last) if last.spans.end == run.spans.start => {
                last.spans.end = run.spans.end;
                last.waiting.extend(std::mem::take(&mut run.waiting));
            }
            _ => joined.push(run),
        }
    }
    joined
}

/// Fetches and delivers the run, however often that takes, and lands every span with bytes or an error.
pub(super) async fn fly(mut run: Run) {
    let layer = run.layer.clone();
    let mut outcome = Ok(());
    let mut from_start = false;
    for attempt in 1..=ATTEMPTS {
        outcome = attempt_run(&layer, &mut run, from_start || attempt == ATTEMPTS).await;
        match &outcome {
            Err(error @ LayerError::Corrupt { .. }) if attempt < ATTEMPTS => {
                tracing::warn!(%error, attempt, "span failed its check, fetching it again");
            }
            Err(LayerError::Blob {
                source: error @ BlobError::RangeUnsupported { .. },
                ..
            }) if !from_start => {
                tracing::warn!(%error, "fetching the layer from its start");
                from_start = true;
            }
            _ => break,
        }
    }
    if let Err(error) = outcome {
        // Whoever waits reports it; if nobody does any more, it hurt nobody.
        tracing::debug!(%error, spans = ?run.spans, "cannot fetch");
        run.land_all(&error);
    }
}

/// Takes the spans' locks without blocking the runtime, then decodes what other processes have not filled meanwhile.
async fn attempt_run(layer: &Arc<Layer>, run: &mut Run, from_start: bool) -> Result<(), LayerError> {
    let closed = || LayerError::Closed {
        layer: layer.digest().clone(),
    };
    // Before the lock: whoever holds locks can always decode, so that two processes never wait for each other.
    let _permit = layer.decodes.acquire().await.map_err(|_| closed())?;
    let mut waiting: Vec<u32> = run.waiting.keys().copied().collect();
    waiting.sort_unstable();
    let lock = {
        let (layer, spans) = (layer.clone(), waiting.clone());
        tokio::task::spawn_blocking(move || layer.device().map(|device| device.lock(&spans)))
    };
    let lock = match lock.await.map_err(|_| closed())? {
        Some(Ok(lock)) => Some(lock),
        Some(Err(error)) => {
            tracing::warn!(layer = %layer.digest(), %error, "cannot lock spans, keeping them in memory only");
            None
        }
        None => None,
    };
    for &span in &waiting {
        layer.settle(span..span + 1);
    }
    waiting.retain(|&span| {
        let local = layer.is_local(span);
        if local {
            run.land(span, Ok(Landed::OnDevice));
        }
        !local
    });
    let (Some(&first), Some(&last)) = (waiting.first(), waiting.last()) else {
        return Ok(());
    };
    let delivery = Delivery { layer, run, lock };
    decode(delivery, first..last + 1, from_start).await
}

async fn decode(mut delivery: Delivery<'_>, spans: Range<u32>, from_start: bool) -> Result<(), LayerError> {
    let layer = delivery.layer;
    let corrupt = |source: IndexError| LayerError::Corrupt {
        layer: layer.digest().clone(),
        span: spans.start,
        source: Arc::new(source),
    };
    let unreadable = |source| LayerError::Blob {
        layer: layer.digest().clone(),
        source,
    };
    let last = SpanId(spans.end - 1);
    let first = if from_start {
        SpanId(0)
    } else {
        layer.index.restart_for(SpanId(spans.start))
    };
    let needed = layer.index.blob_range(first, last);
    // The whole blob is asked for without a range, so the bytes before the first restart come along.
    let (range, mut skip) = if from_start {
        (0..layer.index.blob_size(), needed.start)
    } else {
        (needed, 0)
    };
    let mut decoder = layer.index.decoder(first, last).map_err(corrupt)?;
    let mut stream = layer.blob.read(range).await.map_err(unreadable)?;
    layer.stats.request();
    while let Some(bytes) = stream.next().await {
        let bytes = bytes.map_err(unreadable)?;
        layer.stats.fetched_more(bytes.len());
        let unwanted = skip.min(bytes.len() as u64);
        skip -= unwanted;
        decoder
            .push(&bytes[unwanted as usize..], &mut |span, bytes| {
                delivery.deliver(span.0, bytes);
            })
            .map_err(corrupt)?;
        if decoder.is_done() {
            return Ok(());
        }
    }
    Err(corrupt(IndexError::Truncated {
        offset: layer.index.blob_size(),
    }))
}

/// Where decoded spans go.
struct Delivery<'a> {
    layer: &'a Arc<Layer>,
    run: &'a mut Run,
    lock: Option<SpanLock>,
}

impl Delivery<'_> {
    /// Readers first, then the disk. The flight stays registered until the span is on the device (or, without one, in
    /// memory): a second flight of the same span would share this one's lock and give it back under it.
    fn deliver(&mut self, span: u32, bytes: &[u8]) {
        let Self { layer, run, lock } = self;
        let Some(sender) = run.waiting.get(&span) else { return };
        let bytes: Arc<[u8]> = bytes.into();
        let landed = Ok(Landed::Bytes(bytes.clone()));
        sender.send_replace(Some(landed.clone()));
        let kept = match (layer.device(), &*lock) {
            (Some(device), Some(lock)) => {
                let filled = tokio::task::block_in_place(|| device.fill(lock, span, &layer.pieces(span), &bytes));
                filled.map_err(|error| layer.health.store_failed(&error)).is_ok()
            }
            _ => false,
        };
        if kept {
            layer.budget.wrote(bytes.len() as u64);
        } else {
            // From here on nothing of this run goes to the device, and whoever flies for these spans next locks them anew.
            *lock = None;
            layer.memory.insert(layer.digest(), span, bytes);
        }
        run.land(span, landed);
    }
}
