//! Reads of a range of a blob, with a second request when the first one falls far behind.
//!
//! One connection can be slow or dead while all others are healthy. The path through the network may be bad, or a
//! server behind a load balancer may be sick. A reader of that connection would wait for minutes. So each stream is
//! compared with what its link has shown ([`Link::pace`]). If a stream is far behind, a second request over another
//! connection asks for the missing bytes:
//!
//! ```text
//! first   ━━━━━━━━╸· · · · ·          behind for a window of time
//! second          ┗━━━━━━━━━━━━━▶     asked for from there on
//! passed on ━━━━━━━━━━━━━━━━━━━━▶     from whichever is ahead, each byte once
//! ```
//! The request that gets ahead of the other continues alone. If both are slow, the slower one ends, and later there
//! may be another second request. The callers verify all bytes, whichever request brought them.
//!
//! A patient reading repeats a request that failed with a transient error, without a deadline. Only a host that has
//! never answered is given up.
//!
//! Invariants:
//! - A range has at most two requests at a time.
//! - [`Lanes::hedge`] limits the number of second requests. No second request is sent while a request backs off
//!   before its retry.
//! - Only time spent waiting for bytes counts.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Buf as _, Bytes};
use futures::future::{BoxFuture, FutureExt as _};
use futures::stream::{self, StreamExt as _};

use super::LayerStats;
use crate::blob::retry::{Retry, RetryPolicy};
use crate::blob::{BlobError, BlobSource, ByteStream, Link, LinkId, Pace};
use crate::fetch::{Hedge, Lanes};

/// A request that is this many bytes ahead of the other one has won. A smaller value may end the better request after
/// a short stall; a larger one fetches more bytes twice.
const DECIDED: u64 = 64 << 10;

/// The source of a layer's bytes, with the limits and counters for requests to it.
#[derive(Debug, Clone)]
pub(super) struct Origin {
    pub(super) blob: Arc<dyn BlobSource>,
    pub(super) lanes: Arc<Lanes>,
    pub(super) stats: Arc<LayerStats>,
    /// Whether to retry transient failures without a deadline. The caller then limits the wait.
    pub(super) patient: bool,
}

impl Origin {
    /// Opens a stream of exactly these bytes, and counts the request.
    pub(super) async fn read(&self, range: Range<u64>) -> Result<ByteStream, BlobError> {
        self.stats.request();
        self.read_counted(range).await
    }

    /// Opens a stream of exactly these bytes, like [`Origin::read`], for a request that was counted when it was
    /// planned.
    pub(super) async fn read_counted(&self, range: Range<u64>) -> Result<ByteStream, BlobError> {
        if range.is_empty() || self.blob.link().id == LinkId::LOCAL {
            return self.blob.read(range).await;
        }
        let mut race = Race::new(self.clone(), range);
        race.open().await?;
        Ok(race.into_stream())
    }
}

/// A range that is being read.
struct Race {
    origin: Origin,
    /// The bytes that were not passed on yet.
    rest: Range<u64>,
    first: Runner,
    second: Option<(Runner, Hedge)>,
    pace: Pace,
    /// Number of requests that shared the link at the last look.
    streams: u32,
    /// Time spent waiting since the last look at the pace. `came` counts the bytes that came in that time.
    waited: Duration,
    came: u64,
    /// The retries of a patient reading.
    retry: Retry,
}

/// One of the two requests.
struct Runner {
    /// Offset of the next byte that the request brings.
    at: u64,
    /// When the request is sent.
    from: Instant,
    flow: Flow,
}

