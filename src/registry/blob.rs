//! A blob in a registry: ranged reads that survive expired redirects, lost connections and servers with wrong ranges.
//!
//! ```text
//!   read(a..b) ─▶ the first of its places that works ([`places`](super::places)) ─▶ one request there ([`copy`])
//!        ▲                                                     │ chunks
//!        │                                                     ▼
//!        └─────── read(c..b) ◀─── the next place, or after a pause ◀─── failure at c
//! ```
//!
//! A request for a part has one `Range` header. A request for the whole blob has none. Some servers send no parts, or
//! wrong ones. The client then requests the whole blob, if the reader wants all of it or the range begins at most
//! [`MAX_SKIP`](answer::MAX_SKIP) bytes into it. Otherwise the read fails with [`BlobError::RangeUnsupported`].
//!
//! If a reader finds wrong bytes, the mirrors that may have sent them are left alone for this blob.

mod answer;
mod belief;
mod body;
mod copy;
mod pace;
mod reading;

use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::{self, StreamExt as _};

use self::copy::BlobCopy;
use self::reading::Reading;
use super::client::RegistryClient;
use super::elsewhere::Elsewhere;
use super::places::{PlaceTurn, Places, Sought};
use super::redirects::BlobKey;
use super::stats::{BlobMeter, BlobStats, HostStats};
use crate::blob::{BlobError, BlobSource, ByteStream, Link, Retries, Verdict};
use crate::oci::Digest;

/// A blob in a registry.
#[derive(Debug, Clone)]
pub struct RegistryBlob {
    core: Arc<BlobCore>,
}

#[derive(Debug)]
struct BlobCore {
    client: RegistryClient,
    places: Arc<Places>,
    /// The blob at each of the places.
    copies: Vec<BlobCopy>,
    digest: Digest,
    wanted: Sought,
    size: u64,
    inline: Option<Bytes>,
    meter: Arc<BlobMeter>,
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
    /// Makes a handle. `elsewhere` are places that the image names, for the case that the registry does not have the
    /// blob.
    pub(super) fn new(
        client: RegistryClient,
        places: Arc<Places>,
        digest: Digest,
        size: u64,
        inline: Option<Bytes>,
        kind: ReadKind,
        mut elsewhere: Elsewhere,
    ) -> Self {
        let meter = Arc::new(BlobMeter::default());
        let copies = places.all().enumerate().map(|(position, repository)| {
            let key = BlobKey {
                repository: repository.id(),
                digest: digest.clone(),
            };
            // A mirror need not know these places, and the registry comes last in any case.
            let elsewhere = match position == places.last() {
                true => std::mem::take(&mut elsewhere),
                false => Elsewhere::default(),
            };
            let (client, repository, meter) = (client.clone(), Arc::clone(repository), Arc::clone(&meter));
            BlobCopy::new(client, repository, key, size, kind, elsewhere, meter)
        });
        Self {
            core: Arc::new(BlobCore {
                copies: copies.collect(),
                client,
                wanted: Sought::Content(digest.clone()),
                places,
                digest,
                size,
                inline,
                meter,
            }),
        }
    }

    /// Finds the size of a blob of which only the digest is known. Requests the first byte and believes the total
    /// that the response states.
    ///
    /// A HEAD request would not do, because URLs signed for GET refuse it.
    pub(super) async fn find_size(
        client: &RegistryClient,
        places: &Arc<Places>,
        digest: &Digest,
    ) -> Result<u64, BlobError> {
        let blob = Self::new(
            client.clone(),
            Arc::clone(places),
            digest.clone(),
            0,
            None,
            ReadKind::Unchecked,
            Elsewhere::default(),
        );
        let core = &blob.core;
        let attempt = |turn: PlaceTurn| core.copies[turn.place].probe(turn.wait);
        let mut retry = client.retry();
        client
            .persist(places, &core.wanted, &core.what(), &mut retry, attempt)
            .await
    }

    /// Returns the measurements of the host that serves this blob: the host last redirected to, or else the registry or
    /// its mirror.
    pub fn host_stats(&self) -> HostStats {
        self.core.copy_in_use().host().snapshot()
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
        &self.core.digest
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

    fn judged(&self, verdict: Verdict) -> bool {
        let core = &self.core;
        if let [only] = &core.copies[..] {
            only.judged(verdict);
            return false;
        }
        let mut left = false;
        for (place, copy) in core.copies.iter().enumerate() {
            if copy.suspected(verdict) && place != core.places.last() {
                copy.left_alone();
                let lie = BlobError::Corrupt {
                    what: format!("blob {} of {}", core.digest, core.places.at(place)),
                    expected: "bytes that fit its digest".to_owned(),
                    actual: "others".to_owned(),
                };
                core.places.failed(place, &core.wanted, &lie);
                left = true;
            }
        }
        left
    }

    fn link(&self) -> Link {
        if self.core.inline.is_some() {
            return Link::LOCAL;
        }
        // The registry gets the next request when the redirect has expired, and it is where back-offs are recorded. A
        // back-off of the registry therefore counts for this link.
        let core = &self.core;
        let registry = core.client.transport().meter(core.places.origin().endpoint.base());
        let mut link = core.copy_in_use().host().link();
        link.resting |= registry.link().resting;
        link
    }

    fn retries(&self) -> Retries {
        self.core.meter.retries()
    }
}

impl BlobCore {
    fn what(&self) -> String {
        format!("blob {} of {}", self.digest, self.places.name())
    }

    /// Returns the copy of the place that would be asked now.
    fn copy_in_use(&self) -> &BlobCopy {
        &self.copies[self.places.first_to_ask(&self.wanted)]
    }
}
