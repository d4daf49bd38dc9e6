//! A streaming inflater (RFC 1951) that can stop at, and start from, any block boundary.
//!
//! [`Inflate::decode`] takes compressed bytes in pieces of any size and puts its output into a buffer of its own, from which
//! the caller takes it with [`Inflate::take_output`]. The last 32 KiB of output stay in that buffer as history. Between calls
//! the state is a phase, at most 63 bits that were read ahead, and the tables of the current block: nothing is lost or read
//! twice when the input ends in the middle of a code.
//!
//! Two loops decode symbols. The fast one runs while 16 input bytes and room for a whole match are left; it reads eight bytes
//! at a time and consults tables whose entries hold everything about a symbol (`tables`). The careful one decodes one
//! literal or match from exactly the bits there are, or leaves everything as it was and asks for more input.
//!
//! A *restart* is a block boundary plus the history that later references read. [`Inflate::track`] begins to record these
//! references (`track`), [`Inflate::take_window`] returns the history once it is known; [`Inflate::resume`] starts there.
//!
//! Invariant: a stream is accepted exactly when zlib accepts it, with the same output.

mod header;
mod symbols;
mod tables;
mod track;

use header::Header;
use tables::Tables;
use track::Tracker;

/// How far back a reference can reach.
pub const HISTORY: usize = 32 * 1024;

/// Size of the output buffer, history included: large enough that keeping the history costs little, small enough for the
/// second-level cache.
const BUFFER: usize = 256 * 1024;
const MASK: usize = BUFFER - 1;
/// Bytes behind the buffer that a match's last 16-byte copy may overwrite.
const SLACK: usize = 32;
/// Longest match (RFC 1951, 3.2.5).
const MAX_MATCH: usize = 258;
/// The last position at which a round of the symbol loops may begin: three literals and one match fit behind it.
const STOP: usize = BUFFER - 3 - MAX_MATCH - 1;

/// Why a deflate stream is invalid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeflateError {
    /// Block type 3.
    #[error("reserved block type")]
    BlockType,
    /// A stored block whose length and its complement disagree.
    #[error("stored block with a bad length")]
    StoredLength,
    /// More than 286 literal/length or 30 distance codes.
    #[error("too many codes in a block header")]
    TooManyCodes,
    /// A repeat with nothing to repeat, or past the last code length.
    #[error("bad repeat of a code length")]
    BadRepeat,
    /// A block that could never end.
    #[error("no code for the end of the block")]
    NoEndOfBlock,
    /// Code lengths that promise more codes than there are bits for.
    #[error("oversubscribed code")]
    Oversubscribed,
    /// Code lengths that leave bit patterns without a meaning.
    #[error("incomplete code")]
    Incomplete,
    /// A bit pattern or symbol without a meaning.
    #[error("invalid symbol")]
    InvalidSymbol,
    /// A reference to before the start of the stream.
    #[error("back-reference too far")]
    DistanceTooFar,
}

/// Why [`Inflate::decode`] returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// All input is consumed; go on with more.
    Input,
    /// Take the output before going on: the buffer is full, or [`Progress::Block`] comes next.
    Output,
    /// The next bit begins a block, at or after the output position given to [`Inflate::stop_at_block`]. Going on decodes it.
    Block,
    /// The last block is decoded. Input after it is untouched, except for what [`Inflate::next_byte`] returns first.
    End,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Skip { bits: u32 },
    BlockHeader,
    StoredLength,
    Stored { left: usize },
    Counts,
    PrecodeLengths { have: usize },
    Lengths { have: usize },
    Symbols,
    Done,
}

