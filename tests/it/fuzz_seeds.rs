//! Seeds of the fuzz targets: a few small inputs of each kind, from which libFuzzer starts.
//!
//! `cargo test --test it write_the_seeds -- --ignored` writes them anew to tests/fuzz/seeds/TARGET. Each target in
//! tests/fuzz/fuzz_targets documents how it reads its input.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use flate2::write::DeflateEncoder;
use ocifs::erofs::{self, Reader};
use ocifs::index::{Compression, DecodeSink, Identity, LayerDecoder, SpanId, SpanIndex, SpanIndexBuilder, SpanStart};
use ocifs::oci::{DiffId, Digest};
use ocifs::published::IndexFile;
use ocifs::toc::carried::TableRef;
use ocifs::toc::{Limits, TarReader, Toc};
use ocifs::tree::{LayerIdx, Merger};

use crate::common::carried::{Dialect, Writer};
use crate::common::layers::{Blob, Tar, config, manifest, noise};
use crate::common::registry::{INDEX, image};

/// Largest seed, in bytes. Seeds are part of the repository, so they should be small. libFuzzer mutates short inputs
/// best.
const MOST: u64 = 16 << 10;

/// Sizes in bytes of the two data devices to which the target `erofs` lets its images point.
const DEVICES: [u64; 2] = [3 * 4096, 5 * 4096];

fn pax_tar() -> Vec<u8> {
    Tar::new()
        .dir("etc/")
        .pax(&[
            ("path", "etc/héllo".as_bytes()),
            ("mtime", b"1500000000.5"),
            ("SCHILY.xattr.user.note", b"hello"),
        ])
        .file("etc/hello", "hello\n")
        .link(tar::EntryType::Link, "etc/again", "etc/h\u{e9}llo")
        .link(tar::EntryType::Symlink, "link", "etc/hello")
        .file("etc/.wh.gone", "")
        .sparse("sparse", 1 << 20, &[(0, b"!"), (512 << 10, b"?")])
        .finish()
}

fn gnu_tar() -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(5);
    header.set_mode(0o4755);
    let long = format!("{}/{}", "d".repeat(90), "f".repeat(90));
    builder.append_data(&mut header, &long, &b"long\n"[..]).unwrap();
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Symlink);
    header.set_size(0);
    builder.append_link(&mut header, "link", &long).unwrap();
    builder.into_inner().unwrap()
}

fn toc(tar: &[u8]) -> Toc {
    let mut reader = TarReader::new(Limits::default());
    reader.push(tar, &mut |_, _| ()).unwrap();
    reader.finish().unwrap().toc.unpack().unwrap()
}

fn deflate(bytes: &[u8], level: u32) -> Vec<u8> {
    let mut encoder = DeflateEncoder::new(Vec::new(), flate2::Compression::new(level));
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

struct Sink<'a>(&'a mut SpanIndexBuilder);

impl DecodeSink for Sink<'_> {
    fn span(&mut self, start: SpanStart) {
        self.0.span(start);
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.0.bytes(bytes);
    }

    fn window(&mut self, span: SpanId, window: Vec<u8>) {
        self.0.window(span, window);
    }
}

fn index(compression: Compression, blob: &[u8], diff_id: Digest) -> Vec<u8> {
    let mut decoder = LayerDecoder::new(compression, 0).unwrap();
    let mut builder = SpanIndexBuilder::new(compression).unwrap();
    decoder.push(blob, &mut Sink(&mut builder)).unwrap();
    decoder.finish(&mut Sink(&mut builder)).unwrap();
    let identity = Identity {
        blob: Digest::of(blob),
        blob_size: blob.len() as u64,
        diff_id: DiffId(diff_id),
    };
    let mut file = Vec::new();
    builder.finish(identity).unwrap().write(&mut file).unwrap();
    file
}

