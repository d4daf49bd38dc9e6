//! Measures how fast a gzip or zstd layer is decoded and indexed: `cargo bench --bench decode -- LAYER [ROUNDS]`.
//!
//! Prints MB of output per second of time and of CPU time, and how the first contender compares. A pass over zstd uses
//! two threads. The values are medians over interleaved rounds, so that a busy machine slows all contenders alike.
//!
//! Also prints how many bytes of the layer random reads of 4 KiB fetch. The first read in a group fetches up to its span,
//! the second one the whole group.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::time::{Duration, Instant};

use flate2::{Decompress, FlushDecompress, Status};
use nix::sys::resource::{UsageWho, getrusage};
use ocifs::index::inflate::{Inflate, Progress};
use ocifs::index::{
    Compression, DecodeSink, Identity, LayerDecoder, SPACING, SpanId, SpanIndex, SpanIndexBuilder, SpanStart, sniff,
};
use ocifs::oci::{DiffId, Digest};

const OUT: usize = 256 * 1024;

fn cpu() -> Duration {
    let usage = getrusage(UsageWho::RUSAGE_SELF).unwrap();
    let time = |t: nix::sys::time::TimeVal| Duration::new(t.tv_sec() as u64, t.tv_usec() as u32 * 1000);
    time(usage.user_time()) + time(usage.system_time())
}

fn header_len(gz: &[u8]) -> usize {
    let mut at = 10;
    if gz[3] & 8 != 0 {
        at += gz[at..].iter().position(|&b| b == 0).unwrap() + 1;
    }
    at
}

fn own_raw(gz: &[u8]) -> u64 {
    let mut inflate = Inflate::new();
    let mut input = &gz[header_len(gz)..];
    let mut out = 0;
    loop {
        let progress = inflate.decode(&mut input).unwrap();
        out += inflate.take_output().len() as u64;
        if progress == Progress::End {
            return out;
        }
    }
}

fn flate2_raw(gz: &[u8]) -> u64 {
    let mut inflate = Decompress::new(false);
    let input = &gz[header_len(gz)..];
    let mut out = vec![0; OUT];
    loop {
        let at = inflate.total_in() as usize;
        let status = inflate
            .decompress(&input[at..], &mut out, FlushDecompress::None)
            .unwrap();
        if status == Status::StreamEnd {
            return inflate.total_out();
        }
    }
}

fn zlib_rs_raw(gz: &[u8]) -> u64 {
    let mut inflate = zlib_rs::Inflate::new(false, 15);
    let input = &gz[header_len(gz)..];
    let mut out = vec![0; OUT];
    loop {
        let at = inflate.total_in() as usize;
        let status = inflate
            .decompress(&input[at..], &mut out, zlib_rs::InflateFlush::NoFlush)
            .unwrap();
        if status == zlib_rs::Status::StreamEnd {
            return inflate.total_out();
        }
    }
}

/// A sink that discards all events.
struct Discard;

impl DecodeSink for Discard {
    fn span(&mut self, _: SpanStart) {}
    fn bytes(&mut self, bytes: &[u8]) {
        std::hint::black_box(bytes);
    }
    fn window(&mut self, _: SpanId, window: Vec<u8>) {
        std::hint::black_box(window);
    }
}

fn libzstd(blob: &[u8]) -> u64 {
    let mut decoder = zstd::stream::raw::Decoder::new().unwrap();
    let mut out = vec![0; OUT];
    let (mut at, mut total) = (0, 0);
    loop {
        let status = zstd::stream::raw::Operation::run_on_buffers(&mut decoder, &blob[at..], &mut out).unwrap();
        at += status.bytes_read;
        total += status.bytes_written as u64;
        if at == blob.len() && status.bytes_written < OUT {
            return total;
        }
    }
}

fn pass(blob: &[u8], sink: &mut dyn DecodeSink) -> u64 {
    let mut decoder = LayerDecoder::new(sniff(&blob[..512]).unwrap(), SPACING).unwrap();
    for piece in blob.chunks(64 * 1024) {
        decoder.push(piece, sink).unwrap();
    }
    decoder.finish(sink).unwrap().tar_size
}

fn own_pass(blob: &[u8]) -> u64 {
    pass(blob, &mut Discard)
}

fn own_index(blob: &[u8]) -> u64 {
    build(blob).tar_size()
}

fn build(blob: &[u8]) -> SpanIndex {
    let mut builder = SpanIndexBuilder::new(sniff(&blob[..512]).unwrap()).unwrap();
    pass(blob, &mut builder);
    let digest = Digest::of(b"");
    let identity = Identity {
        diff_id: DiffId(digest.clone()),
        blob: digest,
        blob_size: blob.len() as u64,
    };
    builder.finish(identity).unwrap()
}

