//! Layers of any kind: index them, then read spans through the index and compare with the pass.
//!
//! The input describes content (runs of literals and repeats, so that it gets long and has far references) and how to
//! compress it; or it is the blob itself.
#![no_main]

use std::io::Write;

use arbitrary::Arbitrary;
use flate2::{Compression as Level, GzBuilder};
use libfuzzer_sys::fuzz_target;
use ocifs::index::{
    Compression, DecodeSink, Identity, IndexError, LayerDecoder, SpanId, SpanIndex, SpanIndexBuilder, SpanStart,
};
use ocifs::oci::{DiffId, Digest};

/// Content beyond this makes a run slow without making it different.
const MOST: usize = 1 << 20;

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    blob: Blob<'a>,
    piece: u16,
    first: u16,
    count: u8,
    /// A bit of the blob to flip before the spans are read.
    flip: Option<u32>,
}

#[derive(Arbitrary, Debug)]
enum Blob<'a> {
    Gzip(Vec<Member<'a>>),
    RawGzip(&'a [u8]),
    RawZstd(&'a [u8]),
}

#[derive(Arbitrary, Debug)]
struct Member<'a> {
    level: u8,
    name: Option<u8>,
    parts: Vec<Part<'a>>,
}

#[derive(Arbitrary, Debug)]
enum Part<'a> {
    Literal(&'a [u8]),
    /// Repeats what lies `distance` back.
    Repeat {
        distance: u16,
        length: u16,
    },
    /// Bytes that do not compress.
    Noise {
        seed: u32,
        length: u16,
    },
    Flush,
}

fn compress(member: &Member<'_>, tar: &mut Vec<u8>, blob: &mut Vec<u8>) {
    let mut builder = GzBuilder::new();
    if let Some(name) = member.name {
        builder = builder.filename(vec![name.max(1); 3]);
    }
    let mut gz = builder.write(blob, Level::new(u32::from(member.level % 10)));
    for part in &member.parts {
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
                        .checked_sub(usize::from(distance))
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
            Part::Flush => gz.flush().unwrap(),
        }
        gz.write_all(&tar[from..]).unwrap();
    }
    gz.finish().unwrap();
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
fn pass(compression: Compression, blob: &[u8], piece: usize) -> Result<Option<(Vec<u8>, SpanIndex)>, IndexError> {
    let mut decoder = LayerDecoder::new(compression, 0)?;
    let mut builder = SpanIndexBuilder::new(compression)?;
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
    Ok(Some((
        tar,
        builder.finish(identity).expect("an index of a good layer is good"),
    )))
}

fuzz_target!(|input: Input<'_>| {
    let mut content = Vec::new();
    let (compression, mut blob) = match &input.blob {
        Blob::RawGzip(bytes) => (Compression::Gzip, bytes.to_vec()),
        Blob::RawZstd(bytes) => (Compression::Zstd, bytes.to_vec()),
        Blob::Gzip(members) => {
            let mut blob = Vec::new();
            for member in members.iter().take(8) {
                compress(member, &mut content, &mut blob);
            }
            (Compression::Gzip, blob)
        }
    };
    let made = matches!(input.blob, Blob::Gzip(_)) && !blob.is_empty();
    let piece = usize::from(input.piece).max(1);
    let (tar, index) = match pass(compression, &blob, piece) {
        Ok(Some(passed)) => passed,
        Ok(None) => return,
        Err(error) if made => panic!("{error}"),
        Err(_) => return,
    };
    assert!(!made || tar == content);
    let Some(last) = index.len().checked_sub(1) else { return };
    let first = index.restart_for(SpanId(u32::from(input.first) % index.len() as u32));
    let last = SpanId((first.0 + u32::from(input.count)).min(last as u32));
    let range = index.blob_range(first, last);
    if let Some(bit) = input.flip {
        let at = bit as usize / 8 % blob.len();
        blob[at] ^= 1 << (bit % 8);
    }
    let mut decoder = index.decoder(first, last).unwrap();
    for bytes in blob[range.start as usize..range.end as usize].chunks(piece) {
        let outcome = decoder.push(bytes, &mut |span, bytes: &[u8]| {
            let range = index.tar_range(span);
            assert!(bytes == &tar[range.start as usize..range.end as usize]);
        });
        if let Err(error) = outcome {
            assert!(input.flip.is_some(), "{error}");
            return;
        }
    }
    assert!(decoder.is_done() || input.flip.is_some());
});
