//! Measures the cost of checksums: `cargo bench --bench device`. It compares reads of a layer's data device, which
//! check every block, with plain reads of the same bytes of the same file.
//!
//! Prints medians of interleaved rounds: cold (the file's pages are dropped before each round) and from the page
//! cache.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use ocifs::device::{CacheBudget, DataDevice, Found};
use ocifs::index::{BitPosition, Compression, DecodeSink as _, Identity, SpanId, SpanIndexBuilder, SpanStart};
use ocifs::oci::{DiffId, Digest};
use ocifs::span::IndexedSpans;
use ocifs::store::{LayerDir, Store};
use ocifs::toc::{Limits, TarReader};

const FILES: usize = 512;
const FILE: usize = 512 << 10;
const SPAN: usize = 1 << 20;
const ROUNDS: usize = 9;

/// Makes a layer of many files whose data device is complete.
fn layer(store: &Store) -> (IndexedSpans, LayerDir) {
    let mut tar = tar::Builder::new(Vec::new());
    let content: Vec<u8> = (0..FILE).map(|i| (i * 7 + i / 251) as u8).collect();
    for file in 0..FILES {
        let mut header = tar::Header::new_ustar();
        header.set_size(FILE as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, format!("f{file}"), &content[..]).unwrap();
    }
    let tar = tar.into_inner().unwrap();
    let blob = Digest::of(b"layer");
    let dir = store.layer(&blob).unwrap();
    let budget = CacheBudget::new(store.clone(), u64::MAX / 2);
    let mut writer = DataDevice::create(store, &dir).unwrap();
    let mut reader = TarReader::new(Limits::default());
    let mut builder = SpanIndexBuilder::new(Compression::Tar).unwrap();
    for (span, bytes) in (0..).zip(tar.chunks(SPAN)) {
        let offset = u64::from(span) * SPAN as u64;
        builder.span(SpanStart {
            span: SpanId(span),
            tar_offset: offset,
            position: BitPosition(8 * offset),
            restart: true,
        });
        builder.bytes(bytes);
        writer.span(span);
        let mut write = |offset, content: &[u8]| assert!(writer.write(offset, content, &budget).unwrap());
        reader.push(bytes, &mut write).unwrap();
    }
    let identity = Identity {
        blob: blob.clone(),
        blob_size: tar.len() as u64,
        diff_id: DiffId(blob),
    };
    let extents = reader.finish().unwrap().extents;
    let spans = IndexedSpans::new(builder.finish(identity).unwrap(), extents);
    writer.finish(&spans, &budget).unwrap().unwrap();
    (spans, dir)
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times[times.len() / 2].as_secs_f64()
}

fn main() {
    let directory = tempfile::tempdir_in(std::env::var_os("CARGO_TARGET_TMPDIR").unwrap_or(".".into())).unwrap();
    let store = Store::open(directory.path()).unwrap();
    let (spans, dir) = layer(&store);
    let file = File::open(dir.data()).unwrap();
    file.sync_all().unwrap();
    println!("| pages | bytes a read | plain us | checked us | ratio |\n|---|---|---|---|---|");
    let mut random = fastrand::Rng::with_seed(1);
    for cold in [true, false] {
        for size in [4096, 128 << 10] {
            let reads = if cold { 400 } else { 4000 };
            let offsets: Vec<u64> = (0..reads)
                .map(|_| random.u64(0..(FILES * FILE - size) as u64) / 4096 * 4096)
                .collect();
            let mut buffer = vec![0; size];
            let (mut plain, mut checked) = (Vec::new(), Vec::new());
            let mut round = |read: &mut dyn FnMut(&DataDevice, u64, &mut [u8])| {
                if cold {
                    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
                }
                // A mount also opens the device before it reads.
                let device = DataDevice::open(&store, &dir, &spans).unwrap();
                let start = Instant::now();
                offsets.iter().for_each(|&offset| read(&device, offset, &mut buffer));
                start.elapsed() / reads
            };
            for _ in 0..ROUNDS {
                plain.push(round(&mut |_, offset, buffer| {
                    file.read_exact_at(buffer, offset).unwrap()
                }));
                checked.push(round(&mut |device, offset, buffer| {
                    assert_eq!(device.read(offset, buffer, |_| true).unwrap(), Found::Bytes);
                }));
            }
            let (plain, checked) = (1e6 * median(plain), 1e6 * median(checked));
            let pages = if cold { "cold" } else { "cached" };
            println!(
                "| {pages} | {size} | {plain:.1} | {checked:.1} | {:.3} |",
                checked / plain
            );
        }
    }
}
