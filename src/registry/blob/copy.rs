//! A blob at one place: one request at a time, to the place itself or to the storage that the place redirects to.
//!
//! ```text
//!   open(a..b) ─▶ cached redirect? ──yes──▶ GET it ──4xx──▶ forget ─┐
//!                      │ no                   │ 206/200             ▼
//!                      └──────────▶ GET at the place, follow redirects, remember the last URL
//! ```
//!
//! The client judges a response by its headers ([`answer`](super::answer)). If the headers are odd, it uses the response
//! and learns from the reader's check ([`belief`](super::belief)).

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use reqwest::StatusCode;
use reqwest::header::{HeaderValue, RANGE};

use super::ReadKind;
use super::answer::{self, BodyPlace, MAX_SKIP, ResponseContent, place};
use super::belief::Belief;
use super::body::Body;
use crate::blob::{BlobError, Verdict};
use crate::registry::access::AuthorisedReply;
use crate::registry::client::{RegistryClient, refusal};
use crate::registry::content_range::ContentRange;
use crate::registry::elsewhere::Elsewhere;
use crate::registry::encoding::Encoding;
use crate::registry::endpoint::Repository;
use crate::registry::redirects::BlobKey;
use crate::registry::stats::{BlobMeter, HostMeter};
use crate::registry::transport::{Ask, Reply};

/// A blob at one place.
#[derive(Debug)]
pub(super) struct BlobCopy {
    client: RegistryClient,
    repository: Arc<Repository>,
    key: BlobKey,
    size: u64,
    kind: ReadKind,
    /// Other places that the image names.
    elsewhere: Elsewhere,
    meter: Arc<BlobMeter>,
    belief: Belief,
    /// Whether a reader got bytes from here.
    has_served: AtomicBool,
    /// Whether wrong bytes may have come from here.
    is_suspected: AtomicBool,
}

/// A request for bytes of a blob.
#[derive(Debug, Clone)]
pub(super) struct BlobAsked {
    /// The bytes. Not empty.
    pub(super) wanted: Range<u64>,
    /// Whether the caller reads the whole blob, so that a request without a range wastes nothing.
    pub(super) whole: bool,
    /// Whether the request uses connections that ordinary requests do not use.
    pub(super) apart: bool,
    /// Longest wait for the head of a response.
    pub(super) wait: Duration,
    /// Time without a byte after which the body is given up, if that is less than usual.
    pub(super) stall: Option<Duration>,
}

impl BlobCopy {
    pub(super) fn new(
        client: RegistryClient,
        repository: Arc<Repository>,
        key: BlobKey,
        size: u64,
        kind: ReadKind,
        elsewhere: Elsewhere,
        meter: Arc<BlobMeter>,
    ) -> Self {
        Self {
            client,
            repository,
            key,
            size,
            kind,
            elsewhere,
            meter,
            belief: Belief::default(),
            has_served: AtomicBool::new(false),
            is_suspected: AtomicBool::new(false),
        }
    }

    /// Returns the measurements of the host that serves this copy: the host last redirected to, or else the place.
    pub(super) fn host(&self) -> Arc<HostMeter> {
        let redirect = self.client.redirects().get(&self.key);
        let url = redirect.as_ref().unwrap_or(self.repository.endpoint.base());
        self.client.transport().meter(url)
    }

    /// Records that a reader got bytes from here.
    pub(super) fn served(&self) {
        self.has_served.store(true, Ordering::Relaxed);
    }

    /// Takes the verdict of a reader about bytes of which some may have come from other places. Returns whether wrong
    /// bytes may have come from here.
    pub(super) fn suspected(&self, verdict: Verdict) -> bool {
        match verdict {
            Verdict::Wrong => {
                let suspected = self.has_served.load(Ordering::Relaxed);
                if suspected {
                    self.is_suspected.store(true, Ordering::Relaxed);
                    self.judged(verdict);
                }
                suspected
            }
            Verdict::OnlyPartsAreWrong => {
                if self.is_suspected.load(Ordering::Relaxed) {
                    self.judged(verdict);
                }
                false
            }
        }
    }

    /// Takes the verdict of a reader about bytes from here.
    pub(super) fn judged(&self, verdict: Verdict) {
        match verdict {
            Verdict::Wrong => self.belief.bytes_were_wrong(),
            Verdict::OnlyPartsAreWrong => self.belief.parts_are_wrong(),
        }
    }

    /// Drops the suspicion, because nothing is read from here any more.
    pub(super) fn left_alone(&self) {
        self.has_served.store(false, Ordering::Relaxed);
    }

    fn what(&self) -> String {
        format!("blob {} of {}", self.key.digest, self.repository)
    }

    /// Makes one attempt to get a response with the bytes.
    pub(super) async fn open(&self, asked: &BlobAsked) -> Result<Body, BlobError> {
        let wanted = &asked.wanted;
        let can_skip = wanted.start <= MAX_SKIP || asked.whole;
        if !can_skip && !self.belief.has_ranges() {
            return Err(self.range_unsupported(self.repository.endpoint.name().to_owned()));
        }
        if *wanted != (0..self.size) && self.belief.may_ask_for_parts() {
            match self.open_part(asked, can_skip).await {
                // The request below asks for the whole blob.
                Err(BlobError::RangeUnsupported { .. }) if can_skip => {}
                result => return result,
            }
        }
        let AuthorisedReply { reply, tried } = self.ask(asked, None).await?;
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
    async fn open_part(&self, asked: &BlobAsked, can_skip: bool) -> Result<Body, BlobError> {
        let wanted = &asked.wanted;
        let AuthorisedReply { reply, tried } = self.ask(asked, Some(wanted)).await?;
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
    async fn ask(&self, asked: &BlobAsked, range: Option<&Range<u64>>) -> Result<AuthorisedReply, BlobError> {
        let (wait, mut ask) = (asked.wait, Ask::get(self.repository.blob_url(&self.key.digest)));
        ask.apart = asked.apart;
        ask.stall = asked.stall;
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
    pub(super) async fn probe(&self, wait: Duration) -> Result<u64, BlobError> {
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
