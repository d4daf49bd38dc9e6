//! Follows the compressed blocks of a frame without decoding their literals.
//!
//! [`Follower`] keeps the tables that one block hands on to the next. With them, with the three last offsets, and with the
//! bytes that later matches read, decoding can begin at the next block.

use super::fse::{Distribution, Field, StateTable};
use super::literals::Literals;
use super::sequences::{self, PAD, Sequence, SequenceTables};

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

/// The tables that a block may use again, as their descriptions.
#[derive(Debug, Clone)]
pub(super) struct LiveTables {
    /// Description of the Huffman table, if there was one.
    pub(super) huffman: Option<Vec<u8>>,
    pub(super) literals: LiveTable,
    pub(super) offset: LiveTable,
    pub(super) matches: LiveTable,
}

/// What a block may use of those before it.
#[derive(Debug, Clone)]
pub(super) struct Carried {
    /// The tables.
    pub(super) live: LiveTables,
    /// The three last offsets.
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

/// What a compressed block consists of.
#[derive(Debug, Clone, Copy)]
pub(super) struct BlockParts {
    /// Number of literals.
    pub(super) literals: usize,
    /// What the block did with tables.
    pub(super) uses: TableUse,
    /// Number of sequences.
    pub(super) count: usize,
    /// Where the bit stream of the sequences begins in the bytes that were read.
    start: usize,
}

/// Follows the blocks of one frame.
#[derive(Debug)]
pub(super) struct Follower {
    live: LiveTables,
    tables: SequenceTables,
}

impl Follower {
    pub(super) fn new() -> Self {
        Self {
            live: LiveTables {
                huffman: None,
                literals: LiveTable::Absent,
                offset: LiveTable::Absent,
                matches: LiveTable::Absent,
            },
            tables: SequenceTables {
                literals: StateTable::new(),
                offset: StateTable::new(),
                matches: StateTable::new(),
            },
        }
    }

    /// Returns the tables that the next block may use.
    pub(super) fn live(&self) -> &LiveTables {
        &self.live
    }

    /// Reads the tables of a compressed block, `bytes[PAD..]`. The bytes before it have no meaning. Returns `None` if the
    /// block is not understood.
    pub(super) fn read(&mut self, bytes: &[u8]) -> Option<BlockParts> {
        let block = bytes.get(PAD..)?;
        let literals = Literals::read(block)?;
        if let Some(range) = literals.huffman {
            let huffman = self.live.huffman.get_or_insert_default();
            huffman.clear();
            huffman.extend_from_slice(block.get(range)?);
        }
        let section = block.get(literals.len..)?;
        let (count, header) = sequence_count(section)?;
        let mut parts = BlockParts {
            literals: literals.decoded,
            uses: TableUse::default(),
            count,
            start: bytes.len(),
        };
        if count == 0 {
            return (section.len() == header).then_some(parts);
        }
        let modes = *section.get(header)?;
        if modes & 3 != 0 {
            return None;
        }
        let mut at = header + 1;
        let LiveTables {
            literals: lengths,
            offset,
            matches,
            ..
        } = &mut self.live;
        let tables = &mut self.tables;
        let fields = [
            (Field::Literals, lengths, &mut tables.literals),
            (Field::Offset, offset, &mut tables.offset),
            (Field::Match, matches, &mut tables.matches),
        ];
        for (n, (field, live, table)) in fields.into_iter().enumerate() {
            let mode = (modes >> (6 - 2 * n)) & 3;
            parts.uses.reused[n] = mode == 3;
            parts.uses.replaced[n] = mode != 3;
            at += read_table(mode, field, section.get(at..)?, live, table)?;
        }
        parts.start = PAD + literals.len + at;
        Some(parts)
    }

    /// Decodes the sequences of the block that was read last into `out`, in place of what was there. Returns `None` if they
    /// are not valid.
    pub(super) fn sequences(&self, bytes: &[u8], parts: &BlockParts, out: &mut Vec<Sequence>) -> Option<()> {
        if parts.count == 0 {
            out.clear();
            return Some(());
        }
        sequences::decode(bytes, parts.start, parts.count, &self.tables, out)
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
