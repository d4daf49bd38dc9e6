//! Damage to the store. Any of its files may be damaged, before a mount or under one. Every byte, name and mode that
//! the mount serves must be right. In the end everything must be readable.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use crate::common::layers::{Blob, Tar, noise, push};
use crate::common::ocifs::{Mounted, Ocifs};
use crate::common::registry::TestRegistry;

const FILES: u64 = 6;

/// An image of two layers with large files, small files and a symbolic link.
struct Scene {
    registry: TestRegistry,
    image: String,
    ocifs: Ocifs,
}

impl Scene {
    fn new() -> Self {
        let registry = TestRegistry::start();
        let image = format!("{}/app:1", registry.host());
        push(&registry, "app", "1", &[Blob::gzip(&layer(0)), Blob::zstd(&layer(1))]);
        Self {
            registry,
            image,
            ocifs: Ocifs::new(),
        }
    }

    /// Returns a scene whose store has all of the image, a profile of one start, and the meaning of the tag.
    fn full() -> Self {
        let scene = Self::new();
        drop(scene.ocifs.mount(&scene.image));
        scene.ocifs.ok(["pull", &scene.image]);
        scene
    }

    fn mount(&self) -> Mounted {
        self.ocifs
            .mount_with(&self.image, &["--wait", "ready", "--prefetch", "none"])
    }
}

fn layer(number: u64) -> Vec<u8> {
    let large = (0..FILES).fold(Tar::new(), |tar, i| {
        tar.file(large_name(number, i), noise(10 * number + i, large_size(i)))
    });
    let small = (0..100).fold(large, |tar, i| {
        tar.file(format!("s{number}-{i}"), format!("{number} {i}\n"))
    });
    small
        .link(tar::EntryType::Symlink, &format!("l{number}"), "s0-1")
        .finish()
}

fn large_name(layer: u64, i: u64) -> String {
    format!("f{layer}-{i}")
}

fn large_size(i: u64) -> usize {
    300_000 + 1000 * i as usize
}

/// Reads all files past the page cache. Compares content, modes and links.
fn check(mount: &Mounted, what: &str) {
    for layer in 0..2 {
        for i in 0..FILES {
            let name = large_name(layer, i);
            mount.forget(&name);
            assert!(
                mount.read(&name) == noise(10 * layer + i, large_size(i)),
                "{what}: {name}"
            );
            let mode = fs::metadata(mount.join(&name)).unwrap().permissions().mode();
            assert_eq!(mode, 0o100_644, "{what}: {name}");
        }
        for i in 0..100 {
            let name = format!("s{layer}-{i}");
            mount.forget(&name);
            assert_eq!(mount.read(&name), format!("{layer} {i}\n").as_bytes(), "{what}: {name}");
        }
        assert_eq!(
            fs::read_link(mount.join(format!("l{layer}"))).unwrap(),
            Path::new("s0-1"),
            "{what}"
        );
    }
    assert_eq!(
        fs::read_dir(mount.path()).unwrap().count(),
        2 * (FILES as usize + 101),
        "{what}"
    );
}

/// Returns all files below a directory of the store.
fn files(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(files(&path)),
            false => found.push(path),
        }
    }
    found.sort();
    found
}

/// A kind of damage to a file.
#[derive(Debug, Clone, Copy)]
enum Damage {
    /// Flips one bit at this fraction of the file.
    Flip(f64),
    /// Writes a page of zeros at this fraction of the file.
    Zeros(f64),
    /// Cuts the file to this fraction.
    Cut(f64),
    Removed,
    /// Overwrites the file in place with its earlier content, or with that of another file of its kind.
    Older,
    /// Replaces the file by rename, with the content that [`Damage::Older`] writes.
    Replaced,
}

const DAMAGES: [Damage; 11] = [
    Damage::Flip(0.0),
    Damage::Flip(0.3),
    Damage::Flip(0.7),
    Damage::Flip(0.999),
    Damage::Zeros(0.0),
    Damage::Zeros(0.5),
    Damage::Zeros(0.99),
    Damage::Cut(0.0),
    Damage::Cut(0.6),
    Damage::Removed,
    Damage::Older,
];

impl Damage {
    fn inflict(self, path: &Path, older: &[u8]) {
        let open = || File::options().read(true).write(true).open(path).unwrap();
        let length = fs::metadata(path).map_or(0, |m| m.len());
        let at = |share: f64| ((length as f64 * share) as u64).min(length.saturating_sub(1));
        match self {
            _ if length == 0 => {}
            Self::Flip(share) => {
                let mut byte = [0];
                open().read_exact_at(&mut byte, at(share)).unwrap();
                open().write_all_at(&[byte[0] ^ 0x10], at(share)).unwrap();
            }
            Self::Zeros(share) => {
                let start = at(share) / 4096 * 4096;
                let end = (start + 4096).min(length);
                open().write_all_at(&vec![0; (end - start) as usize], start).unwrap();
            }
            Self::Cut(share) => open().set_len(at(share)).unwrap(),
            Self::Removed => fs::remove_file(path).unwrap(),
            Self::Older => fs::write(path, older).unwrap(),
            Self::Replaced => {
                let new = path.with_extension("new");
                fs::write(&new, older).unwrap();
                fs::rename(new, path).unwrap();
            }
        }
    }
}

