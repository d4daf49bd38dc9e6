//! Many bytes of a blob by several requests side by side, as one stream.
//!
//! One connection seldom fills a link: its window grows slowly and ends at a few megabytes, and many servers give each only
//! so much. So a large blob is cut into stripes:
//!
//! ```text
//! blob   │ passed on │ passed on ▒▒▒▒ │ ▒▒▒▒▒▒▒▒▒ │ ▒▒▒▒      │ ▒▒        │ not asked for yet …
//!                      the first one    ahead: received and kept until their turn comes
//! ```
//! Bytes of the first stripe are passed on as they come, at whatever pace they are taken. How many stripes may be ahead is a
//! number of permits that all layers share, and nobody waits for one: so memory is bounded, and the layer that was opened
//! first, which is the largest, gets most of them.
//!
//! A range is cut into parts, of at most a stripe, because connections that have been idle bring little in their first round
//! trips ([`Policy::parts`]): so many are asked for at once.
//!
//! Invariants: bytes come in order, each once; a server that turns out to know no ranges is asked for the whole blob instead,
//! if that was wanted; what is under way ends when the stream is dropped.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf as _, Bytes};
use futures::stream::{self, StreamExt as _};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;

use super::LayerStats;
use crate::blob::{BlobError, BlobSource, ByteStream};

/// Bytes of a stripe: several round trips' worth, so that asking for it costs little.
const STRIPE: u64 = 1 << 20;
/// A smaller blob has come before stripes would pay.
const SMALLEST: u64 = 16 * STRIPE;
/// Stripes ahead, in all layers together: what fills a link of 1 Gbit/s and 80 ms.
const AHEAD: usize = 6;
/// Parts of ranges beside the first ones, in all layers together.
const PARTS: usize = 24;
/// A blob nearer than this fills its link with one stream.
const NEAR: Duration = Duration::from_millis(2);

/// How much may be under way out of turn; shared by all layers.
#[derive(Debug, Clone)]
pub(super) struct Ahead {
    stripes: Arc<Semaphore>,
    parts: Arc<Semaphore>,
}

impl Default for Ahead {
    fn default() -> Self {
        Self {
            stripes: Arc::new(Semaphore::new(AHEAD)),
            parts: Arc::new(Semaphore::new(PARTS)),
        }
    }
}

/// Reads all of `blob` from `start` on. A server without ranges is asked for all of it then, too.
pub(super) async fn read(
    blob: Arc<dyn BlobSource>,
    start: u64,
    ahead: &Ahead,
    stats: Arc<LayerStats>,
) -> Result<ByteStream, BlobError> {
    let rest = start..blob.size();
    let length = rest.end.saturating_sub(start);
    let near = blob.link().rtt.is_some_and(|rtt| rtt < NEAR);
    let (stripe, most_ahead) = if near || length < SMALLEST {
        (length, 0)
    } else {
        (STRIPE, AHEAD)
    };
    let mut stripes = Stripes::new(blob, rest, stripe, most_ahead, ahead.stripes.clone(), stats);
    stripes.is_whole = true;
    // What is wrong with the blob as a whole shows here.
    stripes.advance().await?;
    Ok(stripes.into_stream())
}

/// Reads a range of `blob` in at most `parts` parts at a time.
pub(super) async fn read_range(
    blob: Arc<dyn BlobSource>,
    range: Range<u64>,
    parts: u64,
    ahead: &Ahead,
    stats: Arc<LayerStats>,
) -> Result<ByteStream, BlobError> {
    let parts = parts.min(1 + ahead.parts.available_permits() as u64);
    if parts == 1 {
        stats.request();
        return blob.read(range).await;
    }
    let part = (range.end - range.start).div_ceil(parts).min(STRIPE);
    let mut stripes = Stripes::new(blob, range, part, parts as usize - 1, ahead.parts.clone(), stats);
    let first = stripes.next_range();
    stripes.look_ahead();
    stripes.open(first).await?;
    Ok(stripes.into_stream())
}

