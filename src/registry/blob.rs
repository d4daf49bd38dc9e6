//! A blob in a registry: ranged reads that survive expired redirects, lost connections and servers with wrong ranges.
//!
//! ```text
//!   read(a..b) ─▶ cached redirect? ──yes──▶ GET it ──4xx──▶ forget ─┐
//!                      │ no                   │ 206/200             ▼
//!                      └──────────▶ GET at the registry, follow redirects, remember the last URL
//!                                             │ 206/200
//!                                             ▼
//!                          chunks … failure at c ─▶ back off ─▶ read(c..b)
//! ```
//!
//! A request for a part has one `Range` header. A request for the whole blob has none. The client judges a response
//! by its headers ([`answer`]). If the headers are odd, it uses the response and learns from the reader's check
//! ([`belief`]).
//!
//! Some servers send no parts, or wrong ones. The client then requests the whole blob, if the reader wants all of it
//! or the range begins at most [`MAX_SKIP`] bytes into it. Otherwise the read fails with
//! [`BlobError::RangeUnsupported`].

mod answer;
mod belief;
mod reading;

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::{self, StreamExt as _};
use reqwest::StatusCode;
use reqwest::header::{HeaderValue, RANGE};

use self::answer::{BodyPlace, MAX_SKIP, ResponseContent, place};
use self::belief::Belief;
use self::reading::{Body, Reading};
use super::access::AuthorisedReply;
use super::client::{RegistryClient, refusal};
use super::content_range::ContentRange;
use super::elsewhere::Elsewhere;
use super::encoding::Encoding;
use super::endpoint::Repository;
use super::redirects::BlobKey;
use super::stats::{BlobMeter, BlobStats, HostMeter, HostStats};
use super::transport::{Ask, Reply};
use crate::blob::{BlobError, BlobSource, ByteStream, Link, Retries, Verdict};
use crate::oci::Digest;

/// A blob in a registry.
#[derive(Debug, Clone)]
pub struct RegistryBlob {
    core: Arc<Core>,
}

#[derive(Debug)]
struct Core {
    client: RegistryClient,
    repository: Arc<Repository>,
    key: BlobKey,
    size: u64,
    inline: Option<Bytes>,
    elsewhere: Elsewhere,
    meter: BlobMeter,
    belief: Belief,
    kind: ReadKind,
}

/// What a blob is read for. It decides which responses are accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ReadKind {
    /// A layer, whether it is itself compressed or not. Its reader checks every byte.
    Layer {
        /// Whether the layer is itself compressed.
        is_compressed: bool,
    },
    /// Any blob whose bytes the caller gets unchecked. Only a response that is proven to hold the requested bytes is
    /// accepted.
    Unchecked,
}

impl RegistryBlob {
    pub(super) fn new(
        client: RegistryClient,
        repository: Arc<Repository>,
        digest: Digest,
        size: u64,
        inline: Option<Bytes>,
        kind: ReadKind,
        elsewhere: Elsewhere,
    ) -> Self {
        let key = BlobKey {
            repository: repository.to_string(),
            digest,
        };
        Self {
            core: Arc::new(Core {
                client,
                repository,
                key,
                size,
                inline,
                elsewhere,
                meter: BlobMeter::default(),
                belief: Belief::default(),
                kind,
            }),
        }
    }

    /// Finds the size of a blob of which only the digest is known. Requests the first byte and believes the total
    /// that the response states.
    ///
    /// A HEAD request would not do, because URLs signed for GET refuse it.
    pub(super) async fn find_size(
        client: &RegistryClient,
        repository: &Arc<Repository>,
        digest: &Digest,
    ) -> Result<u64, BlobError> {
        let blob = Self::new(
            client.clone(),
            Arc::clone(repository),
            digest.clone(),
            0,
            None,
            ReadKind::Unchecked,
            Elsewhere::default(),
        );
        let core = &blob.core;
        let attempt = |wait| core.probe(wait);
        client
            .persist(repository, &core.what(), &mut client.retry(), attempt)
            .await
    }

