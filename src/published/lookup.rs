//! Asks all places at once for the files that an image needs.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::asked::{AskedPlace, PlaceTalk};
use super::offers::Offers;
use super::patience::LookupPatience;
use super::{FileName, IndexFile, IndexLocation, PublishedError};
use crate::oci::Digest;
use crate::profile::{LARGEST_FILE, Label};
use crate::registry::RegistryClient;
use crate::store::{Authority, Store};
use crate::task::blocking;

/// Bytes of files that may be in memory before they are believed. With more, hostile places take more memory; with fewer,
/// images of many large layers wait for each other's indexes.
const UNBELIEVED: usize = 128 << 20;
/// The unit in which these bytes are counted.
const UNIT: usize = 1 << 20;
/// What a file counts for at least, which limits the number of files that are fetched at the same time to 16. More
/// connections would slow each other down; with fewer, images of many small layers wait for round trips.
const LEAST_COUNTED: usize = 8 << 20;

/// All places of a process. Without places, nothing is ever asked.
#[derive(Clone, Default)]
pub struct Locations {
    places: Arc<[Arc<AskedPlace>]>,
    patience: LookupPatience,
}

impl fmt::Debug for Locations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&*self.places).finish()
    }
}

/// An index that a place has, checked against its trust.
#[derive(Debug)]
pub struct FoundIndex {
    /// The index.
    pub file: IndexFile,
    /// Who vouches for it.
    pub authority: Authority,
    /// The place that has it.
    pub place: String,
}

/// What the places have said about one image so far.
struct Talks {
    began: Instant,
    patience: LookupPatience,
    talks: Vec<PlaceTalk>,
}

impl Default for Talks {
    fn default() -> Self {
        Self {
            began: Instant::now(),
            patience: LookupPatience::default(),
            talks: Vec::new(),
        }
    }
}

impl Talks {
    /// Returns the bytes that the place which brings most has brought.
    fn came(&self) -> u64 {
        self.talks.iter().map(PlaceTalk::came).max().unwrap_or(0)
    }

    /// Notes that a place is in trouble, if it brings hardly anything. `bandwidth` is what the link to the layers brings.
    fn judge(&self, place: usize, asked: &AskedPlace, bandwidth: Option<f64>) {
        let came = self.talks[place].came();
        if !LookupPatience::is_fast(self.began.elapsed(), came, bandwidth) {
            tracing::warn!(place = %asked.place(), "leaving a slow index location alone for a while");
            asked.is_in_trouble();
        }
    }
}

/// Questions about one image that are being asked. Dropping this ends them.
#[derive(Default)]
pub struct Lookups {
    indexes: Mutex<HashMap<Digest, Offers<FoundIndex>>>,
    profile: Mutex<Option<Offers<Bytes>>>,
    talks: Arc<Talks>,
}

impl fmt::Debug for Lookups {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lookups").finish_non_exhaustive()
    }
}

/// The indexes that the places have of one layer, the preferred one first.
pub struct IndexOffers {
    offers: Option<Offers<FoundIndex>>,
    talks: Arc<Talks>,
}

impl fmt::Debug for IndexOffers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IndexOffers").finish_non_exhaustive()
    }
}

impl Locations {
    /// Returns the places in the order of preference. `client` reaches those that are not directories; `store` remembers
    /// what a place does not have.
    pub fn new(
        places: Vec<IndexLocation>,
        client: &RegistryClient,
        store: &Store,
        patience: LookupPatience,
    ) -> Result<Self, PublishedError> {
        let asked = places
            .into_iter()
            .map(|location| AskedPlace::new(location, client, store).map(Arc::new));
        Ok(Self {
            places: asked.collect::<Result<_, PublishedError>>()?,
            patience,
        })
    }

    /// Who may vouch for an index, best first, each once.
    pub fn authorities(&self) -> Vec<Authority> {
        let mut all: Vec<Authority> = Vec::new();
        for asked in &*self.places {
            if !all.contains(asked.authority()) {
                all.push(asked.authority().clone());
            }
        }
        all
    }

    pub(super) fn places(&self) -> &[Arc<AskedPlace>] {
        &self.places
    }

    /// Whether there is no place to ask.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Makes connections to the places, for questions that are about to be asked. Must be called on the runtime.
    pub fn warm_up(&self) {
        for asked in &*self.places {
            let asked = asked.clone();
            tokio::spawn(async move { asked.warm_up().await });
        }
    }

