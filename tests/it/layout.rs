//! OCI layouts: valid ones of umoci, skopeo and buildah, and invalid ones. Also has helpers with which the tests of
//! image sources make images and read them back.

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use futures::TryStreamExt;
use ocifs::blob::{BlobError, ImageSource};
use ocifs::layout::OciLayout;
use ocifs::oci::Digest;
use ocifs::oci::media_type::{OCI_CONFIG, OCI_LAYER, OCI_LAYER_GZIP, OCI_LAYER_ZSTD, OCI_MANIFEST};
use ocifs::resolve::{ResolvedImage, resolve};
use serde_json::{Value, json};

/// Runs a tool in `dir` and returns what it prints.
pub(crate) fn run(dir: &Path, program: &str, args: &[&str]) -> Vec<u8> {
    let output = Command::new(program).args(args).current_dir(dir).output();
    let output = output.unwrap_or_else(|error| panic!("these tests need {program}: {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {said}");
    output.stdout
}

/// Returns the tar of a layer with one file.
pub(crate) fn tar_of(name: &str, content: &[u8]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    builder.append_data(&mut header, name, content).unwrap();
    builder.into_inner().unwrap()
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub(crate) fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 3).unwrap()
}

fn unpacked(bytes: &[u8]) -> Vec<u8> {
    let mut tar = Vec::new();
    match bytes {
        [0x1f, 0x8b, ..] => flate2::read::MultiGzDecoder::new(bytes).read_to_end(&mut tar).unwrap(),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => zstd::stream::read::Decoder::new(bytes)
            .unwrap()
            .read_to_end(&mut tar)
            .unwrap(),
        _ => return bytes.to_vec(),
    };
    tar
}

/// Returns the tars of three layers. The first and the last are equal. The second has a file of 700,001 bytes.
pub(crate) fn three_tars() -> Vec<Vec<u8>> {
    let large: Vec<u8> = (0..700_001_u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    vec![
        tar_of("same", b"same"),
        tar_of("dir/large", &large),
        tar_of("same", b"same"),
    ]
}

/// Returns the config of an image with these layers.
pub(crate) fn config_of(tars: &[Vec<u8>]) -> Vec<u8> {
    let diff_ids: Vec<String> = tars.iter().map(|tar| Digest::of(tar).to_string()).collect();
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": {"Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": diff_ids}
    });
    serde_json::to_vec(&config).unwrap()
}

/// A layout that the test writes itself.
pub(crate) struct Layout(pub PathBuf);

