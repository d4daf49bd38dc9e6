//! One read of a blob: bytes as they arrive, over as many responses as the read needs.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use bytes::{Buf as _, Bytes};
use futures::stream::{self, StreamExt as _};

use super::Core;
use super::answer::ResponseContent;
use crate::blob::retry::Retry;
use crate::blob::{BlobError, ByteStream};

/// A run of blob bytes that one response delivers.
#[derive(Debug)]
pub(super) struct Body {
    content: ResponseContent,
    skip: u64,
    left: u64,
    /// Whether the client guessed how to read the response. An early end may then mean that the guess was wrong.
    is_guessed: bool,
    /// Bytes delivered so far.
    given: u64,
}

/// The state of one [`BlobSource::read`](crate::blob::BlobSource::read).
#[derive(Debug)]
pub(super) struct Reading {
    core: Arc<Core>,
    rest: Range<u64>,
    /// Whether the caller reads the whole blob, so that a request without a range wastes nothing.
    whole: bool,
    /// Whether the read uses connections that ordinary reads do not use.
    apart: bool,
    body: Option<Body>,
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
    pub(super) async fn start(core: Arc<Core>, range: Range<u64>, apart: bool) -> Result<Self, BlobError> {
        let mut reading = Self {
            apart,
            whole: range.start == 0 && range.end == core.size,
            retry: core.client.retry().counted_by(core.meter.retry_counter()),
            rest: range,
            body: None,
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
        // Every other attempt uses other connections: those that failed may be dead although the client has not
        // noticed.
        let mut apart = !self.apart;
        let attempt = |wait| {
            apart = !apart;
            core.open(&self.rest, self.whole, apart, wait)
        };
        let opening = core.client.persist(&core.repository, &what, &mut self.retry, attempt);
        self.body = Some(opening.await?);
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
            let Some(body) = &mut self.body else {
                self.open().await?;
                continue;
            };
            match body.chunk().await {
                Ok(Some(chunk)) => {
                    self.has_given = true;
                    self.rest.start += chunk.len() as u64;
                    self.flowed += chunk.len() as u64;
                    self.core.meter.bytes(chunk.len() as u64);
                    self.given = Some(Instant::now());
                    return Ok(Some(chunk));
                }
                // A response may hold less than the requested range. The next request asks for the rest.
                Ok(None) => {
                    self.scanty = if body.given < PROGRESS { self.scanty + 1 } else { 0 };
                    self.body = None;
                    if self.scanty >= SCANTY_ANSWERS {
                        self.core.belief.parts_are_wrong();
                    }
                }
                Err(error @ BlobError::Corrupt { .. }) => {
                    self.core.belief.bytes_were_wrong();
                    self.guesses = self.guesses.saturating_sub(1);
                    // The caller checks the bytes that it already has. The read cannot take them back.
                    if self.has_given || self.guesses == 0 {
                        return Err(error);
                    }
                    self.body = None;
                }
                Err(error) => {
                    self.body = None;
                    // Changes the pool of connections. Over HTTP/2, the request for the rest would otherwise use the
                    // stalled connection.
                    self.apart ^= matches!(error, BlobError::Timeout { .. });
                    let core = &self.core;
                    core.client
                        .pause(&core.repository, &core.what(), &mut self.retry, error)
                        .await?;
                }
            }
        }
        Ok(None)
    }
}

impl Body {
    /// Makes a body that discards `skip` bytes and then delivers `left` bytes.
    pub(super) fn new(content: ResponseContent, skip: u64, left: u64) -> Self {
        Self {
            content,
            skip,
            left,
            is_guessed: false,
            given: 0,
        }
    }

    /// Marks the body as one of a response that the client guessed how to read.
    pub(super) fn guessed(self) -> Self {
        Self {
            is_guessed: true,
            ..self
        }
    }

    /// Returns the next bytes of the run, or `None` when all were delivered.
    async fn chunk(&mut self) -> Result<Option<Bytes>, BlobError> {
        while self.left > 0 {
            let Some(mut chunk) = self.content.chunk().await? else {
                // An early end of an unproven part, with some bytes delivered, is handled as a lost connection: the
                // next request asks for the rest.
                if self.is_guessed && (self.given == 0 || self.skip > 0 || self.content.is_decoded()) {
                    return Err(BlobError::Corrupt {
                        what: format!("a blob from {}", self.content.host()),
                        expected: format!("{} more bytes", self.skip + self.left),
                        actual: "the end of the answer".to_owned(),
                    });
                }
                return Err(BlobError::Unreachable {
                    host: self.content.host(),
                    reason: format!(
                        "connection lost: the answer ended {} bytes early",
                        self.skip + self.left
                    ),
                });
            };
            let skipped = self.skip.min(chunk.len() as u64);
            self.skip -= skipped;
            chunk.advance(skipped as usize);
            if chunk.len() as u64 > self.left {
                chunk.truncate(self.left as usize);
            }
            if !chunk.is_empty() {
                self.left -= chunk.len() as u64;
                self.given += chunk.len() as u64;
                return Ok(Some(chunk));
            }
        }
        Ok(None)
    }
}
