//! One interface to the decoders of all three compressions.

use super::gzip::Gzip;
use super::step::Step;
use super::zstd::{Room, Zstd};
use super::{BitPosition, Compression, IndexError};

/// A decoder from some position of a blob to its end.
#[derive(Debug)]
pub(super) enum Codec {
    Tar { offset: u64, start: Option<BitPosition> },
    Gzip(Box<Gzip>),
    Zstd(Zstd),
}

impl Codec {
    /// Makes a decoder that begins at the first byte of a blob.
    pub(super) fn new(compression: Compression, room: Room) -> Result<Self, IndexError> {
        Ok(match compression {
            Compression::Tar => Self::Tar {
                offset: 0,
                start: Some(BitPosition(0)),
            },
            Compression::Gzip => Self::Gzip(Box::new(Gzip::new())),
            Compression::Zstd => Self::Zstd(Zstd::new(0, room)?),
        })
    }

    /// Makes a decoder that begins at a restart. The first input byte is the one that contains `position`.
    pub(super) fn resume(
        compression: Compression,
        position: BitPosition,
        window: &[u8],
        room: Room,
    ) -> Result<Self, IndexError> {
        Ok(match compression {
            Compression::Tar => Self::Tar {
                offset: position.byte(),
                start: None,
            },
            Compression::Gzip => Self::Gzip(Box::new(Gzip::resume(position, window))),
            Compression::Zstd => Self::Zstd(Zstd::new(position.byte(), room)?),
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
            Self::Zstd(zstd) => zstd.step(input),
        }
    }

    /// Asks for [`Step::Restart`] at the first possible place at or after output position `total`.
    pub(super) fn stop_at(&mut self, total: u64) {
        match self {
            Self::Tar { .. } => {}
            Self::Gzip(gzip) => gzip.inflate().stop_at_block(total),
            Self::Zstd(zstd) => zstd.stop_at_frame(total),
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
            Self::Tar { .. } | Self::Zstd(_) => None,
        }
    }

    /// Checks that the blob may end after `size` bytes. Returns the offset of ignored bytes after the content, if
    /// there are any.
    pub(super) fn finish(&self, size: u64) -> Result<Option<u64>, IndexError> {
        match self {
            Self::Tar { .. } => Ok(None),
            Self::Gzip(gzip) => gzip.finish(size),
            Self::Zstd(zstd) => zstd.finish(size).map(|()| None),
        }
    }
}