struct Stripes {
    blob: Arc<dyn BlobSource>,
    stripe: u64,
    end: u64,
    /// Whether so much of the blob is wanted that a server without ranges may be asked for all of it.
    is_whole: bool,
    /// Passed on up to here,
    position: u64,
    /// asked for up to here.
    asked: u64,
    first: Receiving,
    queue: VecDeque<Stripe>,
    tasks: JoinSet<()>,
    most_ahead: usize,
    ahead: Arc<Semaphore>,
    stats: Arc<LayerStats>,
}

enum Receiving {
    Direct(ByteStream),
    /// No more than a stripe can be in it.
    Kept(mpsc::UnboundedReceiver<Result<Bytes, BlobError>>),
}

/// A stripe that waits for its turn.
struct Stripe {
    chunks: mpsc::UnboundedReceiver<Result<Bytes, BlobError>>,
    _permit: OwnedSemaphorePermit,
}

impl Stripes {
    fn new(
        blob: Arc<dyn BlobSource>,
        range: Range<u64>,
        stripe: u64,
        most_ahead: usize,
        ahead: Arc<Semaphore>,
        stats: Arc<LayerStats>,
    ) -> Self {
        Self {
            stripe,
            position: range.start,
            asked: range.start,
            end: range.end,
            is_whole: range == (0..blob.size()),
            first: Receiving::Direct(stream::empty().boxed()),
            queue: VecDeque::new(),
            tasks: JoinSet::new(),
            blob,
            most_ahead,
            ahead,
            stats,
        }
    }

    fn into_stream(self) -> ByteStream {
        let stream = stream::try_unfold(self, |mut stripes| async move {
            let bytes = stripes.next().await?;
            Ok(bytes.map(|bytes| (bytes, stripes)))
        });
        stream.boxed()
    }

    async fn next(&mut self) -> Result<Option<Bytes>, BlobError> {
        while self.position < self.end {
            self.look_ahead();
            let received = match &mut self.first {
                Receiving::Direct(stream) => stream.next().await,
                Receiving::Kept(chunks) => chunks.recv().await,
            };
            match received {
                Some(Ok(bytes)) => {
                    self.position += bytes.len() as u64;
                    return Ok(Some(bytes));
                }
                Some(Err(BlobError::RangeUnsupported { .. })) if self.is_whole => self.start_over().await?,
                Some(Err(error)) => return Err(error),
                None => self.advance().await?,
            }
        }
        Ok(None)
    }

    /// Goes on to the next stripe.
    async fn advance(&mut self) -> Result<(), BlobError> {
        if let Some(stripe) = self.queue.pop_front() {
            self.first = Receiving::Kept(stripe.chunks);
            return Ok(());
        }
        let range = self.next_range();
        match self.open(range).await {
            Err(BlobError::RangeUnsupported { .. }) if self.is_whole => self.start_over().await,
            result => result,
        }
    }

    async fn open(&mut self, range: Range<u64>) -> Result<(), BlobError> {
        self.stats.request();
        self.first = Receiving::Direct(self.blob.read(range).await?);
        Ok(())
    }

    fn next_range(&mut self) -> Range<u64> {
        let end = self.end.min(self.asked + self.stripe);
        std::mem::replace(&mut self.asked, end)..end
    }

    /// Asks for as many stripes as may be ahead.
    fn look_ahead(&mut self) {
        while self.asked < self.end
            && self.queue.len() < self.most_ahead
            && let Ok(permit) = self.ahead.clone().try_acquire_owned()
        {
            let range = self.next_range();
            let (sender, chunks) = mpsc::unbounded_channel();
            self.stats.request();
            self.tasks.spawn(receive(self.blob.clone(), range, sender));
            self.queue.push_back(Stripe {
                chunks,
                _permit: permit,
            });
        }
    }

