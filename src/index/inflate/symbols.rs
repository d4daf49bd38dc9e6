//! The two loops that decode symbols into output.

use super::tables::{
    BlockTables, DIST_BITS, DIST_SIZE, END_OF_BLOCK, EXCEPTIONAL, LITERAL, LITLEN_BITS, LITLEN_SIZE, SUBTABLE,
};
use super::track::Tracker;
use super::{BUFFER, DeflateError, HISTORY, Inflate, MASK, MAX_MATCH, SLACK, STOP};

/// Input bytes that one round of the fast loop may read.
const ROUND: usize = 16;

/// Bytes of output that one round of the fast loop makes at most: literals, and a match behind them.
const LONGEST_ROUND: usize = 3 + MAX_MATCH;

/// Bits of the longest distance: a code of 15 bits and 13 extra bits.
const DIST_MAX: u32 = 28;

type Buffer = [u8; BUFFER + SLACK];

impl Inflate {
    /// Decodes symbols until the block, the room for output or the input ends. Returns `false` if the input ended.
    pub(super) fn symbols(&mut self, input: &mut &[u8]) -> Result<bool, DeflateError> {
        let before = self.pos;
        let ended = if self.tracker.is_some() {
            self.fast::<true>(input)
        } else {
            self.fast::<false>(input)
        };
        self.total += (self.pos - before) as u64;
        if ended? {
            self.end_block();
            return Ok(true);
        }
        if self.pos > STOP || self.total >= self.pause_at {
            return Ok(true);
        }
        self.careful(input)
    }

    /// Decodes while there is plenty of input and room. Returns whether the block ended.
    fn fast<const TRACK: bool>(&mut self, input: &mut &[u8]) -> Result<bool, DeflateError> {
        let data = *input;
        let mut unused = None;
        let tracker = if TRACK { &mut self.tracker } else { &mut unused };
        let mut reader = BitReader {
            bits: self.bits,
            count: self.count,
            at: 0,
        };
        let mut output = FastOutput {
            buf: (&mut *self.buf).try_into().expect("the buffer never changes its size"),
            pos: self.pos,
            valid: self.valid,
        };
        // The careful loop decodes the symbols right before a pause.
        let before_pause = usize::try_from(self.pause_at - self.total).unwrap_or(usize::MAX);
        let Some(stop) = self.pos.saturating_add(before_pause).checked_sub(LONGEST_ROUND) else {
            return Ok(false);
        };
        let ended = run::<TRACK>(data, stop, &self.tables, tracker, &mut reader, &mut output)?;
        self.pos = output.pos;
        self.count = reader.count & 63;
        self.bits = reader.bits & ((1 << self.count) - 1);
        self.consumed += reader.at as u64;
        *input = &data[reader.at..];
        Ok(ended)
    }

    /// Decodes one literal, match or end of block if all its bits are available. Returns whether they were.
    fn careful(&mut self, input: &mut &[u8]) -> Result<bool, DeflateError> {
        self.top_up(input);
        let (entry, skipped) = resolve(&self.tables.litlen, LITLEN_BITS, self.bits);
        let used = skipped + (entry & 0xff);
        if used > self.count {
            return Ok(false);
        }
        if entry & LITERAL != 0 {
            self.drop_bits(used);
            self.buf[self.pos] = (entry >> 16) as u8;
            self.advance(1);
            return Ok(true);
        }
        if entry & EXCEPTIONAL != 0 {
            if entry & END_OF_BLOCK == 0 {
                return Err(DeflateError::InvalidSymbol);
            }
            self.drop_bits(used);
            self.end_block();
            return Ok(true);
        }
        let length = value(entry, self.bits >> skipped);
        let rest = self.bits >> used;
        let (entry, skipped) = resolve(&self.tables.dist, DIST_BITS, rest);
        let used = used + skipped + (entry & 0xff);
        if used > self.count {
            return Ok(false);
        }
        if entry & EXCEPTIONAL != 0 {
            return Err(DeflateError::InvalidSymbol);
        }
        let distance = value(entry, rest >> skipped);
        if distance > self.pos - self.valid {
            return Err(DeflateError::DistanceTooFar);
        }
        self.drop_bits(used);
        note(&mut self.tracker, self.pos - distance, length);
        let buf: &mut Buffer = (&mut *self.buf).try_into().expect("the buffer never changes its size");
        copy_match(buf, self.pos, distance, length);
        self.advance(length);
        Ok(true)
    }
}

