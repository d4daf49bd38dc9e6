//! A file to be published, and its signature.

use std::io;
use std::path::Path;

use bytes::Bytes;

use super::{FileName, IndexFile, PublishedError};
use crate::os::read_regular;
use crate::profile::LARGEST_FILE;

/// Longest signature in bytes. Real ones have about 300.
pub(super) const LONGEST_SIGNATURE: usize = 4096;

/// A file that is to be published.
#[derive(Debug, Clone)]
pub struct PublishedFile {
    /// Its name.
    pub name: FileName,
    /// Its bytes.
    pub bytes: Bytes,
    /// The signature, as minisign(1) writes it.
    pub signature: Option<String>,
}

impl PublishedFile {
    /// Reads a file of a directory, and its signature if there is one. Waits for nothing but the disk: only regular files
    /// are read. Blocks.
    pub fn read(directory: &Path, name: FileName) -> Result<Self, PublishedError> {
        let most = match &name {
            FileName::Index { .. } => IndexFile::MOST,
            FileName::Profile { .. } => LARGEST_FILE as u64,
        };
        let path = directory.join(name.to_string());
        let bytes = read_regular(&path, most).map_err(|error| PublishedError::file(&path, &error))?;
        let path = directory.join(name.signature());
        let signature = match read_regular(&path, LONGEST_SIGNATURE as u64) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            bytes => {
                let text = bytes.and_then(|bytes| String::from_utf8(bytes).map_err(io::Error::other));
                Some(text.map_err(|error| PublishedError::file(&path, &error))?)
            }
        };
        Ok(Self {
            name,
            bytes: bytes.into(),
            signature,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::Digest;

    #[test]
    fn only_regular_files_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let name = FileName::Index {
            layer: Digest::of(b"x"),
        };
        assert!(PublishedFile::read(dir.path(), name.clone()).is_err());
        let path = dir.path().join(name.to_string());
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let error = PublishedFile::read(dir.path(), name.clone()).unwrap_err().to_string();
        assert!(error.contains("no regular file"), "{error}");
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "index").unwrap();
        let file = PublishedFile::read(dir.path(), name.clone()).unwrap();
        assert_eq!((&file.bytes[..], file.signature), (&b"index"[..], None));
        std::fs::write(dir.path().join(name.signature()), "signed").unwrap();
        let file = PublishedFile::read(dir.path(), name).unwrap();
        assert_eq!(file.signature.as_deref(), Some("signed"));
    }
}
