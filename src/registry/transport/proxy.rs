//! Which proxy a request goes through, as the environment says. The HTTP library uses the proxy; this module knows its
//! name, for errors.

use hyper_util::client::proxy::matcher::Matcher;
use reqwest::Url;

use crate::registry::endpoint::is_loopback;

/// The proxies that the environment names.
#[derive(Debug)]
pub(super) struct Proxies {
    /// None if no host is asked through a proxy.
    rules: Option<Matcher>,
}

impl Proxies {
    pub(super) fn from_environment() -> Self {
        Self {
            rules: (!no_proxy_for_any()).then(Matcher::from_system),
        }
    }

    /// Whether there can be a proxy for hosts other than loopback ones.
    pub(super) fn are_possible(&self) -> bool {
        self.rules.is_some()
    }

    /// Returns host and port of the proxy for a URL, without a login.
    pub(super) fn of(&self, url: &Url) -> Option<String> {
        if url.host_str().is_some_and(is_loopback) {
            return None;
        }
        let found = self.rules.as_ref()?.intercept(&url.as_str().parse().ok()?)?;
        let place = found.uri().authority()?.as_str();
        // Whatever stands before the host is a login.
        Some(place.rsplit_once('@').map_or(place, |(_, place)| place).to_owned())
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
