//! Requests for ranges, and redirects.

use std::time::{Duration, SystemTime};

use futures::TryStreamExt as _;
use ocifs::blob::{BlobError, BlobSource as _, Verdict};
use ocifs::registry::{Credential, Fixed, Puller, Secret};

use super::{blob, client, client_with, descriptor, ranges, read, source};
use crate::common::registry::{Fault, Guard, TestRegistry, Tokens};

const MIB: u64 = 1 << 20;

#[tokio::test]
async fn ranges_are_exact_and_a_whole_blob_is_asked_without_one() {
    let registry = TestRegistry::start();
    let client = client();
    let (bytes, blob) = blob(&client, &registry, 100_000);
    assert_eq!(read(&blob, 0..100_000).await.unwrap(), bytes);
    assert_eq!(read(&blob, 99_999..100_000).await.unwrap(), bytes[99_999..]);
    assert_eq!(read(&blob, 0..1).await.unwrap(), bytes[..1]);
    assert_eq!(read(&blob, 5..5).await.unwrap(), b"");
    assert_eq!(ranges(&registry), ["", "bytes=99999-99999", "bytes=0-0"]);
    let log = registry.log();
    assert!(log.iter().all(|logged| logged.headers["accept-encoding"] == "identity"));
    assert!(
        log.iter().all(|logged| logged.connection == 0),
        "connections are kept alive"
    );
    for range in [99_999..100_001, 100_001..100_002] {
        assert!(matches!(read(&blob, range).await, Err(BlobError::Invalid { .. })));
    }
    assert_eq!(blob.stats().bytes, 100_002);
    assert_eq!(blob.stats().requests, 3);
    let stats = client.stats();
    assert_eq!((stats[0].host.clone(), stats[0].requests), (registry.host(), 3));
    assert!(stats[0].rtt.is_some());
}

#[tokio::test]
async fn short_answers_are_continued() {
    let registry = TestRegistry::start();
    let (bytes, blob) = blob(&client(), &registry, 1000);
    registry.fault("/blobs/", usize::MAX, Fault::Short(300));
    assert_eq!(read(&blob, 100..900).await.unwrap(), bytes[100..900]);
    assert_eq!(ranges(&registry), ["bytes=100-899", "bytes=400-899", "bytes=700-899"]);
}

#[tokio::test]
async fn parts_are_taken_as_far_as_their_headers_allow() {
    let registry = TestRegistry::start();
    let client = client();
    let (bytes, blob) = blob(&client, &registry, 1000);
    let label = |text: &str| Fault::ContentRange(text.to_owned());
    let encoding = |text: &str| Fault::Header("Content-Encoding".to_owned(), text.to_owned());
    for faults in [
        vec![label("bytes 100-199/*")],
        vec![label("bytes 100-199/999")],
        vec![label("bytes 100-200/1000")],
        vec![label("garbage")],
        vec![label("bytes=100-199/1000")],
        vec![label("")],
        vec![label(""), Fault::Chunked],
        vec![label(""), Fault::NoLength],
        vec![encoding("gzip")],
        vec![encoding("aws-chunked")],
        vec![encoding("br")],
        vec![encoding("x-gzip"), label("")],
        vec![Fault::Wide(64)],
        vec![Fault::Wide(64), Fault::Chunked],
        vec![Fault::Wide(1000)],
        vec![Fault::PartAsWhole],
        vec![Fault::PartAsWhole, label("")],
        vec![Fault::Multipart],
        vec![Fault::Multipart, Fault::Chunked],
        vec![Fault::Multipart, Fault::Wide(64)],
    ] {
        registry.clear_log();
        for fault in faults.clone() {
            registry.fault("/blobs/", 1, fault);
        }
        let read = read(&blob, 100..200).await;
        assert!(
            read.as_ref().is_ok_and(|read| read[..] == bytes[100..200]),
            "{faults:?}: {read:?}"
        );
        assert_eq!(registry.log().len(), 1, "{faults:?}");
    }
}

