//! The inflater against zlib-rs: both give the same output, or both refuse.
#![no_main]

use flate2::{Decompress, FlushDecompress, Status};
use libfuzzer_sys::fuzz_target;
use ocifs::index::inflate::{Inflate, Progress};

/// Deflate expands up to 1032 times; enough is enough.
const MOST: usize = 4 << 20;

/// The whole output, and where the stream ended.
fn oracle(input: &[u8]) -> Option<(Vec<u8>, usize)> {
    let mut inflate = Decompress::new(false);
    let mut out = Vec::new();
    loop {
        let (read, written) = (inflate.total_in(), inflate.total_out());
        out.reserve(64 << 10);
        let status = inflate
            .decompress_vec(&input[read as usize..], &mut out, FlushDecompress::None)
            .ok()?;
        if status == Status::StreamEnd {
            return Some((out, inflate.total_in() as usize));
        }
        if out.len() > MOST || (read, written) == (inflate.total_in(), inflate.total_out()) {
            return None;
        }
    }
}

/// Ours, with the input cut into pieces of `split`'s nibbles in turn, or in one if that is 0.
fn ours(input: &[u8], split: u64) -> Option<(Vec<u8>, usize)> {
    let mut inflate = Inflate::new();
    inflate.stop_at_block(0);
    let mut out = Vec::new();
    let mut at = 0;
    let mut turn = 0;
    while at < input.len() {
        let nibble = (split >> (turn % 16 * 4)) as usize & 15;
        turn += 1;
        let end = if split == 0 {
            input.len()
        } else {
            (at + nibble * nibble).min(input.len())
        };
        let mut piece = &input[at..end];
        at = end;
        loop {
            let progress = inflate.decode(&mut piece).ok()?;
            out.extend_from_slice(inflate.take_output());
            match progress {
                Progress::Input => {
                    assert!(piece.is_empty());
                    break;
                }
                Progress::End => {
                    let used = inflate.position_bits().div_ceil(8) as usize;
                    // What was read ahead comes back.
                    let mut rest = input[used..].to_vec();
                    rest.truncate(at - used);
                    let mut back = Vec::new();
                    while let Some(byte) = inflate.next_byte(&mut piece) {
                        back.push(byte);
                    }
                    assert_eq!(back, rest);
                    return Some((out, used));
                }
                Progress::Block => inflate.track(),
                Progress::Output => {}
            }
            if out.len() > MOST {
                return None;
            }
        }
    }
    None
}

fuzz_target!(|data: (u64, &[u8])| {
    let (split, input) = data;
    let split = if split.is_multiple_of(4) { 0 } else { split | 1 };
    let (ours, oracle) = (ours(input, split), oracle(input));
    if [&ours, &oracle]
        .iter()
        .any(|result| result.as_ref().is_some_and(|(out, _)| out.len() > MOST))
    {
        return;
    }
    assert!(
        ours == oracle,
        "ours: {:?}, zlib-rs: {:?}",
        ours.map(|r| (r.0.len(), r.1)),
        oracle.map(|r| (r.0.len(), r.1))
    );
});
