//! Manifests, image indexes and configs in the store, and which of them an image's name means.

use std::fs;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;

use super::{Durability, Store, StoreError, read_sealed, touch};
use crate::oci::{Algorithm, Digest};
use crate::os::{clear_way, is_foreign, read_regular};

/// Most bytes of a document. A longer file is no document, since configs have at most 16 MiB.
const LONGEST: u64 = 16 << 20;

impl Store {
    /// Returns where a document is kept.
    pub(crate) fn document_path(&self, digest: &Digest) -> Option<PathBuf> {
        let root = self.root.as_ref()?;
        Some(
            root.join("documents")
                .join(digest.algorithm().name())
                .join(digest.hex()),
        )
    }

    /// Returns a document that was kept earlier, verified. A damaged document counts as absent and is removed.
    pub fn document(&self, digest: &Digest) -> Result<Option<Bytes>, StoreError> {
        let Some(path) = self.document_path(digest) else {
            return Ok(None);
        };
        match read_regular(&path, LONGEST) {
            Ok(bytes) if digest.matches(&bytes) => return Ok(Some(bytes.into())),
            Ok(_) => {}
            Err(e) if is_foreign(&e) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(StoreError::io("read", &path, e)),
        }
        tracing::warn!(path = %path.display(), "stored document does not match its digest, removing it");
        clear_way(&path).map_err(|e| StoreError::io("remove", &path, e))?;
        Ok(None)
    }

    /// Returns the digests of all documents.
    pub fn documents(&self) -> Result<Vec<Digest>, StoreError> {
        let mut digests = Vec::new();
        for algorithm in Algorithm::ALL {
            let entries = self.entries(&format!("documents/{}", algorithm.name()))?;
            let names = entries
                .into_iter()
                .filter_map(|entry| entry.file_name().into_string().ok());
            digests.extend(names.filter_map(|hex| format!("{}:{hex}", algorithm.name()).parse::<Digest>().ok()));
        }
        Ok(digests)
    }

    /// Keeps a document. The caller has verified it against `digest`.
    pub(crate) fn put_document(&self, digest: &Digest, bytes: &[u8]) -> Result<(), StoreError> {
        let path = self.document_path(digest).ok_or(StoreError::Unavailable)?;
        if fs::symlink_metadata(&path).is_ok_and(|found| found.len() == bytes.len() as u64 && found.is_file()) {
            return Ok(());
        }
        self.publish(&path, Durability::Lazy, |file| file.write_all(bytes))
    }

    /// Returns the digest of the document that an image's name meant the last time.
    pub(crate) fn root_document(&self, name: &str) -> Option<Digest> {
        let path = self.name_path(name)?;
        match read_sealed(&path) {
            Ok(content) => std::str::from_utf8(&content?).ok()?.parse().ok(),
            Err(error) => {
                tracing::warn!(%error, "cannot read what an image's name means");
                None
            }
        }
    }

    /// Remembers which document an image's name means.
    pub(crate) fn set_root_document(&self, name: &str, digest: &Digest) -> Result<(), StoreError> {
        if self.root_document(name).as_ref() == Some(digest) {
            self.touch_root_document(name);
            return Ok(());
        }
        let path = self.name_path(name).ok_or(StoreError::Unavailable)?;
        self.publish_sealed(&path, Durability::Lazy, |file| write!(file, "{digest}"))
    }

    /// Returns the files that say what images' names mean.
    pub(crate) fn root_documents(&self) -> Result<Vec<PathBuf>, StoreError> {
        Ok(self
            .entries("documents/of")?
            .into_iter()
            .map(|entry| entry.path())
            .collect())
    }

    /// Returns how long ago the meaning of an image's name was last confirmed.
    pub(crate) fn root_document_age(&self, name: &str) -> Option<Duration> {
        let modified = fs::metadata(self.name_path(name)?).ok()?.modified().ok()?;
        modified.elapsed().ok()
    }

    /// Records that the meaning of an image's name was confirmed just now.
    fn touch_root_document(&self, name: &str) {
        let Some(path) = self.name_path(name) else { return };
        touch(&path);
    }

    /// Returns where the meaning of a name is kept. The file name is a hash, because names have slashes and colons in
    /// them.
    fn name_path(&self, name: &str) -> Option<PathBuf> {
        let hash = blake3::hash(name.as_bytes()).to_hex();
        let root = self.root.as_ref()?;
        Some(root.join("documents").join("of").join(&hash[..32]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_survive_and_damage_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let digest = Digest::of(b"{}");
        assert!(store.document(&digest).unwrap().is_none());
        store.put_document(&digest, b"{}").unwrap();
        assert_eq!(store.document(&digest).unwrap().unwrap(), &b"{}"[..]);
        fs::write(store.document_path(&digest).unwrap(), b"[]").unwrap();
        assert!(store.document(&digest).unwrap().is_none());
        assert!(!store.document_path(&digest).unwrap().exists());
    }
}