/// The state of one deflate stream. About 300 KiB.
#[derive(Debug)]
pub struct Inflate {
    phase: Phase,
    last_block: bool,
    bits: u64,
    /// Number of valid bits in `bits`; the others are zero.
    count: u32,
    /// Compressed bytes taken in, whole.
    consumed: u64,
    buf: Box<[u8]>,
    /// Where the next byte goes.
    pos: usize,
    /// First byte not yet taken by the caller.
    taken: usize,
    /// First byte a reference may read, in so far as it is within 32 KiB.
    valid: usize,
    /// Bytes of output so far, taken or not.
    total: u64,
    stop_at: u64,
    /// The block that begins here was announced.
    stopped: bool,
    tables: Box<Tables>,
    header: Box<Header>,
    tracker: Option<Tracker>,
    window: Option<Vec<u8>>,
}

impl Default for Inflate {
    fn default() -> Self {
        Self::new()
    }
}

impl Inflate {
    /// A decoder at the start of a deflate stream.
    pub fn new() -> Self {
        Self {
            phase: Phase::BlockHeader,
            last_block: false,
            bits: 0,
            count: 0,
            consumed: 0,
            buf: vec![0; BUFFER + SLACK].into_boxed_slice(),
            pos: 0,
            taken: 0,
            valid: 0,
            total: 0,
            stop_at: u64::MAX,
            stopped: false,
            tables: Tables::new(),
            header: Header::new(),
            tracker: None,
            window: None,
        }
    }

    /// Makes a decoder at a restart. The lowest `skip_bits` (0 to 7) bits of the first input byte belong to the block
    /// before. `window` is the history, at most 32 KiB that end right before the restart. References past the front of
    /// `window` read zeros, because a window is kept without the zeros at its front.
    pub fn resume(window: &[u8], skip_bits: u8) -> Self {
        let mut inflate = Self::new();
        let window = &window[window.len().saturating_sub(HISTORY)..];
        inflate.pos = HISTORY;
        inflate.taken = HISTORY;
        inflate.buf[HISTORY - window.len()..HISTORY].copy_from_slice(window);
        inflate.phase = Phase::Skip {
            bits: u32::from(skip_bits & 7),
        };
        inflate
    }

    /// Starts a new stream with the next byte. History and output of the one before are no longer within reach.
    pub fn restart(&mut self) {
        self.align();
        self.phase = Phase::BlockHeader;
        self.last_block = false;
        self.valid = self.pos;
        self.stopped = false;
    }

    /// Asks [`Inflate::decode`] to return [`Progress::Block`] at each block that begins at output position `total` or later.
    pub fn stop_at_block(&mut self, total: u64) {
        self.stop_at = total;
    }

    /// Bits of input that are decoded.
    pub fn position_bits(&self) -> u64 {
        self.consumed * 8 - u64::from(self.count)
    }

    /// Whether [`Inflate::take_output`] would return bytes.
    pub fn has_output(&self) -> bool {
        self.taken < self.pos
    }

    /// The output since the last call.
    pub fn take_output(&mut self) -> &[u8] {
        let from = std::mem::replace(&mut self.taken, self.pos);
        &self.buf[from..self.pos]
    }

    /// Declares the current position, a block boundary, a restart: what later references read of the history before it is
    /// recorded from here on. A recording that has seen no output yet is dropped.
    pub fn track(&mut self) {
        self.tracker = (self.valid < self.pos).then(|| Tracker::new(&self.buf, self.valid, self.pos));
    }

    /// The window of the last restart, once it is complete: after 32 KiB of output, or at the end of the stream. Bytes that
    /// no reference reads are zero, and zeros at the front are left out; empty if no byte is read at all.
    pub fn take_window(&mut self) -> Option<Vec<u8>> {
        self.window.take()
    }

    /// The next whole byte after the end of the stream, from what was read ahead or from `input`.
    pub fn next_byte(&mut self, input: &mut &[u8]) -> Option<u8> {
        self.align();
        if self.count >= 8 {
            let byte = self.bits as u8;
            self.drop_bits(8);
            return Some(byte);
        }
        let (&byte, rest) = input.split_first()?;
        *input = rest;
        self.consumed += 1;
        Some(byte)
    }

