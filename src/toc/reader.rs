//! The push parser of tars: the caller feeds bytes, the parser calls back with content.
//!
//! ```text
//!            x X L K                           S with more blocks
//!  Payload <--------- Header ----------------------------------> OldMap --+
//!     |                ^ | |  \                                           |
//!     +----------------+ | |   \ pax sparse 1.0                           |
//!                        | |    +------------> DataMap --+                |
//!      zero block twice, | |                             v                v
//!      or once and no    | +-------------------------> Data or Skip <-----+
//!      header after it   v      regular / unknown        |
//!                      Ended                             +--> Pad --> Header
//! ```
//! The caller may split the bytes anywhere. The parser passes content on as slices of the caller's bytes and never
//! copies it. Besides the tables it keeps the block that it is reading, and the map of a sparse file that it is reading.
//! It keeps extended headers until their entry comes, at most 1 MiB of payload each.

use std::ops::Range;

use super::builder::{Builder, Item};
use super::error::{TocError, describe, shown};
use super::header::{self, TarBlock, TarHeader};
use super::pax::{Pax, PaxProblem};
use super::sparse::{MapParser, SparsePiece};
use super::{BLOCK, Limits, Tables};
use crate::memory::Charge;

mod entry;

/// Makes the table of contents of a tar from its bytes.
///
/// Feed all bytes of the uncompressed layer in order, also the bytes after the end of the archive. Call
/// [`TarReader::finish`] after the last byte.
#[derive(Debug)]
pub struct TarReader {
    builder: Builder,
    state: TarState,
    /// Bytes consumed so far.
    pos: u64,
    block: TarBlock,
    filled: usize,
    pending: Pending,
    /// Name of the entry read last, for messages.
    name: Vec<u8>,
}

/// Extended headers of the entry that comes next.
#[derive(Debug, Default)]
struct Pending {
    /// Offset of the last pax header.
    offset: u64,
    pax: Option<Pax>,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
}

impl Pending {
    fn is_empty(&self) -> bool {
        self.pax.is_none() && self.long_name.is_none() && self.long_link.is_none()
    }
}

#[derive(Debug)]
enum TarState {
    /// Collecting a block that must be a header or zeros.
    TarHeader { after_zeros: bool },
    /// Collecting the payload of an extended header.
    Payload(Payload),
    /// Collecting a continuation block of an old GNU sparse map.
    OldMap(Box<SparseFile>),
    /// Reading a sparse map from the data.
    DataMap(Box<SparseFile>, MapParser),
    /// Delivering content: the extents left to fill, and the bytes of the first one that are done.
    Data { extents: Range<usize>, done: u64, pad: u64 },
    /// Skipping data that belongs to no entry of the table.
    Skip { left: u64, pad: u64 },
    /// Skipping the rest of a block.
    Pad(u64),
    /// After the end of the archive.
    Ended,
    /// After an error. The state never changes again.
    Failed(TocError),
}

#[derive(Debug)]
struct Payload {
    kind: PayloadKind,
    left: u64,
    pad: u64,
    bytes: Vec<u8>,
}

#[derive(Debug, Clone, Copy)]
enum PayloadKind {
    Pax,
    LongName,
    LongLink,
}

/// A sparse file whose map is incomplete.
#[derive(Debug)]
struct SparseFile {
    item: Item,
    /// Logical size in bytes.
    size: u64,
    /// Stored bytes that are not read yet.
    stored: u64,
    map: Vec<SparsePiece>,
}

impl TarReader {
    /// Makes a reader that expects the first byte of a tar.
    pub fn new(limits: Limits) -> Self {
        Self::charged(limits, Charge::default())
    }

    /// Makes a reader that charges its tables to `charge`.
    pub(crate) fn charged(limits: Limits, charge: Charge) -> Self {
        Self {
            builder: Builder::new(limits, charge),
            state: TarState::TarHeader { after_zeros: false },
            pos: 0,
            block: [0; BLOCK],
            filled: 0,
            pending: Pending::default(),
            name: Vec::new(),
        }
    }

    /// Takes the next bytes, any number of them. Calls `content` with every run of content bytes and its offset in
    /// the data device, in ascending order of these offsets. An error is final: every later call returns it again.
    pub fn push(&mut self, mut bytes: &[u8], content: &mut dyn FnMut(u64, &[u8])) -> Result<(), TocError> {
        while !bytes.is_empty() {
            let used = self
                .step(bytes, content)
                .inspect_err(|error| self.state = TarState::Failed(error.clone()))?;
            bytes = &bytes[used..];
        }
        Ok(())
    }

