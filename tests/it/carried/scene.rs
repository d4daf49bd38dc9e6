//! An image with a layer that carries a table, in a registry of its own.

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use ocifs::oci::Digest;

use crate::common::carried::{CarriedBlob, Dialect, Writer, push};
use crate::common::layers::{Blob, Tar, header, noise};
use crate::common::ocifs::{Mounted, Ocifs};
use crate::common::registry::{Logged, TestRegistry};

pub const BIG: usize = 9 << 20;

pub fn base() -> CarriedBlob {
    let tar = Tar::new()
        .dir("etc/")
        .file("etc/replaced", "old")
        .file("etc/gone", "gone")
        .dir("opaque/")
        .file("opaque/gone", "gone")
        .file("kept", noise(1, 20_000));
    CarriedBlob::plain(Blob::gzip(&tar.finish()))
}

/// A layer over the base. With `added`, it has the files that writers of tables add.
pub fn tar(added: bool) -> Vec<u8> {
    let mut owned = header(b"bin/su", tar::EntryType::Regular, 0o4755, 9);
    owned.set_uid(7);
    owned.set_gid(70_000);
    let mut null = header(b"null", tar::EntryType::Char, 0o666, 0);
    null.set_device_major(1).unwrap();
    null.set_device_minor(3).unwrap();
    let mut tar = Tar::new().dir("./").file("first", noise(2, 100_000));
    if added {
        tar = tar.file(".prefetch.landmark", [15]);
    }
    tar = tar.dir("bin/").raw(owned, b"#!/bin/sh").dir("many/");
    for i in 0..2000 {
        tar = tar.file(format!("many/{i}"), noise(i, 700));
    }
    tar.file("big", noise(3, BIG))
        .file("holes", [noise(4, 50_000), vec![0; 5 << 20], noise(5, 1234)].concat())
        .link(tar::EntryType::Link, "hard", "big")
        .link(tar::EntryType::Symlink, "link", "bin/su")
        .raw(null, b"")
        .pax(&[("SCHILY.xattr.user.note", b"hello")])
        .file("noted", "noted")
        .file("etc/replaced", "new")
        .file("etc/.wh.gone", "")
        .file("opaque/.wh..wh..opq", "")
        .file("opaque/new", "new")
        .file("last", noise(6, 3000))
        .finish()
}

pub struct Scene {
    pub registry: TestRegistry,
    pub image: String,
    pub ocifs: Ocifs,
    pub layer: CarriedBlob,
}

impl Scene {
    pub fn of(layer: CarriedBlob) -> Self {
        let registry = TestRegistry::start();
        push(&registry, "app", "1", &[base(), layer.clone()]);
        Self {
            image: format!("{}/app:1", registry.host()),
            registry,
            ocifs: Ocifs::new(),
            layer,
        }
    }

    pub fn new(dialect: Dialect) -> Self {
        Self::of(Writer::new(dialect).write(&tar(dialect_adds(dialect))))
    }

    pub fn mount(&self) -> Mounted {
        self.ocifs
            .mount_with(&self.image, &["--wait", "ready", "--prefetch", "none"])
    }

    /// Returns the requests for the layer since the last call, and their bytes.
    pub fn fetched(&self) -> (usize, usize) {
        let path = self.layer.blob.path();
        let log = self.registry.take_log();
        let requests: Vec<_> = log.iter().filter(|logged| logged.target.contains(&path)).collect();
        let of_method = |logged: &&&Logged| logged.method == "GET";
        (
            requests.iter().filter(of_method).count(),
            requests.iter().map(|logged| logged.sent).sum(),
        )
    }

    pub fn authority(&self, mount: &Mounted) -> String {
        mount.status()["layers"][1]["authority"].as_str().unwrap().to_owned()
    }
}

/// Whether the writer of a dialect adds files to the root.
pub fn dialect_adds(dialect: Dialect) -> bool {
    matches!(dialect, Dialect::Estargz | Dialect::StargzZstd)
}

/// Describes all files below a directory, with their content.
pub fn dump(root: &Path) -> Vec<String> {
    let mut lines = Vec::new();
    let mut todo = vec![root.to_owned()];
    while let Some(path) = todo.pop() {
        let meta = fs::symlink_metadata(&path).unwrap();
        let kind = meta.file_type();
        let content = if kind.is_file() {
            Digest::of(&fs::read(&path).unwrap()).to_string()
        } else if kind.is_symlink() {
            fs::read_link(&path).unwrap().display().to_string()
        } else if kind.is_char_device() || kind.is_block_device() {
            meta.rdev().to_string()
        } else {
            String::new()
        };
        let size = if kind.is_dir() { 0 } else { meta.len() };
        lines.push(format!(
            "{} {:o} {}:{} {size} {}.{:09} {} {content}",
            path.strip_prefix(root).unwrap().display(),
            meta.mode(),
            meta.uid(),
            meta.gid(),
            meta.mtime(),
            meta.mtime_nsec(),
            meta.nlink(),
        ));
        if kind.is_dir() {
            todo.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
    }
    lines.sort();
    lines
}

/// Returns the dump of the same image without a table.
pub fn plain_dump() -> Vec<String> {
    let registry = TestRegistry::start();
    let layers = [base(), CarriedBlob::plain(Blob::gzip(&tar(false)))];
    push(&registry, "app", "1", &layers);
    let ocifs = Ocifs::new();
    dump(ocifs.mount(&format!("{}/app:1", registry.host())).path())
}
