//! The index as a file: read at any place, damaged, forged.

use std::sync::LazyLock;

use ocifs::index::{IndexError, SPACING, SpanId, SpanIndex};
use ocifs::oci::{DiffId, Digest};
use proptest::prelude::*;

use super::{CONTENT, file, gzip, pass, read};

static READ: LazyLock<(Vec<u8>, SpanIndex)> = LazyLock::new(|| {
    let blob = gzip("-6", &CONTENT);
    let (_, index, _) = pass(&blob, SPACING, 1 << 16, 1 << 16).unwrap();
    (blob, index)
});

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_range_of_the_tar_can_be_read(at: prop::sample::Index, length in 1usize..2_000_000, most in 1usize..100_000) {
        let (blob, index) = &*READ;
        let from = at.index(CONTENT.len());
        let to = (from + length).min(CONTENT.len());
        let first = index.restart_for(index.span_at(from as u64).unwrap());
        let last = index.span_at(to as u64 - 1).unwrap();
        let bytes = read(index, blob, first, last, most).unwrap();
        let skip = from - index.tar_range(first).start as usize;
        prop_assert!(bytes[skip..skip + to - from] == CONTENT[from..to]);
    }

    #[test]
    fn a_flipped_bit_never_delivers_wrong_bytes(at: prop::sample::Index, bit in 0u8..8, zstd: bool) {
        let tar = &CONTENT[..600_000];
        let mut blob = if zstd { zstd::bulk::compress(tar, 3).unwrap() } else { gzip("-6", tar) };
        let (_, index, _) = pass(&blob, 64 << 10, 1 << 16, 1 << 16).unwrap();
        let at = at.index(blob.len());
        blob[at] ^= 1 << bit;
        drop(pass(&blob, 64 << 10, 1 << 16, 1 << 16));
        let last = SpanId(index.len() as u32 - 1);
        for first in index.spans().filter(|&span| index.restart_for(span) == span) {
            let range = index.blob_range(first, last);
            let mut decoder = index.decoder(first, last).unwrap();
            let outcome = decoder.push(&blob[range.start as usize..range.end as usize], &mut |span, bytes: &[u8]| {
                let range = index.tar_range(span);
                assert!(bytes == &tar[range.start as usize..range.end as usize]);
            });
            prop_assert!(outcome.is_ok() || !decoder.is_done());
        }
    }

    #[test]
    fn a_damaged_index_is_refused(at: prop::sample::Index, byte: u8) {
        let mut bytes = file(&READ.1);
        let at = at.index(bytes.len());
        prop_assume!(bytes[at] != byte);
        bytes[at] = byte;
        prop_assert!(SpanIndex::open(bytes).is_err());
    }

    /// A forged index with a correct checksum may be accepted. Using it must not panic.
    #[test]
    fn a_forged_index_does_not_panic(edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4)) {
        let mut bytes = file(&READ.1);
        let content = bytes.len() - 32;
        let table = 320 + 64 * READ.1.len();
        for (n, (at, byte)) in edits.into_iter().enumerate() {
            let limit = if n == 0 { table } else { content };
            bytes[at.index(limit)] = byte;
        }
        let checksum = blake3::hash(&bytes[..content]);
        bytes[content..].copy_from_slice(checksum.as_bytes());
        if let Ok(index) = SpanIndex::open(bytes) {
            let blob = &READ.0;
            for span in index.spans() {
                let first = index.restart_for(span);
                let range = index.blob_range(first, span);
                let end = (range.end as usize).min(blob.len());
                if let Ok(mut decoder) = index.decoder(first, span) {
                    let start = (range.start as usize).min(end);
                    drop(decoder.push(&blob[start..end], &mut |_, _: &[u8]| ()));
                }
            }
        }
    }
}

#[test]
fn the_index_survives_its_file() {
    let bytes = file(&READ.1);
    let index = SpanIndex::open(bytes.clone()).unwrap();
    assert!(file(&index) == bytes);
    assert_eq!(*index.blob_digest(), Digest::of(&READ.0));
    assert_eq!(*index.diff_id(), DiffId(Digest::of(&CONTENT)));
    assert_eq!(
        (index.blob_size(), index.tar_size()),
        (READ.0.len() as u64, CONTENT.len() as u64)
    );
    for span in index.spans() {
        let range = index.tar_range(span);
        let content = &CONTENT[range.start as usize..range.end as usize];
        assert_eq!(index.digest(span), blake3::hash(content).as_bytes());
    }
    let mut newer = bytes;
    newer[8] = 9;
    assert!(matches!(
        SpanIndex::open(newer),
        Err(IndexError::Version { found: 9, known: 3 })
    ));
}

/// Decoding works from every restart to the end of the blob, not only to the next restart.
#[test]
fn every_restart_leads_to_the_end() {
    let (blob, index) = &*READ;
    let last = SpanId(index.len() as u32 - 1);
    for first in index.spans().filter(|&span| index.restart_for(span) == span) {
        let from = index.tar_range(first).start as usize;
        assert!(
            read(index, blob, first, last, 100_000).unwrap() == CONTENT[from..],
            "from span {first}"
        );
    }
}
