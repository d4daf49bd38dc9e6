//! Opens one image of an archive: chooses it from `manifest.json`, finds its layers, and makes up its manifest.

use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::blob::BlobError;
use crate::oci::{
    Algorithm, Descriptor, DiffId, Digest, DigestHasher, ImageConfig, MAX_DOCUMENT, MAX_LAYERS, Reference, listing,
    media_type, shown,
};
use crate::tarfile::{Archive, ArchiveCompression, Member};

/// Name of the file that lists the images.
const MANIFEST: &str = "manifest.json";
/// Where the blobs of an embedded OCI layout are. Their names are their digests.
const BLOBS: &str = "blobs/sha256/";

/// An image as an image source hands it out.
pub(super) struct ArchiveImage {
    /// The manifest, which this module makes up.
    pub manifest: Bytes,
    /// The config as it is in the archive.
    pub config: Bytes,
    /// The layers and the config, by digest.
    pub layers: HashMap<Digest, Member>,
}

/// An image in `manifest.json`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ImageEntry {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Option<Vec<String>>,
}

impl ImageEntry {
    fn tags(&self) -> &[String] {
        self.repo_tags.as_deref().unwrap_or_default()
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ManifestText {
    schema_version: u32,
    media_type: &'static str,
    config: Descriptor,
    layers: Vec<Descriptor>,
}

/// Opens the image called `name`, or the only one.
pub(super) fn open(archive: &Archive, name: Option<&str>) -> Result<ArchiveImage, BlobError> {
    let entries = entries(archive)?;
    let entry = select(&entries, name, archive)?;
    let config = archive.read_small(&entry.config, MAX_DOCUMENT)?;
    let diff_ids = diff_ids(archive, entry, &config)?;
    let paths = entry.layers.as_deref().unwrap_or_default();

    let mut layers = HashMap::new();
    let mut hashed = HashMap::new();
    let mut descriptors = Vec::new();
    for (path, diff_id) in paths.iter().zip(&diff_ids) {
        let member = archive.member(path)?;
        let descriptor = layer(archive, path, &member, diff_id, &mut hashed)?;
        layers.insert(descriptor.digest.clone(), member);
        descriptors.push(descriptor);
    }
    let config_descriptor = descriptor(media_type::OCI_CONFIG, Digest::of(&config), config.len() as u64);
    layers.insert(config_descriptor.digest.clone(), archive.member(&entry.config)?);
    let manifest = ManifestText {
        schema_version: 2,
        media_type: media_type::OCI_MANIFEST,
        config: config_descriptor,
        layers: descriptors,
    };
    let manifest = serde_json::to_vec(&manifest).expect("strings and numbers serialise");
    Ok(ArchiveImage {
        manifest: manifest.into(),
        config,
        layers,
    })
}

fn entries(archive: &Archive) -> Result<Vec<ImageEntry>, BlobError> {
    let invalid = |reason: String| BlobError::Invalid {
        what: format!("archive {}", archive.path.display()),
        reason,
    };
    if !archive.has(MANIFEST) {
        return Err(invalid(if archive.has("oci-layout") {
            format!("it has no {MANIFEST} but is an OCI layout: use oci-archive:FILE")
        } else {
            format!("it has no {MANIFEST}, so it was not written by `docker save` or alike")
        }));
    }
    let text = archive.read_small(MANIFEST, MAX_DOCUMENT)?;
    let mut deserializer = serde_json::Deserializer::from_slice(&text);
    serde_path_to_error::deserialize(&mut deserializer)
        .map_err(|error| invalid(format!("{MANIFEST}: {}", shown(&error.to_string()))))
}

fn select<'a>(entries: &'a [ImageEntry], name: Option<&str>, archive: &Archive) -> Result<&'a ImageEntry, BlobError> {
    let path = archive.path.display();
    let not_found = |what: String| BlobError::NotFound {
        what,
        hint: Some(names(entries)),
    };
    let Some(name) = name else {
        return match entries {
            [only] => Ok(only),
            [] => Err(not_found(format!("an image in {path}"))),
            _ => Err(not_found(format!("the only image in {path} (it has several)"))),
        };
    };
    let complete = |tag: &str| tag.parse::<Reference>().map(|reference| reference.to_string());
    let wanted = complete(name).ok();
    let is_meant = |tag: &String| tag == name || wanted.as_ref().is_some_and(|w| complete(tag).is_ok_and(|t| t == *w));
    let mut found = entries.iter().filter(|entry| entry.tags().iter().any(is_meant));
    if let Some(last) = found.next_back() {
        if found.next_back().is_some() {
            tracing::warn!(archive = %path, name, "several images have this tag: the last one is taken");
        }
        return Ok(last);
    }
    let position = name.strip_prefix('@').and_then(|n| n.parse::<usize>().ok());
    let entry = position.and_then(|position| entries.get(position));
    entry.ok_or_else(|| not_found(format!("image `{name}` in {path}")))
}

