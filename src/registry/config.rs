//! What a [`RegistryClient`](super::RegistryClient) is built from.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::credentials::{ConfigFiles, CredentialSource};
use super::endpoint::PlainHttp;

/// Settings of a client; [`Default`] suits public registries with the user's own credential files.
#[derive(Debug, Clone)]
pub struct RegistryConfig {
    /// Which registries are spoken to without TLS.
    pub plain_http: PlainHttp,
    /// PEM files with certificate authorities trusted besides the system's.
    pub ca_files: Vec<PathBuf>,
    /// Whether registries with a public address may lead (by redirects, and to token servers) to addresses that are not public.
    pub allow_private_redirects: bool,
    /// Where credentials come from; asked again whenever one is needed.
    pub credentials: Arc<dyn CredentialSource>,
    /// Time without progress after which an operation fails; [`Duration::MAX`] never gives up.
    pub timeout: Duration,
    /// Time without a byte after which one response body is given up and resumed on another connection.
    pub stall_timeout: Duration,
    /// Time for one TCP and TLS handshake.
    pub connect_timeout: Duration,
    /// Hosts (with port, unless it is the usual one) from which foreign layers are fetched that the registry does not have.
    pub foreign_layer_hosts: Vec<String>,
    /// The `User-Agent` header.
    pub user_agent: String,
}

impl Default for RegistryConfig {
    fn default() -> Self {
        Self {
            plain_http: PlainHttp::default(),
            ca_files: Vec::new(),
            allow_private_redirects: false,
            credentials: Arc::new(ConfigFiles::from_environment()),
            timeout: Duration::from_secs(30),
            // A third of the default timeout: a dead connection costs one resume, not the operation.
            stall_timeout: Duration::from_secs(10),
            // Covers two lost SYN packets (1 s + 2 s) and a slow handshake.
            connect_timeout: Duration::from_secs(8),
            foreign_layer_hosts: Vec::new(),
            user_agent: concat!("ocifs/", env!("CARGO_PKG_VERSION")).to_owned(),
        }
    }
}
