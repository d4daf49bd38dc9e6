//! Compresses restarts together.
//!
//! Restarts that follow each other contain similar bytes. So up to [`LONGEST`] of them are one *series*: a frame of zstd
//! that is cut into pieces, one for each restart. A piece ends where everything of its restart can be decoded, and needs
//! the pieces before it.
//!
//! ```text
//! number      1 byte: number of pieces of the series before this one
//! piece       a part of a zstd frame. The frame has no end
//! ```

use std::fmt;

use zstd::zstd_safe::zstd_sys::ZSTD_EndDirective;
use zstd::zstd_safe::{CCtx, CParameter, DCtx, DParameter, InBuffer, OutBuffer, ResetDirective};

use crate::index::{IndexError, malformed};

/// Most restarts of a series. With more, the index is a little smaller, and beginning at a restart takes longer.
const LONGEST: u8 = 8;
/// Bytes of restarts behind which a series ends.
const MOST_BYTES: usize = 1 << 20;
/// Level of zstd. With a higher one, the planner takes more time, and reads fetch up to two per cent less. With a lower
/// one, they fetch up to a tenth more.
const LEVEL: i32 = 3;
/// Window of a series, as a binary logarithm.
const WINDOW_LOG: u32 = 20;
/// Bytes in which a piece is compressed or decompressed.
const PART: usize = 64 << 10;

/// Compresses restarts in the order in which they lie in the blob.
pub(super) struct SeriesWriter {
    context: CCtx<'static>,
    /// Number of pieces of the present series.
    pieces: u8,
    /// Bytes of the present series before they were compressed.
    bytes: usize,
}

impl fmt::Debug for SeriesWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SeriesWriter")
            .field("pieces", &self.pieces)
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}

impl SeriesWriter {
    /// Bytes of memory that a writer takes.
    pub(super) const MEMORY: u64 = 6 << 20;

    /// Makes a writer. `None` if there is no memory.
    pub(super) fn new() -> Option<Self> {
        let mut context = CCtx::try_create()?;
        for parameter in [CParameter::CompressionLevel(LEVEL), CParameter::WindowLog(WINDOW_LOG)] {
            context.set_parameter(parameter).ok()?;
        }
        Some(Self {
            context,
            pieces: 0,
            bytes: 0,
        })
    }

    /// Returns the next piece, which contains `plain`. Begins another series if the present one is long enough.
    pub(super) fn add(&mut self, plain: &[u8]) -> Option<Vec<u8>> {
        if self.pieces == LONGEST || self.bytes > MOST_BYTES {
            self.end();
        }
        if self.pieces == 0 {
            self.context.reset(ResetDirective::SessionOnly).ok()?;
        }
        let mut piece = vec![self.pieces];
        let added = self.compress(plain, &mut piece);
        self.pieces += 1;
        self.bytes += plain.len();
        if added.is_none() {
            // The next piece cannot follow this one.
            self.end();
        }
        added.map(|()| piece)
    }

    /// Ends the series: the next restart begins another one.
    pub(super) fn end(&mut self) {
        self.pieces = 0;
        self.bytes = 0;
    }

    fn compress(&mut self, plain: &[u8], piece: &mut Vec<u8>) -> Option<()> {
        let mut source = InBuffer::around(plain);
        let mut part = [0; PART];
        loop {
            let mut sink = OutBuffer::around(&mut part[..]);
            let left = self
                .context
                .compress_stream2(&mut sink, &mut source, ZSTD_EndDirective::ZSTD_e_flush)
                .ok()?;
            piece.extend_from_slice(sink.as_slice());
            if left == 0 && source.pos() == plain.len() {
                return Some(());
            }
        }
    }
}

/// Stored restarts and their offsets in the tar, the nearest first.
pub(in crate::index) type RestartChain<'a> = dyn Iterator<Item = (u64, &'a [u8])> + 'a;

/// Decompresses the restarts of a chain, the nearest first.
pub(super) struct SeriesReader<'a, 'c> {
    chain: &'a mut RestartChain<'c>,
    /// The restarts of a series that were not returned yet, with their offsets in the tar. The nearest one is the last.
    plain: Vec<(u64, Vec<u8>)>,
}

/// Asks for memory: is given the number of bytes that will be in use.
pub(super) type Allow<'a> = dyn FnMut(u64) -> Result<(), IndexError> + 'a;

impl<'a, 'c> SeriesReader<'a, 'c> {
    /// Reads the restarts of `chain`.
    pub(super) fn new(chain: &'a mut RestartChain<'c>) -> Self {
        Self {
            chain,
            plain: Vec::new(),
        }
    }

    /// Returns the next restart and its offset in the tar. `None` behind the last one.
    pub(super) fn next(&mut self, allow: &mut Allow<'_>) -> Result<Option<(u64, Vec<u8>)>, IndexError> {
        if self.plain.is_empty() {
            self.read_series(allow)?;
        }
        Ok(self.plain.pop())
    }

    /// Returns the memory in bytes of the restarts that were not returned yet.
    pub(super) fn held(&self) -> u64 {
        self.plain.iter().map(|(_, plain)| plain.capacity() as u64).sum()
    }

