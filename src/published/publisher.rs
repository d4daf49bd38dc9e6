//! Writes published files to a place.
//!
//! Other hosts use what is there. So a push loses nothing good. All files are compared with what is there before the
//! first one is written:
//!
//! ```text
//! nothing is there      the file is written
//! the same bytes        the file stays, and so does its signature, unless the push has another one
//! other bytes, index    refused without `replace`
//! other bytes, profile  written: a profile is a hint. Refused without `replace` if only the old one is signed
//! ```

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use super::absence::Absence;
use super::repository::{Listed, list, put_list};
use super::{FileName, IndexPlace, PublishedError, PublishedFile, directory};
use crate::oci::Digest;
use crate::registry::{FileRepository, RegistryClient};
use crate::store::Store;
use crate::task::blocking;

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

impl Pushed {
    fn count(&mut self, written: bool, file: &PublishedFile) {
        match written {
            true => {
                self.written += 1;
                self.bytes += file.bytes.len() as u64;
            }
            false => self.present += 1,
        }
    }
}

/// A place that can be written.
#[derive(Debug)]
pub struct Publisher {
    place: IndexPlace,
    target: Target,
    absence: Absence,
    replace: bool,
}

#[derive(Debug)]
enum Target {
    Directory(PathBuf),
    Repository(FileRepository),
}

impl Publisher {
    /// Returns the place as one to write to. Fails if nothing can be written there. `replace` says whether files with other
    /// bytes are overwritten.
    pub fn new(
        place: IndexPlace,
        client: &RegistryClient,
        store: &Store,
        replace: bool,
    ) -> Result<Self, PublishedError> {
        let target = match &place {
            IndexPlace::Directory(path) => Target::Directory(path.clone()),
            IndexPlace::Repository { registry, repository } => {
                Target::Repository(client.files(registry, repository)?.without_mirrors())
            }
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
            replace,
        })
    }

    /// Writes the files of an image. Leaves out those that are there. In a repository, lists each layer's file under the
    /// layer's tag, and all files under the tag of the image. If a file may not be written, writes none.
    pub async fn push(&self, manifest: &Digest, files: &[PublishedFile]) -> Result<Pushed, PublishedError> {
        match &self.target {
            Target::Directory(path) => {
                let (path, files, place) = (path.clone(), files.to_vec(), self.place.to_string());
                let replace = self.replace;
                let writing = blocking(move || write_all(&path, &files, replace, &place)).await;
                writing.unwrap_or_else(|error| {
                    Err(PublishedError::File {
                        path: PathBuf::from(self.place.to_string()),
                        reason: error.to_string(),
                    })
                })
            }
            Target::Repository(repository) => self.push_to(repository, manifest, files).await,
        }
    }

    async fn push_to(
        &self,
        repository: &FileRepository,
        manifest: &Digest,
        files: &[PublishedFile],
    ) -> Result<Pushed, PublishedError> {
        let image_tag = FileName::tag(manifest);
        let mut lists: HashMap<String, Vec<Listed>> = HashMap::new();
        let layer_tags = files.iter().filter_map(|file| match &file.name {
            FileName::Index { layer } => Some(FileName::tag(layer)),
            FileName::Profile { .. } => None,
        });
        for tag in layer_tags.chain([image_tag.clone()]) {
            let listed = self.listed(repository, &tag).await?;
            lists.insert(tag, listed);
        }
        let mut all = Vec::new();
        for file in files {
            let name = file.name.to_string();
            let mut new = Listed {
                digest: Digest::of(&file.bytes),
                size: file.bytes.len() as u64,
                signature: file.signature.clone(),
                name: name.clone(),
            };
            for there in lists.values().flatten().filter(|there| there.name == name) {
                if there.digest != new.digest {
                    self.may_replace(file, there.signature.is_some())?;
                } else if new.signature.is_none() {
                    new.signature = there.signature.clone();
                }
            }
            all.push(new);
        }
        let mut pushed = Pushed::default();
        for (file, listed) in files.iter().zip(&all) {
            let written = repository.put_blob(&listed.digest, file.bytes.clone()).await?;
            pushed.count(written, file);
            if let FileName::Index { layer } = &file.name {
                let alone = std::slice::from_ref(listed);
                self.put(repository, &lists, &FileName::tag(layer), alone).await?;
            }
        }
        // The list may have profiles that are not pushed this time.
        let new: HashSet<&String> = all.iter().map(|file| &file.name).collect();
        let others = lists[&image_tag]
            .iter()
            .filter(|file| !new.contains(&file.name))
            .cloned();
        let others: Vec<Listed> = others.collect();
        all.extend(others);
        self.put(repository, &lists, &image_tag, &all).await?;
        Ok(pushed)
    }

    /// Returns what a tag lists. Without `replace`, fails if the tag is of something else.
    async fn listed(&self, repository: &FileRepository, tag: &str) -> Result<Vec<Listed>, PublishedError> {
        match list(repository, tag).await {
            Err(error @ PublishedError::Format { .. }) if self.replace => {
                tracing::warn!(place = %self.place, %error, "overwriting what is under a tag of an index list");
                Ok(Vec::new())
            }
            Err(PublishedError::Format { .. }) => Err(PublishedError::Occupied {
                place: self.place.to_string(),
                file: tag.to_owned(),
            }),
            listed => Ok(listed?.unwrap_or_default()),
        }
    }

    /// Puts a list under a tag, unless it is there.
    async fn put(
        &self,
        repository: &FileRepository,
        lists: &HashMap<String, Vec<Listed>>,
        tag: &str,
        listed: &[Listed],
    ) -> Result<(), PublishedError> {
        if lists.get(tag).is_none_or(|there| there != listed) {
            put_list(repository, tag, listed).await?;
        }
        self.absence.forget(&self.place, tag);
        Ok(())
    }

    fn may_replace(&self, file: &PublishedFile, is_signed: bool) -> Result<(), PublishedError> {
        may_replace(file, is_signed, self.replace, &self.place.to_string())
    }
}

