//! A restart inside a frame, as the index keeps it, and what libzstd needs to begin there.
//!
//! libzstd can begin only with a frame. But it can begin with a dictionary, which has all that a block takes over from
//! the blocks before it: tables, repeat offsets, and content that matches may read. So [`Restart::dictionary`] makes a
//! dictionary (RFC 8878, 5) of the state before the block, and [`Restart::frame_header`] makes the header of a frame
//! that consists of the remaining blocks.
//!
//! ```text
//! flags               1 byte: 1 means that a checksum follows the last block of the frame
//! window              number: the frame's window in bytes
//! reach               number: how far matches behind the restart reach back before it
//! covers              number: bytes of tar between the restart and the one before it, or the start of the frame
//! repeat offsets      3 numbers
//! length of tables    number
//! tables              Huffman, offsets, match lengths, literal lengths: as in a dictionary
//! number of runs      number
//! distances           of each run: bytes between its start and the start of the run before it. The first run has how
//!                     far it begins before the restart
//! lengths             of each run
//! bytes               those of all runs
//! ```
//! The runs lie behind the restart before it. If matches reach further back, that restart has the bytes, because it needs
//! them too. So loading a restart may load some restarts before it ([`RestartChain`]).
//!
//! A number has seven bits in each byte, the lowest first; the highest bit of a byte says that another byte follows. The
//! index keeps restarts compressed (`series`).

use super::block::{Carried, LiveTable};
use super::frame::{FrameHeader, window_descriptor, window_size};
use super::fse::{Distribution, Field, StateTable};
use super::literals::huffman_len;
use super::segment::SparseWindow;
use super::series::{Allow, RestartChain, SeriesReader};
use crate::index::{IndexError, ZSTD_MAGIC, malformed};

const DICTIONARY_MAGIC: u32 = 0xec30_a437;
const CHECKSUM_FLAG: u8 = 1;
/// Most bytes of the tables: one description of 128 bytes, and three of at most 53 counts of ten bits.
const MOST_TABLES: u64 = 512;
/// Least content of a dictionary, which the repeat offsets at the start of a frame reach.
const LEAST_CONTENT: u64 = 8;
/// Largest window of a frame that libzstd decodes.
const MOST_WINDOW: u64 = 1 << super::WINDOW_LOG_MAX;
/// A Huffman table of two symbols, for frames that had none so far.
const ANY_HUFFMAN: [u8; 2] = [128, 0x10];
/// Bytes of memory for a restart that is being loaded, beyond which it asks for more.
const LOADING: u64 = 1 << 20;

/// The state of a frame's decoder before a block.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::index) struct Restart {
    checksum: bool,
    window: u64,
    reach: u64,
    covers: u64,
    repeats: [u32; 3],
    tables: Vec<u8>,
    sparse: SparseWindow,
}

impl Restart {
    /// Makes a restart of what the blocks before it carried over. `None` if no dictionary can contain it.
    pub(super) fn new(
        carried: &Carried,
        header: &FrameHeader,
        reach: u64,
        covers: u64,
        sparse: SparseWindow,
    ) -> Option<Self> {
        let mut tables = match &carried.live.huffman {
            Some(description) => description.clone(),
            None => ANY_HUFFMAN.to_vec(),
        };
        for (field, live) in [
            (Field::Offset, &carried.live.offset),
            (Field::Match, &carried.live.matches),
            (Field::Literals, &carried.live.literals),
        ] {
            match live {
                LiveTable::Described(description) => tables.extend_from_slice(description),
                // Where the table is absent or has one symbol, no block uses it, and any table will do.
                LiveTable::Predefined | LiveTable::Absent | LiveTable::Single => {
                    tables.extend(field.predefined().describe());
                }
            }
        }
        let repeats = carried.repeats.map(u32::try_from);
        let [Ok(first), Ok(second), Ok(third)] = repeats else {
            return None;
        };
        let restart = Self {
            checksum: header.checksum,
            window: header.window,
            reach,
            covers,
            repeats: [first, second, third],
            tables,
            sparse,
        };
        restart.is_valid().then_some(restart)
    }

    fn is_valid(&self) -> bool {
        let largest = u64::from(self.repeats.into_iter().max().unwrap_or(0));
        !self.repeats.contains(&0)
            && self.window <= MOST_WINDOW
            && largest.max(self.reach) <= self.window.max(LEAST_CONTENT)
            // No restart can be far behind itself, so a chain of restarts has an end.
            && self.covers > 0
            && self.sparse.runs.first().is_none_or(|&(back, len)| back + len <= self.covers.min(self.reach))
            && are_tables(&self.tables)
    }

