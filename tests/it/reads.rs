//! What programs see through the kernel: names, metadata, and bytes by every way of reading.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::process::Command;

use nix::errno::Errno;
use nix::libc;

use crate::common::layers::{Blob, Tar, header, noise, push};
use crate::common::ocifs::{Mounted, Ocifs, bounded, tool};
use crate::common::registry::TestRegistry;

const BIG: usize = 3 << 20;

/// What setcap(8) writes for cap_net_raw=ep: VFS_CAP_REVISION_2 with the effective flag.
const CAPABILITY: &[u8] = b"\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00";

/// An image with a file of every kind, mounted with only indexes in the store.
struct Scene {
    _registry: TestRegistry,
    ocifs: Ocifs,
    image: String,
    mount: Mounted,
}

fn layers() -> Vec<Blob> {
    let mut tar = Tar::new().dir("many/");
    for i in 0..5000 {
        tar = tar.file(format!("many/file-{i:04}-with-a-name-of-some-length"), "");
    }
    let many = Blob::gzip(&tar.finish());
    let mut device = header(b"dev-null", tar::EntryType::Char, 0o666, 0);
    device.set_device_major(1).unwrap();
    device.set_device_minor(3).unwrap();
    let mut block = header(b"dev-big", tar::EntryType::Block, 0o660, 0);
    block.set_device_major(259).unwrap();
    block.set_device_minor(70_000).unwrap();
    let mut suid = header(b"suid", tar::EntryType::Regular, 0o4755, 2);
    suid.set_uid(1234);
    suid.set_gid(70_000);
    let tar = Tar::new()
        .file("big", noise(7, BIG))
        .file("small", "small\n")
        .link(tar::EntryType::Link, "small-too", "small")
        .link(tar::EntryType::Symlink, "symlink", "small")
        .raw(device, b"")
        .raw(block, b"")
        .raw(header(b"fifo", tar::EntryType::Fifo, 0o600, 0), b"")
        .raw(suid, b"ok")
        .pax(&[("mtime", b"1234567890.123456789")])
        .file("precise", "")
        .pax(&[("mtime", b"-1.25")])
        .file("ancient", "")
        .pax(&[
            ("SCHILY.xattr.security.capability", CAPABILITY),
            ("SCHILY.xattr.user.note", b"a\0b"),
        ])
        .file("ping", "#!/bin/sh\n")
        .file(b"latin1-\xe9\xff", "bytes")
        .sparse(
            "sparse",
            10 << 20,
            &[(0, &noise(8, 8192)[..4096]), (5 << 20, &noise(8, 8192)[4096..])],
        )
        .finish();
    vec![many, Blob::zstd(&tar)]
}

impl Scene {
    fn new() -> Self {
        Self::via("auto")
    }

    /// Mounts an image that the store knows, without its data.
    fn via(via: &str) -> Self {
        let registry = TestRegistry::start();
        push(&registry, "app", "1", &layers());
        let image = format!("{}/app:1", registry.host());
        let ocifs = Ocifs::new();
        drop(ocifs.mount(&image));
        ocifs.ok(["cache", "drop"]);
        let mount = ocifs.mount_with(&image, &["--via", via]);
        Self {
            _registry: registry,
            ocifs,
            image,
            mount,
        }
    }
}

fn python(script: &str, path: &Path) -> String {
    let output = tool("python3", [OsStr::new("-c"), OsStr::new(script), path.as_os_str()]);
    String::from_utf8(output).unwrap()
}

#[test]
fn nothing_can_be_changed() {
    let scene = Scene::new();
    let at = |name: &str| scene.mount.join(name);
    let refused = |what: &str, result: std::io::Result<()>| {
        let error = result.expect_err(what).raw_os_error();
        assert_eq!(error, Some(Errno::EROFS as i32), "{what}");
    };
    refused("create", File::create_new(at("new")).map(drop));
    refused("write", File::options().write(true).open(at("small")).map(drop));
    refused("mkdir", fs::create_dir(at("newdir")));
    refused("unlink", fs::remove_file(at("small")));
    refused("rmdir", fs::remove_dir(at("many")));
    refused("rename", fs::rename(at("small"), at("other")));
    refused("link", fs::hard_link(at("small"), at("other")));
    refused("symlink", std::os::unix::fs::symlink("x", at("other")));
    refused(
        "chmod",
        fs::set_permissions(at("small"), fs::metadata(at("small")).unwrap().permissions()),
    );
    refused("chown", std::os::unix::fs::chown(at("small"), Some(1), None));
    let said = bounded(
        Command::new("setfattr")
            .args(["-n", "user.x", "-v", "1"])
            .arg(at("small")),
    );
    assert!(said.stderr.contains("Read-only"), "{said:?}");
}

