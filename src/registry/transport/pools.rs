//! Connection pools.
//!
//! A pool is made when it is first needed, so a plain-HTTP mount never reads the system's certificates. Requests to
//! loopback hosts never go through a proxy. Each TLS configuration names its cryptography provider. No process-wide
//! provider is installed.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use reqwest::{Client, Url};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::guard::{self, PublicOnly};
use super::proxy::Proxies;
use super::tls::{self, ClientIdentity, ServerTrust};
use crate::blob::BlobError;
use crate::registry::config::RegistryConfig;
use crate::registry::endpoint::{authority, is_loopback};
use crate::registry::failure;
use crate::registry::host_settings::{ClientFiles, HostTls};

/// How long idle connections are kept. The planner pauses between bursts, so a shorter time costs more handshakes.
/// Load balancers close idle connections after 60 s or more, so a longer time keeps dead connections.
const POOL_IDLE: Duration = Duration::from_secs(55);
/// HTTP/2 flow-control window of a stream, in bytes. A stream can fill 200 Mbit/s at a round trip of 160 ms.
const H2_STREAM_WINDOW: u32 = 4 << 20;
/// HTTP/2 flow-control window of a connection, in bytes. It has room for the full windows of four streams.
const H2_CONNECTION_WINDOW: u32 = 16 << 20;

/// Pools of all hosts: those of hosts without settings of their own, and one set for each way to prove who is who.
#[derive(Debug)]
pub(super) struct Pools {
    settings: Settings,
    common: PoolSet,
    special: Mutex<HashMap<HostTls, Arc<Result<PoolSet, BlobError>>>>,
}

/// Pools by kind of host: loopback or not, with TLS or without, restricted to public addresses or not.
///
/// A connection made without the restriction is never used where the address must be public. Each kind has a second
/// pool, for requests that must not share a connection with ordinary ones. Over HTTP/2, all requests of a pool to the
/// same host share one connection.
#[derive(Debug)]
struct PoolSet {
    identities: Identities,
    /// Made once: making it reads the system's certificates, and pools that share it resume each other's TLS
    /// sessions.
    tls: OnceLock<Result<rustls::ClientConfig, BlobError>>,
    lanes: [OnceLock<Result<Client, BlobError>>; 16],
}

/// Whom connections trust, and what they offer.
#[derive(Debug, Default)]
struct Identities {
    authorities: Vec<CertificateDer<'static>>,
    clients: Vec<ClientIdentity>,
    is_unverified: bool,
}

/// The settings that pools take from the client's configuration.
#[derive(Debug)]
struct Settings {
    user_agent: String,
    connect_timeout: Duration,
    stall_timeout: Duration,
    proxies: Proxies,
}

impl Pools {
    /// Reads the certificate files, so that an invalid file is reported early.
    pub(super) fn new(config: &RegistryConfig) -> Result<Self, BlobError> {
        Ok(Self {
            settings: Settings {
                user_agent: config.user_agent.clone(),
                connect_timeout: config.connect_timeout,
                stall_timeout: config.stall_timeout,
                proxies: Proxies::from_environment(),
            },
            common: PoolSet::new(Identities {
                authorities: read_all(&config.ca_files)?,
                ..Identities::default()
            }),
            special: Mutex::default(),
        })
    }

    /// Returns the pool for a URL of a host with these settings. A `guarded` pool connects to public addresses only. An
    /// `apart` pool has connections that ordinary requests do not use; all `apart` requests share them.
    pub(super) fn get(&self, url: &Url, host: &HostTls, guarded: bool, apart: bool) -> Result<Client, BlobError> {
        if guarded && let Err(refused) = guard::check(url) {
            return Err(failure::not_public(&authority(url), refused));
        }
        let lane = PoolKind {
            loopback: url.host_str().is_some_and(is_loopback),
            tls: url.scheme() == "https",
            guarded,
            apart,
        };
        // Without TLS, all hosts are alike.
        if !lane.tls || *host == HostTls::default() {
            return self.common.get(lane, &self.settings);
        }
        let set = {
            let mut special = self.special.lock().expect("no panic while locked");
            let make = || Arc::new(self.special(host));
            Arc::clone(special.entry(host.clone()).or_insert_with(make))
        };
        match &*set {
            Ok(set) => set.get(lane, &self.settings),
            Err(error) => Err(error.clone()),
        }
    }

