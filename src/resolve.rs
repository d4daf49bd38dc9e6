//! From an image source to one image: root document, platform choice, manifest, config.
//!
//! ```text
//! root --+-- manifest ----------------------------------+
//!        +-- image index -- choose by platform --+-- manifest -- config
//!                 ^---------- nested index ------+
//! ```
//! Each document in the diagram costs one round trip. Index entries without a platform cost more, because the
//! resolver has to look into them. The result is an image that ocifs can mount, or the reason why it cannot.

use std::collections::HashSet;

use crate::blob::{BlobError, Document, ImageSource};
use crate::oci::platform::{choose, has_platform, runs};
use crate::oci::{
    Descriptor, DiffId, Digest, DocumentError, DocumentKind, ImageConfig, ImageIndex, Manifest, Platform,
    PlatformError, classify, is_companion,
};

/// Deepest nesting of image indexes that is followed. Tools write one level, or two when an index is copied into a
/// layout.
const MAX_INDEX_DEPTH: usize = 4;
/// Most entries without a platform that the resolver looks into in one index. In a whole search it looks into at most
/// [`MAX_INDEX_DEPTH`] times as many. Each entry costs round trips, and real indexes have one or two.
const MAX_LOOKED_INTO: usize = 16;

/// One image for one platform, with all documents it is made of. The documents' bytes hash to their digests.
#[derive(Debug, Clone)]
pub struct ResolvedImage {
    /// The image index that the reference named, if it did not name a manifest. Its entries also list companions of
    /// the manifest, such as SOCI indexes.
    pub index: Option<Document>,
    /// The manifest as received.
    pub manifest_document: Document,
    /// The manifest, parsed.
    pub manifest: Manifest,
    /// The config as received.
    pub config_document: Document,
    /// The config, parsed.
    pub config: ImageConfig,
}

impl ResolvedImage {
    /// Returns the layers, lowest first.
    pub fn layers(&self) -> &[Descriptor] {
        &self.manifest.layers
    }

    /// Returns the diffIDs of [`ResolvedImage::layers`], as many of them and in the same order.
    pub fn diff_ids(&self) -> &[DiffId] {
        &self.config.rootfs.diff_ids
    }

    /// Returns the image of the lowest `count` layers of this image. Its documents are made from this image's. They are
    /// the same on every host, and no source has them. Returns the image itself if it has exactly `count` layers, and
    /// `None` if it has fewer or if `count` is 0.
    pub fn lowest(self, count: usize) -> Option<Self> {
        let layers = self.manifest.layers.len();
        if count == 0 || count > layers {
            return None;
        }
        if count == layers {
            return Some(self);
        }
        let (mut manifest, mut config) = (self.manifest, self.config);
        manifest.layers.truncate(count);
        config.rootfs.diff_ids.truncate(count);
        let document = |bytes: Vec<u8>, media_type: String| Document {
            digest: Digest::of(&bytes),
            bytes: bytes.into(),
            media_type,
        };
        let config_document = document(json(&config), self.config_document.media_type);
        manifest.config.digest = config_document.digest.clone();
        manifest.config.size = i64::try_from(config_document.bytes.len()).unwrap_or(i64::MAX);
        manifest.config.data = None;
        let manifest_document = document(json(&manifest), self.manifest_document.media_type);
        Some(Self {
            index: None,
            manifest_document,
            manifest,
            config_document,
            config,
        })
    }
}

/// Finds the image that `source` names for the platform `wanted`, or for the host's platform if that is `None`.
///
/// Images often state a wrong platform. If the caller names no platform and there is only one image, a mismatch is
/// therefore only a warning in the log.
///
/// # Errors
/// - [`BlobError::NotFound`] if no image fits. The error lists the platforms that exist.
/// - [`BlobError::Unsupported`] if the documents are no mountable image.
/// - [`BlobError::Invalid`] if documents contradict themselves.
pub async fn resolve(source: &dyn ImageSource, wanted: Option<&Platform>) -> Result<ResolvedImage, BlobError> {
    resolve_root(source, source.root().await?, wanted).await
}