    fn read_series(&mut self, allow: &mut Allow<'_>) -> Result<(), IndexError> {
        let wrong = || malformed("a zstd restart lacks one before it");
        let mut pieces: Vec<(u64, &[u8])> = Vec::new();
        // The number of the piece before the last one.
        let mut expected: Option<u8> = None;
        loop {
            let Some((offset, stored)) = self.chain.next() else {
                return if pieces.is_empty() { Ok(()) } else { Err(wrong()) };
            };
            let (&number, piece) = stored.split_first().ok_or_else(wrong)?;
            if expected.map_or(number >= LONGEST, |expected| number != expected) {
                return Err(wrong());
            }
            pieces.push((offset, piece));
            expected = number.checked_sub(1);
            if expected.is_none() {
                break;
            }
        }
        let mut context = DCtx::try_create().ok_or(IndexError::OutOfMemory)?;
        context
            .set_parameter(DParameter::WindowLogMax(WINDOW_LOG))
            .map_err(|_| IndexError::OutOfMemory)?;
        let mut decoded = 0;
        for (offset, piece) in pieces.into_iter().rev() {
            let plain = decompress(&mut context, piece, decoded, allow)?;
            decoded += plain.capacity() as u64;
            self.plain.push((offset, plain));
        }
        Ok(())
    }
}

/// Decompresses a piece behind those before it, which have `before` bytes.
fn decompress(
    context: &mut DCtx<'static>,
    piece: &[u8],
    before: u64,
    allow: &mut Allow<'_>,
) -> Result<Vec<u8>, IndexError> {
    let wrong = || malformed("a zstd restart does not decompress");
    let mut plain = Vec::new();
    let mut source = InBuffer::around(piece);
    let mut part = [0; PART];
    loop {
        let mut sink = OutBuffer::around(&mut part[..]);
        let left = context.decompress_stream(&mut sink, &mut source).map_err(|_| wrong())?;
        let made = sink.as_slice();
        // Twice, for the vector grows by doubling.
        allow(before + 2 * (plain.len() + PART) as u64)?;
        plain.extend_from_slice(made);
        // The frame of a series has no end.
        if left == 0 {
            return Err(wrong());
        }
        if made.len() < PART && source.pos() == piece.len() {
            return Ok(plain);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(chain: &[(u64, &[u8])], allow: &mut Allow<'_>) -> Result<Vec<(u64, Vec<u8>)>, IndexError> {
        let mut chain = chain.iter().copied();
        let mut reader = SeriesReader::new(&mut chain);
        let mut found = Vec::new();
        while let Some(next) = reader.next(allow)? {
            found.push(next);
        }
        Ok(found)
    }

    #[test]
    fn restarts_are_read_back_from_the_nearest_to_the_first() {
        let mut rng = fastrand::Rng::with_seed(9);
        let text: Vec<u8> = std::iter::repeat_with(|| rng.u8(..)).take(40_000).collect();
        let mut writer = SeriesWriter::new().unwrap();
        let mut all: Vec<(u64, Vec<u8>)> = Vec::new();
        let mut stored: Vec<(u64, Vec<u8>)> = Vec::new();
        for n in 0..30 {
            let from = rng.usize(0..30_000);
            let plain = match n {
                // A series ends behind this one.
                12 => text.repeat(40),
                13 => Vec::new(),
                _ => text[from..from + 10_000].to_vec(),
            };
            if n == 20 {
                writer.end();
            }
            stored.push((n, writer.add(&plain).unwrap()));
            all.push((n, plain));
        }
        let numbers: Vec<u8> = stored.iter().map(|(_, piece)| piece[0]).collect();
        assert_eq!(numbers[..14], [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 0]);
        assert_eq!(numbers[20], 0);
        // Bytes of an earlier restart of the series take next to nothing.
        assert!(stored[7].1.len() < 8000);
        for count in 0..=stored.len() {
            let chain: Vec<(u64, &[u8])> = stored[..count]
                .iter()
                .rev()
                .map(|(n, piece)| (*n, &piece[..]))
                .collect();
            let found = read(&chain, &mut |_| Ok(())).unwrap();
            assert!(found.iter().eq(all[..count].iter().rev()));
        }
        // A piece is missing, or is another series' piece.
        let chain =
            |order: &[usize]| -> Vec<(u64, &[u8])> { order.iter().map(|&n| (stored[n].0, &stored[n].1[..])).collect() };
        assert!(read(&chain(&[2, 0]), &mut |_| Ok(())).is_err());
        assert!(read(&chain(&[2, 1]), &mut |_| Ok(())).is_err());
        assert!(read(&[(1, &[LONGEST, 1, 2])], &mut |_| Ok(())).is_err());
        assert!(read(&[(1, &[])], &mut |_| Ok(())).is_err());
    }

    #[test]
    fn a_bomb_takes_no_more_than_is_allowed() {
        let stored = SeriesWriter::new().unwrap().add(&vec![0x80; 50 << 20]).unwrap();
        let mut asked = 0;
        let read = read(&[(0, &stored)], &mut |bytes| {
            asked = bytes;
            match bytes < 1 << 20 {
                true => Ok(()),
                false => Err(IndexError::OutOfMemory),
            }
        });
        assert_eq!(read, Err(IndexError::OutOfMemory));
        assert!(asked < 2 << 20);
    }
}
