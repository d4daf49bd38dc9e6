//! One HTTP exchange: connection pools, TLS, redirects, timeouts and measurements.
//!
//! This module follows redirects itself, because three things depend on each hop:
//! - The client must not send `Authorization` if scheme, host or port change. It would leak, and presigned URLs fail
//!   with it.
//! - The client must send `Range` on every hop.
//! - The client keeps the final URL.

mod guard;
mod pools;
mod proxy;
mod schemes;
mod tls;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use reqwest::header::{ACCEPT_ENCODING, AUTHORIZATION, CONTENT_LENGTH, HeaderMap, HeaderValue, LOCATION};
use reqwest::{StatusCode, Url};

use self::pools::Pools;
use self::schemes::Schemes;
use super::config::RegistryConfig;
use super::encoding::{self, Encoding};
use super::endpoint::{Endpoint, authority, is_loopback};
use super::failure;
use super::host_settings::HostSettings;
use super::secret::Secret;
use super::stats::{HostMeter, HostStats};
use crate::blob::BlobError;

/// Most redirects followed for one request. Real chains have one or two.
const MAX_HOPS: usize = 10;

/// Connection pools, and what is known about hosts.
#[derive(Debug)]
pub(super) struct Transport {
    config: RegistryConfig,
    pools: Pools,
    schemes: Schemes,
    hosts: Mutex<HashMap<String, Arc<HostMeter>>>,
}