    /// The server has no ranges after all: everything from the start, without what was passed on already.
    async fn start_over(&mut self) -> Result<(), BlobError> {
        self.queue.clear();
        self.tasks.abort_all();
        self.asked = self.end;
        self.stats.request();
        let stream = self.blob.read(0..self.end).await?;
        let mut skip = self.position;
        let rest = stream.filter_map(move |bytes| {
            let rest = bytes.map(|mut bytes| {
                let known = skip.min(bytes.len() as u64);
                skip -= known;
                bytes.advance(known as usize);
                bytes
            });
            let empty = matches!(&rest, Ok(bytes) if bytes.is_empty());
            std::future::ready((!empty).then_some(rest))
        });
        self.first = Receiving::Direct(rest.boxed());
        Ok(())
    }
}

/// Receives a stripe, until nobody wants it any more.
async fn receive(blob: Arc<dyn BlobSource>, range: Range<u64>, kept: mpsc::UnboundedSender<Result<Bytes, BlobError>>) {
    let mut stream = match blob.read(range).await {
        Ok(stream) => stream,
        Err(error) => return drop(kept.send(Err(error))),
    };
    while let Some(bytes) = stream.next().await {
        if kept.send(bytes).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use async_trait::async_trait;
    use futures::TryStreamExt as _;

    use super::*;
    use crate::blob::Link;
    use crate::oci::Digest;

    /// Bytes far away, in pieces; how many readings were under way at once.
    #[derive(Debug)]
    struct Far {
        digest: Digest,
        bytes: Bytes,
        /// Offset from which on it has no ranges.
        ranges_until: u64,
        open: Arc<AtomicUsize>,
        most: Arc<AtomicUsize>,
    }

    struct Opened(Arc<AtomicUsize>);

    impl Drop for Opened {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::SeqCst);
        }
    }

    impl Far {
        fn new(size: usize, ranges_until: u64) -> Self {
            let bytes: Bytes = (0..size).map(|i| (i / 7 + i / 65_537) as u8).collect();
            Self {
                digest: Digest::of(&bytes),
                bytes,
                ranges_until,
                open: Arc::default(),
                most: Arc::default(),
            }
        }
    }

    #[async_trait]
    impl BlobSource for Far {
        fn digest(&self) -> &Digest {
            &self.digest
        }

        fn size(&self) -> u64 {
            self.bytes.len() as u64
        }

        async fn read(&self, range: Range<u64>) -> Result<ByteStream, BlobError> {
            if range.start >= self.ranges_until {
                return Err(BlobError::RangeUnsupported {
                    host: "far".into(),
                    what: "it".into(),
                });
            }
            let opened = Opened(self.open.clone());
            let now = self.open.fetch_add(1, Ordering::SeqCst) + 1;
            self.most.fetch_max(now, Ordering::SeqCst);
            let bytes = self.bytes.slice(range.start as usize..range.end as usize);
            let pieces = stream::unfold((bytes, opened), |(mut rest, opened)| async move {
                tokio::task::yield_now().await;
                let piece = rest.split_to(rest.len().min(100_000));
                (!piece.is_empty()).then_some((Ok(piece), (rest, opened)))
            });
            Ok(pieces.boxed())
        }

        fn link(&self) -> Link {
            Link {
                rtt: Some(Duration::from_millis(20)),
                bandwidth: None,
                warm: 0,
            }
        }
    }

    async fn read_all(blob: &Arc<Far>) -> (Vec<u8>, u64) {
        let stats = Arc::new(LayerStats::new(blob.size()));
        let ahead = Ahead::default();
        let stream = read(blob.clone(), 0, &ahead, stats.clone()).await.unwrap();
        let chunks: Vec<Bytes> = stream.try_collect().await.unwrap();
        assert_eq!(ahead.stripes.available_permits(), AHEAD);
        (chunks.concat(), stats.requests())
    }

    #[tokio::test]
    async fn bytes_come_in_order_and_several_stripes_at_once() {
        let blob = Arc::new(Far::new(SMALLEST as usize + STRIPE as usize + 12_345, u64::MAX));
        let (bytes, requests) = read_all(&blob).await;
        assert!(bytes == blob.bytes);
        assert_eq!(requests, blob.size().div_ceil(STRIPE));
        assert_eq!(blob.most.load(Ordering::SeqCst), 1 + AHEAD, "the first and those ahead");
    }

    #[tokio::test]
    async fn a_server_without_ranges_is_asked_for_the_whole() {
        for ranges_until in [1, STRIPE + 1, 3 * STRIPE] {
            let blob = Arc::new(Far::new(SMALLEST as usize + 1, ranges_until));
            let (bytes, _) = read_all(&blob).await;
            assert!(bytes == blob.bytes, "{ranges_until}");
        }
    }

    #[tokio::test]
    async fn what_is_under_way_ends_with_the_stream() {
        let blob = Arc::new(Far::new(SMALLEST as usize + STRIPE as usize, u64::MAX));
        let stats = Arc::new(LayerStats::new(blob.size()));
        let ahead = Ahead::default();
        let mut stream = read(blob.clone(), 0, &ahead, stats).await.unwrap();
        stream.next().await.unwrap().unwrap();
        assert!(ahead.stripes.available_permits() < AHEAD);
        drop(stream);
        while blob.open.load(Ordering::SeqCst) > 0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(ahead.stripes.available_permits(), AHEAD);
    }

    #[tokio::test]
    async fn all_parts_of_a_range_are_asked_for_at_once_as_far_as_there_is_room() {
        let blob = Arc::new(Far::new(1_000_000, u64::MAX));
        let stats = Arc::new(LayerStats::new(blob.size()));
        let ahead = Ahead::default();
        let mut streams = Vec::new();
        for requests in [10, 20, 27, 28] {
            streams.push(
                read_range(blob.clone(), 1_000..201_234, 10, &ahead, stats.clone())
                    .await
                    .unwrap(),
            );
            assert_eq!(stats.requests(), requests);
        }
        for stream in streams {
            let chunks: Vec<Bytes> = stream.try_collect().await.unwrap();
            assert!(chunks.concat() == blob.bytes[1_000..201_234]);
        }
        assert_eq!(ahead.parts.available_permits(), PARTS);
    }

    #[tokio::test]
    async fn of_a_long_range_no_more_than_a_few_stripes_are_ahead() {
        let blob = Arc::new(Far::new(20 * STRIPE as usize, u64::MAX));
        let stats = Arc::new(LayerStats::new(blob.size()));
        let ahead = Ahead::default();
        let mut stream = read_range(blob.clone(), 5..blob.size(), 4, &ahead, stats.clone())
            .await
            .unwrap();
        assert_eq!(stats.requests(), 4);
        let first = stream.next().await.unwrap().unwrap();
        while blob.open.load(Ordering::SeqCst) > 1 {
            tokio::task::yield_now().await;
        }
        assert_eq!(stats.requests(), 4, "those ahead have come and wait for their turn");
        let rest: Vec<Bytes> = stream.try_collect().await.unwrap();
        assert!([first].concat() == blob.bytes[5..][..100_000] && rest.concat() == blob.bytes[100_005..]);
        assert_eq!((stats.requests(), ahead.parts.available_permits()), (20, PARTS));
    }

    #[tokio::test]
    async fn a_part_that_fails_ends_the_range() {
        let blob = Arc::new(Far::new(1_000_000, 500_000));
        let stats = Arc::new(LayerStats::new(blob.size()));
        let stream = read_range(blob.clone(), 1..1_000_000, 4, &Ahead::default(), stats)
            .await
            .unwrap();
        let result: Result<Vec<Bytes>, BlobError> = stream.try_collect().await;
        assert!(matches!(result, Err(BlobError::RangeUnsupported { .. })));
    }

    #[tokio::test]
    async fn a_small_blob_is_one_request() {
        let blob = Arc::new(Far::new(STRIPE as usize, u64::MAX));
        assert_eq!(read_all(&blob).await, (blob.bytes.to_vec(), 1));
    }
}