    /// Returns the measurements of the host that serves this blob: the host last redirected to, or else the registry.
    pub fn host_stats(&self) -> HostStats {
        self.host().snapshot()
    }

    fn host(&self) -> Arc<HostMeter> {
        let core = &self.core;
        let redirect = core.client.redirects().get(&core.key);
        let url = redirect.as_ref().unwrap_or(core.repository.endpoint.base());
        core.client.transport().meter(url)
    }

    async fn stream(&self, range: Range<u64>, apart: bool) -> Result<ByteStream, BlobError> {
        let core = &self.core;
        if range.start > range.end || range.end > core.size {
            return Err(BlobError::Invalid {
                what: format!("the range {}..{} of {}", range.start, range.end, core.what()),
                reason: format!("it has {} bytes", core.size),
            });
        }
        if range.is_empty() {
            return Ok(stream::empty().boxed());
        }
        if let Some(bytes) = &core.inline {
            // The inline bytes have the blob's size, so the range lies within them and fits in usize.
            let part = bytes.slice(range.start as usize..range.end as usize);
            return Ok(stream::once(async move { Ok(part) }).boxed());
        }
        let reading = Reading::start(Arc::clone(core), range, apart).await?;
        Ok(reading.into_stream())
    }

    /// Returns what this handle and its clones fetched of the blob.
    pub fn stats(&self) -> BlobStats {
        self.core.meter.snapshot()
    }
}

#[async_trait]
impl BlobSource for RegistryBlob {
    fn digest(&self) -> &Digest {
        &self.core.key.digest
    }

    fn size(&self) -> u64 {
        self.core.size
    }

    async fn read(&self, range: Range<u64>) -> Result<ByteStream, BlobError> {
        self.stream(range, false).await
    }

    async fn read_apart(&self, range: Range<u64>) -> Result<ByteStream, BlobError> {
        self.stream(range, true).await
    }

    fn judged(&self, verdict: Verdict) {
        match verdict {
            Verdict::Wrong => self.core.belief.bytes_were_wrong(),
            Verdict::OnlyPartsAreWrong => self.core.belief.parts_are_wrong(),
        }
    }

    fn link(&self) -> Link {
        if self.core.inline.is_some() {
            return Link::LOCAL;
        }
        // The registry gets the next request when the redirect has expired, and it is where back-offs are recorded. A
        // back-off of the registry therefore counts for this link.
        let core = &self.core;
        let registry = core.client.transport().meter(core.repository.endpoint.base());
        let mut link = self.host().link();
        link.resting |= registry.link().resting;
        link
    }

    fn retries(&self) -> Retries {
        self.core.meter.retries()
    }
}

impl Core {
    fn what(&self) -> String {
        format!("blob {} of {}", self.key.digest, self.repository)
    }

    /// Makes one attempt to get a response with the bytes `wanted`, which must not be empty.
    async fn open(&self, wanted: &Range<u64>, whole: bool, apart: bool, wait: Duration) -> Result<Body, BlobError> {
        let can_skip = wanted.start <= MAX_SKIP || whole;
        if !can_skip && !self.belief.has_ranges() {
            return Err(self.range_unsupported(self.repository.endpoint.name().to_owned()));
        }
        if *wanted != (0..self.size) && self.belief.may_ask_for_parts() {
            match self.open_part(wanted, can_skip, apart, wait).await {
                // The request below asks for the whole blob.
                Err(BlobError::RangeUnsupported { .. }) if can_skip => {}
                result => return result,
            }
        }
        let AuthorisedReply { reply, tried } = self.ask(None, apart, wait).await?;
        let from = reply.url.clone();
        let result = match reply.status() {
            StatusCode::OK => self.accept_whole(reply, wanted).await,
            StatusCode::PARTIAL_CONTENT => {
                match place(answer::label(&reply), reply.length(), &(0..self.size), self.size) {
                    BodyPlace::Part { skip: 0, take, .. } if take == self.size => {
                        self.accept_whole(reply, wanted).await
                    }
                    _ => Err(self.protocol(&reply.host(), "a part although the whole was asked for")),
                }
            }
            _ => Err(self.elsewhere.explain(refusal(reply, &self.what(), &tried).await)),
        };
        self.forget_if_failed(&from, result)
    }

