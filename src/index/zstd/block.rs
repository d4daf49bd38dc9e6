//! Follows the compressed blocks of a frame without decoding their literals.
//!
//! [`Follower`] keeps what one block hands on to the next: the tables that are in use, and the three last offsets. With
//! them, and with the bytes that later matches read, decoding can begin at the next block.

use super::fse::{Distribution, Field, StateTable};
use super::literals::Literals;
use super::sequences::{self, Matches, PAD, SequenceTables};

/// Repeat offsets at the start of a frame (RFC 8878, 3.1.1.5).
const FIRST_REPEATS: [u64; 3] = [1, 4, 8];

/// The table of one field, as the next block may use it again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum LiveTable {
    /// No block had sequences so far.
    Absent,
    Predefined,
    /// A table of one symbol. It has no description, so a dictionary cannot contain it.
    Single,
    /// A table with this description.
    Described(Vec<u8>),
}

/// Descriptions of all tables, and the repeat offsets.
#[derive(Debug, Clone)]
pub(super) struct Carried {
    /// Description of the Huffman table, if there was one.
    pub(super) huffman: Option<Vec<u8>>,
    pub(super) literals: LiveTable,
    pub(super) offset: LiveTable,
    pub(super) matches: LiveTable,
    pub(super) repeats: [u64; 3],
}

/// What a block did with the tables of its predecessors. Index 0 is the table of literal lengths, 1 that of offsets, 2
/// that of match lengths.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct TableUse {
    /// The block has its own table.
    pub(super) replaced: [bool; 3],
    /// The block uses the table of an earlier block.
    pub(super) reused: [bool; 3],
}

/// Follows the blocks of one frame.
#[derive(Debug)]
pub(super) struct Follower {
    carried: Carried,
    tables: SequenceTables,
}

impl Follower {
    pub(super) fn new() -> Self {
        Self {
            carried: Carried {
                huffman: None,
                literals: LiveTable::Absent,
                offset: LiveTable::Absent,
                matches: LiveTable::Absent,
                repeats: FIRST_REPEATS,
            },
            tables: SequenceTables {
                literals: StateTable::new(),
                offset: StateTable::new(),
                matches: StateTable::new(),
            },
        }
    }

    /// Returns what the next block may use.
    pub(super) fn carried(&self) -> &Carried {
        &self.carried
    }

    /// Follows a compressed block, `bytes[PAD..]`. The bytes before it have no meaning. Gives its matches to `matches`.
    /// Returns the number of literals and what the block did with tables, or `None` if the block is not understood.
    pub(super) fn follow(&mut self, bytes: &[u8], matches: &mut impl Matches) -> Option<(usize, TableUse)> {
        let block = bytes.get(PAD..)?;
        let literals = Literals::read(block)?;
        if let Some(range) = literals.huffman {
            let huffman = self.carried.huffman.get_or_insert_default();
            huffman.clear();
            huffman.extend_from_slice(block.get(range)?);
        }
        let section = block.get(literals.len..)?;
        let (count, header) = sequence_count(section)?;
        if count == 0 {
            return (section.len() == header).then_some((literals.decoded, TableUse::default()));
        }
        let modes = *section.get(header)?;
        if modes & 3 != 0 {
            return None;
        }
        let mut at = header + 1;
        let mut uses = TableUse::default();
        let Carried {
            literals: lengths,
            offset,
            matches: match_lengths,
            ..
        } = &mut self.carried;
        let tables = &mut self.tables;
        let fields = [
            (Field::Literals, lengths, &mut tables.literals),
            (Field::Offset, offset, &mut tables.offset),
            (Field::Match, match_lengths, &mut tables.matches),
        ];
        for (n, (field, live, table)) in fields.into_iter().enumerate() {
            let mode = (modes >> (6 - 2 * n)) & 3;
            uses.reused[n] = mode == 3;
            uses.replaced[n] = mode != 3;
            at += read_table(mode, field, section.get(at..)?, live, table)?;
        }
        let start = PAD + literals.len + at;
        sequences::decode(bytes, start, count, &self.tables, &mut self.carried.repeats, matches)?;
        Some((literals.decoded, uses))
    }
}

/// Reads the table of one field from the front of `bytes`. Returns the length of what it read.
fn read_table(mode: u8, field: Field, bytes: &[u8], live: &mut LiveTable, table: &mut StateTable) -> Option<usize> {
    match mode {
        0 => {
            if *live != LiveTable::Predefined {
                table.load(field, &field.predefined())?;
                *live = LiveTable::Predefined;
            }
            Some(0)
        }
        1 => {
            table.repeat(field, *bytes.first()?)?;
            *live = LiveTable::Single;
            Some(1)
        }
        2 => {
            let (distribution, len) = Distribution::read(field, bytes)?;
            table.load(field, &distribution)?;
            match live {
                LiveTable::Described(description) => {
                    description.clear();
                    description.extend_from_slice(&bytes[..len]);
                }
                _ => *live = LiveTable::Described(bytes[..len].to_vec()),
            }
            Some(len)
        }
        _ => (*live != LiveTable::Absent).then_some(0),
    }
}

/// Returns the number of sequences and the length of that number (RFC 8878, 3.1.1.3.2.1).
fn sequence_count(section: &[u8]) -> Option<(usize, usize)> {
    let byte = |n: usize| section.get(n).copied().map(usize::from);
    Some(match byte(0)? {
        first @ 0..128 => (first, 1),
        first @ 128..255 => (((first - 128) << 8) + byte(1)?, 2),
        _ => (byte(1)? + (byte(2)? << 8) + 0x7f00, 3),
    })
}
