//! A run of blob bytes that one response delivers.

use bytes::{Buf as _, Bytes};

use super::answer::ResponseContent;
use crate::blob::BlobError;

/// A run of blob bytes that one response delivers.
#[derive(Debug)]
pub(super) struct Body {
    content: ResponseContent,
    skip: u64,
    left: u64,
    /// Whether the client guessed how to read the response. An early end may then mean that the guess was wrong.
    is_guessed: bool,
    /// Bytes delivered so far.
    pub(super) given: u64,
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
    pub(super) async fn chunk(&mut self) -> Result<Option<Bytes>, BlobError> {
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