/// Name and function of a way to decode a layer. The function returns the size of the tar.
type Contender = (&'static str, fn(&[u8]) -> u64);

const OF_GZIP: [Contender; 5] = [
    ("zlib-rs raw", zlib_rs_raw),
    ("flate2 raw", flate2_raw),
    ("own raw", own_raw),
    ("own first pass", own_pass),
    ("own pass + index", own_index),
];

const OF_ZSTD: [Contender; 3] = [
    ("libzstd", libzstd),
    ("first pass", own_pass),
    ("pass + index", own_index),
];

fn median<T: PartialOrd + Copy>(mut values: Vec<T>) -> T {
    values.sort_by(|a, b| a.partial_cmp(b).unwrap());
    values[values.len() / 2]
}

fn main() {
    let mut args = std::env::args().skip(1).filter(|arg| arg != "--bench");
    let Some(path) = args.next() else {
        eprintln!("usage: cargo bench --bench decode -- LAYER [ROUNDS]");
        return;
    };
    let rounds = args.next().map_or(7, |n| n.parse().unwrap());
    let blob = std::fs::read(path).unwrap();
    let contenders = match sniff(&blob[..512]).unwrap() {
        Compression::Zstd => &OF_ZSTD[..],
        _ => &OF_GZIP[..],
    };
    let mut rates = vec![Vec::new(); contenders.len()];
    for _ in 0..rounds {
        for ((_, run), rates) in contenders.iter().zip(&mut rates) {
            let (start, start_cpu) = (Instant::now(), cpu());
            let megabytes = run(&blob) as f64 / 1e6;
            let (time, cpu) = (start.elapsed(), cpu() - start_cpu);
            rates.push((megabytes / time.as_secs_f64(), megabytes / cpu.as_secs_f64()));
        }
    }
    let medians: Vec<(f64, f64)> = rates
        .iter()
        .map(|rates| {
            let (times, cpus) = rates.iter().copied().unzip();
            (median::<f64>(times), median::<f64>(cpus))
        })
        .collect();
    let first = medians[0];
    for ((name, _), (time, cpu)) in contenders.iter().zip(&medians) {
        println!(
            "{name:18} {time:6.0} MB/s  {:.2}x   of CPU {cpu:6.0} MB/s  {:.2}x",
            time / first.0,
            cpu / first.1
        );
    }
    let index = build(&blob);
    let mut file = Vec::new();
    index.write(&mut file).unwrap();
    let restarts = index.spans().filter(|&span| index.restart_for(span) == span).count();
    println!(
        "index: {} bytes, {:.2} % of the layer of {} bytes, {} bytes of tar, {} spans, {restarts} restarts",
        file.len(),
        file.len() as f64 * 100.0 / blob.len() as f64,
        blob.len(),
        index.tar_size(),
        index.len(),
    );
    println!(
        "one span: {:.2} ms of CPU, median",
        span_read(&index, &blob).as_secs_f64() * 1e3
    );
    println!("a random read fetches {} bytes, mean", mean_read(&index));
    for reads in [10, 50, 200] {
        println!(
            "{reads} random reads fetch {} bytes, median",
            random_reads(&index, reads)
        );
    }
}

/// Returns the bytes of the blob that a random read fetches, if nothing is local.
fn mean_read(index: &SpanIndex) -> u64 {
    let fetched = index.spans().map(|span| {
        let range = index.blob_range(index.restart_for(span), span);
        let tar = index.tar_range(span);
        u128::from(range.end - range.start) * u128::from(tar.end - tar.start)
    });
    (fetched.sum::<u128>() / u128::from(index.tar_size())) as u64
}

/// Returns the bytes of the blob that random reads fetch. The value is the median over some sets of reads.
fn random_reads(index: &SpanIndex, reads: usize) -> u64 {
    let fetched = (0..15).map(|seed| {
        let mut rng = fastrand::Rng::with_seed(seed);
        // The first span of each touched group that is not local.
        let mut local: HashMap<SpanId, SpanId> = HashMap::new();
        let mut fetched = 0;
        for _ in 0..reads {
            let span = index.span_at(rng.u64(0..index.tar_size())).unwrap();
            let group = index.group(span);
            let last = match local.get(&SpanId(group.start)) {
                Some(next) if span < *next => continue,
                Some(_) => SpanId(group.end - 1),
                None => span,
            };
            let range = index.blob_range(SpanId(group.start), last);
            fetched += range.end - range.start;
            local.insert(SpanId(group.start), SpanId(last.0 + 1));
        }
        fetched
    });
    median(fetched.collect())
}

/// Returns the CPU time to decode and verify one span, with its window. The value is the median over spans from all
/// over the layer.
fn span_read(index: &SpanIndex, blob: &[u8]) -> Duration {
    let mut times: Vec<Duration> = index
        .spans()
        .filter(|&span| index.restart_for(span) == span)
        .map(|span| {
            let start = cpu();
            let range = index.blob_range(span, span);
            let mut decoder = index.decoder(span, span).unwrap();
            let bytes = &blob[range.start as usize..range.end as usize];
            decoder
                .push(bytes, &mut |_, bytes: &[u8]| {
                    std::hint::black_box(bytes);
                })
                .unwrap();
            cpu() - start
        })
        .collect();
    times.sort();
    times[times.len() / 2]
}