#[test]
fn attributes_are_those_of_the_tar_and_the_same_after_a_remount() {
    let scene = Scene::new();
    let names = [
        "big",
        "small",
        "small-too",
        "symlink",
        "dev-null",
        "dev-big",
        "fifo",
        "suid",
        "precise",
        "ancient",
        "ping",
        "many",
        ".",
    ];
    let all = |mount: &Mounted| -> Vec<_> {
        let stat = |name: &&str| fs::symlink_metadata(mount.join(name)).unwrap();
        let row = |m: fs::Metadata| {
            (
                m.ino(),
                m.nlink(),
                m.mode(),
                m.size(),
                m.mtime(),
                m.mtime_nsec(),
                m.rdev(),
            )
        };
        names.iter().map(stat).map(row).collect()
    };
    let before = all(&scene.mount);
    let stat = |name: &str| fs::symlink_metadata(scene.mount.join(name)).unwrap();
    assert_eq!(stat("small").ino(), stat("small-too").ino());
    assert_eq!(stat("small").nlink(), 2);
    assert_eq!(stat("big").nlink(), 1);
    assert_eq!(stat("many").nlink(), 2);
    assert_eq!(stat("big").size(), BIG as u64);
    assert_eq!(stat("big").blocks(), BIG as u64 / 512);
    assert_eq!(
        fs::read_link(scene.mount.join("symlink")).unwrap().to_str(),
        Some("small")
    );
    assert!(stat("fifo").file_type().is_fifo());
    assert!(stat("dev-null").file_type().is_char_device());
    assert_eq!(stat("dev-null").rdev(), libc::makedev(1, 3));
    assert!(stat("dev-big").file_type().is_block_device());
    assert_eq!(stat("dev-big").rdev(), libc::makedev(259, 70_000));
    let suid = stat("suid");
    assert_eq!((suid.mode() & 0o7777, suid.uid(), suid.gid()), (0o4755, 1234, 70_000));
    assert_eq!((stat("small").mtime(), stat("small").mtime_nsec()), (1_000_000_000, 0));
    assert_eq!(
        (stat("precise").mtime(), stat("precise").mtime_nsec()),
        (1_234_567_890, 123_456_789)
    );
    assert_eq!(
        (stat("ancient").mtime(), stat("ancient").mtime_nsec()),
        (-2, 750_000_000)
    );
    // The device node works, because root's mounts have devices.
    assert_eq!(fs::read(scene.mount.join("dev-null")).unwrap(), b"");
    let Scene {
        ocifs, image, mount, ..
    } = &scene;
    for via in ["fuse", "erofs"] {
        let again = ocifs.mount_with(image, &["--via", via]);
        assert_eq!(all(&again), before, "{via}");
    }
    // A mount with another store has the same numbers.
    let other = Ocifs::new().mount(image);
    assert_eq!(all(&other), before);
    assert_eq!(all(mount), before);
}