/// Returns the files of the store that mounts use. Locks and drafts are left out.
fn victims(store: &Path) -> Vec<PathBuf> {
    let all = ["documents", "layers", "trees", "profiles"].map(|name| files(&store.join(name)));
    let all = all.into_iter().flatten();
    all.filter(|path| path.file_name().unwrap() != "lock").collect()
}

/// Returns the content of the file in `old`, or that of another file of the same name or kind.
fn older(path: &Path, store: &Path, old: &Path) -> Vec<u8> {
    let same = old.join(path.strip_prefix(store).unwrap());
    if let Ok(bytes) = fs::read(&same)
        && fs::read(path).ok().as_ref() != Some(&bytes)
    {
        return bytes;
    }
    let kind = |path: &Path| {
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        name.split_once('.')
            .map_or(name.clone(), |(_, extension)| extension.to_owned())
    };
    let mut others = files(old)
        .into_iter()
        .filter(|other| kind(other) == kind(path) && *other != same);
    others.next().map(|other| fs::read(other).unwrap()).unwrap_or_default()
}

/// Damages every file of the store in every way under a mount, and then mounts again.
#[test]
fn no_damage_to_any_file_is_served_and_all_of_it_heals() {
    let scene = Scene::full();
    let store = scene.ocifs.store().to_owned();
    // An earlier store that has less, from another registry.
    let other = Scene::new();
    let old = tempfile::tempdir().unwrap();
    {
        let mount = other.mount();
        assert_eq!(mount.read("s0-1"), b"0 1\n");
    }
    other.ocifs.ok(["cache", "drop"]);
    copy(other.ocifs.store(), old.path());
    let names: Vec<PathBuf> = victims(&store);
    let kinds = ["spans", "toc", "extents", "programs", "data"];
    for kind in kinds {
        assert_eq!(
            names.iter().filter(|path| path.ends_with(kind)).count(),
            2,
            "{kind}: {names:?}"
        );
    }
    for path in &names {
        for damage in DAMAGES.into_iter().chain([Damage::Replaced]) {
            let what = format!("{damage:?} of {}", path.strip_prefix(&store).unwrap().display());
            let older = older(path, &store, old.path());
            {
                let mount = scene.mount();
                check(&mount, &format!("the store repaired for {what}"));
                damage.inflict(path, &older);
                check(&mount, &format!("{what} under a mount"));
            }
            let mount = scene.mount();
            check(&mount, &format!("{what} before a mount"));
            drop(mount);
            // The pull repairs the store for the next round.
            scene.ocifs.ok(["pull", &scene.image]);
        }
    }
    drop(scene.registry);
}

fn copy(from: &Path, to: &Path) {
    for path in files(from) {
        let target = to.join(path.strip_prefix(from).unwrap());
        fs::create_dir_all(target.parent().unwrap()).unwrap();
        fs::copy(path, target).unwrap();
    }
}

/// Something that lies in the place of a file of the store.
#[derive(Debug, Clone, Copy)]
enum Intruder {
    Fifo,
    Socket,
    Directory,
    /// A symbolic link to an endless device.
    Endless,
    /// A symbolic link that leads nowhere.
    Dangling,
    /// A sparse file of 3 GiB without data.
    Sparse,
    Unreadable,
}

impl Intruder {
    fn put(self, path: &Path) {
        // A mount may have removed the file.
        if !path.exists() {
            fs::write(path, b"").unwrap();
        }
        if let Self::Unreadable = self {
            fs::set_permissions(path, fs::Permissions::from_mode(0o000)).unwrap();
            return;
        }
        fs::remove_file(path).unwrap();
        match self {
            Self::Fifo => nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap(),
            Self::Socket => {
                let (kind, mode) = (nix::sys::stat::SFlag::S_IFSOCK, nix::sys::stat::Mode::S_IRWXU);
                nix::sys::stat::mknod(path, kind, mode, 0).unwrap();
            }
            Self::Directory => fs::create_dir_all(path.join("full")).unwrap(),
            Self::Endless => std::os::unix::fs::symlink("/dev/zero", path).unwrap(),
            Self::Dangling => std::os::unix::fs::symlink("nowhere/x", path).unwrap(),
            Self::Sparse => File::create(path).unwrap().set_len(3 << 30).unwrap(),
            Self::Unreadable => {}
        }
    }
}