fn tree() -> Vec<u8> {
    let lower = Tar::new()
        .dir("etc/")
        .pax(&[("SCHILY.xattr.user.a", b"value")])
        .file("etc/a", noise(1, 3 * 4096))
        .link(tar::EntryType::Symlink, "link", "etc/a");
    let upper = Tar::new()
        .file("etc/b", noise(2, 2 * 4096))
        .file("c", noise(3, 2 * 4096 + 1))
        .link(tar::EntryType::Link, "etc/c", "c");
    let mut merger = Merger::new();
    for (layer, tar) in (0..).zip([lower, upper]) {
        let toc = toc(&tar.finish());
        assert_eq!(toc.device_size.next_multiple_of(4096), DEVICES[layer as usize]);
        merger.add(LayerIdx(layer), &toc.pack().unwrap()).unwrap();
    }
    let mut bytes = Vec::new();
    erofs::write(&merger.finish(), &DEVICES, &Digest::of(b"manifest"), &mut bytes).unwrap();
    bytes
}

/// Makes the seeds of tables that layers carry, and of what says where such a table is.
fn carried_seeds(seed: &mut impl FnMut(&'static str, &'static str, &[&[u8]])) {
    let tar = Tar::new()
        .dir("etc/")
        .file("etc/a", noise(1, 1500))
        .file("b", [noise(2, 1000), vec![0; 1000]].concat())
        .link(tar::EntryType::Symlink, "link", "etc/a")
        .link(tar::EntryType::Link, "hard", "b")
        .file("etc/.wh.gone", "")
        .finish();
    // The first byte chooses the dialect.
    for (name, choice, dialect) in [
        ("containers", 0, Dialect::Containers),
        ("stargz", 80, Dialect::StargzZstd),
    ] {
        let writer = Writer {
            chunk: 1000,
            ..Writer::new(dialect)
        };
        let blob = writer.write(&tar);
        let packed = &blob.blob.bytes[blob.table.clone()];
        let json: serde_json::Value = serde_json::from_slice(&zstd::decode_all(packed).unwrap()).unwrap();
        seed("carried", name, &[&[choice], json.to_string().as_bytes()]);
        let descriptor = serde_json::from_value(blob.descriptor()).unwrap();
        let table = TableRef::of(&descriptor).unwrap().unwrap();
        let place = table.first_range();
        let read = table.read(place, packed).unwrap();
        let mut file = Vec::new();
        read.chunks.write(&mut file).unwrap();
        let name = if choice == 0 { "chunks" } else { "more-chunks" };
        seed("carried", name, &[&[200], &file]);
    }
    // The annotations, a zero byte, and the end of the blob.
    for (name, dialect) in [
        ("estargz", Dialect::Estargz),
        ("containers", Dialect::Containers),
        ("old-containers", Dialect::OldContainers),
        ("stargz", Dialect::StargzZstd),
    ] {
        let blob = Writer::new(dialect).write(&tar);
        let annotations = serde_json::json!(blob.annotations).to_string();
        let table = &blob.blob.bytes[blob.table.start..];
        seed("table_ref", name, &[annotations.as_bytes(), &[0], table]);
    }
}

/// Tables of a zstd dictionary: a Huffman table of two symbols, and three of libzstd's own.
fn predefined_tables() -> Vec<u8> {
    let samples: Vec<Vec<u8>> = (0..200).map(|n| noise(n % 7, 300)).collect();
    let dictionary = zstd::dict::from_samples(&samples, 4000).unwrap();
    // Behind the tables come the repeat offsets 1, 4 and 8.
    let repeats: Vec<u8> = [1u32, 4, 8].into_iter().flat_map(u32::to_le_bytes).collect();
    let end = dictionary.windows(repeats.len()).position(|bytes| bytes == repeats);
    dictionary[8..end.unwrap()].to_vec()
}

