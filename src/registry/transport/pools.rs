//! Connection pools.
//!
//! A pool is made when it is first needed, so a plain-HTTP mount never reads the system's certificates. Requests to
//! loopback hosts never go through a proxy. Each TLS configuration names its cryptography provider. No process-wide
//! provider is installed.

use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use reqwest::{Client, Url};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

use super::guard::{self, PublicOnly};
use super::{authority, tls};
use crate::blob::BlobError;
use crate::registry::config::RegistryConfig;
use crate::registry::endpoint::is_loopback;
use crate::registry::failure;

/// How long idle connections are kept. The planner pauses between bursts, so a shorter time costs more handshakes.
/// Load balancers close idle connections after 60 s or more, so a longer time keeps dead connections.
const POOL_IDLE: Duration = Duration::from_secs(55);
/// HTTP/2 flow-control window of a stream, in bytes. A stream can fill 200 Mbit/s at a round trip of 160 ms.
const H2_STREAM_WINDOW: u32 = 4 << 20;
/// HTTP/2 flow-control window of a connection, in bytes. It has room for the full windows of four streams.
const H2_CONNECTION_WINDOW: u32 = 16 << 20;

/// Pools by kind of host: loopback or not, with TLS or without, restricted to public addresses or not.
///
/// A connection made without the restriction is never used where the address must be public. Each kind has a second
/// pool, for requests that must not share a connection with ordinary ones. Over HTTP/2, all requests of a pool to the
/// same host share one connection.
#[derive(Debug)]
pub(super) struct Pools {
    settings: Settings,
    authorities: Vec<CertificateDer<'static>>,
    /// Made once: making it reads the system's certificates, and pools that share it resume each other's TLS
    /// sessions.
    tls: OnceLock<Result<rustls::ClientConfig, BlobError>>,
    lanes: [OnceLock<Result<Client, BlobError>>; 16],
}

/// The settings that pools take from the client's configuration.
#[derive(Debug)]
struct Settings {
    user_agent: String,
    connect_timeout: Duration,
    stall_timeout: Duration,
}

impl Pools {
    /// Reads the certificate files, so that an invalid file is reported early.
    pub(super) fn new(config: &RegistryConfig) -> Result<Self, BlobError> {
        let mut authorities = Vec::new();
        for path in &config.ca_files {
            authorities.extend(read_authorities(path)?);
        }
        Ok(Self {
            settings: Settings {
                user_agent: config.user_agent.clone(),
                connect_timeout: config.connect_timeout,
                stall_timeout: config.stall_timeout,
            },
            authorities,
            tls: OnceLock::new(),
            lanes: [const { OnceLock::new() }; 16],
        })
    }

    /// Returns the pool for a URL. A `guarded` pool connects to public addresses only. An `apart` pool has
    /// connections that ordinary requests do not use; all `apart` requests share them.
    pub(super) fn get(&self, url: &Url, guarded: bool, apart: bool) -> Result<&Client, BlobError> {
        if guarded && let Err(refused) = guard::check(url) {
            return Err(failure::not_public(&authority(url), refused));
        }
        let loopback = url.host_str().is_some_and(is_loopback);
        let tls = url.scheme() == "https";
        let slot = &self.lanes
            [usize::from(apart) * 8 + usize::from(guarded) * 4 + usize::from(loopback) * 2 + usize::from(tls)];
        let pool = slot.get_or_init(|| self.make(loopback, tls, guarded));
        pool.as_ref().map_err(BlobError::clone)
    }

    fn make(&self, loopback: bool, tls: bool, guarded: bool) -> Result<Client, BlobError> {
        let settings = &self.settings;
        // Dead connections must be noticed even if the stall timeout is endless.
        let alive = settings.stall_timeout.min(Duration::from_secs(60));
        let mut builder = Client::builder()
            .tls_backend_preconfigured(self.tls_config(tls)?)
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never())
            .referer(false)
            .user_agent(&settings.user_agent)
            .connect_timeout(settings.connect_timeout)
            .pool_idle_timeout(POOL_IDLE)
            .tcp_nodelay(true)
            .tcp_keepalive(Duration::from_secs(15))
            .http2_initial_stream_window_size(H2_STREAM_WINDOW)
            .http2_initial_connection_window_size(H2_CONNECTION_WINDOW)
            .http2_keep_alive_interval(alive)
            .http2_keep_alive_timeout(alive);
        #[cfg(target_os = "linux")]
        {
            builder = builder.tcp_user_timeout(alive);
        }
        if loopback || no_proxy_for_any() {
            builder = builder.no_proxy();
        }
        if guarded {
            builder = builder.dns_resolver(PublicOnly);
        }
        builder
            .build()
            .map_err(|error| failure::transport("the HTTP client", error))
    }

    /// Returns a configuration that trusts the system's certificates and the configured ones. Without TLS, an empty
    /// set suffices, because it is never used.
    fn tls_config(&self, tls: bool) -> Result<rustls::ClientConfig, BlobError> {
        match tls {
            true => self.tls.get_or_init(|| config(self.trusted())).clone(),
            false => config(Vec::new()),
        }
    }

    /// Returns the system's certificates and the configured ones. A system without certificates is no error. The
    /// configured ones may suffice, and if not, the handshake reports an unknown issuer.
    fn trusted(&self) -> Vec<CertificateDer<'static>> {
        let native = rustls_native_certs::load_native_certs();
        for error in &native.errors {
            tracing::debug!(%error, "a system certificate could not be read");
        }
        [native.certs, self.authorities.clone()].concat()
    }
}

/// Whether the environment says that no host is asked through a proxy (`*`). The HTTP library applies the `*` to
/// names, not to addresses.
fn no_proxy_for_any() -> bool {
    let said = ["NO_PROXY", "no_proxy"]
        .iter()
        .find_map(|name| std::env::var(name).ok());
    said.is_some_and(|hosts| hosts.split(',').any(|host| host.trim() == "*"))
}

fn config(trusted: Vec<CertificateDer<'static>>) -> Result<rustls::ClientConfig, BlobError> {
    let mut config = tls::config(trusted).map_err(|error| BlobError::Tls {
        host: "this machine".to_owned(),
        reason: error.to_string(),
    })?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

fn read_authorities(path: &Path) -> Result<Vec<CertificateDer<'static>>, BlobError> {
    let invalid = |reason: String| BlobError::Invalid {
        what: path.display().to_string(),
        reason,
    };
    let pem = std::fs::read(path).map_err(|error| BlobError::io(path, error))?;
    let parsed: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    let authorities = parsed.map_err(|error| invalid(error.to_string()))?;
    if authorities.is_empty() {
        return Err(invalid("no PEM certificate in it".to_owned()));
    }
    let mut probe = rustls::RootCertStore::empty();
    for authority in &authorities {
        probe
            .add(authority.clone())
            .map_err(|error| invalid(error.to_string()))?;
    }
    Ok(authorities)
}
