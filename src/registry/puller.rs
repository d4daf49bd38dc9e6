//! A pull API for programs that embed this crate: five operations on repositories of one registry, typed by
//! `oci_spec`.
//!
//! ```
//! # // A registry with one image, so that the example runs.
//! # use std::io::{BufRead, BufReader, Write};
//! # fn serve() -> std::io::Result<String> {
//! #     let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
//! #     let host = listener.local_addr()?.to_string();
//! #     let config = r#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}"#;
//! #     let digest = ocifs::oci::Digest::of(config.as_bytes());
//! #     let manifest = format!(r#"{{"schemaVersion":2,"config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{digest}","size":{}}},"layers":[]}}"#, config.len());
//! #     let answer = move |mut stream: std::net::TcpStream| -> std::io::Result<()> {
//! #         let mut lines = BufReader::new(stream.try_clone()?).lines();
//! #         let Some(target) = lines.next().transpose()? else { return Ok(()) };
//! #         while lines.next().transpose()?.is_some_and(|header| !header.is_empty()) {}
//! #         let body = if target.contains("/manifests/") { manifest.as_str() } else { config };
//! #         write!(stream, "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}", body.len())
//! #     };
//! #     // A client may open a connection that it closes unused: that is the end of this connection, not of the server.
//! #     std::thread::spawn(move || for stream in listener.incoming().flatten() {
//! #         let answer = answer.clone();
//! #         std::thread::spawn(move || answer(stream).unwrap_or_else(|error| eprintln!("{error}")));
//! #     });
//! #     Ok(host)
//! # }
//! use futures::TryStreamExt as _;
//! use ocifs::oci::ReferenceSelector;
//! use ocifs::registry::{Puller, RegistryClient, RegistryConfig};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let host = serve()?;
//! let client = RegistryClient::new(RegistryConfig::default())?;
//! let puller = Puller::new(client, &host);
//! let manifest = puller.fetch_manifest("org/app", ReferenceSelector::tag("latest")).await?;
//! let config: ocifs::oci::Digest = manifest.config().digest().to_string().parse()?;
//! let stream = puller.fetch_image_blob("org/app", &config, 1..15).await?;
//! let bytes = stream.try_collect::<Vec<_>>().await?.concat();
//! assert_eq!(bytes, br#""architecture""#);
//! # Ok(())
//! # }
//! ```

mod layout;

use std::ops::{Bound, RangeBounds};
use std::path::Path;
use std::sync::Arc;

use oci_spec::image::{ImageConfiguration, ImageIndex, ImageManifest};

use super::blob::{ReadKind, RegistryBlob};
use super::client::RegistryClient;
use super::elsewhere::Elsewhere;
use crate::blob::{BlobError, BlobSource, ByteStream, Document, ImageSource};
use crate::oci::media_type::OCI_MANIFEST;
use crate::oci::{Digest, DocumentError, DocumentKind, Manifest as OwnManifest, Platform, ReferenceSelector, classify};
use crate::resolve::{ResolvedImage, resolve_root};

/// Pulls images from one registry.
#[derive(Debug, Clone)]
pub struct Puller {
    client: RegistryClient,
    registry: String,
    platform: Platform,
}

/// A pulled image with its verified documents. Its blobs are in the directory that the image was pulled into.
#[derive(Debug, Clone)]
pub struct PulledImage {
    /// Digest of the manifest.
    pub digest: Digest,
    /// The manifest as received.
    pub manifest_bytes: bytes::Bytes,
    /// The manifest, parsed.
    pub manifest: ImageManifest,
    /// The config, parsed.
    pub config: ImageConfiguration,
}

impl Puller {
    /// Makes a puller for images of this machine's platform. `registry` is a host as in references, such as
    /// `docker.io`.
    pub fn new(client: RegistryClient, registry: &str) -> Self {
        Self {
            client,
            registry: registry.to_owned(),
            platform: Platform::host(),
        }
    }

