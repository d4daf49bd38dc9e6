//! Finds files in the lists of a repository: in the list of the image, or in the list of a layer.
//!
//! The list of the image names all its files, so it is asked for once, and all files of the image wait for it.

use std::collections::HashMap;
use std::sync::Mutex;

use tokio::sync::OnceCell;

use super::absence::Absence;
use super::repository::{Listed, list};
use super::{FileName, IndexPlace, PublishedError};
use crate::oci::Digest;
use crate::registry::FileRepository;

/// The list of the image, once it was asked for.
pub(super) type ImageList = OnceCell<ListedOfImage>;

/// What a repository lists under the tag of an image.
pub(super) enum ListedOfImage {
    /// The files by name.
    Files(HashMap<String, Listed>),
    /// There is no list of the image. Each layer may have one.
    Missing,
    /// The list cannot be had. The first file that waited for it reports why, and the others are not asked for.
    Failed(Mutex<Option<PublishedError>>),
}

/// The lists of a repository that may name files of an image.
pub(super) struct Lists<'a> {
    pub(super) files: &'a FileRepository,
    pub(super) place: &'a IndexPlace,
    pub(super) absence: &'a Absence,
    /// Manifest of the image.
    pub(super) image: &'a Digest,
    pub(super) of_image: &'a ImageList,
}

impl Lists<'_> {
    /// Finds a file in the list of the image, or in the list of its layer.
    pub(super) async fn find(&self, name: &FileName) -> Result<Option<Listed>, PublishedError> {
        match self.of_image(name).await? {
            Some(listed) => Ok(Some(listed)),
            // The question for the list may have failed for another file of the image.
            None if matches!(self.of_image.get(), Some(ListedOfImage::Failed(_))) => Ok(None),
            None => self.of_layer(name).await,
        }
    }

    /// Finds a file in the list of the image.
    pub(super) async fn of_image(&self, name: &FileName) -> Result<Option<Listed>, PublishedError> {
        let asking = self
            .of_image
            .get_or_init(async || match self.list(&FileName::tag(self.image)).await {
                Ok(Some(listed)) => {
                    let by_name = listed.into_iter().map(|file| (file.name.clone(), file));
                    ListedOfImage::Files(by_name.collect())
                }
                Ok(None) => ListedOfImage::Missing,
                Err(error) => ListedOfImage::Failed(Mutex::new(Some(error))),
            });
        match asking.await {
            ListedOfImage::Files(all) => Ok(all.get(&name.to_string()).cloned()),
            ListedOfImage::Missing => Ok(None),
            ListedOfImage::Failed(error) => error
                .lock()
                .expect("no panic while locked")
                .take()
                .map_or(Ok(None), Err),
        }
    }

    /// Finds the index of a layer in the list of the layer.
    pub(super) async fn of_layer(&self, name: &FileName) -> Result<Option<Listed>, PublishedError> {
        let FileName::Index { layer } = name else {
            return Ok(None);
        };
        let listed = self.list(&FileName::tag(layer)).await?;
        let file = name.to_string();
        Ok(listed.into_iter().flatten().find(|listed| listed.name == file))
    }

    async fn list(&self, tag: &str) -> Result<Option<Vec<Listed>>, PublishedError> {
        if self.absence.is_lacking(self.place, tag) {
            return Ok(None);
        }
        let listed = list(self.files, tag).await?;
        if listed.is_none() {
            self.absence.lacks(self.place, tag);
        }
        Ok(listed)
    }
}
