//! Measures how soon a layer's own table of contents is usable after its bytes came: `cargo bench --bench table -- [ENTRIES]`.
//!
//! Prints medians in milliseconds for a table of 50,000 files, or as many as asked for, in both formats:
//! - reading the table: digests, decompression, JSON, the tables and the map of chunks;
//! - making the tree of the image, whose only layer this is: merging, and writing the EROFS image to memory.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::time::{Duration, Instant};

use ocifs::erofs;
use ocifs::oci::Digest;
use ocifs::span::{ChunkSpans, SpanMap as _};
use ocifs::toc::carried::TableRef;
use ocifs::tree::{LayerIdx, Merger};

const ENTRIES: usize = 50_000;
/// Files in a directory.
const SIBLINGS: usize = 50;
/// Bytes of a file, compressed and not.
const PACKED: usize = 1000;
const SIZE: usize = 3000;
const ROUNDS: usize = 9;

/// A table, as it lies in its blob.
struct Carried {
    table: TableRef,
    /// The table and what follows, as they are fetched.
    bytes: Vec<u8>,
}

/// Returns the JSON of a table, and where the content before it ends in the blob.
fn json(entries: usize) -> (String, usize) {
    let mut json = String::from("{\"version\":1,\"entries\":[");
    let mut offset = 0;
    for i in 0..entries {
        let separator = if i == 0 { "" } else { "," };
        let directory = format!("usr/lib/package-{}/", i / SIBLINGS);
        let digest = Digest::of(&i.to_le_bytes());
        let attributes = "\"modtime\":\"2024-05-06T07:08:09Z\",\"uid\":0,\"gid\":0";
        let end = offset + PACKED;
        match i % SIBLINGS {
            0 => write!(
                json,
                "{separator}{{\"type\":\"dir\",\"name\":\"{directory}\",\"mode\":493,{attributes}}}"
            ),
            _ => write!(
                json,
                "{separator}{{\"type\":\"reg\",\"name\":\"{directory}file-{i}.txt\",\"mode\":420,{attributes},\
                 \"size\":{SIZE},\"digest\":\"{digest}\",\"chunkDigest\":\"{digest}\",\"offset\":{offset},\
                 \"endOffset\":{end}}}"
            ),
        }
        .unwrap();
        if i % SIBLINGS != 0 {
            offset = end;
        }
    }
    json.push_str("]}");
    (json, offset)
}

fn chunked(json: &str, content: usize) -> Carried {
    let packed = zstd::encode_all(json.as_bytes(), 3).unwrap();
    let start = content + 8;
    let prefix = "io.github.containers.zstd-chunked.manifest";
    let annotations = BTreeMap::from([
        (format!("{prefix}-checksum"), Digest::of(&packed).to_string()),
        (
            format!("{prefix}-position"),
            format!("{start}:{}:{}:1", packed.len(), json.len()),
        ),
    ]);
    let size = (start + packed.len()) as u64;
    Carried {
        table: TableRef::in_annotations(&annotations, size).unwrap().unwrap(),
        bytes: packed,
    }
}

fn estargz(json: &str, content: usize) -> Carried {
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(json.len() as u64);
    header.set_mode(0o444);
    tar.append_data(&mut header, "stargz.index.json", json.as_bytes())
        .unwrap();
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
    packed.write_all(&tar.into_inner().unwrap()).unwrap();
    let mut bytes = packed.finish().unwrap();
    let offset = format!("{content:016x}STARGZ");
    bytes.extend_from_slice(b"\x1f\x8b\x08\x04\0\0\0\0\0\xff\x1a\0SG\x16\0");
    bytes.extend_from_slice(offset.as_bytes());
    bytes.extend_from_slice(b"\x01\0\0\xff\xff\0\0\0\0\0\0\0\0");
    let digest = Digest::of(json.as_bytes()).to_string();
    let annotations = BTreeMap::from([("containerd.io/snapshot/stargz/toc.digest".to_owned(), digest)]);
    let size = (content + bytes.len()) as u64;
    Carried {
        table: TableRef::in_annotations(&annotations, size).unwrap().unwrap(),
        bytes,
    }
}

/// Returns how long it takes to read the table, and to make the tree.
fn round(carried: &Carried) -> [Duration; 2] {
    let begun = Instant::now();
    let place = carried.table.table_range(&carried.bytes).unwrap();
    let len = (place.end - place.start) as usize;
    let tables = carried.table.read(place, &carried.bytes[..len]).unwrap();
    let spans = ChunkSpans::new(Digest::of(b"layer"), tables.chunks, tables.tables.extents).unwrap();
    let read = begun.elapsed();
    let begun = Instant::now();
    let mut merger = Merger::new();
    merger.add(LayerIdx(0), &tables.tables.toc).unwrap();
    let tree = merger.finish();
    let mut image = Vec::new();
    erofs::write(&tree, &[spans.device_size()], &Digest::of(b"manifest"), &mut image).unwrap();
    [read, begun.elapsed()]
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort();
    times[times.len() / 2].as_secs_f64() * 1e3
}

fn main() {
    let asked = std::env::args().skip(1).find_map(|argument| argument.parse().ok());
    let entries: usize = asked.unwrap_or(ENTRIES);
    let (json, content) = json(entries);
    for (name, carried) in [
        ("zstd:chunked", chunked(&json, content)),
        ("eStargz", estargz(&json, content)),
    ] {
        let rounds: Vec<[Duration; 2]> = (0..ROUNDS).map(|_| round(&carried)).collect();
        let [read, tree] = [0, 1].map(|part| median(rounds.iter().map(|times| times[part]).collect()));
        println!(
            "{name:<13} {entries} entries, {} bytes packed, {} as JSON: read in {read:.1} ms, tree in {tree:.1} ms",
            carried.bytes.len(),
            json.len(),
        );
    }
}