/// Finds the image as [`resolve`] does, but begins with a root document that `source` has already given.
pub async fn resolve_root(
    source: &dyn ImageSource,
    root: Document,
    wanted: Option<&Platform>,
) -> Result<ResolvedImage, BlobError> {
    let resolver = Resolver {
        source,
        is_explicit: wanted.is_some(),
        wanted: wanted.map_or_else(Platform::host, Platform::normalized),
    };
    match resolver.kind(&root)? {
        DocumentKind::Manifest => {
            let image = resolver.image(root).await?;
            resolver.check_platform(&image)?;
            Ok(image)
        }
        DocumentKind::ImageIndex => {
            let mut image = resolver.index(&root).await?;
            image.index = Some(root);
            Ok(image)
        }
    }
}

struct Resolver<'a> {
    source: &'a dyn ImageSource,
    wanted: Platform,
    /// Whether the caller named the platform. Otherwise it is the host's.
    is_explicit: bool,
}

impl Resolver<'_> {
    /// Returns the name of a document in errors.
    fn what(&self, noun: &str, document: &Document) -> String {
        format!("{noun} {} of {}", document.digest, self.source.describe())
    }

    fn unusable(&self, noun: &str, document: &Document, error: DocumentError) -> BlobError {
        let what = self.what(noun, document);
        let reason = error.to_string();
        match error {
            DocumentError::Refused(_) => BlobError::Unsupported { what, reason },
            _ => BlobError::Invalid { what, reason },
        }
    }

    fn kind(&self, document: &Document) -> Result<DocumentKind, BlobError> {
        classify(&document.media_type, &document.bytes).map_err(|e| self.unusable("document", document, e))
    }

    /// Searches the root index and the indexes nested in it, depth first.
    async fn index(&self, root: &Document) -> Result<ResolvedImage, BlobError> {
        let invalid = |reason: String| BlobError::Invalid {
            what: self.what("image index", root),
            reason,
        };
        let mut search = Search::default();
        // Indexes to search, the next one last. Each comes with the digests of the indexes that it is nested in.
        let mut todo = vec![(root.clone(), Vec::new())];
        let mut failure = None;
        while let Some((document, mut above)) = todo.pop() {
            if above.contains(&document.digest) {
                failure.get_or_insert_with(|| invalid("its indexes lead in a circle".to_owned()));
                continue;
            }
            if above.len() == MAX_INDEX_DEPTH {
                let reason = format!("its indexes are nested more than {MAX_INDEX_DEPTH} deep");
                failure.get_or_insert_with(|| invalid(reason));
                continue;
            }
            if !search.visited.insert(document.digest.clone()) {
                continue;
            }
            let index = ImageIndex::parse(&document.bytes).map_err(|e| self.unusable("image index", &document, e))?;
            above.push(document.digest.clone());
            match self.pick(&index, &mut search).await? {
                Picked::Image(image) => return Ok(*image),
                Picked::Indexes(nested) => todo.extend(nested.into_iter().rev().map(|next| (next, above.clone()))),
            }
        }
        let no_match = PlatformError::NoMatch {
            wanted: Box::new(self.wanted.clone()),
            available: search.available,
        };
        Err(failure.unwrap_or_else(|| BlobError::NotFound {
            what: self.what("image in index", root),
            hint: Some(no_match.to_string()),
        }))
    }

    /// Returns the image that an index has for the wanted platform, or the indexes to search next.
    async fn pick(&self, index: &ImageIndex, search: &mut Search) -> Result<Picked, BlobError> {
        match choose(&index.manifests, &self.wanted) {
            Ok(entry) => return self.follow(entry).await,
            Err(PlatformError::NoMatch { available, .. }) => search.offered(available),
            Err(_) => {}
        }
        let images = || index.manifests.iter().filter(|entry| !is_companion(entry));
        let only_one = images().nth(1).is_none();
        let (mut seen, mut nested) = (Vec::new(), Vec::new());
        for entry in images().filter(|e| has_platform(e).is_none()).take(MAX_LOOKED_INTO) {
            if search.looked_into == MAX_LOOKED_INTO * MAX_INDEX_DEPTH {
                break;
            }
            search.looked_into += 1;
            let followed = match self.follow(entry).await {
                // Indexes also list entries that are no images.
                Err(BlobError::Unsupported { reason, .. }) if !only_one => {
                    tracing::debug!(digest = %entry.digest, reason, "passed over an image index entry");
                    continue;
                }
                other => other?,
            };
            match followed {
                Picked::Image(image) if only_one => {
                    self.check_platform(&image)?;
                    return Ok(Picked::Image(image));
                }
                Picked::Image(image) => seen.push(*image),
                Picked::Indexes(indexes) => nested.extend(indexes),
            }
        }
        // An image of this index is preferred to images of nested indexes.
        Ok(match self.best(seen, search) {
            Some(image) => Picked::Image(Box::new(image)),
            None => Picked::Indexes(nested),
        })
    }

    /// Returns the best of the images whose platform is known only from their config.
    fn best(&self, mut seen: Vec<ResolvedImage>, search: &mut Search) -> Option<ResolvedImage> {
        let entries: Vec<Descriptor> = seen.iter().map(described).collect();
        if let Ok(entry) = choose(&entries, &self.wanted)
            && let Some(position) = entries.iter().position(|e| std::ptr::eq(e, entry))
        {
            return Some(seen.swap_remove(position));
        }
        search.offered(seen.iter().map(|image| image.config.platform().normalized()));
        None
    }

    /// Fetches what an entry names: a whole image, or a nested index.
    async fn follow(&self, entry: &Descriptor) -> Result<Picked, BlobError> {
        let document = match embedded(entry) {
            Some(document) => document,
            None => self.source.manifest(entry).await?,
        };
        match self.kind(&document)? {
            DocumentKind::Manifest => Ok(Picked::Image(Box::new(self.image(document).await?))),
            DocumentKind::ImageIndex => Ok(Picked::Indexes(vec![document])),
        }
    }

    async fn image(&self, manifest_document: Document) -> Result<ResolvedImage, BlobError> {
        let unusable = |error| self.unusable("manifest", &manifest_document, error);
        let manifest = Manifest::parse(&manifest_document.bytes).map_err(unusable)?;
        if let Some(refusal) = manifest.refusal() {
            return Err(unusable(refusal.into()));
        }
        let config_document = match embedded(&manifest.config) {
            Some(document) => document,
            None => self.source.config(&manifest.config).await?,
        };
        let config = ImageConfig::parse(&config_document.bytes).map_err(|error| {
            let refusal = manifest.refusal_without_config();
            refusal.map_or_else(
                || self.unusable("config", &config_document, error),
                |refusal| unusable(refusal.into()),
            )
        })?;
        config.check(&manifest).map_err(unusable)?;
        Ok(ResolvedImage {
            index: None,
            manifest_document,
            manifest,
            config_document,
            config,
        })
    }

    /// Checks the platform that the only image states.
    fn check_platform(&self, image: &ResolvedImage) -> Result<(), BlobError> {
        let platform = image.config.platform();
        if platform.architecture.is_empty() || runs(&self.wanted, &platform) {
            return Ok(());
        }
        if self.is_explicit {
            let wanted = &self.wanted;
            return Err(BlobError::NotFound {
                what: format!("image for {wanted} in {}", self.source.describe()),
                hint: Some(format!("there is only one, for {}", platform.normalized())),
            });
        }
        tracing::warn!(
            image = %self.source.describe(), is = %platform, wanted = %self.wanted,
            "the image says it is for another platform"
        );
        Ok(())
    }
}

