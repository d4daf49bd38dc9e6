//! Docker archives in the shapes of all their writers, written by real tools and by hand. Reading one must give back
//! the layers that went in.

use std::fs;
use std::path::Path;

use futures::TryStreamExt;
use ocifs::archive::DockerArchive;
use ocifs::blob::{BlobError, ImageSource};
use ocifs::oci::Digest;
use ocifs::oci::media_type::{OCI_LAYER, OCI_LAYER_GZIP, OCI_LAYER_ZSTD};
use serde_json::{Value, json};

use crate::layout::{Layout, config_of, gzip, read_back, run, tar_of, three_tars, zstd};

/// A member of a hand-made archive.
enum Member {
    File(String, Vec<u8>),
    Symlink(String, String),
    Hardlink(String, String),
}

fn file(name: impl Into<String>, content: impl Into<Vec<u8>>) -> Member {
    Member::File(name.into(), content.into())
}

fn write(path: &Path, members: &[Member]) {
    let mut builder = tar::Builder::new(fs::File::create(path).unwrap());
    for member in members {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(0);
        match member {
            Member::File(name, content) => {
                header.set_size(content.len() as u64);
                builder.append_data(&mut header, name, &content[..]).unwrap();
            }
            Member::Symlink(name, target) => {
                header.set_entry_type(tar::EntryType::Symlink);
                builder.append_link(&mut header, name, target).unwrap();
            }
            Member::Hardlink(name, target) => {
                header.set_entry_type(tar::EntryType::Link);
                builder.append_link(&mut header, name, target).unwrap();
            }
        }
    }
    builder.finish().unwrap();
}

fn manifest(entries: &[Value]) -> Member {
    file("manifest.json", Value::from(entries).to_string())
}

fn entry(config: &str, tags: &[&str], layers: &[&str]) -> Value {
    json!({"Config": config, "RepoTags": tags, "Layers": layers})
}

async fn open(path: &Path, image: Option<&str>) -> Result<DockerArchive, String> {
    DockerArchive::open(path, image)
        .await
        .map_err(|error| error.to_string())
}

/// Opens the only image of an archive and compares its layers with the tars that it was made from. Returns the
/// layers' media types.
async fn assert_holds(path: &Path, tars: &[Vec<u8>]) -> Vec<String> {
    let source = open(path, None).await.unwrap();
    let (image, got) = read_back(&source).await;
    assert!(got == tars, "layers of {} differ", path.display());
    let again = open(path, None).await.unwrap().root().await.unwrap();
    assert_eq!(
        again.bytes, image.manifest_document.bytes,
        "the manifest depends on the archive alone"
    );
    image.layers().iter().map(|layer| layer.media_type.clone()).collect()
}

#[tokio::test]
async fn archives_written_by_skopeo_hold_what_they_were_copied_from() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let tars = three_tars();
    let layout = Layout::new(&dir.join("layout"));
    let layers = [
        (OCI_LAYER_GZIP, gzip(&tars[0])),
        (OCI_LAYER_GZIP, gzip(&tars[1])),
        (OCI_LAYER_GZIP, gzip(&tars[2])),
    ];
    let image = layout.image(&tars, &layers);
    layout.index(&[image]);
    run(
        dir,
        "skopeo",
        &["copy", "-q", "oci:layout", "docker-archive:out.tar:app:v1"],
    );

    let path = dir.join("out.tar");
    assert_eq!(assert_holds(&path, &tars).await, [OCI_LAYER; 3]);
    let source = open(&path, Some("app:v1")).await.unwrap();
    let (image, _) = read_back(&source).await;
    let config = run(
        dir,
        "skopeo",
        &["inspect", "--config", "--raw", "docker-archive:out.tar"],
    );
    assert_eq!(image.config_document.bytes, config);
    for name in ["docker.io/library/app:v1", "docker.io/app:v1", "@0"] {
        open(&path, Some(name)).await.unwrap();
    }
    let error = open(&path, Some("app:v2")).await.unwrap_err();
    assert!(
        error.contains("image `app:v2` in") && error.contains("it has `docker.io/library/app:v1`"),
        "{error}"
    );

    // Archives that are compressed as a whole. The real compressors write them, so that the test reads their output.
    let info = fs::metadata(&path).unwrap();
    for (program, args, extension) in [("gzip", &["-k"][..], "gz"), ("zstd", &["-q", "-k", "--long=27"], "zst")] {
        let mut args = args.to_vec();
        args.push("out.tar");
        run(dir, program, &args);
        let packed = dir.join(format!("out.tar.{extension}"));
        assert!(fs::metadata(&packed).unwrap().len() < info.len());
        assert_eq!(assert_holds(&packed, &tars).await, [OCI_LAYER; 3]);
    }
    for (program, name) in [("xz", "out.tar.xz"), ("bzip2", "out.tar.bz2")] {
        run(dir, program, &["-k", "out.tar"]);
        let error = DockerArchive::open(dir.join(name), None).await.unwrap_err();
        assert!(matches!(error, BlobError::Unsupported { .. }));
        assert!(
            error
                .to_string()
                .contains(&format!("compressed with {program}: unpack it first")),
            "{error}"
        );
    }
    // A truncated compressed archive is an error, not a short archive.
    let packed = fs::read(dir.join("out.tar.gz")).unwrap();
    fs::write(dir.join("cut.tar.gz"), &packed[..packed.len() / 2]).unwrap();
    assert!(matches!(
        DockerArchive::open(dir.join("cut.tar.gz"), None).await,
        Err(BlobError::Corrupt { .. })
    ));
}