/// The output of the fast loop.
struct FastOutput<'a> {
    buf: &'a mut Buffer,
    pos: usize,
    valid: usize,
}

impl FastOutput<'_> {
    #[inline(always)]
    fn literal(&mut self, entry: u32) {
        self.buf[self.pos & MASK] = (entry >> 16) as u8;
        self.pos += 1;
    }
}

/// The fast loop. A round begins at buffer position `stop` at the latest. Returns whether the block ended.
#[inline(always)]
fn run<const TRACK: bool>(
    data: &[u8],
    stop: usize,
    tables: &BlockTables,
    tracker: &mut Option<Tracker>,
    reader: &mut BitReader,
    output: &mut FastOutput<'_>,
) -> Result<bool, DeflateError> {
    let Some(in_stop) = data.len().checked_sub(ROUND) else {
        return Ok(false);
    };
    let stop = tracker
        .as_ref()
        .map_or(STOP, |tracker| STOP.min(tracker.start + HISTORY - 1))
        .min(stop);
    let litlen = &tables.litlen;
    reader.refill(data);
    let mut entry = litlen[reader.peek(LITLEN_BITS)];
    while reader.at <= in_stop && output.pos <= stop {
        // At least 56 bits are available, and `entry` is the next symbol.
        let mut saved = reader.consume(entry);
        if entry & LITERAL != 0 {
            output.literal(entry);
            entry = litlen[reader.peek(LITLEN_BITS)];
            saved = reader.consume(entry);
            if entry & LITERAL != 0 {
                output.literal(entry);
                entry = litlen[reader.peek(LITLEN_BITS)];
                saved = reader.consume(entry);
                if entry & LITERAL != 0 {
                    output.literal(entry);
                    reader.refill(data);
                    entry = litlen[reader.peek(LITLEN_BITS)];
                    continue;
                }
            }
        }
        if entry & EXCEPTIONAL != 0 {
            if entry & SUBTABLE != 0 {
                entry = litlen[subtable_index(entry, reader.bits) & (LITLEN_SIZE - 1)];
                saved = reader.consume(entry);
            }
            if entry & LITERAL != 0 {
                output.literal(entry);
                reader.refill(data);
                entry = litlen[reader.peek(LITLEN_BITS)];
                continue;
            }
            if entry & END_OF_BLOCK != 0 {
                return Ok(true);
            }
            if entry & EXCEPTIONAL != 0 {
                return Err(DeflateError::InvalidSymbol);
            }
        }
        let length = value(entry, saved);
        let distance = distance(data, &tables.dist, reader)?;
        if distance > output.pos - output.valid {
            return Err(DeflateError::DistanceTooFar);
        }
        entry = litlen[reader.peek(LITLEN_BITS)];
        reader.refill(data);
        if TRACK {
            note(tracker, output.pos - distance, length);
        }
        copy_match(output.buf, output.pos, distance, length);
        output.pos += length;
    }
    Ok(false)
}

/// Reads a distance. At least 14 bits are available: enough to look at the table, but not to consume the whole
/// distance. Leaves enough bits to look at the next symbol.
#[inline(always)]
fn distance(data: &[u8], dist: &[u32; DIST_SIZE], reader: &mut BitReader) -> Result<usize, DeflateError> {
    let mut entry = dist[reader.peek(DIST_BITS)];
    if reader.count & 63 < DIST_MAX + LITLEN_BITS {
        reader.refill(data);
    }
    if entry & EXCEPTIONAL != 0 {
        if entry & SUBTABLE == 0 {
            return Err(DeflateError::InvalidSymbol);
        }
        reader.consume(entry);
        entry = dist[subtable_index(entry, reader.bits) & (DIST_SIZE - 1)];
        if entry & EXCEPTIONAL != 0 {
            return Err(DeflateError::InvalidSymbol);
        }
    }
    let saved = reader.consume(entry);
    Ok(value(entry, saved))
}

