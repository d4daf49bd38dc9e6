//! Decodes a blob from its first byte, one block at a time, and finds where decoding can begin again.

use std::mem;

use super::Room;
use super::context::ZstdContext;
use super::frame::{BLOCK, BLOCK_HEADER, BlockHeader, BlockKind, FRAME_CHECKSUM, FrameHeader, FrameStart};
use super::planner::{DecodedBlock, Planner};
use super::sequences;
use super::worker::PlannerWorker;
use crate::index::step::{SpanRestart, Step};
use crate::index::{BitPosition, IndexError, SpanId};

/// Bytes before a block in its buffer. With the header, they are what the parser wants before the content.
const PAD: usize = sequences::PAD - BLOCK_HEADER;

/// What the next bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PassPhase {
    FrameHeader,
    /// The content of a skippable frame.
    Skip {
        left: u64,
    },
    BlockHeader {
        checksum: bool,
    },
    Block {
        header: BlockHeader,
        checksum: bool,
    },
    Checksum,
    /// Something that only libzstd may understand. It gets single bytes, because what it makes of more of them at once
    /// might depend on their number.
    Unknown,
}

/// A block that libzstd has decoded.
#[derive(Debug)]
struct Ready {
    /// The kind of a block that the parser may know.
    kind: Option<BlockKind>,
    /// Where the block begins in the blob.
    offset: u64,
    made: usize,
    /// Whether decoding could begin here.
    candidate: bool,
    /// What was returned already.
    told: Handed,
}

#[derive(Debug, PartialEq, Eq)]
enum Handed {
    Nothing,
    Candidate,
    Output,
}

/// The first pass over a blob.
#[derive(Debug)]
pub(in crate::index) struct ZstdPass {
    context: ZstdContext,
    worker: PlannerWorker,
    /// Whether the planner follows the frame.
    followed: bool,
    short_of_memory: bool,
    phase: PassPhase,
    /// What the present phase needs at once, as far as it came, behind [`PAD`] bytes.
    piece: Vec<u8>,
    out: Vec<u8>,
    ready: Option<Ready>,
    /// The span that begins with the block in `ready`.
    named: Option<SpanId>,
    /// Offset in the blob of the next byte for libzstd.
    offset: u64,
    total: u64,
    /// Bytes of output before the present frame.
    frame_from: u64,
    /// Whether at least one frame is complete.
    complete: bool,
    spacing: u64,
    stop_at_frame: u64,
    stop_at_block: u64,
    stopped: bool,
}

impl ZstdPass {
    /// Makes a decoder at the first byte of a blob. Candidates are at least `spacing` bytes of tar apart.
    pub(in crate::index) fn new(spacing: u64, room: Room) -> Result<Self, IndexError> {
        Ok(Self {
            context: ZstdContext::new(0, room)?,
            worker: PlannerWorker::new(spacing),
            followed: false,
            short_of_memory: false,
            phase: PassPhase::FrameHeader,
            piece: vec![0; PAD],
            out: vec![0; BLOCK],
            ready: None,
            named: None,
            offset: 0,
            total: 0,
            frame_from: 0,
            complete: false,
            spacing,
            stop_at_frame: u64::MAX,
            stop_at_block: u64::MAX,
            stopped: false,
        })
    }

    /// Asks for [`Step::Restart`] at each frame that begins at output position `total` or later.
    pub(in crate::index) fn stop_at_frame(&mut self, total: u64) {
        self.stop_at_frame = total;
    }

    /// Asks for [`Step::Candidate`] at each block inside a frame that begins at output position `total` or later.
    pub(in crate::index) fn stop_at_block(&mut self, total: u64) {
        self.stop_at_block = total;
    }

    /// Says which span begins with the output just returned.
    pub(in crate::index) fn name(&mut self, span: SpanId) {
        self.named = Some(span);
    }

    /// Returns the restarts inside frames that were chosen since the last call.
    pub(in crate::index) fn take_restarts(&mut self) -> Vec<SpanRestart> {
        self.worker.take()
    }

