//! A registry as users name it and a repository in it, turned into URLs.
//!
//! `docker.io` is served by `registry-1.docker.io`. Registries use TLS unless [`PlainHttp`] says otherwise. As Docker
//! does, the client tries TLS first on a loopback registry, and uses plain HTTP if the registry has no TLS. The
//! scheme of a loopback registry therefore stays open until the first request.
//!
//! An endpoint may also be a mirror, or a registry whose API is not at the root of its host. The files of the host say
//! so; see `hosts`.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use reqwest::Url;

use super::host_settings::HostSettings;
use crate::blob::BlobError;
use crate::oci::{Digest, ReferenceSelector};

/// Longest host and path together, in bytes: the limit of the distribution specification.
const MAX_NAME: usize = 255;

/// Which registries are used without TLS.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum PlainHttp {
    /// Loopback registries that have no TLS.
    #[default]
    Loopback,
    /// Loopback registries that have no TLS, and these hosts (`host` or `host:port`, as in references).
    Hosts(BTreeSet<String>),
    /// All registries.
    Everywhere,
    /// No registry, not even a loopback one.
    Nowhere,
}

/// A registry or a mirror: its name in references and credential files, and the base URL of its API.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    name: String,
    /// Ends with a slash.
    base: Url,
    /// Whether it is used without TLS, because the user wants it or because it is a loopback registry on port 80.
    is_plain: bool,
    /// Whether the scheme of `base` is only the first one to try.
    is_open: bool,
    /// The registry whose content the endpoint has, if it is a mirror that wants to be told (parameter `ns`).
    upstream: Option<String>,
    settings: Arc<HostSettings>,
}

impl Endpoint {
    /// Makes the endpoint of a registry host (`docker.io`, `quay.io`, `localhost:5000`, `[::1]:5000`).
    pub fn new(registry: &str, plain: &PlainHttp) -> Result<Self, BlobError> {
        let invalid = |reason: &str| BlobError::Invalid {
            what: format!("registry host `{registry}`"),
            reason: reason.to_owned(),
        };
        let name = match registry {
            "index.docker.io" | "registry-1.docker.io" => "docker.io",
            other => other,
        };
        let api = if name == "docker.io" {
            "registry-1.docker.io"
        } else {
            name
        };
        let parsed = Url::parse(&format!("https://{api}/v2/")).map_err(|e| invalid(&e.to_string()))?;
        let host = parsed.host_str().ok_or_else(|| invalid("no host"))?.to_owned();
        if parsed.path() != "/v2/"
            || parsed.query().is_some()
            || parsed.fragment().is_some()
            || api.contains(['@', '\\'])
        {
            return Err(invalid("want host or host:port"));
        }
        // On port 80 (HTTP) or 443 (HTTPS), the port settles the scheme.
        let loopback_port_80 = is_loopback(&host) && parsed.port() == Some(80);
        let is_plain = match plain {
            PlainHttp::Loopback => loopback_port_80,
            PlainHttp::Hosts(hosts) => loopback_port_80 || hosts.contains(registry) || hosts.contains(name),
            PlainHttp::Everywhere => true,
            PlainHttp::Nowhere => false,
        };
        let is_open = !is_plain && *plain != PlainHttp::Nowhere && is_loopback(&host) && !api.ends_with(":443");
        let base = match is_plain {
            true => Url::parse(&format!("http://{api}/v2/")).map_err(|e| invalid(&e.to_string()))?,
            false => parsed,
        };
        Ok(Self {
            name: name.to_owned(),
            base,
            is_plain,
            is_open,
            upstream: None,
            settings: Arc::default(),
        })
    }

