//! A blob in a registry: ranged reads that survive expired redirects, lost connections and servers with odd ideas of ranges.
//!
//! ```text
//!   read(a..b) ─▶ cached redirect? ──yes──▶ GET it ──4xx──▶ forget ─┐
//!                      │ no                   │ 206/200             ▼
//!                      └──────────▶ GET at the registry, follow redirects, remember the last URL
//!                                             │ 206/200
//!                                             ▼
//!                          chunks … failure at c ─▶ wait ─▶ read(c..b)
//! ```
//!
//! A part is asked for with one `Range`, a whole blob without. A 206 counts only with a `Content-Range` that fits; a 200 is a
//! server that ignores ranges, which is fine if little has to be skipped.

mod reading;

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::{self, StreamExt as _};
use reqwest::StatusCode;
use reqwest::header::{CONTENT_ENCODING, CONTENT_RANGE, HeaderValue, RANGE};

use self::reading::{Body, Reading};
use super::client::{Answer, RegistryClient, refusal};
use super::content_range::ContentRange;
use super::endpoint::Repository;
use super::redirects::BlobKey;
use super::stats::{BlobMeter, BlobStats, HostStats};
use super::transport::{Ask, Reply};
use crate::blob::{BlobError, BlobSource, ByteStream, Link};
use crate::oci::Digest;

/// Bytes worth receiving for nothing to reach an offset at a server that ignores ranges: about a round trip's worth.
const MAX_SKIP: u64 = 1 << 20;
/// How long a blob is believed to be served without ranges. Content delivery networks do so for objects they have not cached
/// yet, so it says nothing about other blobs of the host.
const NO_RANGES_FOR: Duration = Duration::from_secs(300);

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
    meter: BlobMeter,
    no_ranges: NoRanges,
}

/// Whether a blob is believed to be served without ranges.
#[derive(Debug, Default)]
struct NoRanges(Mutex<Option<Instant>>);

impl NoRanges {
    /// Believes it from now on for `time`; no longer if `None`.
    fn set(&self, time: Option<Duration>) {
        let until = time.and_then(|time| Instant::now().checked_add(time));
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = until;
    }

    fn holds(&self) -> bool {
        let until = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        until.is_some_and(|until| Instant::now() < until)
    }
}

impl RegistryBlob {
    pub(super) fn new(
        client: RegistryClient,
        repository: Arc<Repository>,
        digest: Digest,
        size: u64,
        inline: Option<Bytes>,
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
                meter: BlobMeter::default(),
                no_ranges: NoRanges::default(),
            }),
        }
    }

    /// The size of a blob of which only the digest is known: asks for its first byte and believes the total stated.
    ///
    /// A HEAD would not do: URLs signed for GET refuse it.
    pub(super) async fn find_size(
        client: &RegistryClient,
        repository: &Arc<Repository>,
        digest: &Digest,
    ) -> Result<u64, BlobError> {
        let blob = Self::new(client.clone(), Arc::clone(repository), digest.clone(), 0, None);
        let core = &blob.core;
        let attempt = |wait| core.probe(wait);
        client
            .persist(repository, &core.what(), &mut client.retry(), attempt)
            .await
    }

    /// The measurements of the host that serves this blob: the one last redirected to, else the registry.
    pub fn host_stats(&self) -> HostStats {
        let core = &self.core;
        let redirect = core.client.redirects().get(&core.key);
        let url = redirect.as_ref().unwrap_or(core.repository.endpoint.base());
        core.client.transport().meter(url).snapshot()
    }

    /// What was fetched of this blob through this handle and its clones.
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
            // The inline bytes have the blob's size, so the range lies within them and in usize.
            let part = bytes.slice(range.start as usize..range.end as usize);
            return Ok(stream::once(async move { Ok(part) }).boxed());
        }
        let reading = Reading::start(Arc::clone(core), range).await?;
        Ok(reading.into_stream())
    }

    fn link(&self) -> Link {
        if self.core.inline.is_some() {
            return Link::LOCAL;
        }
        let stats = self.host_stats();
        Link {
            rtt: stats.rtt,
            bandwidth: stats.bandwidth,
            warm: stats.warm,
        }
    }
}

impl Core {
    fn what(&self) -> String {
        format!("blob {} of {}", self.key.digest, self.repository)
    }

    /// One attempt at an answer with the bytes `wanted` (not empty).
    async fn open(&self, wanted: &Range<u64>, whole: bool, wait: Duration) -> Result<Body, BlobError> {
        let can_skip = wanted.start <= MAX_SKIP || whole;
        if !can_skip && self.no_ranges.holds() {
            return Err(self.range_unsupported(self.repository.endpoint.name().to_owned()));
        }
        let mut ask = Ask::get(self.repository.blob_url(&self.key.digest));
        let ranged = *wanted != (0..self.size);
        if ranged {
            let range = format!("bytes={}-{}", wanted.start, wanted.end - 1);
            let value = HeaderValue::try_from(range).map_err(|_| self.protocol("this machine", "a bad range"))?;
            ask.headers.insert(RANGE, value);
        }
        let Answer { reply, tried } = match self.ask_storage(&ask, wait).await? {
            Some(reply) => Answer {
                reply,
                tried: String::new(),
            },
            None => self.ask_registry(&ask, wait).await?,
        };
        let from = reply.url.clone();
        let result = match reply.status() {
            StatusCode::PARTIAL_CONTENT if ranged => {
                self.no_ranges.set(None);
                self.accept_part(reply, wanted)
            }
            StatusCode::OK => {
                if ranged {
                    self.no_ranges.set(Some(NO_RANGES_FOR));
                }
                self.accept_whole(reply, wanted, can_skip)
            }
            StatusCode::RANGE_NOT_SATISFIABLE => Err(self.unsatisfied(&reply, wanted)),
            _ => Err(refusal(reply, &self.what(), &tried).await),
        };
        if result.is_err() {
            // Another copy may be healthier than this one.
            self.client.redirects().forget(&self.key, &from);
        }
        result
    }

