//! A fragment: bytes of the device that share a checksum.

use std::ops::Range;

use crate::oci::Digest;

/// Where the checksum of a fragment is recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Check {
    /// For the block with this number: the fragment begins where the block does.
    Block(u64),
    /// For this span: the fragment begins with the span's first byte, inside a block.
    Head(u32),
}

/// Bytes of the device that share a checksum.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fragment {
    pub(super) range: Range<u64>,
    pub(super) check: Check,
}

/// The value with which all checksums of a layer begin. A checksum depends on the layer and on the place of the
/// fragment. Another layer's device in the place of this one does not pass, nor do bytes in another place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Seed(u32);

impl Seed {
    /// Returns the seed of the layer whose blob has this digest.
    pub(super) fn of(layer: &Digest) -> Self {
        let hash = blake3::hash(layer.to_string().as_bytes());
        let mut first = [0; 4];
        first.copy_from_slice(&hash.as_bytes()[..4]);
        Self(u32::from_le_bytes(first))
    }

    /// Returns the checksum of a fragment before any of its bytes.
    pub(super) fn start(self, check: Check) -> u32 {
        let place = match check {
            Check::Block(block) => block,
            Check::Head(span) => u64::from(span) | 1 << 63,
        };
        // Multiplication by an odd number keeps any two places different. The shift keeps the upper half of the
        // product.
        self.0 ^ (place.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as u32
    }
}
