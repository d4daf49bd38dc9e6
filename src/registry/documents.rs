//! Manifests, image indexes and configs of a registry.

use std::time::Duration;

use bytes::Bytes;
use reqwest::StatusCode;
use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};

use super::access::AuthorisedReply;
use super::client::{RegistryClient, refusal};
use super::encoding::{self, Encoding};
use super::endpoint::Repository;
use super::places::{PlaceTurn, Places, Sought};
use super::transport::Ask;
use crate::blob::{BlobError, Document};
use crate::oci::{Digest, ReferenceSelector};

/// Largest manifest or image index, in bytes: the size that the distribution specification asks registries to accept.
pub const MAX_MANIFEST: usize = 4 << 20;
/// Largest image config, in bytes. The histories of generated images can exceed 1 MiB.
pub const MAX_CONFIG: usize = 16 << 20;
/// Most tags listed in the hint about a missing tag.
const HINTED_TAGS: usize = 20;

/// Media types of image indexes and manifests, OCI's and Docker's. Without one of the two families, some registries
/// convert to the old schema 1 or respond with 404.
const ACCEPT_MANIFESTS: &str = "application/vnd.oci.image.index.v1+json, \
    application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.docker.distribution.manifest.v2+json, */*";

/// What a registry says about the tags of a repository.
enum Tags {
    Listed(Vec<String>),
    /// The registry does not show them: 401, 403 or 404.
    Refused,
    /// The registry did not respond in time, or its response makes no sense.
    Unknown,
}

/// A document to fetch.
#[derive(Debug, Clone)]
struct DocumentAsked {
    selector: ReferenceSelector,
    /// Whether it is a blob, and no manifest.
    is_blob: bool,
    /// Whether it comes with TLS alone, wherever redirects lead.
    is_protected: bool,
    /// Largest size, in bytes.
    cap: usize,
}

impl DocumentAsked {
    fn manifest(selector: &ReferenceSelector) -> Self {
        Self {
            selector: selector.clone(),
            is_blob: false,
            is_protected: false,
            cap: MAX_MANIFEST,
        }
    }

    /// Makes the request for the document in a repository.
    fn ask(&self, repository: &Repository) -> Result<Ask, BlobError> {
        match (&self.selector, self.is_blob) {
            (ReferenceSelector::Digest(digest), true) => Ok(Ask::get(repository.blob_url(digest))),
            (selector, _) => {
                let mut ask = Ask::get(repository.manifest_url(selector)?);
                ask.headers.insert(ACCEPT, HeaderValue::from_static(ACCEPT_MANIFESTS));
                Ok(ask)
            }
        }
    }

    fn digest(&self) -> Option<&Digest> {
        match &self.selector {
            ReferenceSelector::Tag { digest, .. } => digest.as_ref(),
            ReferenceSelector::Digest(digest) => Some(digest),
        }
    }

    /// Names the document in a repository, for errors.
    fn what(&self, repository: &Repository) -> String {
        match (&self.selector, self.is_blob) {
            (ReferenceSelector::Digest(digest), true) => format!("blob {digest} of {}", repository.name),
            (selector, _) => format!("manifest {}{selector}", repository.name),
        }
    }
}

impl RegistryClient {
    /// Fetches and verifies the document that a selector names.
    pub(super) async fn manifest(&self, places: &Places, selector: &ReferenceSelector) -> Result<Document, BlobError> {
        match self.document(places, &DocumentAsked::manifest(selector)).await {
            Err(BlobError::NotFound { what, hint }) => {
                let hint = self.hint(places.origin(), selector, hint).await;
                Err(BlobError::NotFound { what, hint })
            }
            other => other,
        }
    }

    /// Fetches the manifest under a tag. Does not look for a reason if there is none. A `protected` manifest comes with
    /// TLS alone, wherever redirects lead.
    pub(super) async fn manifest_of_tag(
        &self,
        places: &Places,
        tag: &str,
        protected: bool,
    ) -> Result<Document, BlobError> {
        let asked = DocumentAsked {
            is_protected: protected,
            ..DocumentAsked::manifest(&ReferenceSelector::tag(tag))
        };
        self.document(places, &asked).await
    }

    /// Fetches and verifies a small blob as a whole.
    pub(super) async fn small_blob(&self, places: &Places, digest: &Digest) -> Result<Document, BlobError> {
        let asked = DocumentAsked {
            selector: ReferenceSelector::Digest(digest.clone()),
            is_blob: true,
            is_protected: false,
            cap: MAX_CONFIG,
        };
        self.document(places, &asked).await
    }

    async fn document(&self, places: &Places, asked: &DocumentAsked) -> Result<Document, BlobError> {
        let what = asked.what(places.origin());
        let wanted = Sought::of(&asked.selector);
        let attempt = |turn| self.document_once(places, asked, turn);
        self.persist(places, &wanted, &what, &mut self.retry(), attempt).await
    }

    async fn document_once(
        &self,
        places: &Places,
        asked: &DocumentAsked,
        turn: PlaceTurn,
    ) -> Result<Document, BlobError> {
        let repository = places.at(turn.place);
        let (what, cap) = (&asked.what(repository), asked.cap);
        let ask = Ask {
            protected: asked.is_protected,
            stall: turn.stall,
            ..asked.ask(repository)?
        };
        let AuthorisedReply { mut reply, tried } = self.request(repository, &ask, turn.wait).await?;
        if reply.status() != StatusCode::OK {
            return Err(refusal(reply, what, &tried).await);
        }
        let host = reply.host();
        let bytes = reply.whole(cap).await?.ok_or_else(|| BlobError::Protocol {
            host: host.clone(),
            what: what.clone(),
            detail: format!("more than {cap} bytes, which no such document has"),
            transient: false,
        })?;
        let claimed = || claimed_digest(reply.headers());
        let expected = asked.digest().cloned().or_else(claimed);
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

    /// Returns a hint about a missing manifest: the tags that exist, or that the repository cannot be seen. Costs one
    /// request.
    async fn hint(
        &self,
        repository: &Repository,
        selector: &ReferenceSelector,
        said: Option<String>,
    ) -> Option<String> {
        if !matches!(selector, ReferenceSelector::Tag { digest: None, .. }) {
            return said;
        }
        // The hint gets a few seconds at most, for head and body together.
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
            // The registry refused, not its token server.
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
}

/// Checks a document against `expected` and returns its digest. `expected` is the requested digest or, for a tag, the
/// one that the server claims.
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
    struct TagsAnswer {
        #[serde(default)]
        tags: Option<Vec<String>>,
    }
    let tags: TagsAnswer = serde_json::from_slice(body).ok()?;
    let printable = |tag: &String| !tag.is_empty() && tag.len() <= 128 && tag.bytes().all(|b| b.is_ascii_graphic());
    // Go writes an empty list as `null`.
    let tags = tags.tags.unwrap_or_default();
    Some(tags.into_iter().filter(printable).take(HINTED_TAGS).collect())
}
