//! The sequences of a compressed block (RFC 8878, 3.1.1.3.2): where its matches come from.

use super::frame::BLOCK;
use super::fse::{STATES, State, StateTable};

/// Bytes that have to lie before the bit stream, so that reading past its front stays within the slice.
pub(super) const PAD: usize = 8;

/// Repeat offsets at the start of a frame (RFC 8878, 3.1.1.5).
pub(super) const FIRST_REPEATS: [u64; 3] = [1, 4, 8];

/// Bits that are available at least after a refill.
const REFILLED: u32 = 57;

/// Most sequences of a block: each has a match of three bytes or more (RFC 8878, 3.1.1.3.2.1.1).
const MOST: usize = BLOCK / 3;

/// A sequence. The value of its offset may be a repeat code.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Sequence {
    value: u32,
    matched: u32,
    literals: u32,
}

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
        let from = self.at.checked_sub(8 + (self.used >> 3) as usize)?;
        self.used &= 7;
        self.at = from + 8;
        self.word = u64::from_le_bytes(*self.bytes.get(from..)?.first_chunk()?);
        Some(())
    }

    /// Takes up to 31 bits of those available.
    #[inline(always)]
    fn take(&mut self, width: u32) -> u32 {
        let value = ((self.word << (self.used & 63)) >> 1) >> (63 - width);
        self.used += width;
        value as u32
    }

    /// Reads a sequence of which these are the states: of the literals, the offset and the match. 57 bits are available.
    fn sequence(&mut self, [literals, offset, length]: [State; 3]) -> Option<Sequence> {
        let value = offset.baseline().wrapping_add(self.take(offset.extra()));
        self.refill()?;
        Some(Sequence {
            value,
            matched: length.baseline() + self.take(length.extra()),
            literals: literals.baseline() + self.take(literals.extra()),
        })
    }

    /// Position of the next bit, from the front of the slice.
    fn position(&self) -> Option<usize> {
        (self.at * 8).checked_sub(self.used as usize)
    }
}

/// Decodes `count` sequences from the bit stream `bytes[start..]` into `out`, in place of what was there. `start` is at
/// least [`PAD`]. Returns `None` if they are not valid.
pub(super) fn decode(
    bytes: &[u8],
    start: usize,
    count: usize,
    tables: &SequenceTables,
    out: &mut Vec<Sequence>,
) -> Option<()> {
    if start < PAD || start >= bytes.len() || count > MOST {
        return None;
    }
    let mut bits = BackwardBits::new(bytes)?;
    let entry = |table: &StateTable, state: u32| -> State { table.states[state as usize & (STATES - 1)] };
    let mut literals = entry(&tables.literals, bits.take(tables.literals.log));
    let mut offset = entry(&tables.offset, bits.take(tables.offset.log));
    let mut length = entry(&tables.matches, bits.take(tables.matches.log));
    out.resize(count, Sequence::default());
    let (last, most) = out.split_last_mut()?;
    for sequence in most {
        bits.refill()?;
        let all = State::bits_of([literals, offset, length]);
        if all > REFILLED {
            *sequence = bits.sequence([literals, offset, length])?;
            bits.refill()?;
            literals = entry(&tables.literals, literals.next() + bits.take(literals.bits()));
            length = entry(&tables.matches, length.next() + bits.take(length.bits()));
            offset = entry(&tables.offset, offset.next() + bits.take(offset.bits()));
            continue;
        }
        // All bits are there, so one word has them, and they are counted together.
        let mut word = bits.word << (bits.used & 63);
        *sequence = Sequence {
            value: offset.baseline().wrapping_add(shift_out(&mut word, offset.extra())),
            matched: length.baseline(),
            literals: literals.baseline(),
        };
        // Few lengths have extra bits, so this branch is mostly predicted.
        if length.extra() + literals.extra() > 0 {
            sequence.matched += shift_out(&mut word, length.extra());
            sequence.literals += shift_out(&mut word, literals.extra());
        }
        literals = entry(
            &tables.literals,
            literals.next() + shift_out(&mut word, literals.bits()),
        );
        length = entry(&tables.matches, length.next() + shift_out(&mut word, length.bits()));
        offset = entry(&tables.offset, offset.next() + shift_out(&mut word, offset.bits()));
        bits.used += all;
    }
    bits.refill()?;
    *last = bits.sequence([literals, offset, length])?;
    (bits.position()? == start * 8).then_some(())
}

/// Takes up to 31 bits from the high end of a word.
#[inline(always)]
fn shift_out(word: &mut u64, width: u32) -> u32 {
    let value = (*word >> 1) >> (63 - width);
    *word <<= width & 63;
    value as u32
}

/// Gives the matches of sequences to `matches`. Returns `None` if an offset is not valid, or if `matches` does not take a
/// match. The repeat offsets are then undefined.
pub(super) fn follow(sequences: &[Sequence], repeats: &mut [u64; 3], matches: &mut impl Matches) -> Option<()> {
    let mut recent = *repeats;
    for sequence in sequences {
        recent = next_repeats(recent, u64::from(sequence.value), sequence.literals == 0);
        if recent[0] == 0 || !matches.take(sequence.literals as usize, sequence.matched as usize, recent[0]) {
            return None;
        }
    }
    *repeats = recent;
    Some(())
}

/// Returns the repeat offsets behind a match (RFC 8878, 3.1.1.5). The first of them is the offset of the match; 0 is not
/// valid. Values up to 3 are repeat codes.
#[inline(always)]
fn next_repeats([first, second, third]: [u64; 3], value: u64, no_literals: bool) -> [u64; 3] {
    if value > 3 {
        return [value - 3, first, second];
    }
    match value - 1 + u64::from(no_literals) {
        0 => [first, second, third],
        1 => [second, first, third],
        2 => [third, first, second],
        _ => [first - 1, first, second],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeats_move_to_the_front() {
        let mut recent = [1, 4, 8];
        for (value, no_literals, behind) in [
            (1, false, [1, 4, 8]),
            (3, false, [8, 1, 4]),
            (2, false, [1, 8, 4]),
            (1, true, [8, 1, 4]),
            (2, true, [4, 8, 1]),
            (3, true, [3, 4, 8]),
            (10, true, [7, 3, 4]),
        ] {
            recent = next_repeats(recent, value, no_literals);
            assert_eq!(recent, behind);
        }
        // One less than the first is no distance at all.
        assert_eq!(next_repeats([1, 8, 4], 3, true)[0], 0);
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
