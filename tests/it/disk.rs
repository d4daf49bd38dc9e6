//! `ocifs disk`: the disk of an image, through every door.

mod life;
mod nbd;
mod trouble;
mod vhost;

use std::path::Path;

use crate::common::disk::{ServedDisk, text};
use crate::common::layers::{Blob, Tar, noise, push};
use crate::common::nbd::NbdClient;
use crate::common::oci_layout;
use crate::common::ocifs::{Ocifs, tool, unmount};
use crate::common::registry::TestRegistry;

/// Bytes of the largest file.
const BIG: usize = 3 << 20;

/// Layers of all compressions. The upper ones replace and hide files of the lower ones, whose bytes stay on the disk.
fn layers() -> Vec<Blob> {
    let lower = Tar::new()
        .dir("etc/")
        .file("etc/replaced", noise(1, 40_000))
        .file("big", noise(2, BIG))
        .file("hidden", noise(3, 100_000))
        .sparse("sparse", 1 << 20, &[(0, &noise(4, 4096)), (512 << 10, &noise(5, 4096))])
        .finish();
    let middle = Tar::new()
        .file("etc/replaced", noise(6, 50_000))
        .file(".wh.hidden", "")
        .finish();
    let upper = (0..200).fold(Tar::new().dir("many/"), |tar, i| {
        tar.file(format!("many/{i:03}"), noise(100 + i, 500 * i as usize % 20_000))
    });
    vec![Blob::gzip(&lower), Blob::zstd(&middle), Blob::plain(upper.finish())]
}

/// Starts a registry that has the image of [`layers`]. Returns the name of the image.
fn registry() -> (TestRegistry, String) {
    let registry = TestRegistry::start();
    push(&registry, "app", "1", &layers());
    let image = format!("{}/app:1", registry.host());
    (registry, image)
}

/// Exports the disk of an image with a store of its own.
fn export(image: &str, directory: &Path) -> Vec<u8> {
    let path = directory.join("export.erofs");
    Ocifs::new().ok(["export", "--format", "erofs", "--output", text(&path), image]);
    std::fs::read(path).unwrap()
}

/// Returns where on the disk the content of the first layer begins, behind the metadata.
fn content_start(image: &str) -> u64 {
    let disk = export(image, tempfile::tempdir().unwrap().path());
    let first = noise(1, 4096);
    4096 * disk.chunks(4096).position(|block| block == first).unwrap() as u64
}

/// Makes the registry hold the first layer back. Returns where on the disk its content begins.
fn hold_first_layer(registry: &TestRegistry, image: &str) -> u64 {
    let start = content_start(image);
    registry.hold(&layers()[0].path());
    start
}

#[test]
fn every_door_has_the_bytes_of_the_export() {
    let scratch = tempfile::tempdir().unwrap();
    let (_registry, remote) = registry();
    let local = oci_layout::write(&scratch.path().join("layout"), &layers());
    let expected = export(&remote, scratch.path());
    assert!(export(&local, scratch.path()) == expected, "the sources differ");
    for (image, known) in [(&remote, false), (&remote, true), (&local, false)] {
        let ocifs = if known { Ocifs::knowing(image) } else { Ocifs::new() };
        let disk = ServedDisk::serve(&ocifs, image, &[]);
        let copy = scratch.path().join("copy");
        tool(
            "nbdcopy",
            ["--connections=4", "--requests=16", &disk.nbd_uri(), text(&copy)],
        );
        assert!(std::fs::read(&copy).unwrap() == expected, "{image} {known}: NBD");
        assert!(std::fs::read(disk.file()).unwrap() == expected, "{image} {known}: file");
        tool("fsck.erofs", [disk.file()]);
        tool(
            "qemu-img",
            ["compare", "-f", "raw", "-F", "raw", &disk.nbd_uri(), text(&disk.file())],
        );
        let mut vhost = vhost::client::VhostClient::connect(&disk.vhost());
        assert!(vhost.read_all() == expected, "{image} {known}: vhost-user-blk");
        let said = disk.umount(&disk.nbd(), &["--lazy"]);
        assert_eq!(said.code, Some(0), "{said:?}");
        drop(vhost);
        disk.assert_gone();
    }
}

