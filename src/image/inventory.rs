//! The images in the store, and what of the store only some of them use.
//!
//! An image is in the store if its manifest is. Its names are those that meant it, or an image index that lists it, the last
//! time. An image without a name was the meaning of a tag that means another image by now.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::time::SystemTime;

use super::ImageError;
use crate::oci::{Descriptor, Digest, DocumentKind, ImageConfig, ImageIndex, Manifest, classify};
use crate::os::{gone, on_disk};
use crate::store::{LayerDir, NamedRoot, Store, StoreError};

/// Deepest nesting of image indexes that is followed, as in [`resolve`](crate::resolve).
const DEEPEST: usize = 4;

/// An image whose manifest is in the store.
#[derive(Debug, Clone)]
pub struct StoredImage {
    /// Digest of the manifest.
    pub manifest: Digest,
    /// Names that mean the image, in order.
    pub names: BTreeSet<String>,
    /// The platform, as OS/ARCH[/VARIANT], if the config is in the store too.
    pub platform: Option<String>,
    /// The layers, base first.
    pub layers: Vec<Descriptor>,
    /// When the image was last mounted or asked for.
    pub last_used: Option<SystemTime>,
    config: Digest,
}

impl StoredImage {
    /// Digests of the layers, each once.
    pub fn layer_digests(&self) -> HashSet<&Digest> {
        self.layers.iter().map(|layer| &layer.digest).collect()
    }
}

/// All images in the store.
#[derive(Debug)]
pub struct Inventory {
    /// The images, the most recently used first.
    pub images: Vec<StoredImage>,
    roots: Vec<Root>,
}

/// What a name means.
#[derive(Debug)]
struct Root {
    named: NamedRoot,
    /// Manifests in the store that the name may mean, one for each platform.
    manifests: HashSet<Digest>,
    /// Image indexes on the way there.
    indexes: HashSet<Digest>,
}

/// What the removal of an image from the store takes away.
#[derive(Debug, Default)]
pub struct Removal {
    /// Names that are forgotten.
    pub names: Vec<String>,
    /// Digests of the manifests of the images that are removed. Empty if another name means the same image.
    pub images: Vec<Digest>,
    /// Layers that no other image has.
    pub layers: Vec<Digest>,
    /// Number of layers of the removed images that stay, because others have them.
    pub shared_layers: usize,
    roots: Vec<NamedRoot>,
    documents: Vec<Digest>,
}

/// What a removal has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RemovedImages {
    /// Bytes on disk that came free.
    pub bytes: u64,
    /// Layers that were being fetched and stay.
    pub busy: usize,
}

impl Inventory {
    /// Reads which images are in the store. Documents that are no manifests are passed over.
    pub fn read(store: &Store) -> Result<Self, ImageError> {
        let mut manifests = HashMap::new();
        let mut indexes = HashMap::new();
        for digest in store.documents()? {
            let Some(bytes) = store.document(&digest)? else {
                continue;
            };
            match classify("", &bytes) {
                Ok(DocumentKind::Manifest) => {
                    manifests.extend(Manifest::parse(&bytes).ok().map(|manifest| (digest, manifest)))
                }
                Ok(DocumentKind::ImageIndex) => {
                    indexes.extend(ImageIndex::parse(&bytes).ok().map(|index| (digest, index)))
                }
                // Configs are documents too.
                Err(_) => {}
            }
        }
        let roots: Vec<Root> = store
            .named_roots()?
            .into_iter()
            .map(|named| reach(named, &manifests, &indexes))
            .collect();
        let trees = store.trees()?;
        let mut images = Vec::new();
        for (digest, manifest) in manifests {
            let config = store.document(&manifest.config.digest)?;
            let config = config.and_then(|bytes| ImageConfig::parse(&bytes).ok());
            let named = || roots.iter().filter(|root| root.manifests.contains(&digest));
            let mounted = trees
                .iter()
                .filter(|tree| tree.is_of(&digest))
                .map(|tree| tree.last_used);
            images.push(StoredImage {
                names: named().filter_map(|root| root.named.name.clone()).collect(),
                platform: config.map(|config| config.platform().to_string()),
                last_used: named().filter_map(|root| root.named.confirmed).chain(mounted).max(),
                config: manifest.config.digest,
                layers: manifest.layers,
                manifest: digest,
            });
        }
        images.sort_by(|a, b| {
            b.last_used
                .cmp(&a.last_used)
                .then_with(|| a.manifest.to_string().cmp(&b.manifest.to_string()))
        });
        Ok(Self { images, roots })
    }

    /// Returns what is to be removed for an image that is called `name`, or whose manifest has the digest `name`. None if the
    /// store has no such image. Layers of `in_use` stay.
    pub fn removal(&self, name: &str, in_use: &HashSet<Digest>) -> Option<Removal> {
        let is_named = |root: &Root| root.named.name.as_deref() == Some(name);
        let (roots, images): (Vec<&Root>, HashSet<&Digest>) = match self.roots.iter().any(is_named) {
            true => {
                let (named, others): (Vec<&Root>, Vec<&Root>) = self.roots.iter().partition(|root| is_named(root));
                let wanted: HashSet<&Digest> = others.iter().flat_map(|root| &root.manifests).collect();
                let meant = named.iter().flat_map(|root| &root.manifests);
                let images = meant.filter(|manifest| !wanted.contains(manifest)).collect();
                (named, images)
            }
            false => {
                let image = self.images.iter().find(|image| image.manifest.to_string() == name)?;
                let means_it_alone =
                    |root: &&Root| root.manifests.len() == 1 && root.manifests.contains(&image.manifest);
                let roots = self.roots.iter().filter(means_it_alone).collect();
                (roots, HashSet::from([&image.manifest]))
            }
        };
        Some(self.plan(&roots, &images, in_use))
    }

