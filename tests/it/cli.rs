//! Output of commands, and export of images.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::layers::{Blob, Tar, header, noise, push};
use crate::common::ocifs::{Ocifs, bounded, isolate, mountpoint, tool, unmount};
use crate::common::registry::TestRegistry;

fn layers() -> [Blob; 2] {
    let long = format!("{}/{}", "d".repeat(90), "f".repeat(90));
    let mut device = header(b"etc/null", tar::EntryType::Char, 0o666, 0);
    device.set_device_major(1).unwrap();
    device.set_device_minor(3).unwrap();
    let lower = Tar::new()
        .dir("etc/")
        .file("etc/gone", "1")
        .file("etc/passwd", "root:x:0:0::/root:/bin/sh\n")
        .link(tar::EntryType::Link, "etc/passwd-too", "etc/passwd")
        .link(tar::EntryType::Symlink, "link", "etc/passwd")
        .raw(device, b"")
        .raw(header(b"pipe", tar::EntryType::Fifo, 0o640, 0), b"")
        .raw(header(b"suid", tar::EntryType::Regular, 0o4755, 3), b"abc");
    let upper = Tar::new()
        .file("etc/.wh.gone", "")
        .file("data", noise(1, 1 << 20))
        .pax(&[
            ("path", long.as_bytes()),
            ("SCHILY.xattr.user.note", b"hello"),
            ("mtime", b"1500000000.5"),
        ])
        .file("long", "long\n")
        .file(b"latin1-\xe9", "x")
        .file("empty", "");
    [Blob::gzip(&lower.finish()), Blob::zstd(&upper.finish())]
}

fn image() -> (TestRegistry, String, String) {
    let registry = TestRegistry::start();
    let digest = push(&registry, "app", "1", &layers());
    let image = format!("{}/app:1", registry.host());
    (registry, image, digest.to_string())
}

/// Returns everything that can be seen of a tree, one line for each path. An inode number stands as the first path
/// that has it.
fn dump(root: &Path) -> Vec<String> {
    let script = r"
import hashlib, os, sys
root = os.fsencode(sys.argv[1])
first = {}
for directory, names, files in os.walk(root):
    for name in sorted(names + files):
        path = os.path.join(directory, name)
        s = os.lstat(path)
        shown = path[len(root) + 1:]
        group = first.setdefault(s.st_ino, shown)
        kind = s.st_mode >> 12
        content = os.readlink(path) if kind == 10 else hashlib.sha256(open(path, 'rb').read()).hexdigest() if kind == 8 else b''
        attributes = [(a, os.getxattr(path, a, follow_symlinks=False)) for a in sorted(os.listxattr(path, follow_symlinks=False))]
        size = s.st_size if kind == 8 else 0
        links = s.st_nlink if kind != 4 else 0
        print(shown, oct(s.st_mode), s.st_uid, s.st_gid, size, s.st_mtime_ns, links, s.st_rdev, group, content, attributes)
";
    let output = bounded(Command::new("python3").arg("-c").arg(script).arg(root));
    assert_eq!(output.code, Some(0), "{output:?}");
    let mut lines: Vec<_> = output.text().lines().map(str::to_owned).collect();
    lines.sort_unstable();
    assert!(lines.len() >= 12, "{lines:?}");
    lines
}

/// Returns the paths below a directory and their inode numbers.
fn inodes(root: &Path) -> BTreeMap<PathBuf, u64> {
    let mut found = BTreeMap::new();
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            let metadata = fs::symlink_metadata(&path).unwrap();
            found.insert(path.strip_prefix(root).unwrap().to_owned(), metadata.ino());
            if metadata.is_dir() {
                directories.push(path);
            }
        }
    }
    assert!(found.len() >= 12, "{found:?}");
    found
}

