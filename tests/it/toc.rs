//! The TOC of tars that real programs wrote, compared with the files that GNU tar extracts from the same tars.
//!
//! Needs root (owners, devices, capabilities) and `tar`, `getfattr`, `setfattr`, `setcap`. Some tests need `bsdtar`
//! or `python3`.

mod real_tree;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::process::{Command, Stdio};

use ocifs::toc::{
    DEVICE_BLOCK, DataLayout, DeviceNumber, EntryKind, ExtentTable, FileData, Limits, TarReader, Toc, TocEntry,
};

use real_tree::{Features, GNU, PAX, USTAR, V7, getfattr, make_tree, walk};

type Bytes = Box<[u8]>;

/// Panics if a program is missing. `package` is the Debian package that has it.
fn need(program: &str, package: &str) {
    let found = Command::new(program)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    if let Err(error) = found {
        panic!("tests of tars that real programs wrote need {program} ({package}): {error}");
    }
}

/// Checks for the programs that all of these tests need.
fn need_basics() {
    assert!(
        nix::unistd::geteuid().is_root(),
        "tests of tars with owners and devices need root"
    );
    for (program, package) in [
        ("tar", "tar"),
        ("getfattr", "attr"),
        ("setfattr", "attr"),
        ("setcap", "libcap2-bin"),
    ] {
        need(program, package);
    }
}

fn run(command: &mut Command) -> Vec<u8> {
    let output = command.stderr(Stdio::piped()).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {stderr}");
    output.stdout
}

/// Reads a tar in pieces of random size. Also checks that the TOC survives its encoding.
fn read(tar: &[u8], seed: u64) -> Toc {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut reader = TarReader::new(Limits::default());
    let mut rest = tar;
    while !rest.is_empty() {
        let (head, tail) = rest.split_at(rng.usize(1..100_000).min(rest.len()));
        reader.push(head, &mut |_, _| ()).unwrap();
        rest = tail;
    }
    let toc = reader.finish().unwrap().toc.unpack().unwrap();
    let mut encoded = Vec::new();
    toc.encode(&mut encoded).unwrap();
    assert_eq!(Toc::decode(&encoded).unwrap(), toc);
    toc
}

/// Returns bytes of the data device, read through the extents.
fn device_bytes(tar: &[u8], table: &ExtentTable, device: u64, len: u64) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    for piece in table.pieces_in_device(device..device + len) {
        let at = (piece.device - device) as usize;
        let source = &tar[piece.tar as usize..(piece.tar + piece.len) as usize];
        bytes[at..at + source.len()].copy_from_slice(source);
    }
    bytes
}

fn content(tar: &[u8], table: &ExtentTable, data: &FileData) -> Vec<u8> {
    match &data.layout {
        DataLayout::Flat { .. } if data.size == 0 => Vec::new(),
        DataLayout::Flat { device } => device_bytes(tar, table, *device, data.size),
        DataLayout::Chunked { chunk_bits, chunks } => {
            let chunk = DEVICE_BLOCK << chunk_bits;
            let mut bytes = vec![0; data.size as usize];
            for (number, device) in chunks {
                let start = u64::from(*number) * chunk;
                let stored = device_bytes(tar, table, *device, chunk.min(data.size - start));
                bytes[start as usize..][..stored.len()].copy_from_slice(&stored);
            }
            bytes
        }
    }
}