/// Returns target, name and bytes of each seed.
fn seeds() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let mut seeds = Vec::new();
    let mut seed =
        |target: &'static str, name: &'static str, parts: &[&[u8]]| seeds.push((target, name, parts.concat()));
    let tars = [("pax", pax_tar()), ("gnu", gnu_tar())];
    for (name, tar) in &tars {
        // The first byte chooses the kind of the input.
        seed("tar", name, &[&[7], tar.as_slice()]);
    }
    let toc = toc(&tars[0].1);
    let (mut table, mut extents) = (Vec::new(), Vec::new());
    toc.encode(&mut table).unwrap();
    toc.extent_table().encode(&mut extents).unwrap();
    seed("tar", "table", &[&[200], &table]);
    seed("tar", "extents", &[&[255], &extents]);

    // The first eight bytes choose how the input is cut.
    for (name, split, level) in [("stored", 0, 0), ("fast", 0x0123_4567_89ab_cde1u64, 1), ("best", 0, 9)] {
        let stream = deflate(&noise(1, 2000), level);
        seed("inflate", name, &[&split.to_le_bytes(), &stream]);
    }

    // The parts are a number that chooses the kind of blob, the blob, four more fields, and at the end the blob's
    // length.
    let small = Tar::new().file("f", noise(1, 3000)).finish();
    for (name, kind, blob) in [
        ("gzip", 0x6000_0000u32, Blob::gzip(&small)),
        ("zstd", 0xc000_0000, Blob::zstd(&small)),
    ] {
        let length = u16::try_from(blob.bytes.len()).unwrap().to_be_bytes();
        let parts: [&[u8]; 4] = [&kind.to_le_bytes(), &blob.bytes, &[100, 0, 0, 0, 9, 0], &length];
        seed("gzip_index", name, &parts);
    }

    // The first bytes choose the pieces, whether a bit is flipped, and the kind of blob. Far repeats and noise, so that
    // there are restarts.
    let far = [
        noise(5, 120 << 10),
        noise(5, 120 << 10),
        vec![b'x'; 400 << 10],
        noise(5, 60 << 10),
    ]
    .concat();
    for (name, blob) in [("small", Blob::zstd(&small)), ("far", Blob::zstd(&far[240 << 10..]))] {
        if blob.bytes.len() < MOST as usize {
            seed("zstd_index", name, &[&[100, 0, 0, 0, 0, 0, 0], &blob.bytes]);
        }
    }
    for (name, byte) in [("frames", 0x5a), ("blocks", 0xc3)] {
        let parts: Vec<u8> = (0..600u32).map(|n| (n * 37) as u8 ^ byte).collect();
        seed("zstd_index", name, &[&[9, 0, 0, 0xff, 0xff, 0xff, 0xff], &parts]);
    }

    // The length of the first restart, whether both are compressed, and both: flags, window, reach, covers, repeat
    // offsets, tables, runs, bytes.
    for (name, reach) in [("one", 100u8), ("both", 0xff)] {
        let numbers = |reach: u8, covers: &[u8]| {
            // A window of 128 KiB. The tables of a frame whose blocks have none.
            let reach: &[u8] = if reach == 0xff { &[0xff, 0xff, 4] } else { &[reach] };
            let tables = predefined_tables();
            let length = [0x80 | tables.len() as u8, (tables.len() >> 7) as u8];
            let tail = [&[1, 4, 8][..], &length, &tables, &[1, 90, 3], b"abc"].concat();
            [&[0, 0x80, 0x80, 8], reach, covers, &tail].concat()
        };
        let (earlier, later) = (numbers(100, &[0x80, 0x80, 4]), numbers(reach, &[0x80, 0x80, 4]));
        let length = (earlier.len() as u16).to_le_bytes();
        seed("zstd_restart", name, &[&length, &[0], &earlier, &later]);
    }

    // Files with several spans and windows. The target adds the checksum.
    let large = Tar::new().file("f", noise(1, 160 << 10)).finish();
    for (name, compression, blob) in [
        ("gzip", Compression::Gzip, Blob::gzip(&large)),
        ("zstd", Compression::Zstd, Blob::zstd(&large)),
        ("tar", Compression::Tar, Blob::plain(small.clone())),
    ] {
        let file = index(compression, &blob.bytes, blob.diff_id.clone());
        seed("span_index_open", name, &[&file[..file.len() - 32]]);
        let published = IndexFile {
            layer: blob.digest(),
            size: blob.bytes.len() as u64,
            diff_id: DiffId(blob.diff_id.clone()),
            spans: file,
            toc: table.clone(),
            programs: br#"{"ocifs-layer-programs":1,"programs":{}}"#.to_vec(),
        };
        let file = published.encode();
        seed("index_file", name, &[&file[..file.len() - 32]]);
    }

    carried_seeds(&mut seed);

    seed("erofs", "tree", &[&tree()]);

    let layers = [Blob::gzip(&small)];
    let documents = image(std::slice::from_ref(&small));
    let config = config(&layers).to_string().into_bytes();
    let index = serde_json::json!({
        "schemaVersion": 2, "mediaType": INDEX, "manifests": [{
            "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": Digest::of(b"m").to_string(), "size": 2,
            "platform": {"os": "linux", "architecture": "arm64", "variant": "v8"},
        }],
    });
    seed(
        "reference",
        "manifest",
        &[manifest(&config, &layers).to_string().as_bytes()],
    );
    seed("reference", "small-manifest", &[&documents.manifest]);
    seed("reference", "config", &[&config]);
    seed("reference", "index", &[index.to_string().as_bytes()]);
    let digest = Digest::of(b"app").to_string();
    for (name, text) in [
        ("hub", "alpine".to_owned()),
        ("tag", "ghcr.io/org/app:1.2".to_owned()),
        ("digest", format!("localhost:5000/app:1@{digest}")),
        ("address", "[::1]:5000/a/b__c/d-e:tag".to_owned()),
        ("layout", "oci:/var/images/app:latest".to_owned()),
        ("archive", "docker-archive:app.tar:app:v1".to_owned()),
        ("platform", "linux/arm/v7".to_owned()),
        ("bare-digest", digest.clone()),
    ] {
        seed("reference", name, &[text.as_bytes()]);
    }

    let nbd_request = |command: u16, offset: u64, length: u32| {
        let head = [
            &0x2560_9513u32.to_be_bytes()[..],
            &[0, 0],
            &command.to_be_bytes(),
            &[1; 8],
        ]
        .concat();
        [&head[..], &offset.to_be_bytes(), &length.to_be_bytes()].concat()
    };
    let option = |number: u32, data: &[u8]| {
        let head = [
            b"IHAVEOPT",
            &number.to_be_bytes()[..],
            &(data.len() as u32).to_be_bytes(),
        ]
        .concat();
        [&head[..], data].concat()
    };
    let flags = 3u32.to_be_bytes();
    let go = [&flags[..], &option(3, b""), &option(6, &[0; 6]), &option(7, &[0; 6])].concat();
    let requests = [
        nbd_request(0, 512, 4096),
        nbd_request(1, 0, 2),
        b"ab".to_vec(),
        nbd_request(2, 0, 0),
    ]
    .concat();
    seed("nbd", "go", &[&go, &requests]);
    seed(
        "nbd",
        "export-name",
        &[&flags, &option(1, b""), &nbd_request(5, 0, 4096)],
    );
    seed("nbd", "abort", &[&flags, &option(2, b"")]);

    // Messages of a monitor: features, a queue, configuration, the end of the queue.
    let message = |code: u32, payload: &[u8]| {
        let head = [code, 1, payload.len() as u32].map(u32::to_ne_bytes).concat();
        [&head[..], payload].concat()
    };
    let config = [0u32, 4, 0, 0].map(u32::to_ne_bytes).concat();
    let mut messages = [
        message(3, b""),
        message(1, b""),
        message(16, &(1u64 << 9).to_ne_bytes()),
    ]
    .concat();
    messages.extend(
        [
            message(8, &[0, 0, 0, 0, 16, 0, 0, 0]),
            message(24, &config),
            message(11, &[0; 8]),
        ]
        .concat(),
    );
    seed("virtio", "messages", &[&[0], &messages]);
    // A read in the memory of a guest: header, 512 bytes of data, status.
    let mut memory = vec![0; 0x1000];
    let mut put = |at: usize, bytes: &[u8]| memory[at..at + bytes.len()].copy_from_slice(bytes);
    for (index, (address, length, flags, next)) in [(0x800u64, 16u32, 1u16, 1u16), (0x900, 512, 3, 2), (0xc00, 1, 2, 0)]
        .into_iter()
        .enumerate()
    {
        let link = [flags.to_le_bytes(), next.to_le_bytes()].concat();
        put(
            16 * index,
            &[&address.to_le_bytes()[..], &length.to_le_bytes(), &link].concat(),
        );
    }
    put(0x102, &1u16.to_le_bytes());
    seed("virtio", "read", &[&[1], &[0; 320], &memory]);

    for (name, text) in [
        (
            "bearer",
            r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull""#,
        ),
        ("basic", r#"Basic realm="a \"quoted\" realm", Bearer realm=token68"#),
        ("negotiate", "Negotiate YII=, Basic realm=x, charset=\"UTF-8\""),
        ("part", "bytes 0-9/20"),
        ("unknown-total", "bytes 5-9/*"),
        ("unsatisfied", "bytes */20"),
        (
            "token",
            r#"{"token":"t","access_token":"a","expires_in":300,"issued_at":"2026-01-01T00:00:00Z"}"#,
        ),
        (
            "errors",
            r#"{"errors":[{"code":"DENIED","message":"no pull for you","detail":{}}]}"#,
        ),
        (
            "auths",
            r#"{"auths":{"https://index.docker.io/v1/":{"auth":"bWU6c2VjcmV0"}},"credHelpers":{"docker.io":"x"},"credsStore":"y"}"#,
        ),
        (
            "storage",
            "<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>",
        ),
    ] {
        seed("challenge", name, &[text.as_bytes()]);
    }
    seeds
}

