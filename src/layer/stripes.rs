//! Reads of many bytes of a blob by several requests side by side, as one stream.
//!
//! One connection seldom fills a link. Its window grows slowly and ends at a few megabytes, and many servers limit
//! the rate of each connection. So a large blob is cut into stripes:
//!
//! ```text
//! blob   │ passed on │ passed on ▒▒▒▒ │ ▒▒▒▒▒▒▒▒▒ │ ▒▒▒▒      │ ▒▒        │ not asked for yet …
//!                      the first one    ahead: received and kept until their turn comes
//! ```
//! Bytes of the first stripe are passed on as they arrive, as fast as the caller takes them. Each stripe ahead needs
//! one of a number of permits that all layers share. A stream takes a permit only if one is free and never waits for
//! one. So memory is bounded. The layer that was opened first, which is the largest, gets most of the permits.
//!
//! A range is cut into parts of at most a stripe. Connections that have been idle bring little in their first round
//! trips, so several parts together arrive sooner. [`Policy::parts`] says how many parts are requested at once.
//!
//! On a very slow link, stripes ahead only take bandwidth from the first stripe. The caller then could not tell that
//! link from a server that delivers almost nothing. So nothing is fetched ahead until the first stripe comes faster.
//!
//! Invariants:
//! - Bytes come in order, each once.
//! - If a server turns out not to support ranges, the whole blob is requested, but only if all of it is wanted.
//! - All requests end when the stream is dropped.
//!
//! [`Policy::parts`]: crate::fetch::Policy::parts

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Buf as _, Bytes};
use futures::stream::{self, StreamExt as _};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::{AbortHandle, JoinSet};

use super::race::Origin;
use crate::blob::{BlobError, ByteStream};

/// Bytes of a stripe: several round trips' worth, so that asking for it costs little.
const STRIPE: u64 = 1 << 20;
/// A smaller blob has come before stripes would pay.
const SMALLEST: u64 = 16 * STRIPE;
/// Stripes ahead, in all layers together: what fills a link of 1 Gbit/s and 80 ms.
const AHEAD: usize = 6;
/// Parts of ranges beside the first ones, in all layers together.
const PARTS: usize = 24;
/// The pace of the first stripe is looked at when it was waited for this long. Below the one rate (bytes per second) nothing is
/// fetched ahead, from the other one on something is again.
const LOOK: Duration = Duration::from_secs(2);
const NARROW: f64 = 4.0 * 1024.0;
const WIDE: f64 = 32.0 * 1024.0;
/// A blob nearer than this fills its link with one stream.
const NEAR: Duration = Duration::from_millis(2);

/// How much may be under way out of turn; shared by all layers.
#[derive(Debug, Clone)]
pub(super) struct Ahead {
    stripes: Arc<Semaphore>,
    parts: Arc<Semaphore>,
}

impl Default for Ahead {
    fn default() -> Self {
        Self {
            stripes: Arc::new(Semaphore::new(AHEAD)),
            parts: Arc::new(Semaphore::new(PARTS)),
        }
    }
}

/// Reads all of a blob from `start` on. A server without ranges is asked for all of it then, too.
pub(super) async fn read(origin: Origin, start: u64, ahead: &Ahead) -> Result<ByteStream, BlobError> {
    let rest = start..origin.blob.size();
    let length = rest.end.saturating_sub(start);
    let near = origin.blob.link().rtt.is_some_and(|rtt| rtt < NEAR);
    let (stripe, most_ahead) = if near || length < SMALLEST {
        (length, 0)
    } else {
        (STRIPE, AHEAD)
    };
    let mut stripes = Stripes::new(origin, rest, stripe, most_ahead, ahead.stripes.clone());
    stripes.is_whole = true;
    // What is wrong with the blob as a whole shows here.
    stripes.advance().await?;
    Ok(stripes.into_stream())
}

/// Reads a range of a blob in at most `parts` parts at a time.
pub(super) async fn read_range(
    origin: Origin,
    range: Range<u64>,
    parts: u64,
    ahead: &Ahead,
) -> Result<ByteStream, BlobError> {
    let parts = parts.min(1 + ahead.parts.available_permits() as u64);
    if parts == 1 {
        return origin.read(range).await;
    }
    let part = (range.end - range.start).div_ceil(parts).min(STRIPE);
    let mut stripes = Stripes::new(origin, range, part, parts as usize - 1, ahead.parts.clone());
    let first = stripes.next_range();
    stripes.look_ahead();
    stripes.open(first).await?;
    Ok(stripes.into_stream())
}

struct Stripes {
    origin: Origin,
    stripe: u64,
    end: u64,
    /// Whether so much of the blob is wanted that a server without ranges may be asked for all of it.
    is_whole: bool,
    /// Up to where bytes were passed on.
    position: u64,
    /// Up to where bytes were asked for.
    asked: u64,
    first: Receiving,
    /// Where the first stripe ends.
    first_end: u64,
    /// Where it was asked for once more.
    reopened: Option<u64>,
    queue: VecDeque<Stripe>,
    tasks: JoinSet<()>,
    most_ahead: usize,
    ahead: Arc<Semaphore>,
    /// Nothing is fetched ahead, because the first stripe is too slow.
    narrow: bool,
    /// How long was waited for how many bytes, since the last look.
    pace: (Duration, u64),
}

enum Receiving {
    Direct(ByteStream),
    /// No more than a stripe can be in it.
    Kept(mpsc::UnboundedReceiver<Result<Bytes, BlobError>>),
}

/// A stripe that waits for its turn.
struct Stripe {
    end: u64,
    task: AbortHandle,
    chunks: mpsc::UnboundedReceiver<Result<Bytes, BlobError>>,
    _permit: OwnedSemaphorePermit,
}