#[test]
fn large_directories_are_listed_and_can_be_rewound() {
    let scene = Scene::new();
    let path = scene.mount.join("many");
    let names = |path: &Path| -> BTreeSet<_> { fs::read_dir(path).unwrap().map(|e| e.unwrap().file_name()).collect() };
    let expected: BTreeSet<_> = (0..5000)
        .map(|i| format!("file-{i:04}-with-a-name-of-some-length").into())
        .collect();
    assert!(names(&path) == expected);
    assert_eq!(fs::read_dir(&path).unwrap().count(), 5000);
    // seekdir to an earlier position gives the rest of the entries, and rewinddir all of them. Python has no binding
    // for them, so the script calls C through ctypes.
    let script = r"
import ctypes, os, sys
c = ctypes.CDLL(None, use_errno=True)
c.opendir.restype = ctypes.c_void_p
for f in (c.readdir, c.rewinddir, c.closedir, c.telldir):
    f.argtypes = [ctypes.c_void_p]
c.readdir.restype = ctypes.c_void_p
c.telldir.restype = ctypes.c_long
c.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]
def read(d, n):
    names = []
    while len(names) < n:
        e = c.readdir(d)
        if not e: break
        names.append(ctypes.string_at(e + 19))
    return names
d = c.opendir(sys.argv[1].encode())
first = read(d, 3000)
place = c.telldir(d)
rest = read(d, 10**9)
c.seekdir(d, place)
assert read(d, 10**9) == rest
c.rewinddir(d)
assert read(d, 10**9) == first + rest
assert len(set(first + rest)) == 5002, len(set(first + rest))
c.closedir(d)
print('ok')
";
    assert_eq!(python(script, &path), "ok\n");
    // Every entry can be found by name, and no other name exists.
    assert!(fs::metadata(path.join("file-2500-with-a-name-of-some-length")).is_ok());
    let absent = fs::metadata(path.join("file-5000-with-a-name-of-some-length")).unwrap_err();
    assert_eq!(absent.raw_os_error(), Some(Errno::ENOENT as i32));
}

#[test]
fn extended_attributes_are_shown_by_getfattr() {
    let scene = Scene::new();
    let ping = scene.mount.join("ping");
    let dump = tool(
        "getfattr",
        [
            OsStr::new("-d"),
            "-m-".as_ref(),
            "-e".as_ref(),
            "hex".as_ref(),
            "--absolute-names".as_ref(),
            ping.as_os_str(),
        ],
    );
    let dump = String::from_utf8(dump).unwrap();
    let hex: String = CAPABILITY.iter().map(|b| format!("{b:02x}")).collect();
    assert!(dump.contains(&format!("security.capability=0x{hex}")), "{dump}");
    assert!(dump.contains("user.note=0x610062"), "{dump}");
    let capability = tool("/sbin/getcap", [ping.as_os_str()]);
    assert!(String::from_utf8_lossy(&capability).contains("cap_net_raw"));
    let said = bounded(Command::new("getfattr").args(["-n", "user.absent"]).arg(&ping));
    assert!(said.stderr.contains("No such attribute"), "{said:?}");
    let none = tool(
        "getfattr",
        [OsStr::new("-d"), "-m-".as_ref(), scene.mount.join("small").as_os_str()],
    );
    assert_eq!(none, b"");
}

#[test]
fn names_are_bytes() {
    let scene = Scene::new();
    let name = OsStr::from_bytes(b"latin1-\xe9\xff");
    let listed = fs::read_dir(scene.mount.path())
        .unwrap()
        .any(|e| e.unwrap().file_name() == name);
    assert!(listed);
    assert_eq!(fs::read(scene.mount.join(name)).unwrap(), b"bytes");
}

#[test]
fn a_sparse_file_reads_zeros_in_its_holes() {
    let scene = Scene::new();
    let bytes = scene.mount.read("sparse");
    let content = noise(8, 8192);
    assert_eq!(bytes.len(), 10 << 20);
    assert!(bytes[..4096] == content[..4096]);
    assert!(bytes[5 << 20..][..4096] == content[4096..]);
    assert_eq!(bytes.iter().filter(|b| **b != 0).count(), 8192);
    // The read crosses both edges of the second run.
    let file = File::open(scene.mount.join("sparse")).unwrap();
    let mut part = vec![1; 6000];
    file.read_exact_at(&mut part, (5 << 20) - 1000).unwrap();
    assert!(part[..1000].iter().chain(&part[5096..]).all(|b| *b == 0));
    assert!(part[1000..5096] == content[4096..]);
}

#[test]
fn every_way_of_reading_gives_the_same_bytes() {
    for via in ["fuse", "erofs"] {
        read_in_every_way(via);
    }
}

