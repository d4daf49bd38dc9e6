//! Streams that resume after failures, and end when resuming is hopeless.

use std::time::{Duration, Instant};

use futures::StreamExt as _;
use ocifs::blob::{BlobError, BlobSource as _};
use ocifs::registry::{RegistryClient, RegistryConfig};

use super::{blob, client, config, impatient, ranges, read};
use crate::common::ocifs::PATIENCE;
use crate::common::registry::{Fault, Guard, Logged, TestRegistry, Tokens};

#[tokio::test]
async fn interrupted_streams_resume_at_the_exact_offset() {
    for (fault, resumed_at) in [
        (Fault::Truncate(70_000), Some(70_000)),
        (Fault::Stall(70_000), Some(70_000)),
        (Fault::Truncate(0), Some(0)),
        (Fault::Hangup, None),
        (Fault::Silence, None),
        (Fault::status(500), None),
        (Fault::status(503), None),
        (Fault::status(408), None),
        (Fault::status(429), None),
    ] {
        let registry = TestRegistry::start();
        let (bytes, blob) = blob(&impatient(), &registry, 200_000);
        registry.fault("/blobs/", 1, fault.clone());
        let got = read(&blob, 1000..200_000)
            .await
            .unwrap_or_else(|error| panic!("{fault:?}: {error}"));
        assert!(got == bytes[1000..], "{fault:?}");
        let asked = ranges(&registry);
        let again = format!("bytes={}-199999", 1000 + resumed_at.unwrap_or(0));
        assert_eq!(asked.last().unwrap(), &again, "{fault:?}: {asked:?}");
    }
}

#[tokio::test]
async fn a_whole_read_survives_many_cuts() {
    let registry = TestRegistry::start();
    let (bytes, blob) = blob(&client(), &registry, 500_000);
    registry.fault("/blobs/", 4, Fault::Truncate(90_000));
    assert!(read(&blob, 0..500_000).await.unwrap() == bytes);
    assert_eq!(
        ranges(&registry),
        [
            "",
            "bytes=90000-499999",
            "bytes=180000-499999",
            "bytes=270000-499999",
            "bytes=360000-499999"
        ]
    );
}

#[tokio::test]
async fn a_cut_whole_read_resumes_without_ranges_too() {
    let registry = TestRegistry::start();
    let (bytes, blob) = blob(&client(), &registry, 3 << 20);
    registry.fault("/blobs/", usize::MAX, Fault::IgnoreRange);
    registry.fault("/blobs/", 1, Fault::Truncate(2 << 20));
    assert!(read(&blob, 0..3 << 20).await.unwrap() == bytes);
}

#[tokio::test]
async fn retry_after_is_obeyed() {
    let registry = TestRegistry::start();
    let (bytes, blob) = blob(&client(), &registry, 100);
    let limited = |after: &str| Fault::Status {
        code: 429,
        headers: vec![("Retry-After".to_owned(), after.to_owned())],
        body: String::new(),
    };
    registry.fault("/blobs/", 1, limited("1"));
    let started = Instant::now();
    assert_eq!(read(&blob, 0..100).await.unwrap(), bytes);
    assert!(started.elapsed() >= Duration::from_secs(1));
    registry.fault("/blobs/", 1, limited("600"));
    let started = Instant::now();
    let error = read(&blob, 0..100).await.unwrap_err();
    assert!(matches!(error, BlobError::RateLimited { after: Some(after), .. } if after.as_secs() == 600));
    assert!(
        started.elapsed() < PATIENCE,
        "longer than the deadline is not waited for"
    );
}

#[tokio::test]
async fn hopeless_reads_end_at_the_deadline_and_count_attempts() {
    let short = RegistryConfig {
        timeout: Duration::from_secs(1),
        ..config()
    };
    let client = RegistryClient::new(short).unwrap();
    for fault in [
        Fault::status(503),
        Fault::Hangup,
        Fault::Stall(0),
        Fault::Truncate(0),
        // Some bytes always arrive, but never enough.
        Fault::Truncate(1),
        Fault::Slow(1, Duration::from_millis(20)),
    ] {
        let registry = TestRegistry::start();
        let (_, blob) = blob(&client, &registry, 1000);
        // The host has answered before, so the client retries.
        read(&blob, 0..1).await.unwrap();
        registry.fault("/blobs/", usize::MAX, fault.clone());
        let started = Instant::now();
        let error = read(&blob, 0..1000).await.unwrap_err();
        assert!(error.is_transient(), "{fault:?}: {error}");
        assert!(error.to_string().contains("attempts in"), "{fault:?}: {error}");
        let took = started.elapsed();
        assert!(
            (Duration::from_millis(300)..PATIENCE).contains(&took),
            "{fault:?}: {took:?}"
        );
    }
}

