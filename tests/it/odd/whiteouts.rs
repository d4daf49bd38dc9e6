//! Deletions by layers, in the forms that tools write.

use std::fs;
use std::path::Path;

use super::image;
use crate::common::layers::{Tar, header};
use crate::common::ocifs::{mountpoint, tool, unmount};

const LINK: tar::EntryType = tar::EntryType::Link;
const SYMLINK: tar::EntryType = tar::EntryType::Symlink;

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Returns the header of a character device 0:0.
fn white_device(name: &str) -> tar::Header {
    let mut header = header(name.as_bytes(), tar::EntryType::Char, 0, 0);
    header.set_device_major(0).unwrap();
    header.set_device_minor(0).unwrap();
    header
}

#[test]
fn an_overlays_upper_directory_deletes_as_the_overlay_did() {
    let directory = mountpoint();
    let at = |name: &str| directory.path().join(name);
    for name in ["lower", "upper", "work", "merged"] {
        fs::create_dir(at(name)).unwrap();
    }
    fs::create_dir(at("lower/dir")).unwrap();
    for name in ["a", "b", "c", "kept", "dir/a", "dir/b", "dir/kept"] {
        fs::write(at("lower").join(name), format!("content of {name}\n")).unwrap();
    }
    let (lower, upper, work) = (at("lower"), at("upper"), at("work"));
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        lower.display(),
        upper.display(),
        work.display()
    );
    let merged = at("merged");
    let merged_path = merged.to_str().unwrap();
    tool("mount", ["-t", "overlay", "-o", &options, "overlay", merged_path]);
    for name in ["a", "b", "c", "dir/a", "dir/b"] {
        fs::remove_file(merged.join(name)).unwrap();
    }
    fs::write(merged.join("b"), "new\n").unwrap();
    let expected = [names(&merged), names(&merged.join("dir"))];
    unmount(merged_path);
    // Where the kernel uses one inode for all whiteouts of an upper directory, tar writes hard links to the first.
    let tar = |dir: &Path| tool("tar", ["-C", dir.to_str().unwrap(), "-cf", "-", "."]);
    let (ocifs, image) = image(vec![tar(&lower), tar(&upper)]);
    let mount = ocifs.mount(&image);
    assert_eq!([names(mount.path()), names(&mount.join("dir"))], expected);
    assert_eq!(mount.read("b"), b"new\n");
    assert_eq!(mount.read("dir/kept"), b"content of dir/kept\n");
}

#[test]
fn hard_links_to_whiteouts_are_whiteouts() {
    let base = (0..6).fold(Tar::new().dir("d/"), |tar, i| {
        tar.file(format!("d/f{i}"), format!("{i}"))
    });
    let upper = Tar::new()
        .dir("d/")
        .raw(white_device("d/f0"), b"")
        .link(LINK, "d/f1", "d/f0")
        .link(LINK, "d/new", "d/f1")
        .file("d/.wh.f2", b"")
        .link(LINK, "d/.wh.f3", "d/.wh.f2")
        .link(LINK, "d/f4", "d/f2");
    let (ocifs, image) = image(vec![base.finish(), upper.finish()]);
    let mount = ocifs.mount(&image);
    assert_eq!(names(&mount.join("d")), ["f5"]);
}

#[test]
fn markers_below_a_symlink_of_a_lower_layer_hide_what_the_path_shows() {
    let base = Tar::new()
        .dir("usr/")
        .dir("usr/lib/")
        .file("usr/lib/foo", b"1")
        .file("usr/lib/bar", b"2")
        .link(SYMLINK, "lib", "usr/lib")
        .link(SYMLINK, "abs", "/usr/lib")
        .link(SYMLINK, "chain", "abs")
        .link(SYMLINK, "opq", "usr/lib")
        .link(SYMLINK, "kept", "usr/lib");
    let upper = Tar::new()
        .file("lib/.wh.foo", b"")
        .file("abs/.wh.foo", b"")
        .file("chain/.wh.foo", b"")
        .file("opq/.wh..wh..opq", b"");
    let (ocifs, image) = image(vec![base.finish(), upper.finish()]);
    let mount = ocifs.mount(&image);
    for name in ["lib", "abs", "chain", "opq"] {
        assert!(fs::symlink_metadata(mount.join(name)).unwrap().is_dir(), "{name}");
        assert_eq!(names(&mount.join(name)), [""; 0], "{name}");
    }
    assert_eq!(names(&mount.join("usr/lib")), ["bar", "foo"]);
    assert_eq!(names(&mount.join("kept")), ["bar", "foo"]);
}
