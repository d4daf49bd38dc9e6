//! The registry client against a registry that misbehaves on request, and against real ones.

mod auth;
mod documents;
mod files;
mod hurried;
mod pull;
mod ranges;
mod real;
mod resume;

use std::sync::Arc;
use std::time::Duration;

use futures::TryStreamExt as _;
use ocifs::blob::{BlobError, BlobSource};
use ocifs::oci::{Descriptor, Digest, ReferenceSelector};
use ocifs::registry::{Anonymous, CredentialSource, RegistryBlob, RegistryClient, RegistryConfig, RegistrySource};

use crate::common::ocifs::PATIENCE;
use crate::common::registry::TestRegistry;

/// Returns settings without credentials, with timeouts that are long enough for a busy machine.
fn config() -> RegistryConfig {
    RegistryConfig {
        credentials: Arc::new(Anonymous),
        timeout: Duration::from_secs(10),
        stall_timeout: Duration::from_secs(2),
        ..RegistryConfig::default()
    }
}

/// Returns a client that counts 300 ms of silence as a stall.
fn impatient() -> RegistryClient {
    let stall_timeout = Duration::from_millis(300);
    RegistryClient::new(RegistryConfig {
        stall_timeout,
        ..config()
    })
    .unwrap()
}

fn client() -> RegistryClient {
    RegistryClient::new(config()).unwrap()
}

fn client_with(credentials: impl CredentialSource + 'static) -> RegistryClient {
    let credentials = Arc::new(credentials);
    RegistryClient::new(RegistryConfig {
        credentials,
        ..config()
    })
    .unwrap()
}

fn source(client: &RegistryClient, registry: &TestRegistry, tag: &str) -> RegistrySource {
    let selector = ReferenceSelector::tag(tag);
    client.source(&registry.host(), "org/app", selector).unwrap()
}

fn descriptor(digest: &Digest, size: usize) -> Descriptor {
    Descriptor {
        media_type: String::new(),
        digest: digest.clone(),
        size: size as i64,
        urls: Vec::new(),
        annotations: Default::default(),
        data: None,
        artifact_type: None,
        platform: None,
    }
}

/// Returns a blob of `size` bytes that differ at every nearby offset, and a handle on it.
fn blob(client: &RegistryClient, registry: &TestRegistry, size: usize) -> (Vec<u8>, RegistryBlob) {
    let bytes: Vec<u8> = (0..size as u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let digest = registry.add_blob(bytes.clone());
    let handle = source(client, registry, "latest")
        .registry_blob(&descriptor(&digest, size))
        .unwrap();
    (bytes, handle)
}

async fn read(blob: &RegistryBlob, range: std::ops::Range<u64>) -> Result<Vec<u8>, BlobError> {
    Ok(blob.read(range).await?.try_collect::<Vec<_>>().await?.concat())
}

/// Polls until `done` returns true and lets other tasks run meanwhile. Panics after [`PATIENCE`].
async fn until(what: &str, mut done: impl FnMut() -> bool) {
    let polling = async {
        while !done() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let ended = tokio::time::timeout(PATIENCE, polling).await;
    assert!(ended.is_ok(), "never happened: {what}");
}

/// Returns the `Range` headers of the blob requests, in order; empty for a request without one.
fn ranges(registry: &TestRegistry) -> Vec<String> {
    let log = registry.log();
    let blobs = log.iter().filter(|logged| logged.target.contains("sha256:"));
    blobs
        .map(|logged| logged.headers.get("range").cloned().unwrap_or_default())
        .collect()
}