#[tokio::test]
async fn slow_is_not_stalled_and_a_slow_reader_is_not_punished() {
    let short = RegistryConfig {
        timeout: Duration::from_millis(1400),
        ..config()
    };
    let client = RegistryClient::new(short).unwrap();
    let registry = TestRegistry::start();
    let (bytes, blob) = blob(&client, &registry, 8000);
    registry.fault("/blobs/", 1, Fault::Slow(1000, Duration::from_millis(250)));
    assert_eq!(read(&blob, 0..8000).await.unwrap(), bytes);
    assert_eq!(
        registry.log().len(),
        1,
        "2 s of steady progress under a deadline of 1.4 s"
    );
    registry.clear_log();
    registry.fault("/blobs/", 1, Fault::Truncate(4000));
    let mut stream = blob.read(0..8000).await.unwrap();
    let mut got = stream.next().await.unwrap().unwrap().to_vec();
    tokio::time::sleep(Duration::from_millis(1800)).await;
    while let Some(chunk) = stream.next().await {
        got.extend_from_slice(&chunk.unwrap());
    }
    assert_eq!(got, bytes);
}

#[tokio::test]
async fn a_lasting_error_in_the_middle_ends_the_stream_once() {
    let registry = TestRegistry::start();
    let (bytes, blob) = blob(&client(), &registry, 1000);
    registry.fault("/blobs/", 1, Fault::Truncate(400));
    let mut stream = blob.read(0..1000).await.unwrap();
    registry.fault("/blobs/", 1, Fault::status(404));
    let mut got = Vec::new();
    let error = loop {
        match stream.next().await.unwrap() {
            Ok(chunk) => got.extend_from_slice(&chunk),
            Err(error) => break error,
        }
    };
    assert_eq!(got, bytes[..400]);
    assert!(matches!(error, BlobError::NotFound { .. }), "{error}");
    assert!(stream.next().await.is_none());
}

/// Many readers at once, with every kind of fault. Tokens and URLs expire all the time. The bytes must be right.
#[tokio::test]
async fn whatever_goes_wrong_the_bytes_are_right() {
    for seed in 0..4 {
        let mut random = fastrand::Rng::with_seed(seed);
        let (registry, storage) = (TestRegistry::start(), TestRegistry::start());
        registry.guard(Guard::Bearer(Tokens {
            uses: 25,
            ..Tokens::default()
        }));
        registry.redirect_blobs(&storage, 3, "", 2);
        let (bytes, blob) = blob(&impatient(), &registry, 300_000);
        for _ in 0..12 {
            let fault = match random.u8(..8) {
                0 => Fault::Hangup,
                1 => Fault::status(503),
                2 => Fault::status(429),
                3 => Fault::Stall(random.usize(..100_000)),
                4 => Fault::IgnoreRange,
                5 => Fault::Short(random.usize(1..100_000)),
                _ => Fault::Truncate(random.usize(..100_000)),
            };
            let target = if random.bool() { &storage } else { &registry };
            target.fault("sha256:", 1, fault);
        }
        let wanted: Vec<_> = (0..12)
            .map(|_| {
                let (a, b) = (random.u64(..=300_000), random.u64(..=300_000));
                a.min(b)..a.max(b)
            })
            .collect();
        let got = futures::future::join_all(wanted.iter().map(|range| read(&blob, range.clone()))).await;
        for (range, got) in wanted.iter().zip(got) {
            let got = got.unwrap_or_else(|error| panic!("seed {seed}, {range:?}: {error}"));
            assert!(
                got == bytes[range.start as usize..range.end as usize],
                "seed {seed}, {range:?}"
            );
        }
        let shown = |logged: &Logged| logged.headers.contains_key("authorization");
        assert!(!storage.log().iter().any(shown), "seed {seed}");
    }
}
