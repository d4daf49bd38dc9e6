//! Where the spans of a layer lie in its data device, and which bytes share a checksum.
//!
//! The *head* of a span is the device address of its first byte of content. A span has the device addresses from its
//! head up to the head of the next span (see [`crate::span`]).
//!
//! The unit of checking is the *fragment*: a block of 4096 bytes, cut wherever a head lies inside it. A fragment has
//! content of one span only, so a span can be checked before its neighbours are there. The checksum of a fragment is
//! recorded for its block if the fragment begins with the block. Otherwise it is recorded for the head.
//!
//! ```text
//! blocks      |───────────────|───────────────|───────────────|
//! spans        ··· 4 ─────────────▶|◀──── 5 ──────▶|◀─── 6 ──── ···
//! fragments   | block 0       | block 1  |head| block 2  |head|
//! ```

use std::ops::Range;
use std::sync::Arc;

use super::fragment::{Check, Fragment, Seed};
use crate::span::SpanMap;
use crate::toc::DEVICE_BLOCK;

/// The places of all spans of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Geometry {
    /// Bytes of content, a multiple of the block size.
    pub(super) size: u64,
    /// The head of each span.
    pub(super) heads: Arc<[u64]>,
    /// Hash over the places and digests of all spans. Devices of different indexes have different keys.
    pub(super) key: [u8; 32],
    /// The value with which the checksums begin.
    pub(super) seed: Seed,
}

impl Geometry {
    /// Returns the geometry of these spans.
    pub(super) fn of(spans: &dyn SpanMap) -> Self {
        Self {
            size: spans.device_size(),
            heads: spans.heads().clone(),
            key: spans.key(),
            seed: Seed::of(spans.layer()),
        }
    }

    /// Returns the number of spans.
    pub(super) fn spans(&self) -> u32 {
        // An index has at most this many spans.
        self.heads.len() as u32
    }

    /// Returns the device addresses of a span.
    pub(super) fn range(&self, span: u32) -> Range<u64> {
        let next = self.heads.get(span as usize + 1);
        self.heads[span as usize]..next.copied().unwrap_or(self.size)
    }

    /// Returns the span whose content a fragment has, if the fragment has any content.
    pub(super) fn owner(&self, fragment: &Fragment) -> u32 {
        match fragment.check {
            Check::Head(span) => span,
            Check::Block(_) => (self.heads_until(fragment.range.start).saturating_sub(1)) as u32,
        }
    }

    /// Returns the spans that have bytes of a range of the device.
    pub(super) fn spans_of(&self, range: Range<u64>) -> Range<u32> {
        if range.is_empty() {
            return 0..0;
        }
        let first = self.heads_until(range.start).saturating_sub(1);
        first as u32..self.heads_until(range.end - 1) as u32
    }

    /// Returns how many spans have their head at or before `address`.
    fn heads_until(&self, address: u64) -> usize {
        self.heads.partition_point(|&head| head <= address)
    }

    /// Returns the fragments that have bytes of a range of the device, in order. They cover the range without gaps.
    pub(super) fn fragments(&self, range: Range<u64>) -> Fragments<'_> {
        let end = range.end.min(self.size);
        // The fragment around the first byte begins with the last head before that byte, or with the block.
        let block = range.start - range.start % DEVICE_BLOCK;
        let next = self.heads_until(range.start);
        let head = next.checked_sub(1).map(|last| self.heads[last]);
        Fragments {
            geometry: self,
            at: head.map_or(block, |head| head.max(block)),
            end: if range.is_empty() { 0 } else { end },
            next,
        }
    }
}

/// The iterator of [`Geometry::fragments`].
#[derive(Debug)]
pub(super) struct Fragments<'a> {
    geometry: &'a Geometry,
    /// Address at which the next fragment begins.
    at: u64,
    end: u64,
    /// The first span whose head is behind `at`.
    next: usize,
}

impl Iterator for Fragments<'_> {
    type Item = Fragment;

    fn next(&mut self) -> Option<Fragment> {
        if self.at >= self.end {
            return None;
        }
        let (start, heads) = (self.at, &self.geometry.heads);
        let block = start - start % DEVICE_BLOCK;
        let behind = block + DEVICE_BLOCK;
        self.at = heads.get(self.next).map_or(behind, |&head| head.min(behind));
        let check = if start == block {
            Check::Block(block / DEVICE_BLOCK)
        } else {
            Check::Head(self.next as u32 - 1)
        };
        while heads.get(self.next).is_some_and(|&head| head <= self.at) {
            self.next += 1;
        }
        Some(Fragment {
            range: start..self.at,
            check,
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::oci::Digest;

    /// Spans with these heads in a device of `blocks` blocks.
    pub(in super::super) fn geometry(blocks: u64, heads: &[u64]) -> Geometry {
        Geometry {
            size: blocks * DEVICE_BLOCK,
            heads: heads.into(),
            key: [heads.len() as u8; 32],
            seed: Seed::of(&Digest::of(b"layer")),
        }
    }

    fn fragments(geometry: &Geometry, range: Range<u64>) -> Vec<(u64, u64, Check)> {
        let found = geometry.fragments(range);
        found.map(|f| (f.range.start, f.range.end, f.check)).collect()
    }

    #[test]
    fn blocks_are_cut_where_a_span_begins() {
        // Span 1 has no content; spans 2 and 3 begin in the same block.
        let geometry = geometry(4, &[0, 5000, 5000, 5010, 8192]);
        let all = vec![
            (0, 4096, Check::Block(0)),
            (4096, 5000, Check::Block(1)),
            (5000, 5010, Check::Head(2)),
            (5010, 8192, Check::Head(3)),
            (8192, 12288, Check::Block(2)),
            (12288, 16384, Check::Block(3)),
        ];
        assert_eq!(fragments(&geometry, 0..4 * 4096), all);
        assert_eq!(fragments(&geometry, 4999..5001), all[1..3]);
        assert_eq!(fragments(&geometry, 5000..5001), all[2..3]);
        assert_eq!(fragments(&geometry, 5011..8193), all[3..5]);
        assert_eq!(fragments(&geometry, 16383..20000), all[5..]);
        assert!(fragments(&geometry, 5..5).is_empty() && fragments(&geometry, 16384..16385).is_empty());
        let owners: Vec<u32> = geometry.fragments(0..4 * 4096).map(|f| geometry.owner(&f)).collect();
        assert_eq!(owners, [0, 0, 2, 3, 4, 4]);
        assert_eq!((geometry.range(1), geometry.range(4)), (5000..5000, 8192..16384));
    }

    #[test]
    fn any_part_has_the_fragments_that_the_whole_has() {
        let mut random = fastrand::Rng::with_seed(5);
        for _ in 0..200 {
            let mut heads: Vec<u64> = (0..20).map(|_| random.u64(0..10 * 4096)).collect();
            heads[0] = 0;
            heads.sort_unstable();
            let geometry = geometry(10, &heads);
            let all: Vec<Fragment> = geometry.fragments(0..geometry.size).collect();
            assert!(all.windows(2).all(|pair| pair[0].range.end == pair[1].range.start));
            let start = random.u64(0..geometry.size);
            let end = random.u64(start..geometry.size) + 1;
            let touched = |f: &&Fragment| f.range.start < end && f.range.end > start;
            let expected: Vec<Fragment> = all.iter().filter(touched).cloned().collect();
            assert_eq!(
                geometry.fragments(start..end).collect::<Vec<_>>(),
                expected,
                "{start}..{end}"
            );
        }
    }
}