    /// Returns the restart as the index keeps it, before it is compressed.
    pub(super) fn store(&self) -> Vec<u8> {
        let mut out = vec![if self.checksum { CHECKSUM_FLAG } else { 0 }];
        put(&mut out, self.window);
        put(&mut out, self.reach);
        put(&mut out, self.covers);
        for repeat in self.repeats {
            put(&mut out, u64::from(repeat));
        }
        put(&mut out, self.tables.len() as u64);
        out.extend_from_slice(&self.tables);
        put(&mut out, self.sparse.runs.len() as u64);
        let mut before = None;
        for &(back, len) in &self.sparse.runs {
            let start = back + len;
            put(&mut out, before.map_or(start, |before: u64| before - start));
            before = Some(start);
        }
        for &(_, len) in &self.sparse.runs {
            put(&mut out, len);
        }
        out.extend_from_slice(&self.sparse.bytes);
        out
    }

    /// Reads a stored restart. `allow` is asked before memory is used for it, with the number of bytes.
    fn load(stored: &[u8], allow: &mut Allow<'_>) -> Result<Self, IndexError> {
        let wrong = || malformed("a zstd restart is not valid");
        let mut rest = stored;
        let flags = byte(&mut rest)
            .filter(|flags| flags & !CHECKSUM_FLAG == 0)
            .ok_or_else(wrong)?;
        let window = number(&mut rest).ok_or_else(wrong)?;
        let reach = number(&mut rest).ok_or_else(wrong)?;
        let covers = number(&mut rest).ok_or_else(wrong)?;
        let mut repeats = [0; 3];
        for repeat in &mut repeats {
            let value = number(&mut rest).and_then(|value| u32::try_from(value).ok());
            *repeat = value.ok_or_else(wrong)?;
        }
        let len = number(&mut rest).filter(|&len| len <= MOST_TABLES).ok_or_else(wrong)?;
        let (tables, mut rest) = rest.split_at_checked(len as usize).ok_or_else(wrong)?;
        // Each run takes at least two bytes of `rest`.
        let runs = number(&mut rest)
            .filter(|&runs| runs <= rest.len() as u64 / 2)
            .ok_or_else(wrong)?;
        allow(rest.len() as u64 + runs * size_of::<(u64, u64)>() as u64)?;
        let mut sparse = SparseWindow {
            runs: Vec::with_capacity(runs as usize),
            bytes: Vec::new(),
        };
        let mut start = None;
        for _ in 0..runs {
            let distance = number(&mut rest).ok_or_else(wrong)?;
            let from = match start {
                None => distance,
                Some(before) => u64::checked_sub(before, distance).ok_or_else(wrong)?,
            };
            sparse.runs.push((from, 0));
            start = Some(from);
        }
        let mut total = 0u64;
        let mut end = u64::MAX;
        for run in &mut sparse.runs {
            let len = number(&mut rest).filter(|&len| len > 0).ok_or_else(wrong)?;
            let from = run.0;
            // No run begins before the end of the one before it.
            let back = from.checked_sub(len).filter(|_| from <= end).ok_or_else(wrong)?;
            total = total.checked_add(len).ok_or_else(wrong)?;
            *run = (back, len);
            end = back;
        }
        if total != rest.len() as u64 {
            return Err(wrong());
        }
        sparse.bytes = rest.to_vec();
        let restart = Self {
            checksum: flags & CHECKSUM_FLAG != 0,
            window,
            reach,
            covers,
            repeats,
            tables: tables.to_vec(),
            sparse,
        };
        restart.is_valid().then_some(restart).ok_or_else(wrong)
    }

    /// Returns the length of the dictionary's content: as far back as a match or a repeat offset reaches.
    fn content_len(&self) -> u64 {
        let repeat = self.repeats.into_iter().max().unwrap_or(0);
        self.reach.max(u64::from(repeat)).max(LEAST_CONTENT)
    }

    /// Returns the dictionary with which libzstd decodes the remaining blocks, without any content.
    fn dictionary(&self) -> Result<Vec<u8>, IndexError> {
        let content = usize::try_from(self.content_len()).map_err(|_| IndexError::OutOfMemory)?;
        let mut dictionary = Vec::new();
        let head = 8 + self.tables.len() + 12;
        dictionary
            .try_reserve_exact(head + content)
            .map_err(|_| IndexError::OutOfMemory)?;
        dictionary.extend_from_slice(&DICTIONARY_MAGIC.to_le_bytes());
        // Any number will do, because the frame header does not name a dictionary.
        dictionary.extend_from_slice(&1u32.to_le_bytes());
        dictionary.extend_from_slice(&self.tables);
        for repeat in self.repeats {
            dictionary.extend_from_slice(&repeat.to_le_bytes());
        }
        dictionary.resize(head + content, 0);
        Ok(dictionary)
    }

