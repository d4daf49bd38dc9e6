//! Asks all places at once for the files that an image needs.

use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::FuturesOrdered;

use tokio::sync::{OnceCell, Semaphore};
use tokio::task::JoinHandle;

use super::absence::Absence;
use super::repository::{Listed, list};
use super::{FileName, IndexFile, IndexLocation, IndexPlace, PublishedError, directory};
use crate::blob::BlobError;
use crate::oci::Digest;
use crate::profile::{LARGEST_FILE, Label};
use crate::registry::{FileRepository, RegistryClient, Url};
use crate::store::{Authority, Store};
use crate::task::joined;

/// Bytes of files that may be in memory before they are believed. With more, hostile places take more memory; with fewer,
/// images of many large layers wait for each other's indexes.
const UNBELIEVED: usize = 128 << 20;
/// The unit in which these bytes are counted.
const UNIT: usize = 1 << 20;
/// What a file counts for at least, which limits the number of files that are fetched at the same time to 16. More
/// connections would slow each other down; with fewer, images of many small layers wait for round trips.
const LEAST_COUNTED: usize = 8 << 20;
/// Longest signature in bytes. Real ones have about 300.
const LONGEST_SIGNATURE: usize = 4096;
/// Longest time for one file. Streams of bytes that do not move end much earlier.
const LONGEST: Duration = Duration::from_secs(60);

/// All places of a process. Without places, nothing is ever asked.
#[derive(Clone, Default)]
pub struct Locations(Arc<[Arc<AskedPlace>]>);

/// A place, and the way to it.
pub(super) struct AskedPlace {
    location: IndexLocation,
    authority: Authority,
    access: PlaceAccess,
    absence: Absence,
}

enum PlaceAccess {
    Directory(PathBuf),
    Web(RegistryClient, Url),
    Repository(FileRepository),
}

/// What is listed under the tag of the image. Asked for once; all files of the image wait for it.
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

impl fmt::Debug for Locations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let places = self.0.iter().map(|asked| asked.location.place.to_string());
        f.debug_list().entries(places).finish()
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

/// Questions about one image that are being asked. Dropping this ends them.
#[derive(Debug, Default)]
pub struct Lookups {
    indexes: Mutex<HashMap<Digest, Question<FoundIndex>>>,
    profile: Mutex<Option<Question<Bytes>>>,
}

/// A question that is being asked. It ends when this is dropped.
#[derive(Debug)]
struct Question<T>(JoinHandle<Option<T>>);

impl<T: Send + 'static> Question<T> {
    fn ask(answer: impl Future<Output = Option<T>> + Send + 'static) -> Self {
        Self(tokio::spawn(answer))
    }

    async fn answer(mut self) -> Option<T> {
        // A question that panicked has no answer; the panic is logged.
        (&mut self.0).await.unwrap_or(None)
    }
}

impl<T> Drop for Question<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Locations {
    /// Returns the places in the order of preference. `client` reaches those that are not directories; `store` remembers
    /// what a place does not have.
    pub fn new(places: Vec<IndexLocation>, client: &RegistryClient, store: &Store) -> Result<Self, PublishedError> {
        let absence = Absence::new(store.clone());
        let asked = places.into_iter().map(|location| {
            let access = match &location.place {
                IndexPlace::Directory(path) => PlaceAccess::Directory(path.clone()),
                IndexPlace::Web(url) => PlaceAccess::Web(client.clone(), url.clone()),
                IndexPlace::Repository { registry, repository } => {
                    PlaceAccess::Repository(client.files(registry, repository)?)
                }
            };
            Ok(Arc::new(AskedPlace {
                authority: location.trust.authority(&location.place.to_string()),
                location,
                access,
                absence: absence.clone(),
            }))
        });
        Ok(Self(asked.collect::<Result<_, PublishedError>>()?))
    }

    /// Who may vouch for an index, best first, each once.
    pub fn authorities(&self) -> Vec<Authority> {
        let mut all: Vec<Authority> = Vec::new();
        for asked in &*self.0 {
            if !all.contains(&asked.authority) {
                all.push(asked.authority.clone());
            }
        }
        all
    }

    pub(super) fn places(&self) -> impl Iterator<Item = &AskedPlace> {
        self.0.iter().map(|asked| &**asked)
    }

    /// Whether there is no place to ask.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Makes connections to the places, for questions that are about to be asked. Must be called on the runtime.
    pub fn warm_up(&self) {
        for asked in &*self.0 {
            if let PlaceAccess::Repository(files) = &asked.access
                && !asked.absence.is_failing(asked.place())
            {
                let files = files.clone();
                tokio::spawn(async move { files.warm_up().await });
            }
        }
    }