impl Layout {
    pub(crate) fn new(dir: &Path) -> Self {
        fs::create_dir_all(dir.join("blobs/sha256")).unwrap();
        fs::write(dir.join("oci-layout"), br#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        Self(dir.to_owned())
    }

    pub(crate) fn path(&self, digest: &Digest) -> PathBuf {
        self.0.join("blobs/sha256").join(digest.hex())
    }

    pub(crate) fn blob(&self, media_type: &str, bytes: &[u8]) -> Value {
        let digest = Digest::of(bytes);
        fs::write(self.path(&digest), bytes).unwrap();
        json!({"mediaType": media_type, "digest": digest.to_string(), "size": bytes.len()})
    }

    /// Writes an image. `layers` are tars as they are stored.
    pub(crate) fn image(&self, tars: &[Vec<u8>], layers: &[(&str, Vec<u8>)]) -> Value {
        let config = self.blob(OCI_CONFIG, &config_of(tars));
        let layers: Vec<Value> = layers
            .iter()
            .map(|(media_type, bytes)| self.blob(media_type, bytes))
            .collect();
        let manifest = json!({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": layers});
        self.blob(OCI_MANIFEST, &serde_json::to_vec(&manifest).unwrap())
    }

    pub(crate) fn index(&self, entries: &[Value]) {
        let index = json!({"schemaVersion": 2, "manifests": entries});
        fs::write(self.0.join("index.json"), serde_json::to_vec(&index).unwrap()).unwrap();
    }
}

fn named(mut entry: Value, name: &str) -> Value {
    entry["annotations"] = json!({"org.opencontainers.image.ref.name": name});
    entry
}

/// Resolves the image for linux/amd64 and reads all its layers. Checks every digest.
pub(crate) async fn read_back(source: &dyn ImageSource) -> (ResolvedImage, Vec<Vec<u8>>) {
    let image = resolve(source, Some(&"linux/amd64".parse().unwrap())).await.unwrap();
    let mut tars = Vec::new();
    for (layer, diff_id) in image.layers().iter().zip(image.diff_ids()) {
        let blob = source.blob(layer).await.unwrap();
        assert_eq!((blob.digest(), blob.size()), (&layer.digest, layer.size as u64));
        let bytes: Vec<bytes::Bytes> = blob.read(0..blob.size()).await.unwrap().try_collect().await.unwrap();
        let bytes = bytes.concat();
        assert!(
            layer.digest.matches(&bytes),
            "{} of {}",
            layer.digest,
            source.describe()
        );
        let (start, end) = (blob.size() / 3, blob.size() / 2);
        let part: Vec<bytes::Bytes> = blob.read(start..end).await.unwrap().try_collect().await.unwrap();
        assert_eq!(part.concat(), bytes[start as usize..end as usize]);
        let tar = unpacked(&bytes);
        assert!(diff_id.0.matches(&tar), "{diff_id} of {}", source.describe());
        tars.push(tar);
    }
    (image, tars)
}

async fn open(dir: &Path, image: Option<&str>) -> Result<OciLayout, String> {
    OciLayout::open(dir, image).await.map_err(|error| error.to_string())
}

#[tokio::test]
async fn layouts_written_by_umoci_and_skopeo_read_as_skopeo_reads_them() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    fs::write(dir.join("file"), "hello").unwrap();
    run(dir, "umoci", &["init", "--layout", "made"]);
    run(dir, "umoci", &["new", "--image", "made:v1"]);
    run(
        dir,
        "umoci",
        &["insert", "--rootless", "--image", "made:v1", "file", "/file"],
    );
    run(
        dir,
        "umoci",
        &["insert", "--rootless", "--image", "made:v1", "/usr/bin/env", "/bin/env"],
    );
    run(
        dir,
        "umoci",
        &[
            "config",
            "--image",
            "made:v1",
            "--architecture",
            "amd64",
            "--config.user",
            "7:8",
            "--config.cmd",
            "/bin/env",
        ],
    );
    run(dir, "umoci", &["tag", "--image", "made:v1", "v2"]);
    run(
        dir,
        "skopeo",
        &[
            "copy",
            "-q",
            "--dest-compress-format",
            "zstd",
            "oci:made:v1",
            "oci:zstd:z",
        ],
    );

    let source = open(&dir.join("made"), Some("v1")).await.unwrap();
    let (image, tars) = read_back(&source).await;
    assert_eq!(
        image.manifest_document.bytes,
        run(dir, "skopeo", &["inspect", "--raw", "oci:made:v1"])
    );
    assert_eq!(
        image.config_document.bytes,
        run(dir, "skopeo", &["inspect", "--config", "--raw", "oci:made:v1"])
    );
    assert_eq!(
        (image.config.config.user.as_str(), &image.config.config.cmd[..]),
        ("7:8", &["/bin/env".to_owned()][..])
    );
    assert_eq!(
        image.layers().iter().map(|l| l.media_type.as_str()).collect::<Vec<_>>(),
        [OCI_LAYER_GZIP; 2]
    );
    assert!(tars[0].windows(5).any(|w| w == b"hello"));
    let env = fs::read("/usr/bin/env").unwrap();
    assert!(tars[1].windows(env.len()).any(|w| w == env));

    let again = read_back(&open(&dir.join("zstd"), None).await.unwrap()).await;
    assert_eq!(again.0.layers()[0].media_type, OCI_LAYER_ZSTD);
    assert_eq!(again.1, tars);

    let error = open(&dir.join("made"), None).await.unwrap_err();
    assert!(
        error.contains("it has several") && error.contains("`v1`, `v2`"),
        "{error}"
    );
}

#[tokio::test]
async fn an_index_pushed_by_buildah_is_nested() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let store = dir.display().to_string();
    let buildah = |args: &[&str]| {
        let root = [format!("--root={store}/root"), format!("--runroot={store}/runroot")];
        let mut all = vec![root[0].as_str(), root[1].as_str(), "--storage-driver=vfs"];
        all.extend(args);
        String::from_utf8(run(dir, "buildah", &all)).unwrap().trim().to_owned()
    };
    fs::write(dir.join("file"), "hello").unwrap();
    buildah(&["manifest", "create", "list"]);
    for arch in ["arm64", "amd64"] {
        let container = buildah(&["from", "--arch", arch, "scratch"]);
        buildah(&["copy", "-q", &container, "file", &format!("/{arch}")]);
        buildah(&["config", "--arch", arch, &container]);
        buildah(&["commit", "-q", "--format", "oci", &container, arch]);
        buildah(&["manifest", "add", "list", arch]);
    }
    buildah(&["manifest", "push", "-q", "--all", "list", "oci:multi:all"]);

    let source = open(&dir.join("multi"), Some("all")).await.unwrap();
    let (image, tars) = read_back(&source).await;
    assert!(image.index.is_some());
    assert_eq!(image.config.architecture, "amd64");
    assert!(tars.concat().windows(5).any(|w| w == b"amd64"));
    let error = resolve(&source, Some(&"s390x".parse().unwrap()))
        .await
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("linux/arm64") && error.contains("linux/amd64"),
        "{error}"
    );
}