    /// Requests a part. If `can_skip`, the whole blob is accepted too. Fails with [`BlobError::RangeUnsupported`] if
    /// the response is neither.
    async fn open_part(
        &self,
        wanted: &Range<u64>,
        can_skip: bool,
        apart: bool,
        wait: Duration,
    ) -> Result<Body, BlobError> {
        let AuthorisedReply { reply, tried } = self.ask(Some(wanted), apart, wait).await?;
        let from = reply.url.clone();
        let result = match reply.status() {
            StatusCode::PARTIAL_CONTENT => self.accept_part(reply, wanted, can_skip).await,
            // Some servers send a part with the status of the whole blob.
            StatusCode::OK if self.is_part(&reply, wanted) => self.accept_part(reply, wanted, can_skip).await,
            StatusCode::OK if self.check_length(&reply).is_ok() => {
                self.belief.ranges_were_ignored();
                match can_skip {
                    true => self.accept_called_whole(reply, wanted).await,
                    false => Err(self.range_unsupported(reply.host())),
                }
            }
            // The response is neither the part nor the whole blob, or it refuses a range that lies within the blob.
            // If the blob itself is wrong, the request for the whole blob shows it.
            status if status.is_success() || status == StatusCode::RANGE_NOT_SATISFIABLE => {
                self.belief.parts_are_wrong();
                Err(self.range_unsupported(reply.host()))
            }
            _ => Err(self.elsewhere.explain(refusal(reply, &self.what(), &tried).await)),
        };
        self.forget_if_failed(&from, result)
    }

    /// Whether a response with status 200 is the requested part, judged by its length and its `Content-Range`.
    fn is_part(&self, reply: &Reply, wanted: &Range<u64>) -> bool {
        let labelled = matches!(answer::label(reply), Some(ContentRange::Part { .. }));
        let asked = wanted.end - wanted.start;
        reply
            .length()
            .is_some_and(|length| length != self.size && (labelled || length == asked))
    }

    /// Forgets the URL of a response that failed, because another copy of the blob may be healthier.
    fn forget_if_failed(&self, from: &reqwest::Url, result: Result<Body, BlobError>) -> Result<Body, BlobError> {
        if result.is_err() {
            self.client.redirects().forget(&self.key, from);
        }
        result
    }

    /// Sends a request to the place where the blob was last found, then to the registry, then to the places that the
    /// image names.
    async fn ask(&self, range: Option<&Range<u64>>, apart: bool, wait: Duration) -> Result<AuthorisedReply, BlobError> {
        let mut ask = Ask::get(self.repository.blob_url(&self.key.digest));
        ask.apart = apart;
        if let Some(range) = range {
            let range = format!("bytes={}-{}", range.start, range.end - 1);
            let value = HeaderValue::try_from(range).map_err(|_| self.protocol("this machine", "a bad range"))?;
            ask.headers.insert(RANGE, value);
        }
        match self.ask_storage(&ask, wait).await? {
            Some(answer) => Ok(answer),
            None => self.ask_everywhere(&ask, wait).await,
        }
    }