/// Lists the images, as a person would ask for them.
fn names(entries: &[ImageEntry]) -> String {
    let names = entries
        .iter()
        .enumerate()
        .flat_map(|(position, entry)| match entry.tags() {
            [] => vec![format!("@{position}")],
            tags => tags.iter().map(|tag| format!("`{}`", shown(tag))).collect(),
        });
    listing(names.collect())
}

/// Returns the config's diffIDs: one for each layer that the archive lists.
fn diff_ids(archive: &Archive, entry: &ImageEntry, config: &[u8]) -> Result<Vec<DiffId>, BlobError> {
    let invalid = |reason: String| BlobError::Invalid {
        what: format!(
            "config `{}` in archive {}",
            shown(&entry.config),
            archive.path.display()
        ),
        reason,
    };
    let config = ImageConfig::parse(config).map_err(|error| invalid(error.to_string()))?;
    let (layers, diff_ids) = (entry.layers.as_ref().map_or(0, Vec::len), config.rootfs.diff_ids);
    if layers > MAX_LAYERS {
        return Err(invalid(format!(
            "its image has {layers} layers, more than the {MAX_LAYERS} allowed"
        )));
    }
    if layers != diff_ids.len() {
        let diff_ids = diff_ids.len();
        return Err(invalid(format!(
            "it has {diff_ids} diff_ids, but {MANIFEST} lists {layers} layers"
        )));
    }
    Ok(diff_ids)
}

/// Describes a layer. The digest is that of the member's bytes.
///
/// Uncompressed bytes hash to the diffID, or the layer is corrupt; its first decoding finds that out. Members called
/// `blobs/sha256/<hex>` say their digest. All other compressed members are hashed, each once (`hashed` is by offset).
fn layer(
    archive: &Archive,
    path: &str,
    member: &Member,
    diff_id: &DiffId,
    hashed: &mut HashMap<u64, Digest>,
) -> Result<Descriptor, BlobError> {
    let media_type = match ArchiveCompression::sniff(&archive.start(member)?) {
        ArchiveCompression::None => return Ok(descriptor(media_type::OCI_LAYER, diff_id.0.clone(), member.size)),
        ArchiveCompression::Gzip => media_type::OCI_LAYER_GZIP,
        ArchiveCompression::Zstd => media_type::OCI_LAYER_ZSTD,
        ArchiveCompression::Xz | ArchiveCompression::Bzip2 => {
            return Err(BlobError::Unsupported {
                what: format!("layer `{}` in archive {}", shown(path), archive.path.display()),
                reason: "it is compressed with xz or bzip2, which layers must not be".to_owned(),
            });
        }
    };
    let digest = match (digest_in_name(path), hashed.get(&member.offset)) {
        (Some(digest), _) => digest,
        (None, Some(digest)) => digest.clone(),
        (None, None) => {
            let mut hasher = DigestHasher::new(Algorithm::Sha256);
            archive.for_each_piece(member, |piece| hasher.update(piece))?;
            let digest = hasher.finish();
            hashed.insert(member.offset, digest.clone());
            digest
        }
    };
    Ok(descriptor(media_type, digest, member.size))
}

fn digest_in_name(path: &str) -> Option<Digest> {
    let hex = path.trim_start_matches("./").strip_prefix(BLOBS)?;
    format!("sha256:{hex}").parse().ok()
}

fn descriptor(media_type: &str, digest: Digest, size: u64) -> Descriptor {
    Descriptor {
        media_type: media_type.to_owned(),
        digest,
        // Offsets and lengths of files fit an i64.
        size: size.cast_signed(),
        urls: Vec::new(),
        annotations: BTreeMap::new(),
        data: None,
        artifact_type: None,
        platform: None,
    }
}