/// Extracts the tar with GNU tar and compares names, metadata and content.
fn check_against_gnu_tar(tar: &[u8], toc: &Toc, label: &str) {
    let scratch = tempfile::tempdir().unwrap();
    let (file, out) = (scratch.path().join("tar"), scratch.path().join("out"));
    fs::write(&file, tar).unwrap();
    fs::create_dir(&out).unwrap();
    let mut extract = Command::new("tar");
    extract.args([
        "--xattrs",
        "--xattrs-include=*",
        "--delay-directory-restore",
        "--numeric-owner",
        "-p",
        "--warning=no-unknown-keyword",
        "-xf",
    ]);
    run(extract.arg(&file).arg("-C").arg(&out));
    assert!(toc.warnings.is_empty(), "{label}: {:?}", toc.warnings);

    let table = toc.extent_table();
    let entries: BTreeMap<&[u8], &TocEntry> = toc.entries.iter().map(|e| (&*e.path, e)).collect();
    let mut found = Vec::new();
    walk(&out, &out, &mut found);
    found.sort();
    let names: Vec<_> = entries
        .keys()
        .filter(|path| !path.is_empty())
        .map(|path| path.to_vec())
        .collect();
    assert_eq!(names, found, "{label}: not the same names");
    for path in found {
        let real = out.join(std::ffi::OsString::from_vec(path.clone()));
        let stat = fs::symlink_metadata(&real).unwrap();
        let mut entry = entries[&path[..]];
        let at = format!("{label}: {}", path.escape_ascii());
        if let EntryKind::Hardlink(target) = &entry.kind {
            let other = fs::symlink_metadata(out.join(OsStr::from_bytes(target))).unwrap();
            assert_eq!((stat.dev(), stat.ino()), (other.dev(), other.ino()), "{at}");
            entry = entries[&target[..]];
        }
        let meta = entry.meta;
        assert_eq!(u32::from(meta.mode), stat.mode() & 0o7777, "{at}");
        assert_eq!((meta.uid, meta.gid), (stat.uid(), stat.gid()), "{at}");
        // Extracting a hard link changes only the ctime of its inode, so mtimes stay comparable.
        assert_eq!(
            (meta.mtime, i64::from(meta.mtime_nsec)),
            (stat.mtime(), stat.mtime_nsec()),
            "{at}"
        );
        let rdev = |major: u32, minor: u32| u64::from(minor & 0xff | major << 8) | u64::from(minor & !0xff) << 12;
        let kind = stat.file_type();
        match &entry.kind {
            EntryKind::Directory => assert!(kind.is_dir(), "{at}"),
            EntryKind::Regular(data) => {
                assert!(kind.is_file(), "{at}");
                assert_eq!(data.size, stat.size(), "{at}");
                assert!(
                    content(tar, &table, data) == fs::read(&real).unwrap(),
                    "{at}: other content"
                );
            }
            EntryKind::Symlink(target) => {
                assert_eq!(&**target, fs::read_link(&real).unwrap().as_os_str().as_bytes(), "{at}");
            }
            EntryKind::CharDevice(DeviceNumber { major, minor }) => {
                assert!(kind.is_char_device() && stat.rdev() == rdev(*major, *minor), "{at}");
            }
            EntryKind::BlockDevice(DeviceNumber { major, minor }) => {
                assert!(kind.is_block_device() && stat.rdev() == rdev(*major, *minor), "{at}");
            }
            EntryKind::Fifo => assert!(kind.is_fifo(), "{at}"),
            other => panic!("{at}: unexpected {other:?}"),
        }
        assert_eq!(entry.xattrs, getfattr(&real), "{at}");
    }
}

/// Compares with GNU tar for a few trees. Returns how many files had a sparse map.
fn check_writer(
    features: Features,
    seeds: std::ops::Range<u64>,
    label: &str,
    write: impl Fn(&Path) -> Vec<u8>,
) -> usize {
    let mut sparse = 0;
    for seed in seeds {
        let tree = tempfile::tempdir().unwrap();
        make_tree(tree.path(), seed, features);
        let tar = write(tree.path());
        let toc = read(&tar, seed);
        assert!(
            toc.entries.len() > 50,
            "{label}: {} entries test nothing",
            toc.entries.len()
        );
        check_against_gnu_tar(&tar, &toc, &format!("{label}, seed {seed}"));
        let chunked = |e: &&TocEntry| {
            matches!(
                &e.kind,
                EntryKind::Regular(FileData {
                    layout: DataLayout::Chunked { .. },
                    ..
                })
            )
        };
        sparse += toc.entries.iter().filter(chunked).count();
    }
    sparse
}

fn gnu_tar(features: Features, options: &[&str]) {
    need_basics();
    let mut label = "tar".to_owned();
    options.iter().for_each(|option| label.extend([" ", option]));
    let sparse = check_writer(features, 0..2, &label, |tree| {
        let mut tar = Command::new("tar");
        if features.pax {
            tar.args(["--xattrs", "--xattrs-include=*"]);
        }
        run(tar.args(options).arg("-C").arg(tree).args(["-cf", "-", "."]))
    });
    assert_eq!(
        sparse > 5,
        options.contains(&"--sparse"),
        "{label}: {sparse} sparse files"
    );
}