    /// Makes an endpoint of the host that a redirect led to, as if it were a registry.
    pub(super) fn at(url: &Url, plain: &PlainHttp, settings: HostSettings) -> Self {
        let mut base = url.clone();
        base.set_path("/v2/");
        base.set_query(None);
        let name = authority(url);
        // The user's setting for this host counts, not the scheme of the redirect.
        let known = Self::new(&name, plain).ok();
        Self {
            name: known.as_ref().map_or(name, |known| known.name.clone()),
            base,
            is_plain: known.is_some_and(|known| known.is_plain),
            is_open: false,
            upstream: None,
            settings: Arc::new(settings),
        }
    }

    /// Makes an endpoint whose API is at `base`, as a file of the host says. The scheme of `base` is what the user
    /// wants.
    pub(super) fn of_api(base: Url) -> Self {
        let name = match authority(&base).as_str() {
            "registry-1.docker.io" | "index.docker.io" => "docker.io".to_owned(),
            host => host.to_owned(),
        };
        Self {
            name,
            is_plain: base.scheme() == "http",
            base,
            is_open: false,
            upstream: None,
            settings: Arc::default(),
        }
    }

    /// Leaves open whether the endpoint has TLS. The first request finds out.
    pub(super) fn left_open(mut self) -> Self {
        // A server on the port of HTTP has no TLS.
        if !self.is_plain || self.base.port().is_some() {
            self.is_open = true;
            self.is_plain = false;
            // Changing http to https cannot fail.
            let _ = self.base.set_scheme("https");
        }
        self
    }

    /// Tells the endpoint with each request that the content of `registry` is wanted.
    pub(super) fn for_upstream(self, registry: &str) -> Self {
        Self {
            upstream: Some(registry.to_owned()),
            ..self
        }
    }

    /// Sets what the files of the host say about this host.
    pub(super) fn with_settings(self, settings: HostSettings) -> Self {
        Self {
            settings: Arc::new(settings),
            ..self
        }
    }

    /// Returns the name in references and credential files.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the settings say that it is used without TLS.
    pub fn is_plain(&self) -> bool {
        self.is_plain
    }

    /// Whether the first request has to find out if the registry has TLS.
    pub(super) fn is_open(&self) -> bool {
        self.is_open
    }

    /// Returns the base URL of the API, which ends with a slash: `/v2/`, unless a file of the host says otherwise.
    pub(super) fn base(&self) -> &Url {
        &self.base
    }

    /// Returns what is sent to this host and to no other, and how it proves who it is.
    pub(super) fn settings(&self) -> &Arc<HostSettings> {
        &self.settings
    }
}

/// Returns the host of a URL, with its port unless it is the default one.
pub(super) fn authority(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    match url.port() {
        Some(port) => format!("{host}:{port}"),
        None => host.to_owned(),
    }
}

/// A repository of a registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repository {
    /// The registry.
    pub endpoint: Endpoint,
    /// The path within the registry, such as `library/alpine`.
    pub name: String,
}

impl Repository {
    /// Makes a repository after a check of its name. A name consists of path components of `[a-z0-9]`, joined inside
    /// by `.`, `_`, `__` or dashes.
    pub fn new(endpoint: Endpoint, name: &str) -> Result<Self, BlobError> {
        let invalid = |reason: &str| BlobError::Invalid {
            what: format!("repository name `{}`", name.chars().take(MAX_NAME).collect::<String>()),
            reason: reason.to_owned(),
        };
        if endpoint.name.len() + 1 + name.len() > MAX_NAME {
            return Err(invalid("longer than 255 characters together with the registry"));
        }
        if !name.split('/').all(is_path_component) {
            return Err(invalid(
                "want lower-case letters, digits and single separators between slashes",
            ));
        }
        Ok(Self {
            endpoint,
            name: name.to_owned(),
        })
    }

    /// Returns the URL of the document that `selector` names. Fails if the tag is malformed.
    pub(super) fn manifest_url(&self, selector: &ReferenceSelector) -> Result<Url, BlobError> {
        let reference = match selector {
            ReferenceSelector::Tag { tag, digest: None } => {
                check_tag(tag)?;
                tag.clone()
            }
            ReferenceSelector::Tag {
                digest: Some(digest), ..
            }
            | ReferenceSelector::Digest(digest) => digest.to_string(),
        };
        Ok(self.url(&format!("manifests/{reference}")))
    }

