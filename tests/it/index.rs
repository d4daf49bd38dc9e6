//! The span index against the programs that make and read layers: gzip, pigz, zstd, zlib.

mod file;
mod frames;
mod members;
mod writers;

use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::LazyLock;

use ocifs::index::{
    Compression, DecodeSink, Identity, IndexError, LayerDecoder, LayerEnd, MAX_SPAN, SPACING, SpanId, SpanIndex,
    SpanIndexBuilder, SpanStart, sniff,
};
use ocifs::oci::{DiffId, Digest};

/// Some megabytes of typical layer content: programs, texts, tables.
static CONTENT: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut content = Vec::new();
    for (dir, limit) in [("/usr/bin", 4 << 20), ("/usr/share", 7 << 20), ("/usr/lib", 9 << 20)] {
        collect(Path::new(dir), limit, &mut content);
    }
    assert!(content.len() > 4 << 20, "this machine has no files to make a layer of");
    content
});

fn collect(dir: &Path, limit: usize, content: &mut Vec<u8>) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    for path in paths {
        if content.len() >= limit {
            return;
        }
        let Ok(meta) = path.symlink_metadata() else { continue };
        if meta.is_dir() {
            collect(&path, limit, content);
        } else if meta.is_file() && meta.len() < 1 << 20 {
            content.extend(fs::read(&path).unwrap_or_default());
        }
    }
}

fn random(length: usize, seed: u64) -> Vec<u8> {
    let mut rng = fastrand::Rng::with_seed(seed);
    std::iter::repeat_with(|| rng.u8(..)).take(length).collect()
}

/// Runs a program with `input` on its standard input. Returns its output.
fn filter(program: &str, args: &[&str], input: &[u8]) -> Vec<u8> {
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("these tests need {program}: {error}"));
    let mut stdin = child.stdin.take().unwrap();
    let output = std::thread::scope(|scope| {
        scope.spawn(move || stdin.write_all(input).unwrap());
        child.wait_with_output().unwrap()
    });
    assert!(output.status.success(), "{program} {args:?}");
    output.stdout
}

fn gzip(level: &str, input: &[u8]) -> Vec<u8> {
    filter("gzip", &[level, "-nc"], input)
}

/// Compresses with zlib, with flags and strategies that other programs do not offer. Returns a gzip stream.
fn zlib(strategy: &str, flush: &str, input: &[u8]) -> Vec<u8> {
    let script = format!(
        "import sys,zlib\n\
         data=sys.stdin.buffer.read()\n\
         z=zlib.compressobj(6,zlib.DEFLATED,31,8,zlib.{strategy})\n\
         for i in range(0,len(data),50000):\n\
         \x20 sys.stdout.buffer.write(z.compress(data[i:i+50000])+z.flush(zlib.{flush}))\n\
         sys.stdout.buffer.write(z.flush())"
    );
    filter("python3", &["-c", &script], input)
}

/// Output of a pass over a blob.
#[derive(Default)]
struct Pass {
    tar: Vec<u8>,
    spans: Vec<SpanStart>,
    windows: Vec<(SpanId, usize)>,
}

impl DecodeSink for Pass {
    fn span(&mut self, start: SpanStart) {
        assert_eq!(start.tar_offset, self.tar.len() as u64);
        self.spans.push(start);
    }
    fn bytes(&mut self, bytes: &[u8]) {
        assert!(!bytes.is_empty());
        self.tar.extend_from_slice(bytes);
    }
    fn window(&mut self, span: SpanId, window: Vec<u8>) {
        self.windows.push((span, window.len()));
    }
}

struct Both<'a>(&'a mut Pass, &'a mut SpanIndexBuilder);

impl DecodeSink for Both<'_> {
    fn span(&mut self, start: SpanStart) {
        self.0.span(start);
        self.1.span(start);
    }
    fn bytes(&mut self, bytes: &[u8]) {
        self.0.bytes(bytes);
        self.1.bytes(bytes);
    }
    fn window(&mut self, span: SpanId, window: Vec<u8>) {
        self.0.window(span, window.clone());
        self.1.window(span, window);
    }
}