    /// Decodes until input or room for output runs out, or something happens that the caller wants to know.
    pub fn decode(&mut self, input: &mut &[u8]) -> Result<Progress, DeflateError> {
        loop {
            if self
                .tracker
                .as_ref()
                .is_some_and(|tracker| self.pos - tracker.start >= HISTORY)
            {
                self.finish_tracking();
            }
            if self.pos > STOP {
                if self.has_output() {
                    return Ok(Progress::Output);
                }
                self.slide();
            }
            let progress = match self.phase {
                Phase::Skip { bits } => self.skip(input, bits),
                Phase::BlockHeader => {
                    if self.total >= self.stop_at && !self.stopped {
                        if self.has_output() {
                            return Ok(Progress::Output);
                        }
                        self.stopped = true;
                        return Ok(Progress::Block);
                    }
                    self.block_header(input)?
                }
                Phase::StoredLength => self.stored_length(input)?,
                Phase::Stored { left } => self.stored(input, left),
                Phase::Counts => self.counts(input)?,
                Phase::PrecodeLengths { have } => self.precode_lengths(input, have)?,
                Phase::Lengths { have } => self.lengths(input, have)?,
                Phase::Symbols => self.symbols(input)?,
                Phase::Done => {
                    self.finish_tracking();
                    return Ok(Progress::End);
                }
            };
            if !progress {
                return Ok(Progress::Input);
            }
        }
    }

    /// Moves the history to the front of the buffer.
    fn slide(&mut self) {
        let by = self.pos - HISTORY;
        self.buf.copy_within(by..self.pos, 0);
        self.pos = HISTORY;
        self.taken = HISTORY;
        self.valid = self.valid.saturating_sub(by);
        if let Some(tracker) = &mut self.tracker {
            // Recording ends 32 KiB after the restart, so the restart lies in the part that is kept.
            tracker.start -= by;
        }
    }

    fn finish_tracking(&mut self) {
        if let Some(tracker) = self.tracker.take().filter(|tracker| tracker.start < self.pos) {
            self.window = Some(tracker.finish());
        }
    }

    /// Reads ahead as far as `bits` can hold.
    fn top_up(&mut self, input: &mut &[u8]) {
        if let Some(word) = input.first_chunk::<8>() {
            self.bits |= u64::from_le_bytes(*word) << self.count;
            let bytes = (63 - self.count) >> 3;
            self.count += bytes * 8;
            self.bits &= (1 << self.count) - 1;
            self.consumed += u64::from(bytes);
            *input = &input[bytes as usize..];
            return;
        }
        while self.count <= 55 {
            let Some((&byte, rest)) = input.split_first() else {
                return;
            };
            self.bits |= u64::from(byte) << self.count;
            self.count += 8;
            self.consumed += 1;
            *input = rest;
        }
    }

    /// Whether the next `bits` (at most 56) bits are there.
    fn need(&mut self, input: &mut &[u8], bits: u32) -> bool {
        if self.count < bits {
            self.top_up(input);
        }
        self.count >= bits
    }

    fn drop_bits(&mut self, bits: u32) {
        self.bits >>= bits;
        self.count -= bits;
    }

    fn take_bits(&mut self, bits: u32) -> u32 {
        let value = self.bits as u32 & ((1 << bits) - 1);
        self.drop_bits(bits);
        value
    }

    fn align(&mut self) {
        self.drop_bits(self.count % 8);
    }

    // Each of the following does one phase as far as the input goes, and says whether it got to its end.

    fn skip(&mut self, input: &mut &[u8], bits: u32) -> bool {
        let enough = self.need(input, bits);
        if enough {
            self.drop_bits(bits);
            self.phase = Phase::BlockHeader;
        }
        enough
    }

