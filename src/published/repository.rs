//! Published files in a repository of a registry.
//!
//! A manifest lists files, as its layers. The manifest under the tag of a layer lists the index of that layer. The manifest
//! under the tag of an image lists the indexes of all its layers and its profiles, so that one question finds all. An
//! annotation of a listed file has its signature.
//!
//! ```json
//! {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
//!  "artifactType": "application/vnd.ocifs.index.v1",
//!  "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": "sha256:44136f…", "size": 2},
//!  "layers": [{"mediaType": "application/vnd.ocifs.index.v1", "digest": "sha256:…", "size": 1234,
//!              "annotations": {"org.opencontainers.image.title": "sha256-….ocifs",
//!                              "dev.ocifs.signature": "untrusted comment: …"}}]}
//! ```

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::PublishedError;
use crate::oci::Digest;
use crate::oci::media_type::OCI_MANIFEST;
use crate::registry::FileRepository;

const ARTIFACT: &str = "application/vnd.ocifs.index.v1";
const EMPTY: &str = "application/vnd.oci.empty.v1+json";
const EMPTY_CONFIG: &[u8] = b"{}";
const TITLE: &str = "org.opencontainers.image.title";
const SIGNATURE: &str = "dev.ocifs.signature";
/// Most files that are read from one manifest. An image has at most some hundred layers.
const MOST_FILES: usize = 4096;

/// A file that a manifest lists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Listed {
    pub(super) name: String,
    pub(super) digest: Digest,
    pub(super) size: u64,
    pub(super) signature: Option<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ListManifest {
    schema_version: u32,
    media_type: String,
    artifact_type: String,
    config: ListedBlob,
    #[serde(default)]
    layers: Vec<ListedBlob>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ListedBlob {
    media_type: String,
    digest: Digest,
    size: u64,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    annotations: BTreeMap<String, String>,
}

/// Returns the files that the manifest under a tag lists. None if there is no such tag.
pub(super) async fn list(files: &FileRepository, tag: &str) -> Result<Option<Vec<Listed>>, PublishedError> {
    let Some(document) = files.manifest(tag).await? else {
        return Ok(None);
    };
    read_list(tag, &document.bytes).map(Some)
}

fn read_list(tag: &str, bytes: &[u8]) -> Result<Vec<Listed>, PublishedError> {
    let manifest: ListManifest =
        serde_json::from_slice(bytes).map_err(|error| PublishedError::format(tag, error.to_string()))?;
    if manifest.artifact_type != ARTIFACT {
        return Err(PublishedError::format(tag, "it is no list of index files"));
    }
    let listed = manifest.layers.into_iter().take(MOST_FILES).filter_map(|mut blob| {
        Some(Listed {
            name: blob.annotations.remove(TITLE)?,
            digest: blob.digest,
            size: blob.size,
            signature: blob.annotations.remove(SIGNATURE),
        })
    });
    Ok(listed.collect())
}

/// Puts a manifest that lists `listed` under a tag. The files must be there.
pub(super) async fn put_list(files: &FileRepository, tag: &str, listed: &[Listed]) -> Result<(), PublishedError> {
    let config = Digest::of(EMPTY_CONFIG);
    files.put_blob(&config, Bytes::from_static(EMPTY_CONFIG)).await?;
    let manifest = ListManifest {
        schema_version: 2,
        media_type: OCI_MANIFEST.to_owned(),
        artifact_type: ARTIFACT.to_owned(),
        config: ListedBlob {
            media_type: EMPTY.to_owned(),
            digest: config,
            size: EMPTY_CONFIG.len() as u64,
            annotations: BTreeMap::new(),
        },
        layers: listed
            .iter()
            .map(|file| ListedBlob {
                media_type: ARTIFACT.to_owned(),
                digest: file.digest.clone(),
                size: file.size,
                annotations: [(TITLE, Some(&file.name)), (SIGNATURE, file.signature.as_ref())]
                    .into_iter()
                    .filter_map(|(key, value)| Some((key.to_owned(), value?.clone())))
                    .collect(),
            })
            .collect(),
    };
    let bytes = serde_json::to_vec(&manifest).map_err(|error| PublishedError::format(tag, error.to_string()))?;
    files.put_manifest(tag, OCI_MANIFEST, bytes.into()).await?;
    Ok(())
}
