//! Checksums of fragments. A writer computes them while it writes content in device order.

use super::fragment::{Check, Seed};
use crate::toc::DEVICE_BLOCK;

static ZEROS: [u8; DEVICE_BLOCK as usize] = [0; DEVICE_BLOCK as usize];

/// Returns what is recorded for a fragment: its CRC-32C, or 1 where that is 0. A record of 0 stands for an absent
/// fragment.
pub(super) fn recorded(crc: u32) -> u32 {
    crc.max(1)
}

/// Continues a checksum with `bytes` zeros.
fn zeros(mut crc: u32, mut bytes: u64) -> u32 {
    while bytes > 0 {
        let some = bytes.min(DEVICE_BLOCK);
        crc = crc32c::crc32c_append(crc, &ZEROS[..some as usize]);
        bytes -= some;
    }
    crc
}

/// A fragment that is not complete yet.
#[derive(Debug)]
struct Open {
    check: Check,
    /// Device address at which the fragment's block begins.
    block: u64,
    /// Device address up to which the checksum reaches.
    at: u64,
    crc: u32,
}

/// Computes the checksums of content that comes in device order. Gaps in between count as zeros, as they read on the
/// device.
#[derive(Debug)]
pub(super) struct Checksummer {
    seed: Seed,
    open: Option<Open>,
    /// The span that begins with the next content.
    begun: Option<u32>,
}

impl Checksummer {
    pub(super) fn new(seed: Seed) -> Self {
        Self {
            seed,
            open: None,
            begun: None,
        }
    }

    /// Says that `span` begins with the next content.
    pub(super) fn span(&mut self, span: u32) {
        self.begun = Some(span);
    }

    /// Adds content at a device address that is not below the end of the content before. Hands complete fragments to
    /// `done`.
    pub(super) fn content(&mut self, mut offset: u64, mut bytes: &[u8], done: &mut impl FnMut(Check, u32)) {
        while !bytes.is_empty() {
            let block = offset - offset % DEVICE_BLOCK;
            let begun = self.begun.take().filter(|_| offset != block);
            let mut open = match (self.open.take(), begun) {
                (Some(open), None) if open.block == block => open,
                (before, begun) => {
                    self.open = before;
                    self.close(offset, done);
                    let (check, at) = begun.map_or((Check::Block(block / DEVICE_BLOCK), block), |s| {
                        (Check::Head(s), offset)
                    });
                    Open {
                        check,
                        block,
                        at,
                        crc: self.seed.start(check),
                    }
                }
            };
            let some = (bytes.len() as u64).min(block + DEVICE_BLOCK - offset);
            let (now, later) = bytes.split_at(some as usize);
            open.crc = crc32c::crc32c_append(zeros(open.crc, offset - open.at), now);
            offset += some;
            open.at = offset;
            bytes = later;
            self.open = Some(open);
        }
    }

    /// Ends the open fragment at `end`, where something else begins, or with its block if that is earlier.
    pub(super) fn close(&mut self, end: u64, done: &mut impl FnMut(Check, u32)) {
        if let Some(open) = self.open.take() {
            let end = end.min(open.block + DEVICE_BLOCK);
            done(open.check, recorded(zeros(open.crc, end - open.at)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::geometry::tests::geometry;
    use super::*;
    use crate::oci::Digest;

    /// Adds content of spans with some gaps, in pieces of any size. Each fragment has the checksum of its bytes.
    #[test]
    fn each_fragment_has_the_checksum_of_its_bytes() {
        let mut random = fastrand::Rng::with_seed(3);
        for round in 0..300 {
            let blocks = 6;
            let size = blocks * DEVICE_BLOCK;
            let mut image: Vec<u8> = (0..size).map(|_| random.u8(1..)).collect();
            // Gaps, as there are between small files and in sparse ones.
            for _ in 0..random.usize(0..6) {
                let start = random.usize(..image.len());
                let end = random.usize(start..image.len());
                image[start..end].fill(0);
            }
            // A head is an address that has content.
            let mut heads: Vec<u64> = (0..8)
                .map(|_| random.u64(..size))
                .filter(|&head| image[head as usize] != 0)
                .collect();
            heads.sort_unstable();
            heads.dedup();
            let geometry = geometry(blocks, &heads);
            let mut found = std::collections::HashMap::new();
            let mut done = |check, crc| assert_eq!(found.insert(format!("{check:?}"), crc), None, "{round}");
            let seed = Seed::of(&Digest::of(b"layer"));
            let mut summer = Checksummer::new(seed);
            let mut at = 0;
            while at < image.len() {
                if image[at] == 0 {
                    at += 1;
                    continue;
                }
                if let Ok(span) = heads.binary_search(&(at as u64)) {
                    summer.span(span as u32);
                }
                let next = heads
                    .iter()
                    .find(|&&head| head > at as u64)
                    .map_or(image.len(), |&head| head as usize);
                let run = image[at..next].iter().take_while(|&&byte| byte != 0).count();
                let some = random.usize(1..=run);
                summer.content(at as u64, &image[at..at + some], &mut done);
                at += some;
            }
            summer.close(size, &mut done);
            for fragment in geometry.fragments(0..size) {
                let bytes = &image[fragment.range.start as usize..fragment.range.end as usize];
                let crc = found.remove(&format!("{:?}", fragment.check));
                match bytes.iter().all(|&byte| byte == 0) {
                    true => assert_eq!(crc, None),
                    false => {
                        let expected = crc32c::crc32c_append(seed.start(fragment.check), bytes);
                        assert_eq!(crc, Some(recorded(expected)), "{round} {fragment:?}");
                    }
                }
            }
            assert!(found.is_empty(), "{found:?}");
        }
    }
}
