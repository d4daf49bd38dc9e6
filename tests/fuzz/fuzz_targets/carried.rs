//! Tables that layers carry: errors are fine, panics are bugs, memory stays in proportion to the input.
#![no_main]

use std::collections::BTreeMap;

use libfuzzer_sys::fuzz_target;
use ocifs::oci::Digest;
use ocifs::span::{ChunkSpans, SpanMap};
use ocifs::toc::ChunkTable;
use ocifs::toc::carried::TableRef;

/// Bytes of the blob before the table.
const CONTENT: u64 = 1 << 20;

// The first byte chooses the dialect; the rest is the JSON of a table, or a stored chunk table.
fuzz_target!(|data: &[u8]| {
    let Some((&choice, data)) = data.split_first() else {
        return;
    };
    match choice {
        0..=79 => table("io.github.containers.zstd-chunked", false, data),
        80..=159 => table("io.containers.zstd-chunked", true, data),
        _ => chunks(data),
    }
});

/// Whatever is read must be consistent and survive its encoding.
fn table(prefix: &str, stargz: bool, json: &[u8]) {
    let packed = frame(json);
    let end = CONTENT + packed.len() as u64;
    let mut annotations = BTreeMap::from([
        (format!("{prefix}.manifest-checksum"), Digest::of(&packed).to_string()),
        (
            format!("{prefix}.manifest-position"),
            format!("{CONTENT}:{}:{}:1", packed.len(), json.len()),
        ),
    ]);
    if stargz {
        let key = "containerd.io/snapshot/stargz/toc.digest";
        annotations.insert(key.to_owned(), Digest::of(json).to_string());
    }
    let table = TableRef::in_annotations(&annotations, end).expect("the annotations are good");
    let table = table.expect("the annotations name a table");
    let Ok(read) = table.read(CONTENT..end, &packed) else {
        return;
    };
    read.tables.toc.unpack().expect("packed just now");
    let mut encoded = Vec::new();
    read.chunks.write(&mut encoded).expect("writing to memory");
    assert_eq!(ChunkTable::open(&encoded).as_ref(), Ok(&read.chunks));
    let spans = ChunkSpans::new(Digest::of(b""), read.chunks, read.tables.extents).expect("both are of one layer");
    for span in 0..spans.span_count().min(1000) {
        let group = spans.group(span);
        assert!(group.contains(&span) && spans.restart_for(span) == group.start);
        assert!(spans.blob_range(group).end <= CONTENT);
        assert!(
            spans
                .pieces(span)
                .iter()
                .all(|piece| piece.device + piece.len <= spans.device_size())
        );
    }
}

/// Wraps bytes into a zstd frame of raw blocks (RFC 8878, 3.1.1).
fn frame(bytes: &[u8]) -> Vec<u8> {
    // One segment, and a size of content in four bytes.
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0xa0];
    frame.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
    let mut blocks = bytes.chunks(64 << 10).peekable();
    if bytes.is_empty() {
        frame.extend_from_slice(&[1, 0, 0]);
    }
    while let Some(block) = blocks.next() {
        let head = (block.len() as u32) << 3 | u32::from(blocks.peek().is_none());
        frame.extend_from_slice(&head.to_le_bytes()[..3]);
        frame.extend_from_slice(block);
    }
    frame
}

/// Makes the last 32 bytes the checksum, or nothing behind it would ever be reached.
fn chunks(data: &[u8]) {
    let content = &data[..data.len().saturating_sub(32)];
    let bytes = [content, blake3::hash(content).as_bytes()].concat();
    if let Ok(table) = ChunkTable::open(&bytes) {
        let mut encoded = Vec::new();
        table.write(&mut encoded).expect("writing to memory");
        assert_eq!(ChunkTable::open(&encoded), Ok(table));
    }
}