    /// Puts the bytes of this restart into the content of a dictionary. `behind` is how far the dictionary ends behind
    /// the restart.
    fn fill(&self, dictionary: &mut [u8], behind: u64, content: u64) {
        let mut bytes = &self.sparse.bytes[..];
        for &(back, len) in &self.sparse.runs {
            // The lengths of the runs add up to that of `bytes`.
            let (run, tail) = bytes.split_at(len as usize);
            bytes = tail;
            let Some(back) = back.checked_add(behind).filter(|&back| back < content) else {
                continue;
            };
            let to = dictionary.len() - back as usize;
            // Another restart may need more than this one.
            let run = &run[run.len().saturating_sub((content - back) as usize)..];
            dictionary[to - run.len()..to].copy_from_slice(run);
        }
    }

    /// Returns the header of a frame of the remaining blocks.
    fn frame_header(&self) -> [u8; 6] {
        // No size, no checksum, no dictionary number. The window is at most 2 GiB, so there is a descriptor.
        let descriptor = window_descriptor(self.window).unwrap_or(u8::MAX);
        let [a, b, c, d] = ZSTD_MAGIC.to_le_bytes();
        [a, b, c, d, 0, descriptor]
    }
}

/// What libzstd needs to begin at a restart.
#[derive(Debug)]
pub(super) struct Beginning {
    /// The dictionary. Bytes of the window that no match reads are zero.
    pub(super) dictionary: Vec<u8>,
    /// The header of a frame that has only the remaining blocks.
    pub(super) frame_header: [u8; 6],
    /// Whether a checksum follows the last block of the frame.
    pub(super) checksum: bool,
}

impl Beginning {
    /// Loads the restart at the front of `chain`, and those that have bytes which it needs. `None` if the chain is empty.
    /// `allow` is asked before memory is used, with the number of bytes in all, at once and later.
    pub(super) fn load(
        chain: &mut RestartChain<'_>,
        allow: &mut dyn FnMut(u64, u64) -> Result<(), IndexError>,
    ) -> Result<Option<Self>, IndexError> {
        let mut restarts = SeriesReader::new(chain);
        let Some((start, stored)) = restarts.next(&mut |bytes| allow(bytes, bytes))? else {
            return Ok(None);
        };
        let held = stored.capacity() as u64 + restarts.held();
        let restart = Restart::load(&stored, &mut |bytes| allow(held + bytes, held + bytes))?;
        drop(stored);
        let content = restart.content_len();
        let window = window_descriptor(restart.window).map_or(u64::MAX, window_size);
        // The restarts that are loaded, the dictionary, and libzstd's copy of it. Then the copy, and libzstd's window.
        let at_once = content.saturating_mul(2).saturating_add(held);
        let later = content.saturating_add(window).saturating_add(LOADING);
        allow(at_once.saturating_add(LOADING), later)?;
        let mut dictionary = restart.dictionary()?;
        restart.fill(&mut dictionary, 0, content);
        let (frame_header, checksum, reach) = (restart.frame_header(), restart.checksum, restart.reach);
        let mut covered = restart.covers;
        drop(restart);
        let mut allow = |bytes: u64| {
            let bytes = bytes.saturating_add(at_once);
            allow(bytes, bytes.max(later))
        };
        while covered < reach {
            let (_, stored) = restarts
                .next(&mut allow)?
                .filter(|&(offset, _)| start.checked_sub(covered) == Some(offset))
                .ok_or(malformed("a zstd restart lacks the one before it"))?;
            let held = stored.capacity() as u64 + restarts.held();
            let earlier = Restart::load(&stored, &mut |bytes| allow(held + bytes))?;
            earlier.fill(&mut dictionary, covered, content);
            covered = covered.saturating_add(earlier.covers);
        }
        Ok(Some(Self {
            dictionary,
            frame_header,
            checksum,
        }))
    }
}

/// Whether these are the four tables of a dictionary, without any bytes more. libzstd would take further bytes for
/// repeat offsets.
fn are_tables(bytes: &[u8]) -> bool {
    let Some(mut rest) = bytes.first().and_then(|&first| bytes.get(huffman_len(first)..)) else {
        return false;
    };
    for field in [Field::Offset, Field::Match, Field::Literals] {
        let Some((distribution, len)) = Distribution::read(field, rest) else {
            return false;
        };
        if StateTable::new().load(field, &distribution).is_none() {
            return false;
        }
        rest = &rest[len..];
    }
    rest.is_empty()
}

