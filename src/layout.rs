//! OCI image layouts: a directory with `oci-layout`, `index.json` and `blobs/<algorithm>/<hex>` (image-spec
//! image-layout.md).
//!
//! `index.json` may hold several images; [`OciLayout::open`] describes how to name one. The path of a blob is made of
//! a parsed digest, so it cannot leave `blobs/`. The blob itself may be a link to anywhere. That is safe, because
//! documents are checked against their digest, and the decoder of a layer checks the layer. A blob may be missing
//! until a caller requests it.

mod select;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use serde::Deserialize;

use crate::blob::file::{FileBlob, blocking, open_regular, read_piece};
use crate::blob::{BlobError, BlobSource, Document, ImageSource};
use crate::oci::{Descriptor, Digest, ImageIndex, MAX_DOCUMENT, shown};

/// One image of an OCI layout directory.
#[derive(Clone)]
pub struct OciLayout {
    dir: Arc<Path>,
    image: Option<String>,
    root: Descriptor,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct LayoutFile {
    image_layout_version: String,
}

impl OciLayout {
    /// Opens the image called `image` in the layout at `dir`.
    ///
    /// `image` is one of these, in this order:
    /// - the value of an entry's annotation `org.opencontainers.image.ref.name`;
    /// - the value of `io.containerd.image.name` (as given, or completed: `alpine` finds
    ///   `docker.io/library/alpine:latest`);
    /// - `@N` for the entry at position N;
    /// - an entry's digest.
    ///
    /// When several entries have the name, the last one counts. `image` may be left out when there is just one image.
    ///
    /// Fails with [`BlobError::NotFound`] if there is no such image, and lists the images that there are. Also fails
    /// if `dir` is no layout.
    pub async fn open(dir: impl Into<PathBuf>, image: Option<&str>) -> Result<Self, BlobError> {
        let dir: Arc<Path> = dir.into().into();
        let image = image.map(str::to_owned);
        let (at, name) = (Arc::clone(&dir), image.clone());
        let root = blocking(&dir, move || find(&at, name.as_deref())).await?;
        Ok(Self { dir, image, root })
    }

    async fn document(&self, descriptor: &Descriptor) -> Result<Document, BlobError> {
        let (this, digest, size) = (self.clone(), descriptor.digest.clone(), descriptor.size);
        let bytes = blocking(&self.dir, move || {
            let (file, len, path) = this.open_blob(&digest)?;
            if len > MAX_DOCUMENT as u64 {
                return Err(BlobError::Invalid {
                    what: path.display().to_string(),
                    reason: format!("it has {len} bytes, more than the {MAX_DOCUMENT} allowed for a document"),
                });
            }
            // Hand-made indexes give the size -1 or 0. Such a size is ignored, because the digest is checked below.
            if size > 0 && size.unsigned_abs() != len {
                return Err(wrong_size(&path, size, len));
            }
            let bytes = read_piece(&file, &path, 0, len)?;
            digest.verify(&bytes).map_err(|actual| BlobError::Corrupt {
                what: path.display().to_string(),
                expected: digest.to_string(),
                actual: actual.to_string(),
            })?;
            Ok(bytes)
        });
        Ok(Document {
            media_type: descriptor.media_type.clone(),
            digest: descriptor.digest.clone(),
            bytes: bytes.await?,
        })
    }

    fn open_blob(&self, digest: &Digest) -> Result<(std::fs::File, u64, PathBuf), BlobError> {
        let path = self
            .dir
            .join("blobs")
            .join(digest.algorithm().name())
            .join(digest.hex());
        match open_regular(&path) {
            Ok((file, len)) => Ok((file, len, path)),
            Err(BlobError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                Err(BlobError::NotFound {
                    what: format!("blob {digest} in {}", self.describe()),
                    hint: Some("the layout is incomplete; copy the image into it again".to_owned()),
                })
            }
            Err(other) => Err(other),
        }
    }
}

#[async_trait]
impl ImageSource for OciLayout {
    async fn root(&self) -> Result<Document, BlobError> {
        self.document(&self.root).await
    }

    async fn manifest(&self, descriptor: &Descriptor) -> Result<Document, BlobError> {
        self.document(descriptor).await
    }

    async fn config(&self, descriptor: &Descriptor) -> Result<Document, BlobError> {
        self.document(descriptor).await
    }

    async fn blob(&self, descriptor: &Descriptor) -> Result<Arc<dyn BlobSource>, BlobError> {
        let (this, digest, size) = (self.clone(), descriptor.digest.clone(), descriptor.size);
        let is_foreign = descriptor.is_foreign();
        blocking(&self.dir, move || {
            let (_, len, path) = this.open_blob(&digest).map_err(|error| match error {
                BlobError::NotFound { what, .. } if is_foreign => BlobError::NotFound {
                    what,
                    hint: Some(
                        "it is a foreign layer, which tools that copy images leave out: put its blob there".to_owned(),
                    ),
                },
                error => error,
            })?;
            if u64::try_from(size) != Ok(len) {
                return Err(wrong_size(&path, size, len));
            }
            let blob: Arc<dyn BlobSource> = Arc::new(FileBlob::whole(path.into(), digest, len));
            Ok(blob)
        })
        .await
    }

    fn describe(&self) -> String {
        match &self.image {
            Some(image) => format!("oci:{}:{image}", self.dir.display()),
            None => format!("oci:{}", self.dir.display()),
        }
    }

    fn repository(&self) -> String {
        format!("oci:{}", self.dir.display())
    }
}

impl fmt::Debug for OciLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("OciLayout").field(&self.describe()).finish()
    }
}

fn wrong_size(path: &Path, expected: i64, actual: u64) -> BlobError {
    BlobError::Corrupt {
        what: path.display().to_string(),
        expected: format!("{expected} bytes"),
        actual: format!("{actual} bytes"),
    }
}

/// Checks that `dir` is a layout and finds the entry of `index.json`.
fn find(dir: &Path, image: Option<&str>) -> Result<Descriptor, BlobError> {
    let invalid = |name: &str, reason: String| BlobError::Invalid {
        what: dir.join(name).display().to_string(),
        reason,
    };
    let marker: LayoutFile = serde_json::from_slice(&small_file(dir, "oci-layout")?)
        .map_err(|error| invalid("oci-layout", error.to_string()))?;
    let version = &marker.image_layout_version;
    if version.split('.').next() != Some("1") {
        return Err(invalid(
            "oci-layout",
            format!("layout version `{}` is not supported: want 1.x", shown(version)),
        ));
    }
    let index = small_file(dir, "index.json")?;
    let index = ImageIndex::parse(&index).map_err(|error| invalid("index.json", error.to_string()))?;
    select::select(&index.manifests, image, dir).cloned()
}

fn small_file(dir: &Path, name: &str) -> Result<bytes::Bytes, BlobError> {
    let path = dir.join(name);
    let (file, len) = open_regular(&path).map_err(|error| match error {
        BlobError::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => BlobError::NotFound {
            what: path.display().to_string(),
            hint: Some("an OCI layout is a directory with `oci-layout`, `index.json` and `blobs`".to_owned()),
        },
        other => other,
    })?;
    if len > MAX_DOCUMENT as u64 {
        return Err(BlobError::Invalid {
            what: path.display().to_string(),
            reason: format!("it has {len} bytes, more than the {MAX_DOCUMENT} allowed"),
        });
    }
    read_piece(&file, &path, 0, len)
}