#[tokio::test]
async fn an_archive_written_by_buildah_reads_as_skopeo_reads_it() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let store = dir.display().to_string();
    fs::write(dir.join("layer.tar"), tar_of("from/buildah", b"content")).unwrap();
    let buildah = |args: &[&str]| {
        let root = [format!("--root={store}/root"), format!("--runroot={store}/runroot")];
        let mut all = vec![root[0].as_str(), root[1].as_str(), "--storage-driver=vfs"];
        all.extend(args);
        String::from_utf8(run(dir, "buildah", &all)).unwrap().trim().to_owned()
    };
    let container = buildah(&["from", "scratch"]);
    buildah(&["add", "-q", &container, "layer.tar", "/"]);
    buildah(&["commit", "-q", &container, "img"]);
    buildah(&["push", "-q", "img", "docker-archive:b.tar:bapp:1"]);
    run(dir, "skopeo", &["copy", "-q", "docker-archive:b.tar:bapp:1", "oci:l:x"]);

    // skopeo's own reading of the archive is the oracle. It writes the same layers, compressed anew.
    let of_layout = ocifs::layout::OciLayout::open(dir.join("l"), Some("x")).await.unwrap();
    let (_, want) = read_back(&of_layout).await;
    // buildah also writes the name that the image has in buildah's store.
    for name in ["bapp:1", "localhost/img"] {
        let source = open(&dir.join("b.tar"), Some(name)).await.unwrap();
        let (_, got) = read_back(&source).await;
        assert!(got == want);
        assert!(got[0].windows(12).any(|w| w == b"from/buildah"));
    }
}

#[tokio::test]
async fn docker_up_to_24_links_repeated_layers() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("docker20.tar");
    let tars = three_tars();
    let config = config_of(&tars);
    let name = format!("{}.json", Digest::of(&config).hex());
    let ids = ["1", "2", "3"].map(|id| id.repeat(64));
    let paths = ids.clone().map(|id| format!("{id}/layer.tar"));
    let mut members = vec![];
    for (i, id) in ids.iter().enumerate() {
        members.push(file(format!("{id}/VERSION"), "1.0"));
        members.push(file(format!("{id}/json"), "{}"));
        members.push(match i {
            2 => Member::Symlink(paths[2].clone(), format!("../{}", paths[0])),
            _ => file(&paths[i], tars[i].clone()),
        });
    }
    members.push(file(&name, config));
    members.push(manifest(&[entry(
        &name,
        &["app:latest"],
        &paths.each_ref().map(String::as_str),
    )]));
    members.push(file("repositories", "{}"));
    write(&path, &members);
    assert_eq!(assert_holds(&path, &tars).await, [OCI_LAYER; 3]);
}