#[test]
fn status_and_list_say_how_a_mount_is() {
    let (registry, image, digest) = image();
    let ocifs = Ocifs::new();
    let mount = ocifs.mount(&image);
    let status = mount.status();
    assert_eq!(status["pid"], mount.pid);
    assert_eq!(status["image"], image);
    assert_eq!(status["digest"], digest);
    assert_eq!(status["mountpoint"], mount.path().to_str().unwrap());
    assert_eq!(status["state"], "ready");
    assert_eq!(status["problem"], serde_json::Value::Null);
    assert_eq!(status["writable"], false);
    let sizes: Vec<u64> = layers().iter().map(|l| l.bytes.len() as u64).collect();
    let shown = status["layers"].as_array().unwrap();
    assert_eq!(shown.len(), 2);
    for ((layer, size), blob) in shown.iter().zip(&sizes).zip(layers()) {
        assert_eq!(layer["digest"], blob.digest().to_string());
        assert_eq!(layer["size"], *size);
        assert_eq!(layer["fetched"], *size, "all of it was streamed");
        assert_eq!(layer["index_source"], "streamed");
        assert_eq!(layer["spans"], layer["local_spans"]);
    }
    assert_eq!(status["size"], sizes.iter().sum::<u64>());
    assert_eq!(status["fetched"], status["size"]);
    let list = ocifs.ok(["list", "--json"]).json();
    let row = list
        .as_array()
        .unwrap()
        .iter()
        .find(|m| m["mountpoint"] == status["mountpoint"])
        .unwrap();
    assert_eq!(
        (&row["pid"], &row["digest"], &row["state"]),
        (&status["pid"], &status["digest"], &status["state"])
    );
    let text = ocifs.ok([Path::new("status"), mount.path()]);
    for part in ["ready", &digest, &image, "streamed", &mount.pid.to_string()] {
        assert!(text.text().contains(part), "{part}: {}", text.text());
    }
    assert!(ocifs.ok(["list"]).text().contains(mount.path().to_str().unwrap()));
    drop(registry);
    assert_eq!(mount.read("suid"), b"abc");
}

#[test]
fn inspect_shows_documents_and_fetches_no_layer() {
    let (registry, image, digest) = image();
    let ocifs = Ocifs::new();
    let shown = ocifs.ok(["inspect", "--json", &image]).json();
    assert_eq!(shown["digest"], digest);
    assert_eq!(shown["image"], image);
    assert_eq!(shown["index_digest"], serde_json::Value::Null);
    assert_eq!(shown["manifest"]["layers"].as_array().unwrap().len(), 2);
    assert_eq!(shown["config"]["config"]["Cmd"][0], "/bin/sh");
    let text = ocifs.ok(["inspect", &image]);
    for layer in layers() {
        assert!(text.text().contains(&layer.digest().to_string()));
        assert_eq!(registry.count(&layer.path()), 0);
    }
    assert!(text.text().contains("linux/"));
}

