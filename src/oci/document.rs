//! Manifests and image indexes (image-spec manifest.md and image-index.md; Docker's manifest v2 schema 2).
//!
//! Parsing is tolerant: it ignores unknown fields, has defaults for absent and null ones, and takes sizes of -1. It
//! is strict where two readers could disagree about one document. A field must not come twice, and a document must
//! not be of two kinds at once (CVE-2021-41190). A digest is about the received bytes, never about their
//! re-serialisation.

use std::collections::BTreeMap;

use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Serialize};

use super::descriptor::null_as_default;
use super::{Descriptor, Refusal, media_type, shown};

/// Most bytes of a manifest, image index or config that is read. The distribution spec asks registries to accept at
/// least 4 MiB; configs with long histories are larger. A larger bound costs memory; a smaller one refuses such
/// configs.
pub const MAX_DOCUMENT: usize = 16 << 20;
/// Most layers in a manifest. Container engines stop at 127 or 500; the bound only keeps work finite.
pub const MAX_LAYERS: usize = 4096;

/// What a document is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DocumentKind {
    /// Lists manifests by platform; parse it as [`ImageIndex`].
    ImageIndex,
    /// Lists a config and layers; parse it as [`Manifest`].
    Manifest,
}

/// Why a document cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DocumentError {
    /// The document is well formed, but cannot be mounted.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// More than [`MAX_DOCUMENT`] bytes.
    #[error("it has {len} bytes, more than the {max} allowed")]
    TooLarge {
        /// Its length in bytes.
        len: usize,
        /// The limit.
        max: usize,
    },
    /// Not JSON, or a field of a wrong type.
    #[error("{}{}", FieldPrefix(field), shown(reason))]
    Json {
        /// Path of the field, such as `layers[2].size`; empty when the JSON itself is broken at the top.
        field: String,
        /// The parser's words, with line and column.
        reason: String,
    },
    /// The document can be read as two kinds of document.
    #[error("it is ambiguous: {reason}")]
    Ambiguous {
        /// What contradicts what.
        reason: String,
    },
    /// Neither image index nor manifest.
    #[error("it is neither an image index nor a manifest (media type `{}`)", shown(media_type))]
    UnknownKind {
        /// The declared media type.
        media_type: String,
    },
    /// More than [`MAX_LAYERS`] layers.
    #[error("it has {count} layers, more than the {max} allowed")]
    TooManyLayers {
        /// How many there are.
        count: usize,
        /// The limit.
        max: usize,
    },
    /// Config and manifest disagree about the number of layers.
    #[error("its manifest lists {layers} layers but its config {diff_ids} diff_ids, so the layers cannot be verified")]
    LayerCount {
        /// Layers in the manifest.
        layers: usize,
        /// Entries of `rootfs.diff_ids` in the config.
        diff_ids: usize,
    },
}

/// A prefix that names a field, if there is a field to name.
struct FieldPrefix<'a>(&'a str);

impl std::fmt::Display for FieldPrefix<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            "" | "." => Ok(()),
            field => write!(f, "field `{}`: ", shown(field)),
        }
    }
}

/// Parses a document of bounded size. The error names the field that has a wrong type.
pub(super) fn parse_json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, DocumentError> {
    if bytes.len() > MAX_DOCUMENT {
        return Err(DocumentError::TooLarge {
            len: bytes.len(),
            max: MAX_DOCUMENT,
        });
    }
    // A derived `Deserialize` would take the elements of an array for the fields in order.
    if bytes.trim_ascii_start().first().is_some_and(|&b| b == b'[') {
        return Err(DocumentError::Json {
            field: String::new(),
            reason: "it is an array, not an object".to_owned(),
        });
    }
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let broken = |reason: serde_json::Error| DocumentError::Json {
        field: String::new(),
        reason: reason.to_string(),
    };
    let value = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| DocumentError::Json {
        field: error.path().to_string(),
        reason: error.into_inner().to_string(),
    })?;
    deserializer.end().map_err(broken)?;
    Ok(value)
}

