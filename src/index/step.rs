//! What decoders of all formats say of a step.

use super::BitPosition;

/// What a codec did with its input.
#[derive(Debug)]
pub(super) enum Step<'a> {
    /// All input is consumed.
    Input,
    /// Output, and how far the input was consumed to make it.
    Output { bytes: &'a [u8], position: BitPosition },
    /// Decoding could begin at this position, with the byte that comes out next.
    Restart(BitPosition),
}