#[test]
fn ls_and_cat_look_into_an_image() {
    let (_registry, image, _) = image();
    let ocifs = Ocifs::new();
    let rows: Vec<serde_json::Value> = ocifs
        .ok(["ls", "--json", &image, "/etc"])
        .text()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let names: Vec<_> = rows.iter().map(|r| r["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["null", "passwd", "passwd-too"]);
    assert_eq!(rows[0]["type"], "c");
    let passwd = &rows[1];
    assert_eq!((&passwd["type"], &passwd["mode"]), (&"-".into(), &"0644".into()));
    assert_eq!(
        (&passwd["size"], &passwd["nlink"], &passwd["mtime"]),
        (&26.into(), &2.into(), &1_000_000_000.into())
    );
    let text = String::from_utf8_lossy(&ocifs.ok(["ls", &image]).stdout).into_owned();
    assert!(
        text.contains("link -> etc/passwd") && text.contains("rwsr-xr-x"),
        "{text}"
    );
    assert_eq!(
        ocifs.ok(["cat", &image, "/link", "suid"]).text(),
        "root:x:0:0::/root:/bin/sh\nabc"
    );
    assert!(ocifs.ok(["cat", &image, "data"]).stdout == noise(1, 1 << 20));
    let error = ocifs.fails(["cat", &image, "/etc/gone"]);
    assert!(error.contains("/etc/gone") && error.contains("no such file"), "{error}");
    let error = ocifs.fails(["cat", &image, "/etc"]);
    assert!(error.contains("/etc") && error.contains("directory"), "{error}");
    let said = ocifs.run(["cat", &image]);
    assert_eq!(said.code, Some(2), "wrong arguments");
    // A reader that stops early is not an error.
    let script = format!("\"$@\" cat {image} data data data data | head -c 10");
    let command = ocifs.command([""; 0]);
    let mut pipe = Command::new("bash");
    pipe.args(["-o", "pipefail", "-c", &script, "sh"])
        .arg(command.get_program())
        .args(command.get_args());
    isolate(&mut pipe, ocifs.home());
    let said = bounded(&mut pipe);
    assert_eq!((said.code, said.stderr.as_str()), (Some(0), ""), "{said:?}");
}

#[test]
fn an_exported_tar_is_the_mount() {
    let (_registry, image, _) = image();
    let ocifs = Ocifs::new();
    let mount = ocifs.mount(&image);
    let directory = mountpoint();
    let file = directory.path().join("image.tar");
    ocifs.ok(["export", &image, "-o", file.to_str().unwrap()]);
    let piped = ocifs.ok(["export", &image]).stdout;
    assert!(fs::read(&file).unwrap() == piped);
    let root = directory.path().join("root");
    fs::create_dir(&root).unwrap();
    tool(
        "tar",
        [
            "--extract",
            "--preserve-permissions",
            "--same-owner",
            "--xattrs",
            "--xattrs-include=*",
            "--file",
        ]
        .map(Path::new)
        .into_iter()
        .chain([file.as_path(), Path::new("--directory"), root.as_path()]),
    );
    assert_eq!(dump(&root), dump(mount.path()));
    let (a, b) = (fs::metadata(&root).unwrap(), fs::metadata(mount.path()).unwrap());
    assert_eq!((a.mode(), a.uid(), a.mtime()), (b.mode(), b.uid(), b.mtime()));
}

#[test]
fn an_exported_disk_is_the_mount() {
    let (_registry, image, _) = image();
    let ocifs = Ocifs::new();
    let mount = ocifs.mount(&image);
    let directory = mountpoint();
    let disk = directory.path().join("disk.erofs");
    ocifs.ok(["export", "--format", "erofs", &image, "-o", disk.to_str().unwrap()]);
    tool("fsck.erofs", [&disk]);
    let root = directory.path().join("root");
    fs::create_dir(&root).unwrap();
    tool(
        "mount",
        [
            Path::new("-t"),
            Path::new("erofs"),
            Path::new("-o"),
            Path::new("loop,ro"),
            &disk,
            &root,
        ],
    );
    let kernel = std::panic::catch_unwind(|| (dump(&root), inodes(&root)));
    unmount(&root);
    let (tree, numbers) = kernel.unwrap();
    assert_eq!(tree, dump(mount.path()));
    // The inode numbers are equal too: both come from the tree. (The root of FUSE always has number 1.)
    assert_eq!(numbers, inodes(mount.path()));
    assert!(ocifs.ok(["export", "--format", "erofs", &image]).stdout == fs::read(&disk).unwrap());
}

#[test]
fn a_real_registry_and_layout_serve_the_same_image() {
    use crate::common::docker_registry::{DockerRegistry, Setup, skopeo_copy};
    let (registry, image, digest) = image();
    let real = DockerRegistry::start(&Setup::default());
    let target = format!("{}/team/app:1", real.host());
    let plain = ["--src-tls-verify=false", "--dest-tls-verify=false", "--all"];
    skopeo_copy(&plain, &format!("docker://{image}"), &format!("docker://{target}"));
    let directory = mountpoint();
    let layout = format!("{}:1", directory.path().join("layout").display());
    skopeo_copy(
        &["--src-tls-verify=false"],
        &format!("docker://{image}"),
        &format!("oci:{layout}"),
    );
    let ocifs = Ocifs::new();
    let expected = ocifs.mount(&image);
    drop(registry);
    for image in [target, format!("oci:{layout}")] {
        let other = Ocifs::new();
        let mount = other.mount(&image);
        assert_eq!(mount.status()["digest"], digest);
        assert_eq!(dump(mount.path()), dump(expected.path()));
        other.ok(["cache", "drop"]);
        mount.forget("data");
        assert!(mount.read("data") == noise(1, 1 << 20), "{image}");
    }
}
