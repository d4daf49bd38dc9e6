use std::collections::VecDeque;
use std::sync::Mutex;

use async_trait::async_trait;
use futures::TryStreamExt as _;

use super::*;
use crate::oci::Digest;

const SIZE: usize = 400_000;

/// How the blob answers a request.
#[derive(Debug, Clone, Copy)]
enum BlobAnswer {
    /// All bytes at once.
    Good,
    /// So many bytes, then none.
    Stalls(usize),
    /// So many bytes each tenth of a second.
    Slow(usize),
    /// No answer at all.
    Silent,
    Fails,
}

/// A blob that answers its requests as planned. The last answer repeats for ever.
#[derive(Debug)]
struct PlannedBlob {
    digest: Digest,
    bytes: Bytes,
    answers: Mutex<VecDeque<BlobAnswer>>,
    asked: Mutex<Vec<(Range<u64>, bool)>>,
    link: Mutex<Link>,
}

impl PlannedBlob {
    fn new(answers: &[BlobAnswer]) -> Arc<Self> {
        let bytes: Bytes = (0..SIZE).map(|i| (i / 7 + i / 65_537) as u8).collect();
        Arc::new(Self {
            digest: Digest::of(&bytes),
            bytes,
            answers: Mutex::new(answers.iter().copied().collect()),
            asked: Mutex::default(),
            link: Mutex::new(Link {
                id: LinkId(1),
                rtt: Some(Duration::from_millis(20)),
                bandwidth: Some(25e6),
                warm: 0,
                streams: 1,
                resting: false,
            }),
        })
    }

    async fn answer(&self, range: Range<u64>, apart: bool) -> Result<ByteStream, BlobError> {
        self.asked.lock().unwrap().push((range.clone(), apart));
        let answer = {
            let mut answers = self.answers.lock().unwrap();
            match answers.len() {
                1 => answers[0],
                _ => answers.pop_front().unwrap(),
            }
        };
        let bytes = self.bytes.slice(range.start as usize..range.end as usize);
        let pieces = |bytes: Bytes, size: usize, pause: Duration| {
            stream::unfold(bytes, move |mut rest| async move {
                tokio::time::sleep(pause).await;
                let piece = rest.split_to(rest.len().min(size));
                (!piece.is_empty()).then_some((Ok(piece), rest))
            })
        };
        Ok(match answer {
            BlobAnswer::Good => pieces(bytes, 100_000, Duration::ZERO).boxed(),
            BlobAnswer::Stalls(after) => {
                let some = bytes.slice(..after.min(bytes.len()));
                pieces(some, 10_000, Duration::ZERO).chain(stream::pending()).boxed()
            }
            BlobAnswer::Slow(size) => pieces(bytes, size, Duration::from_millis(100)).boxed(),
            BlobAnswer::Silent => std::future::pending().await,
            BlobAnswer::Fails => {
                return Err(BlobError::Unreachable {
                    host: "far".into(),
                    reason: "reset".into(),
                });
            }
        })
    }

    fn asked(&self) -> Vec<(Range<u64>, bool)> {
        self.asked.lock().unwrap().clone()
    }
}

#[async_trait]
impl BlobSource for PlannedBlob {
    fn digest(&self) -> &Digest {
        &self.digest
    }

    fn size(&self) -> u64 {
        SIZE as u64
    }

    async fn read(&self, range: Range<u64>) -> Result<ByteStream, BlobError> {
        self.answer(range, false).await
    }

    async fn read_apart(&self, range: Range<u64>) -> Result<ByteStream, BlobError> {
        self.answer(range, true).await
    }

    fn link(&self) -> Link {
        *self.link.lock().unwrap()
    }
}

fn origin(blob: &Arc<PlannedBlob>) -> Origin {
    Origin {
        blob: blob.clone(),
        lanes: Arc::default(),
        stats: Arc::new(LayerStats::new(SIZE as u64)),
        patient: false,
    }
}

/// Reads a range and checks its bytes. Returns how long that took by the clock of the test.
async fn read(origin: &Origin, blob: &PlannedBlob, range: Range<u64>) -> Duration {
    let start = tokio::time::Instant::now();
    let stream = origin.read(range.clone()).await.unwrap();
    let chunks: Vec<Bytes> = stream.try_collect().await.unwrap();
    assert!(chunks.concat() == blob.bytes[range.start as usize..range.end as usize]);
    assert_eq!(origin.lanes.load().hedges, 0);
    start.elapsed()
}

