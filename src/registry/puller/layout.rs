//! Writes a pulled image as an OCI image layout.
//!
//! Each blob is streamed into a `.part` file of its own and hashed on the way. The file is synced, and renamed only
//! if size and digest match. A named blob is therefore complete, wherever an earlier pull was interrupted. A pull
//! that fails removes its `.part` files. No pull continues one.

use std::collections::HashSet;
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use futures::stream::{self, StreamExt as _, TryStreamExt as _};
use tempfile::NamedTempFile;
use tokio::fs;
use tokio::io::AsyncWriteExt as _;

use super::super::RegistrySource;
use crate::blob::{BlobError, ImageSource as _};
use crate::oci::{Descriptor, Digest};
use crate::resolve::ResolvedImage;

/// Layers fetched at a time. Several fill the link while one stream is slow. More would cost connections and buffers.
const PARALLEL: usize = 4;
/// Write buffer per layer, in bytes. A larger one costs memory. A smaller one costs more system calls.
const BUFFER: usize = 256 * 1024;

/// Writes the blobs of an image, then the files that name it: `oci-layout` and `index.json`.
pub(super) async fn write(source: &RegistrySource, image: &ResolvedImage, directory: &Path) -> Result<(), BlobError> {
    // An image may list the same layer more than once.
    let mut seen = HashSet::new();
    let layers = image.layers().iter();
    let fetches: Vec<_> = layers
        .filter(|layer| seen.insert(&layer.digest))
        .map(|layer| fetch(source, layer, directory))
        .collect();
    stream::iter(fetches)
        .buffer_unordered(PARALLEL)
        .try_collect::<()>()
        .await?;
    let manifest = &image.manifest_document;
    for document in [&image.config_document, manifest] {
        publish(&blob_path(directory, &document.digest), &document.bytes).await?;
    }
    publish(&directory.join("oci-layout"), br#"{"imageLayoutVersion":"1.0.0"}"#).await?;
    let index = serde_json::json!({
        "schemaVersion": 2,
        "manifests": [{"mediaType": super::manifest_type(&image.manifest), "digest": manifest.digest, "size": manifest.bytes.len()}],
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

/// A file that gets its name only when it is complete.
struct Part {
    /// Removed when it is dropped, unless it was published.
    part: NamedTempFile,
    out: tokio::io::BufWriter<fs::File>,
    path: PathBuf,
}

impl Part {
    async fn create(path: &Path) -> Result<Self, BlobError> {
        let directory = path.parent().unwrap_or(Path::new("."));
        let failed = |error| BlobError::io(path, error);
        fs::create_dir_all(directory).await.map_err(failed)?;
        // Created on this thread, not in the background: a pull that is cancelled meanwhile would leave the file
        // behind.
        let part = tempfile::Builder::new()
            .suffix(".part")
            .permissions(Permissions::from_mode(0o666))
            .tempfile_in(directory)
            .map_err(failed)?;
        let out = fs::File::from_std(part.as_file().try_clone().map_err(failed)?);
        Ok(Self {
            part,
            out: tokio::io::BufWriter::with_capacity(BUFFER, out),
            path: path.to_owned(),
        })
    }

    async fn write(&mut self, bytes: &[u8]) -> Result<(), BlobError> {
        let written = self.out.write_all(bytes).await;
        written.map_err(|error| BlobError::io(self.part.path(), error))
    }

    async fn publish(mut self) -> Result<(), BlobError> {
        let failed = |error| BlobError::io(&self.path, error);
        self.out.flush().await.map_err(failed)?;
        self.out.get_ref().sync_all().await.map_err(failed)?;
        self.part.persist(&self.path).map_err(|e| failed(e.error))?;
        Ok(())
    }
}