    /// Returns the tables after the last byte. Missing bytes are an error, except padding and the end marker.
    pub fn finish(mut self) -> Result<Tables, TocError> {
        let within = match self.state {
            TarState::Failed(error) => return Err(error),
            TarState::Ended | TarState::TarHeader { after_zeros: true } => None,
            TarState::Pad(_) if self.pending.is_empty() => None,
            TarState::TarHeader { after_zeros: false } => match &self.block[..self.filled] {
                rest if rest.iter().all(|&b| b == 0) && self.pending.is_empty() => None,
                rest if self.pos == rest.len() as u64 => return Err(TocError::NotTar { seen: describe(rest) }),
                _ => Some(format!("the header after entry {}", shown(&self.name))),
            },
            TarState::Payload(_) | TarState::Pad(_) => Some("an extended header".to_owned()),
            TarState::OldMap(_) | TarState::DataMap(..) | TarState::Data { .. } | TarState::Skip { .. } => {
                Some(format!("the data of entry {}", shown(&self.name)))
            }
        };
        if let Some(within) = within {
            return Err(TocError::Truncated {
                offset: self.pos,
                within,
            });
        }
        if !self.pending.is_empty() {
            self.builder
                .warn(|| "the extended header before the end of the tar describes no entry".to_owned());
        }
        self.builder.finish()
    }

    /// Consumes at least one byte of `bytes`, which is not empty, and no more than belong to the current state.
    /// Returns how many.
    ///
    /// The function takes the state out first, so every arm has to set the next state.
    fn step(&mut self, bytes: &[u8], content: &mut dyn FnMut(u64, &[u8])) -> Result<usize, TocError> {
        let used = match std::mem::replace(&mut self.state, TarState::Ended) {
            TarState::TarHeader { after_zeros } => {
                let (used, block) = self.collect_block(bytes);
                match block {
                    Some(block) => self.header_block(&block, after_zeros)?,
                    None => self.state = TarState::TarHeader { after_zeros },
                }
                return Ok(used);
            }
            TarState::OldMap(sparse) => {
                let (used, block) = self.collect_block(bytes);
                match block {
                    Some(block) => self.continue_old_map(sparse, &block)?,
                    None => self.state = TarState::OldMap(sparse),
                }
                return Ok(used);
            }
            TarState::DataMap(sparse, parser) => return self.read_map(sparse, parser, bytes),
            TarState::Payload(payload) => self.collect_payload(payload, bytes)?,
            TarState::Data { extents, done, pad } => self.deliver(extents, done, pad, bytes, content),
            TarState::Skip { left, pad } => {
                let taken = clip(bytes, left).len();
                self.state = skipping(left - taken as u64, pad);
                taken
            }
            TarState::Pad(left) => {
                let taken = clip(bytes, left).len();
                self.state = padding(left - taken as u64);
                taken
            }
            TarState::Ended => bytes.len(),
            TarState::Failed(error) => return Err(error),
        };
        self.pos += used as u64;
        Ok(used)
    }

    fn deliver(
        &mut self,
        mut extents: Range<usize>,
        mut done: u64,
        pad: u64,
        bytes: &[u8],
        content: &mut dyn FnMut(u64, &[u8]),
    ) -> usize {
        // The range is never empty, because the state ends with the last extent.
        let extent = self.builder.extents()[extents.start];
        let taken = clip(bytes, extent.len - done);
        content(extent.device + done, taken);
        done += taken.len() as u64;
        if done == extent.len {
            extents.start += 1;
            done = 0;
        }
        self.state = if extents.is_empty() {
            padding(pad)
        } else {
            TarState::Data { extents, done, pad }
        };
        taken.len()
    }

    fn collect_payload(&mut self, mut payload: Payload, bytes: &[u8]) -> Result<usize, TocError> {
        let taken = clip(bytes, payload.left);
        payload.bytes.extend_from_slice(taken);
        payload.left -= taken.len() as u64;
        if payload.left == 0 {
            self.end_payload(payload)?;
        } else {
            self.state = TarState::Payload(payload);
        }
        Ok(taken.len())
    }

