//! Writers of layers that carry a table of contents: eStargz, and zstd:chunked in three dialects.
//!
//! Each takes a tar and makes a blob with a table, as the programs do whose formats these are. Tests may change the
//! table before it is written.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::io::Write as _;
use std::ops::Range;
use std::time::{Duration, UNIX_EPOCH};

use base64::Engine as _;
use ocifs::oci::Digest;
use serde_json::{Value, json};

use super::layers::{Blob, config, descriptor};
use super::registry::{MANIFEST, TestRegistry};

/// Which program the blob looks like it is from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// eStargz of stargz-snapshotter.
    Estargz,
    /// zstd:chunked of containers/storage.
    Containers,
    /// zstd:chunked of old versions of containers/storage.
    OldContainers,
    /// zstd:chunked of stargz-snapshotter.
    StargzZstd,
}

impl Dialect {
    pub const ALL: [Self; 4] = [Self::Estargz, Self::Containers, Self::OldContainers, Self::StargzZstd];

    fn is_of_containers(self) -> bool {
        matches!(self, Self::Containers | Self::OldContainers)
    }
}

pub const STARGZ_DIGEST: &str = "containerd.io/snapshot/stargz/toc.digest";

/// A change to the entries of a table.
pub type Change = Box<dyn Fn(&mut Vec<Value>)>;

/// A writer of blobs.
pub struct Writer {
    pub dialect: Dialect,
    /// Longest chunk in bytes.
    pub chunk: usize,
    /// Smallest member of an eStargz blob in bytes: smaller files share one.
    pub share: usize,
    /// Changes the entries before they are written.
    pub change: Change,
}

/// A layer with a table.
#[derive(Clone)]
pub struct CarriedBlob {
    pub blob: Blob,
    pub annotations: BTreeMap<String, String>,
    /// The bytes of the blob that are the table.
    pub table: Range<usize>,
}

impl CarriedBlob {
    pub fn descriptor(&self) -> Value {
        let mut descriptor = descriptor(self.blob.media_type, &self.blob.bytes);
        descriptor["annotations"] = json!(self.annotations);
        descriptor
    }

    /// Returns a layer without a table.
    pub fn plain(blob: Blob) -> Self {
        Self {
            blob,
            annotations: BTreeMap::new(),
            table: 0..0,
        }
    }
}

impl Writer {
    pub fn new(dialect: Dialect) -> Self {
        Self {
            dialect,
            chunk: 4 << 20,
            share: 0,
            change: Box::new(|_| ()),
        }
    }

    pub fn write(&self, tar: &[u8]) -> CarriedBlob {
        let mut out = Output {
            bytes: Vec::new(),
            tar: Vec::new(),
            zstd: self.dialect != Dialect::Estargz,
        };
        let (mut entries, end) = self.content(tar, &mut out);
        (self.change)(&mut entries);
        let table = json!({"version": 1, "entries": entries});
        match self.dialect {
            Dialect::Estargz => estargz(table, &mut out),
            _ => {
                out.member(&tar[end..]);
                self.chunked(table, &mut out)
            }
        }
        .with(out)
    }

    /// Writes the content of a tar. Returns the entries of the table, and where the end mark of the tar begins.
    fn content(&self, tar: &[u8], out: &mut Output) -> (Vec<Value>, usize) {
        let mut entries = Vec::new();
        let (mut done, mut end) = (0, 0);
        // Where the member that is being collected begins in the tar.
        let mut archive = tar::Archive::new(tar);
        for entry in archive.entries().unwrap() {
            let mut entry = entry.unwrap();
            let (at, len) = (entry.raw_file_position() as usize, entry.size() as usize);
            let content = &tar[at..at + len];
            let mut record = record(&mut entry);
            let regular = record["type"] == "reg";
            end = (at + len).next_multiple_of(512);
            if !regular || len == 0 {
                entries.push(record);
                continue;
            }
            record["size"] = json!(len);
            record["digest"] = json!(Digest::of(content).to_string());
            if self.dialect.is_of_containers() {
                out.member(&tar[done..at]);
                done = at + len;
                entries.extend(self.of_containers(record, content, out));
                continue;
            }
            for (number, start) in (0..len).step_by(self.chunk).enumerate() {
                // A member begins at the chunk, unless the member before is still small.
                let collected = at + start - done;
                if number > 0 || collected >= self.share.max(1) {
                    out.member(&tar[done..at + start]);
                    done = at + start;
                }
                let part = &content[start..len.min(start + self.chunk)];
                let mut chunk = match number {
                    0 => record.clone(),
                    _ => json!({"type": "chunk", "name": record["name"], "chunkOffset": start}),
                };
                chunk["offset"] = json!(out.bytes.len());
                if at + start > done {
                    chunk["innerOffset"] = json!(at + start - done);
                }
                // The last chunk goes to the file's end without saying so.
                if start + part.len() < len {
                    chunk["chunkSize"] = json!(part.len());
                }
                chunk["chunkDigest"] = json!(Digest::of(part).to_string());
                entries.push(chunk);
            }
        }
        out.member(&tar[done..end.max(done)]);
        (entries, end.max(done))
    }

