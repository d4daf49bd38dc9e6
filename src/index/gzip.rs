//! gzip decoder (RFC 1952): members around deflate streams.
//!
//! ```text
//! Header --> Body --> Trailer --> Between --+-- 1f 8b --> Header
//!                                           +-- 00 -----> Padding --+
//!                                           +-- else ---> Garbage <-+ (non-zero)
//! ```
//!
//! The decoder follows gzip(1). Members follow each other directly. Zeros may follow the last member. The decoder
//! ignores any other bytes after the last member, and reports where they begin.

use crc32fast::Hasher;

use super::inflate::{Inflate, Progress};
use super::step::Step;
use super::{BitPosition, IndexError};

const FHCRC: u8 = 2;
const FEXTRA: u8 = 4;
const FNAME: u8 = 8;
const FCOMMENT: u8 = 16;
/// Flag bits that RFC 1952 reserves. Such flags may announce fields that the decoder could not skip.
const RESERVED: u8 = 0xe0;

/// Decoder of gzip members. Decoding begins at the first member, or at a restart within a member.
#[derive(Debug)]
pub(super) struct Gzip {
    state: GzipState,
    inflate: Inflate,
    /// Offset in the blob of the first byte given to `inflate`.
    base: u64,
    /// CRC-32 of the member's output; `None` if decoding began within the member.
    crc: Option<Hasher>,
    /// Length in bytes of the member's output so far, modulo 2^32.
    length: u32,
    /// Whether at least one member is complete, or decoding began at a restart.
    complete: bool,
}

#[derive(Debug)]
enum GzipState {
    GzipHeader(GzipHeader),
    Body,
    Trailer { bytes: [u8; 8], have: usize },
    Between,
    Padding,
    Garbage { from: u64 },
}

#[derive(Debug)]
struct GzipHeader {
    field: HeaderField,
    flags: u8,
    crc: Hasher,
}

/// The field of a header that contains the next byte.
#[derive(Debug, Clone, Copy)]
enum HeaderField {
    Fixed { at: usize },
    ExtraLength { low: Option<u8> },
    Extra { left: u16 },
    Name,
    Comment,
    Crc { low: Option<u8> },
}

impl GzipHeader {
    fn new() -> Self {
        Self {
            field: HeaderField::Fixed { at: 0 },
            flags: 0,
            crc: Hasher::new(),
        }
    }

    /// Takes the next byte. Returns `true` once the header is complete.
    fn push(&mut self, byte: u8) -> Result<bool, &'static str> {
        let next = match self.field {
            HeaderField::Fixed { at } => {
                match (at, byte) {
                    (0, 0x1f) | (1, 0x8b) | (2, 8) => {}
                    (0 | 1, _) => return Err("no gzip magic"),
                    (2, _) => return Err("compression method is not deflate"),
                    (3, flags) if flags & RESERVED != 0 => return Err("reserved header flags are set"),
                    (3, flags) => self.flags = flags,
                    _ => {}
                }
                if at < 9 {
                    Some(HeaderField::Fixed { at: at + 1 })
                } else {
                    self.after(0)
                }
            }
            HeaderField::ExtraLength { low: None } => Some(HeaderField::ExtraLength { low: Some(byte) }),
            HeaderField::ExtraLength { low: Some(low) } => match u16::from_le_bytes([low, byte]) {
                0 => self.after(FEXTRA),
                left => Some(HeaderField::Extra { left }),
            },
            HeaderField::Extra { left: 1 } => self.after(FEXTRA),
            HeaderField::Extra { left } => Some(HeaderField::Extra { left: left - 1 }),
            HeaderField::Name if byte == 0 => self.after(FNAME),
            HeaderField::Comment if byte == 0 => self.after(FCOMMENT),
            HeaderField::Name | HeaderField::Comment => Some(self.field),
            HeaderField::Crc { low: None } => Some(HeaderField::Crc { low: Some(byte) }),
            HeaderField::Crc { low: Some(low) } => {
                if u16::from_le_bytes([low, byte]) != self.crc.clone().finalize() as u16 {
                    return Err("header checksum mismatch");
                }
                None
            }
        };
        if !matches!(self.field, HeaderField::Crc { .. }) {
            self.crc.update(&[byte]);
        }
        match next {
            Some(field) => self.field = field,
            None => return Ok(true),
        }
        Ok(false)
    }

    /// Returns the first optional field behind the field with the flag `done`; 0 stands for the fixed part.
    fn after(&self, done: u8) -> Option<HeaderField> {
        [
            (FEXTRA, HeaderField::ExtraLength { low: None }),
            (FNAME, HeaderField::Name),
            (FCOMMENT, HeaderField::Comment),
            (FHCRC, HeaderField::Crc { low: None }),
        ]
        .into_iter()
        .skip_while(|&(flag, _)| done != 0 && flag != done)
        .skip(usize::from(done != 0))
        .find(|&(flag, _)| self.flags & flag != 0)
        .map(|(_, field)| field)
    }
}

