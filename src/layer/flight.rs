//! Flights: fetch, decode and deliver spans that are not local.

use std::ops::Range;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::{FutureExt as _, StreamExt as _};
use tokio::task::JoinHandle;

use super::{Claim, FetchPurpose, Landed, Landing, Layer, LayerError, stripes};
use crate::blob::{BlobError, Verdict};
use crate::device::SpanLock;
use crate::fetch::Pass;
use crate::index::IndexError;
use crate::task::TaskError;

/// How often a span that fails its check is fetched. The second attempt asks by range again. The third fetches the
/// blob from its start up to the span. The server, or a cache in front of it, may be wrong about ranges only.
const ATTEMPTS: u32 = 3;
/// How often a flight looks whether another process has delivered a span.
const LOOK: Duration = Duration::from_millis(2);
/// How long a flight waits for another process that fetches a span and makes no progress. After that it fetches the
/// span too, and keeps it in memory only. A smaller value fetches spans twice; a larger one delays readers.
const PATIENCE: Duration = Duration::from_secs(5);
/// A request that brings no bytes for this long hangs, and gives its place on the link to others.
const HANGS: Duration = Duration::from_secs(1);
/// Number of spans before the awaited one in which progress of the other process counts: more than one request has.
const BEFORE: u32 = 64;

/// Spans that one task fetches. However the task ends, each of them gets a result.
#[derive(Debug)]
pub(super) struct Run {
    layer: Arc<Layer>,
    pub(super) spans: Range<u32>,
    /// The spans that a reader waits for.
    pub(super) needed: Vec<Range<u32>>,
    pub(super) claim: Claim<Landing>,
    /// The spans that were left to another process.
    left: Vec<u32>,
    began: Instant,
}

impl Run {
    /// A run of no spans yet.
    pub(super) fn new(layer: Arc<Layer>, first: u32, claim: Claim<Landing>) -> Self {
        Self {
            layer,
            spans: first..first,
            needed: Vec::new(),
            claim,
            left: Vec::new(),
            began: Instant::now(),
        }
    }

    fn is_needed(&self, span: u32) -> bool {
        self.needed.iter().any(|needed| needed.contains(&span))
    }

    fn land(&mut self, span: u32, landing: Landing) {
        self.claim.land(span, landing);
    }
}

/// A flight in progress. Dropping the handle does not end the flight. The result is the spans that the flight left to
/// another process.
pub type Flown = JoinHandle<Result<Vec<u32>, LayerError>>;

/// Waits for the result of a flight.
pub(crate) async fn flown(flight: Flown) -> Result<Vec<u32>, LayerError> {
    match flight.await {
        Ok(outcome) => outcome,
        // The runtime is shutting down, so the result does not matter.
        Err(_) => Ok(Vec::new()),
    }
}

/// Starts a flight, which first waits for its pass. If the flight panics, its readers get the text of the panic.
pub(super) fn start(mut run: Run, pass: impl Future<Output = Arc<Pass>> + Send + 'static) -> Flown {
    let runtime = run.layer.runtime.clone();
    runtime.spawn(async move {
        let mut ticket = FlightTicket(Some(pass.await));
        // Of a run that panicked, only the claim is used again. It consists of whole steps.
        let flying = AssertUnwindSafe(fly(&mut run, &mut ticket)).catch_unwind();
        let outcome = flying.await.unwrap_or_else(|payload| {
            Err(LayerError::Task {
                layer: run.layer.digest().clone(),
                source: TaskError::panicked(&*payload),
            })
        });
        if let Err(error) = &outcome {
            // Readers that wait for these spans report the error. Without readers, the error affects no program.
            tracing::debug!(%error, spans = ?run.spans, "cannot fetch");
            run.claim.land_all(&run.layer.failed(error.clone(), run.began));
        }
        outcome.map(|()| run.left)
    })
}

/// The pass of a flight while the flight needs one. A flight that waits for another process must not occupy a place
/// on the link.
struct FlightTicket(Option<Arc<Pass>>);

impl FlightTicket {
    /// Gives the pass back.
    fn drop_pass(&mut self) {
        self.0 = None;
    }

    /// Returns the pass. If it was given back, the flight queues for another one.
    async fn pass(&mut self, layer: &Layer, spans: Range<u32>) -> Arc<Pass> {
        if let Some(pass) = &self.0 {
            return pass.clone();
        }
        let pass = Arc::new(layer.line_up(spans).await);
        self.0.insert(pass).clone()
    }
}

