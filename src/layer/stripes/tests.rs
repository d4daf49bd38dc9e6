use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use futures::TryStreamExt as _;

use super::*;
use crate::blob::{BlobSource, Link, LinkId};
use crate::layer::LayerStats;
use crate::oci::Digest;

fn origin(blob: &Arc<Far>, stats: &Arc<LayerStats>) -> Origin {
    Origin {
        blob: blob.clone(),
        lanes: Arc::default(),
        stats: stats.clone(),
        patient: false,
    }
}

/// A blob over a slow way, which comes in pieces. Counts the readings that are open, and their largest number.
#[derive(Debug)]
struct Far {
    digest: Digest,
    bytes: Bytes,
    /// From this offset on the blob does not support ranges.
    ranges_until: u64,
    /// If set, all readings share 8 kB a second.
    modem: Option<Arc<tokio::sync::Mutex<()>>>,
    open: Arc<AtomicUsize>,
    most: Arc<AtomicUsize>,
}

struct OpenedCount(Arc<AtomicUsize>);

impl Drop for OpenedCount {
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
            modem: None,
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
        let opened = OpenedCount(self.open.clone());
        let now = self.open.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(now, Ordering::SeqCst);
        let bytes = self.bytes.slice(range.start as usize..range.end as usize);
        let modem = self.modem.clone();
        let pieces = stream::unfold((bytes, opened), move |(mut rest, opened)| {
            let modem = modem.clone();
            async move {
                let mut size = 100_000;
                if let Some(modem) = modem {
                    let _turn = modem.lock().await;
                    tokio::time::sleep(Duration::from_millis(25)).await;
                    size = 200;
                }
                tokio::task::yield_now().await;
                let piece = rest.split_to(rest.len().min(size));
                (!piece.is_empty()).then_some((Ok(piece), (rest, opened)))
            }
        });
        Ok(pieces.boxed())
    }

    fn link(&self) -> Link {
        Link {
            id: LinkId(1),
            rtt: Some(Duration::from_millis(20)),
            bandwidth: None,
            warm: 0,
            streams: self.open.load(Ordering::SeqCst) as u32,
            ..Link::LOCAL
        }
    }
}

async fn read_all(blob: &Arc<Far>) -> (Vec<u8>, u64) {
    let stats = Arc::new(LayerStats::new(blob.size()));
    let ahead = Ahead::default();
    let stream = read(origin(blob, &stats), 0, &ahead).await.unwrap();
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
    let mut stream = read(origin(&blob, &stats), 0, &ahead).await.unwrap();
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
            read_range(origin(&blob, &stats), 1_000..201_234, 10, &ahead)
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
    let mut stream = read_range(origin(&blob, &stats), 5..blob.size(), 4, &ahead)
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
    let stream = read_range(origin(&blob, &stats), 1..1_000_000, 4, &Ahead::default())
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

/// Stripes over a whole blob.
fn stripes_of(blob: &Arc<Far>) -> Stripes {
    let stats = Arc::new(LayerStats::new(blob.size()));
    Stripes::new(
        origin(blob, &stats),
        0..blob.size(),
        STRIPE,
        AHEAD,
        Ahead::default().stripes,
    )
}

#[tokio::test]
async fn a_stripe_that_ends_early_without_an_error_is_asked_for_again() {
    let blob = Arc::new(Far::new(SMALLEST as usize + 77, u64::MAX));
    let mut stripes = stripes_of(&blob);
    stripes.advance().await.unwrap();
    let mut bytes = Vec::new();
    while let Some(chunk) = stripes.next().await.unwrap() {
        bytes.extend_from_slice(&chunk);
        // The tasks that receive the stripes ahead end early, like after a panic, at the beginning and at the very
        // end.
        if bytes.len() < 200_000 || stripes.asked == stripes.end {
            stripes.tasks.abort_all();
        }
    }
    assert!(bytes == blob.bytes);
}

#[tokio::test]
async fn a_slow_link_is_left_to_the_first_stripe() {
    let modem = Arc::new(tokio::sync::Mutex::new(()));
    let blob = Arc::new(Far {
        modem: Some(modem),
        ..Far::new(SMALLEST as usize + 1, u64::MAX)
    });
    let stats = Arc::new(LayerStats::new(blob.size()));
    let mut stream = read(origin(&blob, &stats), 0, &Ahead::default()).await.unwrap();
    stream.next().await.unwrap().unwrap();
    assert_eq!(blob.open.load(Ordering::SeqCst), 1 + AHEAD);
    let mut came = 0;
    while blob.open.load(Ordering::SeqCst) > 1 {
        came += stream.next().await.unwrap().unwrap().len();
    }
    assert!(came < 50_000, "{came}");
    // The first stripe has the whole link: 8 kB a second.
    let (start, mut rest) = (Instant::now(), 0);
    while rest < 16_000 {
        rest += stream.next().await.unwrap().unwrap().len();
    }
    assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
    // Nothing is fetched ahead. There may be one second request for the first stripe.
    assert!(blob.open.load(Ordering::SeqCst) <= 2);
}

#[tokio::test]
async fn finished_tasks_are_not_kept() {
    let blob = Arc::new(Far::new(40 * STRIPE as usize, u64::MAX));
    let mut stripes = stripes_of(&blob);
    while stripes.next().await.unwrap().is_some() {
        assert!(stripes.tasks.len() <= AHEAD + 1, "{}", stripes.tasks.len());
    }
}
