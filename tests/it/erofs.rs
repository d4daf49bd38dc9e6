//! The file system image against three other readers: `fsck.erofs`, `dump.erofs` and the kernel.

mod hostile;
mod kernel;
mod trees;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use ocifs::erofs::{self, FileType, Mapping, Nid, Reader};
use ocifs::oci::Digest;
use ocifs::toc::{Metadata, Xattrs};
use ocifs::tree::{Node, NodeId, NodeKind, Tree};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use tempfile::TempDir;

use trees::{Builder, Sample};

fn image_of(sample: &Sample) -> Vec<u8> {
    let mut image = Vec::new();
    let summary = erofs::write(
        &sample.tree,
        &sample.device_sizes(),
        &Digest::of(b"manifest"),
        &mut image,
    )
    .unwrap();
    assert_eq!(summary.metadata_bytes, image.len() as u64);
    assert_eq!(summary.inodes, sample.tree.len() as u64);
    image
}

/// Writes the virtual disk to a file: metadata, then all devices.
fn disk_of(sample: &Sample, dir: &TempDir) -> PathBuf {
    let path = dir.path().join("disk.erofs");
    let mut file = fs::File::create(&path).unwrap();
    file.write_all(&image_of(sample)).unwrap();
    for device in &sample.devices {
        file.write_all(device).unwrap();
    }
    path
}

fn nodes(tree: &Tree) -> impl Iterator<Item = Node> {
    (0..tree.len() as u32).map(|number| tree.node(NodeId(number)))
}

/// Returns every path of the tree with its node. The root is the empty path.
fn paths(tree: &Tree) -> Vec<(Vec<u8>, NodeId)> {
    let mut paths = vec![(Vec::new(), Tree::ROOT)];
    let mut at = 0;
    while let Some((path, id)) = paths.get(at).cloned() {
        if let NodeKind::Directory(children) = &tree.node(id).kind {
            for (name, child) in children {
                paths.push(([&path[..], b"/", name].concat(), *child));
            }
        }
        at += 1;
    }
    paths
}

fn run_tool(tool: &str, args: &[&str], disk: &Path) -> String {
    let output = Command::new(tool).args(args).arg(disk).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{tool} {args:?}: {text}");
    text
}

fn assert_fsck_is_clean(disk: &Path) {
    let text = run_tool("fsck.erofs", &["-d3", "--extract"], disk);
    assert!(text.lines().any(|line| line.contains("No error")), "{text}");
}

/// Returns the content of a regular file, read through its mappings.
fn read_mapped(reader: &Reader<Vec<u8>>, sample: &Sample, nid: Nid) -> Vec<u8> {
    let mut content = Vec::new();
    while let Some(mapping) = reader.map(nid, content.len() as u64).unwrap() {
        assert!(mapping.bytes() > 0);
        match mapping {
            Mapping::Hole { len } => content.resize(content.len() + len as usize, 0),
            Mapping::Device { layer, offset, len } => {
                content.extend_from_slice(&sample.devices[layer.0 as usize][offset as usize..][..len as usize]);
            }
        }
    }
    content
}

/// Compares a node with what the reader returns for it.
fn assert_same_node(reader: &Reader<Vec<u8>>, sample: &Sample, nid: Nid, id: NodeId) {
    let node = sample.tree.node(id);
    let inode = reader.inode(nid).unwrap();
    let meta = Metadata {
        mode: inode.mode & 0o7777,
        uid: inode.uid,
        gid: inode.gid,
        mtime: inode.mtime,
        mtime_nsec: inode.mtime_nsec,
    };
    assert_eq!((meta, inode.nlink), (node.meta, node.nlink));
    assert_eq!(inode.mode & 0o170_000, inode.file_type.mode_bits());
    let mut xattrs: Xattrs = reader
        .xattrs(nid)
        .unwrap()
        .map(|xattr| xattr.map(|xattr| (xattr.name().into(), xattr.value.into())).unwrap())
        .collect();
    // The reader returns shared attributes first.
    xattrs.sort();
    assert_eq!(xattrs, node.xattrs);
    for (name, value) in &node.xattrs {
        assert_eq!(reader.xattr(nid, name).unwrap(), Some(&value[..]));
    }
    assert_eq!(reader.xattr(nid, b"user.there-is-no-such").unwrap(), None);
    match &node.kind {
        NodeKind::Directory(_) => assert_eq!(inode.file_type, FileType::Directory),
        NodeKind::Regular { layer, data } => {
            assert_eq!((inode.file_type, inode.size), (FileType::Regular, data.size));
            assert_eq!(read_mapped(reader, sample, nid), sample.content(*layer, data));
        }
        NodeKind::Symlink(target) => assert_eq!(reader.symlink(nid).unwrap(), &target[..]),
        NodeKind::CharDevice(_) => assert_eq!(inode.file_type, FileType::CharDevice),
        NodeKind::BlockDevice(_) => assert_eq!(inode.file_type, FileType::BlockDevice),
        NodeKind::Fifo => assert_eq!(inode.file_type, FileType::Fifo),
    }
}