    fn block_header(&mut self, input: &mut &[u8]) -> Result<bool, DeflateError> {
        if !self.need(input, 3) {
            return Ok(false);
        }
        self.last_block = self.take_bits(1) == 1;
        self.phase = match self.take_bits(2) {
            0 => {
                self.align();
                Phase::StoredLength
            }
            1 => {
                self.tables.load_fixed()?;
                Phase::Symbols
            }
            2 => Phase::Counts,
            _ => return Err(DeflateError::BlockType),
        };
        Ok(true)
    }

    fn end_block(&mut self) {
        self.stopped = false;
        self.phase = if self.last_block {
            Phase::Done
        } else {
            Phase::BlockHeader
        };
    }

    fn stored_length(&mut self, input: &mut &[u8]) -> Result<bool, DeflateError> {
        if !self.need(input, 32) {
            return Ok(false);
        }
        let length = self.take_bits(16);
        if self.take_bits(16) != length ^ 0xffff {
            return Err(DeflateError::StoredLength);
        }
        self.phase = Phase::Stored { left: length as usize };
        Ok(true)
    }

    fn stored(&mut self, input: &mut &[u8], mut left: usize) -> bool {
        while left > 0 && self.count >= 8 && self.pos <= STOP {
            self.buf[self.pos] = self.take_bits(8) as u8;
            self.advance(1);
            left -= 1;
        }
        if self.count == 0 {
            let length = left.min(input.len()).min((STOP + 1).saturating_sub(self.pos));
            let (bytes, rest) = input.split_at(length);
            self.buf[self.pos..self.pos + length].copy_from_slice(bytes);
            *input = rest;
            self.consumed += length as u64;
            self.advance(length);
            left -= length;
        }
        self.phase = Phase::Stored { left };
        if left == 0 {
            self.end_block();
            return true;
        }
        self.pos > STOP
    }

    fn advance(&mut self, length: usize) {
        self.pos += length;
        self.total += length as u64;
    }
}

#[cfg(test)]
mod tests {
    use flate2::{Compression, Decompress, FlushDecompress, Status, write::DeflateEncoder};
    use proptest::prelude::*;
    use std::io::Write;

    use super::*;

    /// Writes a stream bit by bit.
    #[derive(Default, Clone, Debug)]
    struct Bits(Vec<bool>);

    impl Bits {
        /// An integer, lowest bit first.
        fn int(mut self, value: u32, width: u32) -> Self {
            self.0.extend((0..width).map(|bit| value >> bit & 1 == 1));
            self
        }

        /// A Huffman code, as RFC 1951 prints them.
        fn code(mut self, digits: &str) -> Self {
            self.0.extend(digits.bytes().map(|digit| digit == b'1'));
            self
        }

        /// The header of a last block with a dynamic code, up to these code lengths of the precode.
        fn dynamic(litlen: u32, dist: u32, precode: &[u32]) -> Self {
            let counts = Self::default()
                .int(1, 1)
                .int(2, 2)
                .int(litlen - 257, 5)
                .int(dist - 1, 5);
            let counts = counts.int(precode.len() as u32 - 4, 4);
            precode.iter().fold(counts, |bits, &length| bits.int(length, 3))
        }

        /// A last block with the fixed code.
        fn fixed(codes: &[&str]) -> Self {
            codes
                .iter()
                .fold(Self::default().int(1, 1).int(1, 2), |bits, digits| bits.code(digits))
        }

        fn bytes(&self) -> Vec<u8> {
            self.0
                .chunks(8)
                .map(|byte| byte.iter().rev().fold(0, |sum, &bit| sum * 2 + u8::from(bit)))
                .collect()
        }
    }

    /// Code lengths of a precode where `0` is a code length of 1 and `1` is symbol 18, many zeros.
    const ONES_AND_ZEROS: [u32; 18] = [0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];

    fn inflate(inflate: &mut Inflate, mut input: &[u8], piece: usize) -> Result<(Vec<u8>, bool), DeflateError> {
        let mut out = Vec::new();
        while !input.is_empty() {
            let (mut head, tail) = input.split_at(piece.min(input.len()));
            input = tail;
            loop {
                let progress = inflate.decode(&mut head)?;
                out.extend_from_slice(inflate.take_output());
                match progress {
                    Progress::Input => break,
                    Progress::End => return Ok((out, true)),
                    Progress::Output | Progress::Block => {}
                }
            }
        }
        Ok((out, false))
    }

