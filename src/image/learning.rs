//! Profiles in the store: finding the one for an image, and learning from the start that is running.

use std::io::{self, Write as _};
use std::sync::Arc;

use super::Image;
use super::prefetch::Layers;
use crate::oci::Digest;
use crate::os::read_regular;
use crate::profile::{LARGEST_FILE, Label, Profile, ProfileError, ProfiledLayer, Recorder};
use crate::resolve::ResolvedImage;
use crate::store::{Durability, Store, StoreError};

/// Number of profiles of other images of a repository that are considered, newest first.
const RELATIVES: usize = 8;

/// The profile of an image's program, and its place in the store.
#[derive(Debug, Clone)]
pub struct Learning {
    store: Store,
    repository: String,
    profile: Profile,
}

impl Learning {
    /// Finds the known profile, from earlier runs of this image. If there are none, the profile comes from runs of
    /// another image of the repository, for the layers that both share. Reads files.
    pub fn find(store: &Store, image: &ResolvedImage, repository: &str, label: &Label) -> Self {
        let manifest = &image.manifest_document.digest;
        let layers = image.layers().iter().zip(image.diff_ids());
        let layers = layers.map(|(descriptor, diff_id)| ProfiledLayer {
            digest: descriptor.digest.clone(),
            diff_id: diff_id.clone(),
        });
        let mut profile = Profile::new(manifest.clone(), label.clone(), layers.collect());
        match stored(store, manifest, label) {
            Some(known) if known.layers == profile.layers => profile = known,
            _ => profile.learn_from_relatives(store, repository),
        }
        Self {
            store: store.clone(),
            repository: repository.to_owned(),
            profile,
        }
    }

    /// The known profile. A profile from another image counts no runs. The profile is empty if nothing is known.
    pub fn profile(&self) -> &Profile {
        &self.profile
    }

    /// Reads the profile of the image from the store again. A location may have had one meanwhile. Reads a file.
    pub fn again(&self) -> Option<Profile> {
        stored(&self.store, &self.profile.manifest, &self.profile.label)
    }

    /// Waits until the start of the program is over, then learns from the reads of the image and keeps the profile.
    /// Learns also if the future is dropped earlier.
    pub async fn listen(self, image: &Image, recorder: Arc<Recorder>) {
        let kept = Kept {
            learning: self,
            layers: image.layers.clone(),
            recorder,
        };
        kept.recorder.over().await;
        // Learning writes files.
        let _ = tokio::task::spawn_blocking(move || drop(kept)).await;
    }

    /// Keeps a profile from elsewhere in place of the known one: all of it, or its part about layers that this image
    /// has too. Returns the bytes of content that the new profile names. If there are none, changes nothing.
    pub fn import(&mut self, other: &Profile) -> Result<u64, StoreError> {
        let mut profile = Profile::new(
            self.profile.manifest.clone(),
            self.profile.label.clone(),
            self.profile.layers.clone(),
        );
        profile.adopt(other);
        let bytes = profile.bytes();
        if bytes > 0 {
            self.profile = profile;
            self.save()?;
        }
        Ok(bytes)
    }

    fn save(&self) -> Result<(), StoreError> {
        let Profile { manifest, label, .. } = &self.profile;
        let path = self
            .store
            .profile(manifest, label.as_str())
            .ok_or(StoreError::Unavailable)?;
        let encoded = self.profile.encode();
        self.store
            .publish(&path, Durability::Lazy, |file| file.write_all(&encoded))?;
        self.store.mark_profile(&self.repository, manifest, label.as_str())
    }
}

/// Takes a profile that somebody else has made of this image and label. Keeps it, unless the store has a profile of the
/// image. None if it says nothing about the image's layers.
pub(super) fn adopt(
    store: &Store,
    image: &ResolvedImage,
    repository: &str,
    label: &Label,
    bytes: &[u8],
) -> Option<Profile> {
    let published = Profile::decode_of(bytes, &image.manifest_document.digest, label).map_err(|error| {
        tracing::warn!(%error, "not using a profile from a location");
    });
    let mut learning = Learning::find(store, image, repository, label);
    match learning.import(&published.ok()?) {
        Ok(0) => return None,
        Ok(_) => {}
        Err(error) if error.is_by_design() => {}
        Err(error) => tracing::warn!(%error, "cannot keep a profile from a location"),
    }
    Some(learning.profile)
}

/// Learns from the recorded reads when it is dropped: at the end of the start, or earlier at the end of the mount.
struct Kept {
    learning: Learning,
    layers: Arc<Layers>,
    recorder: Arc<Recorder>,
}

impl Drop for Kept {
    fn drop(&mut self) {
        let run = self.recorder.finish();
        if run.is_empty() {
            return;
        }
        let learning = &mut self.learning;
        let profile = &mut learning.profile;
        match read(&learning.store, &profile.manifest, &profile.label) {
            // Another mount of the image may have learned meanwhile.
            Ok(Some(known)) if known.layers == profile.layers => *profile = known,
            Err(error @ ProfileError::Version { .. }) => {
                tracing::info!(%error, "leaving the stored profile as it is");
                return;
            }
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "replacing a stored profile that cannot be used"),
        }
        *profile = self.layers.translated(profile);
        profile.learn(&run);
        match learning.save() {
            Ok(()) => {}
            Err(error) if error.is_by_design() => {}
            Err(error) => tracing::warn!(%error, "cannot keep the profile of this start"),
        }
    }
}

impl Profile {
    fn learn_from_relatives(&mut self, store: &Store, repository: &str) {
        let relatives = store.profiles_of(repository, self.label.as_str(), RELATIVES);
        let known = relatives
            .iter()
            .filter_map(|manifest| stored(store, manifest, &self.label));
        let adopted = known.map(|relative| {
            let mut profile = Self::new(self.manifest.clone(), self.label.clone(), self.layers.clone());
            profile.adopt(&relative);
            profile
        });
        // Of the profiles with the most touches, the newest.
        let best = adopted.rev().max_by_key(|profile| profile.touches.len());
        if let Some(best) = best {
            *self = best;
        }
    }
}

/// Reads a profile from the store. Returns `None` if there is none, or if this version cannot read it.
pub fn stored(store: &Store, manifest: &Digest, label: &Label) -> Option<Profile> {
    read(store, manifest, label).unwrap_or_else(|error| {
        tracing::warn!(%manifest, label = label.as_str(), %error, "cannot use a stored profile");
        None
    })
}

fn read(store: &Store, manifest: &Digest, label: &Label) -> Result<Option<Profile>, ProfileError> {
    let Some(path) = store.profile(manifest, label.as_str()) else {
        return Ok(None);
    };
    let bytes = match read_regular(&path, LARGEST_FILE as u64) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        bytes => bytes?,
    };
    Profile::decode_of(&bytes, manifest, label).map(Some)
}
