//! Small files in registries and on web servers: what is published beside images.
//!
//! In a registry, a file is a blob, and a manifest under a tag says which blobs there are. On a web server, a file is what
//! its URL answers. Files are read whole, so each reader says how long a file may be.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use reqwest::header::{CONTENT_TYPE, HeaderValue, LOCATION};
use reqwest::{StatusCode, Url};

use super::access::AuthorisedReply;
use super::blob::{ReadKind, RegistryBlob};
use super::client::{RegistryClient, refusal};
use super::elsewhere::Elsewhere;
use super::endpoint::{Endpoint, Repository, is_loopback};
use super::host_settings::HostSettings;
use super::places::{PlaceTurn, Places, Sought};
use super::transport::{Act, Ask};
use crate::blob::{BlobError, BlobSource as _, Document, Verdict};
use crate::oci::{Digest, ReferenceSelector};

/// Bytes of a blob for each part that is read at the same time. A new connection is slow at first, so several connections
/// bring a file sooner than one. With a smaller value, small files cost more requests.
const STRIPE: u64 = 64 << 10;
/// Most parts in which a blob is read. More parts cost more connections.
const STRIPES: u64 = 8;
/// Size in bytes from which on one part has nearly the whole blob, because one connection comes to fill the link. Several
/// connections that fill it together learn that each has a small part of it, and the reads that use them next are slow for
/// some seconds. With a smaller size, files come later; with a larger one, more reads are slow.
const LONG: u64 = 4 << 20;
/// Bytes of each other part of such a blob. They come while the connection of the long part is still slow. With more, they
/// fill the link together with the long part.
const SHORT_PART: u64 = 96 << 10;

/// A repository of files.
#[derive(Debug, Clone)]
pub struct FileRepository {
    client: RegistryClient,
    /// Where files are read. They are written to the last place, the registry itself.
    places: Arc<Places>,
    /// Whether its manifests are believed because of where they come from.
    protected: bool,
}

impl RegistryClient {
    /// Returns a repository of files. Fails if a name is invalid.
    pub fn files(&self, registry: &str, repository: &str) -> Result<FileRepository, BlobError> {
        Ok(FileRepository {
            places: Arc::new(self.places(registry, repository, false)?),
            client: self.clone(),
            protected: false,
        })
    }

    /// Returns the file at a URL of a web server. None if there is no file. Fails if it is longer than `cap` bytes. Counts
    /// its bytes in `came` as they come. A `protected` file comes with TLS alone, wherever redirects lead.
    pub async fn file(
        &self,
        url: &Url,
        cap: usize,
        protected: bool,
        came: &AtomicU64,
    ) -> Result<Option<Bytes>, BlobError> {
        let there = Repository {
            endpoint: Endpoint::at(url, &self.transport().config().plain_http, HostSettings::default()),
            name: String::new(),
        };
        let there = Places::only(Arc::new(there));
        let what = format!("the file {url}");
        let ask = Ask {
            protected,
            ..Ask::get(url.clone())
        };
        let attempt = async |turn: PlaceTurn| {
            let reply = self.send(&ask, turn.wait).await?;
            match reply.status() {
                StatusCode::OK => Ok(Some(reply)),
                // Object stores answer 403 for a file that is not there, unless the reader may list all files.
                StatusCode::NOT_FOUND | StatusCode::GONE | StatusCode::FORBIDDEN => Ok(None),
                _ => Err(refusal(reply, &what, "without a login").await),
            }
        };
        let wanted = Sought::Tag(String::new());
        let answer = self.persist(&there, &wanted, &what, &mut self.retry(), attempt).await?;
        let Some(mut reply) = answer else { return Ok(None) };
        // A body may take its time, as long as it moves.
        match reply.whole_counted(cap, came).await? {
            Some(bytes) => Ok(Some(bytes)),
            None => Err(too_long(&reply.host(), &what, cap)),
        }
    }
}

fn too_long(host: &str, what: &str, cap: usize) -> BlobError {
    BlobError::Protocol {
        host: host.to_owned(),
        what: what.to_owned(),
        detail: format!("more than {cap} bytes, which no such file has"),
        transient: false,
    }
}