enum Flow {
    Opening(BoxFuture<'static, Result<ByteStream, BlobError>>),
    Open(ByteStream),
}

/// What a step waited for.
enum RaceEvent {
    First(Result<Bytes, BlobError>),
    Second(Result<Bytes, BlobError>),
    /// Too few bytes came in the window of the pace.
    Late,
}

impl Runner {
    /// A request that is sent after `delay`.
    fn new(blob: Arc<dyn BlobSource>, range: Range<u64>, apart: bool, delay: Duration) -> Self {
        let (at, from) = (range.start, Instant::now() + delay);
        let opening = async move {
            if !delay.is_zero() {
                tokio::time::sleep(delay).await;
            }
            match apart {
                true => blob.read_apart(range).await,
                false => blob.read(range).await,
            }
        };
        Self {
            at,
            from,
            flow: Flow::Opening(opening.boxed()),
        }
    }

    /// Returns the next bytes, or no bytes when the answer begins. Cancel safe. Must not be called again after an
    /// error.
    async fn next(&mut self) -> Result<Bytes, BlobError> {
        match &mut self.flow {
            Flow::Opening(opening) => {
                self.flow = Flow::Open(opening.await?);
                Ok(Bytes::new())
            }
            Flow::Open(stream) => match stream.next().await {
                Some(bytes) => bytes,
                // A source promises not to end early.
                None => Err(BlobError::Protocol {
                    host: "the source".to_owned(),
                    what: "a range".to_owned(),
                    detail: format!("it ended at offset {}", self.at),
                    transient: true,
                }),
            },
        }
    }
}

impl Race {
    fn new(origin: Origin, range: Range<u64>) -> Self {
        Self {
            first: Runner::new(origin.blob.clone(), range.clone(), false, Duration::ZERO),
            second: None,
            pace: origin.blob.link().pace(),
            streams: origin.blob.link().streams,
            waited: Duration::ZERO,
            came: 0,
            retry: Retry::new(RetryPolicy {
                deadline: Duration::MAX,
            }),
            rest: range,
            origin,
        }
    }

    /// Waits until one of the requests is answered.
    async fn open(&mut self) -> Result<(), BlobError> {
        let opening = |runner: &Runner| matches!(runner.flow, Flow::Opening(_));
        while opening(&self.first) && self.second.as_ref().is_none_or(|(second, _)| opening(second)) {
            self.step().await?;
        }
        Ok(())
    }

    fn into_stream(self) -> ByteStream {
        let stream = stream::try_unfold(self, |mut race| async move {
            let bytes = race.next().await?;
            Ok(bytes.map(|bytes| (bytes, race)))
        });
        stream.boxed()
    }

    async fn next(&mut self) -> Result<Option<Bytes>, BlobError> {
        while !self.rest.is_empty() {
            let bytes = self.step().await?;
            if !bytes.is_empty() {
                return Ok(Some(bytes));
            }
        }
        Ok(None)
    }

    /// Waits for the next event. Returns the bytes of the event that were not passed on yet; there may be none.
    async fn step(&mut self) -> Result<Bytes, BlobError> {
        // The delay before a retry does not count as time spent waiting for bytes.
        let start = Instant::now().max(self.first.from);
        let late = start + self.pace.window.saturating_sub(self.waited);
        let (first, second) = (&mut self.first, &mut self.second);
        let second = async {
            match second {
                Some((second, _)) => second.next().await,
                None => std::future::pending().await,
            }
        };
        // `biased`: bytes that have arrived count, even if this task runs late.
        let event = tokio::select! {
            biased;
            bytes = first.next() => RaceEvent::First(bytes),
            bytes = second => RaceEvent::Second(bytes),
            () = tokio::time::sleep_until(late.into()) => RaceEvent::Late,
        };
        self.waited += start.elapsed();
        let bytes = match event {
            RaceEvent::First(Ok(bytes)) => pass_on(&mut self.rest, &mut self.first, bytes),
            RaceEvent::First(Err(error)) => {
                match self.second.take() {
                    Some((second, hedge)) => {
                        hedge.ended(true);
                        self.first = second;
                    }
                    None => self.again(error)?,
                }
                Bytes::new()
            }
            RaceEvent::Second(Ok(bytes)) => match &mut self.second {
                Some((second, _)) => pass_on(&mut self.rest, second, bytes),
                None => Bytes::new(),
            },
            RaceEvent::Second(Err(error)) => {
                tracing::debug!(%error, "a second request failed");
                if let Some((_, hedge)) = self.second.take() {
                    hedge.ended(false);
                }
                Bytes::new()
            }
            RaceEvent::Late => Bytes::new(),
        };
        self.came += bytes.len() as u64;
        if self.origin.patient && !bytes.is_empty() {
            self.retry.progressed();
            self.origin.stats.set_trouble(None);
        }
        self.decide();
        if self.waited >= self.pace.window {
            self.look();
        }
        Ok(bytes)
    }

