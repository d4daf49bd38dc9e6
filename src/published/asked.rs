//! A place, and the way to its files.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::FutureExt as _;
use tokio::sync::{Semaphore, oneshot};

use super::absence::Absence;
use super::lists::{ImageList, Lists};
use super::published_file::LONGEST_SIGNATURE;
use super::repository::Listed;
use super::{FileName, IndexLocation, IndexPlace, PublishedError, Trust, directory};
use crate::blob::BlobError;
use crate::oci::Digest;
use crate::registry::{FileRepository, RegistryClient, Url};
use crate::store::{Authority, Store};

/// Longest time for one file. Streams of bytes that do not move end much earlier.
const LONGEST: Duration = Duration::from_secs(60);
/// Longest time for a file of a directory. A directory may be on another host that does not answer, and then a read never
/// ends. With a longer time, such a directory is noticed later; with a shorter one, a slow directory is not used.
const LONGEST_READ: Duration = Duration::from_secs(15);
/// Reads of one directory at the same time. Each takes a thread, which a directory that hangs keeps for ever.
const READS: usize = 8;

/// A place, and the way to it.
pub(super) struct AskedPlace {
    location: IndexLocation,
    authority: Authority,
    access: PlaceAccess,
    absence: Absence,
}

enum PlaceAccess {
    Directory(PathBuf, Arc<Semaphore>),
    Web(RegistryClient, Url),
    Repository(FileRepository),
}

/// What a place has said about one image so far.
#[derive(Default)]
pub(super) struct PlaceTalk {
    list: ImageList,
    /// Bytes of files that have come.
    came: AtomicU64,
    /// Whether there is no such place. Then no further file of the image is asked for.
    missing: AtomicBool,
}

impl PlaceTalk {
    /// Bytes of files that have come.
    pub(super) fn came(&self) -> u64 {
        self.came.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for AskedPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.location.place)
    }
}

impl AskedPlace {
    /// Returns the way to a place. `client` reaches places that are not directories; `store` remembers what a place does
    /// not have.
    pub(super) fn new(location: IndexLocation, client: &RegistryClient, store: &Store) -> Result<Self, PublishedError> {
        let access = match &location.place {
            IndexPlace::Directory(path) => PlaceAccess::Directory(path.clone(), Arc::new(Semaphore::new(READS))),
            IndexPlace::Web(url) => PlaceAccess::Web(client.clone(), url.clone()),
            IndexPlace::Repository { registry, repository } => {
                let files = client.files(registry, repository)?;
                PlaceAccess::Repository(match &location.trust {
                    Trust::Key(_) => files,
                    Trust::Location => files.protected().map_err(|error| PublishedError::Location {
                        location: location.place.to_string(),
                        reason: format!("trust in a location needs TLS, or a key that signs the indexes: {error}"),
                    })?,
                })
            }
        };
        Ok(Self {
            authority: location.trust.authority(&location.place.to_string()),
            location,
            access,
            absence: Absence::new(store.clone()),
        })
    }

    pub(super) fn place(&self) -> &IndexPlace {
        &self.location.place
    }

    pub(super) fn authority(&self) -> &Authority {
        &self.authority
    }

    /// Makes connections to the place, for questions that are about to be asked.
    pub(super) async fn warm_up(&self) {
        if let PlaceAccess::Repository(files) = &self.access
            && !self.absence.is_failing(self.place())
        {
            files.warm_up().await;
        }
    }

