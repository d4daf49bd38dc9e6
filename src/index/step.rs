//! The result of a decoding step, for all compressions.

use super::{BitPosition, SpanId};

/// What a codec did with its input.
#[derive(Debug)]
pub(super) enum Step<'a> {
    /// All input is consumed.
    Input,
    /// Some output, and the position up to which the input was consumed to make it.
    Output { bytes: &'a [u8], position: BitPosition },
    /// Decoding could begin at this position, with the next byte of output.
    Restart(BitPosition),
    /// Decoding could perhaps begin at this position, with the next byte of output. The codec will tell.
    Candidate(BitPosition),
}

/// A span that becomes a restart, and what decoding from it needs.
pub(super) type SpanRestart = (SpanId, Vec<u8>);