    /// Retries a request that failed, after a delay, if the reading is patient and the error is transient. Otherwise
    /// returns the error.
    fn again(&mut self, error: BlobError) -> Result<(), BlobError> {
        if !self.origin.patient || !error.is_transient() {
            return Err(error);
        }
        let said = error.to_string();
        // A host that has never answered is not worth waiting for.
        let reached = self.origin.blob.link().rtt.is_some();
        let delay = self.retry.after(error, reached)?;
        tracing::info!(layer = %self.origin.blob.digest(), error = said, "asking again");
        self.origin.stats.set_trouble(Some(said));
        self.origin.stats.request();
        self.first = Runner::new(self.origin.blob.clone(), self.rest.clone(), true, delay);
        Ok(())
    }

    /// Ends the race if one of the two requests has won.
    fn decide(&mut self) {
        let Some((second, hedge)) = self.second.take() else {
            return;
        };
        let is_over = self.rest.is_empty();
        if second.at >= self.first.at + DECIDED || is_over && second.at > self.first.at {
            self.first = second;
            hedge.ended(true);
        } else if self.first.at >= second.at + DECIDED || is_over {
            hedge.ended(false);
        } else {
            self.second = Some((second, hedge));
        }
    }

    /// Checks whether far too few bytes came in the time spent waiting. If so, sends a second request, or ends the
    /// slower one.
    fn look(&mut self) {
        let mut link = self.origin.blob.link();
        if self.second.is_some() {
            // Both requests of this race bring the same bytes.
            link.streams = link.streams.saturating_sub(1);
        }
        // For some of the time, more requests may have shared the link.
        let streams = link.streams;
        link.streams = streams.max(self.streams);
        self.pace = link.pace();
        if self.waited < self.pace.window {
            return;
        }
        let least = self.pace.least as f64 * (self.waited.as_secs_f64() / self.pace.window.as_secs_f64());
        let behind = (self.came as f64) < least;
        (self.waited, self.came, self.streams) = (Duration::ZERO, 0, streams);
        if !behind || link.resting {
            return;
        }
        match self.second.take() {
            None => self.hedge(link),
            Some((second, hedge)) => {
                // Either the link or the server is slow, or both connections are bad.
                if second.at > self.first.at {
                    self.first = second;
                }
                hedge.ended(false);
            }
        }
    }

    fn hedge(&mut self, link: Link) {
        let Some(hedge) = self.origin.lanes.hedge(link.id) else {
            return;
        };
        tracing::debug!(layer = %self.origin.blob.digest(), rest = ?self.rest, "too slow, asking over another connection too");
        self.origin.stats.hedged();
        let runner = Runner::new(self.origin.blob.clone(), self.rest.clone(), true, Duration::ZERO);
        self.second = Some((runner, hedge));
    }
}

/// Returns those of a request's bytes that were not passed on yet.
fn pass_on(rest: &mut Range<u64>, runner: &mut Runner, mut bytes: Bytes) -> Bytes {
    runner.at += bytes.len() as u64;
    let news = runner.at.saturating_sub(rest.start).min(bytes.len() as u64);
    bytes.advance(bytes.len() - news as usize);
    rest.start += news;
    bytes
}

#[cfg(test)]
mod tests;