    fn oracle(input: &[u8]) -> Option<Vec<u8>> {
        let mut zlib = Decompress::new(false);
        let mut out = Vec::with_capacity(4 << 20);
        let status = zlib.decompress_vec(input, &mut out, FlushDecompress::Finish).ok()?;
        (status == Status::StreamEnd).then_some(out)
    }

    fn deflate(content: &[u8], level: u32) -> Vec<u8> {
        let mut encoder = DeflateEncoder::new(Vec::new(), Compression::new(level));
        encoder.write_all(content).unwrap();
        encoder.finish().unwrap()
    }

    /// Text with near and far repeats, and noise.
    fn content(length: usize, seed: u64) -> Vec<u8> {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut content: Vec<u8> = Vec::new();
        while content.len() < length {
            let run = rng.usize(3..80);
            if rng.u8(..) < 150 && content.len() > 100 {
                let back = rng.usize(1..content.len().min(HISTORY));
                let from = content.len() - back;
                (from..from + run).for_each(|at| content.push(content[at]));
            } else {
                content.extend(std::iter::repeat_with(|| rng.u8(b'a'..=b'z')).take(run));
            }
        }
        content
    }

    #[test]
    fn invalid_streams_are_refused_for_the_right_reason() {
        let sparse = || Bits::dynamic(257, 1, &ONES_AND_ZEROS);
        // In the fixed code; the length is 3, the distances are numbers 0 (1), 1 (2) and 30.
        let [a, length, near, far, never] = ["10010001", "0000001", "00000", "00001", "11110"];
        let cases = [
            (Bits::default().int(1, 1).int(3, 2), DeflateError::BlockType),
            (
                Bits::default().int(1, 8).int(0x5555_5555, 32),
                DeflateError::StoredLength,
            ),
            (Bits::dynamic(287, 1, &[0; 4]), DeflateError::TooManyCodes),
            (Bits::dynamic(257, 31, &[0; 4]), DeflateError::TooManyCodes),
            (Bits::dynamic(257, 1, &[1, 1, 1, 0]), DeflateError::Oversubscribed),
            (Bits::dynamic(257, 1, &[2, 2, 1, 1]), DeflateError::Oversubscribed),
            (Bits::dynamic(257, 1, &[2, 2, 2, 0]), DeflateError::Incomplete),
            (Bits::dynamic(257, 1, &[0; 4]), DeflateError::Incomplete),
            // Symbol 16, repeat, with nothing before it.
            (
                Bits::dynamic(257, 1, &[1, 1, 0, 0]).code("0").int(0, 2),
                DeflateError::BadRepeat,
            ),
            // Twice 138 is more than 258.
            (
                sparse().code("1").int(127, 7).code("1").int(127, 7),
                DeflateError::BadRepeat,
            ),
            (
                sparse().code("1").int(127, 7).code("1").int(109, 7),
                DeflateError::NoEndOfBlock,
            ),
            // Three codes of one bit.
            (
                sparse()
                    .code("00")
                    .code("1")
                    .int(127, 7)
                    .code("1")
                    .int(105, 7)
                    .code("00"),
                DeflateError::Oversubscribed,
            ),
            // Length symbol 286.
            (Bits::fixed(&["11000110"]), DeflateError::InvalidSymbol),
            (Bits::fixed(&[a, length, never]), DeflateError::InvalidSymbol),
            (Bits::fixed(&[a, length, far]), DeflateError::DistanceTooFar),
        ];
        for (bits, error) in cases {
            for padding in [0, 40] {
                let mut input = bits.bytes();
                input.resize(input.len() + padding, 0);
                for piece in [1, 1000] {
                    assert_eq!(inflate(&mut Inflate::new(), &input, piece), Err(error), "{input:x?}");
                }
                assert_eq!(oracle(&input), None, "{input:x?}");
            }
        }
        let good = Bits::fixed(&[a, length, near, "0000000"]).bytes();
        assert_eq!(inflate(&mut Inflate::new(), &good, 1), Ok((b"aaaa".into(), true)));
    }