    /// Sets another platform to pick from image indexes.
    pub fn with_platform(mut self, platform: Platform) -> Self {
        self.platform = platform;
        self
    }

    /// Fetches the image index of a reference. If the reference names a manifest, returns an index with that manifest
    /// as its only entry.
    pub async fn fetch_index(
        &self,
        repository: &str,
        selector: impl Into<ReferenceSelector>,
    ) -> Result<ImageIndex, BlobError> {
        let document = self.root(repository, selector.into()).await?;
        if kind(&document)? == DocumentKind::ImageIndex {
            return parse(&document, "image index");
        }
        let index = serde_json::json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [{"mediaType": manifest_type(&known(&document)?), "digest": document.digest, "size": document.bytes.len()}],
        });
        serde_json::from_value(index).map_err(|error| invalid("image index", &error))
    }

    /// Fetches the manifest of a reference. From an image index, fetches the manifest for the platform.
    pub async fn fetch_manifest(
        &self,
        repository: &str,
        selector: impl Into<ReferenceSelector>,
    ) -> Result<ImageManifest, BlobError> {
        parse(&self.manifest(repository, selector.into()).await?, "manifest")
    }

    /// Fetches the config of an image. A tag selects the config of the tagged image. A digest selects the config blob
    /// with that digest.
    pub async fn fetch_config(
        &self,
        repository: &str,
        selector: impl Into<ReferenceSelector>,
    ) -> Result<ImageConfiguration, BlobError> {
        let digest = match selector.into() {
            ReferenceSelector::Digest(digest) => digest,
            tagged => {
                let image = self.image(&self.source(repository, tagged)?).await?;
                return parse(&image.config_document, "config");
            }
        };
        let target = self.client.places(&self.registry, repository, true)?;
        parse(&self.client.small_blob(&target, &digest).await?, "config")
    }

    /// Reads bytes of a blob. The range may be open. A range that ends past the blob is cut at the blob's end. An
    /// empty range gives an empty stream.
    ///
    /// The digest alone does not tell the size. This method therefore sends one more request, for one byte, than a
    /// [`RegistryBlob`] made from a descriptor.
    pub async fn fetch_image_blob(
        &self,
        repository: &str,
        digest: &Digest,
        range: impl RangeBounds<u64> + Send,
    ) -> Result<ByteStream, BlobError> {
        let bounds = (range.start_bound().cloned(), range.end_bound().cloned());
        let target = Arc::new(self.client.places(&self.registry, repository, true)?);
        let size = RegistryBlob::find_size(&self.client, &target, digest).await?;
        let range = normalise(bounds, size);
        RegistryBlob::new(
            self.client.clone(),
            target,
            digest.clone(),
            size,
            None,
            ReadKind::Unchecked,
            Elsewhere::default(),
        )
        .read(range)
        .await
    }

    /// Pulls an image into `directory`, which then is an OCI image layout.
    ///
    /// A blob gets its name in the directory only after it is verified against its digest. A named blob is therefore
    /// complete. Layers that are already there are not fetched again. `index.json` is replaced and names only this
    /// image.
    pub async fn pull_image(
        &self,
        repository: &str,
        selector: impl Into<ReferenceSelector>,
        directory: &Path,
    ) -> Result<PulledImage, BlobError> {
        let source = self.source(repository, selector.into())?;
        let image = self.image(&source).await?;
        let pulled = PulledImage {
            digest: image.manifest_document.digest.clone(),
            manifest_bytes: image.manifest_document.bytes.clone(),
            manifest: parse(&image.manifest_document, "manifest")?,
            config: parse(&image.config_document, "config")?,
        };
        layout::write(&source, &image, directory).await?;
        Ok(pulled)
    }

    fn source(&self, repository: &str, selector: ReferenceSelector) -> Result<super::RegistrySource, BlobError> {
        self.client.source(&self.registry, repository, selector)
    }

    /// Fetches manifest and config, through image indexes if the source names one. A manifest that the source names
    /// itself may be for any platform.
    async fn image(&self, source: &super::RegistrySource) -> Result<ResolvedImage, BlobError> {
        let root = source.root().await?;
        let wanted = match kind(&root)? {
            DocumentKind::Manifest => None,
            DocumentKind::ImageIndex => Some(&self.platform),
        };
        resolve_root(source, root, wanted).await
    }

    async fn root(&self, repository: &str, selector: ReferenceSelector) -> Result<Document, BlobError> {
        self.source(repository, selector)?.root().await
    }

    /// Fetches the manifest document, through image indexes if the reference names one.
    async fn manifest(&self, repository: &str, selector: ReferenceSelector) -> Result<Document, BlobError> {
        let source = self.source(repository, selector)?;
        let root = source.root().await?;
        match kind(&root)? {
            DocumentKind::Manifest => Ok(root),
            DocumentKind::ImageIndex => {
                let image = resolve_root(&source, root, Some(&self.platform)).await?;
                Ok(image.manifest_document)
            }
        }
    }
}

