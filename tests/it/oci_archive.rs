//! Tars of OCI layouts, as skopeo and podman write them. They are read in place.

use std::fs;
use std::path::Path;

use ocifs::blob::BlobError;
use ocifs::layout::OciLayout;
use ocifs::oci::media_type::{OCI_LAYER, OCI_LAYER_GZIP, OCI_LAYER_ZSTD};

use crate::common::layers::{Blob, Tar, noise};
use crate::common::oci_layout;
use crate::common::ocifs::Ocifs;
use crate::layout::{Layout, gzip, read_back, run, three_tars, zstd};

const SIZE: usize = 3 << 20;

async fn open(file: &Path, image: Option<&str>) -> Result<OciLayout, String> {
    OciLayout::open_archive(file, image)
        .await
        .map_err(|error| error.to_string())
}

#[tokio::test]
async fn archives_written_by_skopeo_hold_what_they_were_copied_from() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let layout = Layout::new(&dir.join("layout"));
    let tars = three_tars();
    let layers = [
        (OCI_LAYER_GZIP, gzip(&tars[0])),
        (OCI_LAYER_ZSTD, zstd(&tars[1])),
        (OCI_LAYER, tars[2].clone()),
    ];
    layout.index(&[layout.image(&tars, &layers)]);
    run(
        dir,
        "skopeo",
        &["copy", "-q", "oci:layout", "oci-archive:a.tar:name:v1"],
    );
    let names = [None, Some("name:v1"), Some("@0")];
    for name in names {
        let source = open(&dir.join("a.tar"), name).await.unwrap();
        let (_, got) = read_back(&source).await;
        assert!(got == tars, "{name:?}");
    }
    let error = open(&dir.join("a.tar"), Some("v2")).await.unwrap_err();
    assert!(
        error.contains("image `v2`") && error.contains("it has `name:v1`"),
        "{error}"
    );
    // As a whole compressed, and with other names for the same files.
    let archive = fs::read(dir.join("a.tar")).unwrap();
    fs::write(dir.join("a.tar.gz"), gzip(&archive)).unwrap();
    fs::write(dir.join("a.tar.zst"), zstd(&archive)).unwrap();
    run(dir, "tar", &["-C", "layout", "-cf", "dots.tar", "."]);
    for file in ["a.tar.gz", "a.tar.zst", "dots.tar"] {
        let source = open(&dir.join(file), None).await.unwrap();
        let (_, got) = read_back(&source).await;
        assert!(got == tars, "{file}");
    }
}

#[tokio::test]
async fn what_is_no_layout_or_is_cut_off_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let layout = Layout::new(&dir.join("layout"));
    let tars = three_tars();
    let layers = [
        (OCI_LAYER, tars[0].clone()),
        (OCI_LAYER, tars[1].clone()),
        (OCI_LAYER, tars[2].clone()),
    ];
    let image = layout.image(&tars, &layers);
    layout.index(std::slice::from_ref(&image));
    run(
        dir,
        "skopeo",
        &["copy", "-q", "oci:layout", "docker-archive:docker.tar:a:1"],
    );
    let error = open(&dir.join("docker.tar"), None).await.unwrap_err();
    assert!(error.contains("docker-archive:FILE"), "{error}");
    let error = open(&dir.join("gone.tar"), None).await.unwrap_err();
    assert!(error.contains("gone.tar not found"), "{error}");
    fs::write(dir.join("text"), "no tar at all").unwrap();
    let error = open(&dir.join("text"), None).await.unwrap_err();
    assert!(error.contains("no tar"), "{error}");
    run(dir, "tar", &["-cf", "other.tar", "text"]);
    let error = open(&dir.join("other.tar"), None).await.unwrap_err();
    assert!(
        error.contains("`oci-layout` in archive") && error.contains("an OCI archive is a tar of"),
        "{error}"
    );

    // The large layer is missing, then damaged, then cut off.
    let large = ocifs::oci::Digest::of(&tars[1]);
    let archive = |excluded: &str| {
        let exclude = format!("--exclude={excluded}");
        run(
            dir,
            "tar",
            &[
                "-C",
                "layout",
                "--sort=name",
                &exclude,
                "-cf",
                "a.tar",
                "index.json",
                "oci-layout",
                "blobs",
            ],
        );
        dir.join("a.tar")
    };
    let missing = open(&archive(large.hex()), None).await.unwrap();
    let root = ocifs::resolve::resolve(&missing, Some(&"linux/amd64".parse().unwrap()))
        .await
        .unwrap();
    let blob = |source: OciLayout| {
        let layer = root.layers()[1].clone();
        async move { ocifs::blob::ImageSource::blob(&source, &layer).await.map(drop) }
    };
    assert!(matches!(blob(missing).await, Err(BlobError::NotFound { .. })));
    fs::write(layout.path(&large), &tars[1][1..]).unwrap();
    let short = open(&archive("nothing"), None).await.unwrap();
    assert!(matches!(blob(short).await, Err(BlobError::Corrupt { .. })));
    fs::write(layout.path(&large), &tars[1]).unwrap();
    let whole = fs::read(archive("nothing")).unwrap();
    fs::write(dir.join("a.tar"), &whole[..whole.len() / 2]).unwrap();
    let cut = open(&dir.join("a.tar"), None).await.unwrap();
    let error = blob(cut).await.unwrap_err().to_string();
    assert!(error.contains("truncated"), "{error}");
}

#[test]
fn an_archive_is_mounted_without_being_unpacked() {
    let directory = tempfile::tempdir().unwrap();
    let layers = [
        Blob::gzip(&Tar::new().file("f", noise(1, SIZE)).finish()),
        Blob::zstd(&Tar::new().file("g", noise(2, SIZE)).finish()),
    ];
    let layout = oci_layout::write(&directory.path().join("layout"), &layers);
    let archive = format!("oci-archive:{}", directory.path().join("a.tar").display());
    run(
        directory.path(),
        "skopeo",
        &["copy", "-q", &layout, &format!("{archive}:app:1")],
    );
    let temporary = directory.path().join("tmp");
    fs::create_dir(&temporary).unwrap();
    for image in [archive.clone(), format!("{archive}:app:1")] {
        let ocifs = Ocifs::new().env("TMPDIR", &temporary);
        let mount = ocifs.mount(&image);
        assert!(
            mount.read("f") == noise(1, SIZE) && mount.read("g") == noise(2, SIZE),
            "{image}"
        );
        assert_eq!(fs::read_dir(&temporary).unwrap().count(), 0);
        // No process keeps a file without a name either.
        for descriptor in fs::read_dir(format!("/proc/{}/fd", mount.pid)).unwrap() {
            let target = fs::read_link(descriptor.unwrap().path()).unwrap_or_default();
            assert!(!target.starts_with(&temporary), "{}", target.display());
        }
    }
    let inspected = Ocifs::new().ok(["inspect", "--json", &archive]).json();
    let from_layout = Ocifs::new().ok(["inspect", "--json", &layout]).json();
    assert_eq!(inspected["layers"], from_layout["layers"]);
    let error = Ocifs::new().fails(["inspect", &format!("{archive}:other")]);
    assert!(error.contains("it has `app:1`"), "{error}");
}