/// Lists manifests by platform.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ImageIndex {
    /// The media type that the index states, if any.
    #[serde(deserialize_with = "null_as_default", skip_serializing_if = "String::is_empty")]
    pub media_type: String,
    /// Set when the index describes an artifact.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// The entries. Of equal entries, the first one counts.
    #[serde(deserialize_with = "null_as_default")]
    pub manifests: Vec<Descriptor>,
    /// Free-form annotations.
    #[serde(deserialize_with = "null_as_default", skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

impl ImageIndex {
    /// Parses an image index.
    pub fn parse(bytes: &[u8]) -> Result<Self, DocumentError> {
        parse_json(bytes)
    }
}

/// Names the config and the layers of an image, lowest first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// The media type that the manifest states, if any.
    #[serde(
        default,
        deserialize_with = "null_as_default",
        skip_serializing_if = "String::is_empty"
    )]
    pub media_type: String,
    /// Set when the manifest describes an artifact.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// The image config.
    pub config: Descriptor,
    /// The layers, lowest first.
    #[serde(default, deserialize_with = "null_as_default")]
    pub layers: Vec<Descriptor>,
    /// The manifest that this one belongs to, as that of a signature or an index does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<Descriptor>,
    /// Free-form annotations.
    #[serde(
        default,
        deserialize_with = "null_as_default",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub annotations: BTreeMap<String, String>,
}

impl Manifest {
    /// Parses the manifest of an image or an artifact. [`Manifest::refusal`] tells them apart.
    pub fn parse(bytes: &[u8]) -> Result<Self, DocumentError> {
        let manifest: Self = parse_json(bytes)?;
        if manifest.layers.len() > MAX_LAYERS {
            return Err(DocumentError::TooManyLayers {
                count: manifest.layers.len(),
                max: MAX_LAYERS,
            });
        }
        Ok(manifest)
    }
}

/// Top-level fields that reveal a document's shape. Only the values of the two scalars are read.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct DocumentShape {
    #[serde(default)]
    schema_version: Option<serde_json::Value>,
    #[serde(default)]
    media_type: Option<String>,
    manifests: Option<IgnoredAny>,
    layers: Option<IgnoredAny>,
    config: Option<IgnoredAny>,
    fs_layers: Option<IgnoredAny>,
    signatures: Option<IgnoredAny>,
    blobs: Option<IgnoredAny>,
}

/// Finds out what a document is. Looks at the declared media type (of the descriptor or the `Content-Type`), at the
/// media type that the document states, and at its shape. They must agree where they name a kind.
pub fn classify(declared: &str, bytes: &[u8]) -> Result<DocumentKind, DocumentError> {
    let shape: DocumentShape = parse_json(bytes)?;
    let stated = shape.media_type.as_deref().unwrap_or_default();
    let by_shape = shape.kind()?;
    let mut kind = by_shape.map(|kind| ("its fields", kind));
    for (whence, text) in [("the mediaType field", stated), ("its declared media type", declared)] {
        let Some(named) = kind_of_media_type(text)? else {
            continue;
        };
        match kind {
            Some((other, kind)) if kind != named => {
                return Err(DocumentError::Ambiguous {
                    reason: format!("{whence} makes it {}, {other} {}", name(named), name(kind)),
                });
            }
            _ => kind = Some((whence, named)),
        }
    }
    kind.map(|(_, kind)| kind).ok_or_else(|| DocumentError::UnknownKind {
        media_type: if stated.is_empty() { declared } else { stated }.to_owned(),
    })
}

fn name(kind: DocumentKind) -> &'static str {
    match kind {
        DocumentKind::ImageIndex => "an image index",
        DocumentKind::Manifest => "a manifest",
    }
}