    /// Returns the URL of a blob.
    pub(super) fn blob_url(&self, digest: &Digest) -> Url {
        self.url(&format!("blobs/{digest}"))
    }

    /// Returns the URL at which an upload of a blob begins.
    pub(super) fn uploads_url(&self) -> Url {
        self.url("blobs/uploads/")
    }

    /// Returns the URL that lists the first `count` tags.
    pub(super) fn tags_url(&self, count: usize) -> Url {
        let mut url = self.url("tags/list");
        url.query_pairs_mut().append_pair("n", &count.to_string());
        url
    }

    /// Returns a text that no other repository has, whether at another place or in another registry.
    pub(super) fn id(&self) -> String {
        self.url("").into()
    }

    fn url(&self, tail: &str) -> Url {
        let mut url = self.endpoint.base.clone();
        url.set_path(&format!("{}{}/{tail}", self.endpoint.base.path(), self.name));
        if let Some(upstream) = &self.endpoint.upstream {
            url.query_pairs_mut().append_pair("ns", upstream);
        }
        url
    }
}

impl std::fmt::Display for Repository {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.endpoint.name, self.name)
    }
}

fn check_tag(tag: &str) -> Result<(), BlobError> {
    let first = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let good = (1..=128).contains(&tag.len())
        && first(tag.as_bytes()[0])
        && tag.bytes().all(|b| first(b) || b == b'.' || b == b'-');
    if good {
        return Ok(());
    }
    Err(BlobError::Invalid {
        what: format!("tag `{}`", tag.chars().take(128).collect::<String>()),
        reason: "want up to 128 letters, digits, `_`, `.` and `-`, not beginning with `.` or `-`".to_owned(),
    })
}

fn is_path_component(component: &str) -> bool {
    let alphanumeric = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = component.as_bytes();
    let ends = bytes.first().is_some_and(alphanumeric) && bytes.last().is_some_and(alphanumeric);
    let separators_valid = component
        .split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        .all(|s| matches!(s, "" | "." | "_" | "__") || s.bytes().all(|b| b == b'-'));
    ends && separators_valid
}