#[tokio::test]
async fn what_comes_well_is_asked_for_once() {
    // One request is enough even if it takes a while: 50 kB in each tenth of a second.
    for answer in [BlobAnswer::Good, BlobAnswer::Slow(50_000)] {
        let blob = PlannedBlob::new(&[answer]);
        let origin = origin(&blob);
        read(&origin, &blob, 5..SIZE as u64).await;
        assert_eq!(blob.asked(), [(5..SIZE as u64, false)]);
        assert_eq!(origin.stats.hedges(), 0);
    }
}

#[tokio::test]
async fn what_stalls_comes_over_another_connection() {
    for answer in [
        BlobAnswer::Stalls(30_000),
        BlobAnswer::Stalls(0),
        BlobAnswer::Silent,
        BlobAnswer::Slow(100),
    ] {
        let blob = PlannedBlob::new(&[answer, BlobAnswer::Good]);
        let origin = origin(&blob);
        let took = read(&origin, &blob, 1_000..SIZE as u64).await;
        assert!(took < Duration::from_secs(3), "{answer:?}: {took:?}");
        let asked = blob.asked();
        assert_eq!(asked.len(), 2, "{answer:?}");
        let ((rest, apart), at) = (asked[1].clone(), asked[0].0.start);
        assert!(
            apart && rest.start >= at && rest.end == SIZE as u64,
            "{answer:?}: {rest:?}"
        );
        assert_eq!(origin.stats.hedges(), 1);
        // The second request was useful, so there may be another one.
        assert!(origin.lanes.hedge(LinkId(1)).is_some());
    }
}

#[tokio::test]
async fn a_second_connection_that_stalls_too_is_replaced() {
    let blob = PlannedBlob::new(&[
        BlobAnswer::Stalls(10_000),
        BlobAnswer::Stalls(100_000),
        BlobAnswer::Good,
    ]);
    let origin = origin(&blob);
    read(&origin, &blob, 0..SIZE as u64).await;
    assert_eq!(blob.asked().last().unwrap().0.start, 110_000);
    // A second connection that brings almost nothing is no better than the first, and the next attempt comes later.
    let blob = PlannedBlob::new(&[BlobAnswer::Stalls(10_000), BlobAnswer::Slow(50), BlobAnswer::Good]);
    let origin = self::origin(&blob);
    read(&origin, &blob, 0..SIZE as u64).await;
    assert_eq!(blob.asked().len(), 3);
}

#[tokio::test]
async fn a_second_request_that_is_slower_or_fails_hurts_nobody() {
    for second in [BlobAnswer::Silent, BlobAnswer::Fails, BlobAnswer::Slow(10)] {
        let blob = PlannedBlob::new(&[BlobAnswer::Slow(1_000), second]);
        let origin = origin(&blob);
        let end = 20_000;
        read(&origin, &blob, 0..end).await;
        assert_eq!(blob.asked().len(), 2, "{second:?}");
        assert!(origin.lanes.hedge(LinkId(1)).is_none(), "{second:?}: not again soon");
    }
}

#[tokio::test]
async fn the_error_of_the_last_request_is_the_error() {
    let blob = PlannedBlob::new(&[BlobAnswer::Fails]);
    assert!(origin(&blob).read(0..10).await.is_err());
}

#[tokio::test]
async fn a_patient_reading_asks_until_it_has_the_bytes() {
    let blob = PlannedBlob::new(&[
        BlobAnswer::Fails,
        BlobAnswer::Fails,
        BlobAnswer::Fails,
        BlobAnswer::Good,
    ]);
    let origin = Origin {
        patient: true,
        ..origin(&blob)
    };
    read(&origin, &blob, 10..SIZE as u64).await;
    // The delays between the attempts are longer than a connection may bring nothing.
    assert_eq!(blob.asked().len(), 4);
    assert_eq!(origin.stats.hedges(), 0);
    assert_eq!(origin.stats.trouble(), None, "it is over");
}

#[tokio::test]
async fn nothing_is_asked_twice_of_a_server_that_wants_to_be_left_alone() {
    let blob = PlannedBlob::new(&[BlobAnswer::Silent, BlobAnswer::Good]);
    blob.link.lock().unwrap().resting = true;
    let origin = origin(&blob);
    let waiting = tokio::time::timeout(Duration::from_millis(2_500), origin.read(0..10));
    assert!(waiting.await.is_err());
    assert_eq!(blob.asked().len(), 1);
}
