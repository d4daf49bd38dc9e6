//! One read of a blob: bytes as they arrive, across as many answers as it takes.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use bytes::{Buf as _, Bytes};
use futures::stream::{self, StreamExt as _};

use super::Core;
use super::answer::Content;
use crate::blob::retry::Retry;
use crate::blob::{BlobError, ByteStream};

/// A stretch of a blob as it arrives.
#[derive(Debug)]
pub(super) struct Body {
    content: Content,
    skip: u64,
    left: u64,
    /// Whether it was guessed how to read the answer. Then an early end may be the end of bytes read in the wrong way.
    is_guessed: bool,
    /// Bytes that were given out.
    given: u64,
}

/// The state of one [`BlobSource::read`].
#[derive(Debug)]
pub(super) struct Reading {
    core: Arc<Core>,
    rest: Range<u64>,
    /// Whether the caller wants every byte up to the end, so that starting over without ranges is no waste.
    whole: bool,
    /// Over connections that other reads do not use.
    apart: bool,
    body: Option<Body>,
    retry: Retry,
    /// Bytes since the last progress.
    flowed: u64,
    /// When the caller got the last chunk.
    given: Option<Instant>,
    /// Whether the caller got anything.
    has_given: bool,
    /// How many more answers may turn out to be read in the wrong way, as long as nothing was given out.
    guesses: u32,
    /// Number of consecutive answers that brought fewer than [`PROGRESS`] bytes and ended before the range did.
    scanty: u32,
}

/// Fewer bytes than this are no progress: a server that gives a few with each answer would never be given up.
const PROGRESS: u64 = 16 << 10;
/// Ways to read an answer: as a part or as the whole, decoded or not.
const GUESSES: u32 = 3;
/// After this many consecutive answers with fewer than [`PROGRESS`] bytes of a longer range, the server counts as one without
/// ranges.
const SCANTY_ANSWERS: u32 = 4;

impl Reading {
    /// Gets `range` flowing; what fails for good fails here, before a stream exists.
    pub(super) async fn start(core: Arc<Core>, range: Range<u64>, apart: bool) -> Result<Self, BlobError> {
        let mut reading = Self {
            apart,
            whole: range.start == 0 && range.end == core.size,
            retry: core.client.retry(),
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

    /// The bytes in order; the stream ends after the first error.
    pub(super) fn into_stream(self) -> ByteStream {
        let stream = stream::try_unfold(self, |mut reading| async move {
            let chunk = reading.next().await?;
            Ok(chunk.map(|chunk| (chunk, reading)))
        });
        stream.boxed()
    }

    /// Gets the rest flowing, trying again while that can help.
    async fn open(&mut self) -> Result<(), BlobError> {
        let (core, what) = (&self.core, self.core.what());
        // Every other attempt goes over other connections: those that failed may be dead without knowing it.
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
        // The time the caller took with the last chunk is not ours.
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
                // A shorter range than asked for is legal; the next request asks for the rest.
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
                    // Bytes that were given out cannot be taken back. The caller checks them against the digest.
                    if self.has_given || self.guesses == 0 {
                        return Err(error);
                    }
                    self.body = None;
                }
                Err(error) => {
                    self.body = None;
                    // Over HTTP/2 the rest would be asked for on the connection that has just stalled.
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
    /// `left` bytes after `skip` unwanted ones.
    pub(super) fn new(content: Content, skip: u64, left: u64) -> Self {
        Self {
            content,
            skip,
            left,
            is_guessed: false,
            given: 0,
        }
    }

    /// The same, of an answer of which it was guessed how to read it.
    pub(super) fn guessed(self) -> Self {
        Self {
            is_guessed: true,
            ..self
        }
    }

    /// The next bytes of the stretch; `None` when all of it was delivered.
    async fn chunk(&mut self) -> Result<Option<Bytes>, BlobError> {
        while self.left > 0 {
            let Some(mut chunk) = self.content.chunk().await? else {
                // Some of an unproven part is as good as a shorter part.
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