    fn of_containers(&self, mut record: Value, content: &[u8], out: &mut Output) -> Vec<Value> {
        let mut entries = Vec::new();
        record["offset"] = json!(out.bytes.len());
        let parts: Vec<&[u8]> = content.chunks(self.chunk).collect();
        for (number, part) in parts.iter().enumerate() {
            let mut chunk = match number {
                0 => record.clone(),
                _ => json!({"type": "chunk", "name": record["name"], "chunkOffset": number * self.chunk}),
            };
            if parts.len() > 1 {
                chunk["offset"] = json!(out.bytes.len());
                chunk["chunkSize"] = json!(part.len());
                chunk["chunkDigest"] = json!(Digest::of(part).to_string());
                if part.iter().all(|&byte| byte == 0) {
                    chunk["chunkType"] = json!("zeros");
                }
            }
            out.member(part);
            entries.push(chunk);
        }
        entries[0]["endOffset"] = json!(out.bytes.len());
        entries
    }

    /// Writes table and footer of a zstd:chunked blob.
    fn chunked(&self, table: Value, out: &mut Output) -> Finished {
        let json = match self.dialect {
            Dialect::StargzZstd => serde_json::to_vec_pretty(&table).unwrap(),
            _ => serde_json::to_vec(&table).unwrap(),
        };
        let packed = zstd::encode_all(&json[..], 3).unwrap();
        let start = out.bytes.len() + 8;
        out.skippable(&packed);
        let mut footer = Vec::new();
        for number in [start, packed.len(), json.len(), 1] {
            footer.extend_from_slice(&(number as u64).to_le_bytes());
        }
        let (prefix, magic) = match self.dialect {
            Dialect::Containers => {
                footer.extend_from_slice(&[0; 24]);
                ("io.github.containers.zstd-chunked", b"GNUlInUx")
            }
            _ => ("io.containers.zstd-chunked", b"GnUlInUx"),
        };
        footer.extend_from_slice(magic);
        out.skippable(&footer);
        let position = format!("{start}:{}:{}:1", packed.len(), json.len());
        let mut annotations = BTreeMap::from([
            (format!("{prefix}.manifest-checksum"), Digest::of(&packed).to_string()),
            (format!("{prefix}.manifest-position"), position),
        ]);
        if self.dialect == Dialect::StargzZstd {
            annotations.insert(STARGZ_DIGEST.to_owned(), Digest::of(&json).to_string());
        }
        Finished {
            annotations,
            table: start..start + packed.len(),
        }
    }
}

/// Writes the table and the footer of an eStargz blob.
fn estargz(table: Value, out: &mut Output) -> Finished {
    let json = serde_json::to_vec_pretty(&table).unwrap();
    let start = out.bytes.len();
    let mut header = super::layers::header(b"stargz.index.json", tar::EntryType::Regular, 0o444, json.len() as u64);
    header.set_cksum();
    let mut file = [header.as_bytes().as_slice(), &json].concat();
    file.resize(file.len().next_multiple_of(512) + 1024, 0);
    out.member(&file);
    let end = out.bytes.len();
    out.bytes.extend_from_slice(&footer(start));
    Finished {
        annotations: BTreeMap::from([(STARGZ_DIGEST.to_owned(), Digest::of(&json).to_string())]),
        table: start..end,
    }
}

