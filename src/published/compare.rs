//! Compares the indexes of places with the one that a pass on this host made.

use super::lookup::{AskedPlace, ImageList, Locations};
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
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Compared {
    /// The place has no index of the layer.
    Missing,
    /// The indexes are equal, byte for byte.
    Same,
    /// The place's index differs. The store does not have it any more.
    Differs(Difference),
}

impl Locations {
    /// Compares `own`, the index that a pass on this host made, with the index at each place, and with the one that
    /// the store keeps from there. Removes an index that differs from the store. Fails for a place that cannot be asked.
    pub async fn compare(
        &self,
        store: &Store,
        manifest: &Digest,
        own: &IndexFile,
    ) -> Vec<Result<Compared, PublishedError>> {
        let mut all = Vec::new();
        for asked in self.places() {
            all.push(compare(asked, store, manifest, own).await);
        }
        all
    }
}

async fn compare(
    asked: &AskedPlace,
    store: &Store,
    manifest: &Digest,
    own: &IndexFile,
) -> Result<Compared, PublishedError> {
    let name = FileName::Index {
        layer: own.layer.clone(),
    };
    asked.forget(&name, manifest);
    let cap = IndexFile::longest(own.size);
    let fetched = asked.fetch(&name, cap, manifest, &ImageList::default()).await;
    let decoded = fetched.and_then(|bytes| {
        let decode = |bytes: bytes::Bytes| IndexFile::decode(&name.to_string(), &bytes, &own.layer, own.size);
        bytes.map(decode).transpose()
    });
    let mut parts = match &decoded {
        Ok(None) => Vec::new(),
        Ok(Some(other)) => differing(own, other),
        Err(error @ (PublishedError::Blob(_) | PublishedError::Timeout { .. })) => {
            tracing::debug!(%error, "a location cannot be asked");
            return decoded.map(|_| Compared::Missing);
        }
        Err(error) => vec![error.to_string()],
    };
    let authority = asked.authority();
    let index = IndexName::new(&own.layer, authority);
    if let Some(dir) = store.index(&index) {
        for (path, bytes, what) in [(dir.spans(), &own.spans, "spans"), (dir.toc(), &own.toc, "table")] {
            // A stored file that is damaged is made again; it says nothing about the place.
            if read_sealed(&path).is_ok_and(|stored| stored.is_some_and(|stored| stored != *bytes)) {
                parts.push(format!("{what} kept from there"));
            }
        }
        if !parts.is_empty()
            && let Err(error) = dir.forget()
        {
            parts.push(not_removed(&error));
        }
    }
    Ok(match (parts.is_empty(), decoded) {
        (true, Ok(None)) => Compared::Missing,
        (true, _) => Compared::Same,
        (false, _) => Compared::Differs(Difference {
            layer: own.layer.clone(),
            place: asked.place().to_string(),
            authority: authority.clone(),
            parts,
        }),
    })
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
