//! Writes published files to a place.

use std::collections::HashSet;
use std::path::PathBuf;

use bytes::Bytes;

use super::absence::Absence;
use super::repository::{Listed, list, put_list};
use super::{FileName, IndexPlace, PublishedError, directory};
use crate::oci::Digest;
use crate::registry::{FileRepository, RegistryClient};
use crate::store::Store;

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

/// How many files were written, and how many were there already.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pushed {
    /// Files that were written.
    pub written: usize,
    /// Files that were there, byte for byte.
    pub present: usize,
    /// Bytes that were written.
    pub bytes: u64,
}

/// A place that can be written.
#[derive(Debug)]
pub struct Publisher {
    place: IndexPlace,
    target: Target,
    absence: Absence,
}

#[derive(Debug)]
enum Target {
    Directory(PathBuf),
    Repository(FileRepository),
}

impl Publisher {
    /// Returns the place as one to write to. Fails if nothing can be written there.
    pub fn new(place: IndexPlace, client: &RegistryClient, store: &Store) -> Result<Self, PublishedError> {
        let target = match &place {
            IndexPlace::Directory(path) => Target::Directory(path.clone()),
            IndexPlace::Repository { registry, repository } => Target::Repository(client.files(registry, repository)?),
            IndexPlace::Web(_) => {
                return Err(PublishedError::ReadOnly {
                    place: place.to_string(),
                });
            }
        };
        Ok(Self {
            place,
            target,
            absence: Absence::new(store.clone()),
        })
    }

    /// Writes the files of an image. Leaves out those that are there. In a repository, lists each layer's file under the
    /// layer's tag, and all files under the tag of the image.
    pub async fn push(&self, manifest: &Digest, files: &[PublishedFile]) -> Result<Pushed, PublishedError> {
        let mut pushed = Pushed::default();
        let mut count = |written: bool, bytes: usize| match written {
            true => {
                pushed.written += 1;
                pushed.bytes += bytes as u64;
            }
            false => pushed.present += 1,
        };
        match &self.target {
            Target::Directory(path) => {
                for file in files {
                    count(self.write(path, file).await?, file.bytes.len());
                }
            }
            Target::Repository(repository) => {
                let mut all = Vec::new();
                for file in files {
                    let digest = Digest::of(&file.bytes);
                    let written = repository.put_blob(&digest, file.bytes.clone()).await?;
                    count(written, file.bytes.len());
                    let listed = Listed {
                        name: file.name.to_string(),
                        digest,
                        size: file.bytes.len() as u64,
                        signature: file.signature.clone(),
                    };
                    if let FileName::Index { layer } = &file.name {
                        let tag = FileName::tag(layer);
                        put_list(repository, &tag, std::slice::from_ref(&listed)).await?;
                        self.absence.forget(&self.place, &tag);
                    }
                    all.push(listed);
                }
                let tag = FileName::tag(manifest);
                // The list may have profiles that are not pushed this time.
                let others = list(repository, &tag).await?.unwrap_or_default().into_iter();
                let new: HashSet<String> = all.iter().map(|file| file.name.clone()).collect();
                all.extend(others.filter(|file| !new.contains(&file.name)));
                put_list(repository, &tag, &all).await?;
                self.absence.forget(&self.place, &tag);
            }
        }
        Ok(pushed)
    }

    /// Writes a file and its signature to a directory. Returns whether anything was written.
    async fn write(&self, directory: &std::path::Path, file: &PublishedFile) -> Result<bool, PublishedError> {
        let (path, file) = (directory.to_owned(), file.clone());
        let writing = tokio::task::spawn_blocking(move || {
            let name = file.name.to_string();
            let mut parts = vec![];
            // The signature comes first: a reader never sees a file without it.
            if let Some(signature) = &file.signature {
                parts.push((file.name.signature(), signature.as_bytes()));
            }
            parts.push((name, &file.bytes[..]));
            parts.retain(|(name, bytes)| !directory::has(&path, name, bytes));
            for (name, bytes) in &parts {
                directory::write(&path, name, bytes)?;
            }
            Ok(!parts.is_empty())
        });
        let written = crate::task::joined(writing).await;
        written.unwrap_or_else(|error| {
            Err(PublishedError::File {
                path: directory.to_owned(),
                reason: error.to_string(),
            })
        })
    }
}
