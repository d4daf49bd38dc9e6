//! Checking what the store has of an image, or all that it has.
//!
//! What is damaged is removed: it is made or fetched again by whoever needs it next, and a mount that uses it now is not
//! disturbed. What cannot be checked or removed is reported, and the check goes on with the rest. Profiles, which are hints,
//! are checked when they are used.

use std::collections::HashSet;
use std::fmt::Display;
use std::io;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use serde::Serialize;

use super::ImageError;
use crate::device;
use crate::layer::{stored_index, stored_toc};
use crate::oci::Digest;
use crate::resolve::ResolvedImage;
use crate::store::{LayerDir, Store, StoreError, clear_way, read_sealed};

/// What a check of the store found.
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
    /// Bytes of those.
    pub bytes: u64,
    /// Spans that were not, and were dropped.
    pub dropped_spans: u64,
    /// Files that were not, and were removed.
    pub removed: Vec<PathBuf>,
    /// Files that could not be read, or not removed, and why.
    pub unchecked: Vec<Unchecked>,
}

/// A file or directory of the store that could not be checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Unchecked {
    /// Which.
    pub path: PathBuf,
    /// Why not.
    pub reason: String,
}

impl StoreReport {
    /// Whether all of it was as it should be.
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

    /// Checks a sealed file; whether it is there and sound.
    fn sealed(&mut self, path: &Path) -> bool {
        match read_sealed(path) {
            Ok(content) => return content.is_some(),
            Err(StoreError::Damaged { .. }) => self.remove(path),
            // What its owner may not read is of no use.
            Err(StoreError::Io { source, .. }) if source.kind() == io::ErrorKind::PermissionDenied => self.remove(path),
            Err(error) => self.cannot(path, &error),
        }
        false
    }

    /// Checks a document.
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

/// Checks what `store` has of `image`, or all that it has. `progress` hears of each layer before it is checked.
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
            let tree = store.tree_path(manifest);
            let trees = store.trees()?.into_iter();
            let of_image = |path: &Path| {
                tree.as_ref()
                    .is_some_and(|tree| path.with_extension("") == tree.with_extension(""))
            };
            let layers: HashSet<&Digest> = image.layers().iter().map(|layer| &layer.digest).collect();
            (
                vec![manifest.clone(), image.config_document.digest.clone()],
                trees.filter(|tree| of_image(&tree.path)).collect(),
                layers.into_iter().filter_map(|digest| store.layer(digest)).collect(),
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
        verify_layer(store, &dir, &mut report);
    }
    Ok(report)
}

/// Whether there is anything at a path, also a symbolic link that leads nowhere.
fn is_there(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

fn verify_layer(store: &Store, dir: &LayerDir, report: &mut StoreReport) {
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
    let index = dir.digest().filter(|_| sound).and_then(|digest| {
        stored_toc(store, &digest).ok()?;
        stored_index(dir, &digest)
    });
    let Some((index, extents)) = index else {
        // Without all of its index the layer is streamed again, and its device is of no use.
        for path in files.into_iter().chain([dir.data()]).filter(|path| is_there(path)) {
            report.remove(&path);
        }
        return;
    };
    report.layers += 1;
    match device::verify(dir, &index, &extents) {
        Ok(verified) => {
            report.spans += verified.good;
            report.bytes += verified.bytes;
            report.dropped_spans += verified.dropped;
        }
        Err(error) => report.cannot(&dir.data(), &error),
    }
}
