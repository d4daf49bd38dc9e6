//! Numbers that are out of range.

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};

use super::image;
use crate::common::layers::{Tar, header};

/// Returns the header with these bytes at `offset`.
fn with_field(mut header: tar::Header, offset: usize, value: &[u8]) -> tar::Header {
    header.as_mut_bytes()[offset..offset + value.len()].copy_from_slice(value);
    header
}

#[test]
fn owners_and_devices_out_of_range_are_those_of_the_engines() {
    let file = |name: &str| header(name.as_bytes(), tar::EntryType::Regular, 0o600, 2);
    let device = header(b"device", tar::EntryType::Block, 0o600, 0);
    let device = with_field(device, 329, b"0010003\0");
    let device = with_field(device, 337, b"\x80\0\x01\0\0\0\0\x05");
    let tar = Tar::new()
        .pax(&[("uid", b"4294967295"), ("gid", b"4294967295")])
        .raw(file("last"), b"x\n")
        .pax(&[("uid", b"4294967303"), ("gid", b"-2")])
        .raw(file("beyond"), b"x\n")
        .raw(
            with_field(file("base256"), 108, b"\xff\xff\xff\xff\xff\xff\xff\xff"),
            b"x\n",
        )
        .pax(&[("uid", b"4294967295")])
        .dir("dir/")
        .raw(device, b"")
        .file("dir/ordinary", b"x\n");
    let (ocifs, image) = image(vec![tar.finish()]);
    let mount = ocifs.mount_with(&image, &["--wait", "ready", "--writable"]);
    let owner = |name: &str| {
        let stat = fs::symlink_metadata(mount.join(name)).unwrap();
        (stat.uid(), stat.gid())
    };
    assert_eq!(
        ["last", "beyond", "base256", "dir"].map(owner),
        [(0, 0), (7, u32::MAX - 1), (0, 0), (0, 0)]
    );
    let device = fs::symlink_metadata(mount.join("device")).unwrap();
    assert!(device.file_type().is_block_device());
    assert_eq!(device.rdev(), nix::sys::stat::makedev(3, 5));
    // Each of the odd files can be changed like any other.
    fs::write(mount.join("last"), "y\n").unwrap();
    fs::write(mount.join("dir/new"), "y\n").unwrap();
    fs::remove_file(mount.join("dir/ordinary")).unwrap();
    assert!(
        mount
            .log()
            .contains("the uid 4294967303 of `beyond` is out of range, 7 is used"),
        "{}",
        mount.log()
    );
    // `inspect` lists them too, once the layer was read.
    let inspected = ocifs.ok(["inspect", "--json", &image]).json();
    let texts: Vec<_> = inspected["oddities"]
        .as_array()
        .unwrap()
        .iter()
        .map(|o| o["text"].as_str().unwrap())
        .collect();
    assert!(
        texts.contains(&"the uid 4294967295 of `last` is out of range, 0 is used"),
        "{texts:?}"
    );
    assert!(
        ocifs
            .ok(["inspect", &image])
            .text()
            .contains("the device number 4099:1099511627781 of `device`")
    );
}
