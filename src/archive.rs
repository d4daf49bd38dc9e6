//! Archives written by `docker save`, and by tools that write alike (podman, skopeo, buildah, containerd, bazel,
//! kaniko).
//!
//! `manifest.json` is what counts. It lists images; each has a config and layers, by path within the archive. Writers
//! put different things at these paths: plain files, symlinks to another layer's directory, blobs of an embedded OCI
//! layout. Layers are uncompressed or compressed. This module ignores everything else in the archive.
//!
//! ```text
//! docker <= 24      <hex>.json  <id>/layer.tar, repeats as symlinks to ../<id>/layer.tar
//! podman, skopeo    <hex>.json  <diffID hex>.tar
//! docker >= 25      blobs/sha256/<hex>, layers uncompressed: hex is the diffID
//! containerd        blobs/sha256/<hex>, layers as pulled: hex is the blob digest
//! ```
//! Layers are ranges of the archive's file, read in place (`crate::tarfile`). The module makes up a manifest of the image
//! for the rest of the program. The manifest is always the same for the same archive content.
//!
//! An archive with an OCI layout is another thing; see [`layout`](crate::layout).

mod image;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

use crate::blob::file::{FileBlob, blocking};
use crate::blob::{BlobError, BlobSource, Document, ImageSource};
use crate::oci::{Descriptor, Digest, media_type};
use crate::tarfile::Archive;
use image::ArchiveImage;

/// One image of a docker archive.
pub struct DockerArchive {
    archive: Arc<Archive>,
    name: Option<String>,
    image: ArchiveImage,
}

impl DockerArchive {
    /// Opens the image called `image` in the archive `file`.
    ///
    /// `image` is one of its `RepoTags` (as written there, or meaning the same reference: `alpine` finds
    /// `docker.io/library/alpine:latest`) or `@N` for the entry of `manifest.json` at position N. It may be left out
    /// when there is just one image.
    ///
    /// Reads every header of the archive. Compressed layers are read whole and hashed if their names do not tell
    /// their digest. An archive that is compressed as a whole (gzip or zstd) is unpacked into the directory for
    /// temporary files. An archive that unpacks to far more than images do is refused.
    ///
    /// Fails with [`BlobError::NotFound`], which lists the tags, if there is no such image. Fails with
    /// [`BlobError::Invalid`] if `file` is no such archive.
    pub async fn open(file: impl Into<PathBuf>, image: Option<&str>) -> Result<Self, BlobError> {
        let path: Arc<Path> = file.into().into();
        let name = image.map(str::to_owned);
        let (at, wanted) = (Arc::clone(&path), name.clone());
        let (archive, image) = blocking(&path, move || {
            let archive = Archive::open(at)?;
            let image = image::open(&archive, wanted.as_deref())?;
            Ok((archive, image))
        })
        .await?;
        Ok(Self {
            archive: Arc::new(archive),
            name,
            image,
        })
    }

    fn not_found(&self, descriptor: &Descriptor) -> BlobError {
        BlobError::NotFound {
            what: format!("blob {} in {}", descriptor.digest, self.describe()),
            hint: None,
        }
    }
}

#[async_trait]
impl ImageSource for DockerArchive {
    async fn root(&self) -> Result<Document, BlobError> {
        Ok(document(media_type::OCI_MANIFEST, &self.image.manifest))
    }

    async fn manifest(&self, descriptor: &Descriptor) -> Result<Document, BlobError> {
        let document = self.root().await?;
        (document.digest == descriptor.digest)
            .then_some(document)
            .ok_or_else(|| self.not_found(descriptor))
    }

    async fn config(&self, descriptor: &Descriptor) -> Result<Document, BlobError> {
        let document = document(media_type::OCI_CONFIG, &self.image.config);
        (document.digest == descriptor.digest)
            .then_some(document)
            .ok_or_else(|| self.not_found(descriptor))
    }

    async fn blob(&self, descriptor: &Descriptor) -> Result<Arc<dyn BlobSource>, BlobError> {
        let layer = self
            .image
            .layers
            .get(&descriptor.digest)
            .ok_or_else(|| self.not_found(descriptor))?;
        Ok(Arc::new(FileBlob::new(
            Arc::clone(&self.archive.file),
            Arc::clone(&self.archive.path),
            descriptor.digest.clone(),
            layer.offset,
            layer.size,
        )))
    }

    fn describe(&self) -> String {
        match &self.name {
            Some(name) => format!("docker-archive:{}:{name}", self.archive.path.display()),
            None => format!("docker-archive:{}", self.archive.path.display()),
        }
    }
}

impl fmt::Debug for DockerArchive {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("DockerArchive").field(&self.describe()).finish()
    }
}

fn document(media_type: &str, bytes: &Bytes) -> Document {
    Document {
        media_type: media_type.to_owned(),
        digest: Digest::of(bytes),
        bytes: bytes.clone(),
    }
}
