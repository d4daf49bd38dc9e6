//! Measures how fast a gzip layer is decoded and indexed: `cargo bench --bench decode -- LAYER.gz [ROUNDS]`.
//!
//! Prints MB of output per second of CPU time. The values are medians over interleaved rounds, so that a busy machine
//! slows all contenders alike.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use flate2::{Decompress, FlushDecompress, Status};
use nix::sys::resource::{UsageWho, getrusage};
use ocifs::index::inflate::{Inflate, Progress};
use ocifs::index::{
    Compression, DecodeSink, Identity, LayerDecoder, SPACING, SpanId, SpanIndex, SpanIndexBuilder, SpanStart,
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

fn pass(gz: &[u8], sink: &mut dyn DecodeSink) -> u64 {
    let mut decoder = LayerDecoder::new(Compression::Gzip, SPACING).unwrap();
    for piece in gz.chunks(64 * 1024) {
        decoder.push(piece, sink).unwrap();
    }
    decoder.finish(sink).unwrap().tar_size
}

fn own_pass(gz: &[u8]) -> u64 {
    pass(gz, &mut Discard)
}

fn own_index(gz: &[u8]) -> u64 {
    build(gz).tar_size()
}

fn build(gz: &[u8]) -> SpanIndex {
    let mut builder = SpanIndexBuilder::new(Compression::Gzip).unwrap();
    pass(gz, &mut builder);
    let digest = Digest::of(b"");
    let identity = Identity {
        diff_id: DiffId(digest.clone()),
        blob: digest,
        blob_size: gz.len() as u64,
    };
    builder.finish(identity).unwrap()
}

/// Name and function of a way to decode a layer. The function returns the size of the tar.
type Contender = (&'static str, fn(&[u8]) -> u64);

const CONTENDERS: [Contender; 5] = [
    ("zlib-rs raw", zlib_rs_raw),
    ("flate2 raw", flate2_raw),
    ("own raw", own_raw),
    ("own first pass", own_pass),
    ("own pass + index", own_index),
];

fn main() {
    let mut args = std::env::args().skip(1).filter(|arg| arg != "--bench");
    let Some(path) = args.next() else {
        eprintln!("usage: cargo bench --bench decode -- LAYER.gz [ROUNDS]");
        return;
    };
    let rounds = args.next().map_or(7, |n| n.parse().unwrap());
    let gz = std::fs::read(path).unwrap();
    let mut rates = vec![Vec::new(); CONTENDERS.len()];
    for _ in 0..rounds {
        for ((_, run), rates) in CONTENDERS.iter().zip(&mut rates) {
            let start = cpu();
            let bytes = run(&gz);
            rates.push(bytes as f64 / 1e6 / (cpu() - start).as_secs_f64());
        }
    }
    let medians: Vec<f64> = rates
        .iter_mut()
        .map(|rates| {
            rates.sort_by(f64::total_cmp);
            rates[rates.len() / 2]
        })
        .collect();
    for ((name, _), median) in CONTENDERS.iter().zip(&medians) {
        println!("{name:18} {median:6.0} MB/s  {:.2}x", median / medians[0]);
    }
    let index = build(&gz);
    let mut file = Vec::new();
    index.write(&mut file).unwrap();
    let restarts = index.spans().filter(|&span| index.restart_for(span) == span).count();
    println!(
        "index: {} bytes, {:.2} % of the layer, {} spans, {restarts} restarts",
        file.len(),
        file.len() as f64 * 100.0 / gz.len() as f64,
        index.len(),
    );
    println!(
        "one span: {:.2} ms of CPU, median",
        span_read(&index, &gz).as_secs_f64() * 1e3
    );
}

/// Returns the CPU time to decode and verify one span, with its window. The value is the median over spans from all
/// over the layer.
fn span_read(index: &SpanIndex, gz: &[u8]) -> Duration {
    let mut times: Vec<Duration> = index
        .spans()
        .filter(|&span| index.restart_for(span) == span)
        .map(|span| {
            let start = cpu();
            let range = index.blob_range(span, span);
            let mut decoder = index.decoder(span, span).unwrap();
            let bytes = &gz[range.start as usize..range.end as usize];
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