impl Stripes {
    fn new(origin: Origin, range: Range<u64>, stripe: u64, most_ahead: usize, ahead: Arc<Semaphore>) -> Self {
        Self {
            stripe,
            position: range.start,
            asked: range.start,
            end: range.end,
            is_whole: range == (0..origin.blob.size()),
            first: Receiving::Direct(stream::empty().boxed()),
            first_end: range.start,
            reopened: None,
            queue: VecDeque::new(),
            tasks: JoinSet::new(),
            origin,
            most_ahead,
            ahead,
            narrow: false,
            pace: (Duration::ZERO, 0),
        }
    }

    fn into_stream(self) -> ByteStream {
        let stream = stream::try_unfold(self, |mut stripes| async move {
            let bytes = stripes.next().await?;
            Ok(bytes.map(|bytes| (bytes, stripes)))
        });
        stream.boxed()
    }

    async fn next(&mut self) -> Result<Option<Bytes>, BlobError> {
        while self.position < self.end {
            self.look_ahead();
            let start = Instant::now();
            let received = match &mut self.first {
                Receiving::Direct(stream) => stream.next().await,
                Receiving::Kept(chunks) => chunks.recv().await,
            };
            match received {
                Some(Ok(bytes)) => {
                    self.paced(start.elapsed(), bytes.len() as u64);
                    self.position += bytes.len() as u64;
                    return Ok(Some(bytes));
                }
                Some(Err(BlobError::RangeUnsupported { .. })) if self.is_whole => self.start_over().await?,
                Some(Err(error)) => return Err(error),
                None if self.position == self.first_end => self.advance().await?,
                // What received this stripe has ended without an error, and without all of it.
                None => self.reopen().await?,
            }
        }
        Ok(None)
    }

    /// Goes on to the next stripe.
    async fn advance(&mut self) -> Result<(), BlobError> {
        if let Some(stripe) = self.queue.pop_front() {
            self.first = Receiving::Kept(stripe.chunks);
            self.first_end = stripe.end;
            return Ok(());
        }
        let range = self.next_range();
        match self.open(range).await {
            Err(BlobError::RangeUnsupported { .. }) if self.is_whole => self.start_over().await,
            result => result,
        }
    }

    /// Asks for what is missing of the first stripe. That brings something, or it is an error.
    async fn reopen(&mut self) -> Result<(), BlobError> {
        if self.reopened == Some(self.position) {
            return Err(BlobError::Protocol {
                host: "the source".to_owned(),
                what: format!("blob {}", self.origin.blob.digest()),
                detail: format!("the bytes end at offset {}", self.position),
                transient: true,
            });
        }
        self.reopened = Some(self.position);
        self.open(self.position..self.first_end).await
    }

    async fn open(&mut self, range: Range<u64>) -> Result<(), BlobError> {
        self.first_end = range.end;
        self.first = Receiving::Direct(self.origin.read(range).await?);
        Ok(())
    }

    /// So many bytes of the first stripe came after this time.
    fn paced(&mut self, waited: Duration, bytes: u64) {
        self.pace.0 += waited;
        self.pace.1 += bytes;
        if self.pace.0 < LOOK {
            return;
        }
        let rate = self.pace.1 as f64 / self.pace.0.as_secs_f64();
        self.pace = (Duration::ZERO, 0);
        if rate >= WIDE {
            self.narrow = false;
        } else if rate < NARROW && !self.narrow {
            self.narrow = true;
            for stripe in self.queue.drain(..) {
                stripe.task.abort();
            }
            self.asked = self.first_end;
        }
    }

    fn next_range(&mut self) -> Range<u64> {
        let end = self.end.min(self.asked + self.stripe);
        std::mem::replace(&mut self.asked, end)..end
    }

    /// Asks for as many stripes as may be ahead.
    fn look_ahead(&mut self) {
        // A task that ended and was not taken note of would be kept as long as the stream.
        while self.tasks.try_join_next().is_some() {}
        while !self.narrow
            && self.asked < self.end
            && self.queue.len() < self.most_ahead
            && let Ok(permit) = self.ahead.clone().try_acquire_owned()
        {
            let range = self.next_range();
            let (sender, chunks) = mpsc::unbounded_channel();
            let end = range.end;
            self.origin.stats.request();
            let task = self.tasks.spawn(receive(self.origin.clone(), range, sender));
            self.queue.push_back(Stripe {
                end,
                task,
                chunks,
                _permit: permit,
            });
        }
    }

    /// The server has no ranges after all: everything from the start, without what was passed on already.
    async fn start_over(&mut self) -> Result<(), BlobError> {
        self.queue.clear();
        self.tasks.abort_all();
        self.asked = self.end;
        self.first_end = self.end;
        let stream = self.origin.read(0..self.end).await?;
        let mut skip = self.position;
        let rest = stream.filter_map(move |bytes| {
            let rest = bytes.map(|mut bytes| {
                let known = skip.min(bytes.len() as u64);
                skip -= known;
                bytes.advance(known as usize);
                bytes
            });
            let empty = matches!(&rest, Ok(bytes) if bytes.is_empty());
            std::future::ready((!empty).then_some(rest))
        });
        self.first = Receiving::Direct(rest.boxed());
        Ok(())
    }
}

/// Receives a stripe, until nobody wants it any more.
async fn receive(origin: Origin, range: Range<u64>, kept: mpsc::UnboundedSender<Result<Bytes, BlobError>>) {
    let mut stream = match origin.read_counted(range).await {
        Ok(stream) => stream,
        Err(error) => return drop(kept.send(Err(error))),
    };
    while let Some(bytes) = stream.next().await {
        if kept.send(bytes).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests;