/// Cuts the input into random pieces.
fn pieces(blob: &[u8], least: usize, most: usize, seed: u64) -> impl Iterator<Item = &[u8]> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut rest = blob;
    std::iter::from_fn(move || {
        let (head, tail) = rest.split_at(rng.usize(least..=most).min(rest.len()));
        rest = tail;
        (!head.is_empty()).then_some(head)
    })
}

fn pass(blob: &[u8], spacing: u64, least: usize, most: usize) -> Result<(Pass, SpanIndex, LayerEnd), IndexError> {
    let compression = sniff(&blob[..blob.len().min(512)])?;
    let mut decoder = LayerDecoder::new(compression, spacing)?;
    let mut pass = Pass::default();
    let mut builder = SpanIndexBuilder::new(compression)?;
    for piece in pieces(blob, least, most, 7) {
        decoder.push(piece, &mut Both(&mut pass, &mut builder))?;
    }
    let end = decoder.finish(&mut Both(&mut pass, &mut builder))?;
    assert_eq!(
        (end.blob_size, end.tar_size),
        (blob.len() as u64, pass.tar.len() as u64)
    );
    let index = builder.finish(Identity {
        blob: Digest::of(blob),
        blob_size: end.blob_size,
        diff_id: DiffId(Digest::of(&pass.tar)),
    })?;
    assert_eq!(index.len(), pass.spans.len());
    Ok((pass, index, end))
}

fn file(index: &SpanIndex) -> Vec<u8> {
    let mut bytes = Vec::new();
    index.write(&mut bytes).unwrap();
    bytes
}

/// Decodes spans from their range of the blob alone.
fn read(index: &SpanIndex, blob: &[u8], first: SpanId, last: SpanId, most: usize) -> Result<Vec<u8>, IndexError> {
    let range = index.blob_range(first, last);
    let mut decoder = index.decoder(first, last)?;
    let mut out = Vec::new();
    let mut next = first;
    for piece in pieces(&blob[range.start as usize..range.end as usize], 1, most, 3) {
        decoder.push(piece, &mut |span, bytes: &[u8]| {
            assert_eq!(span, next);
            next.0 += 1;
            out.extend_from_slice(bytes);
        })?;
    }
    assert!(
        decoder.is_done(),
        "spans {first}..={last}: range {range:?} was not enough"
    );
    Ok(out)
}

/// Checks one blob. The pass must give `tar`. Every restart, alone and with following spans, must give its part of
/// `tar`.
fn check(blob: &[u8], tar: &[u8]) -> SpanIndex {
    let (pass_result, index, end) = pass(blob, 64 << 10, 1000, 100_000).unwrap();
    assert!(pass_result.tar == tar, "the pass decodes something else");
    assert_eq!(end.trailing_garbage, None);
    let index = SpanIndex::open(file(&index)).unwrap();
    for span in index.spans() {
        let range = index.tar_range(span);
        assert!(!range.is_empty() && range.end - range.start <= MAX_SPAN);
        assert_eq!(index.span_at(range.start), Some(span));
        assert_eq!(index.span_at(range.end - 1), Some(span));
        let restart = index.restart_for(span);
        assert!(restart <= span);
        for last in [span.0, span.0 + 3].map(|last| SpanId(last.min(index.len() as u32 - 1))) {
            let from = index.tar_range(restart).start as usize;
            let to = index.tar_range(last).end as usize;
            let bytes = read(&index, blob, restart, last, 50_000).unwrap();
            assert!(bytes == tar[from..to], "spans {restart}..={last} differ");
        }
    }
    assert_eq!(index.span_at(tar.len() as u64), None);
    index
}

#[test]
fn stored_blocks() {
    let tar = random(3 << 20, 5);
    check(&gzip("-6", &tar), &tar);
}

#[test]
fn one_block_longer_than_a_span() {
    let tar = vec![0; 9 << 20];
    let index = check(&gzip("-6", &tar), &tar);
    assert!(index.spans().any(|span| index.restart_for(span) != span));
}

#[test]
fn zlib_strategies_and_flushes() {
    let tar = &CONTENT[..2 << 20];
    for strategy in ["Z_DEFAULT_STRATEGY", "Z_RLE", "Z_HUFFMAN_ONLY", "Z_FIXED", "Z_FILTERED"] {
        for flush in ["Z_NO_FLUSH", "Z_SYNC_FLUSH", "Z_FULL_FLUSH"] {
            check(&zlib(strategy, flush, tar), tar);
        }
    }
}