impl FileRepository {
    /// Returns this repository for a caller that believes its manifests because of where they come from: they come with
    /// TLS, or from this host. Fails if neither is possible. Blobs are checked against the manifests.
    ///
    /// No mirror is asked then.
    pub fn protected(self) -> Result<Self, BlobError> {
        let endpoint = &self.places.origin().endpoint;
        if endpoint.is_plain() && !endpoint.base().host_str().is_some_and(is_loopback) {
            return Err(BlobError::Invalid {
                what: format!("registry {}", endpoint.name()),
                reason: "it is used without TLS, so anybody on the way could change what it sends".to_owned(),
            });
        }
        Ok(Self {
            protected: true,
            ..self.without_mirrors()
        })
    }

    /// Returns this repository for a caller that writes to it, and has to read what it wrote.
    pub fn without_mirrors(self) -> Self {
        Self {
            places: Arc::new(Places::only(Arc::clone(self.places.origin()))),
            ..self
        }
    }

    /// Makes the connections and the login ready that the next requests need. What goes wrong here is reported by those
    /// requests.
    pub async fn warm_up(&self) {
        let repository = self.places.at(self.places.first_to_ask(&Sought::Tag(String::new())));
        let ask = Ask::get(repository.endpoint.base().clone());
        let wait = self.client.retry().attempt_wait();
        let greetings = (0..STRIPES).map(|_| self.client.request(repository, &ask, wait));
        for greeted in futures::future::join_all(greetings).await {
            match greeted {
                // The connection can be used again once the body has been read.
                Ok(mut answer) => drop(answer.reply.error_body().await),
                Err(error) => tracing::debug!(%repository, %error, "cannot prepare a connection"),
            }
        }
    }

    /// Returns the manifest under a tag, or none if there is no such tag.
    pub async fn manifest(&self, tag: &str) -> Result<Option<Document>, BlobError> {
        match self.client.manifest_of_tag(&self.places, tag, self.protected).await {
            Err(BlobError::NotFound { .. }) => Ok(None),
            other => other.map(Some),
        }
    }

    /// Returns a blob, whose bytes hash to its digest. Fails if `size` is more than `cap`. Counts its bytes in `came` as
    /// they come.
    pub async fn blob(&self, digest: &Digest, size: u64, cap: usize, came: &AtomicU64) -> Result<Bytes, BlobError> {
        let what = format!("blob {digest} of {}", self.places.name());
        if size > cap as u64 {
            return Err(too_long(self.places.origin().endpoint.name(), &what, cap));
        }
        let blob = RegistryBlob::new(
            self.client.clone(),
            Arc::clone(&self.places),
            digest.clone(),
            size,
            None,
            ReadKind::Unchecked,
            Elsewhere::default(),
        );
        loop {
            let bytes = read_in_parts(&blob, came).await?;
            let Err(actual) = digest.verify(&bytes) else {
                return Ok(bytes.into());
            };
            if !blob.judged(Verdict::Wrong) {
                return Err(BlobError::Corrupt {
                    what,
                    expected: digest.to_string(),
                    actual: actual.to_string(),
                });
            }
        }
    }

    /// Uploads a blob, unless the repository has it. Returns whether it was uploaded.
    pub async fn put_blob(&self, digest: &Digest, bytes: Bytes) -> Result<bool, BlobError> {
        let what = format!("upload of blob {digest} to {}", self.places.origin());
        let attempt = |wait| self.put_blob_once(digest, bytes.clone(), &what, wait);
        self.put(&what, attempt).await
    }

    async fn put_blob_once(
        &self,
        digest: &Digest,
        bytes: Bytes,
        what: &str,
        wait: Duration,
    ) -> Result<bool, BlobError> {
        let registry = self.places.origin();
        let head = Ask::new(Act::Head, registry.blob_url(digest));
        if self.client.request(registry, &head, wait).await?.reply.status() == StatusCode::OK {
            return Ok(false);
        }
        let begin = Ask::new(Act::Post, registry.uploads_url());
        let AuthorisedReply { reply, tried } = self.client.request(registry, &begin, wait).await?;
        if reply.status() != StatusCode::ACCEPTED {
            return Err(refusal(reply, what, &tried).await);
        }
        let location = reply.header(LOCATION).map(str::to_owned);
        let target = location.and_then(|location| reply.url.join(&location).ok());
        let Some(mut target) = target else {
            return Err(BlobError::Protocol {
                host: reply.host(),
                what: what.to_owned(),
                detail: "it does not say where to send the bytes".to_owned(),
                transient: false,
            });
        };
        target.query_pairs_mut().append_pair("digest", &digest.to_string());
        let mut put = Ask::new(Act::Put(bytes), target);
        let octets = HeaderValue::from_static("application/octet-stream");
        put.headers.insert(CONTENT_TYPE, octets);
        // The place may be on another host, which must not see the login.
        let sent = if put.url.origin() == registry.endpoint.base().origin() || reply.url.origin() == put.url.origin() {
            self.client.request(registry, &put, self.client.patience()).await?
        } else {
            self.client
                .request_elsewhere(registry, &put, self.client.patience())
                .await?
        };
        match sent.reply.status() {
            StatusCode::CREATED | StatusCode::NO_CONTENT => Ok(true),
            _ => Err(refusal(sent.reply, what, &sent.tried).await),
        }
    }

