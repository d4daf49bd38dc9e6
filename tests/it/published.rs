//! Indexes that somebody else has made: fresh hosts that use them, and everything that must not be believed.

mod damage;
mod places;
mod publishing;
mod slow;
mod trust;
mod web;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::layers::{Blob, Tar, noise, push};
use crate::common::ocifs::{Mounted, Ocifs, bounded, tool};
use crate::common::registry::TestRegistry;

/// Bytes of the large file of each layer of the image.
const LARGE: usize = 6 << 20;

/// An image of a gzip, a zstd and a plain layer, in a registry.
struct Scene {
    registry: TestRegistry,
    image: String,
    layers: Vec<Blob>,
}

impl Scene {
    fn new() -> Self {
        let registry = TestRegistry::start();
        let tar = |seed: u64| {
            Tar::new()
                .dir("etc")
                .file(format!("etc/first{seed}"), format!("layer {seed}\n"))
                .file(format!("large{seed}"), noise(seed, LARGE))
                .file(format!("etc/last{seed}"), "end\n")
                .finish()
        };
        let layers = vec![Blob::gzip(&tar(1)), Blob::zstd(&tar(2)), Blob::plain(tar(3))];
        push(&registry, "app", "1", &layers);
        let image = format!("{}/app:1", registry.host());
        Self {
            registry,
            image,
            layers,
        }
    }

    /// Makes the indexes of the image in a new directory, on a host of its own.
    fn indexes(&self) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        self.build(directory.path());
        directory
    }

    fn build(&self, directory: &Path) {
        let ocifs = Ocifs::new();
        ocifs.ok(["index", "build", &self.image, "-o", directory.to_str().unwrap()]);
    }

    /// Bytes of the layers that the registry has sent since its log was cleared.
    fn sent(&self) -> usize {
        let log = self.registry.log();
        let of_layers = log
            .iter()
            .filter(|request| self.layers.iter().any(|layer| request.target.contains(&layer.path())));
        of_layers.map(|request| request.sent).sum()
    }

    /// Compares every file of a mount with what the layers have.
    fn check(&self, mount: &Mounted) {
        for seed in 1..=3 {
            assert_eq!(
                mount.read(&format!("etc/first{seed}")),
                format!("layer {seed}\n").as_bytes()
            );
            assert!(mount.read(&format!("large{seed}")) == noise(seed, LARGE), "large{seed}");
            assert_eq!(mount.read(&format!("etc/last{seed}")), b"end\n");
        }
    }
}

/// A host that trusts a location.
fn trusting(location: &str) -> Ocifs {
    Ocifs::with(&["--index", location, "--index-trust-location"])
}

/// Returns the authority of each layer of a mount, base first.
fn authorities(mount: &Mounted) -> Vec<String> {
    let status = mount.status();
    let layers = status["layers"].as_array().unwrap().iter();
    layers
        .map(|layer| layer["authority"].as_str().unwrap_or("none").to_owned())
        .collect()
}

/// Returns the files of a directory by name.
fn files(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(directory).unwrap().map(Result::unwrap);
    let file = |entry: std::fs::DirEntry| {
        let name = entry.file_name().into_string().unwrap();
        (name, std::fs::read(entry.path()).unwrap())
    };
    entries.map(file).collect()
}

/// A key pair of minisign(1).
struct Keys {
    directory: tempfile::TempDir,
}

impl Keys {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let keys = Self { directory };
        let arguments = ["-G", "-W", "-f", "-p", &keys.public(), "-s", &keys.secret()];
        tool("minisign", arguments);
        keys
    }

    fn public(&self) -> String {
        self.path("ci.pub")
    }

    fn secret(&self) -> String {
        self.path("ci.key")
    }

    fn path(&self, name: &str) -> String {
        self.directory.path().join(name).to_str().unwrap().to_owned()
    }

    /// Signs all files of a directory.
    fn sign(&self, directory: &Path) {
        for name in files(directory).into_keys().filter(|name| !name.ends_with(".minisig")) {
            let file: PathBuf = directory.join(name);
            let mut minisign = Command::new("minisign");
            minisign.args(["-S", "-s", &self.secret(), "-m"]).arg(file);
            assert_eq!(bounded(&mut minisign).code, Some(0));
        }
    }

    /// A host that believes what this key has signed at a location.
    fn believing(&self, location: &str) -> Ocifs {
        Ocifs::with(&["--index", location, "--index-key", &self.public()])
    }
}
