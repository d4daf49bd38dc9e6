//! Layers and images for tests that mount: makes small tars, compresses them, and pushes them to a registry.
#![allow(dead_code)]

use std::io::Write as _;

use ocifs::oci::Digest;

use super::registry::{MANIFEST, TestRegistry, architecture};

/// A tar that is being written.
pub struct Tar(Vec<u8>);

impl Tar {
    pub fn new() -> Self {
        Self(Vec::new())
    }

    /// Adds an entry with this header and content. The header's checksum is computed here.
    pub fn raw(mut self, mut header: tar::Header, content: &[u8]) -> Self {
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    /// Adds a pax header for the next entry.
    pub fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let mut builder = tar::Builder::new(self.0);
        builder.append_pax_extensions(records.iter().copied()).unwrap();
        // Takes the buffer without the end mark that finishing the archive would add.
        Self(std::mem::take(builder.get_mut()))
    }

    /// Adds a sparse file (GNU.sparse 1.0 of pax) of `size` bytes. It has these runs of content; the rest is zeros.
    pub fn sparse(self, name: &str, size: u64, runs: &[(u64, &[u8])]) -> Self {
        let mut content = format!("{}\n", runs.len()).into_bytes();
        for (offset, run) in runs {
            content.extend_from_slice(format!("{offset}\n{}\n", run.len()).as_bytes());
        }
        content.resize(content.len().next_multiple_of(512), 0);
        content.extend(runs.iter().flat_map(|(_, run)| *run));
        self.pax(&[
            ("GNU.sparse.major", b"1"),
            ("GNU.sparse.minor", b"0"),
            ("GNU.sparse.name", name.as_bytes()),
            ("GNU.sparse.realsize", size.to_string().as_bytes()),
        ])
        .file(format!("GNUSparseFile.0/{name}"), content)
    }

    pub fn file(self, name: impl AsRef<[u8]>, content: impl AsRef<[u8]>) -> Self {
        let content = content.as_ref();
        self.raw(
            header(name.as_ref(), tar::EntryType::Regular, 0o644, content.len() as u64),
            content,
        )
    }

    pub fn dir(self, name: &str) -> Self {
        self.raw(header(name.as_bytes(), tar::EntryType::Directory, 0o755, 0), b"")
    }

    pub fn link(self, kind: tar::EntryType, name: &str, target: &str) -> Self {
        let mode = if kind == tar::EntryType::Link { 0o644 } else { 0o777 };
        let mut header = header(name.as_bytes(), kind, mode, 0);
        header.as_old_mut().linkname[..target.len()].copy_from_slice(target.as_bytes());
        self.raw(header, b"")
    }

    /// Returns the archive with its end mark.
    pub fn finish(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }
}

/// Returns a ustar header of an entry that root owns, from 2001.
pub fn header(name: &[u8], kind: tar::EntryType, mode: u32, size: u64) -> tar::Header {
    let mut header = tar::Header::new_ustar();
    header.as_old_mut().name[..name.len()].copy_from_slice(name);
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1_000_000_000);
    header.set_size(size);
    header
}

/// Returns reproducible bytes that compress to about half: hex digits of a xorshift sequence.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 16);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        for shift in (0..64).step_by(4) {
            bytes.push(b"0123456789abcdef"[(state >> shift) as usize & 15]);
        }
    }
    bytes.truncate(length);
    bytes
}

/// A layer as a registry stores it.
#[derive(Clone)]
pub struct Blob {
    pub bytes: Vec<u8>,
    pub media_type: &'static str,
    pub diff_id: Digest,
}

impl Blob {
    pub fn plain(tar: Vec<u8>) -> Self {
        Self {
            diff_id: Digest::of(&tar),
            bytes: tar,
            media_type: "application/vnd.oci.image.layer.v1.tar",
        }
    }

    pub fn gzip(tar: &[u8]) -> Self {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
        encoder.write_all(tar).unwrap();
        Self {
            diff_id: Digest::of(tar),
            bytes: encoder.finish().unwrap(),
            media_type: "application/vnd.oci.image.layer.v1.tar+gzip",
        }
    }

    pub fn zstd(tar: &[u8]) -> Self {
        Self {
            diff_id: Digest::of(tar),
            bytes: zstd::encode_all(tar, 3).unwrap(),
            media_type: "application/vnd.oci.image.layer.v1.tar+zstd",
        }
    }

    pub fn digest(&self) -> Digest {
        Digest::of(&self.bytes)
    }

    /// Returns a part of the target of every request for this layer.
    pub fn path(&self) -> String {
        format!("/blobs/{}", self.digest())
    }
}

/// Returns the config of an image with these layers.
pub fn config(layers: &[Blob]) -> serde_json::Value {
    serde_json::json!({
        "architecture": architecture(), "os": "linux", "config": {"Cmd": ["/bin/sh"]},
        "rootfs": {"type": "layers", "diff_ids": layers.iter().map(|l| l.diff_id.to_string()).collect::<Vec<_>>()},
    })
}

/// Returns a descriptor of these bytes.
pub fn descriptor(media_type: &str, bytes: &[u8]) -> serde_json::Value {
    serde_json::json!({"mediaType": media_type, "digest": Digest::of(bytes).to_string(), "size": bytes.len()})
}

/// Returns the manifest of an image with this config and these layers.
pub fn manifest(config: &[u8], layers: &[Blob]) -> serde_json::Value {
    serde_json::json!({
        "schemaVersion": 2, "mediaType": MANIFEST,
        "config": descriptor("application/vnd.oci.image.config.v1+json", config),
        "layers": layers.iter().map(|l| descriptor(l.media_type, &l.bytes)).collect::<Vec<_>>(),
    })
}

/// Pushes an image of these layers to the registry. Returns the digest of its manifest.
pub fn push(registry: &TestRegistry, repository: &str, tag: &str, layers: &[Blob]) -> Digest {
    push_with(registry, repository, tag, layers, &config(layers))
}

/// Pushes an image as [`push`] does, with the caller's config.
pub fn push_with(
    registry: &TestRegistry,
    repository: &str,
    tag: &str,
    layers: &[Blob],
    config: &serde_json::Value,
) -> Digest {
    let config = config.to_string().into_bytes();
    let manifest = manifest(&config, layers).to_string();
    registry.add_blob(config);
    for layer in layers {
        registry.add_blob(layer.bytes.clone());
    }
    registry.add_manifest(repository, Some(tag), MANIFEST, manifest)
}