    /// Requests the first byte and returns the size that the response states.
    async fn probe(&self, wait: Duration) -> Result<u64, BlobError> {
        let mut ask = Ask::get(self.repository.blob_url(&self.key.digest));
        ask.headers.insert(RANGE, HeaderValue::from_static("bytes=0-0"));
        let AuthorisedReply { reply, tried } = self.ask_registry(&ask, wait).await?;
        let size = match (reply.status(), answer::label(&reply)) {
            (StatusCode::PARTIAL_CONTENT, Some(ContentRange::Part { total, .. })) => total,
            // An empty blob has no first byte.
            (StatusCode::RANGE_NOT_SATISFIABLE, Some(ContentRange::Unsatisfied { total: 0 })) => Some(0),
            (StatusCode::OK, _) if answer::encoding(&reply) == Encoding::Identity => reply.length(),
            (status, _) if !status.is_success() => return Err(refusal(reply, &self.what(), &tried).await),
            _ => None,
        };
        size.ok_or_else(|| self.protocol(&reply.host(), "no size stated"))
    }

    /// Sends a request to the place where the blob was last found. Returns `None` if no place is known, or if that
    /// place does not have the blob (any more).
    async fn ask_storage(&self, ask: &Ask, wait: Duration) -> Result<Option<AuthorisedReply>, BlobError> {
        let Some(url) = self.client.redirects().get(&self.key) else {
            return Ok(None);
        };
        let mut direct = ask.clone();
        direct.url = url.clone();
        direct.guarded = self
            .client
            .transport()
            .leads_to_public_only(self.repository.endpoint.base());
        let sent = self.client.request_elsewhere(&self.repository, &direct, wait).await;
        self.meter.request(sent.as_ref().map_or(1, |answer| answer.reply.hops));
        match sent {
            Ok(answer) if !matches!(answer.reply.status().as_u16(), 400 | 401 | 403 | 404 | 410) => Ok(Some(answer)),
            Ok(_) | Err(BlobError::Unauthorized { .. }) => {
                self.client.redirects().forget(&self.key, &url);
                Ok(None)
            }
            Err(error) => {
                // The registry may redirect the next attempt to a healthier place.
                self.client.redirects().forget(&self.key, &url);
                Err(error)
            }
        }
    }

    /// Sends a request to the registry. If the registry does not have the blob, tries the other places that the image
    /// names. Remembers the place that has the blob, so that later requests go there first.
    async fn ask_everywhere(&self, ask: &Ask, wait: Duration) -> Result<AuthorisedReply, BlobError> {
        let answer = self.ask_registry(ask, wait).await?;
        if !matches!(answer.reply.status(), StatusCode::NOT_FOUND | StatusCode::GONE) {
            return Ok(answer);
        }
        for url in &self.elsewhere.urls {
            let mut direct = ask.clone();
            direct.url = url.clone();
            direct.guarded = self.client.transport().leads_to_public_only(url);
            let sent = self.client.request_elsewhere(&self.repository, &direct, wait).await;
            self.meter.request(sent.as_ref().map_or(1, |answer| answer.reply.hops));
            match sent {
                Ok(found) if found.reply.status().is_success() => {
                    self.client.redirects().remember(&self.key, found.reply.url.clone());
                    return Ok(found);
                }
                Ok(other) => {
                    let (host, status) = (other.reply.host(), other.reply.status());
                    tracing::warn!(host, %status, "no foreign layer in the place that the image names");
                }
                Err(error) => tracing::warn!(%error, "no foreign layer in the place that the image names"),
            }
        }
        Ok(answer)
    }

    async fn ask_registry(&self, ask: &Ask, wait: Duration) -> Result<AuthorisedReply, BlobError> {
        let answer = self.client.request(&self.repository, ask, wait).await;
        self.meter
            .request(answer.as_ref().map_or(1, |answer| answer.reply.hops));
        let answer = answer?;
        if answer.reply.crossed && answer.reply.status().is_success() {
            self.client.redirects().remember(&self.key, answer.reply.url.clone());
        }
        Ok(answer)
    }