/// Writes an archive with an embedded OCI layout. `layers` are stored as they are given.
fn with_layout(path: &Path, tars: &[Vec<u8>], layers: &[Vec<u8>], manifest_first: bool) {
    let config = config_of(tars);
    let blob = |bytes: &[u8]| format!("blobs/sha256/{}", Digest::of(bytes).hex());
    let names: Vec<String> = layers.iter().map(|layer| blob(layer)).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut members = vec![manifest(&[entry(
        &blob(&config),
        &["docker.io/library/app:latest"],
        &names,
    )])];
    members.push(file("oci-layout", r#"{"imageLayoutVersion":"1.0.0"}"#));
    // Early docker 25 listed wrong layers in `index.json`, so its content must not matter.
    members.push(file("index.json", r#"{"manifests":[{"digest":"nonsense"}]}"#));
    members.push(file(blob(&config), config));
    let mut seen = vec![];
    for (name, layer) in names.iter().zip(layers) {
        if !seen.contains(name) {
            members.push(file(*name, layer.clone()));
            seen.push(name);
        }
    }
    if !manifest_first {
        members.rotate_left(1);
    }
    write(path, &members);
}

#[tokio::test]
async fn docker_25_and_containerd_embed_a_layout() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("archive.tar");
    let tars = three_tars();
    for manifest_first in [true, false] {
        with_layout(&path, &tars, &tars, manifest_first);
        assert_eq!(assert_holds(&path, &tars).await, [OCI_LAYER; 3]);
        let layers = [gzip(&tars[0]), zstd(&tars[1]), gzip(&tars[2])];
        with_layout(&path, &tars, &layers, manifest_first);
        assert_eq!(
            assert_holds(&path, &tars).await,
            [OCI_LAYER_GZIP, OCI_LAYER_ZSTD, OCI_LAYER_GZIP]
        );
    }
}

#[tokio::test]
async fn other_tools_name_members_as_they_like() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("archive.tar");
    let tars = three_tars();
    let long = format!("{}/layer.tar.gz", "long/".repeat(60));
    let members = [
        manifest(&[entry(
            "./sha256:config",
            &["bazel/app:image"],
            &["a.tar.gz", &long, "link/../hard"],
        )]),
        file("a.tar.gz", gzip(&tars[0])),
        file(&long, gzip(&tars[1])),
        Member::Hardlink("hard".into(), "a.tar.gz".into()),
        file("sha256:config", config_of(&tars)),
    ];
    write(&path, &members);
    assert_eq!(assert_holds(&path, &tars).await, [OCI_LAYER_GZIP; 3]);

    // An image without layers is valid, and so is an image with an empty tar.
    write(
        &path,
        &[
            manifest(&[json!({"Config": "c", "RepoTags": null, "Layers": null})]),
            file("c", config_of(&[])),
        ],
    );
    assert!(assert_holds(&path, &[]).await.is_empty());
    let empty = vec![vec![], vec![0; 1024]];
    write(
        &path,
        &[
            manifest(&[entry("c", &[], &["0", "1"])]),
            file("c", config_of(&empty)),
            file("0", vec![]),
            file("1", vec![0; 1024]),
        ],
    );
    assert_eq!(assert_holds(&path, &empty).await, [OCI_LAYER; 2]);
}

#[tokio::test]
async fn images_are_chosen_by_tag_or_position() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("archive.tar");
    let tars: Vec<Vec<u8>> = (0..4).map(|i| tar_of("name", &[i])).collect();
    let tags = [&["app:1", "app:latest"][..], &["ghcr.io/o/app:1"], &[], &["app:1"]];
    let mut members = vec![];
    let mut entries = vec![];
    for (i, (tar, tags)) in tars.iter().zip(tags).enumerate() {
        members.push(file(format!("{i}.tar"), tar.clone()));
        members.push(file(format!("{i}.json"), config_of(std::slice::from_ref(tar))));
        entries.push(entry(&format!("{i}.json"), tags, &[&format!("{i}.tar")]));
    }
    members.push(manifest(&entries));
    write(&path, &members);
    for (name, position) in [
        ("app", 0),
        ("app:latest", 0),
        ("docker.io/library/app", 0),
        ("ghcr.io/o/app:1", 1),
        ("@2", 2),
        ("@0", 0),
        // The last of several images with one name wins.
        ("app:1", 3),
    ] {
        let source = open(&path, Some(name)).await.unwrap();
        assert!(read_back(&source).await.1 == [tars[position].clone()], "{name}");
    }
    let all = "it has `app:1`, `app:latest`, `ghcr.io/o/app:1`, @2, `app:1`";
    for name in [Some("nope"), Some("@4"), Some("@"), Some("@-1"), Some(""), None] {
        let error = open(&path, name).await.unwrap_err();
        assert!(error.ends_with(all), "{name:?}: {error}");
    }
}

#[tokio::test]
async fn broken_archives_say_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("archive.tar");
    let tars = vec![tar_of("a", b"a")];
    let config = config_of(&tars);
    let good = || vec![file("c", config.clone()), file("l", tars[0].clone())];
    let layers = |layers: &[&str]| manifest(&[entry("c", &[], layers)]);
    for (members, words) in [
        (vec![], "was not written by `docker save`"),
        (vec![file("oci-layout", "{}")], "use oci-archive:FILE"),
        (vec![manifest(&[])], "it has none"),
        (vec![file("manifest.json", "[{")], "manifest.json: "),
        (
            vec![file("manifest.json", r#"[{"Config":1}]"#)],
            "manifest.json: [0].Config: ",
        ),
        (vec![layers(&[])], "`c` in archive"),
        (
            vec![layers(&["l"]), file("c", config.clone())],
            "not found: the archive is incomplete",
        ),
        (
            vec![layers(&["l", "l"])],
            "it has 1 diff_ids, but manifest.json lists 2 layers",
        ),
        (vec![layers(&["l"]), file("c", "{}")], "it has 0 diff_ids"),
        (vec![layers(&["l"]), file("c", "{")], "EOF"),
        (
            vec![layers(&["s"]), Member::Symlink("s".into(), "s".into())],
            "links lead in a circle",
        ),
        (
            vec![layers(&["/../../etc/passwd"])],
            "not found: the archive is incomplete",
        ),
        (
            vec![layers(&["s"]), Member::Symlink("s".into(), "/etc/passwd".into())],
            "not found: the archive is incomplete",
        ),
        (
            vec![layers(&["x"]), file("x", b"\xfd7zXZ\x00rest".to_vec())],
            "compressed with xz or bzip2",
        ),
    ] {
        let mut all = if words == "was not written by `docker save`" || words == "`c` in archive" {
            vec![]
        } else {
            good()
        };
        if words == "not found: the archive is incomplete" {
            all.pop();
        }
        all.extend(members);
        write(&path, &all);
        let error = open(&path, None).await.expect_err(words);
        assert!(error.contains(words), "{error} / {words}");
    }

    // An error message quotes a bounded part of the archive's text, without control characters.
    let long = format!("\u{1b}{}", "x".repeat(1 << 20));
    for members in [
        layers(&[&long]),
        manifest(&[entry(&long, &[], &["l"])]),
        manifest(&[json!({"Config": "c", "Layers": [long]}), json!({"Config": 1})]),
    ] {
        let mut all = good();
        all.push(members);
        write(&path, &all);
        let error = open(&path, None).await.unwrap_err();
        assert!(error.len() < 4000 && !error.contains('\u{1b}'), "{error}");
    }
    write(&path, &[manifest(&[entry("c", &[&long], &["l"])])]);
    let error = open(&path, Some("none")).await.unwrap_err();
    assert!(error.len() < 4000 && error.contains(r"it has `\u{1b}xxx"), "{error}");

    let mut members = good();
    members.insert(0, layers(&["l"]));
    write(&path, &members);
    let whole = fs::read(&path).unwrap();
    let cut = whole.len() - 2048;
    fs::write(&path, &whole[..cut]).unwrap();
    let error = open(&path, None).await.unwrap_err();
    assert!(error.contains("it is truncated"), "{error}");
    fs::write(&path, "no tar at all").unwrap();
    assert!(matches!(
        DockerArchive::open(&path, None).await,
        Err(BlobError::Invalid { .. })
    ));
    assert!(matches!(
        DockerArchive::open(dir.path(), None).await,
        Err(BlobError::Invalid { .. })
    ));
    assert!(matches!(
        DockerArchive::open(dir.path().join("none"), None).await,
        Err(BlobError::NotFound { .. })
    ));
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(200))]
    #[test]
    fn damaged_archives_are_errors_or_images_but_never_panics(
        edits in proptest::collection::vec((proptest::prelude::any::<usize>(), proptest::prelude::any::<u8>()), 0..8),
        keep in proptest::prelude::any::<usize>(),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("archive.tar");
        let tars = vec![tar_of("a", b"a")];
        let members = [
            manifest(&[entry("c", &["app:1"], &["link"])]),
            file("c", config_of(&tars)),
            Member::Symlink("link".into(), "d/../layer".into()),
            file("layer", gzip(&tars[0])),
        ];
        write(&path, &members);
        let mut bytes = fs::read(&path).unwrap();
        // Cuts the archive, but keeps at least its first 512 bytes. An empty file and the zeros at the end are not
        // worth testing.
        bytes.truncate(512 + keep % (bytes.len() - 512));
        for (at, byte) in edits {
            let at = at % bytes.len();
            bytes[at] = byte;
        }
        fs::write(&path, &bytes).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let Ok(source) = DockerArchive::open(&path, None).await else { return };
            let Ok(image) = ocifs::resolve::resolve(&source, None).await else { return };
            for layer in image.layers() {
                let blob = source.blob(layer).await.unwrap();
                let read: Result<Vec<_>, _> = blob.read(0..blob.size()).await.unwrap().try_collect().await;
                read.unwrap();
            }
        });
    }
}
