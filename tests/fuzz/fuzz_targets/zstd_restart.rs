//! Stored zstd restarts of any content: decoding from them does not panic, and takes no more memory than it may.
//!
//! The first two bytes are the length of the restart before the other one. The third byte says whether they are
//! compressed already. The rest are both restarts. The target puts them into an index with a correct checksum.
#![no_main]

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
    file.extend([2u32, 2].map(u32::to_le_bytes).concat());
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

fuzz_target!(|data: &[u8]| {
    let Some((&[low, high, compressed], rest)) = data.split_first_chunk() else {
        return;
    };
    let length = usize::from(u16::from_le_bytes([low, high])).min(rest.len());
    let (earlier, later) = rest.split_at(length);
    let stored = [earlier, later].map(|plain| match compressed & 1 {
        0 if !plain.is_empty() => zstd::bulk::compress(plain, 1).unwrap(),
        _ => plain.to_vec(),
    });
    let index = SpanIndex::open(index([&stored[0], &stored[1]])).unwrap();
    for span in index.spans().filter(|&span| index.restart_for(span) == span) {
        // The decoder may take 192 MiB, and libFuzzer watches the memory of the process.
        if let Ok(mut decoder) = index.decoder(span, SpanId(2)) {
            let _ = decoder.push(BLOCKS, &mut |_, _: &[u8]| ());
        }
    }
});
