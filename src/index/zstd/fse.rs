//! FSE tables of sequences (RFC 8878, 4.1): their descriptions, and the decoding tables made from them.
//!
//! A *description* states how often each symbol occurs, as counts that add up to the size of the table. It is read with
//! [`Distribution::read`]. [`Distribution::describe`] writes it again, which a restart needs for the predefined tables.

/// Largest accuracy of a table of sequences, as a binary logarithm (RFC 8878, 3.1.1.3.2.1).
pub(super) const MAX_LOG: u32 = 9;
const MIN_LOG: u32 = 5;
/// Most symbols of a table of sequences: the codes of match lengths.
const MOST_SYMBOLS: usize = 53;

/// One of the three fields of a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Field {
    Literals,
    Offset,
    Match,
}

/// Baselines and extra bits of literal lengths (RFC 8878, 3.1.1.3.2.1.1).
const LITERALS: [(u32, u8); 36] = [
    (0, 0),
    (1, 0),
    (2, 0),
    (3, 0),
    (4, 0),
    (5, 0),
    (6, 0),
    (7, 0),
    (8, 0),
    (9, 0),
    (10, 0),
    (11, 0),
    (12, 0),
    (13, 0),
    (14, 0),
    (15, 0),
    (16, 1),
    (18, 1),
    (20, 1),
    (22, 1),
    (24, 2),
    (28, 2),
    (32, 3),
    (40, 3),
    (48, 4),
    (64, 6),
    (128, 7),
    (256, 8),
    (512, 9),
    (1024, 10),
    (2048, 11),
    (4096, 12),
    (8192, 13),
    (16384, 14),
    (32768, 15),
    (65536, 16),
];

/// Baselines and extra bits of those match lengths whose code is not simply the length less three.
const MATCHES: [(u32, u8); 21] = [
    (35, 1),
    (37, 1),
    (39, 1),
    (41, 1),
    (43, 2),
    (47, 2),
    (51, 3),
    (59, 3),
    (67, 4),
    (83, 4),
    (99, 5),
    (131, 7),
    (259, 8),
    (515, 9),
    (1027, 10),
    (2051, 11),
    (4099, 12),
    (8195, 13),
    (16387, 14),
    (32771, 15),
    (65539, 16),
];

impl Field {
    /// Returns the largest code.
    fn max_symbol(self) -> usize {
        match self {
            Self::Literals => 35,
            Self::Offset => 31,
            Self::Match => 52,
        }
    }

    fn max_log(self) -> u32 {
        match self {
            Self::Literals | Self::Match => MAX_LOG,
            Self::Offset => 8,
        }
    }

    /// Returns the baseline and the number of extra bits of a code; `None` if there is no such code.
    fn code(self, symbol: u8) -> Option<(u32, u8)> {
        let symbol_index = usize::from(symbol);
        match self {
            Self::Literals => LITERALS.get(symbol_index).copied(),
            Self::Offset => (symbol <= 31).then(|| (1 << symbol, symbol)),
            Self::Match if symbol < 32 => Some((u32::from(symbol) + 3, 0)),
            Self::Match => MATCHES.get(symbol_index - 32).copied(),
        }
    }

    /// Returns the distribution that both sides know without a description (RFC 8878, 3.1.1.3.2.2).
    pub(super) fn predefined(self) -> Distribution {
        let (log, counts): (u32, &[i16]) = match self {
            Self::Literals => (
                6,
                &[
                    4, 3, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 3, 2, 1, 1, 1, 1, 1, -1,
                    -1, -1, -1,
                ],
            ),
            Self::Offset => (
                5,
                &[
                    1, 1, 1, 1, 1, 1, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1,
                ],
            ),
            Self::Match => (
                6,
                &[
                    1, 4, 3, 2, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
                    1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1,
                ],
            ),
        };
        let mut distribution = Distribution {
            log,
            counts: [0; MOST_SYMBOLS],
            len: counts.len(),
        };
        distribution.counts[..counts.len()].copy_from_slice(counts);
        distribution
    }
}