    /// Asks all places for the indexes of these layers (digest and size of each) of an image, and for the profile with
    /// this label. Must be called on the runtime.
    pub fn ask(&self, manifest: &Digest, layers: Vec<(Digest, u64)>, profile: Option<&Label>) -> Lookups {
        let lookups = Lookups::default();
        if self.is_empty() {
            return lookups;
        }
        let places: Vec<(Arc<AskedPlace>, Arc<ImageList>)> =
            self.0.iter().map(|a| (a.clone(), Arc::default())).collect();
        let permits = Arc::new(Semaphore::new(UNBELIEVED / UNIT));
        let image = manifest.clone();
        let ask = |name: FileName, cap: usize| {
            let (places, permits, image) = (places.clone(), permits.clone(), image.clone());
            // All places are asked at once, and the answers are used in the order of the places.
            let mut answers: FuturesOrdered<_> = places
                .into_iter()
                .map(|(asked, images)| {
                    let (name, permits, image) = (name.clone(), permits.clone(), image.clone());
                    async move {
                        let units = u32::try_from(cap.clamp(LEAST_COUNTED, UNBELIEVED) / UNIT).ok()?;
                        let _permit = permits.acquire_many(units).await.ok()?;
                        let bytes = asked.try_fetch(&name, cap, &image, &images).await?;
                        Some((bytes, asked))
                    }
                })
                .collect();
            async move {
                while let Some(answer) = answers.next().await {
                    if answer.is_some() {
                        return answer;
                    }
                }
                None
            }
        };
        let indexes = layers.into_iter().map(|(layer, size)| {
            let name = FileName::Index { layer: layer.clone() };
            let fetched = ask(name.clone(), IndexFile::longest(size));
            let of = layer.clone();
            let question = Question::ask(async move {
                let (bytes, asked) = fetched.await?;
                let decoded =
                    tokio::task::spawn_blocking(move || IndexFile::decode(&name.to_string(), &bytes, &of, size));
                let place = asked.location.place.to_string();
                match joined(decoded).await.ok()? {
                    Ok(file) => Some(FoundIndex {
                        file,
                        authority: asked.authority.clone(),
                        place,
                    }),
                    Err(error) => {
                        tracing::warn!(place, %error, "not using an index, streaming the layer");
                        None
                    }
                }
            });
            (layer, question)
        });
        let profile = profile.map(|label| {
            let name = FileName::Profile {
                manifest: manifest.clone(),
                label: label.clone(),
            };
            let fetched = ask(name, LARGEST_FILE);
            Question::ask(async move { fetched.await.map(|(bytes, _)| bytes) })
        });
        Lookups {
            indexes: Mutex::new(indexes.collect()),
            profile: Mutex::new(profile),
        }
    }
}

impl Lookups {
    /// Waits for the index of a layer. The first caller gets the answer.
    pub async fn index(&self, layer: &Digest) -> Option<FoundIndex> {
        let question = self.indexes.lock().expect("no panic while locked").remove(layer);
        question?.answer().await
    }

    /// Waits for the profile. The first caller gets the answer.
    pub async fn profile(&self) -> Option<Bytes> {
        let question = self.profile.lock().expect("no panic while locked").take();
        question?.answer().await
    }
}

impl AskedPlace {
    /// Returns a file that passed the check of its trust. None if there is none, or if it cannot be had.
    async fn try_fetch(&self, name: &FileName, cap: usize, image: &Digest, images: &ImageList) -> Option<Bytes> {
        let place = &self.location.place;
        if self.absence.is_failing(place) {
            tracing::debug!(%place, "not asking a location that was in trouble a moment ago");
            return None;
        }
        let began = Instant::now();
        let fetching = tokio::time::timeout(LONGEST, self.fetch(name, cap, image, images));
        let fetched = fetching.await.unwrap_or_else(|_| {
            Err(PublishedError::Timeout {
                place: place.to_string(),
                seconds: LONGEST.as_secs(),
            })
        });
        match fetched {
            Ok(found) => {
                let bytes = found.as_ref().map(Bytes::len);
                tracing::debug!(%place, %name, ?bytes, took_ms = began.elapsed().as_secs_f64() * 1e3, "asked for a file");
                found
            }
            Err(error) => {
                tracing::warn!(%place, %error, "not using an index location for this file");
                let trouble = match &error {
                    PublishedError::Blob(error) => error.is_transient() || is_refusal(error),
                    error => matches!(error, PublishedError::Timeout { .. }),
                };
                if trouble {
                    self.absence.fails(place);
                }
                None
            }
        }
    }

    pub(super) fn place(&self) -> &IndexPlace {
        &self.location.place
    }

    pub(super) fn authority(&self) -> &Authority {
        &self.authority
    }

