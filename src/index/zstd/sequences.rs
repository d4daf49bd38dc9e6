//! The sequences of a compressed block (RFC 8878, 3.1.1.3.2): where its matches come from.

use super::fse::{STATES, State, StateTable};

/// Bytes that have to lie before the bit stream, so that reading past its front stays within the slice.
pub(super) const PAD: usize = 8;

/// Decoding tables of the three fields of a sequence.
#[derive(Debug)]
pub(super) struct SequenceTables {
    pub(super) literals: StateTable,
    pub(super) offset: StateTable,
    pub(super) matches: StateTable,
}

/// Receives the matches of a block.
pub(super) trait Matches {
    /// Takes a match: from `literals` literals behind the previous one on, `len` bytes repeat what lies `offset` before
    /// them. Returns false if the match reaches too far back.
    fn take(&mut self, literals: usize, len: usize, offset: u64) -> bool;
}

/// Reads bits from the end of a slice to its front.
struct BackwardBits<'a> {
    bytes: &'a [u8],
    /// End of the eight bytes in `word`.
    at: usize,
    word: u64,
    /// Number of bits of `word`, from the highest one on, that are taken.
    used: u32,
}

impl<'a> BackwardBits<'a> {
    /// Begins at the highest set bit of the last byte, which marks the end.
    fn new(bytes: &'a [u8]) -> Option<Self> {
        let last = *bytes.last()?;
        let mut bits = Self {
            bytes,
            at: bytes.len(),
            word: 0,
            used: last.leading_zeros() + 1,
        };
        (last != 0).then_some(())?;
        bits.refill()?;
        Some(bits)
    }

    /// Makes at least 57 bits available.
    #[inline(always)]
    fn refill(&mut self) -> Option<()> {
        self.at = self.at.checked_sub((self.used >> 3) as usize)?;
        self.used &= 7;
        let from = self.at.checked_sub(8)?;
        self.word = u64::from_le_bytes(self.bytes.get(from..self.at)?.try_into().ok()?);
        Some(())
    }

    /// Takes up to 31 bits of those available.
    #[inline(always)]
    fn take(&mut self, width: u32) -> u32 {
        let value = ((self.word << (self.used & 63)) >> 1) >> (63 - width);
        self.used += width;
        value as u32
    }

    /// Position of the next bit, from the front of the slice.
    fn position(&self) -> Option<usize> {
        (self.at * 8).checked_sub(self.used as usize)
    }
}

/// Decodes `count` sequences from the bit stream `bytes[start..]`. `start` is at least [`PAD`]. Returns `None` if they
/// are not valid, or if `matches` does not take one. The repeat offsets are then undefined.
pub(super) fn decode(
    bytes: &[u8],
    start: usize,
    count: usize,
    tables: &SequenceTables,
    repeats: &mut [u64; 3],
    matches: &mut impl Matches,
) -> Option<()> {
    if start < PAD || start >= bytes.len() {
        return None;
    }
    let mut bits = BackwardBits::new(bytes)?;
    let entry = |table: &StateTable, state: u32| -> State { table.states[state as usize & (STATES - 1)] };
    let mut literals = entry(&tables.literals, bits.take(tables.literals.log));
    let mut offset = entry(&tables.offset, bits.take(tables.offset.log));
    let mut length = entry(&tables.matches, bits.take(tables.matches.log));
    let mut recent = *repeats;
    for left in (0..count).rev() {
        bits.refill()?;
        let value = u64::from(offset.baseline()) + u64::from(bits.take(offset.extra()));
        if length.extra() + literals.extra() > 25 {
            bits.refill()?;
        }
        let match_len = length.baseline() + bits.take(length.extra());
        let literal_len = literals.baseline() + bits.take(literals.extra());
        let distance = if value > 3 {
            recent = [value - 3, recent[0], recent[1]];
            recent[0]
        } else {
            repeated(&mut recent, value - 1 + u64::from(literal_len == 0))?
        };
        if !matches.take(literal_len as usize, match_len as usize, distance) {
            return None;
        }
        if left > 0 {
            // The three states take at most 26 bits.
            if bits.used > 64 - 26 {
                bits.refill()?;
            }
            literals = entry(&tables.literals, literals.next() + bits.take(literals.bits()));
            length = entry(&tables.matches, length.next() + bits.take(length.bits()));
            offset = entry(&tables.offset, offset.next() + bits.take(offset.bits()));
        }
    }
    *repeats = recent;
    (bits.position()? == start * 8).then_some(())
}

/// Returns the offset that a repeat code means, and moves it to the front (RFC 8878, 3.1.1.5).
#[inline(always)]
fn repeated(recent: &mut [u64; 3], code: u64) -> Option<u64> {
    let [first, second, third] = *recent;
    *recent = match code {
        0 => *recent,
        1 => [second, first, third],
        2 => [third, first, second],
        _ => [first.checked_sub(1).filter(|&offset| offset > 0)?, first, second],
    };
    Some(recent[0])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeats_move_to_the_front() {
        let mut recent = [1, 4, 8];
        assert_eq!(repeated(&mut recent, 0), Some(1));
        assert_eq!(repeated(&mut recent, 2), Some(8));
        assert_eq!(recent, [8, 1, 4]);
        assert_eq!(repeated(&mut recent, 1), Some(1));
        assert_eq!(recent, [1, 8, 4]);
        // One less than the first would be no distance at all.
        assert_eq!(repeated(&mut recent, 3), None);
        recent = [5, 8, 4];
        assert_eq!(repeated(&mut recent, 3), Some(4));
        assert_eq!(recent, [4, 5, 8]);
    }

    #[test]
    fn bits_come_from_the_end() {
        let mut bytes = vec![0xff; PAD];
        bytes.extend([0b1010_0110, 0b0001_1100]);
        let mut bits = BackwardBits::new(&bytes).unwrap();
        assert_eq!([bits.take(2), bits.take(0), bits.take(4)], [0b11, 0, 0b0010]);
        assert_eq!(bits.take(6), 0b10_0110);
        assert_eq!(bits.position(), Some(PAD * 8));
        assert!(BackwardBits::new(&[1; 7]).is_none());
        assert!(BackwardBits::new(&[0; 9]).is_none());
    }
}