fn kind(document: &Document) -> Result<DocumentKind, BlobError> {
    classify(&document.media_type, &document.bytes).map_err(|error| unusable(document, error))
}

/// Parses a manifest into this crate's own type, for its descriptors.
fn known(document: &Document) -> Result<OwnManifest, BlobError> {
    OwnManifest::parse(&document.bytes).map_err(|error| unusable(document, error))
}

/// Returns the media type to list a manifest under. Only an OCI manifest may leave its media type out.
fn manifest_type(manifest: &OwnManifest) -> &str {
    match manifest.media_type.as_str() {
        "" => OCI_MANIFEST,
        stated => stated,
    }
}

fn unusable(document: &Document, error: DocumentError) -> BlobError {
    let what = format!("document {}", document.digest);
    match error {
        DocumentError::Refused(refusal) => BlobError::Unsupported {
            what,
            reason: refusal.to_string(),
        },
        other => BlobError::Invalid {
            what,
            reason: other.to_string(),
        },
    }
}

/// Turns range bounds into a half-open range within a blob of `size` bytes.
fn normalise((start, end): (Bound<u64>, Bound<u64>), size: u64) -> std::ops::Range<u64> {
    let start = match start {
        Bound::Included(start) => start,
        Bound::Excluded(before) => before.saturating_add(1),
        Bound::Unbounded => 0,
    };
    let end = match end {
        Bound::Included(last) => last.saturating_add(1),
        Bound::Excluded(end) => end,
        Bound::Unbounded => size,
    };
    let end = end.min(size);
    start.min(end)..end
}

fn parse<T: serde::de::DeserializeOwned>(document: &Document, kind: &str) -> Result<T, BlobError> {
    serde_json::from_slice(&document.bytes).map_err(|error| invalid(&format!("{kind} {}", document.digest), &error))
}

fn invalid(what: &str, error: &serde_json::Error) -> BlobError {
    BlobError::Invalid {
        what: what.to_owned(),
        reason: error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn bounds_of_every_kind() {
        let of = |range: (Bound<u64>, Bound<u64>)| normalise(range, 10);
        assert_eq!(of((Bound::Unbounded, Bound::Unbounded)), 0..10);
        assert_eq!(of((Bound::Included(3), Bound::Excluded(3))), 3..3);
        assert_eq!(of((Bound::Included(3), Bound::Included(u64::MAX))), 3..10);
        assert_eq!(of((Bound::Unbounded, Bound::Excluded(0))), 0..0);
        assert_eq!(of((Bound::Included(11), Bound::Unbounded)), 10..10);
        assert_eq!(of((Bound::Excluded(u64::MAX), Bound::Unbounded)), 10..10);
    }

    proptest! {
        #[test]
        fn normalised_ranges_lie_in_the_blob(start: u64, end: u64, size: u64) {
            let range = normalise((Bound::Included(start), Bound::Excluded(end)), size);
            prop_assert!(range.start <= range.end && range.end <= size);
        }
    }
}
