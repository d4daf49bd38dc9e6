//! One read of a blob: bytes as they arrive, over as many responses as the read needs, from whichever place has them.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use futures::stream::{self, StreamExt as _};

use super::BlobCore;
use super::body::Body;
use super::copy::BlobAsked;
use super::pace::HostPace;
use crate::blob::retry::Retry;
use crate::blob::{BlobError, ByteStream, Verdict};
use crate::registry::places::PlaceTurn;

/// The state of one [`BlobSource::read`](crate::blob::BlobSource::read).
#[derive(Debug)]
pub(super) struct Reading {
    core: Arc<BlobCore>,
    rest: Range<u64>,
    /// Whether the caller reads the whole blob, so that a request without a range wastes nothing.
    whole: bool,
    /// Whether the read uses connections that ordinary reads do not use.
    apart: bool,
    /// The response that is being read, and the turn of the place that sends it.
    body: Option<(PlaceTurn, Body)>,
    /// How fast that place sends, if another place can be asked instead.
    pace: Option<HostPace>,
    retry: Retry,
    /// Bytes delivered since the last progress.
    flowed: u64,
    /// When the caller got the last chunk.
    given: Option<Instant>,
    /// Whether the caller got any bytes.
    has_given: bool,
    /// How many more responses may turn out to have been misread before the caller got any bytes.
    guesses: u32,
    /// Responses in a row that delivered fewer than [`PROGRESS`] bytes of a larger range.
    scanty: u32,
}

/// Fewest bytes that count as progress. If fewer counted, the client would never give up on a server that sends a few
/// bytes with each response.
const PROGRESS: u64 = 16 << 10;
/// Most responses that a read may misread at its start, one for each way to read a response: as a part, as the whole
/// blob, or as the whole blob decoded.
const GUESSES: u32 = 3;
/// Responses in a row with fewer than [`PROGRESS`] bytes of a larger range that show that a server does not really
/// serve ranges.
const SCANTY_ANSWERS: u32 = 4;

impl Reading {
    /// Sends the first request for `range`. A permanent failure is returned here, before a stream exists.
    pub(super) async fn start(core: Arc<BlobCore>, range: Range<u64>, apart: bool) -> Result<Self, BlobError> {
        let mut reading = Self {
            apart,
            whole: range.start == 0 && range.end == core.size,
            retry: core.client.retry().counted_by(core.meter.retry_counter()),
            rest: range,
            body: None,
            pace: None,
            flowed: 0,
            given: None,
            has_given: false,
            guesses: GUESSES,
            scanty: 0,
            core,
        };
        reading.open().await?;
        Ok(reading)
    }

    /// Returns the bytes in order. The stream ends after the first error.
    pub(super) fn into_stream(self) -> ByteStream {
        let stream = stream::try_unfold(self, |mut reading| async move {
            let chunk = reading.next().await?;
            Ok(chunk.map(|chunk| (chunk, reading)))
        });
        stream.boxed()
    }

    /// Requests the rest of the range. Retries while a retry can help.
    async fn open(&mut self) -> Result<(), BlobError> {
        let (core, what) = (&self.core, self.core.what());
        // Every other attempt at a place uses other connections: those that failed may be dead although the client has
        // not noticed.
        let mut rounds = vec![0_u32; core.copies.len()];
        let attempt = |turn: PlaceTurn| {
            rounds[turn.place] += 1;
            let asked = BlobAsked {
                wanted: self.rest.clone(),
                whole: self.whole,
                apart: self.apart ^ (rounds[turn.place] % 2 == 0),
                wait: turn.wait,
                stall: turn.stall,
            };
            async move { Ok((turn, core.copies[turn.place].open(&asked).await?)) }
        };
        let persisting = core
            .client
            .persist(&core.places, &core.wanted, &what, &mut self.retry, attempt);
        let (turn, body) = persisting.await?;
        self.pace = turn
            .stall
            .is_some()
            .then(|| HostPace::new(core.copies[turn.place].host()));
        self.body = Some((turn, body));
        Ok(())
    }

    async fn next(&mut self) -> Result<Option<Bytes>, BlobError> {
        // The time that the caller spent on the last chunk does not count towards the deadline.
        if let Some(given) = self.given.take() {
            self.retry.excuse(given.elapsed());
        }
        if self.flowed >= PROGRESS {
            self.flowed = 0;
            self.retry.progressed();
        }
        while !self.rest.is_empty() {
            let Some((turn, body)) = &mut self.body else {
                self.open().await?;
                continue;
            };
            let turn = *turn;
            let asked = Instant::now();
            match body.chunk().await {
                Ok(Some(chunk)) => {
                    let core = &self.core;
                    let pace = self
                        .pace
                        .as_mut()
                        .map(|pace| pace.waited(asked.elapsed(), || core.what()));
                    if let Some(Err(slow)) = pace {
                        core.places.failed(turn.place, &core.wanted, &slow);
                        self.body = None;
                    }
                    self.has_given = true;
                    self.rest.start += chunk.len() as u64;
                    self.flowed += chunk.len() as u64;
                    self.core.meter.bytes(chunk.len() as u64);
                    self.core.copies[turn.place].served();
                    self.given = Some(Instant::now());
                    return Ok(Some(chunk));
                }
                // A response may hold less than the requested range. The next request asks for the rest.
                Ok(None) => {
                    self.scanty = if body.given < PROGRESS { self.scanty + 1 } else { 0 };
                    self.body = None;
                    if self.scanty >= SCANTY_ANSWERS {
                        self.core.copies[turn.place].judged(Verdict::OnlyPartsAreWrong);
                    }
                }
                // A place that delivers is not left because of a lost connection.
                Err(BlobError::Unreachable { .. }) if body.given >= PROGRESS && turn.stall.is_some() => {
                    self.body = None;
                }
                Err(error) => {
                    self.body = None;
                    self.failed(turn, error).await?;
                }
            }
        }
        Ok(None)
    }

    /// Decides how to go on after a response broke off. Returns the error if the read is over.
    async fn failed(&mut self, turn: PlaceTurn, error: BlobError) -> Result<(), BlobError> {
        let core = &self.core;
        let is_corrupt = matches!(error, BlobError::Corrupt { .. });
        if is_corrupt {
            core.copies[turn.place].judged(Verdict::Wrong);
        }
        // Another place has the rest, unless all places have just failed.
        let is_mirror = turn.place != core.places.last();
        if is_mirror {
            core.places.failed(turn.place, &core.wanted, &error);
            if turn.stall.is_some() {
                return Ok(());
            }
        }
        if is_corrupt {
            self.guesses = self.guesses.saturating_sub(1);
            // The caller checks the bytes that it already has. The read cannot take them back.
            if self.has_given || self.guesses == 0 {
                return Err(error);
            }
            return Ok(());
        }
        // Changes the pool of connections. Over HTTP/2, the request for the rest would otherwise use the stalled
        // connection.
        self.apart ^= matches!(error, BlobError::Timeout { .. });
        core.client
            .pause(&core.places, &core.what(), &mut self.retry, error)
            .await
    }
}
