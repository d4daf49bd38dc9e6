//! Streaming a layer once, again after wrong bytes, and keeping what the pass made.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::data::LayerContext;
use super::first_pass::{self, Destination, Indexed};
use super::opening::{OpenError, Opened, ToOpen, too_much};
use super::programs;
use super::race::Origin;
use super::stored::{LayerIndex, keep};
use super::{IndexSource, Layer};
use crate::blob::retry::backoff;
use crate::blob::{LinkId, Verdict};
use crate::device::DataDevice;
use crate::store::{Authority, LayerDir, Partial};
use crate::task::joined;

/// A patient opening gives a layer up after this many wrong passes, if they also took at least [`WRONG_TIME`].
const WRONG_PASSES: u32 = 4;
/// See [`WRONG_PASSES`].
const WRONG_TIME: Duration = Duration::from_secs(5);

/// Streams the layer once, and keeps its index and data device.
pub(super) async fn stream(context: &LayerContext, wanted: ToOpen, dir: Option<LayerDir>) -> Result<Opened, OpenError> {
    let ToOpen {
        blob, diff_id, stats, ..
    } = wanted;
    // The permit is taken after the layer's lock. Otherwise a layer that waits for another process would keep this
    // process from its other layers.
    let _permit = stats
        .waiting(context.passes.acquire())
        .await
        .expect("no code closes the semaphore");
    let origin = Origin {
        blob: blob.clone(),
        lanes: context.lanes.clone(),
        stats: stats.clone(),
        patient: context.patient,
    };
    let mut wrong = Wrong::new(context.patient);
    let (mut indexed, partial) = loop {
        let partial = match &dir {
            // A blob on a local disk need not be kept a second time.
            Some(dir) if blob.link().id != LinkId::LOCAL => kept(dir, blob.size()).await?,
            _ => None,
        };
        let resumes = partial.as_ref().is_some_and(|partial| partial.start() > 0);
        let destination = dir.clone().map(|dir| Destination {
            store: context.store.clone(),
            dir,
            budget: context.budget.clone(),
            partial: partial.clone(),
        });
        let pass = first_pass::run(origin.clone(), diff_id.clone(), context, destination);
        let error = match pass.await {
            Ok(indexed) => break (indexed, partial),
            Err(error) => error,
        };
        let discarded = match partial {
            Some(partial) if !error.is_resumable() => partial.discard(),
            _ => true,
        };
        if !error.is_corruption() || resumes && !discarded {
            return Err(error.into());
        }
        // Kept bytes may be damaged. That costs one more pass and says nothing about the bytes that come next.
        let delay = match resumes {
            true => Duration::ZERO,
            // Another place has not failed yet.
            false if blob.judged(Verdict::Wrong) => Duration::ZERO,
            false => match wrong.again() {
                None => return Err(error.into()),
                Some(delay) => delay,
            },
        };
        tracing::warn!(%error, "streaming the layer once more");
        if !delay.is_zero() {
            stats.set_trouble(Some(error.to_string()));
            stats.waiting(tokio::time::sleep(delay)).await;
        }
    };
    stats.set_trouble(None);
    stats.set_source(IndexSource::Streamed);
    let context = context.clone();
    let keeping = tokio::task::spawn_blocking(move || {
        let mut kept = false;
        if let Some(dir) = &dir {
            match keep(&context.store, dir, &indexed.spans, &indexed.toc) {
                Ok(()) => kept = true,
                Err(error) => context.health.store_failed(&error),
            }
            match indexed.device_error.take() {
                Some(error) => context.health.store_lost(&error),
                // The content does not fit into the cache. The device fills with the spans that are read.
                None if indexed.device.is_none() => {
                    let opened = DataDevice::open(&context.store, dir, &indexed.spans);
                    indexed.device = opened.map_err(|error| context.health.store_lost(&error)).ok();
                }
                None => {}
            }
        }
        if let Some(partial) = partial {
            // Deleting a large file takes time, which the opening does not wait for.
            tokio::task::spawn_blocking(move || partial.discard());
        }
        let Indexed {
            spans,
            toc,
            charges,
            device,
            ..
        } = indexed;
        let [mut charge, mut toc_charge] = charges;
        let of_toc = if kept { 0 } else { toc.bytes() };
        let covered = toc_charge
            .exactly(of_toc as u64)
            .and_then(|()| charge.exactly(spans.memory()));
        covered.map_err(too_much(blob.digest()))?;
        let diff_id = spans.index().diff_id().clone();
        let known = LayerIndex {
            dir: dir.clone(),
            ..LayerIndex::new(&context.store, blob.digest(), Authority::Pass)
        };
        let data = known.data(&context, diff_id, (Box::new(spans), charge), device);
        let layer = Layer::new(
            if kept {
                context.shared.share(data)
            } else {
                Arc::new(data)
            },
            blob,
            stats,
        );
        if let Some(dir) = dir.filter(|_| layer.keeps()) {
            let found = programs::look(&toc, |offset, buf| layer.peek(offset, buf));
            if let Err(error) = programs::keep(&context.store, &dir, found) {
                context.health.store_failed(&error);
            }
        }
        Ok(Opened {
            layer,
            toc: (!kept).then_some((toc, toc_charge)),
        })
    });
    joined(keeping).await?
}

/// Decides when to stream a layer again whose bytes were wrong.
///
/// Bytes that were damaged on the way are seldom damaged twice. If they are, the fault may last for a moment, and a patient
/// opening waits until it is over. If the bytes stay wrong, they are wrong at the source, and the layer is given up.
struct Wrong {
    patient: bool,
    passes: u32,
    /// When the first wrong pass ended.
    since: Option<Instant>,
}

impl Wrong {
    fn new(patient: bool) -> Self {
        Self {
            patient,
            passes: 0,
            since: None,
        }
    }

    /// Counts a wrong pass. Returns how long to wait before the next one, or `None` if the layer is given up.
    fn again(&mut self) -> Option<Duration> {
        let since = *self.since.get_or_insert_with(Instant::now);
        self.passes += 1;
        match self.passes {
            1 => Some(Duration::ZERO),
            _ if !self.patient => None,
            passes if passes < WRONG_PASSES || since.elapsed() < WRONG_TIME => {
                Some(backoff(passes - 1, fastrand::f64()))
            }
            _ => None,
        }
    }
}

/// Opens the bytes of a layer that interrupted passes kept, unless another process uses them.
async fn kept(dir: &LayerDir, size: u64) -> Result<Option<Partial>, OpenError> {
    let dir = dir.clone();
    let opening = tokio::task::spawn_blocking(move || {
        Partial::open(&dir, size).unwrap_or_else(|error| {
            tracing::warn!(%error, "keeping nothing of this layer before it is whole");
            None
        })
    });
    Ok(joined(opening).await?)
}
