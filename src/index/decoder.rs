//! Decodes some spans of a layer.

use std::ops::Range;
use std::vec;

use super::codec::Codec;
use super::step::Step;
use super::zstd::{RestartChain, Room};
use super::{BitPosition, Compression, IndexError, SpanId};

/// A span to be delivered: its range in the tar and its digest.
type Expected = (Range<u64>, [u8; 32]);

/// Decodes a run of spans from the blob bytes of [`super::SpanIndex::blob_range`], and verifies each span.
#[derive(Debug)]
pub struct SpanDecoder {
    codec: Codec,
    /// The span that is being filled.
    span: SpanId,
    current: Option<Expected>,
    rest: vec::IntoIter<Expected>,
    /// Number of spans not yet delivered.
    left: usize,
    /// Bytes of the current span so far.
    bytes: Vec<u8>,
}

impl SpanDecoder {
    pub(super) fn new(
        compression: Compression,
        first: SpanId,
        position: BitPosition,
        chain: &mut RestartChain<'_>,
        spans: Vec<Expected>,
        room: Room,
    ) -> Result<Self, IndexError> {
        let left = spans.len();
        let mut rest = spans.into_iter();
        Ok(Self {
            codec: Codec::resume(compression, position, chain, room)?,
            span: first,
            current: rest.next(),
            rest,
            left,
            bytes: Vec::new(),
        })
    }

    /// Decodes the next bytes of the blob. Gives every completed span to `sink`, whole and verified, in order.
    ///
    /// Ignores bytes beyond the last span. Fails with [`IndexError::SpanCorrupt`], or with what is wrong with the
    /// compressed data. After an error the decoder delivers nothing more.
    pub fn push(&mut self, mut compressed: &[u8], sink: &mut dyn FnMut(SpanId, &[u8])) -> Result<(), IndexError> {
        while self.current.is_some() {
            let mut bytes = match self.codec.step(&mut compressed) {
                Ok(Step::Input) => break,
                Ok(Step::Restart(_) | Step::Candidate(_)) => continue,
                Ok(Step::Output { bytes, .. }) => bytes,
                Err(error) => {
                    self.current = None;
                    return Err(error);
                }
            };
            while let Some((range, _)) = &self.current
                && !bytes.is_empty()
            {
                // A span is at most `MAX_SPAN` long.
                let length = (range.end - range.start) as usize;
                let (head, tail) = bytes.split_at(bytes.len().min(length - self.bytes.len()));
                self.bytes.reserve_exact(length - self.bytes.len());
                self.bytes.extend_from_slice(head);
                bytes = tail;
                if self.bytes.len() == length {
                    deliver(&mut self.current, self.span, &self.bytes, sink)?;
                    self.left -= 1;
                    self.bytes.clear();
                    self.span.0 += 1;
                    self.current = self.rest.next();
                }
            }
        }
        Ok(())
    }

    /// Whether all spans are delivered.
    pub fn is_done(&self) -> bool {
        self.left == 0
    }
}

/// Verifies and delivers a span. Leaves `current` empty, so nothing is delivered after a failure.
fn deliver(
    current: &mut Option<Expected>,
    span: SpanId,
    bytes: &[u8],
    sink: &mut dyn FnMut(SpanId, &[u8]),
) -> Result<(), IndexError> {
    let Some((tar, digest)) = current.take() else {
        return Ok(());
    };
    if blake3::hash(bytes) != digest {
        return Err(IndexError::SpanCorrupt { span, tar });
    }
    sink(span, bytes);
    Ok(())
}