/// An intruder in the place of any file of the store blocks no read and fails no read. It is replaced when the file
/// is written again.
#[test]
fn nothing_that_lies_in_a_files_place_is_in_the_way() {
    let intruders = [
        Intruder::Fifo,
        Intruder::Socket,
        Intruder::Directory,
        Intruder::Endless,
        Intruder::Dangling,
        Intruder::Sparse,
        Intruder::Unreadable,
    ];
    let scene = Scene::full();
    let store = scene.ocifs.store().to_owned();
    let mut names = victims(&store);
    for name in ["version", "eviction.lock"] {
        names.push(store.join(name));
    }
    names.extend(
        files(&store.join("layers"))
            .into_iter()
            .filter(|path| path.ends_with("lock")),
    );
    names.extend(
        fs::read_dir(store.join("layers"))
            .unwrap()
            .map(|layer| layer.unwrap().path().join("partial")),
    );
    names.push(store.join("tmp/file.0"));
    for path in names {
        for intruder in intruders {
            let what = format!("{intruder:?} at {}", path.strip_prefix(&store).unwrap().display());
            // An intruder that nothing has replaced is still there.
            match fs::symlink_metadata(&path) {
                Ok(found) if found.is_dir() => fs::remove_dir_all(&path).unwrap(),
                Ok(found) if !found.is_file() => fs::remove_file(&path).unwrap(),
                _ => {}
            }
            if !path.exists() {
                fs::write(&path, b"").unwrap();
            }
            {
                let mount = scene.mount();
                intruder.put(&path);
                assert_eq!(mount.read("s0-1"), b"0 1\n", "{what}");
                mount.forget("f1-2");
                assert!(mount.read("f1-2") == noise(12, large_size(2)), "{what}");
            }
            // Reading the image and checking the store both work in spite of the intruder.
            let said = scene.ocifs.ok(["cat", &scene.image, "f0-3"]);
            assert!(said.stdout == noise(3, large_size(3)), "{what}");
            let said = scene.ocifs.run(["cache", "verify"]);
            assert!(said.stdout.starts_with(b"sound:"), "{what}: {said:?}");
            scene.ocifs.ok(["pull", &scene.image]);
            scene.ocifs.ok(["cache", "verify"]);
        }
    }
}

/// Two layers have files of the same names and sizes with different content. The test writes one layer's data device
/// over the other's, under a mount that checked the device when it opened it.
#[test]
fn another_layers_content_is_never_served() {
    let registry = TestRegistry::start();
    let tar = |seed: u64| (0..6).fold(Tar::new(), |tar, i| tar.file(format!("f{i}"), noise(seed + i, 300_000)));
    let layers = [10, 20].map(|seed| Blob::plain(tar(seed).finish()));
    for (layer, tag) in layers.iter().zip(["1", "2"]) {
        push(&registry, "app", tag, std::slice::from_ref(layer));
    }
    let ocifs = Ocifs::new();
    let host = registry.host();
    let image = |tag: &str| format!("{host}/app:{tag}");
    ocifs.ok(["pull", &image("1")]);
    ocifs.ok(["pull", &image("2")]);
    let data = |layer: &Blob| {
        let name = layer.digest().to_string().replace(':', "-");
        ocifs.store().join("layers").join(name).join("data")
    };
    let mount = ocifs.mount_with(&image("1"), &["--wait", "ready", "--prefetch", "none"]);
    assert!(mount.read("f0") == noise(10, 300_000));
    let other = fs::read(data(&layers[1])).unwrap();
    File::options()
        .write(true)
        .open(data(&layers[0]))
        .unwrap()
        .write_all_at(&other, 0)
        .unwrap();
    for i in 0..6 {
        mount.forget(&format!("f{i}"));
        assert!(mount.read(&format!("f{i}")) == noise(10 + i, 300_000), "f{i}");
    }
    drop(mount);
    // The record of one tag does not stand for another tag.
    drop(registry);
    let names = files(&ocifs.store().join("documents/of"));
    assert_eq!(names.len(), 2);
    let before: Vec<Vec<u8>> = names.iter().map(|name| fs::read(name).unwrap()).collect();
    for (name, other) in names.iter().zip(before.iter().rev()) {
        fs::write(name, other).unwrap();
    }
    for tag in ["1", "2"] {
        let said = ocifs.run(["cat", &image(tag), "f0"]);
        assert_ne!(said.code, Some(0), "{said:?}");
    }
    let said = ocifs.run(["cache", "verify"]);
    assert_eq!(said.code, Some(1), "{said:?}");
}