/// Fetches and delivers the run, in up to [`ATTEMPTS`] attempts at one place.
async fn fly(run: &mut Run, ticket: &mut FlightTicket) -> Result<(), LayerError> {
    let layer = run.layer.clone();
    let mut outcome = Ok(());
    let (mut from_start, mut failed_checks) = (false, 0);
    let mut attempt = 1;
    while attempt <= ATTEMPTS {
        outcome = attempt_run(&layer, run, ticket, from_start || attempt == ATTEMPTS).await;
        match &outcome {
            // Another place has not failed yet, so the attempts begin again.
            Err(error @ LayerError::Corrupt { .. }) if layer.blob.judged(Verdict::Wrong) => {
                tracing::warn!(%error, "span failed its check, fetching it from another place");
                (attempt, failed_checks) = (1, 0);
                continue;
            }
            Err(error @ LayerError::Corrupt { .. }) if attempt < ATTEMPTS => {
                tracing::warn!(%error, attempt, "span failed its check, fetching it again");
                failed_checks += u32::from(!from_start);
            }
            Err(LayerError::Blob {
                source: error @ BlobError::RangeUnsupported { .. },
                ..
            }) if !from_start => {
                tracing::warn!(%error, "fetching the layer from its start");
                from_start = true;
            }
            Ok(()) if failed_checks + 1 == ATTEMPTS => {
                layer.blob.judged(Verdict::OnlyPartsAreWrong);
                break;
            }
            _ => break,
        }
        attempt += 1;
    }
    outcome
}

/// Locks spans, then decodes them. If another process has locked a span that a reader needs, the flight waits for
/// that process. The flight leaves other locked spans to that process.
async fn attempt_run(
    layer: &Arc<Layer>,
    run: &mut Run,
    ticket: &mut FlightTicket,
    from_start: bool,
) -> Result<(), LayerError> {
    let mut patience = Patience::new();
    while !run.claim.is_done() {
        let wanted: Vec<u32> = run.claim.spans().collect();
        let (mut lock, mut mine) = try_lock(layer, &wanted);
        for span in wanted.iter().copied().filter(|span| mine.binary_search(span).is_err()) {
            let here = layer.is_local(span);
            if here || !run.is_needed(span) {
                run.land(span, Ok(Landed::LookAgain));
                run.left.extend((!here).then_some(span));
            }
        }
        if mine.is_empty() && !run.claim.is_done() {
            let theirs: Vec<u32> = run.claim.spans().collect();
            if patience.lasts(layer, &theirs) {
                ticket.drop_pass();
                tokio::time::sleep(LOOK).await;
                continue;
            }
            tracing::warn!(layer = %layer.digest(), spans = ?run.spans, "another process does not get on with these, fetching them here too");
            (lock, mine) = (None, theirs);
        }
        // Some spans may have become local between the claim and the lock.
        let (here, left): (Vec<u32>, Vec<u32>) = mine.into_iter().partition(|&span| layer.is_local(span));
        for span in here {
            run.land(span, Ok(Landed::LookAgain));
        }
        let mut delivery = Delivery { layer, run, lock };
        for stretch in stretches(layer, &left) {
            let pass = ticket.pass(layer, stretch.clone()).await;
            decode(&mut delivery, stretch, &pass, from_start).await?;
        }
    }
    Ok(())
}

/// Locks those spans that are free, and returns the lock and these spans. If there is no device, or locking fails,
/// returns all spans without a lock, and they are not kept on disk.
fn try_lock(layer: &Layer, spans: &[u32]) -> (Option<SpanLock>, Vec<u32>) {
    match layer
        .data
        .disk
        .device()
        .filter(|device| device.is_writable())
        .map(|device| device.try_lock(spans))
    {
        Some(Ok((lock, held))) => (Some(lock), held),
        Some(Err(error)) => {
            tracing::warn!(layer = %layer.digest(), %error, "cannot lock spans, keeping them in memory only");
            layer.data.disk.cannot_keep();
            (None, spans.to_vec())
        }
        None => (None, spans.to_vec()),
    }
}

/// Patience with another process: it lasts while that process makes progress.
struct Patience {
    since: Instant,
    progress: usize,
}

impl Patience {
    fn new() -> Self {
        Self {
            since: Instant::now(),
            progress: 0,
        }
    }

    /// Whether to go on waiting for these spans.
    fn lasts(&mut self, layer: &Layer, spans: &[u32]) -> bool {
        let (Some(&first), Some(&last)) = (spans.first(), spans.last()) else {
            return false;
        };
        let near = first.saturating_sub(BEFORE)..last + 1;
        let progress = near.filter(|&span| layer.is_local(span)).count();
        if progress != self.progress {
            *self = Self {
                since: Instant::now(),
                progress,
            };
        }
        self.since.elapsed() < PATIENCE
    }
}

