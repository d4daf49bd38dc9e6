//! OCI image layouts: a directory with `oci-layout`, `index.json` and `blobs/<algorithm>/<hex>` (image-spec
//! image-layout.md), or a tar of such a directory, whose blobs are read in place.
//!
//! `index.json` may hold several images; [`OciLayout::open`] describes how to name one. The path of a blob is made of
//! a parsed digest, so it cannot leave `blobs/`. The blob itself may be a link to anywhere. That is safe, because
//! documents are checked against their digest, and the decoder of a layer checks the layer. A blob may be missing
//! until a caller requests it.

mod files;
mod select;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use serde::Deserialize;

use self::files::{LayoutFile, LayoutFiles};
use crate::blob::file::blocking;
use crate::blob::{BlobError, BlobSource, Document, ImageSource};
use crate::oci::{Descriptor, Digest, ImageIndex, MAX_DOCUMENT, shown};

/// One image of an OCI layout.
#[derive(Clone)]
pub struct OciLayout {
    files: LayoutFiles,
    image: Option<String>,
    root: Descriptor,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct LayoutMarker {
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
        Self::find(Arc::clone(&dir), image, move || Ok(LayoutFiles::Directory(dir))).await
    }

    /// Opens the image called `image` in the layout that the tar `file` holds, as [`OciLayout::open`] does.
    ///
    /// Reads every header of the tar. A tar that is compressed as a whole (gzip or zstd) is unpacked into the directory
    /// for temporary files. A tar that unpacks to far more than images do is refused.
    pub async fn open_archive(file: impl Into<PathBuf>, image: Option<&str>) -> Result<Self, BlobError> {
        let file: Arc<Path> = file.into().into();
        Self::find(Arc::clone(&file), image, move || LayoutFiles::of_archive(file)).await
    }

    async fn find(
        path: Arc<Path>,
        image: Option<&str>,
        open: impl FnOnce() -> Result<LayoutFiles, BlobError> + Send + 'static,
    ) -> Result<Self, BlobError> {
        let image = image.map(str::to_owned);
        let finding = blocking(&path, move || {
            let files = open()?;
            let root = find(&files, image.as_deref())?;
            Ok(Self { files, image, root })
        });
        finding.await
    }

    async fn document(&self, descriptor: &Descriptor) -> Result<Document, BlobError> {
        let (this, digest, size) = (self.clone(), descriptor.digest.clone(), descriptor.size);
        let bytes = blocking(self.files.path(), move || {
            let file = this.open_blob(&digest)?;
            let bytes = file.read(MAX_DOCUMENT)?;
            // Hand-made indexes give the size -1 or 0. Such a size is ignored, because the digest is checked below.
            if size > 0 && size.unsigned_abs() != file.len {
                return Err(wrong_size(&file, size));
            }
            digest.verify(&bytes).map_err(|actual| BlobError::Corrupt {
                what: file.to_string(),
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

    fn open_blob(&self, digest: &Digest) -> Result<LayoutFile, BlobError> {
        let name = format!("blobs/{}/{}", digest.algorithm().name(), digest.hex());
        self.files.open(&name)?.ok_or_else(|| BlobError::NotFound {
            what: format!("blob {digest} in {}", self.describe()),
            hint: Some("the layout is incomplete; copy the image into it again".to_owned()),
        })
    }

    fn transport(&self) -> &'static str {
        match self.files {
            LayoutFiles::Directory(_) => "oci",
            LayoutFiles::Archive(_) => "oci-archive",
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
        blocking(self.files.path(), move || {
            let file = this.open_blob(&digest).map_err(|error| match error {
                BlobError::NotFound { what, .. } if is_foreign => BlobError::NotFound {
                    what,
                    hint: Some(
                        "it is a foreign layer, which tools that copy images leave out: put its blob there".to_owned(),
                    ),
                },
                error => error,
            })?;
            if u64::try_from(size) != Ok(file.len) {
                return Err(wrong_size(&file, size));
            }
            let blob: Arc<dyn BlobSource> = Arc::new(file.into_blob(digest));
            Ok(blob)
        })
        .await
    }

    fn describe(&self) -> String {
        match &self.image {
            Some(image) => format!("{}:{image}", self.repository()),
            None => self.repository(),
        }
    }

    fn repository(&self) -> String {
        format!("{}:{}", self.transport(), self.files.path().display())
    }
}

impl fmt::Debug for OciLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("OciLayout").field(&self.describe()).finish()
    }
}

fn wrong_size(file: &LayoutFile, expected: i64) -> BlobError {
    BlobError::Corrupt {
        what: file.to_string(),
        expected: format!("{expected} bytes"),
        actual: format!("{} bytes", file.len),
    }
}

/// Checks that the files are those of a layout and finds the entry of `index.json`.
fn find(files: &LayoutFiles, image: Option<&str>) -> Result<Descriptor, BlobError> {
    let invalid = |file: &LayoutFile, reason: String| BlobError::Invalid {
        what: file.to_string(),
        reason,
    };
    let file = small_file(files, "oci-layout")?;
    let marker: LayoutMarker =
        serde_json::from_slice(&file.read(MAX_DOCUMENT)?).map_err(|error| invalid(&file, error.to_string()))?;
    let version = &marker.image_layout_version;
    if version.split('.').next() != Some("1") {
        return Err(invalid(
            &file,
            format!("layout version `{}` is not supported: want 1.x", shown(version)),
        ));
    }
    let file = small_file(files, "index.json")?;
    let index = ImageIndex::parse(&file.read(MAX_DOCUMENT)?).map_err(|error| invalid(&file, error.to_string()))?;
    select::select(&index.manifests, image, files.path()).cloned()
}

fn small_file(files: &LayoutFiles, name: &str) -> Result<LayoutFile, BlobError> {
    files.open(name)?.ok_or_else(|| BlobError::NotFound {
        what: files.shown(name),
        hint: Some(files.hint()),
    })
}