    pub(in crate::index) fn step<'a, 'i: 'a>(&'a mut self, input: &mut &'i [u8]) -> Result<Step<'a>, IndexError> {
        loop {
            if let Some(ready) = &mut self.ready {
                if ready.candidate && ready.told == Handed::Nothing {
                    ready.told = Handed::Candidate;
                    return Ok(Step::Candidate(BitPosition(ready.offset * 8)));
                }
                if ready.made > 0 && ready.told != Handed::Output {
                    ready.told = Handed::Output;
                    return Ok(Step::Output {
                        bytes: &self.out[..ready.made],
                        position: BitPosition(self.offset * 8),
                    });
                }
                self.hand_over();
            }
            if input.is_empty() && self.wants_input() {
                return Ok(Step::Input);
            }
            match self.phase {
                PassPhase::FrameHeader => {
                    if self.piece.len() == PAD && self.total >= self.stop_at_frame && !self.stopped {
                        self.stopped = true;
                        return Ok(Step::Restart(BitPosition(self.offset * 8)));
                    }
                    self.frame_header(input)?;
                }
                PassPhase::Skip { left } => {
                    let len = usize::try_from(left).unwrap_or(usize::MAX).min(input.len());
                    let (head, rest) = input.split_at(len);
                    *input = rest;
                    self.feed_all(head)?;
                    self.skipped(left - len as u64);
                }
                PassPhase::BlockHeader { checksum } => self.block_header(input, checksum)?,
                PassPhase::Block { header, checksum } => self.block(input, header, checksum)?,
                PassPhase::Checksum => {
                    if self.gather(input, FRAME_CHECKSUM) {
                        self.feed_piece()?;
                        self.end_frame();
                    }
                }
                PassPhase::Unknown => self.unknown(input)?,
            }
        }
    }

    /// Whether the present phase can do nothing without more input. Only a phase whose bytes came already, or that needs
    /// none, can.
    fn wants_input(&self) -> bool {
        match self.phase {
            PassPhase::Block { header, .. } => self.piece.len() < PAD + BLOCK_HEADER + header.content,
            PassPhase::Unknown => self.piece.len() == PAD,
            _ => true,
        }
    }

    /// Moves input to `piece` until it has `len` bytes. Returns whether it has.
    fn gather(&mut self, input: &mut &[u8], len: usize) -> bool {
        let missing = (PAD + len).saturating_sub(self.piece.len());
        let (head, rest) = input.split_at(missing.min(input.len()));
        self.piece.extend_from_slice(head);
        *input = rest;
        self.piece.len() >= PAD + len
    }

    fn frame_header(&mut self, input: &mut &[u8]) -> Result<(), IndexError> {
        match FrameStart::read(&self.piece[PAD..]) {
            FrameStart::Incomplete(len) => {
                self.gather(input, len);
            }
            FrameStart::Unknown => self.phase = PassPhase::Unknown,
            FrameStart::Skippable(len) => {
                self.feed_piece()?;
                self.skipped(u64::from(len));
            }
            FrameStart::Frame(header) => {
                self.feed_piece()?;
                self.frame_from = self.total;
                self.begin_following(header);
                self.ask_for_room()?;
                self.phase = PassPhase::BlockHeader {
                    checksum: header.checksum,
                };
            }
        }
        Ok(())
    }

    fn begin_following(&mut self, header: FrameHeader) {
        let Some(memory) = Planner::memory(&header, self.spacing) else {
            return;
        };
        self.followed = self.worker.begin(header, self.offset);
        self.short_of_memory |= !self.followed;
        if self.followed {
            self.context.use_beside(memory + PlannerWorker::MEMORY);
        }
    }

    /// Asks for room. If there is none for the planner, the frame gets no further restarts.
    fn ask_for_room(&mut self) -> Result<(), IndexError> {
        if !self.context.ask_for_room(self.offset)? {
            self.short_of_memory |= self.followed;
            self.give_up();
        }
        Ok(())
    }

