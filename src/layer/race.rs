//! Reading a range of a blob, with a second request when the first one falls far behind.
//!
//! One connection can be slow or dead while all others are healthy: a bad path through the network, a sick server behind a
//! load balancer. Whoever waited for it would wait for minutes. So each stream is held against what its link has shown
//! ([`Link::pace`]); one that is far behind gets a second request, over another connection, for what is still missing:
//!
//! ```text
//! first   ━━━━━━━━╸· · · · ·          behind for a window of time
//! second          ┗━━━━━━━━━━━━━▶     asked for from there on
//! passed on ━━━━━━━━━━━━━━━━━━━━▶     from whichever is ahead, each byte once
//! ```
//! The one that gets ahead of the other goes on alone. If both are slow, the slower one ends, and later there may be another
//! try. What is passed on is verified further up, whichever request brought it.
//!
//! A patient reading asks again when its request fails and another attempt can help, however long that takes.
//!
//! Invariants: a range has at most two requests at a time; second requests are bounded by [`Lanes::hedge`], and there are none
//! while one waits on purpose before it asks again; only time spent waiting for bytes counts.

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

/// A request this far ahead of the other one has won.
const DECIDED: u64 = 64 << 10;

/// Where a layer's bytes come from.
#[derive(Debug, Clone)]
pub(super) struct Origin {
    pub(super) blob: Arc<dyn BlobSource>,
    pub(super) lanes: Arc<Lanes>,
    pub(super) stats: Arc<LayerStats>,
    /// What can be had later is asked for until it comes: somebody else bounds the wait.
    pub(super) patient: bool,
}

impl Origin {
    /// Opens a stream of exactly these bytes, and counts the request.
    pub(super) async fn read(&self, range: Range<u64>) -> Result<ByteStream, BlobError> {
        self.stats.request();
        self.read_counted(range).await
    }

    /// The same for a request that was counted when it was planned.
    pub(super) async fn read_counted(&self, range: Range<u64>) -> Result<ByteStream, BlobError> {
        if range.is_empty() || self.blob.link().id == LinkId::LOCAL {
            return self.blob.read(range).await;
        }
        let mut race = Race::new(self.clone(), range);
        race.open().await?;
        Ok(race.into_stream())
    }
}

/// A range being read.
struct Race {
    origin: Origin,
    /// What was not passed on yet.
    rest: Range<u64>,
    first: Runner,
    second: Option<(Runner, Hedge)>,
    pace: Pace,
    /// Requests that shared the link at the last look.
    streams: u32,
    /// Time spent waiting, and what came in that time, since the last look at the pace.
    waited: Duration,
    came: u64,
    /// Of a patient reading: when to ask again.
    retry: Retry,
}

/// One request.
struct Runner {
    /// The next byte that it brings.
    at: u64,
    /// When it asks.
    from: Instant,
    flow: Flow,
}

enum Flow {
    Opening(BoxFuture<'static, Result<ByteStream, BlobError>>),
    Open(ByteStream),
}

/// What happened.
enum Event {
    First(Result<Bytes, BlobError>),
    Second(Result<Bytes, BlobError>),
    /// Nothing, for as long as it takes to say that this is too little.
    Late,
}

impl Runner {
    /// Asks after `delay`.
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

    /// The next bytes; none of them when the answer begins. Cancel safe. Not to be asked again after an error.
    async fn next(&mut self) -> Result<Bytes, BlobError> {
        match &mut self.flow {
            Flow::Opening(opening) => {
                self.flow = Flow::Open(opening.await?);
                Ok(Bytes::new())
            }
            Flow::Open(stream) => match stream.next().await {
                Some(bytes) => bytes,
                // Not what a source promises.
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

    /// Waits until an answer begins.
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

    /// Waits for the next event: what it brings that was not passed on yet, which may be nothing.
    async fn step(&mut self) -> Result<Bytes, BlobError> {
        // The pause before a request that is made again is no time spent waiting for bytes.
        let start = Instant::now().max(self.first.from);
        let late = start + self.pace.window.saturating_sub(self.waited);
        let (first, second) = (&mut self.first, &mut self.second);
        let second = async {
            match second {
                Some((second, _)) => second.next().await,
                None => std::future::pending().await,
            }
        };
        // Bytes that are here count, however late this task was woken.
        let event = tokio::select! {
            biased;
            bytes = first.next() => Event::First(bytes),
            bytes = second => Event::Second(bytes),
            () = tokio::time::sleep_until(late.into()) => Event::Late,
        };
        self.waited += start.elapsed();
        let bytes = match event {
            Event::First(Ok(bytes)) => pass_on(&mut self.rest, &mut self.first, bytes),
            Event::First(Err(error)) => {
                match self.second.take() {
                    Some((second, hedge)) => {
                        hedge.ended(true);
                        self.first = second;
                    }
                    None => self.again(error)?,
                }
                Bytes::new()
            }
            Event::Second(Ok(bytes)) => match &mut self.second {
                Some((second, _)) => pass_on(&mut self.rest, second, bytes),
                None => Bytes::new(),
            },
            Event::Second(Err(error)) => {
                tracing::debug!(%error, "a second request failed");
                if let Some((_, hedge)) = self.second.take() {
                    hedge.ended(false);
                }
                Bytes::new()
            }
            Event::Late => Bytes::new(),
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

    /// Asks for what is missing once more, later, if it can be had then and somebody waits for it.
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

    /// Whether one of two requests has won.
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

    /// Whether what came in the time that was waited is far too little.
    fn look(&mut self) {
        let mut link = self.origin.blob.link();
        if self.second.is_some() {
            // Both bring the same bytes.
            link.streams = link.streams.saturating_sub(1);
        }
        // Some of the time there may have been more.
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
                // The link itself is slow, or the server; or both connections are bad.
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

/// What of a runner's bytes was not passed on yet.
fn pass_on(rest: &mut Range<u64>, runner: &mut Runner, mut bytes: Bytes) -> Bytes {
    runner.at += bytes.len() as u64;
    let news = runner.at.saturating_sub(rest.start).min(bytes.len() as u64);
    bytes.advance(bytes.len() - news as usize);
    rest.start += news;
    bytes
}

#[cfg(test)]
mod tests;
