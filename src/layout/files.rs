//! The files of a layout: those of a directory, or the members of a tar.

use std::fmt;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;

use crate::blob::BlobError;
use crate::blob::file::{FileBlob, open_regular, read_piece};
use crate::oci::{Digest, shown};
use crate::tarfile::Archive;

/// Where the files are.
#[derive(Clone)]
pub(super) enum LayoutFiles {
    /// In a directory.
    Directory(Arc<Path>),
    /// In a tar.
    Archive(Arc<Archive>),
}

/// A file of a layout. Displays as its name, for errors.
pub(super) struct LayoutFile {
    file: Arc<std::fs::File>,
    /// The path of the file itself, or of the tar.
    path: Arc<Path>,
    /// The name in the tar, and where its content begins there.
    member: Option<(String, u64)>,
    pub(super) len: u64,
}

impl LayoutFiles {
    /// Opens a tar. Blocks.
    pub(super) fn of_archive(path: Arc<Path>) -> Result<Self, BlobError> {
        Ok(Self::Archive(Arc::new(Archive::open(path)?)))
    }

    /// Returns the path of the directory or of the tar.
    pub(super) fn path(&self) -> &Path {
        match self {
            Self::Directory(dir) => dir,
            Self::Archive(archive) => &archive.path,
        }
    }

    /// Names a file, for errors.
    pub(super) fn shown(&self, name: &str) -> String {
        match self {
            Self::Directory(dir) => dir.join(name).display().to_string(),
            Self::Archive(archive) => in_archive(name, &archive.path),
        }
    }

    /// Returns what to say if the files are not those of a layout.
    pub(super) fn hint(&self) -> String {
        match self {
            Self::Directory(_) => "an OCI layout is a directory with `oci-layout`, `index.json` and `blobs`".to_owned(),
            Self::Archive(archive) if archive.has("manifest.json") => {
                "this is no OCI layout but an archive of `docker save`: use docker-archive:FILE".to_owned()
            }
            Self::Archive(_) => "an OCI archive is a tar of `oci-layout`, `index.json` and `blobs`".to_owned(),
        }
    }

    /// Opens a file. Returns none if there is no such file. Blocks.
    pub(super) fn open(&self, name: &str) -> Result<Option<LayoutFile>, BlobError> {
        match self {
            Self::Directory(dir) => {
                let path = dir.join(name);
                match open_regular(&path) {
                    Ok((file, len)) => Ok(Some(LayoutFile {
                        file: Arc::new(file),
                        path: path.into(),
                        member: None,
                        len,
                    })),
                    Err(BlobError::Io { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(None),
                    Err(other) => Err(other),
                }
            }
            Self::Archive(archive) => match archive.member(name) {
                Ok(member) => Ok(Some(LayoutFile {
                    file: Arc::clone(&archive.file),
                    path: Arc::clone(&archive.path),
                    member: Some((name.to_owned(), member.offset)),
                    len: member.size,
                })),
                Err(BlobError::NotFound { .. }) => Ok(None),
                Err(other) => Err(other),
            },
        }
    }
}

impl LayoutFile {
    /// Reads the whole file, which must not be longer than `max` bytes. Blocks.
    pub(super) fn read(&self, max: usize) -> Result<Bytes, BlobError> {
        if self.len > max as u64 {
            return Err(BlobError::Invalid {
                what: self.to_string(),
                reason: format!("it has {} bytes, more than the {max} allowed for a document", self.len),
            });
        }
        let offset = self.member.as_ref().map_or(0, |(_, offset)| *offset);
        read_piece(&self.file, &self.path, offset, self.len)
    }

    /// Returns the file as a blob.
    pub(super) fn into_blob(self, digest: Digest) -> FileBlob {
        match self.member {
            None => FileBlob::whole(self.path, digest, self.len),
            Some((_, offset)) => FileBlob::new(self.file, self.path, digest, offset, self.len),
        }
    }
}

impl fmt::Display for LayoutFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.member {
            None => self.path.display().fmt(f),
            Some((name, _)) => f.write_str(&in_archive(name, &self.path)),
        }
    }
}

fn in_archive(name: &str, archive: &Path) -> String {
    format!("`{}` in archive {}", shown(name), archive.display())
}
