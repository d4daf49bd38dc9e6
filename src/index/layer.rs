//! The first pass: a whole blob in, tar bytes and the places of its spans out.

use super::codec::Codec;
use super::step::Step;
use super::zstd::{Room, room_within};
use super::{BitPosition, Compression, IndexError, MAX_SPAN, SpanId};
use crate::memory::TABLES;

/// Least distance of restarts: references reach 32 KiB back, so that at most one window is being recorded at any time.
const MIN_SPACING: u64 = 64 * 1024;

/// Where a span begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpanStart {
    /// The span; ids count up from 0.
    pub span: SpanId,
    /// Offset of its first byte in the tar.
    pub tar_offset: u64,
    /// At a restart: where its first block or frame begins in the blob. Elsewhere: the end of the bytes that were needed to
    /// decode everything before the span, and perhaps some after.
    pub position: BitPosition,
    /// Whether decoding can begin here.
    pub restart: bool,
}

/// Receives what [`LayerDecoder::push`] finds, in tar order.
///
/// All arguments are plain values, so that a sink can record the events and replay them on another thread.
pub trait DecodeSink {
    /// The bytes that come next belong to this span.
    fn span(&mut self, start: SpanStart);
    /// The next bytes of the tar; never empty.
    fn bytes(&mut self, bytes: &[u8]);
    /// The history (at most 32 KiB, ending right before the span) that decoding from this span needs. Known only after some
    /// of the span's bytes. A span without this event needs none.
    fn window(&mut self, span: SpanId, window: Vec<u8>);
}

/// What a whole blob turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerEnd {
    /// Compressed bytes.
    pub blob_size: u64,
    /// Uncompressed bytes.
    pub tar_size: u64,
    /// Where bytes begin that follow the last gzip member and are not zeros. They are ignored, as gzip(1) does with a
    /// warning; other engines refuse such a layer.
    pub trailing_garbage: Option<u64>,
}

/// Decodes a layer from its first byte to its last and cuts it into spans.
///
/// A span begins at a restart where possible: at the first block boundary or frame at least `spacing` bytes of tar behind the
/// restart before. Where none comes it begins in the middle of a block or frame; decoding it has to begin at the nearest
/// earlier restart. In an uncompressed layer each span is a restart.
#[derive(Debug)]
pub struct LayerDecoder {
    codec: Codec,
    cutter: Cutter,
    spacing: u64,
    blob_size: u64,
    /// A restart right behind all output so far; it becomes a span with the next byte.
    candidate: Option<BitPosition>,
    /// The span whose window is being recorded.
    tracked: SpanId,
}

/// Cuts the output into spans.
#[derive(Debug)]
struct Cutter {
    max_span: u64,
    every_span_restarts: bool,
    /// Tar bytes given to the sink.
    out: u64,
    span_start: u64,
    /// Tar offset of the last restart.
    restart_at: u64,
    next: u32,
}

impl Cutter {
    /// Gives `bytes` to the sink, with a new span in front if they begin at a restart, and wherever the span gets too long.
    /// Returns the span that began at `restart`.
    fn cut(
        &mut self,
        restart: Option<BitPosition>,
        mut bytes: &[u8],
        position: BitPosition,
        sink: &mut dyn DecodeSink,
    ) -> Result<Option<SpanId>, IndexError> {
        let mut restarted = None;
        if let Some(position) = restart {
            self.restart_at = self.out;
            restarted = Some(self.start(position, true, sink)?);
        }
        while !bytes.is_empty() {
            if self.out - self.span_start >= self.max_span {
                if self.every_span_restarts {
                    self.start(BitPosition(self.out * 8), true, sink)?;
                } else {
                    self.start(position, false, sink)?;
                }
            }
            let room = usize::try_from(self.max_span - (self.out - self.span_start)).unwrap_or(usize::MAX);
            let (head, tail) = bytes.split_at(bytes.len().min(room));
            sink.bytes(head);
            self.out += head.len() as u64;
            bytes = tail;
        }
        Ok(restarted)
    }

    fn start(&mut self, position: BitPosition, restart: bool, sink: &mut dyn DecodeSink) -> Result<SpanId, IndexError> {
        let span = SpanId(self.next);
        self.next = self.next.checked_add(1).ok_or(IndexError::TooManySpans)?;
        self.span_start = self.out;
        sink.span(SpanStart {
            span,
            tar_offset: self.out,
            position,
            restart,
        });
        Ok(span)
    }
}

impl LayerDecoder {
    /// A decoder of a blob with this compression, with restarts about `spacing` bytes of tar apart (clamped to 64 KiB..=1 MiB).
    pub fn new(compression: Compression, spacing: u64) -> Result<Self, IndexError> {
        Self::with_room(compression, spacing, room_within(TABLES))
    }

    /// One that asks for the memory it needs.
    pub fn with_room(compression: Compression, spacing: u64, room: Room) -> Result<Self, IndexError> {
        let spacing = spacing.clamp(MIN_SPACING, MAX_SPAN);
        let mut codec = Codec::new(compression, room)?;
        codec.stop_at(0);
        Ok(Self {
            codec,
            cutter: Cutter {
                // A long deflate block ends sooner or later: wait for that as long as possible. A zstd frame rarely does.
                max_span: if compression == Compression::Gzip {
                    MAX_SPAN
                } else {
                    spacing
                },
                every_span_restarts: compression == Compression::Tar,
                out: 0,
                span_start: 0,
                restart_at: 0,
                next: 0,
            },
            spacing,
            blob_size: 0,
            candidate: None,
            tracked: SpanId(0),
        })
    }

    /// Decodes the next bytes of the blob. After an error the decoder is of no more use.
    pub fn push(&mut self, mut input: &[u8], sink: &mut dyn DecodeSink) -> Result<(), IndexError> {
        self.blob_size += input.len() as u64;
        loop {
            match self.codec.step(&mut input)? {
                Step::Input => {
                    self.window(sink);
                    return Ok(());
                }
                Step::Restart(position) => {
                    self.candidate = Some(position);
                    self.codec.track();
                }
                Step::Output { bytes, position } => {
                    let restart = self.cutter.cut(self.candidate.take(), bytes, position, sink)?;
                    if let Some(span) = restart {
                        self.tracked = span;
                        self.codec.stop_at(self.cutter.restart_at + self.spacing);
                    }
                }
            }
            self.window(sink);
        }
    }

    fn window(&mut self, sink: &mut dyn DecodeSink) {
        if let Some(window) = self.codec.take_window().filter(|window| !window.is_empty()) {
            sink.window(self.tracked, window);
        }
    }

    /// Checks that the blob is complete.
    pub fn finish(mut self, sink: &mut dyn DecodeSink) -> Result<LayerEnd, IndexError> {
        self.window(sink);
        Ok(LayerEnd {
            blob_size: self.blob_size,
            tar_size: self.cutter.out,
            trailing_garbage: self.codec.finish(self.blob_size)?,
        })
    }
}