fn put(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

fn byte(rest: &mut &[u8]) -> Option<u8> {
    let (&byte, tail) = rest.split_first()?;
    *rest = tail;
    Some(byte)
}

fn number(rest: &mut &[u8]) -> Option<u64> {
    let mut number = 0u64;
    for shift in (0..63).step_by(7) {
        let byte = byte(rest)?;
        number |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(number);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::super::block::LiveTables;
    use super::super::series::SeriesWriter;
    use super::*;

    fn restart(reach: u64, covers: u64, runs: Vec<(u64, u64)>) -> Restart {
        let carried = Carried {
            live: LiveTables {
                huffman: None,
                literals: LiveTable::Predefined,
                offset: LiveTable::Absent,
                matches: LiveTable::Single,
            },
            repeats: [1, 200, 8],
        };
        let header = FrameHeader {
            len: 6,
            window: 1 << 20,
            content: None,
            checksum: true,
            dictionary: false,
        };
        let count = runs.iter().map(|&(_, len)| len as u8).sum();
        let sparse = SparseWindow {
            runs,
            bytes: (0..count).collect(),
        };
        Restart::new(&carried, &header, reach, covers, sparse).unwrap()
    }

    fn load(chain: &[(u64, &[u8])]) -> Result<Beginning, IndexError> {
        let loaded = Beginning::load(&mut chain.iter().copied(), &mut |_, _| Ok(()));
        loaded.map(Option::unwrap)
    }

    /// Returns restarts as the index keeps them, the first ones first.
    fn series(restarts: &[Restart]) -> Vec<Vec<u8>> {
        let mut series = SeriesWriter::new().unwrap();
        restarts
            .iter()
            .map(|restart| series.add(&restart.store()).unwrap())
            .collect()
    }

    #[test]
    fn a_restart_is_loaded_as_it_was_stored() {
        let restart = restart(120, 100, vec![(90, 10), (40, 50), (0, 3)]);
        let stored = restart.store();
        assert_eq!(Restart::load(&stored, &mut |_| Ok(())).unwrap(), restart);
        for cut in 0..stored.len() {
            assert!(Restart::load(&stored[..cut], &mut |_| Ok(())).is_err());
        }
    }

    #[test]
    fn the_dictionary_has_the_bytes_where_they_belong_and_libzstd_takes_it() {
        let later = restart(120, 100, vec![(90, 10), (40, 50), (0, 3)]);
        // Its first run is too far away for the later restart, and the second one is in part.
        let earlier = restart(200, 200, vec![(190, 10), (15, 10), (2, 3)]);
        let stored = series(&[earlier, later]);
        let beginning = load(&[(1000, &stored[1]), (900, &stored[0]), (0, b"not needed")]).unwrap();
        let dictionary = beginning.dictionary;
        let content = &dictionary[dictionary.len() - 200..];
        let mut expected = [0; 200];
        for (at, len, first) in [(75, 10, 10u8), (95, 3, 20), (100, 10, 0), (110, 50, 10), (197, 3, 60)] {
            for n in 0..len {
                expected[at + n] = first + n as u8;
            }
        }
        assert_eq!(content, expected);
        let mut context = zstd::zstd_safe::DCtx::create();
        context.load_dictionary(&dictionary).unwrap();
        // The frame has one raw block.
        let frame = [&beginning.frame_header[..], &[1 | 5 << 3, 0, 0], b"hello"].concat();
        let mut out = [0; 10];
        assert_eq!(context.decompress(&mut out[..], &frame), Ok(5));
        assert_eq!(&out[..5], b"hello");
    }

    #[test]
    fn a_restart_needs_the_ones_before_it() {
        let later = || restart(120, 100, vec![(90, 10)]);
        let earlier = || restart(20, 200, vec![(3, 10)]);
        let together = series(&[earlier(), later()]);
        let alone = [series(&[earlier()]), series(&[later()])].concat();
        for stored in [together, alone] {
            assert!(load(&[(1000, &stored[1]), (900, &stored[0])]).is_ok());
            assert!(load(&[(1000, &stored[1]), (901, &stored[0])]).is_err());
            assert!(load(&[(1000, &stored[1])]).is_err());
            assert!(load(&[(50, &stored[1]), (0, &stored[0])]).is_err());
        }
    }

    #[test]
    fn no_run_overlaps_another() {
        let mut overlapping = restart(120, 100, vec![(90, 10), (40, 50)]);
        overlapping.sparse.runs = vec![(60, 30), (50, 30)];
        assert!(Restart::load(&overlapping.store(), &mut |_| Ok(())).is_err());
    }
}