#[test]
fn the_file_is_a_plain_file() {
    use std::os::unix::fs::MetadataExt as _;
    let (_registry, image) = registry();
    let ocifs = Ocifs::new();
    let disk = ServedDisk::serve(&ocifs, &image, &[]);
    let found = std::fs::metadata(disk.file()).unwrap();
    assert_eq!(found.mode(), 0o100_444);
    let entries = std::fs::read_dir(disk.file().parent().unwrap()).unwrap();
    let names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["rootfs.erofs", "config.json"]);
    let config: serde_json::Value = serde_json::from_slice(&std::fs::read(disk.config()).unwrap()).unwrap();
    assert!(
        config["rootfs"]["diff_ids"]
            .as_array()
            .is_some_and(|ids| ids.len() == 3),
        "{config}"
    );
    let script = "import mmap, sys\nf = open(sys.argv[1], 'rb')\nm = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)\n\
                  sys.stdout.buffer.write(m[1024:1028])";
    assert_eq!(
        tool("python3", ["-c", script, text(&disk.file())]),
        0xe0f5_e1e2u32.to_le_bytes()
    );
    // A loop device over it can be mounted.
    let target = tempfile::tempdir().unwrap();
    tool(
        "mount",
        ["-t", "erofs", "-o", "loop,ro", text(&disk.file()), text(target.path())],
    );
    let content = std::fs::read(target.path().join("big"));
    unmount(target.path());
    assert!(content.unwrap() == noise(2, BIG));
}

#[test]
fn clients_of_one_disk_share_what_is_fetched() {
    let (registry, image) = registry();
    let ocifs = Ocifs::knowing(&image);
    let disk = ServedDisk::serve(&ocifs, &image, &["--prefetch", "none"]);
    registry.clear_log();
    let readers: Vec<_> = (0..8)
        .map(|_| {
            let socket = disk.nbd();
            std::thread::spawn(move || {
                let mut client = NbdClient::connect(&socket);
                let mut bytes = Vec::new();
                while (bytes.len() as u64) < client.size {
                    let length = (client.size - bytes.len() as u64).min(128 << 10) as u32;
                    bytes.extend(client.read(bytes.len() as u64, length).unwrap());
                }
                bytes
            })
        })
        .collect();
    let copies: Vec<Vec<u8>> = readers.into_iter().map(|reader| reader.join().unwrap()).collect();
    assert!(copies.iter().all(|copy| *copy == copies[0]));
    let log = registry.take_log();
    for blob in layers() {
        let path = blob.path();
        let requests = log.iter().filter(|request| request.target.ends_with(&path));
        let (size, fetched) = (blob.bytes.len(), requests.map(|request| request.sent).sum::<usize>());
        assert!(fetched <= size + 64, "{fetched} of {size}");
    }
}

#[test]
fn a_profile_learnt_at_one_door_serves_the_others() {
    let (_registry, image) = registry();
    let ocifs = Ocifs::knowing(&image);
    let disk = ServedDisk::serve(&ocifs, &image, &[]);
    let mut client = NbdClient::connect(&disk.nbd());
    let end = client.size;
    client.read(end - 65_536, 65_536).unwrap();
    client.read(content_start(&image), 4096).unwrap();
    let said = disk.umount(&disk.vhost(), &["--lazy"]);
    assert_eq!(said.code, Some(0), "{said:?}");
    drop(client);
    disk.assert_gone();
    drop(disk);
    let profile = ocifs.ok(["profile", "show", &image]).text().to_owned();
    assert!(
        profile.contains("1 run") && profile.contains("2 of 3 layers"),
        "{profile}"
    );
    ocifs.ok(["cache", "drop"]);
    let mount = ocifs.mount_with(&image, &["--wait", "ready"]);
    assert!(mount.status()["prefetch"]["profile_bytes"].as_u64().unwrap() > 0);
}
