//! A streaming inflater (RFC 1951) that can stop at any block boundary and start from any.
//!
//! # How it works
//! [`Inflate::decode`] takes compressed bytes in pieces of any size. The decoder puts the output into its own buffer.
//! The caller takes the output with [`Inflate::take_output`]. The last 32 KiB of output stay in that buffer as
//! history.
//!
//! Between calls the state is a phase, at most 63 bits that were read ahead, and the tables of the current block. If
//! the input ends in the middle of a code, nothing is lost or read twice.
//!
//! Two loops decode symbols. The fast loop runs while 16 input bytes and room for a whole match are left. The fast
//! loop reads eight bytes at a time, and its tables hold everything about a symbol in one entry (`tables`). The
//! careful loop decodes one literal or match from exactly the bits that are there. If the bits do not suffice, the
//! careful loop changes nothing and asks for more input.
//!
//! A *restart* is a block boundary, together with the history that later references read. [`Inflate::track`] begins
//! to record these references (`track`). [`Inflate::take_window`] returns the history once it is known.
//! [`Inflate::resume`] starts at a restart.
//!
//! # Invariants
//! - The inflater accepts a stream exactly when zlib accepts it, with the same output.

mod header;
mod symbols;
mod tables;
mod track;

use header::DynamicHeader;
use tables::BlockTables;
use track::Tracker;

/// Largest distance of a back-reference in bytes.
pub const HISTORY: usize = 32 * 1024;

/// Size of the output buffer in bytes, history included. A much larger buffer would not fit the second-level
/// cache. A smaller one would move the history more often.
const BUFFER: usize = 256 * 1024;
const MASK: usize = BUFFER - 1;
/// Bytes behind the buffer that the last 16-byte copy of a match may overwrite.
const SLACK: usize = 32;
/// Longest match in bytes (RFC 1951, 3.2.5).
const MAX_MATCH: usize = 258;
/// Last position at which a round of the symbol loops may begin. Three literals and one match fit behind it.
const STOP: usize = BUFFER - 3 - MAX_MATCH - 1;

/// Why a deflate stream is invalid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeflateError {
    /// A block of type 3.
    #[error("reserved block type")]
    BlockType,
    /// A stored block whose length and complement disagree.
    #[error("stored block with a bad length")]
    StoredLength,
    /// More than 286 literal/length or 30 distance codes.
    #[error("too many codes in a block header")]
    TooManyCodes,
    /// A repeat without a previous code length, or beyond the last code length.
    #[error("bad repeat of a code length")]
    BadRepeat,
    /// A block that has no code for its end.
    #[error("no code for the end of the block")]
    NoEndOfBlock,
    /// Code lengths that need more codes than exist.
    #[error("oversubscribed code")]
    Oversubscribed,
    /// Code lengths that leave bit patterns unused.
    #[error("incomplete code")]
    Incomplete,
    /// A bit pattern or symbol that has no meaning.
    #[error("invalid symbol")]
    InvalidSymbol,
    /// A back-reference that reaches before the start of the stream.
    #[error("back-reference too far")]
    DistanceTooFar,
}

/// Why [`Inflate::decode`] returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// All input is consumed; continue with more input.
    Input,
    /// Take the output before continuing: the buffer is full, [`Progress::Block`] comes next, or the output has reached
    /// the position given to [`Inflate::pause_at`].
    Output,
    /// The next bit begins a block, at or after the output position given to [`Inflate::stop_at_block`]. The next
    /// call decodes the block.
    Block,
    /// The last block is decoded. The input behind it is untouched, except for bytes that [`Inflate::next_byte`]
    /// returns first.
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

