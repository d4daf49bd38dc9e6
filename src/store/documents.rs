//! Manifests, image indexes and configs in the store, and which of them an image's name means.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

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
        Some(read_root(&path)?.0)
    }

    /// Remembers which document an image's name means.
    pub(crate) fn set_root_document(&self, name: &str, digest: &Digest) -> Result<(), StoreError> {
        let path = self.name_path(name).ok_or(StoreError::Unavailable)?;
        if read_root(&path) == Some((digest.clone(), Some(name.to_owned()))) {
            touch(&path);
            return Ok(());
        }
        self.publish_sealed(&path, Durability::Lazy, |file| write!(file, "{digest}\n{name}"))
    }

    /// Returns what images' names meant the last time.
    pub fn named_roots(&self) -> Result<Vec<NamedRoot>, StoreError> {
        let named = self.root_documents()?.into_iter().filter_map(|path| {
            let (digest, name) = read_root(&path)?;
            Some(NamedRoot {
                name,
                digest,
                confirmed: fs::metadata(&path).and_then(|metadata| metadata.modified()).ok(),
                path,
            })
        });
        Ok(named.collect())
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

    /// Returns where the meaning of a name is kept. The file name is a hash, because names have slashes and colons in
    /// them.
    fn name_path(&self, name: &str) -> Option<PathBuf> {
        let hash = blake3::hash(name.as_bytes()).to_hex();
        let root = self.root.as_ref()?;
        Some(root.join("documents").join("of").join(&hash[..32]))
    }
}

/// What an image's name meant the last time.
#[derive(Debug, Clone)]
pub struct NamedRoot {
    /// The name. None if an older ocifs wrote the file, which keeps no names.
    pub name: Option<String>,
    /// Digest of the manifest or image index.
    pub digest: Digest,
    /// When the meaning was last confirmed.
    pub confirmed: Option<SystemTime>,
    /// The file that says so.
    pub path: PathBuf,
}

/// Reads a file that says what an image's name means: the digest, and the name in a second line. A damaged file counts as
/// absent.
fn read_root(path: &Path) -> Option<(Digest, Option<String>)> {
    let content = read_sealed(path)
        .inspect_err(|error| tracing::warn!(%error, "cannot read what an image's name means"))
        .ok()??;
    let text = std::str::from_utf8(&content).ok()?;
    let (digest, name) = match text.split_once('\n') {
        Some((digest, name)) => (digest, Some(name.to_owned())),
        None => (text, None),
    };
    Some((digest.parse().ok()?, name))
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
