//! The header of a dynamic block: the code lengths, which are themselves compressed (RFC 1951, 3.2.7).

use super::tables::Precode;
use super::{DeflateError, Inflate, Phase};

/// Order of the code lengths of the precode (RFC 1951, 3.2.7).
const PRECODE_ORDER: [u8; 19] = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15];

/// The header of a dynamic block that is being read.
#[derive(Debug)]
pub(super) struct DynamicHeader {
    litlen: usize,
    dist: usize,
    precodes: usize,
    lengths: [u8; 320],
    precode: Precode,
}

impl DynamicHeader {
    pub(super) fn new() -> Box<Self> {
        Box::new(Self {
            litlen: 0,
            dist: 0,
            precodes: 0,
            lengths: [0; 320],
            precode: Precode::new(),
        })
    }
}

// Each function reads one part of the header as far as the input goes. The result says whether the function completed
// the part.
impl Inflate {
    pub(super) fn counts(&mut self, input: &mut &[u8]) -> Result<bool, DeflateError> {
        if !self.need(input, 14) {
            return Ok(false);
        }
        self.header.litlen = self.take_bits(5) as usize + 257;
        self.header.dist = self.take_bits(5) as usize + 1;
        self.header.precodes = self.take_bits(4) as usize + 4;
        if self.header.litlen > 286 || self.header.dist > 30 {
            return Err(DeflateError::TooManyCodes);
        }
        // The first 19 places hold the code lengths of the precode until the precode's table is built.
        self.header.lengths.fill(0);
        self.phase = Phase::PrecodeLengths { have: 0 };
        Ok(true)
    }

    pub(super) fn precode_lengths(&mut self, input: &mut &[u8], mut have: usize) -> Result<bool, DeflateError> {
        while have < self.header.precodes {
            if !self.need(input, 3) {
                self.phase = Phase::PrecodeLengths { have };
                return Ok(false);
            }
            let length = self.take_bits(3) as u8;
            self.header.lengths[usize::from(PRECODE_ORDER[have])] = length;
            have += 1;
        }
        let DynamicHeader { lengths, precode, .. } = &mut *self.header;
        precode.load(lengths.first_chunk().expect("19 of 320 lengths"))?;
        self.phase = Phase::Lengths { have: 0 };
        Ok(true)
    }

    pub(super) fn lengths(&mut self, input: &mut &[u8], mut have: usize) -> Result<bool, DeflateError> {
        let end = self.header.litlen + self.header.dist;
        while have < end {
            if self.count < 14 {
                self.top_up(input);
            }
            let (symbol, bits) = self.header.precode.lookup(self.bits);
            let (extra, least) = match symbol {
                0..=15 => (0, 1),
                16 => (2, 3),
                17 => (3, 3),
                _ => (7, 11),
            };
            if self.count < bits + extra {
                self.phase = Phase::Lengths { have };
                return Ok(false);
            }
            self.drop_bits(bits);
            let times = least + self.take_bits(extra) as usize;
            let length = match symbol {
                0..=15 => symbol as u8,
                16 if have == 0 => return Err(DeflateError::BadRepeat),
                16 => self.header.lengths[have - 1],
                _ => 0,
            };
            if times > end - have {
                return Err(DeflateError::BadRepeat);
            }
            self.header.lengths[have..have + times].fill(length);
            have += times;
        }
        let (litlen, dist) = self.header.lengths[..end].split_at(self.header.litlen);
        if litlen[256] == 0 {
            return Err(DeflateError::NoEndOfBlock);
        }
        self.tables.load(litlen, dist)?;
        self.phase = Phase::Symbols;
        Ok(true)
    }
}