/// Checks that a file may overwrite one with other bytes. `is_signed` says whether that one has a signature.
fn may_replace(file: &PublishedFile, is_signed: bool, replace: bool, place: &str) -> Result<(), PublishedError> {
    let (place, name) = (place.to_owned(), file.name.to_string());
    match &file.name {
        _ if replace => Ok(()),
        _ if is_signed && file.signature.is_none() => Err(PublishedError::Signed { place, file: name }),
        FileName::Index { .. } => Err(PublishedError::Occupied { place, file: name }),
        FileName::Profile { .. } => Ok(()),
    }
}

/// Writes files and their signatures to a directory.
fn write_all(directory: &Path, files: &[PublishedFile], replace: bool, place: &str) -> Result<Pushed, PublishedError> {
    for file in files {
        let name = file.name.to_string();
        if directory::is_there(directory, &name) && !directory::has(directory, &name, &file.bytes) {
            let is_signed = directory::is_there(directory, &file.name.signature());
            may_replace(file, is_signed, replace, place)?;
        }
    }
    let mut pushed = Pushed::default();
    for file in files {
        let written = write(directory, file)?;
        pushed.count(written, file);
    }
    Ok(pushed)
}

/// Writes a file and its signature. Returns whether anything was written.
///
/// A reader finds the signature beside the file, so the signature comes first: a new file is never seen without it. The
/// signature of a file that was overwritten goes before the file, so that it is never left beside another one.
fn write(directory: &Path, file: &PublishedFile) -> Result<bool, PublishedError> {
    let (name, signature) = (file.name.to_string(), file.name.signature());
    let is_same = directory::has(directory, &name, &file.bytes);
    let mut written = false;
    match &file.signature {
        Some(text) if !directory::has(directory, &signature, text.as_bytes()) => {
            directory::write(directory, &signature, text.as_bytes())?;
            written = true;
        }
        None if !is_same => directory::remove(directory, &signature)?,
        _ => {}
    }
    if !is_same {
        directory::write(directory, &name, &file.bytes)?;
        written = true;
    }
    Ok(written)
}
