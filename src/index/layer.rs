//! The first pass: decodes a whole blob into tar bytes, and finds where spans begin.

use super::codec::Codec;
use super::step::Step;
use super::zstd::{Room, room_within};
use super::{BitPosition, Compression, IndexError, MAX_SPAN, SpanId};
use crate::memory::TABLES;

/// Smallest distance of restarts in bytes of tar. References reach 32 KiB back, so with this distance at most one
/// window is being recorded at any time.
const MIN_SPACING: u64 = 64 * 1024;

/// Where a span begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpanStart {
    /// The span; ids count up from 0.
    pub span: SpanId,
    /// Offset of its first byte in the tar.
    pub tar_offset: u64,
    /// Position in the blob. At a restart: where its first block or frame begins. Elsewhere: the end of the bytes
    /// needed to decode everything before the span, or of the zstd block with the last of these bytes.
    pub position: BitPosition,
    /// Whether decoding can begin here. If not, [`DecodeSink::window`] may still make the span a restart.
    pub restart: bool,
}

/// Receives what [`LayerDecoder::push`] finds, in tar order.
///
/// All arguments are plain values. A sink can record the events and replay them on another thread.
pub trait DecodeSink {
    /// Begins a span: the following bytes belong to it.
    fn span(&mut self, start: SpanStart);
    /// Takes the next bytes of the tar; never empty.
    fn bytes(&mut self, bytes: &[u8]);
    /// Takes what decoding from this span needs. The event comes some time after the span began, and for no span twice.
    ///
    /// For gzip it is the history: at most 32 KiB, ending right before the span. A restart without the event needs no
    /// history. For zstd it is the state of a frame as the index keeps it, and makes the span a restart.
    fn window(&mut self, span: SpanId, window: Vec<u8>);
    /// Notes that there are fewer restarts than there could be, because memory was short. So another pass may find other
    /// restarts.
    fn short_of_memory(&mut self) {}
}

/// What the first pass found out about a whole blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerEnd {
    /// Size of the blob in bytes.
    pub blob_size: u64,
    /// Size of the tar in bytes.
    pub tar_size: u64,
    /// Offset of bytes that follow the last gzip member and are not zeros. The decoder ignores these bytes. gzip(1)
    /// ignores such bytes too, with a warning; other engines refuse such a layer.
    pub trailing_garbage: Option<u64>,
}

/// Decodes a layer from its first byte to its last and cuts it into spans.
///
/// A span begins at a restart where possible. The restart is the first gzip block or zstd frame that is at least
/// `spacing` bytes of tar behind the previous restart. If there is none before the span becomes too long, the next
/// span begins in the middle of a block or frame. To decode such a span, a reader has to begin at the nearest earlier
/// restart. In an uncompressed layer each span is a restart.
///
/// Inside a zstd frame a span begins at the first block that is at least half of `spacing` behind the start of the
/// previous span. Later some of these spans become restarts. With more spans there are more places to choose from.
///
/// What the sink receives depends on the blob alone, and not on the pieces in which it arrives. Only the time of
/// [`DecodeSink::window`] may differ.
#[derive(Debug)]
pub struct LayerDecoder {
    codec: Codec,
    cutter: Cutter,
    spacing: u64,
    /// Smallest distance of spans inside a zstd frame.
    block_spacing: u64,
    blob_size: u64,
    /// A place right behind all output so far, where a span begins with the next byte of output.
    next: Option<NextSpan>,
    /// The span whose window is being recorded.
    tracked: SpanId,
}

/// Where the next span begins.
#[derive(Debug, Clone, Copy)]
struct NextSpan {
    position: BitPosition,
    restart: bool,
}

/// Cuts the output into spans.
#[derive(Debug)]
struct Cutter {
    max_span: u64,
    every_span_restarts: bool,
    /// Tar bytes given to the sink so far.
    out: u64,
    span_start: u64,
    /// Tar offset of the last restart.
    restart_at: u64,
    /// End of the bytes of the blob that made the output so far.
    position: BitPosition,
    next: u32,
}