    /// Notes that the place is in trouble, so that it is left alone for a while.
    pub(super) fn is_in_trouble(&self) {
        self.absence.fails(self.place());
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

    /// Returns a file that passed the check of its trust. None if there is none, or if it cannot be had.
    pub(super) async fn try_fetch(
        &self,
        name: &FileName,
        cap: usize,
        image: &Digest,
        talk: &PlaceTalk,
    ) -> Option<Bytes> {
        let place = self.place();
        if talk.missing.load(Ordering::Relaxed) {
            return None;
        }
        if self.absence.is_failing(place) {
            tracing::debug!(%place, "not asking a location that was in trouble a moment ago");
            return None;
        }
        let began = Instant::now();
        match self.fetch(name, cap, image, talk).boxed().await {
            Ok(found) => {
                let bytes = found.as_ref().map(Bytes::len);
                tracing::debug!(%place, %name, ?bytes, took_ms = began.elapsed().as_secs_f64() * 1e3, "asked for a file");
                found
            }
            Err(PublishedError::NoDirectory { .. }) if talk.missing.swap(true, Ordering::Relaxed) => None,
            Err(error) => {
                tracing::warn!(%place, %error, "not using an index location for this file");
                if is_trouble(&error) {
                    self.is_in_trouble();
                }
                None
            }
        }
    }

    /// Returns a file that passed the check of its trust. None if there is none. Takes at most a minute.
    pub(super) async fn fetch(
        &self,
        name: &FileName,
        cap: usize,
        image: &Digest,
        talk: &PlaceTalk,
    ) -> Result<Option<Bytes>, PublishedError> {
        let fetching = async {
            let listed = match &self.access {
                PlaceAccess::Repository(files) => match self.lists(files, image, talk).find(name).await? {
                    None => return Ok(None),
                    listed => listed,
                },
                _ => None,
            };
            self.file(name, cap, listed, talk).await
        };
        self.within(LONGEST, fetching).await
    }

    /// Returns all that readers of the place may find under a name: what the list of the image names, and what the
    /// layer's own list names, if that is something else.
    pub(super) async fn fetch_all(
        &self,
        name: &FileName,
        cap: usize,
        image: &Digest,
        talk: &PlaceTalk,
    ) -> Vec<Result<Bytes, PublishedError>> {
        let PlaceAccess::Repository(files) = &self.access else {
            let fetched = self.fetch(name, cap, image, talk).await.transpose();
            return fetched.into_iter().collect();
        };
        let lists = self.lists(files, image, talk);
        let asking = async { Ok((lists.of_image(name).await?, lists.of_layer(name).await?)) };
        let (of_image, of_layer) = match self.within(LONGEST, asking).await {
            Ok(listed) => listed,
            Err(error) => return vec![Err(error)],
        };
        let same = of_image == of_layer;
        let mut all = Vec::new();
        for listed in of_image.into_iter().chain(of_layer.filter(|_| !same)) {
            let fetching = self.file(name, cap, Some(listed), talk);
            all.extend(self.within(LONGEST, fetching).await.transpose());
        }
        all
    }

    fn lists<'a>(&'a self, files: &'a FileRepository, image: &'a Digest, talk: &'a PlaceTalk) -> Lists<'a> {
        Lists {
            files,
            place: self.place(),
            absence: &self.absence,
            image,
            of_image: &talk.list,
        }
    }

    async fn within<T>(
        &self,
        time: Duration,
        work: impl Future<Output = Result<T, PublishedError>>,
    ) -> Result<T, PublishedError> {
        tokio::time::timeout(time, work).await.unwrap_or_else(|_| {
            Err(PublishedError::Timeout {
                place: self.place().to_string(),
                seconds: time.as_secs(),
            })
        })
    }

    /// Returns a file. In a repository, that is the one that was listed.
    async fn file(
        &self,
        name: &FileName,
        cap: usize,
        listed: Option<Listed>,
        talk: &PlaceTalk,
    ) -> Result<Option<Bytes>, PublishedError> {
        let file = name.to_string();
        let trust = &self.location.trust;
        let protected = !trust.wants_signature();
        let (bytes, signature) = match (&self.access, listed) {
            (PlaceAccess::Directory(path, reads), _) => {
                let reading = read(path.clone(), name.clone(), cap, trust.clone(), reads.clone());
                match self.within(LONGEST_READ, reading).await? {
                    None => return Ok(None),
                    Some(read) => {
                        talk.came.fetch_add(read.0.len() as u64, Ordering::Relaxed);
                        read
                    }
                }
            }
            (PlaceAccess::Web(client, base), _) => {
                if self.absence.is_lacking(self.place(), &file) {
                    return Ok(None);
                }
                let url = |name: &str| {
                    let joined = base.join(name);
                    joined.map_err(|error| PublishedError::format(name, error.to_string()))
                };
                let (file_url, signature_url) = (url(&file)?, url(&name.signature())?);
                let signature = async {
                    match trust.wants_signature() {
                        true => {
                            client
                                .file(&signature_url, LONGEST_SIGNATURE, protected, &talk.came)
                                .await
                        }
                        false => Ok(None),
                    }
                };
                let (bytes, signature) = tokio::join!(client.file(&file_url, cap, protected, &talk.came), signature);
                match bytes? {
                    None => {
                        self.absence.lacks(self.place(), &file);
                        return Ok(None);
                    }
                    Some(bytes) => (bytes, signature?),
                }
            }
            (PlaceAccess::Repository(_), None) => return Ok(None),
            (PlaceAccess::Repository(files), Some(listed)) => {
                let bytes = files.blob(&listed.digest, listed.size, cap, &talk.came).await?;
                (bytes, listed.signature.map(Bytes::from))
            }
        };
        let signature = signature.as_deref().map(String::from_utf8_lossy);
        trust.check(&file, &bytes, signature.as_deref())?;
        Ok(Some(bytes))
    }
}

/// Reads a file of a directory, and its signature if the trust wants one. The read has a thread of its own: if it never
/// ends, nothing but this future waits for it.
async fn read(
    directory: PathBuf,
    name: FileName,
    cap: usize,
    trust: Trust,
    reads: Arc<Semaphore>,
) -> Result<Option<(Bytes, Option<Bytes>)>, PublishedError> {
    let lost = |reason: String| PublishedError::format(&name.to_string(), reason);
    let permit = reads.acquire_owned().await.map_err(|error| lost(error.to_string()))?;
    let (done, answer) = oneshot::channel();
    let wanted = name.clone();
    let reading = move || {
        let _permit = permit;
        // Nobody may be waiting any more.
        let _ = done.send(directory::read(&directory, &wanted, cap, LONGEST_SIGNATURE, &trust));
    };
    let thread = std::thread::Builder::new().name("ocifs-index".to_owned());
    thread.spawn(reading).map_err(|error| lost(error.to_string()))?;
    answer.await.map_err(|_| lost("the read was interrupted".to_owned()))?
}

/// Whether an error says that the next question would fail too.
pub(super) fn is_trouble(error: &PublishedError) -> bool {
    match error {
        PublishedError::Blob(error) => error.is_transient() || is_refusal(error),
        error => matches!(error, PublishedError::Timeout { .. }),
    }
}

/// Whether a registry refuses everything, so that the next question would be refused too.
fn is_refusal(error: &BlobError) -> bool {
    matches!(
        error,
        BlobError::Unauthorized { .. } | BlobError::Denied { .. } | BlobError::Tls { .. }
    )
}
