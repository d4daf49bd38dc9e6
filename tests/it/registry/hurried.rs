//! A client that gives up sooner than the one whose connections it uses.

use std::time::Duration;

use ocifs::blob::{BlobError, ImageSource as _};
use ocifs::oci::ReferenceSelector;
use ocifs::registry::{HostFiles, HostsFrom, RegistryClient, RegistryConfig};

use super::{blob, client, config, read, source};
use crate::common::ocifs::PATIENCE;
use crate::common::registry::{Fault, Guard, MANIFEST, TestRegistry, Tokens};

/// The time after which the hurried client gives up.
const HURRY: Duration = Duration::from_secs(1);

#[tokio::test]
async fn a_hurried_client_uses_the_same_connections_and_logins() {
    let registry = TestRegistry::start();
    registry.guard(Guard::Bearer(Tokens::default()));
    let client = client();
    let (bytes, first) = blob(&client, &registry, 1000);
    assert_eq!(read(&first, 0..1000).await.unwrap(), bytes);
    let (_, second) = blob(&client.hurried(HURRY), &registry, 1000);
    assert_eq!(read(&second, 0..1000).await.unwrap(), bytes);
    assert_eq!(registry.count("/token"), 1);
    assert!(registry.log().iter().all(|logged| logged.connection == 0));
}

#[tokio::test]
async fn a_hurried_client_gives_up_and_the_other_one_goes_on() {
    let client = RegistryClient::new(RegistryConfig {
        timeout: 5 * HURRY,
        stall_timeout: 3 * HURRY,
        ..config()
    })
    .unwrap();
    for fault in [
        Fault::Silence,
        Fault::Stall(100),
        Fault::Truncate(0),
        Fault::status(503),
    ] {
        let registry = TestRegistry::start();
        let (bytes, patient) = blob(&client, &registry, 1000);
        let (_, hurried) = blob(&client.hurried(HURRY), &registry, 1000);
        // The host has answered before, so both clients retry.
        read(&patient, 0..1).await.unwrap();
        registry.fault("/blobs/", usize::MAX, fault.clone());
        let giving_up = async {
            let error = read(&hurried, 0..1000).await.unwrap_err();
            assert!(error.is_transient(), "{fault:?}: {error}");
            registry.clear_faults();
        };
        let (got, ()) = futures::join!(read(&patient, 0..1000), giving_up);
        assert_eq!(got.unwrap(), bytes, "{fault:?}");
    }
}

#[tokio::test]
async fn more_time_than_the_other_client_has_changes_nothing() {
    let registry = TestRegistry::start();
    registry.fault("/manifests/", usize::MAX, Fault::Silence);
    let short = RegistryConfig {
        timeout: HURRY,
        ..config()
    };
    let client = RegistryClient::new(short).unwrap().hurried(Duration::MAX);
    let image = source(&client, &registry, "latest");
    let asked = tokio::time::timeout(PATIENCE, image.root()).await;
    let error = asked.expect("it gives up").unwrap_err();
    assert!(matches!(error, BlobError::Timeout { .. }), "{error}");
}

/// A mirror whose answers take longer than a hurried client waits is still asked by the other client.
#[tokio::test]
async fn a_mirror_that_is_too_slow_for_a_hurried_client_is_asked_by_the_other_one() {
    let (registry, mirror) = (TestRegistry::start(), TestRegistry::start());
    for place in [&registry, &mirror] {
        place.add_manifest("org/app", Some("latest"), MANIFEST, b"{}".to_vec());
    }
    mirror.latency(HURRY);
    let files = tempfile::tempdir().unwrap();
    let directory = files.path().join(registry.host());
    std::fs::create_dir(&directory).unwrap();
    let text = format!(
        "[host.\"http://{}\"]\ncapabilities = [\"pull\", \"resolve\"]\n",
        mirror.host()
    );
    std::fs::write(directory.join("hosts.toml"), text).unwrap();
    let client = RegistryClient::new(RegistryConfig {
        hosts: HostFiles {
            from: HostsFrom::Containerd,
            containerd: vec![files.path().to_owned()],
            ..HostFiles::from_environment()
        },
        ..config()
    })
    .unwrap();
    let selector = ReferenceSelector::tag("latest");
    let image = |client: &RegistryClient| client.source(&registry.host(), "org/app", selector.clone()).unwrap();
    image(&client.hurried(HURRY)).root().await.unwrap();
    assert_eq!(registry.count("/manifests/"), 1, "the mirror took too long");
    image(&client).root().await.unwrap();
    assert_eq!(registry.count("/manifests/"), 1, "the mirror is fast enough");
}
