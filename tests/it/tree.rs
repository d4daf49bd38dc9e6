//! Compares the merge with the kernel's overlay file system, on layers that both can express. In such layers every
//! parent has an entry, no path occurs twice, and no whiteout meets a new entry of its own layer.

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::Command;

use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use ocifs::toc::{DataLayout, EntryKind, FileData, Metadata, Toc, TocEntry, Xattrs};
use ocifs::tree::{LayerIdx, Merger, NodeKind, Tree};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::TestRunner;
use tempfile::TempDir;

/// Entries by path. A file's content is one letter, that of its layer, repeated to its size.
type Layer = BTreeMap<String, TocEntry>;

fn path() -> impl Strategy<Value = Vec<&'static str>> {
    vec(select(vec!["a", "b", "c"]), 1..4)
}

fn kind() -> impl Strategy<Value = EntryKind> {
    let file = |size| {
        EntryKind::Regular(FileData {
            size,
            layout: DataLayout::Flat { device: 0 },
        })
    };
    prop_oneof![
        4 => (1..100u64).prop_map(file),
        4 => Just(EntryKind::Directory),
        3 => Just(EntryKind::Whiteout),
        2 => Just(EntryKind::Opaque),
        1 => select(vec!["a", "../b", "/c"]).prop_map(|target| EntryKind::Symlink(target.as_bytes().into())),
        1 => path().prop_map(|target| EntryKind::Hardlink(target.join("/").into_bytes().into())),
        1 => Just(EntryKind::Fifo),
    ]
}

fn entry(path: &str, kind: EntryKind, mode: u16, uid: u32) -> TocEntry {
    let meta = Metadata {
        mode,
        uid,
        gid: uid + 1,
        mtime: i64::from(uid) * 1000,
        mtime_nsec: 0,
    };
    TocEntry {
        path: path.as_bytes().into(),
        kind,
        meta,
        xattrs: Xattrs::new(),
    }
}

/// Generates a layer that overlay can express, and the paths of its opaque directories.
fn layer() -> impl Strategy<Value = (Layer, Vec<String>)> {
    vec((path(), kind(), 0..0o7777u16, 0..9u32), 0..12).prop_map(|items| {
        let mut layer = Layer::new();
        let mut opaques = Vec::new();
        for (path, kind, mode, uid) in items {
            let is_directory =
                |layer: &Layer, path: &str| layer.get(path).map(|entry| entry.kind == EntryKind::Directory);
            let parents: Vec<_> = (1..path.len()).map(|depth| path[..depth].join("/")).collect();
            if parents.iter().any(|parent| is_directory(&layer, parent) == Some(false)) {
                continue;
            }
            let path = path.join("/");
            match &kind {
                EntryKind::Opaque if is_directory(&layer, &path) == Some(true) => {
                    opaques.push(path);
                    continue;
                }
                EntryKind::Opaque => continue,
                EntryKind::Hardlink(target) => {
                    let target = layer.get(std::str::from_utf8(target).unwrap());
                    if !target.is_some_and(|target| matches!(target.kind, EntryKind::Regular(_))) {
                        continue;
                    }
                }
                _ => {}
            }
            for parent in parents {
                let made = entry(&parent, EntryKind::Directory, mode, uid);
                layer.entry(parent).or_insert(made);
            }
            layer
                .entry(path.clone())
                .or_insert_with(|| entry(&path, kind, mode, uid));
        }
        (layer, opaques)
    })
}

/// Writes a layer into a directory in the form that overlay needs.
fn unpack(layer: &Layer, opaques: &[String], number: usize, root: &Path) {
    // Hard links come last, so that their targets exist.
    let links = layer
        .values()
        .filter(|entry| matches!(entry.kind, EntryKind::Hardlink(_)));
    let others = layer
        .values()
        .filter(|entry| !matches!(entry.kind, EntryKind::Hardlink(_)));
    let at = |entry: &TocEntry| root.join(std::str::from_utf8(&entry.path).unwrap());
    for entry in others.chain(links) {
        let file = at(entry);
        match &entry.kind {
            EntryKind::Directory => fs::create_dir(&file).unwrap(),
            EntryKind::Regular(data) => fs::write(&file, content(number, data.size)).unwrap(),
            EntryKind::Symlink(target) => {
                std::os::unix::fs::symlink(std::str::from_utf8(target).unwrap(), &file).unwrap()
            }
            EntryKind::Fifo => mknod(&file, SFlag::S_IFIFO, Mode::empty(), 0).unwrap(),
            EntryKind::Whiteout => mknod(&file, SFlag::S_IFCHR, Mode::empty(), makedev(0, 0)).unwrap(),
            EntryKind::Hardlink(target) => {
                fs::hard_link(root.join(std::str::from_utf8(target).unwrap()), &file).unwrap()
            }
            other => unreachable!("{other:?} is not generated"),
        }
    }
    for path in opaques {
        let set = ["-n", "trusted.overlay.opaque", "-v", "y"];
        assert!(
            Command::new("setfattr")
                .args(set)
                .arg(root.join(path))
                .status()
                .unwrap()
                .success()
        );
    }
    for entry in layer.values().rev() {
        let Metadata { mode, uid, gid, .. } = entry.meta;
        let file = at(entry);
        match entry.kind {
            EntryKind::Whiteout | EntryKind::Hardlink(_) => continue,
            EntryKind::Symlink(_) => std::os::unix::fs::lchown(&file, Some(uid), Some(gid)).unwrap(),
            _ => {
                std::os::unix::fs::lchown(&file, Some(uid), Some(gid)).unwrap();
                fs::set_permissions(&file, Permissions::from_mode(mode.into())).unwrap();
            }
        }
    }
}