    /// Whether a frame has fewer restarts than there could be, because memory was short.
    pub(in crate::index) fn is_short_of_memory(&self) -> bool {
        self.short_of_memory
    }

    fn give_up(&mut self) {
        if mem::take(&mut self.followed) {
            self.worker.give_up();
        }
    }

    fn skipped(&mut self, left: u64) {
        if left == 0 {
            self.end_frame();
        } else {
            self.phase = PassPhase::Skip { left };
        }
    }

    fn end_frame(&mut self) {
        if mem::take(&mut self.followed) {
            self.worker.end();
        }
        self.context.frame_ended();
        self.phase = PassPhase::FrameHeader;
        self.stopped = false;
        self.complete = true;
    }

    fn block_header(&mut self, input: &mut &[u8], checksum: bool) -> Result<(), IndexError> {
        if !self.gather(input, BLOCK_HEADER) {
            return Ok(());
        }
        let bytes = self.piece[PAD..].first_chunk().copied();
        match bytes.and_then(BlockHeader::read) {
            Some(header) => self.phase = PassPhase::Block { header, checksum },
            None => {
                self.give_up();
                self.phase = PassPhase::Unknown;
            }
        }
        Ok(())
    }

    fn block(&mut self, input: &mut &[u8], header: BlockHeader, checksum: bool) -> Result<(), IndexError> {
        if !self.gather(input, BLOCK_HEADER + header.content) {
            return Ok(());
        }
        let offset = self.offset;
        let mut at = PAD;
        let mut ended = false;
        // libzstd keeps a whole block until there is room for it, and there is.
        let mut made = 0;
        while at < self.piece.len() {
            let decoded = self
                .context
                .decode(&self.piece[at..], &mut self.out[made..], self.offset)?;
            at += decoded.taken;
            self.offset += decoded.taken as u64;
            made += decoded.made;
            ended |= decoded.ended;
        }
        self.ask_for_room()?;
        let inside = self.total > self.frame_from;
        self.ready = Some(Ready {
            kind: Some(header.kind),
            offset,
            made,
            candidate: made > 0 && inside && self.total >= self.stop_at_block,
            told: Handed::Nothing,
        });
        self.total += made as u64;
        self.phase = match (header.last, checksum) {
            (false, _) => PassPhase::BlockHeader { checksum },
            (true, true) => PassPhase::Checksum,
            (true, false) => PassPhase::FrameHeader,
        };
        // libzstd says when a frame ends, and the headers say it too.
        if ended != (self.phase == PassPhase::FrameHeader) {
            return Err(IndexError::Zstd {
                offset,
                reason: "a frame ends where its headers say that it does not",
            });
        }
        Ok(())
    }

    /// Gives the block that was decoded last to the planner, and makes place for the next one.
    fn hand_over(&mut self) {
        let Some(ready) = self.ready.take() else { return };
        let span = self.named.take();
        let Some(kind) = ready.kind else { return };
        if self.followed {
            let (content, mut output, sequences) = match self.worker.buffers() {
                Some(used) => (used.content, used.output, used.sequences),
                None => (Vec::new(), Vec::new(), Vec::new()),
            };
            if output.len() < BLOCK {
                output = vec![0; BLOCK];
            }
            self.worker.block(DecodedBlock {
                kind,
                content: mem::replace(&mut self.piece, content),
                output: mem::replace(&mut self.out, output),
                sequences,
                are_decoded: false,
                made: ready.made,
                candidate: span.filter(|_| ready.candidate).map(|span| (span, ready.offset)),
            });
        }
        self.clear_piece();
        if self.phase == PassPhase::FrameHeader {
            self.end_frame();
        }
    }

    fn clear_piece(&mut self) {
        self.piece.clear();
        self.piece.resize(PAD, 0);
    }