/// Fields of a form. Their values may be secrets.
pub(super) type Form = Vec<(&'static str, Secret)>;

/// What a request does, and what it sends along.
#[derive(Debug, Clone)]
pub(super) enum Act {
    Get,
    Head,
    /// Posts a form.
    PostForm(Form),
    Post,
    Put(Bytes),
}

impl Act {
    /// Whether a redirect may be followed. The others are sent once, to the URL they were made for: a form holds
    /// credentials, and an upload goes where the registry said.
    fn follows_redirects(&self) -> bool {
        matches!(self, Self::Get | Self::Head)
    }
}

/// One request.
#[derive(Debug, Clone)]
pub(super) struct Ask {
    pub(super) url: Url,
    pub(super) headers: HeaderMap,
    /// Value of `Authorization`, sent to the first origin only.
    pub(super) authorization: Option<HeaderValue>,
    pub(super) act: Act,
    /// Whether the request may go to public addresses only.
    pub(super) guarded: bool,
    /// Whether the request uses the connections that are set apart from those of other requests.
    pub(super) apart: bool,
    /// Whether the answer is believed because of where it comes from. Then no part of the way may be without TLS, unless
    /// the whole way is on this host.
    pub(super) protected: bool,
    /// What the files of the host say about the host of the URL. Other hosts on the way get [`HostSettings::for_storage`].
    pub(super) settings: Arc<HostSettings>,
    /// Time without a byte after which the body is given up, if it is less than that of the client's configuration.
    pub(super) stall: Option<Duration>,
}

impl Ask {
    pub(super) fn get(url: Url) -> Self {
        Self::new(Act::Get, url)
    }

    pub(super) fn new(act: Act, url: Url) -> Self {
        Self {
            url,
            headers: HeaderMap::new(),
            authorization: None,
            act,
            guarded: false,
            apart: false,
            protected: false,
            settings: Arc::default(),
            stall: None,
        }
    }
}

/// A response whose head has arrived.
#[derive(Debug)]
pub(super) struct Reply {
    response: reqwest::Response,
    /// The proxy that may have made up the response.
    proxy: Option<String>,
    /// The URL that the response came from, after redirects.
    pub(super) url: Url,
    /// Whether a redirect led to another origin.
    pub(super) crossed: bool,
    /// Requests sent, redirects included.
    pub(super) hops: u64,
    stall: Duration,
    /// Time spent waiting for body bytes and number of these bytes, since the last check of the pace.
    pace: (Duration, u64),
    /// Reports this stream to the meter of its host.
    open: OpenStream,
}

#[derive(Debug)]
struct OpenStream {
    meter: Arc<HostMeter>,
    began: bool,
}

impl OpenStream {
    /// Counts a request that is about to be sent.
    fn new(meter: Arc<HostMeter>) -> Self {
        meter.request();
        Self { meter, began: false }
    }

    fn bytes(&mut self, count: u64) {
        if self.began {
            self.meter.came(count);
        } else {
            self.began = true;
            self.meter.began(count);
        }
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        if self.began {
            self.meter.ended();
        }
        self.meter.closed();
    }
}

impl Transport {
    pub(super) fn new(config: RegistryConfig) -> Result<Self, BlobError> {
        Ok(Self {
            pools: Pools::new(&config)?,
            schemes: Schemes::default(),
            config,
            hosts: Mutex::default(),
        })
    }

    pub(super) fn config(&self) -> &RegistryConfig {
        &self.config
    }

    /// Records a registry before the first request to it.
    pub(super) fn meet(&self, endpoint: &Endpoint) {
        if endpoint.is_open() {
            self.schemes.leave_open(endpoint.base());
        }
    }

    /// Whether a registry is used without TLS, as far as that is known.
    pub(super) fn is_plain(&self, endpoint: &Endpoint) -> bool {
        endpoint.is_plain() || self.schemes.is_plain(endpoint.base())
    }

    /// Returns the measurements of all hosts.
    pub(super) fn stats(&self) -> Vec<HostStats> {
        let hosts = self.hosts.lock().expect("no panic while locked");
        let mut stats: Vec<HostStats> = hosts.values().map(|meter| meter.snapshot()).collect();
        stats.sort_by(|a, b| a.host.cmp(&b.host));
        stats
    }

    /// Whether redirects and token servers of this host must have public addresses, as far as the host's own address
    /// is known.
    pub(super) fn leads_to_public_only(&self, url: &Url) -> bool {
        !self.config.allow_private_redirects && self.meter(url).is_public()
    }

    /// Returns the measurements of a URL's host.
    pub(super) fn meter(&self, url: &Url) -> Arc<HostMeter> {
        let host = authority(url);
        let mut hosts = self.hosts.lock().expect("no panic while locked");
        let make = || Arc::new(HostMeter::new(host.clone()));
        Arc::clone(hosts.entry(host.clone()).or_insert_with(make))
    }

    /// Sends a request, follows redirects, and waits at most `wait` for the head of the response.
    ///
    /// Cancel safe: a dropped call leaves nothing behind but measurements.
    pub(super) async fn send(&self, ask: &Ask, wait: Duration) -> Result<Reply, BlobError> {
        match tokio::time::timeout(wait, self.follow(ask)).await {
            Ok(reply) => reply,
            Err(_) => Err(BlobError::Timeout {
                what: authority(&ask.url),
                seconds: wait.as_secs().max(1),
            }),
        }
    }

    async fn follow(&self, ask: &Ask) -> Result<Reply, BlobError> {
        let mut url = self.schemes.settle(ask.url.clone()).await?;
        let (mut crossed, mut guarded) = (false, ask.guarded);
        if ask.protected && !is_protected(&url, &url) {
            return Err(unprotected(&url));
        }
        for hop in 0..=MAX_HOPS {
            let authorization = ask.authorization.as_ref().filter(|_| !crossed);
            let borrowed;
            let settings = match crossed {
                false => &*ask.settings,
                true => {
                    borrowed = ask.settings.for_storage();
                    &borrowed
                }
            };
            let (response, open) = self.exchange(&url, guarded, ask, settings, authorization).await?;
            let next = match ask.act.follows_redirects() {
                true => redirect_target(&response, &url)?,
                false => None,
            };
            let Some(next) = next else {
                // Through a tunnel, responses are those of the host.
                let proxy = (url.scheme() == "http").then(|| self.pools.proxy(&url)).flatten();
                return Ok(Reply {
                    response,
                    proxy,
                    url,
                    crossed,
                    hops: hop as u64 + 1,
                    open,
                    stall: self.stall(ask),
                    pace: (Duration::ZERO, 0),
                });
            };
            if ask.protected && !is_protected(&url, &next) {
                return Err(unprotected(&next));
            }
            crossed |= next.origin() != url.origin();
            guarded |= self.leads_to_public_only(&url);
            url = next;
        }
        Err(BlobError::Protocol {
            host: authority(&ask.url),
            what: "a request".to_owned(),
            detail: format!("more than {MAX_HOPS} redirects"),
            transient: false,
        })
    }

    /// Returns the time without a byte after which the body of a response is given up: at most half of the timeout, so
    /// that an operation with a short timeout can still resume.
    fn stall(&self, ask: &Ask) -> Duration {
        let stall = self.config.stall_timeout.min(self.config.timeout / 2);
        ask.stall.map_or(stall, |shorter| shorter.min(stall))
    }

    async fn exchange(
        &self,
        url: &Url,
        guarded: bool,
        ask: &Ask,
        settings: &HostSettings,
        authorization: Option<&HeaderValue>,
    ) -> Result<(reqwest::Response, OpenStream), BlobError> {
        let pool = self.pools.get(url, &settings.tls, guarded, ask.apart)?;
        let mut request = match &ask.act {
            Act::PostForm(form) => {
                let fields: Vec<(&str, &str)> = form.iter().map(|(name, value)| (*name, value.expose())).collect();
                pool.post(url.clone()).form(&fields)
            }
            Act::Get => pool.get(url.clone()),
            Act::Head => pool.head(url.clone()),
            Act::Post => pool.post(url.clone()).body(Bytes::new()),
            Act::Put(bytes) => pool.put(url.clone()).body(bytes.clone()),
        };
        let mut headers = settings.headers.clone();
        headers.extend(ask.headers.clone());
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        if let Some(authorization) = authorization {
            headers.insert(AUTHORIZATION, authorization.clone());
        }
        request = request.headers(headers);
        let open = OpenStream::new(self.meter(url));
        let sent = Instant::now();
        let response = request
            .send()
            .await
            .map_err(|e| failure::transport(&authority(url), self.pools.proxy(url).as_deref(), e))?;
        if response.status() == StatusCode::PROXY_AUTHENTICATION_REQUIRED
            && let Some(proxy) = self.pools.proxy(url)
        {
            return Err(failure::proxy_wants_login(&authority(url), &proxy));
        }
        if let Some(address) = response.remote_addr() {
            open.meter.is_at(guard::is_public(address.ip()));
        }
        open.meter
            .answer(sent.elapsed(), if url.scheme() == "https" { 2 } else { 1 });
        Ok((response, open))
    }
}

impl Reply {
    pub(super) fn status(&self) -> StatusCode {
        self.response.status()
    }

    pub(super) fn headers(&self) -> &HeaderMap {
        self.response.headers()
    }

    /// Returns the first value of a header, if there is one and it is text.
    pub(super) fn header(&self, name: reqwest::header::HeaderName) -> Option<&str> {
        self.headers().get(name)?.to_str().ok()
    }

    /// Returns `Content-Length`, if stated.
    pub(super) fn length(&self) -> Option<u64> {
        self.header(CONTENT_LENGTH)?.trim().parse().ok()
    }

    /// Returns the host that the response came from, with its port unless it is the default one.
    pub(super) fn host(&self) -> String {
        authority(&self.url)
    }

    /// Returns the host that the response came from, and the proxy that may have made it up.
    pub(super) fn sender(&self) -> String {
        match &self.proxy {
            Some(proxy) => format!("{} (by way of the proxy {proxy})", self.host()),
            None => self.host(),
        }
    }

    /// Returns the next piece of the body, or `None` at its end. Fails if the body stalls or arrives too slowly to be
    /// useful.
    pub(super) async fn chunk(&mut self) -> Result<Option<Bytes>, BlobError> {
        let timeout = |what: &str| BlobError::Timeout {
            what: format!("{} ({what})", authority(&self.url)),
            seconds: self.stall.as_secs().max(1),
        };
        let start = Instant::now();
        let chunk = match tokio::time::timeout(self.stall, self.response.chunk()).await {
            Ok(chunk) => chunk.map_err(|error| failure::transport(&authority(&self.url), None, error))?,
            Err(_) => return Err(timeout("in the middle of an answer")),
        };
        let Some(bytes) = &chunk else { return Ok(None) };
        self.open.bytes(bytes.len() as u64);
        // Only the time spent waiting counts, because the server does not control how fast the caller takes the
        // bytes.
        self.pace.0 += start.elapsed();
        self.pace.1 += bytes.len() as u64;
        if self.pace.0 >= self.stall {
            // All streams share the bandwidth of the link.
            let link = self.open.meter.link();
            let least = link.useful_rate() / f64::from(link.streams.max(1));
            if (self.pace.1 as f64) < least * self.pace.0.as_secs_f64() {
                return Err(timeout("an answer that hardly moves"));
            }
            self.pace = (Duration::ZERO, 0);
        }
        Ok(chunk)
    }

    /// Returns the whole body, or `None` if it is longer than `cap`.
    pub(super) async fn whole(&mut self, cap: usize) -> Result<Option<Bytes>, BlobError> {
        self.whole_counted(cap, &AtomicU64::new(0)).await
    }

    /// Returns the whole body like [`Reply::whole`], and counts its bytes in `came` as they come.
    pub(super) async fn whole_counted(&mut self, cap: usize, came: &AtomicU64) -> Result<Option<Bytes>, BlobError> {
        if self.length().is_some_and(|length| length > cap as u64) {
            return Ok(None);
        }
        let mut body = Vec::new();
        while let Some(chunk) = self.chunk().await? {
            came.fetch_add(chunk.len() as u64, Ordering::Relaxed);
            if body.len() + chunk.len() > cap {
                return Ok(None);
            }
            body.extend_from_slice(&chunk);
        }
        Ok(Some(body.into()))
    }

    /// Returns the start of an error body, as far as it can be read.
    pub(super) async fn error_body(&mut self) -> Vec<u8> {
        let mut body = Vec::new();
        while body.len() < failure::MAX_ERROR_BODY {
            match self.chunk().await {
                Ok(Some(chunk)) => body.extend_from_slice(&chunk),
                Ok(None) | Err(_) => break,
            }
        }
        match Encoding::of(self.headers()) {
            Encoding::Compressed(coding) => {
                match encoding::decode(coding, body.clone().into(), failure::MAX_ERROR_BODY) {
                    Some(decoded) => decoded.into(),
                    // The body is not compressed, or expands beyond the cap.
                    None => body,
                }
            }
            Encoding::Identity | Encoding::Unknown => body,
        }
    }
}

/// Whether nobody on the way can change what comes from `to`, where `from` leads.
fn is_protected(from: &Url, to: &Url) -> bool {
    let on_this_host = |url: &Url| url.scheme() == "http" && url.host_str().is_some_and(is_loopback);
    to.scheme() == "https" || on_this_host(from) && on_this_host(to)
}

fn unprotected(url: &Url) -> BlobError {
    BlobError::Protocol {
        host: authority(url),
        what: "a request".to_owned(),
        detail: "it would go there without TLS, and the answer is believed because of where it comes from".to_owned(),
        transient: false,
    }
}

fn redirect_target(response: &reqwest::Response, url: &Url) -> Result<Option<Url>, BlobError> {
    if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
        return Ok(None);
    }
    let broken = |detail: &str| BlobError::Protocol {
        host: authority(url),
        what: "a request".to_owned(),
        detail: format!("a redirect {detail}"),
        transient: false,
    };
    let location = response
        .headers()
        .get(LOCATION)
        .ok_or_else(|| broken("without a location"))?;
    let location = std::str::from_utf8(location.as_bytes()).map_err(|_| broken("to no URL"))?;
    let mut target = url.join(location).map_err(|_| broken("to no URL"))?;
    if !matches!(target.scheme(), "http" | "https") || target.host_str().is_none() {
        return Err(broken("to something that is not HTTP"));
    }
    // The HTTP library would send credentials of a URL as Basic authorization, and errors would show them.
    if target.set_username("").is_err() || target.set_password(None).is_err() {
        return Err(broken("to no URL"));
    }
    target.set_fragment(None);
    Ok(Some(target))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_protected_way_has_tls_or_stays_on_this_host() {
        let way = |from: &str, to: &str| is_protected(&from.parse().unwrap(), &to.parse().unwrap());
        assert!(way("https://a/", "https://b/"));
        assert!(way("http://127.0.0.1/", "https://b/"));
        assert!(way("http://127.0.0.1/", "http://localhost:5000/"));
        assert!(!way("https://a/", "http://a/"));
        assert!(!way("https://a/", "http://127.0.0.1/"));
        assert!(!way("http://a/", "http://a/"));
    }
}
