//! Compares the indexes of places with the one that a pass on this host made.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::Mutex;

use bytes::Bytes;

use super::asked::{AskedPlace, PlaceTalk, is_trouble};
use super::lookup::Locations;
use super::{FileName, IndexFile, PublishedError};
use crate::oci::Digest;
use crate::store::{Authority, IndexName, Store, StoreError, read_sealed};

/// An index that is not what a pass over the layer finds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Digest of the layer.
    pub layer: Digest,
    /// The place that has the index.
    pub place: String,
    /// Who vouches for it.
    pub authority: Authority,
    /// What differs.
    pub parts: Vec<String>,
}

/// The result of a comparison with one place.
#[derive(Debug)]
pub struct Compared {
    /// Whether the place or the store has an index to compare with.
    pub is_there: bool,
    /// What differs. The store does not have it any more.
    pub difference: Option<Difference>,
    /// Why the place could not be asked. What the store keeps from there was compared all the same.
    pub trouble: Option<PublishedError>,
}

/// A comparison of the indexes of one image.
pub struct Comparison {
    places: Vec<ComparedPlace>,
    manifest: Digest,
}

struct ComparedPlace {
    asked: Arc<AskedPlace>,
    talk: PlaceTalk,
    /// Why the place is not asked any more.
    lost: Mutex<Option<String>>,
}

impl std::fmt::Debug for Comparison {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Comparison").finish_non_exhaustive()
    }
}

impl Locations {
    /// Returns a comparison of the indexes of the image with this manifest.
    pub fn comparison(&self, manifest: &Digest) -> Comparison {
        let places = self.places().iter().map(|asked| ComparedPlace {
            asked: asked.clone(),
            talk: PlaceTalk::default(),
            lost: Mutex::default(),
        });
        Comparison {
            places: places.collect(),
            manifest: manifest.clone(),
        }
    }
}

impl Comparison {
    /// Compares `own`, the index that a pass on this host made, with the index at each place, and with the one that
    /// the store keeps from there. Removes an index that differs from the store. All places are asked at once. A place
    /// that is in trouble is not asked for the next layers.
    pub async fn compare(&self, store: &Store, own: &IndexFile) -> Vec<Compared> {
        let comparing = self
            .places
            .iter()
            .map(|place| place.compare(store, &self.manifest, own));
        futures::future::join_all(comparing).await
    }
}

impl ComparedPlace {
    async fn compare(&self, store: &Store, manifest: &Digest, own: &IndexFile) -> Compared {
        let asked = &self.asked;
        let name = FileName::Index {
            layer: own.layer.clone(),
        };
        let mut compared = Compared {
            is_there: false,
            difference: None,
            trouble: None,
        };
        let mut parts = Vec::new();
        for found in self.fetch(&name, manifest, own.size).await {
            let decode = |bytes: Bytes| IndexFile::decode(&name.to_string(), &bytes, &own.layer, own.size);
            match found.and_then(decode) {
                Ok(other) => {
                    compared.is_there = true;
                    parts.extend(differing(own, &other));
                }
                Err(error) if is_unasked(&error) => compared.trouble = Some(error),
                Err(error) => {
                    compared.is_there = true;
                    parts.push(error.to_string());
                }
            }
        }
        let authority = asked.authority();
        let index = IndexName::new(&own.layer, authority);
        if let Some(dir) = store.index(&index) {
            for (path, bytes, what) in [(dir.spans(), &own.spans, "spans"), (dir.toc(), &own.toc, "table")] {
                // A stored file that is damaged is made again; it says nothing about the place.
                if let Ok(Some(stored)) = read_sealed(&path) {
                    compared.is_there = true;
                    if stored != *bytes {
                        parts.push(format!("{what} kept from there"));
                    }
                }
            }
            if !parts.is_empty()
                && let Err(error) = dir.forget()
            {
                parts.push(not_removed(&error));
            }
        }
        // A place may have the same index in several lists.
        let mut seen = HashSet::new();
        parts.retain(|part| seen.insert(part.clone()));
        compared.difference = (!parts.is_empty()).then(|| Difference {
            layer: own.layer.clone(),
            place: asked.place().to_string(),
            authority: authority.clone(),
            parts,
        });
        compared
    }

    /// Returns all that the place has of an index, and why it could not be asked.
    async fn fetch(&self, name: &FileName, manifest: &Digest, size: u64) -> Vec<Result<Bytes, PublishedError>> {
        let lost = self.lost.lock().expect("no panic while locked").clone();
        if let Some(reason) = lost {
            let place = self.asked.place().to_string();
            return vec![Err(PublishedError::NotAsked { place, reason })];
        }
        self.asked.forget(name, manifest);
        let cap = IndexFile::longest(size);
        let found = self.asked.fetch_all(name, cap, manifest, &self.talk).await;
        if let Some(error) = found
            .iter()
            .filter_map(|found| found.as_ref().err())
            .find(|e| is_trouble(e))
        {
            *self.lost.lock().expect("no panic while locked") = Some(error.to_string());
        }
        found
    }
}

/// Whether an error says nothing about the index, because the place could not be asked.
fn is_unasked(error: &PublishedError) -> bool {
    matches!(
        error,
        PublishedError::Blob(_)
            | PublishedError::Timeout { .. }
            | PublishedError::NotAsked { .. }
            | PublishedError::NoDirectory { .. }
            | PublishedError::File { .. }
    )
}

fn not_removed(error: &StoreError) -> String {
    format!("and the index kept from there cannot be removed: {error}")
}

/// Names the parts in which two indexes differ.
fn differing(own: &IndexFile, other: &IndexFile) -> Vec<String> {
    let parts = [
        ("diffID", own.diff_id == other.diff_id),
        ("spans", own.spans == other.spans),
        ("table", own.toc == other.toc),
        ("programs", own.programs == other.programs),
    ];
    let differing = parts.into_iter().filter(|(_, same)| !same);
    differing.map(|(name, _)| name.to_owned()).collect()
}