/// Whether a URL's host names this machine.
pub(super) fn is_loopback(host: &str) -> bool {
    if host == "localhost" || host.ends_with(".localhost") {
        return true;
    }
    if let Ok(address) = host.parse::<Ipv4Addr>() {
        return address.is_loopback();
    }
    let unbracketed = host.trim_start_matches('[').trim_end_matches(']');
    unbracketed
        .parse::<Ipv6Addr>()
        .is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn base(registry: &str, plain: &PlainHttp) -> String {
        Endpoint::new(registry, plain).unwrap().base().to_string()
    }

    #[test]
    fn tls_comes_first_and_loopback_need_not_have_it() {
        let auto = PlainHttp::Loopback;
        for (registry, want, open) in [
            ("docker.io", "https://registry-1.docker.io/v2/", false),
            ("index.docker.io", "https://registry-1.docker.io/v2/", false),
            ("quay.io", "https://quay.io/v2/", false),
            ("localhost:5000", "https://localhost:5000/v2/", true),
            ("127.1.2.3:5000", "https://127.1.2.3:5000/v2/", true),
            ("[::1]:5000", "https://[::1]:5000/v2/", true),
            ("localhost:80", "http://localhost/v2/", false),
            ("localhost:443", "https://localhost/v2/", false),
            ("localhost", "https://localhost/v2/", true),
            ("10.0.0.1:5000", "https://10.0.0.1:5000/v2/", false),
        ] {
            assert_eq!(base(registry, &auto), want);
            assert_eq!(Endpoint::new(registry, &auto).unwrap().is_open(), open, "{registry}");
            for forced in [PlainHttp::Nowhere, PlainHttp::Everywhere] {
                assert!(!Endpoint::new(registry, &forced).unwrap().is_open());
            }
        }
        assert_eq!(
            base("localhost:5000", &PlainHttp::Nowhere),
            "https://localhost:5000/v2/"
        );
        assert_eq!(base("quay.io", &PlainHttp::Everywhere), "http://quay.io/v2/");
        let some = PlainHttp::Hosts(BTreeSet::from(["r.lan:5000".to_owned()]));
        assert_eq!(base("r.lan:5000", &some), "http://r.lan:5000/v2/");
        assert_eq!(base("r.lan:5001", &some), "https://r.lan:5001/v2/");
    }

    #[test]
    fn hosts_cannot_smuggle_other_parts_of_a_url() {
        for registry in [
            "",
            "a/b",
            "user@host",
            "host?x",
            "host#x",
            "host:port",
            "a b",
            "host\\x",
        ] {
            assert!(Endpoint::new(registry, &PlainHttp::Loopback).is_err(), "{registry}");
        }
    }

    #[test]
    fn repository_names_follow_the_specification() {
        let endpoint = Endpoint::new("quay.io", &PlainHttp::Loopback).unwrap();
        let check = |name: &str| Repository::new(endpoint.clone(), name).is_ok();
        for name in ["a", "library/alpine", "a__b/c--d.e/f_g", "a/b/c/d"] {
            assert!(check(name), "{name}");
        }
        for name in [
            "", "/a", "a/", "a//b", "A", "a..b", "a/../b", "a___b", "-a", "a?x", "a b", "é",
        ] {
            assert!(!check(name), "{name}");
        }
        assert!(!check(&"a".repeat(250)));
    }

    #[test]
    fn a_mirror_has_its_path_and_is_told_the_registry() {
        let base = |text: &str| Url::parse(text).unwrap();
        let endpoint = Endpoint::of_api(base("http://m.lan:5000/hub/v2/"));
        assert!(endpoint.is_plain() && !endpoint.is_open());
        let mirror = Repository::new(endpoint.clone().for_upstream("docker.io"), "a/b").unwrap();
        assert_eq!(
            mirror.manifest_url(&ReferenceSelector::tag("1")).unwrap().as_str(),
            "http://m.lan:5000/hub/v2/a/b/manifests/1?ns=docker.io"
        );
        assert_eq!(
            mirror.tags_url(3).as_str(),
            "http://m.lan:5000/hub/v2/a/b/tags/list?ns=docker.io&n=3"
        );
        let other = Repository::new(endpoint.clone().for_upstream("quay.io"), "a/b").unwrap();
        assert_ne!(mirror.id(), other.id());
        let open = endpoint.left_open();
        assert!(open.is_open() && !open.is_plain());
        assert_eq!(open.base().scheme(), "https");
        assert_eq!(
            Endpoint::of_api(base("https://registry-1.docker.io/v2/")).name(),
            "docker.io"
        );
    }

    #[test]
    fn tags_are_checked_and_digests_win() {
        let endpoint = Endpoint::new("quay.io", &PlainHttp::Loopback).unwrap();
        let repository = Repository::new(endpoint, "org/app").unwrap();
        let url = |selector| repository.manifest_url(&selector).map(|u| u.to_string());
        assert_eq!(
            url(ReferenceSelector::tag("v1.0")).unwrap(),
            "https://quay.io/v2/org/app/manifests/v1.0"
        );
        let digest = Digest::of(b"");
        assert_eq!(
            url(ReferenceSelector::tag_with_digest("v1", digest.clone())).unwrap(),
            format!("https://quay.io/v2/org/app/manifests/{digest}")
        );
        for tag in ["", "../x", ".a", "-a", "a/b", "a?b"] {
            assert!(url(ReferenceSelector::tag(tag)).is_err(), "{tag}");
        }
    }
}