    /// Gives libzstd the bytes in `piece`, which decode to nothing.
    fn feed_piece(&mut self) -> Result<(), IndexError> {
        let piece = mem::take(&mut self.piece);
        let fed = self.feed_all(&piece[PAD..]);
        self.piece = piece;
        self.clear_piece();
        fed
    }

    /// Gives libzstd bytes that decode to nothing.
    fn feed_all(&mut self, mut bytes: &[u8]) -> Result<(), IndexError> {
        while !bytes.is_empty() {
            let decoded = self.context.decode(bytes, &mut self.out, self.offset)?;
            self.offset += decoded.taken as u64;
            bytes = &bytes[decoded.taken..];
        }
        Ok(())
    }

    /// Gives libzstd one byte that may be anything.
    fn unknown(&mut self, input: &mut &[u8]) -> Result<(), IndexError> {
        if self.piece.len() == PAD && !self.gather(input, 1) {
            return Ok(());
        }
        let byte = [self.piece[PAD]];
        let decoded = self.context.decode(&byte, &mut self.out, self.offset)?;
        if decoded.taken > 0 {
            self.piece.remove(PAD);
            self.offset += 1;
        }
        self.ask_for_room()?;
        self.total += decoded.made as u64;
        if decoded.ended {
            self.end_frame();
        }
        if decoded.made > 0 {
            self.ready = Some(Ready {
                kind: None,
                offset: self.offset,
                made: decoded.made,
                candidate: false,
                told: Handed::Nothing,
            });
        }
        Ok(())
    }

    /// Waits until all restarts are chosen. Checks that the stream may end after `size` bytes.
    pub(in crate::index) fn finish(&mut self, size: u64) -> Result<(), IndexError> {
        if self.ready.is_some() {
            self.hand_over();
        }
        self.worker.finish();
        if self.phase == PassPhase::FrameHeader && self.piece.len() == PAD && self.complete {
            Ok(())
        } else {
            Err(IndexError::Truncated { offset: size })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::zstd::room_within;

    /// Decodes a whole blob. Returns whether memory was short.
    fn is_short(blob: &[u8], memory: u64) -> bool {
        let mut pass = ZstdPass::new(64 << 10, room_within(memory)).unwrap();
        let mut input = blob;
        while !matches!(pass.step(&mut input).unwrap(), Step::Input) {}
        pass.finish(blob.len() as u64).unwrap();
        pass.is_short_of_memory()
    }

    /// Digests are checked in place of checksums, by the pass and by later reads alike.
    #[test]
    fn a_wrong_checksum_is_no_error() {
        let mut encoder = zstd::Encoder::new(Vec::new(), 3).unwrap();
        encoder.include_checksum(true).unwrap();
        std::io::Write::write_all(&mut encoder, &[7; 300_000]).unwrap();
        let mut blob = encoder.finish().unwrap();
        *blob.last_mut().unwrap() ^= 1;
        assert!(zstd::decode_all(&blob[..]).is_err());
        assert!(!is_short(&blob, 1 << 30));
        let mut decoder = super::super::Zstd::new(0, room_within(1 << 30)).unwrap();
        let (mut input, mut made) = (&blob[..], 0);
        while let Step::Output { bytes, .. } = decoder.step(&mut input).unwrap() {
            made += bytes.len();
        }
        assert_eq!((made, input.len()), (300_000, 0));
    }

    #[test]
    fn a_pass_says_that_restarts_were_given_up() {
        let mut rng = fastrand::Rng::with_seed(1);
        let tar: Vec<u8> = std::iter::repeat_with(|| rng.u8(b'a'..b'm')).take(6 << 20).collect();
        let blob = zstd::bulk::compress(&tar, 3).unwrap();
        assert!(!is_short(&blob, 1 << 30));
        assert!(is_short(&blob, 9 << 20));
        // A short frame has no restarts inside it.
        let short = zstd::bulk::compress(&tar[..60_000], 3).unwrap();
        assert!(!is_short(&short, 1 << 20));
    }
}