#[test]
fn gnu_tar_v7() {
    gnu_tar(V7, &["--format=v7"]);
}

#[test]
fn gnu_tar_ustar() {
    gnu_tar(USTAR, &["--format=ustar"]);
}

#[test]
fn gnu_tar_gnu() {
    gnu_tar(GNU, &["--format=gnu"]);
    gnu_tar(GNU, &["--format=gnu", "--sparse"]);
    gnu_tar(GNU, &["--format=gnu", "--sparse", "--hole-detection=raw"]);
}

#[test]
fn gnu_tar_incremental() {
    // Covers dump directories, and access times in headers where other formats have the prefix.
    gnu_tar(GNU, &["--format=gnu", "--incremental", "--sparse"]);
}

#[test]
fn gnu_tar_oldgnu() {
    gnu_tar(GNU, &["--format=oldgnu", "--sparse"]);
}

#[test]
fn gnu_tar_pax() {
    gnu_tar(PAX, &["--format=pax"]);
    for version in ["0.0", "0.1", "1.0"] {
        gnu_tar(PAX, &["--format=pax", "--sparse", "--sparse-version", version]);
        gnu_tar(
            PAX,
            &[
                "--format=pax",
                "--sparse",
                "--sparse-version",
                version,
                "--hole-detection=raw",
            ],
        );
    }
}

#[test]
fn bsdtar() {
    need_basics();
    need("bsdtar", "libarchive-tools");
    // bsdtar 3.6 loses the directory of sparse files whose names are not UTF-8.
    let pax = Features {
        raw_names: false,
        ..PAX
    };
    for (format, features) in [("ustar", USTAR), ("gnutar", GNU), ("pax", pax)] {
        check_writer(features, 10..12, &format!("bsdtar {format}"), |tree| {
            run(Command::new("bsdtar")
                .args(["--format", format, "-cf", "-", "-C"])
                .arg(tree)
                .arg("."))
        });
    }
}

#[test]
fn python_tarfile() {
    need_basics();
    need("python3", "python3");
    const SCRIPT: &str = "import sys, tarfile
with tarfile.open(fileobj=sys.stdout.buffer, mode='w|', format=getattr(tarfile, sys.argv[2])) as t:
    t.add(sys.argv[1], arcname='/')";
    for (format, features) in [("USTAR_FORMAT", USTAR), ("GNU_FORMAT", GNU), ("PAX_FORMAT", GNU)] {
        check_writer(features, 20..22, &format!("tarfile {format}"), |tree| {
            run(Command::new("python3").args(["-c", SCRIPT]).arg(tree).arg(format))
        });
    }
}

/// libarchive writes every attribute in two spellings. The base64 spelling alone must be enough.
#[test]
fn both_spellings_of_attributes() {
    need_basics();
    need("bsdtar", "libarchive-tools");
    let tree = tempfile::tempdir().unwrap();
    let file = tree.path().join("f");
    fs::write(&file, "x").unwrap();
    run(Command::new("setfattr")
        .args(["-n", "user.binary", "-v", "0x000a3dff"])
        .arg(&file));
    run(Command::new("setcap").arg("cap_net_raw+ep").arg(&file));
    let mut tar = run(Command::new("bsdtar")
        .args(["--format", "pax", "-cf", "-", "-C"])
        .arg(tree.path())
        .arg("f"));
    let expected = getfattr(&file);
    assert!(expected.iter().any(|(name, _)| &**name == b"security.capability"));
    let find = |tar: &[u8], what: &[u8]| tar.windows(what.len()).position(|w| w == what);
    for key in [&b"SCHILY.xattr."[..], b"LIBARCHIVE.xattr."] {
        assert!(
            find(&tar, key).is_some(),
            "bsdtar no longer writes {}",
            key.escape_ascii()
        );
    }
    assert_eq!(read(&tar, 0).entries[0].xattrs, expected);
    while let Some(at) = find(&tar, b"SCHILY.xattr.") {
        tar[at..at + 6].copy_from_slice(b"NOBODY");
    }
    assert_eq!(read(&tar, 0).entries[0].xattrs, expected);
}
