//! Restarts inside zstd frames, of all programs that write zstd layers.

use std::fs;
use std::io::Write as _;

use ocifs::index::{Compression, SPACING, SpanId, SpanIndex, sniff};
use proptest::prelude::*;

use super::{CONTENT, check, file, filter, gzip, pass, random, read};
use crate::common::docker_registry::skopeo_copy;
use crate::common::layers::Blob;
use crate::common::oci_layout;

fn restarts(index: &SpanIndex) -> usize {
    index.spans().filter(|&span| index.restart_for(span) == span).count()
}

/// Checks that decoding from each restart to the end of the blob gives the rest of `tar`. Returns the number of restarts.
fn check_to_the_end(blob: &[u8], tar: &[u8]) -> usize {
    let index = check(blob, tar);
    let last = SpanId(index.len() as u32 - 1);
    for first in index.spans().filter(|&span| index.restart_for(span) == span) {
        let from = index.tar_range(first).start as usize;
        let rest = read(&index, blob, first, last, 1 << 20).unwrap();
        assert!(rest == tar[from..], "from span {first}");
    }
    restarts(&index)
}

#[test]
fn frames_of_every_level_have_restarts() {
    for (args, tar) in [
        (&["-1"][..], &CONTENT[..]),
        (&["-3"], &CONTENT),
        (&["-9"], &CONTENT),
        (&["-19"], &CONTENT[..5 << 20]),
        (&["-3", "--no-check", "--long=27"], &CONTENT),
        (&["--ultra", "-22"], &CONTENT[..3 << 20]),
    ] {
        let blob = filter("zstd", &[args, &["-c"]].concat(), tar);
        let restarts = check_to_the_end(&blob, tar);
        // How many there are depends on the content. With a large window, a restart needs more of it.
        let least = if args.contains(&"-22") || args.contains(&"-9") {
            1
        } else {
            2
        };
        assert!(restarts >= least, "{args:?}: {restarts} restarts");
    }
}

#[test]
fn many_frames_with_restarts_inside_them() {
    let directory = tempfile::tempdir().unwrap();
    let (plain, packed) = (directory.path().join("plain"), directory.path().join("packed"));
    fs::write(&plain, &*CONTENT).unwrap();
    filter(
        "pzstd",
        &["-q", "-p2", plain.to_str().unwrap(), "-o", packed.to_str().unwrap()],
        b"",
    );
    check_to_the_end(&fs::read(packed).unwrap(), &CONTENT);

    // As the seekable format: frames, then their sizes in a skippable frame.
    let mut blob = Vec::new();
    let mut sizes = Vec::new();
    for frame in CONTENT.chunks(2 << 20) {
        let compressed = filter("zstd", &["-c"], frame);
        sizes.extend((compressed.len() as u32).to_le_bytes());
        sizes.extend((frame.len() as u32).to_le_bytes());
        blob.extend(compressed);
    }
    let count = (sizes.len() / 8) as u32;
    sizes.extend(count.to_le_bytes());
    sizes.extend([0, 0xb1, 0xea, 0x92, 0x8f]);
    blob.extend(0x184d_2a5eu32.to_le_bytes());
    blob.extend((sizes.len() as u32).to_le_bytes());
    blob.extend(sizes);
    assert!(check_to_the_end(&blob, &CONTENT) > count as usize);

    // Frames and skippable frames without any content, between others.
    let empty = filter("zstd", &["-c"], b"");
    let skippable = [0x50, 0x2a, 0x4d, 0x18, 0, 0, 0, 0];
    let full = filter("zstd", &["-c"], &CONTENT[..2 << 20]);
    let blob = [&empty[..], &skippable, &full, &skippable, &empty, &empty, &full].concat();
    check_to_the_end(&blob, &CONTENT[..2 << 20].repeat(2));
}

/// Compresses parts of `tar` and ends a block behind each of them.
fn in_blocks(tar: &[u8], level: i32, lengths: impl Fn(&mut fastrand::Rng) -> usize) -> Vec<u8> {
    let mut rng = fastrand::Rng::with_seed(9);
    let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), level).unwrap();
    let mut rest = tar;
    while !rest.is_empty() {
        let (head, tail) = rest.split_at(lengths(&mut rng).min(rest.len()));
        encoder.write_all(head).unwrap();
        encoder.flush().unwrap();
        rest = tail;
    }
    encoder.finish().unwrap()
}

#[test]
fn tiny_blocks() {
    let tar = &CONTENT[..2 << 20];
    for level in [1, 3, 12] {
        let blob = in_blocks(tar, level, |rng| 1 << rng.u32(0..14));
        assert!(check_to_the_end(&blob, tar) > 1, "level {level}");
    }
}