#[tokio::test]
async fn every_kind_of_layer_and_linked_blobs_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let tars = three_tars();
    let layout = Layout::new(&dir.path().join("layout"));
    let layers = [
        (OCI_LAYER, tars[0].clone()),
        (OCI_LAYER_GZIP, gzip(&tars[1])),
        (OCI_LAYER_ZSTD, zstd(&tars[2])),
    ];
    let entry = layout.image(&tars, &layers);
    // A blob may be a symbolic link to another directory.
    let large = layout.path(&Digest::of(&layers[1].1));
    fs::rename(&large, dir.path().join("elsewhere")).unwrap();
    std::os::unix::fs::symlink("../../../elsewhere", &large).unwrap();

    layout.index(&[named(entry.clone(), "v1")]);
    for image in [None, Some("v1"), Some("@0"), entry["digest"].as_str()] {
        let source = open(&layout.0, image).await.unwrap();
        assert_eq!(read_back(&source).await.1, tars, "{image:?}");
    }
    // Hand-made indexes often have a wrong size.
    let mut unsized_entry = entry;
    unsized_entry["size"] = json!(-1);
    layout.index(&[unsized_entry]);
    assert_eq!(read_back(&open(&layout.0, None).await.unwrap()).await.1, tars);
}

#[tokio::test]
async fn missing_and_wrong_blobs_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let tars = vec![tar_of("a", b"a")];
    let layout = Layout::new(dir.path());
    let entry = layout.image(&tars, &[(OCI_LAYER, tars[0].clone())]);
    layout.index(std::slice::from_ref(&entry));
    let source = OciLayout::open(dir.path(), None).await.unwrap();
    let image = resolve(&source, None).await.unwrap();
    let layer = &image.layers()[0];
    let layer_path = layout.path(&layer.digest);

    fs::write(&layer_path, &tars[0][1..]).unwrap();
    assert!(matches!(source.blob(layer).await, Err(BlobError::Corrupt { .. })));
    fs::remove_file(&layer_path).unwrap();
    let error = source.blob(layer).await.unwrap_err();
    assert!(matches!(error, BlobError::NotFound { .. }));
    assert!(error.to_string().contains("the layout is incomplete"), "{error}");
    fs::create_dir(&layer_path).unwrap();
    assert!(matches!(source.blob(layer).await, Err(BlobError::Invalid { .. })));

    let config_path = layout.path(&image.manifest.config.digest);
    let config = fs::read(&config_path).unwrap();
    fs::write(
        &config_path,
        String::from_utf8(config.clone()).unwrap().replace("linux", "LINUX"),
    )
    .unwrap();
    assert!(matches!(resolve(&source, None).await, Err(BlobError::Corrupt { .. })));
    fs::write(&config_path, &config[1..]).unwrap();
    assert!(matches!(resolve(&source, None).await, Err(BlobError::Corrupt { .. })));
    fs::File::create(&config_path).unwrap().set_len(1 << 40).unwrap();
    assert!(matches!(resolve(&source, None).await, Err(BlobError::Invalid { .. })));
    fs::remove_file(&config_path).unwrap();
    assert!(matches!(resolve(&source, None).await, Err(BlobError::NotFound { .. })));
}

#[tokio::test]
async fn what_is_no_layout_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let error = open(dir.path(), None).await.unwrap_err();
    assert!(
        error.contains("oci-layout not found: an OCI layout is a directory"),
        "{error}"
    );

    let layout = Layout::new(dir.path());
    let error = open(dir.path(), None).await.unwrap_err();
    assert!(error.contains("index.json not found"), "{error}");
    layout.index(&[]);
    let error = open(dir.path(), None).await.unwrap_err();
    assert!(error.contains("it has none"), "{error}");

    for (version, accepted) in [("1.0.0", true), ("1.1", true), ("2.0.0", false), ("", false)] {
        fs::write(
            dir.path().join("oci-layout"),
            json!({"imageLayoutVersion": version}).to_string(),
        )
        .unwrap();
        let error = open(dir.path(), None).await.unwrap_err();
        assert_eq!(!error.contains("is not supported"), accepted, "{error}");
    }
    fs::write(dir.path().join("oci-layout"), "{}").unwrap();
    let error = open(dir.path(), None).await.unwrap_err();
    assert!(error.contains("missing field `imageLayoutVersion`"), "{error}");

    Layout::new(dir.path());
    fs::write(
        dir.path().join("index.json"),
        r#"{"manifests":[{"digest":"sha256:../../etc/passwd"}]}"#,
    )
    .unwrap();
    let error = open(dir.path(), None).await.unwrap_err();
    assert!(error.contains("field `manifests[0].digest`: "), "{error}");
}