    /// Asks all places for the indexes of these layers (digest and size of each) of an image, and for the profile with
    /// this label. Must be called on the runtime.
    pub fn ask(&self, manifest: &Digest, layers: Vec<(Digest, u64)>, profile: Option<&Label>) -> Lookups {
        if self.is_empty() {
            return Lookups::default();
        }
        let talks = Arc::new(Talks {
            began: Instant::now(),
            patience: self.patience,
            talks: self.places.iter().map(|_| PlaceTalk::default()).collect(),
        });
        let asking = Asking {
            places: self.places.clone(),
            // A place that hangs takes nothing from the others.
            permits: self
                .places
                .iter()
                .map(|_| Arc::new(Semaphore::new(self.units())))
                .collect(),
            units: self.units(),
            talks: talks.clone(),
            image: manifest.clone(),
        };
        let indexes = layers.into_iter().map(|(layer, size)| {
            let of = layer.clone();
            let found = move |asked: &AskedPlace, name: &FileName, bytes: Bytes| {
                let file = IndexFile::decode(&name.to_string(), &bytes, &of, size);
                file.map(|file| FoundIndex {
                    file,
                    authority: asked.authority().clone(),
                    place: asked.place().to_string(),
                })
            };
            let name = FileName::Index { layer: layer.clone() };
            (layer, asking.ask(&name, IndexFile::longest(size), found))
        });
        let indexes = indexes.collect();
        let profile = profile.map(|label| {
            let name = FileName::Profile {
                manifest: manifest.clone(),
                label: label.clone(),
            };
            asking.ask(&name, LARGEST_FILE, |_, _, bytes| Ok(bytes))
        });
        Lookups {
            indexes: Mutex::new(indexes),
            profile: Mutex::new(profile),
            talks,
        }
    }

    /// Units of memory for each place.
    fn units(&self) -> usize {
        (UNBELIEVED / self.places.len().max(1)).max(LEAST_COUNTED) / UNIT
    }
}

/// Asks the places about one image.
struct Asking {
    places: Arc<[Arc<AskedPlace>]>,
    /// The memory that files of each place may take.
    permits: Vec<Arc<Semaphore>>,
    units: usize,
    talks: Arc<Talks>,
    image: Digest,
}

impl Asking {
    /// Asks all places for a file of at most `cap` bytes. `read` reads it once it is believed.
    fn ask<T: Send + 'static>(
        &self,
        name: &FileName,
        cap: usize,
        read: impl Fn(&AskedPlace, &FileName, Bytes) -> Result<T, PublishedError> + Clone + Send + 'static,
    ) -> Offers<T> {
        let questions = self.places.iter().enumerate().map(|(place, asked)| {
            let (talks, permits) = (self.talks.clone(), self.permits[place].clone());
            let (asked, name, image, read) = (asked.clone(), name.clone(), self.image.clone(), read.clone());
            let units = u32::try_from((cap.max(LEAST_COUNTED) / UNIT).min(self.units)).unwrap_or(u32::MAX);
            let of = asked.clone();
            let answer = async move {
                let _permit = permits.acquire_many(units).await.ok()?;
                let bytes = asked.try_fetch(&name, cap, &image, &talks.talks[place]).await?;
                let place = asked.place().to_string();
                match blocking(move || read(&asked, &name, bytes)).await.ok()? {
                    Ok(read) => Some(read),
                    Err(error) => {
                        tracing::warn!(place, %error, "not using what a location has");
                        None
                    }
                }
            };
            (of, answer.boxed() as BoxFuture<'static, Option<T>>)
        });
        let talks = self.talks.clone();
        Offers::ask(questions.collect(), move |place, asked| {
            tracing::debug!(place = %asked.place(), "not waiting for this index location, a later one has the file");
            talks.judge(place, asked, None);
        })
    }
}

impl Lookups {
    /// Returns the indexes of a layer. The first caller gets them.
    pub fn index(&self, layer: &Digest) -> IndexOffers {
        IndexOffers {
            offers: self.indexes.lock().expect("no panic while locked").remove(layer),
            talks: self.talks.clone(),
        }
    }

    /// Waits for the next profile that a place has. None if there is no other.
    pub async fn profile(&self) -> Option<Bytes> {
        let mut offers = self.profile.lock().expect("no panic while locked").take()?;
        let offered = offers.next().await;
        *self.profile.lock().expect("no panic while locked") = Some(offers);
        offered
    }
}

impl IndexOffers {
    /// Waits for the next index. None if there is no other. Cancel safe.
    pub async fn next(&mut self) -> Option<FoundIndex> {
        self.offers.as_mut()?.next().await
    }

    /// Returns a future that ends when the layer should be streamed, even if there may be an index later. `bandwidth`
    /// returns what the link to the layer brings, in bytes per second.
    pub fn patience<B: Fn() -> Option<f64>>(&self, bandwidth: B) -> impl Future<Output = ()> + use<B> {
        let talks = self.talks.clone();
        async move { talks.patience.wait(talks.began, || talks.came(), bandwidth).await }
    }

    /// Ends the question, because the layer has been streamed meanwhile. Places that have not answered count as in trouble,
    /// unless indexes of other layers come fast enough from there.
    pub fn give_up(self, bandwidth: Option<f64>) {
        let Some(offers) = &self.offers else { return };
        for (place, asked) in offers.silent() {
            self.talks.judge(place, &asked, bandwidth);
        }
    }
}