    fn plan(&self, roots: &[&Root], images: &HashSet<&Digest>, in_use: &HashSet<Digest>) -> Removal {
        let (gone, left): (Vec<&StoredImage>, Vec<&StoredImage>) =
            self.images.iter().partition(|image| images.contains(&image.manifest));
        let paths: HashSet<_> = roots.iter().map(|root| &root.named.path).collect();
        let other_roots = || self.roots.iter().filter(|root| !paths.contains(&root.named.path));
        let needed: HashSet<&Digest> = left
            .iter()
            .flat_map(|image| image.layer_digests())
            .chain(in_use)
            .collect();
        let all: HashSet<&Digest> = gone.iter().flat_map(|image| image.layer_digests()).collect();
        let (shared, own): (Vec<&Digest>, Vec<&Digest>) = all.into_iter().partition(|layer| needed.contains(layer));
        let kept_configs: HashSet<&Digest> = left.iter().map(|image| &image.config).collect();
        let kept_indexes: HashSet<&Digest> = other_roots().flat_map(|root| &root.indexes).collect();
        let configs = gone
            .iter()
            .map(|image| &image.config)
            .filter(|config| !kept_configs.contains(config));
        let indexes = roots
            .iter()
            .flat_map(|root| &root.indexes)
            .filter(|index| !kept_indexes.contains(index));
        let manifests = gone.iter().map(|image| &image.manifest);
        Removal {
            names: roots.iter().filter_map(|root| root.named.name.clone()).collect(),
            images: manifests.clone().cloned().collect(),
            layers: own.into_iter().cloned().collect(),
            shared_layers: shared.len(),
            roots: roots.iter().map(|root| root.named.clone()).collect(),
            documents: manifests
                .chain(configs)
                .chain(indexes)
                .cloned()
                .collect::<HashSet<_>>()
                .into_iter()
                .collect(),
        }
    }
}

/// Follows a name to the manifests in the store.
fn reach(named: NamedRoot, manifests: &HashMap<Digest, Manifest>, indexes: &HashMap<Digest, ImageIndex>) -> Root {
    let mut root = Root {
        manifests: HashSet::new(),
        indexes: HashSet::new(),
        named,
    };
    let mut next = vec![root.named.digest.clone()];
    for _ in 0..=DEEPEST {
        let mut below = Vec::new();
        for digest in next {
            if manifests.contains_key(&digest) {
                root.manifests.insert(digest);
            } else if let Some(index) = indexes.get(&digest)
                && root.indexes.insert(digest)
            {
                below.extend(index.manifests.iter().map(|entry| entry.digest.clone()));
            }
        }
        next = below;
    }
    root
}

impl Removal {
    /// Returns the bytes on disk of the layers and trees that are to be removed.
    pub fn bytes(&self, store: &Store) -> Result<u64, StoreError> {
        let trees = store
            .trees()?
            .into_iter()
            .filter(|tree| self.has_tree(tree))
            .map(|tree| tree.bytes);
        let layers = self.layer_dirs(store)?.into_iter().map(|dir| dir.usage());
        Ok(trees.chain(layers).sum())
    }

    fn has_tree(&self, tree: &crate::store::StoredTree) -> bool {
        self.images.iter().any(|manifest| tree.is_of(manifest))
    }

    fn layer_dirs(&self, store: &Store) -> Result<Vec<LayerDir>, StoreError> {
        let own: HashSet<&Digest> = self.layers.iter().collect();
        let of_image = |dir: &LayerDir| dir.digest().is_some_and(|digest| own.contains(&digest));
        Ok(store.layers()?.into_iter().filter(of_image).collect())
    }

    /// Removes everything. The names go first and the manifests last: after an interrupt, another removal finds the rest.
    pub fn carry_out(&self, store: &Store) -> Result<RemovedImages, StoreError> {
        let mut removed = RemovedImages::default();
        for root in &self.roots {
            gone(std::fs::remove_file(&root.path)).map_err(|e| StoreError::io("remove", &root.path, e))?;
        }
        for tree in store.trees()?.into_iter().filter(|tree| self.has_tree(tree)) {
            gone(std::fs::remove_file(&tree.path)).map_err(|e| StoreError::io("remove", &tree.path, e))?;
            removed.bytes += tree.bytes;
        }
        for dir in self.layer_dirs(store)? {
            match dir.remove()? {
                Some(bytes) => removed.bytes += bytes,
                None => removed.busy += 1,
            }
        }
        for path in self.documents.iter().filter_map(|digest| store.document_path(digest)) {
            removed.bytes += path.metadata().map_or(0, |metadata| on_disk(&metadata));
            gone(std::fs::remove_file(&path)).map_err(|e| StoreError::io("remove", &path, e))?;
        }
        Ok(removed)
    }
}