fn content(layer: usize, size: u64) -> String {
    char::from(b'A' + layer as u8).to_string().repeat(size as usize)
}

/// Returns one line for each path of the merged tree.
fn rows_of_tree(tree: &Tree) -> Vec<String> {
    let mut rows = Vec::new();
    let mut todo = vec![(String::new(), Tree::ROOT)];
    while let Some((path, id)) = todo.pop() {
        let node = tree.node(id);
        let what = match &node.kind {
            NodeKind::Directory(children) => {
                let name = |name: &[u8]| format!("{path}/{}", std::str::from_utf8(name).unwrap());
                todo.extend(children.iter().map(|(child, id)| (name(child), *id)));
                "directory".to_owned()
            }
            NodeKind::Regular { layer, data } => content(layer.0 as usize, data.size),
            NodeKind::Symlink(target) => format!("-> {}", std::str::from_utf8(target).unwrap()),
            NodeKind::Fifo => "fifo".to_owned(),
            other => unreachable!("{other:?} is not generated"),
        };
        if !path.is_empty() {
            rows.push(format!(
                "{path} {:o} {}:{} {what}",
                node.meta.mode, node.meta.uid, node.meta.gid
            ));
        }
    }
    rows.sort();
    rows
}

/// Returns one line for each path of a mounted overlay, in the form of [`rows_of_tree`].
fn rows_of_mount(root: &Path) -> Vec<String> {
    let mut rows = Vec::new();
    let mut todo = vec![(String::new(), root.to_owned())];
    while let Some((path, file)) = todo.pop() {
        let stat = match fs::symlink_metadata(&file) {
            Ok(stat) => stat,
            // Overlay lists a whiteout in a directory that only one layer has, but the file does not exist.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => panic!("{file:?}: {error}"),
        };
        let what = if stat.is_dir() {
            for child in fs::read_dir(&file).unwrap() {
                let name = child.unwrap().file_name().into_string().unwrap();
                todo.push((format!("{path}/{name}"), file.join(name)));
            }
            "directory".to_owned()
        } else if stat.is_symlink() {
            format!("-> {}", fs::read_link(&file).unwrap().display())
        } else if stat.file_type().is_fifo() {
            "fifo".to_owned()
        } else {
            fs::read_to_string(&file).unwrap()
        };
        if !path.is_empty() {
            rows.push(format!(
                "{path} {:o} {}:{} {what}",
                stat.mode() & 0o7777,
                stat.uid(),
                stat.gid()
            ));
        }
    }
    rows.sort();
    rows
}

/// An overlay of directories. Dropping it unmounts it.
struct Overlay(TempDir);

impl Overlay {
    fn new(layers: &[(Layer, Vec<String>)]) -> Self {
        let dir = TempDir::new().unwrap();
        // An overlay without an upper directory needs at least two layers, so an empty one lies below.
        let mut lowers = vec!["empty".to_owned()];
        fs::create_dir(dir.path().join("empty")).unwrap();
        for (number, (layer, opaques)) in layers.iter().enumerate() {
            let name = format!("layer{number}");
            fs::create_dir(dir.path().join(&name)).unwrap();
            unpack(layer, opaques, number, &dir.path().join(&name));
            lowers.insert(0, name);
        }
        fs::create_dir(dir.path().join("merged")).unwrap();
        let options = format!("ro,lowerdir={}", lowers.join(":"));
        let args = ["-t", "overlay", "overlay", "merged", "-o", &options];
        let output = Command::new("mount")
            .current_dir(dir.path())
            .args(args)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "these tests need root and a kernel with overlay: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Self(dir)
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        let status = Command::new("umount").arg(self.0.path().join("merged")).status();
        assert!(
            status.is_ok_and(|status| status.success()),
            "cannot unmount {:?}",
            self.0.path()
        );
    }
}

#[test]
fn merge_agrees_with_overlayfs() {
    let config = ProptestConfig {
        failure_persistence: None,
        max_shrink_iters: 200,
        ..ProptestConfig::with_cases(150)
    };
    TestRunner::new(config)
        .run(&vec(layer(), 1..5), |layers| {
            let overlay = Overlay::new(&layers);
            let mut merger = Merger::new();
            for (number, (layer, opaques)) in layers.iter().enumerate() {
                let mut entries: Vec<_> = layer.values().cloned().collect();
                for entry in &mut entries {
                    // The metadata of a hard link would apply to the shared inode, so the link gets that of its
                    // target, as in tar.
                    if let EntryKind::Hardlink(target) = &entry.kind {
                        entry.meta = layer[std::str::from_utf8(target).unwrap()].meta;
                    }
                }
                entries.extend(opaques.iter().map(|path| entry(path, EntryKind::Opaque, 0, 0)));
                merger
                    .add(
                        LayerIdx(number as u32),
                        &Toc {
                            entries,
                            device_size: 1 << 20,
                            ..Toc::default()
                        }
                        .pack()
                        .unwrap(),
                    )
                    .unwrap();
            }
            prop_assert_eq!(
                rows_of_tree(&merger.finish()),
                rows_of_mount(&overlay.0.path().join("merged"))
            );
            Ok(())
        })
        .unwrap();
}