#[tokio::test]
async fn parts_that_are_wrong_are_not_asked_for_again() {
    let label = |text: &str| Fault::ContentRange(text.to_owned());
    for (fault, told) in [
        (label("bytes 0-99/1000"), false),
        (label("bytes 101-200/1000"), false),
        (Fault::WholeAsPart, false),
        // The client cannot see this fault. The caller compares the bytes with a digest and reports it.
        (Fault::OtherBytes, true),
        (Fault::Compress("gzip"), false),
    ] {
        let registry = TestRegistry::start();
        let (bytes, blob) = blob(&client(), &registry, 1000);
        registry.fault("/blobs/", usize::MAX, fault.clone());
        if told {
            let wrong = read(&blob, 100..200).await;
            assert!(!wrong.is_ok_and(|read| read == bytes[100..200]), "{fault:?}");
            blob.judged(Verdict::OnlyPartsAreWrong);
        }
        registry.clear_log();
        registry.clear_faults();
        if !told {
            registry.fault("/blobs/", 1, fault.clone());
        }
        assert_eq!(read(&blob, 100..200).await.unwrap(), bytes[100..200], "{fault:?}");
        let asked = ranges(&registry);
        assert_eq!(asked.last().unwrap(), "", "{fault:?}: {asked:?}");
        registry.clear_log();
        assert_eq!(read(&blob, 300..400).await.unwrap(), bytes[300..400]);
        assert_eq!(ranges(&registry), [""], "{fault:?}");
    }
}

#[tokio::test]
async fn what_nobody_checks_is_taken_only_when_it_is_proven() {
    let registry = TestRegistry::start();
    let (bytes, _) = blob(&client(), &registry, 3 << 20);
    let puller = Puller::new(client(), &registry.host());
    let digest = ocifs::oci::Digest::of(&bytes);
    let range = 2 * MIB..2 * MIB + 100;
    let read = async || {
        let stream = puller.fetch_image_blob("org/app", &digest, range.clone()).await?;
        Ok::<_, BlobError>(stream.try_collect::<Vec<_>>().await?.concat())
    };
    assert_eq!(read().await.unwrap(), bytes[2 << 20..][..100]);
    registry.fault(
        "/blobs/",
        usize::MAX,
        Fault::Header("Content-Encoding".to_owned(), "gzip".to_owned()),
    );
    let error = read().await.unwrap_err();
    assert!(matches!(error, BlobError::RangeUnsupported { .. }), "{error}");
}

#[tokio::test]
async fn servers_that_ignore_ranges_serve_what_is_near_or_whole() {
    let registry = TestRegistry::start();
    let client = client();
    let (bytes, blob) = blob(&client, &registry, 3 << 20);
    registry.fault("/blobs/", 4, Fault::IgnoreRange);
    let error = read(&blob, 2 * MIB..3 * MIB).await.unwrap_err();
    assert!(matches!(error, BlobError::RangeUnsupported { .. }), "{error}");
    assert_eq!(registry.log().len(), 1);
    assert_eq!(read(&blob, 1000..2000).await.unwrap(), bytes[1000..2000]);
    assert_eq!(read(&blob, 0..2000).await.unwrap(), bytes[..2000]);
    assert!(read(&blob, 0..3 * MIB).await.unwrap() == bytes);
    registry.clear_log();
    assert!(read(&blob, 2 * MIB..3 * MIB).await.is_err());
    assert!(registry.log().is_empty(), "it is remembered of the blob");
    let other = registry.add_blob(vec![7; 3 << 20]);
    let other = source(&client, &registry, "latest")
        .registry_blob(&descriptor(&other, 3 << 20))
        .unwrap();
    assert!(
        read(&other, 2 * MIB..3 * MIB).await.unwrap() == vec![7; 1 << 20],
        "another blob of the host is asked for"
    );
    assert!(read(&blob, 1000..2000).await.is_ok());
    let again = read(&blob, 2 * MIB..3 * MIB).await;
    assert!(again.is_ok(), "a proper answer makes up for it: {again:?}");
}

#[tokio::test]
async fn a_blob_that_is_shorter_than_promised_is_corrupt() {
    let registry = TestRegistry::start();
    let client = client();
    let digest = registry.add_blob(b"short".to_vec());
    let image = source(&client, &registry, "latest");
    let blob = image.registry_blob(&descriptor(&digest, 500)).unwrap();
    for range in [100..200, 0..500, 0..10] {
        let error = read(&blob, range.clone()).await.unwrap_err();
        assert!(
            matches!(
                error,
                BlobError::Corrupt { .. } | BlobError::Protocol { transient: false, .. }
            ),
            "{range:?}: {error}"
        );
    }
    let missing = image
        .registry_blob(&descriptor(&ocifs::oci::Digest::of(b"?"), 5))
        .unwrap();
    assert!(matches!(read(&missing, 0..5).await, Err(BlobError::NotFound { .. })));
}