impl Cutter {
    /// Gives `bytes`, which the blob up to `position` decodes to, to the sink. Begins a span before them if `next` says
    /// so, and wherever the current span becomes too long. Returns the span that began at `next`.
    fn cut(
        &mut self,
        next: Option<NextSpan>,
        mut bytes: &[u8],
        position: BitPosition,
        sink: &mut dyn DecodeSink,
    ) -> Result<Option<SpanId>, IndexError> {
        let mut began = None;
        if let Some(NextSpan { position, restart }) = next {
            if restart {
                self.restart_at = self.out;
            }
            began = Some(self.start(position, restart, sink)?);
        }
        while !bytes.is_empty() {
            if self.out - self.span_start >= self.max_span {
                if self.every_span_restarts {
                    self.start(BitPosition(self.out * 8), true, sink)?;
                } else {
                    self.start(self.position, false, sink)?;
                }
            }
            // From the first byte on, all of `position` is needed.
            self.position = position;
            let room = usize::try_from(self.max_span - (self.out - self.span_start)).unwrap_or(usize::MAX);
            let (head, tail) = bytes.split_at(bytes.len().min(room));
            sink.bytes(head);
            self.out += head.len() as u64;
            bytes = tail;
        }
        Ok(began)
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
    /// Makes a decoder of a blob with this compression. Restarts are about `spacing` bytes of tar apart, clamped to
    /// 64 KiB..=1 MiB.
    pub fn new(compression: Compression, spacing: u64) -> Result<Self, IndexError> {
        Self::with_room(compression, spacing, room_within(TABLES))
    }

    /// Makes a decoder like [`LayerDecoder::new`] that asks `room` for the memory of zstd windows.
    pub fn with_room(compression: Compression, spacing: u64, room: Room) -> Result<Self, IndexError> {
        let spacing = spacing.clamp(MIN_SPACING, MAX_SPAN);
        let block_spacing = spacing / 2;
        let mut codec = Codec::new(compression, block_spacing, room)?;
        codec.stop_at(0);
        Ok(Self {
            codec,
            cutter: Cutter {
                // Most deflate blocks end within `MAX_SPAN`, so a gzip span waits that long for a restart. A zstd span
                // waits for the next block.
                max_span: if compression == Compression::Tar {
                    spacing
                } else {
                    MAX_SPAN
                },
                every_span_restarts: compression == Compression::Tar,
                out: 0,
                span_start: 0,
                restart_at: 0,
                position: BitPosition(0),
                next: 0,
            },
            spacing,
            block_spacing,
            blob_size: 0,
            next: None,
            tracked: SpanId(0),
        })
    }

    /// Decodes the next bytes of the blob. The decoder is useless after an error.
    pub fn push(&mut self, mut input: &[u8], sink: &mut dyn DecodeSink) -> Result<(), IndexError> {
        self.blob_size += input.len() as u64;
        loop {
            match self.codec.step(&mut input)? {
                Step::Input => {
                    self.window(sink);
                    return Ok(());
                }
                Step::Restart(position) => {
                    self.next = Some(NextSpan {
                        position,
                        restart: true,
                    });
                    self.codec.track();
                }
                Step::Candidate(position) => {
                    // A frame that begins here is better.
                    self.next.get_or_insert(NextSpan {
                        position,
                        restart: false,
                    });
                }
                Step::Output { bytes, position } => {
                    let next = self.next.take();
                    let began = self.cutter.cut(next, bytes, position, sink)?;
                    let Cutter {
                        span_start,
                        max_span,
                        restart_at,
                        ..
                    } = self.cutter;
                    if let Some(span) = began {
                        self.codec.span_began(span);
                        if next.is_some_and(|next| next.restart) {
                            self.tracked = span;
                            self.codec.stop_at(restart_at + self.spacing);
                        }
                    }
                    self.codec
                        .cut_at(span_start + self.block_spacing, span_start + max_span);
                }
            }
            self.window(sink);
        }
    }

    fn window(&mut self, sink: &mut dyn DecodeSink) {
        if let Some(window) = self.codec.take_window().filter(|window| !window.is_empty()) {
            sink.window(self.tracked, window);
        }
        for (span, restart) in self.codec.take_restarts() {
            sink.window(span, restart);
        }
    }

    /// Checks that the blob is complete.
    pub fn finish(mut self, sink: &mut dyn DecodeSink) -> Result<LayerEnd, IndexError> {
        let trailing_garbage = self.codec.finish(self.blob_size)?;
        self.window(sink);
        if self.codec.is_short_of_memory() {
            sink.short_of_memory();
        }
        Ok(LayerEnd {
            blob_size: self.blob_size,
            tar_size: self.cutter.out,
            trailing_garbage,
        })
    }
}