    /// Uploads a manifest under a tag.
    pub async fn put_manifest(&self, tag: &str, media_type: &str, bytes: Bytes) -> Result<(), BlobError> {
        let selector = ReferenceSelector::tag(tag);
        let what = format!("upload of manifest {}:{tag}", self.places.origin());
        let mut put = Ask::new(Act::Put(bytes), self.places.origin().manifest_url(&selector)?);
        let media_type = HeaderValue::from_str(media_type).map_err(|_| BlobError::Invalid {
            what: what.clone(),
            reason: "its media type is no header value".to_owned(),
        })?;
        put.headers.insert(CONTENT_TYPE, media_type);
        let attempt = async |wait| {
            let registry = self.places.origin();
            let AuthorisedReply { reply, tried } = self.client.request(registry, &put, wait).await?;
            match reply.status() {
                StatusCode::CREATED | StatusCode::OK | StatusCode::ACCEPTED => Ok(()),
                _ => Err(refusal(reply, &what, &tried).await),
            }
        };
        self.put(&what, attempt).await
    }

    /// Makes attempts to write to the registry itself.
    async fn put<T, F>(&self, what: &str, mut attempt: impl FnMut(Duration) -> F) -> Result<T, BlobError>
    where
        F: Future<Output = Result<T, BlobError>>,
    {
        let registry = Places::only(Arc::clone(self.places.origin()));
        let (mut retry, wanted) = (self.client.retry(), Sought::Tag(String::new()));
        let attempt = |turn: PlaceTurn| attempt(turn.wait);
        self.client.persist(&registry, &wanted, what, &mut retry, attempt).await
    }
}

/// Reads a blob in parts at the same time. Counts its bytes in `came` as they come.
async fn read_in_parts(blob: &RegistryBlob, came: &AtomicU64) -> Result<Vec<u8>, BlobError> {
    let size = blob.size();
    let mut file = vec![0; size as usize];
    let mut rest = &mut file[..];
    let mut at = 0;
    let read = async |start: u64, part: &mut [u8]| {
        let mut stream = blob.read(start..start + part.len() as u64).await?;
        let mut left = part;
        while let Some(bytes) = stream.next().await {
            let bytes = bytes?;
            came.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            // A source gives no more bytes than it was asked for.
            if let Some(next) = left.split_off_mut(..bytes.len()) {
                next.copy_from_slice(&bytes);
            }
        }
        Ok::<_, BlobError>(())
    };
    let mut parts = Vec::new();
    for length in part_lengths(size) {
        let part;
        (part, rest) = rest.split_at_mut(length as usize);
        parts.push(read(at, part));
        at += length;
    }
    futures::future::try_join_all(parts).await?;
    Ok(file)
}

/// Returns the lengths of the parts in which a blob of `size` bytes is read, in order.
fn part_lengths(size: u64) -> Vec<u64> {
    if size >= LONG {
        let mut lengths = vec![SHORT_PART; STRIPES as usize];
        lengths[0] = size - SHORT_PART * (STRIPES - 1);
        return lengths;
    }
    let stripes = (size / STRIPE).clamp(1, STRIPES);
    let length = size.div_ceil(stripes);
    (0..stripes)
        .map(|n| length.min(size.saturating_sub(n * length)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_a_blob() {
        for size in [
            0,
            1,
            STRIPE - 1,
            3 * STRIPE + 1,
            1 << 20,
            LONG - 1,
            LONG,
            LONG + 1,
            200 << 20,
        ] {
            let lengths = part_lengths(size);
            assert_eq!(lengths.iter().sum::<u64>(), size);
            assert!((1..=STRIPES).contains(&(lengths.len() as u64)));
        }
        assert_eq!(part_lengths(STRIPE).len(), 1);
        assert_eq!(part_lengths(LONG - 1)[0], LONG / STRIPES);
        assert!(part_lengths(LONG)[0] > LONG * 4 / 5);
    }
}