/// Returns the footer of an eStargz blob whose table is at `table`.
pub fn footer(table: usize) -> Vec<u8> {
    let offset = format!("{table:016x}STARGZ");
    let parts: [&[u8]; 5] = [
        &[0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 0xff, 26, 0],
        b"SG\x16\0",
        offset.as_bytes(),
        &[1, 0, 0, 0xff, 0xff],
        &[0; 8],
    ];
    parts.concat()
}

struct Finished {
    annotations: BTreeMap<String, String>,
    table: Range<usize>,
}

impl Finished {
    fn with(self, out: Output) -> CarriedBlob {
        CarriedBlob {
            blob: Blob {
                diff_id: Digest::of(&out.tar),
                bytes: out.bytes,
                media_type: match out.zstd {
                    true => "application/vnd.oci.image.layer.v1.tar+zstd",
                    false => "application/vnd.oci.image.layer.v1.tar+gzip",
                },
            },
            annotations: self.annotations,
            table: self.table,
        }
    }
}

/// A blob that is being written, with the tar that it unpacks to.
struct Output {
    bytes: Vec<u8>,
    tar: Vec<u8>,
    zstd: bool,
}

impl Output {
    fn member(&mut self, content: &[u8]) {
        if content.is_empty() {
            return;
        }
        self.tar.extend_from_slice(content);
        let bytes = match self.zstd {
            true => zstd::encode_all(content, 3).unwrap(),
            false => {
                let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
                encoder.write_all(content).unwrap();
                encoder.finish().unwrap()
            }
        };
        self.bytes.extend_from_slice(&bytes);
    }

    fn skippable(&mut self, content: &[u8]) {
        self.bytes.extend_from_slice(&0x184d_2a50u32.to_le_bytes());
        self.bytes.extend_from_slice(&(content.len() as u32).to_le_bytes());
        self.bytes.extend_from_slice(content);
    }
}

/// Returns what a table says of an entry, except its content.
fn record(entry: &mut tar::Entry<'_, impl std::io::Read>) -> Value {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let mut xattrs = BTreeMap::new();
    if let Ok(Some(records)) = entry.pax_extensions() {
        for pax in records.flatten() {
            if let Some(name) = pax.key().unwrap().strip_prefix("SCHILY.xattr.") {
                let value = base64::engine::general_purpose::STANDARD.encode(pax.value_bytes());
                xattrs.insert(name.to_owned(), value);
            }
        }
    }
    let header = entry.header();
    let kind = match header.entry_type() {
        tar::EntryType::Regular => "reg",
        tar::EntryType::Directory => "dir",
        tar::EntryType::Symlink => "symlink",
        tar::EntryType::Link => "hardlink",
        tar::EntryType::Char => "char",
        tar::EntryType::Block => "block",
        tar::EntryType::Fifo => "fifo",
        other => panic!("{other:?}"),
    };
    let time = UNIX_EPOCH + Duration::from_secs(header.mtime().unwrap());
    let mut record = json!({
        "type": kind,
        "name": text(&entry.path_bytes()),
        "mode": header.mode().unwrap(),
        "uid": header.uid().unwrap(),
        "gid": header.gid().unwrap(),
        "modtime": humantime::format_rfc3339_seconds(time).to_string(),
    });
    if let Some(link) = entry.link_name_bytes() {
        record["linkName"] = json!(text(&link));
    }
    if kind == "char" || kind == "block" {
        record["devMajor"] = json!(header.device_major().unwrap());
        record["devMinor"] = json!(header.device_minor().unwrap());
    }
    if !xattrs.is_empty() {
        record["xattrs"] = json!(xattrs);
    }
    record
}

/// Pushes an image of these layers. Returns the digest of its manifest.
pub fn push(registry: &TestRegistry, repository: &str, tag: &str, layers: &[CarriedBlob]) -> Digest {
    let blobs: Vec<Blob> = layers.iter().map(|layer| layer.blob.clone()).collect();
    let config = config(&blobs).to_string().into_bytes();
    let manifest = json!({
        "schemaVersion": 2, "mediaType": MANIFEST,
        "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
        "layers": layers.iter().map(CarriedBlob::descriptor).collect::<Vec<_>>(),
    });
    registry.add_blob(config);
    for blob in blobs {
        registry.add_blob(blob.bytes);
    }
    registry.add_manifest(repository, Some(tag), MANIFEST, manifest.to_string())
}