    /// Forgets that the place did not have a file, and that it was in trouble.
    pub(super) fn forget(&self, name: &FileName, image: &Digest) {
        let mut files = vec![name.to_string(), FileName::tag(image)];
        if let FileName::Index { layer } = name {
            files.push(FileName::tag(layer));
        }
        for file in files {
            self.absence.forget(self.place(), &file);
        }
    }

    /// Returns a file that passed the check of its trust. None if there is none.
    pub(super) async fn fetch(
        &self,
        name: &FileName,
        cap: usize,
        image: &Digest,
        images: &ImageList,
    ) -> Result<Option<Bytes>, PublishedError> {
        let file = name.to_string();
        let trust = &self.location.trust;
        let (bytes, signature) = match &self.access {
            PlaceAccess::Directory(path) => {
                let (path, trust, signature) = (path.clone(), trust.clone(), name.signature());
                let name = file.clone();
                let reading = tokio::task::spawn_blocking(move || {
                    let Some(bytes) = directory::read(&path, &name, cap, &trust)? else {
                        return Ok::<_, PublishedError>(None);
                    };
                    let signature = match trust.wants_signature() {
                        true => directory::read(&path, &signature, LONGEST_SIGNATURE, &trust)?,
                        false => None,
                    };
                    Ok(Some((bytes, signature)))
                });
                let read = joined(reading).await;
                let read = read.map_err(|error| PublishedError::format(&file, error.to_string()))?;
                match read? {
                    None => return Ok(None),
                    Some(read) => read,
                }
            }
            PlaceAccess::Web(client, base) => {
                if self.absence.is_lacking(&self.location.place, &file) {
                    return Ok(None);
                }
                let url = |name: &str| {
                    let joined = base.join(name);
                    joined.map_err(|error| PublishedError::format(name, error.to_string()))
                };
                let (file_url, signature_url) = (url(&file)?, url(&name.signature())?);
                let signature = async {
                    match trust.wants_signature() {
                        true => client.file(&signature_url, LONGEST_SIGNATURE).await,
                        false => Ok(None),
                    }
                };
                let (bytes, signature) = tokio::join!(client.file(&file_url, cap), signature);
                match bytes? {
                    None => {
                        self.absence.lacks(&self.location.place, &file);
                        return Ok(None);
                    }
                    Some(bytes) => (bytes, signature?),
                }
            }
            PlaceAccess::Repository(files) => match self.listed(files, name, image, images).await? {
                None => return Ok(None),
                Some(listed) => {
                    let bytes = files.blob(&listed.digest, listed.size, cap).await?;
                    (bytes, listed.signature.map(Bytes::from))
                }
            },
        };
        let signature = signature.as_deref().map(String::from_utf8_lossy);
        trust.check(&file, &bytes, signature.as_deref())?;
        Ok(Some(bytes))
    }

    /// Finds a file in the list of the image, or in the list of its layer.
    async fn listed(
        &self,
        files: &FileRepository,
        name: &FileName,
        image: &Digest,
        images: &ImageList,
    ) -> Result<Option<Listed>, PublishedError> {
        let asking = images.get_or_init(async || match self.list(files, &FileName::tag(image)).await {
            Ok(Some(listed)) => {
                let by_name = listed.into_iter().map(|file| (file.name.clone(), file));
                ListedOfImage::Files(by_name.collect())
            }
            Ok(None) => ListedOfImage::Missing,
            Err(error) => ListedOfImage::Failed(Mutex::new(Some(error))),
        });
        let file = name.to_string();
        match asking.await {
            ListedOfImage::Files(all) => {
                if let Some(listed) = all.get(&file) {
                    return Ok(Some(listed.clone()));
                }
            }
            ListedOfImage::Missing => {}
            ListedOfImage::Failed(error) => {
                return error
                    .lock()
                    .expect("no panic while locked")
                    .take()
                    .map_or(Ok(None), Err);
            }
        }
        let FileName::Index { layer } = name else {
            return Ok(None);
        };
        let listed = self.list(files, &FileName::tag(layer)).await?;
        Ok(listed.into_iter().flatten().find(|listed| listed.name == file))
    }

    async fn list(&self, files: &FileRepository, tag: &str) -> Result<Option<Vec<Listed>>, PublishedError> {
        let place = &self.location.place;
        if self.absence.is_lacking(place, tag) {
            return Ok(None);
        }
        let listed = list(files, tag).await?;
        if listed.is_none() {
            self.absence.lacks(place, tag);
        }
        Ok(listed)
    }
}

/// Whether a registry refuses everything, so that the next question would be refused too.
fn is_refusal(error: &BlobError) -> bool {
    matches!(
        error,
        BlobError::Unauthorized { .. } | BlobError::Denied { .. } | BlobError::Tls { .. }
    )
}