/// How often each symbol occurs, of `1 << log`. A count of -1 stands for a symbol rarer than one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Distribution {
    log: u32,
    counts: [i16; MOST_SYMBOLS],
    len: usize,
}

impl Distribution {
    /// Reads a description from the front of `bytes`. Returns the distribution and the length of the description.
    pub(super) fn read(field: Field, bytes: &[u8]) -> Option<(Self, usize)> {
        let mut bits = ForwardBits { bytes, at: 0 };
        let log = bits.take(4)? + MIN_LOG;
        if log > field.max_log() {
            return None;
        }
        let mut distribution = Self {
            log,
            counts: [0; MOST_SYMBOLS],
            len: 0,
        };
        // What is left to distribute, plus one.
        let mut left: u32 = (1 << log) + 1;
        let put = |distribution: &mut Self, count: i16| {
            if distribution.len > field.max_symbol() {
                return None;
            }
            distribution.counts[distribution.len] = count;
            distribution.len += 1;
            Some(())
        };
        while left > 1 {
            let value = bits.take_up_to(left)?;
            let count = value as i16 - 1;
            put(&mut distribution, count)?;
            left = left
                .checked_sub(u32::from(count.unsigned_abs()))
                .filter(|&left| left >= 1)?;
            if count == 0 {
                loop {
                    let zeros = bits.take(2)?;
                    for _ in 0..zeros {
                        put(&mut distribution, 0)?;
                    }
                    if zeros != 3 {
                        break;
                    }
                }
            }
        }
        Some((distribution, bits.at.div_ceil(8)))
    }

    /// Writes the description.
    pub(super) fn describe(&self) -> Vec<u8> {
        let mut out = BitsOut::default();
        out.put(self.log - MIN_LOG, 4);
        let mut left: u32 = (1 << self.log) + 1;
        let mut symbol = 0;
        while left > 1 && symbol < self.len {
            let count = self.counts[symbol];
            out.put_up_to((count + 1) as u32, left);
            left = left.saturating_sub(u32::from(count.unsigned_abs()));
            symbol += 1;
            if count == 0 {
                let mut zeros = self.counts[symbol..self.len]
                    .iter()
                    .take_while(|&&count| count == 0)
                    .count();
                symbol += zeros;
                while zeros >= 3 {
                    out.put(3, 2);
                    zeros -= 3;
                }
                out.put(zeros as u32, 2);
            }
        }
        out.bytes
    }
}

/// Number of bits of a count when `left` is left to distribute. Counts below the second number take a bit less.
fn width_of_count(left: u32) -> (u32, u32) {
    // The possible values are 0..=left.
    let width = u32::BITS - left.leading_zeros();
    (width, (1 << width) - 1 - left)
}

/// Reads bits from low to high.
struct ForwardBits<'a> {
    bytes: &'a [u8],
    /// Position of the next bit.
    at: usize,
}

impl ForwardBits<'_> {
    /// Returns the next bits without taking them. Bits behind the end are zero.
    fn peek(&self, width: u32) -> u32 {
        let byte = |n: usize| u32::from(self.bytes.get(self.at / 8 + n).copied().unwrap_or(0));
        let word = byte(0) | byte(1) << 8 | byte(2) << 16;
        (word >> (self.at % 8)) & ((1 << width) - 1)
    }

    fn skip(&mut self, width: u32) -> Option<()> {
        self.at += width as usize;
        (self.at <= self.bytes.len() * 8).then_some(())
    }

    /// Takes up to 16 bits.
    fn take(&mut self, width: u32) -> Option<u32> {
        let value = self.peek(width);
        self.skip(width)?;
        Some(value)
    }

    /// Takes a value of 0..=`left` (RFC 8878, 4.1.1).
    fn take_up_to(&mut self, left: u32) -> Option<u32> {
        let (width, short) = width_of_count(left);
        let value = self.peek(width);
        let half = 1 << (width - 1);
        if value & (half - 1) < short {
            self.skip(width - 1)?;
            return Some(value & (half - 1));
        }
        self.skip(width)?;
        Some(if value >= half { value - short } else { value })
    }
}