    /// Returns host and port of the proxy through which a URL is requested, if there is one.
    pub(super) fn proxy(&self, url: &Url) -> Option<String> {
        self.settings.proxies.of(url)
    }

    /// Makes the pools of hosts with these settings.
    fn special(&self, host: &HostTls) -> Result<PoolSet, BlobError> {
        let mut clients = Vec::new();
        for files in &host.clients {
            clients.push(read_client(files)?);
        }
        Ok(PoolSet::new(Identities {
            authorities: [read_all(&host.authorities)?, self.common.identities.authorities.clone()].concat(),
            clients,
            is_unverified: host.is_unverified,
        }))
    }
}

/// A kind of host and of request.
#[derive(Debug, Clone, Copy)]
struct PoolKind {
    loopback: bool,
    tls: bool,
    guarded: bool,
    apart: bool,
}

impl PoolSet {
    fn new(identities: Identities) -> Self {
        Self {
            identities,
            tls: OnceLock::new(),
            lanes: [const { OnceLock::new() }; 16],
        }
    }

    fn get(&self, lane: PoolKind, settings: &Settings) -> Result<Client, BlobError> {
        let slot = usize::from(lane.apart) * 8
            + usize::from(lane.guarded) * 4
            + usize::from(lane.loopback) * 2
            + usize::from(lane.tls);
        self.lanes[slot].get_or_init(|| self.make(lane, settings)).clone()
    }

    fn make(&self, lane: PoolKind, settings: &Settings) -> Result<Client, BlobError> {
        // Dead connections must be noticed even if the stall timeout is endless.
        let alive = settings.stall_timeout.min(Duration::from_secs(60));
        let mut builder = Client::builder()
            .tls_backend_preconfigured(self.tls_config(lane.tls)?)
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
        if lane.loopback || !settings.proxies.are_possible() {
            builder = builder.no_proxy();
        }
        if lane.guarded {
            builder = builder.dns_resolver(PublicOnly);
        }
        builder
            .build()
            .map_err(|error| failure::transport("the HTTP client", None, error))
    }

    /// Returns a configuration that trusts the system's certificates and the configured ones. Without TLS, an empty
    /// set suffices, because it is never used.
    fn tls_config(&self, tls: bool) -> Result<rustls::ClientConfig, BlobError> {
        match tls {
            true => self.tls.get_or_init(|| self.identities.config()).clone(),
            false => config(ServerTrust::Certificates(Vec::new()), Vec::new()),
        }
    }
}

impl Identities {
    fn config(&self) -> Result<rustls::ClientConfig, BlobError> {
        let trust = match self.is_unverified {
            true => ServerTrust::Anybody,
            false => ServerTrust::Certificates(self.trusted()),
        };
        config(trust, self.clients.clone())
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

fn config(trust: ServerTrust, clients: Vec<ClientIdentity>) -> Result<rustls::ClientConfig, BlobError> {
    let mut config = tls::config(trust, clients).map_err(|error| BlobError::Tls {
        host: "this machine".to_owned(),
        reason: error.to_string(),
    })?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

fn read_all(paths: &[PathBuf]) -> Result<Vec<CertificateDer<'static>>, BlobError> {
    let mut authorities = Vec::new();
    for path in paths {
        authorities.extend(read_authorities(path)?);
    }
    Ok(authorities)
}

/// Reads a certificate of this client and its key.
fn read_client(files: &ClientFiles) -> Result<ClientIdentity, BlobError> {
    let read = |path: &Path| std::fs::read(path).map_err(|error| BlobError::io(path, error));
    let invalid = |path: &Path, reason: String| BlobError::Invalid {
        what: path.display().to_string(),
        reason,
    };
    let certificate = &files.certificate;
    let pem = read(certificate)?;
    let parsed: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    let chain = parsed.map_err(|error| invalid(certificate, error.to_string()))?;
    if chain.is_empty() {
        return Err(invalid(certificate, "no PEM certificate in it".to_owned()));
    }
    let place = files.key.as_ref().unwrap_or(certificate);
    // The error of the library might quote the key.
    let key = PrivateKeyDer::from_pem_slice(&read(place)?);
    let key = key.map_err(|_| invalid(place, "no PEM key without a password in it".to_owned()))?;
    let identity = ClientIdentity { chain, key };
    tls::check(&identity).map_err(|error| {
        invalid(
            place,
            format!("it is not the key of {}: {error}", certificate.display()),
        )
    })?;
    Ok(identity)
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