/// State of one deflate stream, about 300 KiB.
#[derive(Debug)]
pub struct Inflate {
    phase: Phase,
    last_block: bool,
    bits: u64,
    /// Number of valid bits in `bits`; the other bits are zero.
    count: u32,
    /// Compressed bytes read so far, including those read ahead.
    consumed: u64,
    buf: Box<[u8]>,
    /// Position of the next byte of output.
    pos: usize,
    /// Position of the first byte that the caller has not taken.
    taken: usize,
    /// Position of the first byte that a reference may read, if it is within 32 KiB.
    valid: usize,
    /// Bytes of output so far, taken or not.
    total: u64,
    stop_at: u64,
    pause_at: u64,
    /// Whether [`Progress::Block`] was returned for the block that begins here.
    stopped: bool,
    tables: Box<BlockTables>,
    header: Box<DynamicHeader>,
    tracker: Option<Tracker>,
    window: Option<Vec<u8>>,
}

impl Default for Inflate {
    fn default() -> Self {
        Self::new()
    }
}

impl Inflate {
    /// Makes a decoder at the start of a deflate stream.
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
            pause_at: u64::MAX,
            stopped: false,
            tables: BlockTables::new(),
            header: DynamicHeader::new(),
            tracker: None,
            window: None,
        }
    }

    /// Makes a decoder at a restart. The lowest `skip_bits` (0 to 7) bits of the first input byte belong to the
    /// previous block. `window` is the history: at most 32 KiB, whose last byte is the one right before the restart.
    /// References past the front of `window` read zeros, because a window is kept without the zeros at its front.
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

    /// Starts a new stream with the next byte. References cannot reach the history and output of the previous stream.
    pub fn restart(&mut self) {
        self.align();
        self.phase = Phase::BlockHeader;
        self.last_block = false;
        self.valid = self.pos;
        self.stopped = false;
    }

    /// Asks [`Inflate::decode`] to return [`Progress::Block`] at each block that begins at output position `total` or
    /// later.
    pub fn stop_at_block(&mut self, total: u64) {
        self.stop_at = total;
    }

    /// Asks [`Inflate::decode`] to return [`Progress::Output`] once, right behind the symbol or stored byte with which the
    /// output reaches position `total`.
    pub fn pause_at(&mut self, total: u64) {
        self.pause_at = total;
    }

    /// Returns the number of decoded bits of input.
    pub fn position_bits(&self) -> u64 {
        self.consumed * 8 - u64::from(self.count)
    }

    /// Whether [`Inflate::take_output`] would return bytes.
    pub fn has_output(&self) -> bool {
        self.taken < self.pos
    }

    /// Returns the output since the last call.
    pub fn take_output(&mut self) -> &[u8] {
        let from = std::mem::replace(&mut self.taken, self.pos);
        &self.buf[from..self.pos]
    }

    /// Makes the current position, which is a block boundary, a restart. Records from here on which bytes of the
    /// history before it later references read. Drops an incomplete earlier recording.
    pub fn track(&mut self) {
        self.tracker = (self.valid < self.pos).then(|| Tracker::new(&self.buf, self.valid, self.pos));
    }

    /// Returns the window of the last restart once it is complete: after 32 KiB of output, or at the end of the
    /// stream. Bytes that no reference reads are zero, and zeros at the front are left out. The window is empty if no
    /// byte is read.
    pub fn take_window(&mut self) -> Option<Vec<u8>> {
        self.window.take()
    }

    /// Returns the next whole byte after the end of the stream, from the bits read ahead or from `input`.
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

    /// Decodes until the input or the room for output is used up, or until another [`Progress`] is due.
    pub fn decode(&mut self, input: &mut &[u8]) -> Result<Progress, DeflateError> {
        loop {
            if self
                .tracker
                .as_ref()
                .is_some_and(|tracker| self.pos - tracker.start >= HISTORY)
            {
                self.finish_tracking();
            }
            if self.total >= self.pause_at {
                self.pause_at = u64::MAX;
                if self.has_output() {
                    return Ok(Progress::Output);
                }
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
            // Recording ends 32 KiB after the restart, so the restart lies in the part that stays.
            tracker.start -= by;
        }
    }

    fn finish_tracking(&mut self) {
        if let Some(tracker) = self.tracker.take().filter(|tracker| tracker.start < self.pos) {
            self.window = Some(tracker.finish());
        }
    }

    /// Reads ahead as many bytes as `bits` can hold.
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

    /// Whether the next `bits` bits, at most 56, are available.
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

    // Each of the following functions decodes one phase as far as the input goes. The result says whether the
    // function completed the phase.

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

    fn stored(&mut self, input: &mut &[u8], left: usize) -> bool {
        let before_pause = usize::try_from(self.pause_at - self.total).unwrap_or(usize::MAX);
        let (mut left, later) = (left.min(before_pause), left.saturating_sub(before_pause));
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
        self.phase = Phase::Stored { left: left + later };
        if left + later == 0 {
            self.end_block();
            return true;
        }
        left == 0 || self.pos > STOP
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
    struct BitWriter(Vec<bool>);

    impl BitWriter {
        /// Appends an integer, lowest bit first.
        fn int(mut self, value: u32, width: u32) -> Self {
            self.0.extend((0..width).map(|bit| value >> bit & 1 == 1));
            self
        }

        /// Appends a Huffman code, written as in RFC 1951.
        fn code(mut self, digits: &str) -> Self {
            self.0.extend(digits.bytes().map(|digit| digit == b'1'));
            self
        }

        /// Makes the header of a last block with a dynamic code, up to these code lengths of the precode.
        fn dynamic(litlen: u32, dist: u32, precode: &[u32]) -> Self {
            let counts = Self::default()
                .int(1, 1)
                .int(2, 2)
                .int(litlen - 257, 5)
                .int(dist - 1, 5);
            let counts = counts.int(precode.len() as u32 - 4, 4);
            precode.iter().fold(counts, |bits, &length| bits.int(length, 3))
        }

        /// Makes a last block with the fixed code.
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

    /// Code lengths of a precode in which code `0` is a code length of 1 and code `1` is symbol 18, many zeros.
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

    /// Generates text with near and far repeats, and noise.
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
        let sparse = || BitWriter::dynamic(257, 1, &ONES_AND_ZEROS);
        // Codes of the fixed code. The length is 3; the distances are numbers 0 (1), 1 (2) and 30.
        let [a, length, near, far, never] = ["10010001", "0000001", "00000", "00001", "11110"];
        let cases = [
            (BitWriter::default().int(1, 1).int(3, 2), DeflateError::BlockType),
            (
                BitWriter::default().int(1, 8).int(0x5555_5555, 32),
                DeflateError::StoredLength,
            ),
            (BitWriter::dynamic(287, 1, &[0; 4]), DeflateError::TooManyCodes),
            (BitWriter::dynamic(257, 31, &[0; 4]), DeflateError::TooManyCodes),
            (BitWriter::dynamic(257, 1, &[1, 1, 1, 0]), DeflateError::Oversubscribed),
            (BitWriter::dynamic(257, 1, &[2, 2, 1, 1]), DeflateError::Oversubscribed),
            (BitWriter::dynamic(257, 1, &[2, 2, 2, 0]), DeflateError::Incomplete),
            (BitWriter::dynamic(257, 1, &[0; 4]), DeflateError::Incomplete),
            // Symbol 16, repeat, with nothing to repeat.
            (
                BitWriter::dynamic(257, 1, &[1, 1, 0, 0]).code("0").int(0, 2),
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
            (BitWriter::fixed(&["11000110"]), DeflateError::InvalidSymbol),
            (BitWriter::fixed(&[a, length, never]), DeflateError::InvalidSymbol),
            (BitWriter::fixed(&[a, length, far]), DeflateError::DistanceTooFar),
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
        let good = BitWriter::fixed(&[a, length, near, "0000000"]).bytes();
        assert_eq!(inflate(&mut Inflate::new(), &good, 1), Ok((b"aaaa".into(), true)));
    }

    #[test]
    fn codes_of_one_symbol_are_accepted() {
        // Codes of one bit each for the end of the block and for one distance.
        let header = BitWriter::dynamic(257, 1, &ONES_AND_ZEROS)
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

    /// Stops at each block, then resumes at each block from the window recorded there. The blocks begin at various
    /// bit positions.
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