    #[test]
    fn codes_of_one_symbol_are_accepted() {
        // The end of the block and one distance, a bit each.
        let header = Bits::dynamic(257, 1, &ONES_AND_ZEROS)
            .code("1")
            .int(127, 7)
            .code("1")
            .int(107, 7)
            .code("00");
        let good = header.clone().code("0").bytes();
        assert_eq!(oracle(&good), Some(Vec::new()));
        assert_eq!(inflate(&mut Inflate::new(), &good, 1), Ok((Vec::new(), true)));
        let bad = header.code("1").bytes();
        assert_eq!(oracle(&bad), None);
        assert_eq!(inflate(&mut Inflate::new(), &bad, 1), Err(DeflateError::InvalidSymbol));
    }

    #[test]
    fn what_follows_the_stream_is_left() {
        let mut input = deflate(b"some text, some text", 6);
        input.extend_from_slice(b"trailer");
        for piece in [1, 3, 100] {
            let mut decoder = Inflate::new();
            let mut rest = Vec::new();
            let mut ended = false;
            for mut head in input.chunks(piece) {
                ended = ended || decoder.decode(&mut head).unwrap() == Progress::End;
                while ended && let Some(byte) = decoder.next_byte(&mut head) {
                    rest.push(byte);
                }
            }
            assert_eq!(rest, b"trailer");
            assert_eq!(decoder.position_bits(), input.len() as u64 * 8);
        }
    }

    /// Stops at each block; resumes at each from the window recorded there, and at each bit position.
    #[test]
    fn every_block_can_be_a_restart() {
        let content = content(600_000, 3);
        let input = deflate(&content, 6);
        let mut restarts = Vec::new();
        let mut decoder = Inflate::new();
        let mut rest = &input[..];
        let mut out = Vec::new();
        decoder.stop_at_block(0);
        loop {
            let progress = decoder.decode(&mut rest).unwrap();
            out.extend_from_slice(decoder.take_output());
            if let Some(window) = decoder.take_window()
                && let Some((_, _, known)) = restarts.last_mut()
            {
                *known = Some(window);
            }
            match progress {
                Progress::Block => {
                    restarts.push((decoder.position_bits(), out.len(), None));
                    decoder.track();
                    decoder.stop_at_block(out.len() as u64 + HISTORY as u64);
                }
                Progress::End => break,
                Progress::Input | Progress::Output => {}
            }
        }
        assert_eq!(out, content);
        assert!(restarts.len() > 5);
        let mut windows = 0;
        for (position, at, window) in restarts {
            let window = window.unwrap_or_default();
            windows += usize::from(!window.is_empty());
            let used = window.iter().filter(|&&byte| byte != 0).count();
            assert!(used < HISTORY / 2, "{used} bytes of the window are kept");
            let mut decoder = Inflate::resume(&window, (position % 8) as u8);
            let (bytes, ended) = inflate(&mut decoder, &input[position as usize / 8..], 5000).unwrap();
            assert!(ended && bytes == content[at..]);
        }
        assert!(windows > 4);
    }

    proptest! {
        #[test]
        fn damaged_streams_end_as_in_zlib(seed: u64, level in 0u32..10, edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3), piece in 1usize..600) {
            let mut input = deflate(&content(3000, seed), level);
            for (at, byte) in edits {
                let at = at.index(input.len());
                input[at] = byte;
            }
            let ours = inflate(&mut Inflate::new(), &input, piece).ok().filter(|(_, ended)| *ended).map(|(out, _)| out);
            prop_assert!(ours == oracle(&input));
        }
    }
}
