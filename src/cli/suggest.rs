//! Advice for a user who named a path where an image is expected.

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _};
use std::path::Path;

use super::text::in_error;

/// Entries of a tar that are looked at. An image archive has few entries, and those that identify it are near its
/// start or its end. A larger limit takes longer on a large tar that holds no image.
const MOST_ENTRIES: usize = 100_000;

/// Returns advice if `image` is a path, with or without a tag: how to name the image there. Returns none if nothing
/// is at the path.
pub(super) fn suggest(image: &str) -> Option<String> {
    let (path, name) = match image.rsplit_once(':') {
        Some((path, name)) if !Path::new(image).exists() => (path, Some(name)),
        _ => (image, None),
    };
    let metadata = fs::metadata(path).ok()?;
    let name = name.map(|name| format!(":{name}")).unwrap_or_default();
    let write = |transport: &str| {
        if path.contains(':') {
            let what = if transport == "oci" { "directory" } else { "file" };
            return format!("give the {what} a name without a colon and write {transport}:PATH");
        }
        format!("write {transport}:{}", in_error(&format!("{path}{name}")))
    };
    let kind = match metadata.is_dir() {
        true => Kind::of_directory(Path::new(path)),
        false if metadata.is_file() => Kind::of_file(Path::new(path)),
        false => Kind::Other,
    };
    let (what, advice) = match kind {
        Kind::Layout => ("an OCI layout", write("oci")),
        Kind::DockerArchive => ("a docker archive", write("docker-archive")),
        Kind::OciArchive => ("an OCI archive", write("oci-archive")),
        Kind::UnpackedArchive => (
            "an unpacked docker archive",
            "pack it with tar and write docker-archive:FILE with the file".to_owned(),
        ),
        Kind::SkopeoDirectory => (
            "a directory as skopeo's dir: transport writes it",
            "copy it with `skopeo copy dir:... oci:DIR` and write oci:DIR".to_owned(),
        ),
        Kind::CompressedFile => (
            "a compressed file",
            format!(
                "if it is a docker archive, {}; an OCI archive is oci-archive:FILE",
                write("docker-archive")
            ),
        ),
        Kind::Directory => ("a directory, but no OCI layout", "an OCI layout is oci:DIR".to_owned()),
        Kind::Tar => (
            "a tar archive, but none of an image",
            "an archive of `docker save` is docker-archive:FILE, a tar of an OCI layout is oci-archive:FILE".to_owned(),
        ),
        Kind::Other => (
            "no image",
            "an OCI layout is oci:DIR, a tar of one is oci-archive:FILE, an archive of `docker save` is docker-archive:FILE"
                .to_owned(),
        ),
    };
    Some(format!("`{}` is {what} on this machine: {advice}", in_error(path)))
}

enum Kind {
    Layout,
    UnpackedArchive,
    SkopeoDirectory,
    Directory,
    DockerArchive,
    OciArchive,
    Tar,
    CompressedFile,
    Other,
}

impl Kind {
    fn of_directory(path: &Path) -> Self {
        let has = |name: &str| path.join(name).exists();
        match (has("index.json"), has("manifest.json"), has("version")) {
            (true, _, _) => Self::Layout,
            (false, true, true) => Self::SkopeoDirectory,
            (false, true, false) => Self::UnpackedArchive,
            (false, false, _) => Self::Directory,
        }
    }

    fn of_file(path: &Path) -> Self {
        // A file that cannot be read gets the advice for other files.
        Self::read(path).unwrap_or(Self::Other)
    }

    fn read(path: &Path) -> io::Result<Self> {
        let mut file = File::open(path)?;
        let mut magic = [0; 6];
        let count = file.read(&mut magic)?;
        let compressed: [&[u8]; 4] = [
            &[0x1f, 0x8b],
            &[0x28, 0xb5, 0x2f, 0xfd],
            b"BZh",
            &[0xfd, b'7', b'z', b'X', b'Z'],
        ];
        if compressed.iter().any(|start| magic[..count].starts_with(start)) {
            return Ok(Self::CompressedFile);
        }
        file.rewind()?;
        let (mut entries, mut kind) = (0, Self::Other);
        for entry in tar::Archive::new(file).entries_with_seek()?.take(MOST_ENTRIES) {
            // Entries before a broken one count.
            let Ok(entry) = entry else { break };
            entries += 1;
            match entry.path_bytes().strip_prefix(b"./").unwrap_or(&entry.path_bytes()) {
                b"manifest.json" => return Ok(Self::DockerArchive),
                b"oci-layout" | b"index.json" => kind = Self::OciArchive,
                _ => {}
            }
        }
        Ok(match kind {
            Self::Other if entries > 0 => Self::Tar,
            kind => kind,
        })
    }
}