    /// Adds bytes to the block and returns the block once it is full. Advances the position itself, unlike the other
    /// states, because the data that a header describes begins behind the block.
    fn collect_block(&mut self, bytes: &[u8]) -> (usize, Option<TarBlock>) {
        let taken = clip(bytes, (BLOCK - self.filled) as u64);
        self.block[self.filled..self.filled + taken.len()].copy_from_slice(taken);
        self.filled += taken.len();
        self.pos += taken.len() as u64;
        if self.filled < BLOCK {
            return (taken.len(), None);
        }
        self.filled = 0;
        (taken.len(), Some(self.block))
    }

    /// Handles a whole block where a header must be. The state is `Ended` unless this function sets another one.
    fn header_block(&mut self, block: &TarBlock, after_zeros: bool) -> Result<(), TocError> {
        let offset = self.pos - BLOCK as u64;
        if block.iter().all(|&b| b == 0) {
            if !after_zeros {
                self.state = TarState::TarHeader { after_zeros: true };
            }
            return Ok(());
        }
        if after_zeros {
            self.builder
                .warn(|| format!("a lone zero block before offset {offset} ends the tar; what follows is ignored"));
            return Ok(());
        }
        let Some(header) = TarHeader::new(block) else {
            if offset == 0 {
                return Err(TocError::NotTar { seen: describe(block) });
            }
            return Err(TocError::BadHeader {
                offset,
                after: shown(&self.name),
            });
        };
        match header.type_flag() {
            b'x' | b'X' => self.begin_payload(header, offset, PayloadKind::Pax),
            b'L' => self.begin_payload(header, offset, PayloadKind::LongName),
            b'K' => self.begin_payload(header, offset, PayloadKind::LongLink),
            // A global pax header. git archive writes a comment there, and no engine applies the records.
            b'g' => {
                let size = self.size(&header, offset, None)?;
                self.skip(size);
                Ok(())
            }
            flag => self.entry(header, offset, flag),
        }
    }

    fn begin_payload(&mut self, header: TarHeader<'_>, offset: u64, kind: PayloadKind) -> Result<(), TocError> {
        let size = self.size(&header, offset, None)?;
        let limit = self.builder.limits().payload;
        if size > limit {
            let what = match kind {
                PayloadKind::Pax => "pax header",
                PayloadKind::LongName => "long name",
                PayloadKind::LongLink => "long link target",
            };
            return Err(TocError::HeaderTooLarge {
                what,
                offset,
                size,
                limit,
            });
        }
        self.pending.offset = offset;
        let payload = Payload {
            kind,
            left: size,
            pad: pad(size),
            bytes: Vec::new(),
        };
        if size == 0 {
            return self.end_payload(payload);
        }
        self.state = TarState::Payload(payload);
        Ok(())
    }

    fn end_payload(&mut self, payload: Payload) -> Result<(), TocError> {
        let Payload { kind, pad, bytes, .. } = payload;
        match kind {
            PayloadKind::Pax => {
                let offset = self.pending.offset;
                let pax = Pax::parse(&bytes).map_err(|problem| match problem {
                    PaxProblem::Structure(reason) => TocError::BadPax { offset, reason },
                    PaxProblem::Value { field, value } => TocError::BadField {
                        entry: format!("after {}", shown(&self.name)),
                        offset,
                        field,
                        value: shown(&value),
                    },
                })?;
                self.pending.pax = Some(pax);
            }
            PayloadKind::LongName => self.pending.long_name = Some(header::text(&bytes).to_vec()),
            PayloadKind::LongLink => self.pending.long_link = Some(header::text(&bytes).to_vec()),
        }
        self.state = padding(pad);
        Ok(())
    }

    fn skip(&mut self, size: u64) {
        self.state = skipping(size, pad(size));
    }
}

/// Returns the first `max` bytes of `bytes`.
fn clip(bytes: &[u8], max: u64) -> &[u8] {
    &bytes[..usize::try_from(max).map_or(bytes.len(), |max| max.min(bytes.len()))]
}

/// Returns the number of bytes from the end of `size` bytes to the end of their last block.
fn pad(size: u64) -> u64 {
    let block = BLOCK as u64;
    (block - size % block) % block
}

fn padding(left: u64) -> TarState {
    if left == 0 {
        TarState::TarHeader { after_zeros: false }
    } else {
        TarState::Pad(left)
    }
}

fn skipping(left: u64, pad: u64) -> TarState {
    if left == 0 {
        padding(pad)
    } else {
        TarState::Skip { left, pad }
    }
}