fn kind_of_media_type(text: &str) -> Result<Option<DocumentKind>, Refusal> {
    match media_type::essence(text) {
        media_type::OCI_INDEX | media_type::DOCKER_LIST => Ok(Some(DocumentKind::ImageIndex)),
        media_type::OCI_MANIFEST | media_type::DOCKER_MANIFEST => Ok(Some(DocumentKind::Manifest)),
        media_type::SCHEMA1 | media_type::SCHEMA1_SIGNED => Err(Refusal::Schema1),
        media_type::PRE_OCI_LIST => Err(Refusal::PreOci),
        media_type::OCI_ARTIFACT => Err(Refusal::artifact(media_type::OCI_ARTIFACT)),
        _ => Ok(None),
    }
}

impl DocumentShape {
    fn kind(&self) -> Result<Option<DocumentKind>, DocumentError> {
        let version_1 = self.schema_version.as_ref().is_some_and(|v| v == 1);
        let is_manifest = self.layers.is_some() || self.config.is_some();
        if version_1
            || self.fs_layers.is_some()
            || (self.signatures.is_some() && !is_manifest && self.manifests.is_none())
        {
            return Err(Refusal::Schema1.into());
        }
        match (self.manifests.is_some(), is_manifest) {
            (true, true) => Err(DocumentError::Ambiguous {
                reason: "it has both `manifests` and `layers` or `config`".to_owned(),
            }),
            (true, false) => Ok(Some(DocumentKind::ImageIndex)),
            (false, true) => Ok(Some(DocumentKind::Manifest)),
            (false, false) if self.blobs.is_some() => Err(Refusal::artifact(media_type::OCI_ARTIFACT).into()),
            (false, false) => Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::oci::Digest;
    use crate::oci::media_type::{DOCKER_LIST, DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST, SCHEMA1_SIGNED};

    #[test]
    fn documents_are_classified_by_type_and_shape() {
        use DocumentKind::{ImageIndex, Manifest};
        for (declared, body, kind) in [
            (OCI_INDEX, r#"{"schemaVersion":2,"manifests":[]}"#, ImageIndex),
            (DOCKER_LIST, r#"{"schemaVersion":2,"manifests":[]}"#, ImageIndex),
            (
                "application/vnd.oci.image.index.v1+json; charset=utf-8",
                r#"{"manifests":[]}"#,
                ImageIndex,
            ),
            (OCI_MANIFEST, r#"{"config":{},"layers":[]}"#, Manifest),
            (DOCKER_MANIFEST, r#"{"config":{},"layers":[]}"#, Manifest),
            (OCI_MANIFEST, r#"{"config":{}}"#, Manifest),
            (OCI_MANIFEST, "{}", Manifest),
            ("", r#"{"manifests":[]}"#, ImageIndex),
            ("application/json", r#"{"layers":[],"config":{}}"#, Manifest),
            (
                "text/plain",
                r#"{"mediaType":"application/vnd.oci.image.index.v1+json"}"#,
                ImageIndex,
            ),
            // The media type of one format on the body of the other is harmless.
            (
                OCI_MANIFEST,
                r#"{"mediaType":"application/vnd.docker.distribution.manifest.v2+json","layers":[],"config":{}}"#,
                Manifest,
            ),
            (OCI_INDEX, r#"{"manifests":[],"layers":null,"config":null}"#, ImageIndex),
            (OCI_MANIFEST, r#"{"layers":[],"config":{},"signatures":[]}"#, Manifest),
        ] {
            assert_eq!(classify(declared, body.as_bytes()), Ok(kind), "{declared} {body}");
        }
    }

    #[test]
    fn ambiguous_documents_are_refused() {
        for (declared, body) in [
            (OCI_INDEX, r#"{"manifests":[],"layers":[]}"#),
            (OCI_MANIFEST, r#"{"manifests":[],"layers":[],"config":{}}"#),
            ("", r#"{"manifests":[],"config":{}}"#),
            (OCI_MANIFEST, r#"{"manifests":[]}"#),
            (OCI_INDEX, r#"{"layers":[],"config":{}}"#),
            (
                OCI_INDEX,
                r#"{"mediaType":"application/vnd.oci.image.manifest.v1+json"}"#,
            ),
            (
                "",
                r#"{"mediaType":"application/vnd.oci.image.manifest.v1+json","manifests":[]}"#,
            ),
        ] {
            let got = classify(declared, body.as_bytes());
            assert!(
                matches!(got, Err(DocumentError::Ambiguous { .. })),
                "{declared} {body}: {got:?}"
            );
        }
        let twice = classify("", br#"{"manifests":[],"manifests":[1]}"#)
            .unwrap_err()
            .to_string();
        assert!(twice.contains("duplicate field `manifests`"), "{twice}");
    }

    #[test]
    fn obsolete_documents_are_refused_by_name() {
        for (declared, body) in [
            (SCHEMA1_SIGNED, "{}"),
            ("application/json", r#"{"schemaVersion":1,"name":"x"}"#),
            (OCI_MANIFEST, r#"{"schemaVersion":1,"layers":[],"config":{}}"#),
            (DOCKER_MANIFEST, r#"{"schemaVersion":2,"fsLayers":[],"history":[]}"#),
            ("text/plain", r#"{"signatures":[]}"#),
            (
                "",
                r#"{"mediaType":"application/vnd.docker.distribution.manifest.v1+json"}"#,
            ),
        ] {
            assert_eq!(
                classify(declared, body.as_bytes()),
                Err(Refusal::Schema1.into()),
                "{declared} {body}"
            );
        }
        let pre = classify("application/vnd.oci.image.manifest.list.v1+json", b"{}");
        assert_eq!(pre, Err(Refusal::PreOci.into()));
        let artifact = classify("application/json", br#"{"blobs":[]}"#)
            .unwrap_err()
            .to_string();
        assert!(artifact.contains("an OCI artifact"), "{artifact}");
    }

    #[test]
    fn other_bytes_are_no_document() {
        for (body, words) in [
            ("", "EOF"),
            ("<html>", "expected value"),
            (" []", "is an array"),
            ("3", "invalid type"),
            ("{}", "neither an image index nor a manifest"),
            (r#"{"manifests":[]} {}"#, "trailing characters"),
            (r#"{"mediaType":5}"#, "field `mediaType`"),
        ] {
            let got = classify("application/json", body.as_bytes()).map_err(|e| e.to_string());
            assert!(got.as_ref().is_err_and(|e| e.contains(words)), "{body}: {got:?}");
        }
        // Skipped values are skipped without recursion. Kept values have a depth limit.
        let deep = |field: &str| {
            format!(
                r#"{{"manifests":[],"{field}":{}{}}}"#,
                "[".repeat(1 << 20),
                "]".repeat(1 << 20)
            )
        };
        assert_eq!(classify("", deep("novel").as_bytes()), Ok(DocumentKind::ImageIndex));
        let kept = classify("", deep("schemaVersion").as_bytes()).unwrap_err().to_string();
        assert!(kept.contains("recursion limit"), "{kept}");
        let large = vec![b' '; MAX_DOCUMENT + 1];
        assert!(matches!(classify("", &large), Err(DocumentError::TooLarge { .. })));
    }

    #[test]
    fn manifests_are_read_tolerantly() {
        let digest = Digest::of(b"");
        let text = format!(
            r#"{{"schemaVersion":2,"mediaType":null,"novel":[{{}}],"annotations":null,
            "config":{{"digest":"{digest}","size":-1,"urls":null}},
            "layers":[{{"mediaType":"x","digest":"{digest}","size":7,"annotations":{{"a":"b"}},"novel":1}}]}}"#
        );
        let manifest = Manifest::parse(text.as_bytes()).unwrap();
        assert_eq!((manifest.config.size, manifest.config.media_type.as_str()), (-1, ""));
        assert_eq!(
            (manifest.layers[0].size, &manifest.layers[0].annotations["a"]),
            (7, &"b".to_owned())
        );
        let index = format!(
            r#"{{"manifests":[{{"digest":"{digest}","platform":{{"os":"linux","architecture":"arm","variant":null,"os.features":null}}}}]}}"#
        );
        let index = ImageIndex::parse(index.as_bytes()).unwrap();
        assert_eq!(index.manifests[0].platform.as_ref().unwrap().to_string(), "linux/arm");
        assert_eq!(
            ImageIndex::parse(br#"{"manifests":null}"#).unwrap(),
            ImageIndex::default()
        );
    }

    #[test]
    fn wrong_types_name_the_field() {
        let digest = Digest::of(b"");
        for (text, field) in [
            (r#"{"config":"x"}"#.to_owned(), "`config`"),
            (
                format!(r#"{{"config":{{"digest":"{digest}","size":"1"}}}}"#),
                "`config.size`",
            ),
            (
                format!(r#"{{"config":{{"digest":"{digest}"}},"layers":[{{"digest":"md5:00"}}]}}"#),
                "`layers[0].digest`",
            ),
            (
                format!(r#"{{"config":{{"digest":"{digest}"}},"annotations":{{"k":1}}}}"#),
                "`annotations.k`",
            ),
            ("{}".to_owned(), "missing field `config`"),
        ] {
            let error = Manifest::parse(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(field), "{error}");
        }
    }

    #[test]
    fn errors_do_not_repeat_whatever_a_document_says() {
        let digest = Digest::of(b"");
        let long = "x".repeat(100_000);
        for text in [
            format!(r#"{{"config":{{"digest":"{digest}"}},"layers":"{long}\u001b"}}"#),
            format!(r#"{{"config":{{"digest":"\u001b{long}"}}}}"#),
            format!(r#"{{"config":{{"digest":"{digest}"}},"annotations":{{"\u001b[2J{long}":1}}}}"#),
        ] {
            let error = Manifest::parse(text.as_bytes()).unwrap_err().to_string();
            assert!(error.len() < 2000 && !error.contains(char::is_control), "{error}");
        }
        let error = classify(&format!("\u{1b}{long}"), b"{}").unwrap_err().to_string();
        assert!(error.len() < 2000 && error.contains(r"`\u{1b}xxx"), "{error}");
    }

    #[test]
    fn the_number_of_layers_is_limited() {
        let digest = Digest::of(b"");
        let of = |count: usize| {
            let layers = vec![format!(r#"{{"digest":"{digest}"}}"#); count].join(",");
            Manifest::parse(format!(r#"{{"config":{{"digest":"{digest}"}},"layers":[{layers}]}}"#).as_bytes())
        };
        assert_eq!(of(MAX_LAYERS).unwrap().layers.len(), MAX_LAYERS);
        assert!(matches!(
            of(MAX_LAYERS + 1),
            Err(DocumentError::TooManyLayers { count: 4097, .. })
        ));
    }

    proptest! {
        #[test]
        fn damaged_documents_never_panic(edits in proptest::collection::vec((any::<usize>(), any::<u8>()), 1..6)) {
            let digest = Digest::of(b"");
            let text = format!(
                r#"{{"schemaVersion":2,"mediaType":"{OCI_MANIFEST}","config":{{"digest":"{digest}","size":2}},
                "layers":[{{"mediaType":"a","digest":"{digest}","size":1,"urls":["u"],"platform":{{"os":"linux"}}}}]}}"#
            );
            let mut bytes = text.into_bytes();
            for (at, byte) in edits {
                let at = at % bytes.len();
                bytes[at] = byte;
            }
            if classify(OCI_MANIFEST, &bytes).is_ok()
                && let Ok(manifest) = Manifest::parse(&bytes)
            {
                manifest.refusal();
            }
        }
    }
}
