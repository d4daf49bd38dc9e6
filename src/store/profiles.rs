//! Where profiles of starts are kept, and which profiles a repository has.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::{Durability, Store, StoreError};
use crate::oci::Digest;

impl Store {
    /// Returns where the profile of an image's program is kept.
    pub fn profile(&self, manifest: &Digest, label: &str) -> Option<PathBuf> {
        let root = self.root.as_ref()?;
        Some(root.join("profiles").join(profile_name(manifest, label)))
    }

    /// Returns the labels of the profiles of an image.
    pub fn profile_labels(&self, manifest: &Digest) -> Result<Vec<String>, StoreError> {
        let prefix = profile_name(manifest, "");
        let labels = self.entries("profiles")?.into_iter().filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            name.strip_prefix(&prefix).map(str::to_owned)
        });
        let mut labels: Vec<String> = labels.collect();
        labels.sort();
        Ok(labels)
    }

    /// Remembers that there is a profile of an image of this repository.
    pub(crate) fn mark_profile(&self, repository: &str, manifest: &Digest, label: &str) -> Result<(), StoreError> {
        let root = self.root.as_ref().ok_or(StoreError::Unavailable)?;
        let mark = repository_dir(root, repository).join(profile_name(manifest, label));
        // Make a new file each time, so that its time of modification is that of the profile.
        self.publish(&mark, Durability::Lazy, |_| Ok(()))
    }

    /// Returns the manifests of a repository that may have a profile with this label. The newest come first; `most`
    /// bounds their number.
    pub(crate) fn profiles_of(&self, repository: &str, label: &str, most: usize) -> Vec<Digest> {
        let Some(root) = &self.root else { return Vec::new() };
        let Ok(entries) = fs::read_dir(repository_dir(root, repository)) else {
            return Vec::new();
        };
        let mut found: Vec<(SystemTime, Digest)> = entries
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                let (manifest, of) = name.split_once('.')?;
                let manifest = manifest.replacen('-', ":", 1).parse().ok()?;
                let modified = entry.metadata().and_then(|m| m.modified()).ok()?;
                (of == label).then_some((modified, manifest))
            })
            .collect();
        found.sort_by(|a, b| b.cmp(a));
        found.into_iter().take(most).map(|(_, manifest)| manifest).collect()
    }
}

/// Returns the file name of the profile of an image's program, or of the mark for such a profile.
fn profile_name(manifest: &Digest, label: &str) -> String {
    format!("{}-{}.{label}", manifest.algorithm().name(), manifest.hex())
}

/// Returns the directory with the marks for the profiles of a repository. Its name is a hash, because repositories
/// have slashes in their names.
fn repository_dir(root: &Path, repository: &str) -> PathBuf {
    let hash = blake3::hash(repository.as_bytes()).to_hex();
    root.join("profiles").join("of").join(&hash[..32])
}