/// Runs, noise, and records of one length: they give blocks and tables of one symbol, and raw blocks.
#[test]
fn blocks_and_tables_of_one_symbol() {
    let mut rng = fastrand::Rng::with_seed(11);
    let mut tar = Vec::new();
    while tar.len() < 6 << 20 {
        match rng.u8(0..5) {
            0 => tar.resize(tar.len() + rng.usize(1..300_000), rng.u8(..)),
            1 => tar.extend(random(rng.usize(1..200_000), rng.u64(..))),
            2 => tar.extend_from_slice(&CONTENT[rng.usize(0..1 << 20)..][..200_000]),
            3 => {
                for _ in 0..rng.usize(1..20_000) {
                    tar.extend(rng.u64(..).to_le_bytes());
                    tar.extend_from_slice(b"a record of one length, with noise");
                }
            }
            _ => {
                let from = tar.len().saturating_sub(rng.usize(1..1 << 20));
                let copy = tar[from..].to_vec();
                tar.extend(copy);
            }
        }
    }
    for level in [1, 3, 9, 19] {
        let blob = in_blocks(&tar, level, |rng| rng.usize(1..200_000));
        assert!(check_to_the_end(&blob, &tar) > 0, "level {level}");
    }
}

/// klauspost/compress: skopeo, podman, buildah and docker push its streams.
#[test]
fn what_container_tools_write() {
    let directory = tempfile::tempdir().unwrap();
    let (plain, packed) = (directory.path().join("plain"), directory.path().join("packed"));
    let image = oci_layout::write(&plain, &[Blob::plain(CONTENT.clone())]);
    let format = ["--dest-compress-format", "zstd"];
    skopeo_copy(&format, &image, &format!("oci:{}:latest", packed.display()));
    let mut layers = 0;
    for entry in fs::read_dir(packed.join("blobs/sha256")).unwrap() {
        let blob = fs::read(entry.unwrap().path()).unwrap();
        if sniff(&blob) == Ok(Compression::Zstd) {
            assert!(check_to_the_end(&blob, &CONTENT) > 1);
            layers += 1;
        }
    }
    assert_eq!(layers, 1);
}

/// The index stays small, however much the restarts need.
#[test]
fn the_index_stays_small() {
    let tar = CONTENT.repeat(2);
    for (level, spacing) in [("-3", SPACING), ("-3", 64 << 10), ("-12", 64 << 10)] {
        let blob = filter("zstd", &[level, "-c"], &tar);
        let (_, index, _) = pass(&blob, spacing, 1 << 16, 1 << 16).unwrap();
        let size = file(&index).len();
        let share = size as f64 / blob.len() as f64;
        // Besides restarts, the index has a header, and 64 bytes for each span.
        assert!(share < 0.016 + 500.0 / blob.len() as f64, "{share}, {size} bytes");
    }
}

#[test]
fn a_frame_that_needs_a_dictionary_is_refused() {
    let dictionary = zstd::dict::from_continuous(&CONTENT[..100_000], &[1000; 100], 10_000).unwrap();
    let mut compressor = zstd::bulk::Compressor::with_dictionary(3, &dictionary).unwrap();
    let blob = compressor.compress(&CONTENT[..1 << 20]).unwrap();
    let error = pass(&blob, SPACING, 1, 10_000).map(drop).unwrap_err();
    assert!(error.to_string().contains("ictionary"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// The index is a function of the blob: it does not depend on the pieces in which the blob arrives.
    #[test]
    fn any_pieces_give_the_same_index(least in 1usize..40_000, more in 0usize..40_000, zstd: bool, spacing in 60_000u64..1_100_000) {
        // A run gives blocks that are longer than a span.
        let tar = [&CONTENT[..2 << 20], &vec![7; 3 << 20], &CONTENT[2 << 20..3 << 20]].concat();
        let blob = match zstd {
            true => filter("zstd", &["-c"], &tar),
            false => gzip("-6", &tar),
        };
        let (_, whole, _) = pass(&blob, spacing, blob.len(), blob.len()).unwrap();
        let (_, pieces, _) = pass(&blob, spacing, least, least + more).unwrap();
        prop_assert!(file(&whole) == file(&pieces));
    }
}

/// Single bytes are the smallest pieces.
#[test]
fn single_bytes_give_the_same_index() {
    let tar = [&CONTENT[..1 << 20], &vec![7; 3 << 20], &CONTENT[1 << 20..2 << 20]].concat();
    for blob in [
        filter("zstd", &["-c"], &tar),
        gzip("-6", &tar),
        gzip("-6", &random(3 << 20, 4)),
    ] {
        let (_, whole, _) = pass(&blob, 64 << 10, blob.len(), blob.len()).unwrap();
        let (_, pieces, _) = pass(&blob, 64 << 10, 1, 1).unwrap();
        assert!(file(&whole) == file(&pieces));
    }
}
