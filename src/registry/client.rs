//! The client shared by a process: one set of pools, tokens, redirects and measurements for all its images.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use reqwest::StatusCode;
use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};

use super::access::Answer;
use super::auth::Auth;
use super::config::RegistryConfig;
use super::encoding::{self, Encoding};
use super::endpoint::{Endpoint, Repository};
use super::failure::{self, Context};
use super::redirects::Redirects;
use super::source::RegistrySource;
use super::stats::HostStats;
use super::transport::{Ask, Reply, Transport, authority};
use crate::blob::retry::{Retry, RetryPolicy};
use crate::blob::{BlobError, Document};
use crate::oci::{Digest, ReferenceSelector};

/// Largest manifest or image index: the size the distribution specification asks registries to accept.
pub const MAX_MANIFEST: usize = 4 << 20;
/// Largest image config. Histories of generated images pass 1 MiB.
pub const MAX_CONFIG: usize = 16 << 20;
/// Tags listed in the hint of a missing tag.
const HINTED_TAGS: usize = 20;

/// Both families of index and manifest; without one of them some registries convert to the old schema 1 or answer 404.
const ACCEPT_MANIFESTS: &str = "application/vnd.oci.image.index.v1+json, \
    application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.docker.distribution.manifest.v2+json, */*";

/// A registry client; clones share everything.
#[derive(Debug, Clone)]
pub struct RegistryClient {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    transport: Transport,
    auth: Auth,
    redirects: Redirects,
}

/// What a registry says about the tags of a repository.
enum Tags {
    Listed(Vec<String>),
    /// It does not show them: 401, 403 or 404.
    Refused,
    /// It did not say in time, or nothing that makes sense.
    Unknown,
}

impl RegistryClient {
    /// Builds a client. Reads the configured certificate files, but nothing else, and sends no request.
    pub fn new(config: RegistryConfig) -> Result<Self, BlobError> {
        Ok(Self {
            inner: Arc::new(Inner {
                transport: Transport::new(config)?,
                auth: Auth::new(),
                redirects: Redirects::new(),
            }),
        })
    }

    /// The image `selector` of a repository; `registry` is a host as in references, such as `docker.io` or `localhost:5000`.
    pub fn source(
        &self,
        registry: &str,
        repository: &str,
        selector: ReferenceSelector,
    ) -> Result<RegistrySource, BlobError> {
        RegistrySource::new(self.clone(), self.repository(registry, repository)?, selector)
    }

    /// A repository as this client would address it.
    pub(super) fn repository(&self, registry: &str, repository: &str) -> Result<Repository, BlobError> {
        let endpoint = Endpoint::new(registry, &self.inner.transport.config().plain_http)?;
        self.inner.transport.meet(&endpoint);
        Repository::new(endpoint, repository)
    }

    /// What was learned about the hosts spoken to: registries, token servers and storage they redirect to.
    pub fn stats(&self) -> Vec<HostStats> {
        self.inner.transport.stats()
    }

    pub(super) fn transport(&self) -> &Transport {
        &self.inner.transport
    }

    pub(super) fn auth(&self) -> &Auth {
        &self.inner.auth
    }

    pub(super) fn retry(&self) -> Retry {
        Retry::new(RetryPolicy {
            deadline: self.inner.transport.config().timeout,
        })
    }

    /// Makes attempts at something (`what`) of a repository until one succeeds or `retry` gives up. Each is told how long it may
    /// wait for the head of an answer. It may consist of several exchanges (redirect, challenge, token) and a body that drips
    /// just fast enough to pass as alive; together they end at the deadline.
    pub(super) async fn persist<T, F>(
        &self,
        repository: &Repository,
        what: &str,
        retry: &mut Retry,
        mut attempt: impl FnMut(Duration) -> F,
    ) -> Result<T, BlobError>
    where
        F: Future<Output = Result<T, BlobError>>,
    {
        loop {
            let result = match tokio::time::timeout(retry.remaining(), attempt(retry.attempt_wait())).await {
                Ok(result) => result,
                Err(_) => Err(BlobError::Timeout {
                    what: format!("{} ({what})", repository.endpoint.name()),
                    seconds: self.inner.transport.config().timeout.as_secs().max(1),
                }),
            };
            match result {
                Ok(value) => return Ok(value),
                Err(error) => self.pause(repository, what, retry, error).await?,
            }
        }
    }

    /// Sleeps until the attempt after one that failed, or gives up.
    pub(super) async fn pause(
        &self,
        repository: &Repository,
        what: &str,
        retry: &mut Retry,
        error: BlobError,
    ) -> Result<(), BlobError> {
        tracing::debug!(what, %error, "interrupted");
        // A host that has never answered is not worth waiting for.
        let meter = self.inner.transport.meter(repository.endpoint.base());
        let delay = retry.after(error, meter.reached())?;
        meter.rest(delay);
        tokio::time::sleep(delay).await;
        Ok(())
    }

    /// The document a selector names; verified.
    pub(super) async fn manifest(
        &self,
        repository: &Repository,
        selector: &ReferenceSelector,
    ) -> Result<Document, BlobError> {
        let mut ask = Ask::get(repository.manifest_url(selector)?);
        ask.headers.insert(ACCEPT, HeaderValue::from_static(ACCEPT_MANIFESTS));
        let what = format!("manifest {}{selector}", repository.name);
        let wanted = match selector {
            ReferenceSelector::Tag { digest, .. } => digest.as_ref(),
            ReferenceSelector::Digest(digest) => Some(digest),
        };
        match self.document(repository, &ask, &what, MAX_MANIFEST, wanted).await {
            Err(BlobError::NotFound { what, hint }) => {
                let hint = self.hint(repository, selector, hint).await;
                Err(BlobError::NotFound { what, hint })
            }
            other => other,
        }
    }

