//! zstd layers: index them, then decode from every restart and compare with the pass.
//!
//! The input describes content (runs of literals and repeats, so that it gets long and has far references), where blocks
//! end and how to compress it; or it is the blob itself.
#![no_main]

use std::io::Write;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use ocifs::index::{
    Compression, DecodeSink, Identity, IndexError, LayerDecoder, SpanId, SpanIndex, SpanIndexBuilder, SpanStart,
};
use ocifs::oci::{DiffId, Digest};

/// Content beyond this makes a run slow without making it different.
const MOST: usize = 1 << 20;

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    piece: u16,
    /// A bit of the blob to flip before it is indexed.
    flip: Option<u32>,
    blob: Blob<'a>,
}

#[derive(Arbitrary, Debug)]
enum Blob<'a> {
    Raw(&'a [u8]),
    Frames(Vec<Frame<'a>>),
}

#[derive(Arbitrary, Debug)]
struct Frame<'a> {
    level: u8,
    checksum: bool,
    window_log: u8,
    parts: Vec<Part<'a>>,
}

#[derive(Arbitrary, Debug)]
enum Part<'a> {
    Literal(&'a [u8]),
    /// Repeats what lies `distance` back.
    Repeat {
        distance: u32,
        length: u16,
    },
    /// Bytes that do not compress.
    Noise {
        seed: u32,
        length: u16,
    },
    EndOfBlock,
}

fn compress(frame: &Frame<'_>, tar: &mut Vec<u8>) -> Vec<u8> {
    let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), i32::from(frame.level % 20)).unwrap();
    encoder.include_checksum(frame.checksum).unwrap();
    encoder.window_log(10 + u32::from(frame.window_log % 12)).unwrap();
    for part in &frame.parts {
        let from = tar.len();
        if from > MOST {
            break;
        }
        match *part {
            Part::Literal(bytes) => tar.extend_from_slice(bytes),
            Part::Repeat { distance, length } => {
                for _ in 0..u32::from(length) * 4 {
                    let byte = tar
                        .len()
                        .checked_sub(distance as usize % MOST)
                        .and_then(|at| tar.get(at))
                        .copied();
                    tar.push(byte.unwrap_or(b'x'));
                }
            }
            Part::Noise { mut seed, length } => {
                for _ in 0..length {
                    seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    tar.push((seed >> 24) as u8);
                }
            }
            Part::EndOfBlock => encoder.flush().unwrap(),
        }
        encoder.write_all(&tar[from..]).unwrap();
    }
    encoder.finish().unwrap()
}

struct Sink<'a>(&'a mut Vec<u8>, &'a mut SpanIndexBuilder);

impl DecodeSink for Sink<'_> {
    fn span(&mut self, start: SpanStart) {
        self.1.span(start);
    }
    fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
        self.1.bytes(bytes);
    }
    fn window(&mut self, span: SpanId, window: Vec<u8>) {
        self.1.window(span, window);
    }
}

/// `Ok(None)`: too large to go on with.
fn pass(blob: &[u8], piece: usize) -> Result<Option<(Vec<u8>, SpanIndex)>, IndexError> {
    let mut decoder = LayerDecoder::new(Compression::Zstd, 0)?;
    let mut builder = SpanIndexBuilder::new(Compression::Zstd)?;
    let mut tar = Vec::new();
    for piece in blob.chunks(piece) {
        decoder.push(piece, &mut Sink(&mut tar, &mut builder))?;
        if tar.len() > 8 * MOST {
            return Ok(None);
        }
    }
    let end = decoder.finish(&mut Sink(&mut tar, &mut builder))?;
    assert_eq!(end.tar_size, tar.len() as u64);
    let identity = Identity {
        blob: Digest::of(b""),
        blob_size: blob.len() as u64,
        diff_id: DiffId(Digest::of(b"")),
    };
    let index = builder.finish(identity).expect("an index of a good layer is good");
    Ok(Some((tar, index)))
}

fn file(index: &SpanIndex) -> Vec<u8> {
    let mut file = Vec::new();
    index.write(&mut file).unwrap();
    file
}

fuzz_target!(|input: Input<'_>| {
    let mut content = Vec::new();
    let mut blob = Vec::new();
    let mut good = false;
    match &input.blob {
        Blob::Raw(bytes) => blob.extend_from_slice(bytes),
        Blob::Frames(frames) => {
            for frame in frames.iter().take(8) {
                blob.extend(compress(frame, &mut content));
            }
            good = !blob.is_empty();
        }
    }
    if let Some(bit) = input.flip.filter(|_| !blob.is_empty()) {
        let at = bit as usize / 8 % blob.len();
        blob[at] ^= 1 << (bit % 8);
        good = false;
    }
    let (tar, index) = match pass(&blob, usize::from(input.piece).max(1)) {
        Ok(Some(passed)) => passed,
        Ok(None) => return,
        Err(error) if good => panic!("{error}"),
        Err(_) => return,
    };
    assert!(!good || tar == content);
    let (_, again) = pass(&blob, blob.len()).unwrap().unwrap();
    assert!(file(&index) == file(&again), "the index depends on the pieces");
    for first in index.spans().filter(|&span| index.restart_for(span) == span) {
        let last = SpanId((first.0 + 3).min(index.len() as u32 - 1));
        let range = index.blob_range(first, last);
        let mut decoder = index.decoder(first, last).unwrap();
        let bytes = &blob[range.start as usize..range.end as usize];
        let decoded = decoder.push(bytes, &mut |span, bytes: &[u8]| {
            let range = index.tar_range(span);
            assert!(bytes == &tar[range.start as usize..range.end as usize]);
        });
        decoded.unwrap();
        assert!(decoder.is_done());
    }
});