#[tokio::test]
async fn redirects_are_remembered_and_credentials_stay_behind() {
    let (registry, storage) = (TestRegistry::start(), TestRegistry::start());
    registry.guard(Guard::Bearer(Tokens::default()));
    registry.redirect_blobs(&storage, usize::MAX, "", 1);
    let client = client();
    let (bytes, blob) = blob(&client, &registry, 10_000);
    for at in 0..5 {
        assert_eq!(
            read(&blob, at * 100..(at + 1) * 100).await.unwrap(),
            bytes[at as usize * 100..][..100]
        );
    }
    assert_eq!(registry.count("/blobs/"), 2, "one challenge, one redirect");
    assert_eq!(storage.log().len(), 5);
    assert_eq!(
        blob.host_stats().host,
        storage.host(),
        "the host that serves is the one to measure"
    );
    for logged in registry.log().iter().chain(&storage.log()) {
        assert_eq!(logged.connection, 0, "connections outlive redirects and challenges");
    }
    for logged in storage.log() {
        assert!(!logged.headers.contains_key("authorization"));
        assert!(logged.headers["range"].starts_with("bytes="));
        assert_eq!(logged.headers["accept-encoding"], "identity");
    }
}

#[tokio::test]
async fn basic_credentials_stay_behind_too() {
    let (registry, storage) = (TestRegistry::start(), TestRegistry::start());
    registry.guard(Guard::Basic("me".to_owned(), "hunter2".to_owned()));
    registry.redirect_blobs(&storage, usize::MAX, "", 3);
    let credential = Credential::Basic {
        username: "me".to_owned(),
        password: Secret::new("hunter2"),
    };
    let client = client_with(Fixed {
        registry: registry.host(),
        credential,
    });
    let (bytes, blob) = blob(&client, &registry, 100);
    assert_eq!(read(&blob, 0..100).await.unwrap(), bytes);
    assert!(
        storage
            .log()
            .iter()
            .all(|logged| !logged.headers.contains_key("authorization"))
    );
}

#[tokio::test]
async fn expired_redirects_are_resolved_again_once() {
    let (registry, storage) = (TestRegistry::start(), TestRegistry::start());
    registry.redirect_blobs(&storage, 2, "", 1);
    let (bytes, blob) = blob(&client(), &registry, 1000);
    for at in 0..6 {
        assert_eq!(
            read(&blob, at * 100..(at + 1) * 100).await.unwrap(),
            bytes[at as usize * 100..][..100]
        );
    }
    assert_eq!(registry.count("/blobs/"), 3, "two reads per URL");
    assert_eq!(storage.log().iter().filter(|logged| logged.status == 403).count(), 2);
    registry.redirect_blobs(&storage, 0, "", 1);
    registry.clear_log();
    let error = read(&blob, 0..10).await.unwrap_err();
    assert!(matches!(error, BlobError::Denied { .. }), "{error}");
    let text = format!("{error} {error:?} {blob:?}");
    assert!(text.contains("Request has expired"), "{text}");
    assert!(!text.contains("ticket"), "signed URLs are secrets: {text}");
    assert_eq!(registry.count("/blobs/"), 1);
}

#[tokio::test]
async fn urls_that_say_they_end_are_not_used_after() {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    for (left, resolved) in [(Duration::from_secs(5), 3), (Duration::from_secs(3600), 1)] {
        let (registry, storage) = (TestRegistry::start(), TestRegistry::start());
        registry.redirect_blobs(&storage, usize::MAX, &format!("Expires={}", (now + left).as_secs()), 1);
        let (_, blob) = blob(&client(), &registry, 1000);
        for _ in 0..3 {
            read(&blob, 0..10).await.unwrap();
        }
        assert_eq!(registry.count("/blobs/"), resolved);
    }
}

#[tokio::test]
async fn redirects_have_an_end() {
    for (hops, good) in [(10, true), (11, false)] {
        let (registry, storage) = (TestRegistry::start(), TestRegistry::start());
        registry.redirect_blobs(&storage, usize::MAX, "", hops);
        let (_, blob) = blob(&client(), &registry, 100);
        let result = read(&blob, 0..10).await;
        assert_eq!(result.is_ok(), good, "{hops} hops: {result:?}");
    }
}

#[tokio::test]
async fn a_dead_storage_host_is_asked_for_anew() {
    let (registry, storage, other) = (TestRegistry::start(), TestRegistry::start(), TestRegistry::start());
    registry.redirect_blobs(&storage, usize::MAX, "", 1);
    let (bytes, blob) = blob(&client(), &registry, 1000);
    read(&blob, 0..10).await.unwrap();
    drop(storage);
    registry.redirect_blobs(&other, usize::MAX, "", 1);
    assert_eq!(read(&blob, 10..20).await.unwrap(), bytes[10..20]);
    assert_eq!(blob.size(), 1000);
}