fn directory(target: &str) -> PathBuf {
    Path::new("tests/fuzz/seeds").join(target)
}

#[test]
#[ignore = "writes into the repository"]
fn write_the_seeds() {
    for (target, name, bytes) in seeds() {
        fs::create_dir_all(directory(target)).unwrap();
        fs::write(directory(target).join(name), bytes).unwrap();
    }
}

#[test]
fn every_fuzz_target_has_small_seeds_that_it_understands() {
    for entry in fs::read_dir("tests/fuzz/fuzz_targets").unwrap() {
        let target = entry.unwrap().path();
        let target = target.file_stem().unwrap().to_str().unwrap();
        let files = fs::read_dir(directory(target)).unwrap_or_else(|e| panic!("seeds of {target}: {e}"));
        let files: Vec<_> = files.map(|file| file.unwrap()).collect();
        assert!(!files.is_empty(), "{target} has no seeds");
        for file in files {
            let size = file.metadata().unwrap().len();
            assert!((1..=MOST).contains(&size), "{:?}: {size} bytes", file.path());
        }
    }
    let stored = |target: &str, name: &str| fs::read(directory(target).join(name)).unwrap();
    for name in ["pax", "gnu"] {
        assert!(toc(&stored("tar", name)[1..]).entries.len() > 1, "{name}");
    }
    assert!(Toc::decode(&stored("tar", "table")[1..]).is_ok());
    for (name, least) in [("gzip", 2), ("zstd", 1), ("tar", 1)] {
        let mut file = stored("span_index_open", name);
        let checksum = blake3::hash(&file);
        file.extend_from_slice(checksum.as_bytes());
        assert!(SpanIndex::open(file).unwrap().len() >= least, "{name}");
    }
    assert!(Reader::open(&stored("erofs", "tree")[..], &DEVICES).is_ok());
}
