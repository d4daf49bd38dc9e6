//! Stored zstd restarts of any content: decoding from them does not panic, and takes no more memory than it may.
//!
//! The first two bytes are the length of the restart before the other one. The third byte says whether they are
//! compressed already, and otherwise, whether they are one series. The rest are both restarts. The target puts them into
//! an index with a correct checksum.
#![no_main]

use std::io::Write as _;

use libfuzzer_sys::fuzz_target;
use ocifs::index::{SpanId, SpanIndex};
use ocifs::oci::Digest;

const SPAN: u64 = 65536;
const BLOCKS: &[u8] = &[
    // A raw block, a block of one repeated byte, a block of literals without sequences.
    0x28, 0, 0, b'h', b'e', b'l', b'l', b'o', 0x22, 0, 0, b'x', 0x1c, 0, 0, 0x10, b'a', b'b', 0, 0x01, 0, 0,
];

fn index(restarts: [&[u8]; 2]) -> Vec<u8> {
    let mut file = b"ocifspan".to_vec();
    file.extend([3u32, 2].map(u32::to_le_bytes).concat());
    let windows: usize = restarts.iter().map(|restart| restart.len()).sum();
    file.extend([1 << 20, 3 * SPAN, 3, windows as u64].map(u64::to_le_bytes).concat());
    for _ in 0..2 {
        let mut digest = Digest::of(b"").to_string().into_bytes();
        digest.resize(136, 0);
        file.extend(digest);
    }
    let mut window = 0u64;
    for (span, restart) in [&[][..], restarts[0], restarts[1]].iter().enumerate() {
        file.extend(
            [span as u64 * SPAN, span as u64 * 800, window]
                .map(u64::to_le_bytes)
                .concat(),
        );
        // An empty window makes the span an ordinary one.
        let flags = u32::from(span == 0 || !restart.is_empty());
        file.extend([restart.len() as u32, flags].map(u32::to_le_bytes).concat());
        file.extend([0; 32]);
        window += restart.len() as u64;
    }
    file.extend(restarts.concat());
    let checksum = blake3::hash(&file);
    file.extend_from_slice(checksum.as_bytes());
    file
}

/// Compresses restarts as parts of one series, or of two.
fn compressed(restarts: [&[u8]; 2], together: bool) -> [Vec<u8>; 2] {
    let series = || zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
    let mut encoder = series();
    let mut number = 0;
    restarts.map(|plain| {
        if !together {
            (encoder, number) = (series(), 0);
        }
        let from = encoder.get_ref().len();
        encoder.write_all(plain).unwrap();
        encoder.flush().unwrap();
        let piece = [&[number], &encoder.get_ref()[from..]].concat();
        number += 1;
        piece
    })
}

fuzz_target!(|data: &[u8]| {
    let Some((&[low, high, kind], rest)) = data.split_first_chunk() else {
        return;
    };
    let length = usize::from(u16::from_le_bytes([low, high])).min(rest.len());
    let (earlier, later) = rest.split_at(length);
    let stored = match kind & 1 {
        0 => compressed([earlier, later], kind & 2 == 0),
        _ => [earlier, later].map(<[u8]>::to_vec),
    };
    let index = SpanIndex::open(index([&stored[0], &stored[1]])).unwrap();
    for span in index.spans().filter(|&span| index.restart_for(span) == span) {
        // The decoder may take 192 MiB, and libFuzzer watches the memory of the process.
        if let Ok(mut decoder) = index.decoder(span, SpanId(2)) {
            let _ = decoder.push(BLOCKS, &mut |_, _: &[u8]| ());
        }
    }
});
