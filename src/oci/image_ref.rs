//! What a command line may call an image: a reference in a registry, or a local layout or archive.
//!
//! The prefixes are those of the containers transports: `docker://REF` (or just `REF`), `oci:DIR[:IMAGE]`,
//! `oci-archive:FILE[:IMAGE]`, `docker-archive:FILE[:IMAGE]`. A path ends at the first colon, so it cannot contain one. An image called `oci` in
//! a registry is written `docker://oci:TAG`.

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;
use std::str::FromStr;

use super::{Reference, ReferenceError};

/// Where an image is and what it is called there.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ImageRef {
    /// In a registry.
    Registry(Reference),
    /// In an OCI layout directory.
    Layout {
        /// The directory, as given.
        dir: PathBuf,
        /// Which of the layout's images: a name, a digest, or `@N` for a position.
        image: Option<String>,
    },
    /// In a tar of an OCI layout.
    LayoutArchive {
        /// The file, as given.
        file: PathBuf,
        /// Which of the layout's images: a name, a digest, or `@N` for a position.
        image: Option<String>,
    },
    /// In an archive written by `docker save` or alike.
    Archive {
        /// The file, as given.
        file: PathBuf,
        /// Which of the archive's images: a tag, or `@N` for a position.
        image: Option<String>,
    },
}

impl fmt::Display for ImageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (transport, path, image) = match self {
            Self::Registry(reference) => return reference.fmt(f),
            Self::Layout { dir, image } => (OCI, dir, image),
            Self::LayoutArchive { file, image } => (OCI_ARCHIVE, file, image),
            Self::Archive { file, image } => (DOCKER_ARCHIVE, file, image),
        };
        write!(f, "{transport}:{}", path.display())?;
        image.as_ref().map_or(Ok(()), |image| write!(f, ":{image}"))
    }
}

/// Why a text names no image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ImageRefError {
    /// A reference that breaks the grammar.
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    /// A transport that needs a path, without one.
    #[error("`{transport}:` needs a path: write {transport}:PATH or {transport}:PATH:IMAGE")]
    NoPath {
        /// The transport.
        transport: &'static str,
    },
    /// An empty image name after the path.
    #[error("`{text}` ends in a colon: name the image after it, or leave the colon out")]
    NoImage {
        /// The text as given.
        text: String,
    },
    /// A transport that ocifs does not have.
    #[error("`{transport}:` images are not supported: {hint}")]
    Transport {
        /// The transport.
        transport: &'static str,
        /// What to do instead.
        hint: &'static str,
    },
}

const OCI: &str = "oci";
const OCI_ARCHIVE: &str = "oci-archive";
const DOCKER_ARCHIVE: &str = "docker-archive";

/// Transports whose images are at a path.
const LOCAL: [&str; 3] = [OCI, OCI_ARCHIVE, DOCKER_ARCHIVE];

/// Transports of other tools, with the way to get their images into ocifs.
const FOREIGN: &[(&str, &str)] = &[
    (
        "docker-daemon",
        "write the image to a file with `docker save` and use docker-archive:FILE",
    ),
    (
        "containers-storage",
        "push the image to a registry, or copy it to oci:DIR",
    ),
];

impl FromStr for ImageRef {
    type Err = ImageRefError;

    fn from_str(text: &str) -> Result<Self, ImageRefError> {
        if let Some(reference) = text.strip_prefix("docker://") {
            return Ok(Self::Registry(reference.parse()?));
        }
        let Some((transport, rest)) = text.split_once(':') else {
            return Ok(Self::Registry(text.parse()?));
        };
        if let Some(&(transport, hint)) = FOREIGN.iter().find(|(name, _)| *name == transport) {
            return Err(ImageRefError::Transport { transport, hint });
        }
        match LOCAL.into_iter().find(|local| *local == transport) {
            Some(local) => {
                let (path, image) = split_path(local, text, rest)?;
                Ok(Self::at_path(local, path, image))
            }
            None => Ok(Self::Registry(text.parse()?)),
        }
    }
}

impl ImageRef {
    /// Parses a command-line argument. It is parsed like text, except that a path may have any bytes.
    pub fn from_os_str(given: &OsStr) -> Result<Self, ImageRefError> {
        if let Some(text) = given.to_str() {
            return text.parse();
        }
        let shown = given.to_string_lossy();
        for transport in LOCAL {
            let rest = given.as_bytes().strip_prefix(transport.as_bytes());
            let Some(rest) = rest.and_then(|rest| rest.strip_prefix(b":")) else {
                continue;
            };
            let mut parts = rest.splitn(2, |byte| *byte == b':');
            let path = parts.next().unwrap_or_default();
            // A name with bytes that are no text is in no list of images.
            let image = parts.next().map(|image| String::from_utf8_lossy(image).into_owned());
            if image.as_deref() == Some("") {
                return Err(ImageRefError::NoImage { text: shown.into() });
            }
            if path.is_empty() {
                return Err(ImageRefError::NoPath { transport });
            }
            let path = PathBuf::from(OsStr::from_bytes(path));
            return Ok(Self::at_path(transport, path, image));
        }
        shown.parse()
    }