fn read_in_every_way(via: &str) {
    let scene = Scene::via(via);
    let path = scene.mount.join("big");
    let expected = noise(7, BIG);
    let ways: [(&str, &dyn Fn() -> Vec<u8>); 4] = [
        ("reads of 2 MiB", &|| {
            let file = File::open(&path).unwrap();
            let mut bytes = Vec::new();
            let mut part = vec![0; 2 << 20];
            loop {
                match file.read_at(&mut part, bytes.len() as u64).unwrap() {
                    0 => return bytes,
                    n => bytes.extend_from_slice(&part[..n]),
                }
            }
        }),
        ("random small reads", &|| {
            let file = File::open(&path).unwrap();
            let mut bytes = vec![0; BIG];
            let pieces = BIG.div_ceil(30_000);
            for i in 0..pieces {
                // 37 is coprime to the number of pieces, so the loop reads each piece once.
                let start = (i * 37 % pieces) * 30_000;
                let end = (start + 30_000).min(BIG);
                file.read_exact_at(&mut bytes[start..end], start as u64).unwrap();
            }
            bytes
        }),
        ("O_DIRECT", &|| {
            let file = File::options()
                .read(true)
                .custom_flags(libc::O_DIRECT)
                .open(&path)
                .unwrap();
            let mut buffer = vec![0_u8; (1 << 20) + 4096];
            let aligned = buffer.as_ptr().align_offset(4096);
            let mut bytes = Vec::new();
            loop {
                match file
                    .read_at(&mut buffer[aligned..][..1 << 20], bytes.len() as u64)
                    .unwrap()
                {
                    0 => return bytes,
                    n => bytes.extend_from_slice(&buffer[aligned..][..n]),
                }
            }
        }),
        ("mmap", &|| {
            let script = "import mmap, sys\nf = open(sys.argv[1], 'rb')\nm = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)\n\
                          back = [m[i:i + 65536] for i in reversed(range(0, len(m), 65536))]\n\
                          sys.stdout.write(b''.join(reversed(back)).decode())";
            python(script, &path).into_bytes()
        }),
    ];
    for (way, read) in ways {
        if (way, via) == ("O_DIRECT", "erofs") {
            // The kernel's EROFS has no direct I/O on a file system that lies in a file.
            continue;
        }
        for round in ["from the registry", "from the store"] {
            assert!(read() == expected, "{way} {round}");
            scene.mount.forget("big");
        }
        scene.ocifs.ok(["cache", "drop"]);
    }
    let file = File::open(&path).unwrap();
    let mut byte = [0];
    assert_eq!(file.read_at(&mut byte, BIG as u64).unwrap(), 0);
    assert_eq!(file.read_at(&mut byte, 1 << 50).unwrap(), 0);
}

#[test]
fn the_file_system_has_a_size() {
    let scene = Scene::via("fuse");
    let stat = nix::sys::statvfs::statvfs(scene.mount.path()).unwrap();
    let content = (BIG + 8192) as u64;
    assert!(stat.blocks() * stat.fragment_size() >= content);
    assert!(stat.blocks() * stat.fragment_size() < content + (8 << 20));
    assert_eq!(
        (stat.blocks_free(), stat.blocks_available(), stat.name_max()),
        (0, 0, 255)
    );
    assert!(stat.files() >= 5013 && stat.files() < 5100, "{}", stat.files());
    assert!(stat.flags().contains(nix::sys::statvfs::FsFlags::ST_RDONLY));
}

#[test]
fn programs_run_from_the_mount() {
    let tar = Tar::new().raw(
        header(
            b"true",
            tar::EntryType::Regular,
            0o755,
            fs::metadata("/bin/true").unwrap().len(),
        ),
        &fs::read("/bin/true").unwrap(),
    );
    let registry = TestRegistry::start();
    push(&registry, "app", "1", &[Blob::gzip(&tar.finish())]);
    let ocifs = Ocifs::new();
    let mount = ocifs.mount(&format!("{}/app:1", registry.host()));
    tool(mount.join("true").to_str().unwrap(), [""; 0]);
}
