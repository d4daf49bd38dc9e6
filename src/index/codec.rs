//! One interface to the decoders of all three compressions.

use super::gzip::Gzip;
use super::inflate::HISTORY;
use super::step::{SpanRestart, Step};
use super::zstd::{RestartChain, Room, Zstd, ZstdPass};
use super::{BitPosition, Compression, IndexError, SpanId, malformed};

/// A decoder from some position of a blob to its end.
#[derive(Debug)]
pub(super) enum Codec {
    Tar {
        offset: u64,
        start: Option<BitPosition>,
    },
    Gzip(Box<Gzip>),
    /// From the first byte of a blob.
    ZstdPass(Box<ZstdPass>),
    /// From a restart.
    Zstd(Zstd),
}

impl Codec {
    /// Makes a decoder that begins at the first byte of a blob. Candidates inside zstd frames are at least `spacing`
    /// bytes of tar apart.
    pub(super) fn new(compression: Compression, spacing: u64, room: Room) -> Result<Self, IndexError> {
        Ok(match compression {
            Compression::Tar => Self::Tar {
                offset: 0,
                start: Some(BitPosition(0)),
            },
            Compression::Gzip => Self::Gzip(Box::new(Gzip::new())),
            Compression::Zstd => Self::ZstdPass(Box::new(ZstdPass::new(spacing, room)?)),
        })
    }

    /// Makes a decoder that begins at a restart. The first input byte is the one that contains `position`. `chain` is
    /// empty if the restart needs nothing. Else it is what the index keeps for the restart, and for those before it.
    pub(super) fn resume(
        compression: Compression,
        position: BitPosition,
        chain: &mut RestartChain<'_>,
        room: Room,
    ) -> Result<Self, IndexError> {
        Ok(match compression {
            Compression::Tar => Self::Tar {
                offset: position.byte(),
                start: None,
            },
            Compression::Gzip => {
                let window = match chain.next() {
                    Some((_, window)) => zstd::bulk::decompress(window, HISTORY),
                    None => Ok(Vec::new()),
                };
                let window = window.map_err(|_| malformed("a window does not decompress"))?;
                Self::Gzip(Box::new(Gzip::resume(position, &window)))
            }
            Compression::Zstd => Self::Zstd(Zstd::resume(position.byte(), chain, room)?),
        })
    }

    /// Decodes some input. Returns [`Step::Input`] only after all input is consumed.
    pub(super) fn step<'a, 'i: 'a>(&'a mut self, input: &mut &'i [u8]) -> Result<Step<'a>, IndexError> {
        match self {
            Self::Tar { offset, start } => {
                if input.is_empty() {
                    return Ok(Step::Input);
                }
                if let Some(position) = start.take() {
                    return Ok(Step::Restart(position));
                }
                let bytes = std::mem::take(input);
                *offset += bytes.len() as u64;
                Ok(Step::Output {
                    bytes,
                    position: BitPosition(*offset * 8),
                })
            }
            Self::Gzip(gzip) => gzip.step(input),
            Self::ZstdPass(zstd) => zstd.step(input),
            Self::Zstd(zstd) => zstd.step(input),
        }
    }

    /// Asks for [`Step::Restart`] at the first possible place at or after output position `total`.
    pub(super) fn stop_at(&mut self, total: u64) {
        match self {
            Self::Tar { .. } | Self::Zstd(_) => {}
            Self::Gzip(gzip) => gzip.inflate().stop_at_block(total),
            Self::ZstdPass(zstd) => zstd.stop_at_frame(total),
        }
    }

    /// Says that a span began with the output just returned, where [`Step::Restart`] or [`Step::Candidate`] was.
    pub(super) fn span_began(&mut self, span: SpanId) {
        if let Self::ZstdPass(zstd) = self {
            zstd.name(span);
        }
    }

    /// Asks for [`Step::Candidate`] at the first possible place at or after output position `block`, and for output that
    /// ends as soon as it reaches position `end`.
    pub(super) fn cut_at(&mut self, block: u64, end: u64) {
        match self {
            Self::Tar { .. } | Self::Zstd(_) => {}
            Self::Gzip(gzip) => gzip.inflate().pause_at(end),
            Self::ZstdPass(zstd) => zstd.stop_at_block(block),
        }
    }

    /// Makes the position of the [`Step::Restart`] just returned a restart.
    pub(super) fn track(&mut self) {
        if let Self::Gzip(gzip) = self {
            gzip.inflate().track();
        }
    }

    /// Returns the window of the last restart once it is complete. The window is empty if the restart needs none.
    pub(super) fn take_window(&mut self) -> Option<Vec<u8>> {
        match self {
            Self::Gzip(gzip) => gzip.inflate().take_window(),
            Self::Tar { .. } | Self::ZstdPass(_) | Self::Zstd(_) => None,
        }
    }

    /// Returns the candidates that have become restarts since the last call.
    pub(super) fn take_restarts(&mut self) -> Vec<SpanRestart> {
        match self {
            Self::ZstdPass(zstd) => zstd.take_restarts(),
            Self::Tar { .. } | Self::Gzip(_) | Self::Zstd(_) => Vec::new(),
        }
    }

    /// Whether there are fewer restarts than there could be, because memory was short.
    pub(super) fn is_short_of_memory(&self) -> bool {
        match self {
            Self::ZstdPass(zstd) => zstd.is_short_of_memory(),
            Self::Tar { .. } | Self::Gzip(_) | Self::Zstd(_) => false,
        }
    }

    /// Checks that the blob may end after `size` bytes. Returns the offset of ignored bytes after the content, if
    /// there are any.
    pub(super) fn finish(&mut self, size: u64) -> Result<Option<u64>, IndexError> {
        match self {
            Self::Tar { .. } | Self::Zstd(_) => Ok(None),
            Self::Gzip(gzip) => gzip.finish(size),
            Self::ZstdPass(zstd) => zstd.finish(size).map(|()| None),
        }
    }
}
