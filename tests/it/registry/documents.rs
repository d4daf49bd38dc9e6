//! Manifests and configs: round trips, verification, limits, errors.

use std::time::Instant;

use ocifs::blob::{BlobError, ImageSource as _};
use ocifs::oci::{Digest, ReferenceSelector};
use ocifs::registry::{MAX_MANIFEST, PlainHttp, RegistryClient, RegistryConfig};

use super::{client, config, descriptor, impatient, source};
use crate::common::closed_port::ClosedPort;
use crate::common::ocifs::PATIENCE;
use crate::common::registry::{Fault, Guard, MANIFEST, TestRegistry, Tokens, image};

#[tokio::test]
async fn a_mount_costs_token_manifest_and_config_over_one_connection() {
    let registry = TestRegistry::start();
    let digest = registry.add_image("org/app", "latest", &[b"layer".to_vec()]);
    registry.guard(Guard::Bearer(Tokens::default()));
    let documents = image(&[b"layer".to_vec()]);
    let client = client();
    let image = source(&client, &registry, "latest");
    let root = image.root().await.unwrap();
    assert_eq!((root.digest, root.media_type.as_str()), (digest, MANIFEST));
    let wanted = descriptor(&Digest::of(&documents.config), documents.config.len());
    let config = image.config(&wanted).await.unwrap();
    assert_eq!(config.bytes, documents.config);
    let log = registry.log();
    let steps: Vec<(&str, u16)> = log
        .iter()
        .map(|logged| (logged.target.split(['?', ':']).next().unwrap(), logged.status))
        .collect();
    let manifest = "/v2/org/app/manifests/latest";
    assert_eq!(
        steps,
        [
            (manifest, 401),
            ("/token", 200),
            (manifest, 200),
            ("/v2/org/app/blobs/sha256", 200)
        ]
    );
    assert!(
        log.iter().all(|logged| logged.connection == 0),
        "connections are kept alive"
    );
    let accept = &log[0].headers["accept"];
    for kind in [
        "image.index.v1",
        "image.manifest.v1",
        "manifest.list.v2",
        "distribution.manifest.v2",
    ] {
        assert!(accept.contains(kind), "{accept}");
    }
}

#[tokio::test]
async fn documents_are_verified() {
    let registry = TestRegistry::start();
    let digest = registry.add_manifest("org/app", Some("latest"), MANIFEST, b"{}".to_vec());
    let client = client();
    let by_digest = client
        .source(&registry.host(), "org/app", ReferenceSelector::digest(digest.clone()))
        .unwrap();
    assert_eq!(by_digest.root().await.unwrap().bytes.as_ref(), b"{}");
    registry.fault("/manifests/", 2, Fault::Corrupt(1));
    let error = by_digest.root().await.unwrap_err();
    assert!(
        matches!(&error, BlobError::Corrupt { expected, .. } if *expected == digest.to_string()),
        "{error}"
    );
    // For a tag, the bytes must match the digest that the registry states.
    let error = source(&client, &registry, "latest").root().await.unwrap_err();
    assert!(matches!(error, BlobError::Corrupt { .. }), "{error}");
    let pinned = ReferenceSelector::tag_with_digest("gone", digest);
    let pinned = client.source(&registry.host(), "org/app", pinned).unwrap();
    assert!(pinned.root().await.is_ok(), "the digest decides, not the tag");
}

#[tokio::test]
async fn documents_have_a_size_limit_stated_or_not() {
    let registry = TestRegistry::start();
    registry.add_manifest("org/app", Some("huge"), MANIFEST, vec![b' '; MAX_MANIFEST + 1]);
    let image = source(&client(), &registry, "huge");
    for stated in [true, false] {
        if !stated {
            registry.fault("/manifests/", 1, Fault::NoLength);
        }
        let error = image.root().await.unwrap_err();
        assert!(matches!(error, BlobError::Protocol { .. }), "{error}");
    }
    registry.add_manifest("org/app", Some("latest"), MANIFEST, b"{}".to_vec());
    registry.fault("/manifests/", 1, Fault::NoLength);
    assert!(source(&client(), &registry, "latest").root().await.is_ok());
}

#[tokio::test]
async fn embedded_configs_need_no_request() {
    let registry = TestRegistry::start();
    let mut wanted = descriptor(&Digest::of(b"{}"), 2);
    wanted.data = Some("e30=".to_owned());
    let image = source(&client(), &registry, "latest");
    assert_eq!(image.config(&wanted).await.unwrap().bytes.as_ref(), b"{}");
    assert!(registry.log().is_empty());
}

#[tokio::test]
async fn a_missing_tag_names_the_others() {
    let registry = TestRegistry::start();
    registry.add_manifest("org/app", Some("v1"), MANIFEST, b"{}".to_vec());
    registry.add_manifest("org/app", Some("v2"), MANIFEST, b"{}".to_vec());
    let client = client();
    let error = source(&client, &registry, "v3").root().await.unwrap_err();
    assert!(matches!(error, BlobError::NotFound { .. }));
    assert!(error.to_string().contains("v1, v2"), "{error}");
    assert_eq!(registry.log().len(), 2);
    let missing = client
        .source(&registry.host(), "no/such", ReferenceSelector::tag("v1"))
        .unwrap();
    let error = missing.root().await.unwrap_err().to_string();
    assert!(
        error.contains("does not exist or needs a login") && error.contains("NAME_UNKNOWN"),
        "{error}"
    );
}