    /// Makes a reference of one of the transports [`LOCAL`].
    fn at_path(transport: &str, path: PathBuf, image: Option<String>) -> Self {
        match transport {
            OCI => Self::Layout { dir: path, image },
            OCI_ARCHIVE => Self::LayoutArchive { file: path, image },
            _ => Self::Archive { file: path, image },
        }
    }
}

fn split_path(transport: &'static str, text: &str, rest: &str) -> Result<(PathBuf, Option<String>), ImageRefError> {
    let (path, image) = match rest.split_once(':') {
        Some((_, "")) => return Err(ImageRefError::NoImage { text: text.to_owned() }),
        Some((path, image)) => (path, Some(image.to_owned())),
        None => (rest, None),
    };
    if path.is_empty() {
        return Err(ImageRefError::NoPath { transport });
    }
    Ok((path.into(), image))
}

/// Most names an error lists.
const MAX_LISTED: usize = 20;

/// Lists the images that there are, for an error about a missing one.
pub(crate) fn listing(mut names: Vec<String>) -> String {
    let more = names.len().saturating_sub(MAX_LISTED);
    names.truncate(MAX_LISTED);
    match (names.is_empty(), more) {
        (true, _) => "it has none".to_owned(),
        (false, 0) => format!("it has {}", names.join(", ")),
        (false, more) => format!("it has {} and {more} more", names.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_kind_of_name_parses_and_displays() {
        for (text, shown) in [
            ("alpine:latest", "docker.io/library/alpine:latest"),
            ("docker://alpine", "docker.io/library/alpine:latest"),
            ("docker://oci:1", "docker.io/library/oci:1"),
            ("docker:27", "docker.io/library/docker:27"),
            ("oci", "docker.io/library/oci:latest"),
            ("localhost:5000/repo:tag", "localhost:5000/repo:tag"),
            ("oci:dir", "oci:dir"),
            ("oci:./some/../dir", "oci:./some/../dir"),
            ("oci:/abs/dir:v1", "oci:/abs/dir:v1"),
            ("oci:dir:docker.io/library/x:t", "oci:dir:docker.io/library/x:t"),
            ("oci:dir:@1", "oci:dir:@1"),
            ("oci-archive:a.tar", "oci-archive:a.tar"),
            ("oci-archive:/a/b.tar:x:latest", "oci-archive:/a/b.tar:x:latest"),
            ("docker-archive:a.tar", "docker-archive:a.tar"),
            ("docker-archive:/a/b.tar:x:latest", "docker-archive:/a/b.tar:x:latest"),
        ] {
            let image: ImageRef = text.parse().unwrap_or_else(|e| panic!("{text}: {e}"));
            assert_eq!(image.to_string(), shown, "{text}");
            assert_eq!(shown.parse::<ImageRef>().unwrap(), image, "{text}");
        }
    }

    #[test]
    fn the_path_ends_at_the_first_colon() {
        assert_eq!(
            "docker-archive:a/b.tar:x:latest".parse::<ImageRef>().unwrap(),
            ImageRef::Archive {
                file: "a/b.tar".into(),
                image: Some("x:latest".into())
            }
        );
    }

    #[test]
    fn errors_say_what_to_do() {
        for (text, word) in [
            ("oci:", "needs a path"),
            ("oci::v1", "needs a path"),
            ("oci:dir:", "ends in a colon"),
            ("docker-archive:", "needs a path"),
            ("oci-archive:", "needs a path"),
            ("docker-daemon:alpine:latest", "docker save"),
            ("containers-storage:alpine", "push the image"),
            ("docker://", "names no repository"),
            ("https://example.com/x", "leave out `https://`"),
        ] {
            let error = text.parse::<ImageRef>().expect_err(text).to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn random_text_never_panics_and_round_trips_when_accepted(
            text in "(oci:|oci-archive:|docker-archive:|docker://|)[a-z0-9:/@.\\[\\]_ é-]{0,30}|\\PC{0,30}"
        ) {
            if let Ok(image) = text.parse::<ImageRef>() {
                prop_assert_eq!(image.to_string().parse::<ImageRef>().unwrap(), image);
            }
        }
    }
}