#[test]
fn pushes_of_any_size() {
    let tar = &CONTENT[..1 << 20];
    for blob in [gzip("-6", tar), filter("zstd", &["-c"], tar)] {
        for most in [1, 2, 9, 20, 40, 300] {
            let (pass, index, _) = pass(&blob, 64 << 10, 1, most).unwrap();
            assert!(pass.tar == tar);
            let last = SpanId(index.len() as u32 - 1);
            let restart = index.restart_for(last);
            let from = index.tar_range(restart).start as usize;
            assert!(read(&index, &blob, restart, last, most).unwrap() == tar[from..]);
        }
    }
}

#[test]
fn zstd_of_every_kind() {
    let tar = &CONTENT[..];
    let plain = filter("zstd", &["-c"], tar);
    check(&plain, tar);
    check(
        &filter("zstd", &["-19", "--long=27", "-c"], &tar[..3 << 20]),
        &tar[..3 << 20],
    );

    // Frames with a content size, with skippable frames between them, as pzstd writes them.
    let mut blob = Vec::new();
    for chunk in tar.chunks(700_000) {
        let frame = zstd::bulk::compress(chunk, 3).unwrap();
        blob.extend_from_slice(&0x184d_2a50u32.to_le_bytes());
        blob.extend_from_slice(&4u32.to_le_bytes());
        blob.extend_from_slice(&(frame.len() as u32).to_le_bytes());
        blob.extend(frame);
    }
    assert_eq!(sniff(&blob[..4]).unwrap(), Compression::Zstd);
    let index = check(&blob, tar);
    let restarts = index.spans().filter(|&span| index.restart_for(span) == span).count();
    // Each frame, and some blocks inside frames.
    assert!(restarts >= tar.len().div_ceil(700_000));
}

#[test]
fn zstd_windows_above_the_limit_are_refused() {
    let blob = filter("zstd", &["--ultra", "--long=28", "-c"], &CONTENT[..1 << 20]);
    // A window takes no more memory than the frame's content.
    check(&blob, &CONTENT[..1 << 20]);
    // A frame of one block of zeros whose window is 4 GiB.
    let blob = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 22 << 3, 0x03, 0x00, 0x10, 0x00];
    let error = pass(&blob, SPACING, 1, 10_000).map(drop).unwrap_err();
    assert!(matches!(error, IndexError::ZstdWindow { .. }), "{error}");
}

#[test]
fn uncompressed_layers() {
    let mut tar = tar::Builder::new(Vec::new());
    for (n, chunk) in CONTENT.chunks(900_000).enumerate() {
        let mut header = tar::Header::new_gnu();
        header.set_size(chunk.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, format!("file{n}"), chunk).unwrap();
    }
    let tar = tar.into_inner().unwrap();
    let index = check(&tar, &tar);
    assert_eq!(index.compression(), Compression::Tar);
    assert_eq!(index.len(), tar.len().div_ceil(64 << 10));
    assert_eq!(index.blob_range(SpanId(3), SpanId(4)), (3 * 65536)..(5 * 65536));
}

#[test]
fn sniffing() {
    let mut header = tar::Header::new_old();
    header.set_path("f\u{e9}").unwrap();
    header.set_size(0);
    header.set_cksum();
    let block = header.as_bytes().to_vec();
    assert_eq!(sniff(&block), Ok(Compression::Tar));
    assert!(sniff(&block[..511]).is_err());
    let mut signed = block.clone();
    // Each of the two bytes above 127 in the name counts 256 less as a signed byte.
    let sum = header.cksum().unwrap() - 512;
    signed[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    assert_eq!(sniff(&signed), Ok(Compression::Tar));
    signed[0] ^= 1;
    assert!(sniff(&signed).is_err());
    let error = sniff(b"BZh9").unwrap_err().to_string();
    assert!(error.contains("425a6839"), "{error}");
}

/// The programs that make a stream are its oracle. This test compares with another decoder, flate2.
#[test]
fn flate2_agrees() {
    let blob = gzip("-6", &CONTENT);
    let mut tar = Vec::new();
    flate2::read::MultiGzDecoder::new(&blob[..])
        .read_to_end(&mut tar)
        .unwrap();
    assert!(pass(&blob, SPACING, 1, 100_000).unwrap().0.tar == tar);
}