    /// A small blob read whole; verified.
    pub(super) async fn small_blob(&self, repository: &Repository, digest: &Digest) -> Result<Document, BlobError> {
        let ask = Ask::get(repository.blob_url(digest));
        let what = format!("blob {digest} of {}", repository.name);
        self.document(repository, &ask, &what, MAX_CONFIG, Some(digest)).await
    }

    async fn document(
        &self,
        repository: &Repository,
        ask: &Ask,
        what: &str,
        cap: usize,
        wanted: Option<&Digest>,
    ) -> Result<Document, BlobError> {
        let attempt = |wait| self.document_once(repository, ask, what, cap, wanted, wait);
        self.persist(repository, what, &mut self.retry(), attempt).await
    }

    async fn document_once(
        &self,
        repository: &Repository,
        ask: &Ask,
        what: &str,
        cap: usize,
        wanted: Option<&Digest>,
        wait: Duration,
    ) -> Result<Document, BlobError> {
        let Answer { mut reply, tried } = self.request(repository, ask, wait).await?;
        if reply.status() != StatusCode::OK {
            return Err(refusal(reply, what, &tried).await);
        }
        let host = reply.host();
        let bytes = reply.whole(cap).await?.ok_or_else(|| BlobError::Protocol {
            host: host.clone(),
            what: what.to_owned(),
            detail: format!("more than {cap} bytes, which no such document has"),
            transient: false,
        })?;
        let claimed = || claimed_digest(reply.headers());
        let expected = wanted.cloned().or_else(claimed);
        let encoding = Encoding::of(reply.headers());
        let bytes = encoding::plain(bytes, encoding, expected.as_ref(), cap);
        let digest = check_digest(&bytes, expected, &format!("{what} from {host}"))?;
        let media_type = reply.header(CONTENT_TYPE).unwrap_or_default();
        let media_type = media_type.split(';').next().unwrap_or_default().trim().to_owned();
        Ok(Document {
            media_type,
            digest,
            bytes,
        })
    }

    /// What to tell about a missing manifest: the tags there are, in one request, or that the repository cannot be seen.
    async fn hint(
        &self,
        repository: &Repository,
        selector: &ReferenceSelector,
        said: Option<String>,
    ) -> Option<String> {
        if !matches!(selector, ReferenceSelector::Tag { digest: None, .. }) {
            return said;
        }
        // A hint is not worth more than a moment, head and body together.
        let wait = self.retry().attempt_wait().min(Duration::from_secs(5));
        let asking = tokio::time::timeout(wait, self.tags(repository, wait));
        let with_said = |hint: &str| match &said {
            Some(said) => format!("{hint} ({said})"),
            None => hint.to_owned(),
        };
        match asking.await.unwrap_or(Tags::Unknown) {
            Tags::Listed(tags) if tags.is_empty() => Some(with_said("the repository has no tags")),
            Tags::Listed(tags) => Some(format!("there are the tags {}", tags.join(", "))),
            Tags::Refused => Some(with_said("the repository does not exist or needs a login")),
            Tags::Unknown => said,
        }
    }

    async fn tags(&self, repository: &Repository, wait: Duration) -> Tags {
        let ask = Ask::get(repository.tags_url(HINTED_TAGS));
        let mut reply = match self.request(repository, &ask, wait).await {
            Ok(answer) => answer.reply,
            // Not one of the token server.
            Err(BlobError::Unauthorized { host, .. }) if host == repository.endpoint.name() => return Tags::Refused,
            Err(_) => return Tags::Unknown,
        };
        match reply.status() {
            StatusCode::OK => {}
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::NOT_FOUND => return Tags::Refused,
            _ => return Tags::Unknown,
        }
        let body = reply.whole(1 << 20).await.ok().flatten();
        body.and_then(|body| parse_tags(&body))
            .map_or(Tags::Unknown, Tags::Listed)
    }

    /// Where blobs were last redirected to.
    pub(super) fn redirects(&self) -> &Redirects {
        &self.inner.redirects
    }
}

/// An answer with an unwelcome status, as an error.
pub(super) async fn refusal(mut reply: Reply, what: &str, tried: &str) -> BlobError {
    let body = reply.error_body().await;
    let host = authority(&reply.url);
    let context = Context {
        host: &host,
        what,
        tried,
    };
    failure::status(context, reply.status(), reply.headers(), &body)
}

/// The digest of a document: checked against the one asked for, or, for a tag, against what the server claims.
fn check_digest(bytes: &Bytes, expected: Option<Digest>, what: &str) -> Result<Digest, BlobError> {
    let Some(expected) = expected else {
        return Ok(Digest::of(bytes));
    };
    match expected.verify(bytes) {
        Ok(()) => Ok(expected),
        Err(actual) => Err(BlobError::Corrupt {
            what: what.to_owned(),
            expected: expected.to_string(),
            actual: actual.to_string(),
        }),
    }
}

fn claimed_digest(headers: &HeaderMap) -> Option<Digest> {
    let name = HeaderName::from_static("docker-content-digest");
    headers.get(name)?.to_str().ok()?.parse().ok()
}

fn parse_tags(body: &[u8]) -> Option<Vec<String>> {
    #[derive(serde::Deserialize)]
    struct Tags {
        #[serde(default)]
        tags: Option<Vec<String>>,
    }
    let tags: Tags = serde_json::from_slice(body).ok()?;
    let printable = |tag: &String| !tag.is_empty() && tag.len() <= 128 && tag.bytes().all(|b| b.is_ascii_graphic());
    // `null` is Go's empty list.
    let tags = tags.tags.unwrap_or_default();
    Some(tags.into_iter().filter(printable).take(HINTED_TAGS).collect())
}
