//! Checks of the stored parts of one image, or of the whole store.
//!
//! Damaged parts are removed. The next user makes or fetches them again, and a mount that is using them is not
//! disturbed. Parts that cannot be checked or removed are reported, and the check continues with the rest. Profiles
//! are hints and are checked when they are used.

use std::collections::HashSet;
use std::fmt::Display;
use std::io;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use serde::Serialize;

use super::ImageError;
use crate::device;
use crate::layer::{stored_map, stored_toc};
use crate::oci::Digest;
use crate::os::clear_way;
use crate::resolve::ResolvedImage;
use crate::store::{LayerDir, Store, StoreError, read_sealed};

/// The result of a check of the store.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct StoreReport {
    /// Documents that match their digests.
    pub documents: u64,
    /// Merged trees that are as they were written.
    pub trees: u64,
    /// Layers whose indexes are as they were written.
    pub layers: u64,
    /// Spans of data that are as they were written.
    pub spans: u64,
    /// Bytes of the spans that are as they were written.
    pub bytes: u64,
    /// Spans that were damaged and have been dropped.
    pub dropped_spans: u64,
    /// Files that were damaged, or useless without a damaged file, and have been removed.
    pub removed: Vec<PathBuf>,
    /// Files that could not be read or removed, with the reason.
    pub unchecked: Vec<Unchecked>,
}

/// A file or directory of the store that could not be checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Unchecked {
    /// The file or directory.
    pub path: PathBuf,
    /// Why it could not be checked.
    pub reason: String,
}

impl StoreReport {
    /// Whether everything that was checked is sound.
    pub fn is_sound(&self) -> bool {
        self.dropped_spans == 0 && self.removed.is_empty() && self.unchecked.is_empty()
    }

    fn remove(&mut self, path: &Path) {
        match clear_way(path) {
            Ok(()) => self.removed.push(path.to_owned()),
            Err(error) => self.cannot(path, &error),
        }
    }

    fn cannot(&mut self, path: &Path, reason: &dyn Display) {
        self.unchecked.push(Unchecked {
            path: path.to_owned(),
            reason: reason.to_string(),
        });
    }

    /// Checks a sealed file, and removes it if it is damaged. Returns whether it exists and is sound.
    fn sealed(&mut self, path: &Path) -> bool {
        match read_sealed(path) {
            Ok(content) => return content.is_some(),
            Err(StoreError::Damaged { .. }) => self.remove(path),
            // A file that its owner may not read is useless.
            Err(StoreError::Io { source, .. }) if source.kind() == io::ErrorKind::PermissionDenied => self.remove(path),
            Err(error) => self.cannot(path, &error),
        }
        false
    }

    /// Checks a document. Counts it if it exists and is sound.
    fn document(&mut self, store: &Store, digest: &Digest) {
        let path = store.document_path(digest);
        let Some(path) = path.filter(|path| is_there(path)) else {
            return;
        };
        match store.document(digest) {
            Ok(Some(_)) => self.documents += 1,
            Ok(None) => self.removed.push(path),
            Err(error) => self.cannot(&path, &error),
        }
    }
}

/// Checks the stored parts of `image`, or the whole store if `image` is `None`. Calls `progress` with each layer
/// before it checks the layer.
pub fn verify(
    store: &Store,
    image: Option<&ResolvedImage>,
    progress: impl Fn(&LayerDir),
) -> Result<StoreReport, ImageError> {
    let mut report = StoreReport::default();
    let (documents, trees, layers) = match image {
        None => (store.documents()?, store.trees()?, store.layers()?),
        Some(image) => {
            let manifest = &image.manifest_document.digest;
            let trees = store.trees()?.into_iter();
            let layers: HashSet<&Digest> = image.layers().iter().map(|layer| &layer.digest).collect();
            let of_image = |dir: &LayerDir| dir.digest().is_some_and(|digest| layers.contains(&digest));
            (
                vec![manifest.clone(), image.config_document.digest.clone()],
                trees.filter(|tree| tree.is_of(manifest)).collect(),
                store.layers()?.into_iter().filter(of_image).collect(),
            )
        }
    };
    for digest in &documents {
        report.document(store, digest);
    }
    if image.is_none() {
        for path in store.root_documents()? {
            report.sealed(&path);
        }
    }
    for tree in trees {
        if report.sealed(&tree.path) && tree.path.extension().is_some_and(|extension| extension == "erofs") {
            report.trees += 1;
        }
    }
    for dir in layers {
        progress(&dir);
        verify_layer(&dir, &mut report);
    }
    Ok(report)
}

/// Whether there is anything at a path, also a symbolic link that leads nowhere.
fn is_there(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

fn verify_layer(dir: &LayerDir, report: &mut StoreReport) {
    let lock = match dir.lock_file() {
        Ok(lock) => lock,
        Err(error) => return report.cannot(dir.path(), &error),
    };
    let Ok(_lock) = Flock::lock(lock, FlockArg::LockExclusiveNonblock) else {
        tracing::info!(layer = %dir.path().display(), "a layer that is being indexed is not checked");
        return;
    };
    report.sealed(&dir.programs());
    let files = [dir.spans(), dir.extents(), dir.toc()];
    let mut sound = true;
    for path in &files {
        sound &= report.sealed(path);
    }
    let spans = dir.digest().filter(|_| sound).and_then(|digest| {
        stored_toc(&digest, Some(dir)).ok()?;
        stored_map(dir, &digest)
    });
    let Some(spans) = spans else {
        // Without all parts of its index the layer will be streamed again, so its device is useless.
        for path in files.into_iter().chain([dir.data()]).filter(|path| is_there(path)) {
            report.remove(&path);
        }
        return;
    };
    report.layers += 1;
    match device::verify(dir, &*spans) {
        Ok(verified) => {
            report.spans += verified.good;
            report.bytes += verified.bytes;
            report.dropped_spans += verified.dropped;
        }
        Err(error) => report.cannot(&dir.data(), &error),
    }
}
