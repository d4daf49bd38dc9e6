//! Writing a pulled image as an OCI image layout.
//!
//! A blob is streamed into a `.part` file of its own, hashed on the way, synced, and renamed only when size and digest are
//! right. A name therefore proves content, whatever died when; an unfinished `.part` file is removed, never continued.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use futures::stream::{self, StreamExt as _, TryStreamExt as _};
use tokio::fs;
use tokio::io::AsyncWriteExt as _;

use super::super::RegistrySource;
use crate::blob::{BlobError, Document, ImageSource};
use crate::oci::{Descriptor, Digest, Manifest as OwnManifest};

/// Layers fetched at a time: enough to fill a link past one slow stream.
const PARALLEL: usize = 4;
/// Write buffer per layer.
const BUFFER: usize = 256 * 1024;

/// Writes the blobs of an image, then the files that name it.
pub(super) async fn write(
    source: &RegistrySource,
    manifest: &Document,
    known: &OwnManifest,
    config: &Document,
    directory: &Path,
) -> Result<(), BlobError> {
    // An image may have the same layer more than once.
    let mut seen = HashSet::new();
    let fetches: Vec<_> = known
        .layers
        .iter()
        .filter(|layer| seen.insert(&layer.digest))
        .map(|layer| fetch(source, layer, directory))
        .collect();
    stream::iter(fetches)
        .buffer_unordered(PARALLEL)
        .try_collect::<()>()
        .await?;
    for document in [config, manifest] {
        publish(&blob_path(directory, &document.digest), &document.bytes).await?;
    }
    publish(&directory.join("oci-layout"), br#"{"imageLayoutVersion":"1.0.0"}"#).await?;
    let index = serde_json::json!({
        "schemaVersion": 2,
        "manifests": [{"mediaType": super::manifest_type(known), "digest": manifest.digest, "size": manifest.bytes.len()}],
    });
    publish(&directory.join("index.json"), index.to_string().as_bytes()).await
}

async fn fetch(source: &RegistrySource, layer: &Descriptor, directory: &Path) -> Result<(), BlobError> {
    let path = blob_path(directory, &layer.digest);
    if fs::try_exists(&path)
        .await
        .map_err(|error| BlobError::io(&path, error))?
    {
        return Ok(());
    }
    let blob = source.blob(layer).await?;
    let mut part = Part::create(&path).await?;
    let mut hasher = layer.digest.hasher();
    let mut stream = blob.read(0..blob.size()).await?;
    while let Some(chunk) = stream.try_next().await? {
        hasher.update(&chunk);
        part.write(&chunk).await?;
    }
    hasher.verify(&layer.digest).map_err(|actual| BlobError::Corrupt {
        what: format!("layer {} of {}", layer.digest, source.describe()),
        expected: layer.digest.to_string(),
        actual: actual.to_string(),
    })?;
    part.publish().await
}

async fn publish(path: &Path, bytes: &[u8]) -> Result<(), BlobError> {
    let mut part = Part::create(path).await?;
    part.write(bytes).await?;
    part.publish().await
}

fn blob_path(directory: &Path, digest: &Digest) -> PathBuf {
    directory
        .join("blobs")
        .join(digest.algorithm().name())
        .join(digest.hex())
}

/// A file that is not there until it is whole.
struct Part {
    file: tokio::io::BufWriter<fs::File>,
    part: PathBuf,
    path: PathBuf,
    published: bool,
}

impl Part {
    async fn create(path: &Path) -> Result<Self, BlobError> {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)
                .await
                .map_err(|error| BlobError::io(parent, error))?;
        }
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{:016x}.part", fastrand::u64(..)));
        let part = path.with_file_name(name);
        // Not in the background: a pull that is given up meanwhile would leave the file behind.
        let file = std::fs::File::create_new(&part).map_err(|error| BlobError::io(&part, error))?;
        Ok(Self {
            file: tokio::io::BufWriter::with_capacity(BUFFER, fs::File::from_std(file)),
            part,
            path: path.to_owned(),
            published: false,
        })
    }

    async fn write(&mut self, bytes: &[u8]) -> Result<(), BlobError> {
        self.file
            .write_all(bytes)
            .await
            .map_err(|error| BlobError::io(&self.part, error))
    }

    async fn publish(mut self) -> Result<(), BlobError> {
        let part = self.part.clone();
        let failed = |error| BlobError::io(&part, error);
        self.file.flush().await.map_err(failed)?;
        self.file.get_ref().sync_all().await.map_err(failed)?;
        fs::rename(&self.part, &self.path).await.map_err(failed)?;
        self.published = true;
        Ok(())
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if !self.published
            && let Err(error) = std::fs::remove_file(&self.part)
        {
            tracing::warn!(path = %self.part.display(), %error, "an unfinished file stays behind");
        }
    }
}