/// Writes bits from low to high.
#[derive(Default)]
struct BitsOut {
    bytes: Vec<u8>,
    /// Number of bits written.
    at: usize,
}

impl BitsOut {
    fn put(&mut self, value: u32, width: u32) {
        for bit in 0..width {
            if self.at.is_multiple_of(8) {
                self.bytes.push(0);
            }
            let last = self.bytes.len() - 1;
            self.bytes[last] |= (((value >> bit) & 1) as u8) << (self.at % 8);
            self.at += 1;
        }
    }

    fn put_up_to(&mut self, value: u32, left: u32) {
        let (width, short) = width_of_count(left);
        let half = 1 << (width - 1);
        if value < short {
            self.put(value, width - 1);
        } else if value < half {
            self.put(value, width);
        } else {
            self.put(value + short, width);
        }
    }
}

/// What a state of a decoding table stands for, packed into a word so that a look-up is one load.
///
/// ```text
/// bits   0..16   first state of the next group
///       16..24   number of bits that choose the state within that group
///       24..32   number of extra bits of the value
///       32..64   baseline of the value
/// ```
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct State(u64);

impl State {
    fn new(next: u32, bits: u32, (baseline, extra): (u32, u8)) -> Self {
        Self(u64::from(next) | u64::from(bits) << 16 | u64::from(extra) << 24 | u64::from(baseline) << 32)
    }

    #[inline(always)]
    pub(super) fn next(self) -> u32 {
        self.0 as u16 as u32
    }

    #[inline(always)]
    pub(super) fn bits(self) -> u32 {
        (self.0 >> 16) as u8 as u32
    }

    #[inline(always)]
    pub(super) fn extra(self) -> u32 {
        (self.0 >> 24) as u8 as u32
    }

    /// Returns how many bits the values of these states, and the choice of the next states, take in all.
    #[inline(always)]
    pub(super) fn bits_of(states: [Self; 3]) -> u32 {
        // No sum overflows into the next field: the first are below 2^10, and the others below 2^6.
        let [first, second, third] = states.map(|state| state.0 & 0xffff_ffff);
        let sum = first + second + third;
        (sum >> 16) as u8 as u32 + (sum >> 24) as u8 as u32
    }

