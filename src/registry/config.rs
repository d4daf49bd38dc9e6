//! The settings of a [`RegistryClient`](super::RegistryClient).

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::credentials::{ConfigFiles, CredentialSource};
use super::endpoint::PlainHttp;
use super::hosts::HostFiles;

/// Settings of a client. [`Default`] suits public registries and the files of this machine and of its user.
#[derive(Debug, Clone)]
pub struct RegistryConfig {
    /// Which registries are used without TLS.
    pub plain_http: PlainHttp,
    /// PEM files with certificates to trust in addition to the system's: those of authorities, or of servers
    /// themselves.
    pub ca_files: Vec<PathBuf>,
    /// Whether a registry with a public address may lead to addresses that are not public, by redirects or as token
    /// servers.
    pub allow_private_redirects: bool,
    /// Files that say how to reach registries: mirrors, certificates and the like.
    pub hosts: HostFiles,
    /// Source of credentials. The client asks it each time it needs one.
    pub credentials: Arc<dyn CredentialSource>,
    /// Time without progress after which an operation fails. With [`Duration::MAX`] an operation never gives up.
    pub timeout: Duration,
    /// Time without a byte after which the client gives up a response's body and resumes on another connection.
    pub stall_timeout: Duration,
    /// Timeout of one TCP and TLS handshake.
    pub connect_timeout: Duration,
    /// Hosts to fetch foreign layers from that the registry does not have, with the port unless it is the default
    /// one.
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
            hosts: HostFiles::from_environment(),
            credentials: Arc::new(ConfigFiles::from_environment()),
            timeout: Duration::from_secs(30),
            // A third of the default timeout, so that a dead connection costs one resume and not the operation.
            stall_timeout: Duration::from_secs(10),
            // Allows for two lost SYN packets (1 s and 2 s) and a slow handshake.
            connect_timeout: Duration::from_secs(8),
            foreign_layer_hosts: Vec::new(),
            user_agent: concat!("ocifs/", env!("CARGO_PKG_VERSION")).to_owned(),
        }
    }
}
