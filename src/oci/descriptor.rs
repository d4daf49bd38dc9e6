//! Descriptors and platforms (image-spec, descriptor.md and image-index.md).

use std::collections::BTreeMap;

use base64::Engine as _;
use serde::{Deserialize, Deserializer, Serialize};

use super::{Digest, media_type};

/// Media type, digest and size of a blob, with what the document that names the blob says about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// Declared media type. It is a hint; the bytes decide.
    #[serde(default, deserialize_with = "null_as_default")]
    pub media_type: String,
    /// Digest of the blob.
    pub digest: Digest,
    /// Size in bytes. Hand-made indexes carry -1 or 0 for manifests.
    #[serde(default)]
    pub size: i64,
    /// Other places to fetch the blob from (foreign layers).
    #[serde(default, deserialize_with = "null_as_default", skip_serializing_if = "Vec::is_empty")]
    pub urls: Vec<String>,
    /// Free-form annotations.
    #[serde(
        default,
        deserialize_with = "null_as_default",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub annotations: BTreeMap<String, String>,
    /// Base64 of the whole content, when embedded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<String>,
    /// Type of the artifact the manifest describes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// Platform that an image index entry is for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
}

impl Descriptor {
    /// Returns the embedded content, which saves fetching it. Returns none if the content does not match the
    /// descriptor.
    pub fn embedded(&self) -> Option<Vec<u8>> {
        let data = self.data.as_deref()?;
        let bytes = base64::engine::general_purpose::STANDARD.decode(data).ok()?;
        let intact = i64::try_from(bytes.len()) == Ok(self.size) && self.digest.matches(&bytes);
        intact.then_some(bytes)
    }
}

impl Descriptor {
    /// Returns whether the descriptor is that of a foreign layer. Such a layer may be kept elsewhere, because its
    /// license forbids distributing it.
    pub fn is_foreign(&self) -> bool {
        media_type::is_foreign_layer(&self.media_type)
    }
}

/// Operating system and processor an image runs on.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Platform {
    /// Processor, as GOARCH.
    #[serde(default)]
    pub architecture: String,
    /// Operating system, as GOOS.
    #[serde(default)]
    pub os: String,
    /// Processor variant, such as `v7`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
    /// Windows build.
    #[serde(default, rename = "os.version", skip_serializing_if = "Option::is_none")]
    pub os_version: Option<String>,
    /// Features the host must have.
    #[serde(
        default,
        rename = "os.features",
        deserialize_with = "null_as_default",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub os_features: Vec<String>,
}

/// Reads JSON `null` as the default, because Go writes `null` for empty slices and maps.
pub(super) fn null_as_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn embedded_content_counts_only_when_true() {
        let mut descriptor = Descriptor {
            media_type: String::new(),
            digest: Digest::of(b"{}"),
            size: 2,
            urls: Vec::new(),
            annotations: BTreeMap::new(),
            data: Some("e30=".into()),
            artifact_type: None,
            platform: None,
        };
        assert_eq!(descriptor.embedded().unwrap(), b"{}");
        descriptor.size = 3;
        assert!(descriptor.embedded().is_none());
        descriptor.size = 2;
        for data in [Some("e31="), Some("%"), None] {
            descriptor.data = data.map(str::to_owned);
            assert!(descriptor.embedded().is_none(), "{data:?}");
        }
    }
}