fn assert_round_trip(sample: &Sample) {
    let image = image_of(sample);
    assert_eq!(image, image_of(sample), "equal trees give equal bytes");
    let reader = Reader::open(image, &sample.device_sizes()).unwrap();
    assert_eq!(
        reader.has_any_xattr(),
        nodes(&sample.tree).any(|node| !node.xattrs.is_empty())
    );
    assert_eq!(reader.inodes(), sample.tree.len() as u64);
    let mut nids = BTreeMap::from([(Tree::ROOT, reader.root())]);
    let mut todo = vec![(Tree::ROOT, reader.root(), reader.root())];
    let mut seen = BTreeSet::new();
    while let Some((id, nid, parent)) = todo.pop() {
        assert_eq!(
            *nids.entry(id).or_insert(nid),
            nid,
            "names of one inode lead to one nid"
        );
        assert_same_node(&reader, sample, nid, id);
        let NodeKind::Directory(children) = &sample.tree.node(id).kind else {
            continue;
        };
        assert!(seen.insert(id));
        assert_eq!(reader.lookup(nid, b".").unwrap(), Some((nid, FileType::Directory)));
        assert_eq!(reader.lookup(nid, b"..").unwrap(), Some((parent, FileType::Directory)));
        for (name, child) in children {
            let (found, file_type) = reader.lookup(nid, name).unwrap().unwrap();
            assert_eq!(reader.inode(found).unwrap().file_type, file_type);
            todo.push((*child, found, nid));
            let other = [name, &b"\x01"[..]].concat();
            let known = children.iter().any(|(name, _)| **name == other[..]);
            assert_eq!(reader.lookup(nid, &other).unwrap().is_some(), known);
        }
        assert_listing(&reader, nid, children);
    }
    assert_eq!(nids.values().collect::<BTreeSet<_>>().len(), sample.tree.len());
}

/// Asserts that the listing has the children, `.` and `..`, in order, and can resume at each position.
fn assert_listing(reader: &Reader<Vec<u8>>, nid: Nid, children: &[(Box<[u8]>, NodeId)]) {
    let mut wanted: Vec<&[u8]> = children.iter().map(|(name, _)| &name[..]).collect();
    wanted.extend([&b"."[..], b".."]);
    wanted.sort_unstable();
    let entries: Vec<_> = reader.entries(nid, 0).unwrap().map(Result::unwrap).collect();
    let names: Vec<_> = entries.iter().map(|entry| entry.name).collect();
    assert_eq!(names, wanted);
    let step = (entries.len() / 50).max(1);
    for (at, entry) in entries.iter().enumerate().step_by(step) {
        let rest: Vec<_> = reader.entries(nid, entry.next).unwrap().map(Result::unwrap).collect();
        assert_eq!(rest, entries[at + 1..]);
        assert_eq!(
            reader.lookup(nid, entry.name).unwrap(),
            Some((entry.nid, entry.file_type))
        );
    }
}

fn run(cases: u32, most: usize, check: impl Fn(&Sample)) {
    let config = ProptestConfig {
        max_shrink_iters: 200,
        failure_persistence: None,
        ..ProptestConfig::with_cases(cases)
    };
    TestRunner::new(config)
        .run(&trees::sample(most), |sample| {
            check(&sample);
            Ok(())
        })
        .unwrap();
}

#[test]
fn random_trees_come_back() {
    run(150, 60, assert_round_trip);
}

#[test]
fn corner_cases_come_back() {
    assert_round_trip(&trees::corners());
    assert_round_trip(&Builder::new(0).finish());
}

#[test]
fn fsck_finds_random_trees_clean() {
    run(60, 60, |sample| {
        let dir = TempDir::new().unwrap();
        assert_fsck_is_clean(&disk_of(sample, &dir));
    });
}

#[test]
fn fsck_and_dump_know_the_corner_cases() {
    let sample = trees::corners();
    let dir = TempDir::new().unwrap();
    let disk = disk_of(&sample, &dir);
    assert_fsck_is_clean(&disk);
    let text = run_tool("dump.erofs", &["-s"], &disk);
    let inodes = format!("{}", sample.tree.len());
    let line = text
        .lines()
        .find(|line| line.starts_with("Filesystem inode count"))
        .unwrap();
    assert_eq!(line.split_whitespace().last(), Some(inodes.as_str()));
    let text = run_tool("dump.erofs", &["--path=/many/0001-n"], &disk);
    assert!(text.contains("Size: 1"), "{text}");
}

#[test]
fn a_hundred_thousand_files() {
    let mut builder = Builder::new(1);
    let kind = builder.flat(0, 1);
    for number in 0..1000 {
        let name = format!("directory-{number}");
        let dir = NodeKind::Directory(Vec::new());
        let dir = builder
            .add(
                Tree::ROOT,
                name.as_bytes(),
                trees::meta(0o755, 0, 0),
                Xattrs::new(),
                dir,
            )
            .unwrap();
        for file in 0..100 {
            let name = format!("file-number-{file}.py");
            builder.add(
                dir,
                name.as_bytes(),
                trees::meta(0o644, 0, 0),
                Xattrs::new(),
                kind.clone(),
            );
        }
    }
    let sample = builder.finish();
    let start = Instant::now();
    let image = image_of(&sample);
    println!("written {} bytes in {:?}", image.len(), start.elapsed());
    let reader = Reader::open(image, &sample.device_sizes()).unwrap();
    let start = Instant::now();
    let mut found = 0;
    for number in 0..1000 {
        for file in 0..100 {
            let (dir, _) = reader
                .lookup(reader.root(), format!("directory-{number}").as_bytes())
                .unwrap()
                .unwrap();
            found += usize::from(
                reader
                    .lookup(dir, format!("file-number-{file}.py").as_bytes())
                    .unwrap()
                    .is_some(),
            );
        }
    }
    println!("{} lookups in {:?}", 2 * found, start.elapsed());
    assert_eq!(found, 100_000);
}