    async fn accept_part(&self, reply: Reply, wanted: &Range<u64>, can_skip: bool) -> Result<Body, BlobError> {
        let is_encoded = answer::encoding(&reply) != Encoding::Identity;
        let (mut label, mut length) = (answer::label(&reply), reply.length());
        let is_multipart = answer::is_multipart(&reply);
        let host = reply.host();
        let mut content = ResponseContent::new(reply);
        if is_multipart {
            (label, length) = (content.enter_part().await?, None);
            if label.is_none() {
                self.belief.parts_are_wrong();
                return Err(self.range_unsupported(host));
            }
        }
        match place(label, length, wanted, self.size) {
            BodyPlace::Part { skip, take, proven } => {
                let proven = proven && !is_encoded;
                self.belief.part_came(proven);
                if !proven && self.kind == ReadKind::Unchecked {
                    return Err(self.range_unsupported(host));
                }
                let body = Body::new(content, skip, take);
                Ok(if proven { body } else { body.guessed() })
            }
            BodyPlace::Whole if can_skip && !is_encoded => {
                self.belief.ranges_were_ignored();
                Ok(Body::new(content, wanted.start, wanted.end - wanted.start))
            }
            BodyPlace::Whole | BodyPlace::Elsewhere => {
                self.belief.parts_are_wrong();
                Err(self.range_unsupported(host))
            }
        }
    }

    /// Accepts a response to a range request as the whole blob, because its status says so. If the response does not
    /// state its length, it may still be the part.
    async fn accept_called_whole(&self, reply: Reply, wanted: &Range<u64>) -> Result<Body, BlobError> {
        let is_proven = reply.length().is_some();
        let body = self.accept_whole(reply, wanted).await?;
        if is_proven {
            return Ok(body);
        }
        self.belief.part_came(false);
        Ok(body.guessed())
    }

    /// Accepts a response as the whole blob, and passes on the bytes `wanted` of it.
    async fn accept_whole(&self, reply: Reply, wanted: &Range<u64>) -> Result<Body, BlobError> {
        self.check_length(&reply)?;
        let (encoding, length) = (answer::encoding(&reply), reply.length());
        let mut content = ResponseContent::new(reply);
        if let Encoding::Compressed(coding) = encoding {
            let guess = match (length, self.kind) {
                // Storage that labels a gzip layer as gzip-encoded still sends the layer's own bytes. Their number
                // proves it.
                (Some(length), _) => length != self.size,
                (None, ReadKind::Layer { is_compressed }) => content.looks_encoded(coding, is_compressed).await?,
                (None, ReadKind::Unchecked) => return Err(self.protocol(&content.host(), "the blob re-encoded")),
            };
            let is_guessed = length.is_none();
            let decode = if is_guessed { self.belief.decode(guess) } else { guess };
            if decode {
                content.decode(coding)?;
            }
            let body = Body::new(content, wanted.start, wanted.end - wanted.start);
            return Ok(if is_guessed { body.guessed() } else { body });
        }
        Ok(Body::new(content, wanted.start, wanted.end - wanted.start))
    }

    /// Checks the length of a response for the whole blob. Fails if the length shows that the response is not the
    /// blob.
    fn check_length(&self, reply: &Reply) -> Result<(), BlobError> {
        let Some(length) = reply.length().filter(|length| *length != self.size) else {
            return Ok(());
        };
        match answer::encoding(reply) {
            Encoding::Compressed(_) if self.kind != ReadKind::Unchecked => Ok(()),
            Encoding::Compressed(_) | Encoding::Unknown => Err(self.protocol(&reply.host(), "the blob re-encoded")),
            Encoding::Identity => Err(BlobError::Corrupt {
                what: format!("{} from {}", self.what(), reply.host()),
                expected: format!("{} bytes", self.size),
                actual: format!("{length} bytes"),
            }),
        }
    }

    fn range_unsupported(&self, host: String) -> BlobError {
        BlobError::RangeUnsupported {
            host,
            what: self.what(),
        }
    }

    fn protocol(&self, host: &str, detail: &str) -> BlobError {
        BlobError::Protocol {
            host: host.to_owned(),
            what: self.what(),
            detail: detail.to_owned(),
            transient: false,
        }
    }
}