#[tokio::test]
async fn only_a_registry_that_hides_the_tags_makes_a_repository_doubtful() {
    let registry = TestRegistry::start();
    registry.add_manifest("org/app", Some("v1"), MANIFEST, b"{}".to_vec());
    let client = client();
    let body = |body: &str| Fault::Status {
        code: 200,
        headers: Vec::new(),
        body: body.to_owned(),
    };
    for (fault, doubtful) in [
        (Fault::status(401), true),
        (Fault::status(403), true),
        (Fault::status(404), true),
        (Fault::status(429), false),
        (Fault::status(500), false),
        (Fault::Hangup, false),
        (Fault::Truncate(3), false),
        (body("<html>"), false),
        (body(r#"{"name":"org/app","tags":null}"#), false),
    ] {
        registry.fault("/tags/", 1, fault.clone());
        let error = source(&client, &registry, "v3").root().await.unwrap_err();
        assert!(matches!(error, BlobError::NotFound { .. }), "{error}");
        let error = error.to_string();
        assert_eq!(
            error.contains("does not exist or needs a login"),
            doubtful,
            "{fault:?}: {error}"
        );
        assert!(error.contains("MANIFEST_UNKNOWN"), "{fault:?}: {error}");
    }
    registry.fault("/tags/", 1, body(r#"{"tags":[]}"#));
    let error = source(&client, &registry, "v3").root().await.unwrap_err().to_string();
    assert!(error.contains("has no tags (MANIFEST_UNKNOWN"), "{error}");
}

#[tokio::test]
async fn refusals_keep_the_servers_words() {
    let registry = TestRegistry::start();
    registry.add_manifest("org/app", Some("latest"), MANIFEST, b"{}".to_vec());
    let denied = Fault::Status {
        code: 403,
        headers: Vec::new(),
        body: r#"{"errors":[{"code":"DENIED","message":"no pull for you"}]}"#.to_owned(),
    };
    registry.fault("/manifests/", 1, denied);
    let image = source(&client(), &registry, "latest");
    let error = image.root().await.unwrap_err();
    assert!(matches!(error, BlobError::Denied { .. }));
    assert!(error.to_string().contains("DENIED: no pull for you"), "{error}");
    registry.fault("/manifests/", 1, Fault::status(418));
    let error = image.root().await.unwrap_err();
    assert!(matches!(error, BlobError::Protocol { transient: false, .. }), "{error}");
    assert_eq!(registry.count("/manifests/"), 2, "other 4xx are not retried");
}

#[tokio::test]
async fn transient_failures_of_documents_are_retried() {
    let registry = TestRegistry::start();
    registry.add_manifest("org/app", Some("latest"), MANIFEST, b"{\"a\": 1}".to_vec());
    let image = source(&impatient(), &registry, "latest");
    for fault in [
        Fault::status(503),
        Fault::status(429),
        Fault::Hangup,
        Fault::Truncate(3),
        Fault::Stall(3),
    ] {
        registry.clear_log();
        registry.fault("/manifests/", 1, fault.clone());
        image.root().await.unwrap_or_else(|error| panic!("{fault:?}: {error}"));
        assert!(registry.count("/manifests/") <= 2, "{fault:?}");
    }
}

#[tokio::test]
async fn unreachable_hosts_are_reported_soon_and_by_name() {
    let closed = ClosedPort::new();
    let patient = RegistryConfig::default();
    let client = RegistryClient::new(RegistryConfig {
        timeout: patient.timeout,
        ..config()
    })
    .unwrap();
    for host in [closed.address().to_string(), "no-such-host.invalid".to_owned()] {
        let started = Instant::now();
        let image = client.source(&host, "a", ReferenceSelector::tag("b")).unwrap();
        let error = image.root().await.unwrap_err();
        assert!(
            matches!(&error, BlobError::Unreachable { host: h, .. } if *h == host),
            "{error}"
        );
        assert!(error.to_string().contains("3 attempts"), "{error}");
        assert!(started.elapsed() < patient.timeout, "long before the deadline");
    }
}

#[tokio::test]
async fn tls_to_a_plain_registry_says_so() {
    let registry = TestRegistry::start();
    let client = RegistryClient::new(RegistryConfig {
        plain_http: PlainHttp::Nowhere,
        ..config()
    })
    .unwrap();
    let error = source(&client, &registry, "latest").root().await.unwrap_err();
    assert!(matches!(error, BlobError::Tls { .. }), "{error}");
    assert!(error.to_string().contains("plain HTTP"), "{error}");
}

#[tokio::test]
async fn silence_ends_at_the_deadline() {
    let registry = TestRegistry::start();
    registry.fault("/manifests/", usize::MAX, Fault::Silence);
    let client = RegistryClient::new(RegistryConfig {
        timeout: std::time::Duration::from_secs(1),
        ..config()
    })
    .unwrap();
    let started = Instant::now();
    let error = source(&client, &registry, "latest").root().await.unwrap_err();
    assert!(matches!(error, BlobError::Timeout { .. }), "{error}");
    assert!(started.elapsed() < PATIENCE, "{:?}", started.elapsed());
    assert!(
        registry.count("/manifests/") >= 2,
        "a silent connection leaves time for another"
    );
}
