//! Huffman decoding tables of one deflate block.
//!
//! A table is an array of 32-bit entries indexed by the next bits of the stream. A code longer than the main table's index is
//! resolved by a second look-up in a subtable behind the main part. An entry says all that is to be known about a symbol, so
//! that decoding it costs one look-up, one shift and one subtraction:
//!
//! ```text
//! bit 31       LITERAL
//! bits 16..31  literal byte | match length or distance without its extra bits | start of the subtable
//! bit 15       EXCEPTIONAL: one of SUBTABLE (14), END_OF_BLOCK (13), INVALID (12)
//! bits 8..12   code length (where the extra bits begin) | index width of the subtable
//! bits 0..8    bits to consume: code and extra bits
//! ```
//!
//! Invariant: every index a decoder can form by masking lies inside the arrays, whatever the stream says.

use super::DeflateError;

pub(super) const LITERAL: u32 = 1 << 31;
pub(super) const EXCEPTIONAL: u32 = 1 << 15;
pub(super) const SUBTABLE: u32 = 1 << 14;
pub(super) const END_OF_BLOCK: u32 = 1 << 13;
pub(super) const INVALID: u32 = 1 << 12;

/// Index width of the literal/length table: covers nearly all codes of real data and fits the first-level cache.
pub(super) const LITLEN_BITS: u32 = 11;
/// Index width of the distance table.
pub(super) const DIST_BITS: u32 = 8;
/// Entries of the literal/length table: 288 symbols need at most 2342 (zlib's `enough`), rounded up for masking.
pub(super) const LITLEN_SIZE: usize = 4096;
/// Entries of the distance table: 32 symbols need at most 402, rounded up for masking.
pub(super) const DIST_SIZE: usize = 512;

const MAX_CODE: usize = 15;

/// Longest code of the code-length alphabet (RFC 1951, 3.2.7), whose table has no subtables.
const PRECODE_BITS: u32 = 7;

const LITLEN_SYMBOLS: [u32; 288] = litlen_symbols();
const DIST_SYMBOLS: [u32; 32] = dist_symbols();
const PRECODE_SYMBOLS: [u32; 19] = precode_symbols();

/// RFC 1951, 3.2.5. Symbols 286 and 287 take part in the fixed code but never occur.
const fn litlen_symbols() -> [u32; 288] {
    let mut symbols = [EXCEPTIONAL | INVALID; 288];
    let mut symbol = 0;
    while symbol < 256 {
        symbols[symbol] = LITERAL | ((symbol as u32) << 16);
        symbol += 1;
    }
    symbols[256] = EXCEPTIONAL | END_OF_BLOCK;
    let mut base = 3;
    symbol = 257;
    while symbol < 285 {
        let extra = if symbol < 265 { 0 } else { (symbol as u32 - 261) / 4 };
        symbols[symbol] = (base << 16) | extra;
        base += 1 << extra;
        symbol += 1;
    }
    symbols[285] = 258 << 16;
    symbols
}

/// RFC 1951, 3.2.5. Distance symbols 30 and 31 take part in the fixed code but never occur.
const fn dist_symbols() -> [u32; 32] {
    let mut symbols = [EXCEPTIONAL | INVALID; 32];
    let mut base = 1;
    let mut symbol = 0;
    while symbol < 30 {
        let extra = if symbol < 4 { 0 } else { (symbol as u32 - 2) / 2 };
        symbols[symbol] = (base << 16) | extra;
        base += 1 << extra;
        symbol += 1;
    }
    symbols
}

const fn precode_symbols() -> [u32; 19] {
    let mut symbols = [0; 19];
    let mut symbol = 0;
    while symbol < 19 {
        symbols[symbol] = (symbol as u32) << 16;
        symbol += 1;
    }
    symbols
}

/// The two tables of the current block.
#[derive(Debug, Clone)]
pub(super) struct Tables {
    pub(super) litlen: [u32; LITLEN_SIZE],
    pub(super) dist: [u32; DIST_SIZE],
    /// The tables hold the fixed code, so that a run of fixed blocks builds it once.
    fixed: bool,
}

impl Tables {
    pub(super) fn new() -> Box<Self> {
        Box::new(Self {
            litlen: [EXCEPTIONAL | INVALID | 1; LITLEN_SIZE],
            dist: [EXCEPTIONAL | INVALID | 1; DIST_SIZE],
            fixed: false,
        })
    }

    /// Loads the fixed code (RFC 1951, 3.2.6).
    pub(super) fn load_fixed(&mut self) -> Result<(), DeflateError> {
        if self.fixed {
            return Ok(());
        }
        let mut lengths = [8u8; 288];
        lengths[144..256].fill(9);
        lengths[256..280].fill(7);
        build(&mut self.litlen, LITLEN_BITS, &lengths, &LITLEN_SYMBOLS, true)?;
        build(&mut self.dist, DIST_BITS, &[5; 32], &DIST_SYMBOLS, true)?;
        self.fixed = true;
        Ok(())
    }

    /// Loads a dynamic code from its code lengths.
    pub(super) fn load(&mut self, litlen: &[u8], dist: &[u8]) -> Result<(), DeflateError> {
        self.fixed = false;
        build(&mut self.litlen, LITLEN_BITS, litlen, &LITLEN_SYMBOLS, true)?;
        build(&mut self.dist, DIST_BITS, dist, &DIST_SYMBOLS, true)
    }
}