/// The bit reader of the fast loop. The bits of `bits` above `count` are already those of `data[at..]`, so reading
/// them again is harmless. Only the low byte of `count` has a meaning, so the reader can subtract whole entries from
/// it without masking them.
struct BitReader {
    bits: u64,
    count: u32,
    at: usize,
}

impl BitReader {
    /// Makes at least 56 bits available.
    #[inline(always)]
    fn refill(&mut self, data: &[u8]) {
        let word: [u8; 8] = data[self.at..self.at + 8].try_into().expect("a slice of eight bytes");
        let count = self.count & 63;
        self.bits |= u64::from_le_bytes(word) << count;
        self.at += ((63 - count) >> 3) as usize;
        self.count = count | 56;
    }

    #[inline(always)]
    fn peek(&self, width: u32) -> usize {
        self.bits as usize & ((1 << width) - 1)
    }

    /// Removes the bits of `entry`. Returns the bits as they were before.
    #[inline(always)]
    fn consume(&mut self, entry: u32) -> u64 {
        let saved = self.bits;
        self.bits >>= entry & 63;
        self.count = self.count.wrapping_sub(entry);
        saved
    }
}

/// Returns the length or distance of `entry`. The lowest bits of `bits` are the code and the extra bits.
#[inline(always)]
fn value(entry: u32, bits: u64) -> usize {
    let extra = (bits & ((1 << (entry & 63)) - 1)) >> ((entry >> 8) & 15);
    (entry >> 16) as usize + extra as usize
}

#[inline(always)]
fn subtable_index(entry: u32, bits: u64) -> usize {
    (entry >> 16) as usize + (bits as usize & ((1 << ((entry >> 8) & 15)) - 1))
}

/// Returns the final entry for the next bits, and how many bits the look-up of a subtable took.
fn resolve(table: &[u32], width: u32, bits: u64) -> (u32, u32) {
    let entry = table[bits as usize & ((1 << width) - 1)];
    if entry & LITERAL == 0 && entry & SUBTABLE != 0 {
        let index = subtable_index(entry, bits >> width) & (table.len() - 1);
        return (table[index], width);
    }
    (entry, 0)
}

#[inline(always)]
fn note(tracker: &mut Option<Tracker>, src: usize, length: usize) {
    if let Some(tracker) = tracker
        && src < tracker.start
    {
        tracker.read(src, length);
    }
}

/// Copies a match. Writes up to 15 bytes more than `length`. Masking never changes a position, but it tells the
/// compiler that the position is inside the buffer.
#[inline(always)]
fn copy_match(buf: &mut Buffer, pos: usize, distance: usize, length: usize) {
    let end = pos + length;
    let mut src = pos - distance;
    let mut dst = pos;
    if distance >= 16 {
        copy::<16>(buf, src, dst);
        while dst + 16 < end {
            src += 16;
            dst += 16;
            copy::<16>(buf, src, dst);
        }
    } else if distance == 1 {
        let run = [buf[src & MASK]; 16];
        while dst < end {
            let at = dst & MASK;
            buf[at..at + 16].copy_from_slice(&run);
            dst += 16;
        }
    } else if distance >= 8 {
        while dst < end {
            copy::<8>(buf, src, dst);
            src += 8;
            dst += 8;
        }
    } else {
        // A pattern shorter than 8 bytes: copy 16 bytes one by one. After that copy 8 bytes at a time from a distance
        // of whole periods.
        while dst < end && dst < pos + 16 {
            buf[dst & MASK] = buf[src & MASK];
            src += 1;
            dst += 1;
        }
        src = pos;
        dst = pos + (16 - 16 % distance);
        while dst < end {
            copy::<8>(buf, src, dst);
            src += 8;
            dst += 8;
        }
    }
}

#[inline(always)]
fn copy<const N: usize>(buf: &mut Buffer, src: usize, dst: usize) {
    let (src, dst) = (src & MASK, dst & MASK);
    let chunk: [u8; N] = buf[src..src + N].try_into().expect("a slice of N bytes");
    buf[dst..dst + N].copy_from_slice(&chunk);
}