/// Cuts ascending spans into stretches that are decoded one after the other. A stretch contains local spans only if
/// decoding has to pass over them.
fn stretches(layer: &Layer, spans: &[u32]) -> Vec<Range<u32>> {
    let mut stretches: Vec<Range<u32>> = Vec::new();
    for &span in spans {
        match stretches.last_mut() {
            Some(last) if span == last.end || layer.spans().restart_for(span) < last.end => last.end = span + 1,
            _ => stretches.push(span..span + 1),
        }
    }
    stretches
}

async fn decode(
    delivery: &mut Delivery<'_>,
    spans: Range<u32>,
    pass: &Pass,
    from_start: bool,
) -> Result<(), LayerError> {
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
    let map = layer.spans();
    let first = if from_start { 0 } else { map.restart_for(spans.start) };
    let needed = map.blob_range(first..spans.end);
    // The whole blob is requested without a range, so the bytes before the first restart come too and are skipped.
    let (range, mut skip) = if from_start {
        (0..map.blob_size(), needed.start)
    } else {
        (needed, 0)
    };
    let room = layer.data.context.windows.room(None);
    let mut decoder = map.decoder(first..spans.end, room).map_err(corrupt)?;
    let bytes = range.end - range.start;
    let mut timing = Timing::new(bytes);
    // A request without a range cannot be cut into parts.
    let parts = if from_start {
        1
    } else {
        layer.policy().parts(bytes, pass.priority(), pass.before())
    };
    let opening = stripes::read_range(layer.origin(), range, parts, &layer.data.context.ahead);
    let mut stream = parked(pass, opening).await.map_err(unreadable)?;
    while let Some(bytes) = parked(pass, stream.next()).await {
        let bytes = bytes.map_err(unreadable)?;
        if timing.came() {
            pass.learned(layer.policy());
        }
        layer
            .stats
            .fetched_more(bytes.len(), FetchPurpose::Spans(pass.priority()));
        let unwanted = skip.min(bytes.len() as u64);
        skip -= unwanted;
        decoder
            .push(&bytes[unwanted as usize..], &mut |span, bytes| {
                delivery.deliver(span, bytes);
            })
            .map_err(corrupt)?;
        if decoder.is_done() {
            pass.learned(layer.policy());
            timing.log(delivery.run, pass);
            return Ok(());
        }
    }
    Err(corrupt(IndexError::Truncated {
        offset: layer.spans().blob_size(),
    }))
}

/// Waits for the link. If the wait takes long, gives the place on the link to other requests.
async fn parked<T>(pass: &Pass, waiting: impl Future<Output = T>) -> T {
    let mut waiting = std::pin::pin!(waiting);
    match tokio::time::timeout(HANGS, &mut waiting).await {
        Ok(came) => came,
        Err(_) => {
            pass.park();
            waiting.await
        }
    }
}

/// Times of a request, for the log.
struct Timing {
    bytes: u64,
    start: Instant,
    first: Option<Duration>,
}

impl Timing {
    fn new(bytes: u64) -> Self {
        Self {
            bytes,
            start: Instant::now(),
            first: None,
        }
    }

    /// Records that bytes came, and returns whether they were the first.
    fn came(&mut self) -> bool {
        let first = self.first.is_none();
        self.first.get_or_insert(self.start.elapsed());
        first
    }

    fn log(&self, run: &Run, pass: &Pass) {
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        tracing::debug!(
            layer = %run.layer.digest(),
            spans = ?run.spans,
            bytes = self.bytes,
            purpose = ?pass.priority(),
            queued_ms = ms(pass.waited()),
            first_ms = ms(self.first.unwrap_or_default()),
            took_ms = ms(self.start.elapsed()),
            "fetched"
        );
    }
}

/// The destinations of decoded spans.
struct Delivery<'a> {
    layer: &'a Arc<Layer>,
    run: &'a mut Run,
    lock: Option<SpanLock>,
}

impl Delivery<'_> {
    /// Delivers a span first to its readers, then to the disk. The flight stays registered until the span is on the
    /// device, or in memory if it cannot be kept. Otherwise a second flight of the span in this process would share
    /// this flight's lock, and release it too early.
    fn deliver(&mut self, span: u32, bytes: &[u8]) {
        let Self { layer, run, lock } = self;
        if !run.claim.holds(span) {
            return;
        }
        layer.stats.landed();
        let bytes: Arc<[u8]> = bytes.into();
        let landed = Ok(Landed::Bytes(bytes.clone()));
        run.claim.announce(span, landed.clone());
        let kept = tokio::task::block_in_place(|| {
            layer
                .data
                .disk
                .fill(lock.as_ref(), span, &layer.spans().pieces(span), &bytes)
        });
        if !kept {
            // The run writes no more spans to the device. So the next flight may take the locks of its spans.
            *lock = None;
            layer.data.context.memory.insert(&layer.data.index, span, bytes);
        }
        run.land(span, landed);
    }
}