enum Picked {
    Image(Box<ResolvedImage>),
    /// Nested indexes, in the order to search them.
    Indexes(Vec<Document>),
}

/// The state of a search through nested indexes.
#[derive(Default)]
struct Search {
    visited: HashSet<Digest>,
    /// Entries without a platform that the search has looked into.
    looked_into: usize,
    /// Platforms found so far, in order, without repeats.
    available: Vec<Platform>,
}

impl Search {
    fn offered(&mut self, platforms: impl IntoIterator<Item = Platform>) {
        for platform in platforms {
            if !self.available.contains(&platform) {
                self.available.push(platform);
            }
        }
    }
}

/// Writes a document.
fn json(document: &impl serde::Serialize) -> Vec<u8> {
    serde_json::to_vec(document).expect("a document has only strings, numbers and lists")
}

/// Makes the index entry that the image would have if the index stated its platform.
fn described(image: &ResolvedImage) -> Descriptor {
    Descriptor {
        media_type: image.manifest_document.media_type.clone(),
        digest: image.manifest_document.digest.clone(),
        size: -1,
        urls: Vec::new(),
        annotations: Default::default(),
        data: None,
        artifact_type: None,
        platform: Some(image.config.platform()),
    }
}

/// Returns the document embedded in a descriptor, which saves a request.
fn embedded(descriptor: &Descriptor) -> Option<Document> {
    Some(Document {
        media_type: descriptor.media_type.clone(),
        digest: descriptor.digest.clone(),
        bytes: descriptor.embedded()?.into(),
    })
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::{Arc, Mutex};

    use async_trait::async_trait;
    use base64::Engine as _;
    use bytes::Bytes;

    use super::*;
    use crate::blob::BlobSource;
    use crate::oci::media_type::{OCI_CONFIG, OCI_INDEX, OCI_LAYER_GZIP, OCI_MANIFEST};

    /// Documents in memory, and the requests made for them.
    #[derive(Debug, Default)]
    struct Memory {
        documents: HashMap<Digest, Document>,
        root: Option<Digest>,
        requests: Mutex<Vec<&'static str>>,
    }

    impl Memory {
        fn add(&mut self, media_type: &str, body: &str) -> Digest {
            let bytes = Bytes::from(body.to_owned());
            let digest = Digest::of(&bytes);
            let document = Document {
                media_type: media_type.to_owned(),
                digest: digest.clone(),
                bytes,
            };
            self.documents.insert(digest.clone(), document);
            digest
        }

        /// Adds an image of one layer. `name` makes it different from other images.
        fn add_image(&mut self, platform: &str, name: &str) -> Digest {
            let (os, architecture) = platform.split_once('/').unwrap();
            let diff_id = Digest::of(name.as_bytes());
            let config = format!(
                r#"{{"os":"{os}","architecture":"{architecture}","rootfs":{{"type":"layers","diff_ids":["{diff_id}"]}}}}"#
            );
            let config = self.add(OCI_CONFIG, &config);
            self.add_manifest(OCI_CONFIG, &config, OCI_LAYER_GZIP)
        }

        fn add_manifest(&mut self, config_type: &str, config: &Digest, layer_type: &str) -> Digest {
            let layer = Digest::of(b"layer");
            let manifest = format!(
                r#"{{"schemaVersion":2,"config":{{"mediaType":"{config_type}","digest":"{config}","size":-1}},
                "layers":[{{"mediaType":"{layer_type}","digest":"{layer}","size":5}}]}}"#
            );
            self.add(OCI_MANIFEST, &manifest)
        }

        fn add_index(&mut self, entries: &[(&Digest, &str)]) -> Digest {
            let entry = |(digest, more): &(&Digest, &str)| {
                let media_type = &self.documents[*digest].media_type;
                format!(r#"{{"mediaType":"{media_type}","digest":"{digest}","size":-1{more}}}"#)
            };
            let entries: Vec<String> = entries.iter().map(entry).collect();
            self.add(
                OCI_INDEX,
                &format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, entries.join(",")),
            )
        }

        fn get(&self, request: &'static str, digest: &Digest) -> Result<Document, BlobError> {
            self.requests.lock().unwrap().push(request);
            self.documents.get(digest).cloned().ok_or_else(|| BlobError::NotFound {
                what: digest.to_string(),
                hint: None,
            })
        }

        async fn resolve(&mut self, root: &Digest, wanted: &str) -> Result<ResolvedImage, String> {
            self.root = Some(root.clone());
            self.requests.lock().unwrap().clear();
            resolve(self, Some(&wanted.parse().unwrap()))
                .await
                .map_err(|error| error.to_string())
        }

        fn requests(&self) -> String {
            self.requests.lock().unwrap().join(" ")
        }
    }

    #[async_trait]
    impl ImageSource for Memory {
        async fn root(&self) -> Result<Document, BlobError> {
            self.get("root", self.root.as_ref().unwrap())
        }

        async fn manifest(&self, descriptor: &Descriptor) -> Result<Document, BlobError> {
            self.get("manifest", &descriptor.digest)
        }

        async fn config(&self, descriptor: &Descriptor) -> Result<Document, BlobError> {
            self.get("config", &descriptor.digest)
        }

        async fn blob(&self, _: &Descriptor) -> Result<Arc<dyn BlobSource>, BlobError> {
            unreachable!("resolving reads no layer")
        }

        fn describe(&self) -> String {
            "memory".into()
        }
    }

    const AMD64: &str = r#","platform":{"os":"linux","architecture":"amd64"}"#;
    const ARM64: &str = r#","platform":{"os":"linux","architecture":"arm64"}"#;

    #[tokio::test]
    async fn an_index_costs_three_round_trips_and_a_manifest_two() {
        let mut memory = Memory::default();
        let (amd64, arm64) = (
            memory.add_image("linux/amd64", "a"),
            memory.add_image("linux/arm64", "b"),
        );
        let root = memory.add_index(&[(&amd64, AMD64), (&arm64, ARM64)]);

        let image = memory.resolve(&root, "arm64").await.unwrap();
        assert_eq!(image.manifest_document.digest, arm64);
        assert_eq!(image.index.as_ref().unwrap().digest, root);
        assert_eq!((image.layers().len(), image.diff_ids().len()), (1, 1));
        assert_eq!(image.diff_ids()[0].0, Digest::of(b"b"));
        assert_eq!(memory.requests(), "root manifest config");

        let image = memory.resolve(&amd64, "amd64").await.unwrap();
        assert!(image.index.is_none());
        assert_eq!(memory.requests(), "root config");
    }

    #[tokio::test]
    async fn the_only_image_is_taken_unless_somebody_wants_another_platform() {
        let mut memory = Memory::default();
        let only = memory.add_image("linux/s390x", "a");
        let index = memory.add_index(&[(&only, "")]);
        for root in [&only, &index] {
            memory.root = Some(root.clone());
            let image = resolve(&memory, None).await.unwrap();
            assert_eq!(image.manifest_document.digest, only);
            assert!(memory.resolve(root, "s390x").await.is_ok());
            let error = memory.resolve(root, "s309x").await.unwrap_err();
            assert_eq!(
                error,
                "image for linux/s309x in memory not found: there is only one, for linux/s390x"
            );
        }
    }

    #[tokio::test]
    async fn the_lowest_layers_are_an_image_of_their_own() {
        let mut memory = Memory::default();
        let diff_id = |digit: &str| format!("sha256:{}", digit.repeat(64));
        let text = format!(
            r#"{{"os":"linux","rootfs":{{"diff_ids":["{}","{}"]}},"history":[{{"created_by":"x"}}]}}"#,
            diff_id("1"),
            diff_id("2")
        );
        let config = memory.add(OCI_CONFIG, &text);
        let layer = |digit: &str| {
            format!(
                r#"{{"mediaType":"{OCI_LAYER_GZIP}","digest":"{}","size":1}}"#,
                diff_id(digit)
            )
        };
        let text = format!(
            r#"{{"config":{{"mediaType":"{OCI_CONFIG}","digest":"{config}","size":{}}},"layers":[{},{}]}}"#,
            text.len(),
            layer("3"),
            layer("4")
        );
        let root = memory.add(OCI_MANIFEST, &text);
        let whole = memory.resolve(&root, "amd64").await.unwrap();
        assert!(whole.clone().lowest(0).is_none() && whole.clone().lowest(3).is_none());
        let both = whole.clone().lowest(2).unwrap();
        assert_eq!(both.manifest_document.digest, root);
        let base = whole.clone().lowest(1).unwrap();
        assert_eq!(base.layers(), &whole.layers()[..1]);
        assert_eq!(base.diff_ids(), &whole.diff_ids()[..1]);
        assert_eq!(base.config.os, "linux");
        // The documents belong together as those of any image do.
        assert_eq!(base.manifest_document.digest, Digest::of(&base.manifest_document.bytes));
        assert_eq!(base.manifest.config.digest, Digest::of(&base.config_document.bytes));
        assert_eq!(
            base.manifest_document.digest,
            whole.lowest(1).unwrap().manifest_document.digest
        );
    }

    #[tokio::test]
    async fn embedded_documents_save_round_trips_if_they_are_intact() {
        let mut memory = Memory::default();
        let amd64 = memory.add_image("linux/amd64", "a");
        let body = memory.documents[&amd64].bytes.clone();
        let data = base64::engine::general_purpose::STANDARD.encode(&body);
        for (size, requests) in [(body.len(), "root config"), (body.len() + 1, "root manifest config")] {
            let text = format!(
                r#"{{"manifests":[{{"mediaType":"{OCI_MANIFEST}","digest":"{amd64}","size":{size},"data":"{data}"{AMD64}}}]}}"#
            );
            let root = memory.add(OCI_INDEX, &text);
            assert_eq!(
                memory.resolve(&root, "amd64").await.unwrap().manifest_document.digest,
                amd64
            );
            assert_eq!(memory.requests(), requests);
        }
    }

    #[tokio::test]
    async fn entries_without_a_platform_are_looked_into() {
        let mut memory = Memory::default();
        let (amd64, arm64) = (
            memory.add_image("linux/amd64", "a"),
            memory.add_image("linux/arm64", "b"),
        );
        let config = memory.add(OCI_CONFIG, "{}");
        let chart = memory.add_manifest("application/vnd.cncf.helm.config.v1+json", &config, OCI_LAYER_GZIP);
        let root = memory.add_index(&[(&chart, ""), (&amd64, ""), (&arm64, "")]);
        assert_eq!(
            memory.resolve(&root, "arm64").await.unwrap().manifest_document.digest,
            arm64
        );
        let error = memory.resolve(&root, "s390x").await.unwrap_err();
        assert!(
            error.contains("no image for linux/s390x: the image index has linux/amd64, linux/arm64"),
            "{error}"
        );

        // If an entry states the wanted platform, the resolver does not look into the others.
        let root = memory.add_index(&[(&amd64, ""), (&arm64, ARM64)]);
        assert_eq!(
            memory.resolve(&root, "arm64").await.unwrap().manifest_document.digest,
            arm64
        );
        assert_eq!(memory.requests(), "root manifest config");

        let root = memory.add_index(&[(&chart, "")]);
        assert!(
            memory
                .resolve(&root, "arm64")
                .await
                .unwrap_err()
                .contains("a Helm chart")
        );
    }

    #[tokio::test]
    async fn nested_indexes_are_followed_to_a_depth() {
        let mut memory = Memory::default();
        let amd64 = memory.add_image("linux/amd64", "a");
        let mut nested = memory.add_index(&[(&amd64, AMD64)]);
        for _ in 1..MAX_INDEX_DEPTH {
            nested = memory.add_index(&[(&nested, "")]);
        }
        let image = memory.resolve(&nested, "amd64").await.unwrap();
        assert_eq!(image.manifest_document.digest, amd64);
        assert_eq!(image.index.unwrap().digest, nested);
        let deeper = memory.add_index(&[(&nested, "")]);
        assert!(
            memory
                .resolve(&deeper, "amd64")
                .await
                .unwrap_err()
                .contains("nested more than 4 deep")
        );

        // Only a source that returns wrong documents makes a circle: a document cannot contain its own digest.
        let circle = memory.add_index(&[(&amd64, "")]);
        let root = memory.add_index(&[(&circle, "")]);
        let document = memory.documents[&root].clone();
        memory.documents.insert(circle, document);
        assert!(
            memory
                .resolve(&root, "amd64")
                .await
                .unwrap_err()
                .contains("lead in a circle")
        );
    }

    #[tokio::test]
    async fn images_of_an_index_go_before_nested_indexes() {
        let mut memory = Memory::default();
        let amd64 = memory.add_image("linux/amd64", "a");
        let arm64 = memory.add_image("linux/arm64", "b");
        let s390x = memory.add_image("linux/s390x", "c");
        let first = memory.add_index(&[(&s390x, r#","platform":{"os":"linux","architecture":"s390x"}"#)]);
        let second = memory.add_index(&[(&arm64, ARM64)]);
        let root = memory.add_index(&[(&first, ""), (&amd64, ""), (&first, ""), (&second, "")]);
        for (wanted, digest) in [("amd64", &amd64), ("s390x", &s390x), ("arm64", &arm64)] {
            let image = memory.resolve(&root, wanted).await.unwrap();
            assert_eq!(image.manifest_document.digest, *digest, "{wanted}");
            assert_eq!(image.index.unwrap().digest, root);
        }
        let error = memory.resolve(&root, "riscv64").await.unwrap_err();
        assert!(
            error.contains("the image index has linux/amd64, linux/s390x, linux/arm64;"),
            "{error}"
        );

        // An index that is nested too deep does not hide another one.
        let mut deep = memory.add_index(&[(&amd64, AMD64)]);
        for _ in 0..MAX_INDEX_DEPTH {
            deep = memory.add_index(&[(&deep, "")]);
        }
        let root = memory.add_index(&[(&deep, ""), (&second, "")]);
        let image = memory.resolve(&root, "arm64").await.unwrap();
        assert_eq!(image.manifest_document.digest, arm64);
        let error = memory.resolve(&root, "amd64").await.unwrap_err();
        assert!(error.contains("nested more than 4 deep"), "{error}");
    }

    #[tokio::test]
    async fn a_wide_tree_of_indexes_is_not_searched_without_end() {
        let mut memory = Memory::default();
        let s390x = memory.add_image("linux/s390x", "a");
        let mut counter = 0;
        let mut level: Vec<Digest> = Vec::new();
        for _ in 0..MAX_LOOKED_INTO.pow(2) {
            counter += 1;
            let annotated = format!(r#","annotations":{{"n":"{counter}"}}"#);
            level.push(memory.add_index(&[(&s390x, &annotated), (&s390x, "")]));
        }
        while level.len() > 1 {
            let nested = level
                .chunks(MAX_LOOKED_INTO)
                .map(<[Digest]>::to_vec)
                .collect::<Vec<_>>();
            level = nested
                .iter()
                .map(|nested| memory.add_index(&nested.iter().map(|digest| (digest, "")).collect::<Vec<_>>()))
                .collect();
        }
        let error = memory.resolve(&level[0].clone(), "amd64").await.unwrap_err();
        assert!(error.contains("the image index has linux/s390x;"), "{error}");
        let asked = memory
            .requests
            .lock()
            .unwrap()
            .iter()
            .filter(|r| **r == "manifest")
            .count();
        assert_eq!(asked, MAX_LOOKED_INTO * MAX_INDEX_DEPTH);
    }

    #[tokio::test]
    async fn what_cannot_be_mounted_is_refused() {
        let mut memory = Memory::default();
        let windows = memory.add_image("windows/amd64", "w");
        assert!(
            memory
                .resolve(&windows, "amd64")
                .await
                .unwrap_err()
                .contains("it is a Windows image")
        );
        let root = memory.add_index(&[(&windows, r#","platform":{"os":"windows","architecture":"amd64"}"#)]);
        let error = memory.resolve(&root, "amd64").await.unwrap_err();
        assert!(error.contains("the image index has windows/amd64"), "{error}");

        let config = memory.add("application/x-tool", "not JSON");
        let artifact = memory.add_manifest("application/x-tool", &config, OCI_LAYER_GZIP);
        let error = memory.resolve(&artifact, "amd64").await.unwrap_err();
        assert!(
            error.contains("cannot be mounted: it is an OCI artifact (`application/x-tool`)"),
            "{error}"
        );
        let broken = memory.add_manifest(OCI_CONFIG, &config, OCI_LAYER_GZIP);
        let error = memory.resolve(&broken, "amd64").await.unwrap_err();
        assert!(
            error.starts_with(&format!("config {config} of memory is not valid: ")),
            "{error}"
        );

        let empty = memory.add_index(&[]);
        assert!(
            memory
                .resolve(&empty, "amd64")
                .await
                .unwrap_err()
                .contains("lists none")
        );
        let schema1 = memory.add("application/json", r#"{"schemaVersion":1}"#);
        assert!(
            memory
                .resolve(&schema1, "amd64")
                .await
                .unwrap_err()
                .contains("schema 1")
        );
        let few = memory.add(OCI_CONFIG, r#"{"os":"linux"}"#);
        let few = memory.add_manifest(OCI_CONFIG, &few, OCI_LAYER_GZIP);
        assert!(
            memory
                .resolve(&few, "amd64")
                .await
                .unwrap_err()
                .contains("lists 1 layers but its config 0 diff_ids")
        );
    }
}