impl Gzip {
    /// Makes a decoder at the first byte of a blob.
    pub(super) fn new() -> Self {
        Self::at_member(0)
    }

    /// Makes a decoder at the member that begins at blob offset `offset`.
    pub(super) fn at_member(offset: u64) -> Self {
        Self {
            state: GzipState::GzipHeader(GzipHeader::new()),
            inflate: Inflate::new(),
            base: offset,
            crc: None,
            length: 0,
            complete: false,
        }
    }

    /// Makes a decoder at a restart. For `window` see [`Inflate::resume`].
    pub(super) fn resume(position: BitPosition, window: &[u8]) -> Self {
        Self {
            state: GzipState::Body,
            inflate: Inflate::resume(window, position.bit_in_byte()),
            base: position.byte(),
            crc: None,
            length: 0,
            complete: true,
        }
    }

    pub(super) fn inflate(&mut self) -> &mut Inflate {
        &mut self.inflate
    }

    pub(super) fn position(&self) -> BitPosition {
        BitPosition(self.base * 8 + self.inflate.position_bits())
    }

    pub(super) fn step<'a, 'i: 'a>(&'a mut self, input: &mut &'i [u8]) -> Result<Step<'a>, IndexError> {
        loop {
            if matches!(self.state, GzipState::Body) {
                let progress = self.inflate.decode(input).map_err(|source| IndexError::Deflate {
                    offset: self.base + self.inflate.position_bits() / 8,
                    source,
                })?;
                if self.inflate.has_output() {
                    return Ok(self.output());
                }
                match progress {
                    Progress::Input => return Ok(Step::Input),
                    Progress::Block => return Ok(Step::Restart(self.position())),
                    Progress::End => self.state = GzipState::Trailer { bytes: [0; 8], have: 0 },
                    // Decoding continues, because the output was taken.
                    Progress::Output => {}
                }
                continue;
            }
            let Some(byte) = self.inflate.next_byte(input) else {
                return Ok(Step::Input);
            };
            self.wrapper_byte(byte)?;
        }
    }

    fn output(&mut self) -> Step<'_> {
        let position = self.position();
        let bytes = self.inflate.take_output();
        if let Some(crc) = &mut self.crc {
            crc.update(bytes);
            // ISIZE is the length modulo 2^32.
            self.length = self.length.wrapping_add(bytes.len() as u32);
        }
        Step::Output { bytes, position }
    }

    /// Takes a byte outside a deflate stream.
    fn wrapper_byte(&mut self, byte: u8) -> Result<(), IndexError> {
        let offset = self.position().byte() - 1;
        let corrupt = |reason| IndexError::Gzip { offset, reason };
        match &mut self.state {
            GzipState::GzipHeader(header) => match header.push(byte) {
                Ok(false) => {}
                Ok(true) => {
                    self.inflate.restart();
                    self.crc = Some(Hasher::new());
                    self.length = 0;
                    self.state = GzipState::Body;
                }
                Err(_) if self.complete && matches!(header.field, HeaderField::Fixed { at: 1 }) => {
                    self.state = GzipState::Garbage { from: offset - 1 };
                }
                Err(reason) => return Err(corrupt(reason)),
            },
            GzipState::Trailer { bytes, have } => {
                bytes[*have] = byte;
                *have += 1;
                if *have == bytes.len() {
                    let trailer = u64::from_le_bytes(*bytes);
                    if let Some(crc) = self.crc.take()
                        && trailer != u64::from(crc.finalize()) | (u64::from(self.length) << 32)
                    {
                        return Err(corrupt(
                            "checksum or length in the member's trailer do not match its content",
                        ));
                    }
                    self.complete = true;
                    self.state = GzipState::Between;
                }
            }
            GzipState::Between if byte == 0x1f => {
                let mut header = GzipHeader::new();
                header.push(byte).map_err(corrupt)?;
                self.state = GzipState::GzipHeader(header);
            }
            GzipState::Between | GzipState::Padding if byte == 0 => self.state = GzipState::Padding,
            GzipState::Between | GzipState::Padding => self.state = GzipState::Garbage { from: offset },
            GzipState::Garbage { .. } | GzipState::Body => {}
        }
        Ok(())
    }

    /// Checks that the stream may end after `size` bytes. Returns the offset of ignored bytes after the last member,
    /// if there are any.
    pub(super) fn finish(&self, size: u64) -> Result<Option<u64>, IndexError> {
        match &self.state {
            GzipState::Between | GzipState::Padding => Ok(None),
            GzipState::Garbage { from } => Ok(Some(*from)),
            GzipState::GzipHeader(header) if self.complete && matches!(header.field, HeaderField::Fixed { at: 1 }) => {
                Ok(Some(size - 1))
            }
            GzipState::GzipHeader(_) | GzipState::Body | GzipState::Trailer { .. } => {
                Err(IndexError::Truncated { offset: size })
            }
        }
    }
}