    #[inline(always)]
    pub(super) fn baseline(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

/// Number of states of the largest table.
pub(super) const STATES: usize = 1 << MAX_LOG;

/// A decoding table.
#[derive(Debug, Clone)]
pub(super) struct StateTable {
    pub(super) log: u32,
    pub(super) states: Box<[State; STATES]>,
}

impl StateTable {
    pub(super) fn new() -> Self {
        Self {
            log: 0,
            states: Box::new([State::default(); STATES]),
        }
    }

    /// Makes a table of one symbol, which takes no bits.
    pub(super) fn repeat(&mut self, field: Field, symbol: u8) -> Option<()> {
        self.log = 0;
        self.states[0] = State::new(0, 0, field.code(symbol)?);
        Some(())
    }

    /// Makes the table of a distribution (RFC 8878, 4.1.1).
    pub(super) fn load(&mut self, field: Field, distribution: &Distribution) -> Option<()> {
        let log = distribution.log;
        let size = 1usize << log;
        let counts = &distribution.counts[..distribution.len];
        let mut symbols = [0u8; STATES];
        let mut next = [0u32; MOST_SYMBOLS];
        // Rare symbols take the last states.
        let mut free = size;
        for (symbol, &count) in counts.iter().enumerate() {
            next[symbol] = u32::from(count.unsigned_abs());
            if count == -1 {
                free = free.checked_sub(1)?;
                symbols[free] = symbol as u8;
            }
        }
        let step = (size >> 1) + (size >> 3) + 3;
        let mut at = 0;
        for (symbol, &count) in counts.iter().enumerate() {
            for _ in 0..count.max(0) {
                symbols[at] = symbol as u8;
                loop {
                    at = (at + step) & (size - 1);
                    if at < free || free == 0 {
                        break;
                    }
                }
            }
        }
        if at != 0 {
            return None;
        }
        for (state, &symbol) in self.states.iter_mut().zip(&symbols[..size]) {
            let number = &mut next[usize::from(symbol)];
            let bits = log - number.checked_ilog2()?;
            *state = State::new((*number << bits) - size as u32, bits, field.code(symbol)?);
            *number += 1;
        }
        self.log = log;
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIELDS: [Field; 3] = [Field::Literals, Field::Offset, Field::Match];

    #[test]
    fn a_description_is_read_as_it_was_written() {
        for field in FIELDS {
            let predefined = field.predefined();
            let mut bytes = predefined.describe();
            let len = bytes.len();
            bytes.extend([0xff; 3]);
            let (read, used) = Distribution::read(field, &bytes).unwrap();
            assert_eq!((&read, used), (&predefined, len));
            for cut in 0..len {
                assert_eq!(Distribution::read(field, &bytes[..cut]), None, "{cut}");
            }
            assert!(StateTable::new().load(field, &read).is_some());
        }
    }

    /// Distributions with runs of zeros, one symbol only, and the largest size.
    #[test]
    fn all_kinds_of_distributions_are_read_as_they_were_written() {
        for (field, log, counts) in [
            (Field::Offset, 5, vec![32]),
            (Field::Offset, 5, vec![0, 0, 0, 0, 0, 0, 31, 0, -1]),
            (Field::Match, 9, vec![500, 0, 10, 0, 0, 0, -1, 0, 0, 0, 0, 1]),
            (Field::Literals, 6, vec![0, 64]),
        ] {
            let mut distribution = Distribution {
                log,
                counts: [0; MOST_SYMBOLS],
                len: counts.len(),
            };
            distribution.counts[..counts.len()].copy_from_slice(&counts);
            let bytes = distribution.describe();
            let (read, used) = Distribution::read(field, &bytes).unwrap();
            assert_eq!((&read, used), (&distribution, bytes.len()));
            assert!(StateTable::new().load(field, &read).is_some());
        }
    }

    /// The first and the last states of the predefined tables in RFC 8878, appendix A.
    #[test]
    fn predefined_tables_are_those_of_the_specification() {
        let table = |field: Field| {
            let mut table = StateTable::new();
            table.load(field, &field.predefined()).unwrap();
            table
        };
        let row = |table: &StateTable, at: usize| {
            let state = table.states[at];
            (state.baseline(), state.extra(), state.bits(), state.next())
        };
        let literals = table(Field::Literals);
        assert_eq!(row(&literals, 0), (0, 0, 4, 0));
        assert_eq!(row(&literals, 1), (0, 0, 4, 16));
        assert_eq!(row(&literals, 2), (1, 0, 5, 32));
        assert_eq!(row(&literals, 63), (8192, 13, 6, 0));
        let matches = table(Field::Match);
        assert_eq!(row(&matches, 0), (3, 0, 6, 0));
        assert_eq!(row(&matches, 1), (4, 0, 4, 0));
        assert_eq!(row(&matches, 63), (1027, 10, 6, 0));
        let offsets = table(Field::Offset);
        assert_eq!(row(&offsets, 0), (1, 0, 5, 0));
        assert_eq!(row(&offsets, 1), (1 << 6, 6, 4, 0));
        assert_eq!(row(&offsets, 31), (1 << 24, 24, 5, 0));
    }
}