/// The table of the code that describes the two other codes of a dynamic block.
#[derive(Debug, Clone)]
pub(super) struct Precode([u32; 1 << PRECODE_BITS]);

impl Precode {
    pub(super) fn new() -> Self {
        Self([0; 1 << PRECODE_BITS])
    }

    pub(super) fn load(&mut self, lengths: &[u8; 19]) -> Result<(), DeflateError> {
        build(&mut self.0, PRECODE_BITS, lengths, &PRECODE_SYMBOLS, false)
    }

    /// Symbol and code length for the next bits; zero bits may stand in for unknown ones.
    pub(super) fn lookup(&self, bits: u64) -> (u32, u32) {
        let entry = self.0[bits as usize & ((1 << PRECODE_BITS) - 1)];
        (entry >> 16, entry & 0xff)
    }
}

/// Fills `table` for the canonical Huffman code with these code lengths.
///
/// Accepts what zlib accepts: a complete code; where `lone` is set also one single code of one bit, or no code at all (an
/// error only if it is used). The table grows by doubling. First the entries of codes of up to n bits fill the first 2^n
/// places. Then these places are copied to the 2^n places behind them, and the codes of n + 1 bits are put in.
fn build(table: &mut [u32], width: u32, lengths: &[u8], symbols: &[u32], lone: bool) -> Result<(), DeflateError> {
    let mut counts = [0u16; MAX_CODE + 1];
    for &length in lengths {
        counts[usize::from(length) & MAX_CODE] += 1;
    }
    counts[0] = 0;
    let longest = counts.iter().rposition(|&count| count > 0).unwrap_or(0);
    let mut free = 1i32;
    for &count in &counts[1..] {
        free = (free << 1) - i32::from(count);
        if free < 0 {
            return Err(DeflateError::Oversubscribed);
        }
    }
    if free > 0 {
        if !lone || longest > 1 {
            return Err(DeflateError::Incomplete);
        }
        table[..1 << width].fill(EXCEPTIONAL | INVALID | 1);
    }

    let mut sorted = [0u16; 288];
    let mut next = [0u16; MAX_CODE + 2];
    for length in 1..=MAX_CODE {
        next[length + 1] = next[length] + counts[length];
    }
    let used = usize::from(next[MAX_CODE + 1]);
    for (symbol, &length) in lengths.iter().enumerate().filter(|&(_, &length)| length > 0) {
        let place = &mut next[usize::from(length)];
        sorted[usize::from(*place)] = symbol as u16;
        *place += 1;
    }
    if free > 0 {
        // The lone code is `0`; `1` stays invalid.
        if let [symbol] = sorted[..used] {
            let entry = entry(symbols, symbol, 1);
            table[..1 << width]
                .iter_mut()
                .step_by(2)
                .for_each(|place| *place = entry);
        }
        return Ok(());
    }

    let mut sorted = sorted[..used].iter().copied();
    let mut code = 0usize;
    let mut filled = 1usize;
    for (length, &count) in counts.iter().enumerate().take(width as usize + 1).skip(1) {
        table.copy_within(..filled, filled);
        filled *= 2;
        for symbol in sorted.by_ref().take(usize::from(count)) {
            table[code] = entry(symbols, symbol, length as u32);
            code = next_code(code, filled - 1);
        }
    }
    if longest > width as usize {
        build_subtables(table, width, &counts, code, sorted, symbols);
    }
    Ok(())
}

/// Places the codes longer than the main table's index. `code` is the first of them, bit-reversed.
fn build_subtables(
    table: &mut [u32],
    width: u32,
    counts: &[u16; MAX_CODE + 1],
    mut code: usize,
    mut sorted: impl Iterator<Item = u16>,
    symbols: &[u32],
) {
    let main_mask = (1usize << width) - 1;
    let size_mask = table.len() - 1;
    let mut end = 1usize << width;
    let mut start = end;
    let mut prefix = usize::MAX;
    let mut sub_width = 0;
    for length in width as usize + 1..=MAX_CODE {
        let mut remaining = usize::from(counts[length]);
        while remaining > 0 {
            let Some(symbol) = sorted.next() else { return };
            if code & main_mask != prefix {
                prefix = code & main_mask;
                // Widen until the codes that follow fill the subtable.
                sub_width = length - width as usize;
                let mut space = remaining;
                while space < 1 << sub_width && sub_width + (width as usize) < MAX_CODE {
                    sub_width += 1;
                    space = 2 * space + usize::from(counts[sub_width + width as usize]);
                }
                start = end;
                end += 1 << sub_width;
                table[prefix] = EXCEPTIONAL | SUBTABLE | ((start as u32) << 16) | ((sub_width as u32) << 8) | width;
            }
            let sub_length = length - width as usize;
            let value = entry(symbols, symbol, sub_length as u32);
            for place in ((code >> width)..1 << sub_width).step_by(1 << sub_length) {
                table[(start + place) & size_mask] = value;
            }
            code = next_code(code, (1 << length) - 1);
            remaining -= 1;
        }
    }
}

fn entry(symbols: &[u32], symbol: u16, length: u32) -> u32 {
    symbols[usize::from(symbol)] + length + (length << 8)
}

/// The code after `code` when both are written first bit lowest; `ones` is the last code of this length.
fn next_code(code: usize, ones: usize) -> usize {
    match (code ^ ones).checked_ilog2() {
        Some(top) => (code & ((1 << top) - 1)) | (1 << top),
        None => code,
    }
}
