//! Makes directory trees on a real file system, with everything a tar format can hold.

use std::ffi::OsStr;
use std::fs::{self, File, FileTimes};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, UNIX_EPOCH};

use ocifs::toc::Xattrs;

use super::{Bytes, run};

/// Which properties a tar format can store.
#[derive(Debug, Clone, Copy)]
pub(super) struct Features {
    /// Names over 255 bytes, link targets over 100.
    pub(super) long_names: bool,
    /// Devices and pipes.
    pub(super) special: bool,
    /// Owners over 2^18, times before 1970.
    pub(super) wide_numbers: bool,
    /// Extended attributes, fractions of seconds.
    pub(super) pax: bool,
    /// Names that are not UTF-8.
    pub(super) raw_names: bool,
}

pub(super) const V7: Features = Features {
    long_names: false,
    special: false,
    wide_numbers: false,
    pax: false,
    raw_names: true,
};

pub(super) const USTAR: Features = Features { special: true, ..V7 };

pub(super) const GNU: Features = Features {
    long_names: true,
    wide_numbers: true,
    ..USTAR
};

pub(super) const PAX: Features = Features { pax: true, ..GNU };

/// Makes a tree with files of every kind. Equal seeds give equal trees.
pub(super) fn make_tree(root: &Path, seed: u64, features: Features) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut dirs = vec![root.to_owned()];
    let mut files = Vec::new();
    for i in 0..60 {
        let dir = dirs[rng.usize(..dirs.len())].clone();
        let mut name = match rng.u8(..6) {
            0 => format!("with space and \"{i}\"\n").into_bytes(),
            1 if features.raw_names => [&b"\xff\xfe\x80"[..], i.to_string().as_bytes()].concat(),
            2 => format!("\u{e9}{i}\\x").into_bytes(),
            3 if features.long_names => format!("{i}{}", "n".repeat(rng.usize(90..250))).into_bytes(),
            _ => format!("f{i}").into_bytes(),
        };
        if !features.long_names && dir.as_os_str().len() + name.len() > root.as_os_str().len() + 80 {
            name = format!("g{i}").into_bytes();
        }
        let path = dir.join(OsStr::from_bytes(&name));
        match rng.u8(..12) {
            0..=2 if dirs.len() < 12 || features.long_names => {
                fs::create_dir(&path).unwrap();
                dirs.push(path.clone());
            }
            3 => {
                let target = "../t/".repeat(rng.usize(1..if features.long_names { 200 } else { 18 }));
                std::os::unix::fs::symlink(target, &path).unwrap();
            }
            4 if !files.is_empty() => fs::hard_link::<_, &Path>(&files[rng.usize(..files.len())], &path).unwrap(),
            5 if features.special => {
                let kind: &[&str] = [&["p"][..], &["c", "5", "70000"], &["b", "300", "3"]][rng.usize(..3)];
                // A device number field of v7 has 21 bits, so the large minor number fits every format.
                run(Command::new("mknod").arg("-m").arg("640").arg(&path).args(kind));
            }
            _ => {
                make_file(&path, &mut rng);
                files.push(path.clone());
            }
        }
        set_metadata(&path, &mut rng, features);
    }
    for (i, dir) in dirs.iter().enumerate() {
        let time = UNIX_EPOCH + Duration::new(1_600_000_000 + i as u64, 5);
        File::open(dir)
            .unwrap()
            .set_times(FileTimes::new().set_modified(time))
            .unwrap();
    }
}

fn make_file(path: &Path, rng: &mut fastrand::Rng) {
    let file = File::create(path).unwrap();
    let size = [0, 1, 511, 512, 513, 4096, 70_000][rng.usize(..7)];
    let content: Vec<u8> = std::iter::repeat_with(|| rng.u8(1..)).take(size).collect();
    file.write_all_at(&content, 0).unwrap();
    // Runs of data between zeros. Some touch the end.
    for _ in 0..[0, 0, 1, 6, 40][rng.usize(..5)] {
        let at = rng.u64(..50) * 65_536;
        file.write_all_at(&content[..content.len().min(9000)], at).unwrap();
    }
    if rng.bool() {
        let size = file.metadata().unwrap().len();
        file.set_len(size + rng.u64(..300_000)).unwrap();
    }
}

fn set_metadata(path: &Path, rng: &mut fastrand::Rng, features: Features) {
    let kind = fs::symlink_metadata(path).unwrap().file_type();
    let id = |rng: &mut fastrand::Rng| {
        if features.wide_numbers && rng.bool() {
            rng.u32(..u32::MAX)
        } else {
            rng.u32(..1 << 18)
        }
    };
    let (uid, gid) = (id(rng), id(rng));
    std::os::unix::fs::lchown(path, Some(uid), Some(gid)).unwrap();
    if kind.is_symlink() || kind.is_fifo() || kind.is_char_device() || kind.is_block_device() {
        return;
    }
    let mode = if kind.is_dir() { 0o700 } else { 0o400 } | rng.u32(..0o10000);
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    if features.pax && rng.bool() {
        let value: String = (0..rng.usize(1..300)).map(|_| format!("{:02x}", rng.u8(..))).collect();
        run(Command::new("setfattr")
            .args(["-n", "user.some", "-v", &format!("0x{value}")])
            .arg(path));
        run(Command::new("setfattr")
            .args(["-n", "security.other", "-v", "0x00ff0a3d"])
            .arg(path));
        run(Command::new("setfattr")
            .args(["-n", "trusted.secret", "-v", "0x01"])
            .arg(path));
    }
    if features.pax && kind.is_file() && rng.u8(..4) == 0 {
        run(Command::new("setcap").arg("cap_net_raw,cap_sys_admin+ep").arg(path));
    }
    let time = match rng.u8(..3) {
        0 if features.wide_numbers => UNIX_EPOCH - Duration::new(rng.u64(1..1 << 30), rng.u32(..1_000_000_000)),
        1 => UNIX_EPOCH,
        _ => UNIX_EPOCH + Duration::new(rng.u64(..1 << 31), rng.u32(..1_000_000_000)),
    };
    if kind.is_file() {
        File::open(path)
            .unwrap()
            .set_times(FileTimes::new().set_modified(time))
            .unwrap();
    }
}

pub(super) fn walk(root: &Path, dir: &Path, found: &mut Vec<Vec<u8>>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        found.push(path.strip_prefix(root).unwrap().as_os_str().as_bytes().to_vec());
        if fs::symlink_metadata(&path).unwrap().is_dir() {
            walk(root, &path, found);
        }
    }
}

/// Returns attributes as getfattr(1) shows them, without those that a layer may not set.
pub(super) fn getfattr(path: &Path) -> Xattrs {
    let output = run(Command::new("getfattr")
        .args(["-h", "-d", "-m", "-", "-e", "hex", "--absolute-names"])
        .arg(path));
    let text = String::from_utf8_lossy(&output);
    let pair = |line: &str| -> Option<(Bytes, Bytes)> {
        let (name, value) = line.split_once("=0x")?;
        let value: Vec<u8> = (0..value.len() / 2)
            .map(|i| u8::from_str_radix(&value[2 * i..2 * i + 2], 16).unwrap())
            .collect();
        Some((name.as_bytes().into(), value.into()))
    };
    let mut xattrs: Xattrs = text
        .lines()
        .filter_map(pair)
        .filter(|(name, _)| !name.starts_with(b"trusted."))
        .collect();
    xattrs.sort();
    xattrs
}