    /// The size as stated in the answer to a request for the first byte.
    async fn probe(&self, wait: Duration) -> Result<u64, BlobError> {
        let mut ask = Ask::get(self.repository.blob_url(&self.key.digest));
        ask.headers.insert(RANGE, HeaderValue::from_static("bytes=0-0"));
        let Answer { reply, tried } = self.ask_registry(&ask, wait).await?;
        let range = reply.header(CONTENT_RANGE).and_then(ContentRange::parse);
        let size = match (reply.status(), range) {
            (StatusCode::PARTIAL_CONTENT, Some(ContentRange::Part { total, .. })) => total,
            // The first byte of nothing.
            (StatusCode::RANGE_NOT_SATISFIABLE, Some(ContentRange::Unsatisfied { total: 0 })) => Some(0),
            (StatusCode::OK, _) if !is_encoded(&reply) => reply.length(),
            (status, _) if !status.is_success() => return Err(refusal(reply, &self.what(), &tried).await),
            _ => None,
        };
        size.ok_or_else(|| self.protocol(&reply.host(), "no size stated"))
    }

    /// Asks where the blob was last found; `None` if there is no such place or it does not know the blob (any more).
    async fn ask_storage(&self, ask: &Ask, wait: Duration) -> Result<Option<Reply>, BlobError> {
        let Some(url) = self.client.redirects().get(&self.key) else {
            return Ok(None);
        };
        let mut direct = ask.clone();
        direct.url = url.clone();
        let sent = self.client.transport().send(&direct, wait).await;
        self.meter.request(sent.as_ref().map_or(1, |reply| reply.hops));
        match sent {
            Ok(reply) if matches!(reply.status().as_u16(), 400 | 401 | 403 | 404 | 410) => {
                self.client.redirects().forget(&self.key, &url);
                Ok(None)
            }
            Ok(reply) => Ok(Some(reply)),
            Err(error) => {
                // The next attempt may be sent to a healthier place.
                self.client.redirects().forget(&self.key, &url);
                Err(error)
            }
        }
    }

    async fn ask_registry(&self, ask: &Ask, wait: Duration) -> Result<Answer, BlobError> {
        let answer = self.client.request(&self.repository, ask, wait).await;
        self.meter
            .request(answer.as_ref().map_or(1, |answer| answer.reply.hops));
        let answer = answer?;
        if answer.reply.crossed && answer.reply.status().is_success() {
            self.client.redirects().remember(&self.key, answer.reply.url.clone());
        }
        Ok(answer)
    }

    fn accept_part(&self, reply: Reply, wanted: &Range<u64>) -> Result<Body, BlobError> {
        if is_encoded(&reply) {
            return Err(self.protocol(&reply.host(), "a range of a re-encoded blob"));
        }
        let stated = reply.header(CONTENT_RANGE).and_then(ContentRange::parse);
        let stated = stated.ok_or_else(|| self.protocol(&reply.host(), "a part without a valid Content-Range"))?;
        let end = stated
            .check(wanted, self.size)
            .map_err(|detail| self.protocol(&reply.host(), &detail))?;
        Ok(Body::new(reply, 0, end - wanted.start))
    }

    fn accept_whole(&self, reply: Reply, wanted: &Range<u64>, can_skip: bool) -> Result<Body, BlobError> {
        let length = reply.length();
        // Storage that labels a gzip layer as gzip-encoded still sends its own bytes, which their number proves.
        if is_encoded(&reply) && length != Some(self.size) {
            return Err(self.protocol(&reply.host(), "the blob re-encoded"));
        }
        if let Some(length) = length.filter(|length| *length != self.size) {
            return Err(BlobError::Corrupt {
                what: format!("{} from {}", self.what(), reply.host()),
                expected: format!("{} bytes", self.size),
                actual: format!("{length} bytes"),
            });
        }
        if !can_skip {
            return Err(self.range_unsupported(reply.host()));
        }
        Ok(Body::new(reply, wanted.start, wanted.end - wanted.start))
    }

    /// 416: the blob is shorter than promised, or the server takes no ranges.
    fn unsatisfied(&self, reply: &Reply, wanted: &Range<u64>) -> BlobError {
        match reply.header(CONTENT_RANGE).and_then(ContentRange::parse) {
            Some(ContentRange::Unsatisfied { total }) if total < wanted.end => BlobError::Corrupt {
                what: format!("{} from {}", self.what(), reply.host()),
                expected: format!("{} bytes", self.size),
                actual: format!("{total} bytes"),
            },
            _ => self.range_unsupported(reply.host()),
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

fn is_encoded(reply: &Reply) -> bool {
    reply
        .header(CONTENT_ENCODING)
        .is_some_and(|encoding| !encoding.trim().is_empty() && !encoding.trim().eq_ignore_ascii_case("identity"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_of_missing_ranges_ends() {
        let no_ranges = NoRanges::default();
        assert!(!no_ranges.holds());
        no_ranges.set(Some(Duration::from_secs(60)));
        assert!(no_ranges.holds());
        no_ranges.set(Some(Duration::ZERO));
        assert!(!no_ranges.holds());
        no_ranges.set(Some(Duration::from_secs(60)));
        no_ranges.set(None);
        assert!(!no_ranges.holds());
    }
}
