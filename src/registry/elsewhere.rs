//! Foreign layers: layers whose descriptors name places outside the registry. If the registry does not have such a
//! layer, the client looks for it in these places.
//!
//! An image decides these URLs. The client therefore sends requests only to hosts that the user has allowed. The
//! registry's credentials are not sent there. If such a host asks for a login, the client sends the login that the
//! user has for that host. It verifies the bytes against the layer's digest, as for every layer.

use reqwest::Url;

use super::endpoint::authority;
use crate::blob::BlobError;
use crate::oci::{Descriptor, shown};

/// Most places considered for one layer.
const MAX_PLACES: usize = 8;

/// The places outside the registry where a layer may be.
#[derive(Debug, Default)]
pub(super) struct Elsewhere {
    /// Places that the client may send requests to.
    pub(super) urls: Vec<Url>,
    /// The first place that the client may not use: its host is not allowed, or it is no usable URL.
    refused: Option<String>,
}

impl Elsewhere {
    /// Reads the places from the descriptor of a foreign layer. Any other descriptor gives none. `allowed` are hosts,
    /// with the port unless it is the default one.
    pub(super) fn of(descriptor: &Descriptor, allowed: &[String]) -> Self {
        let mut found = Self::default();
        if !descriptor.is_foreign() {
            return found;
        }
        for text in descriptor.urls.iter().take(MAX_PLACES) {
            let url = Url::parse(text).ok();
            let url = url.filter(|url| matches!(url.scheme(), "https" | "http") && url.username().is_empty());
            match url {
                Some(url) if allowed.iter().any(|host| host.eq_ignore_ascii_case(&authority(&url))) => {
                    found.urls.push(url)
                }
                _ => {
                    found.refused.get_or_insert_with(|| shown(text).to_string());
                }
            }
        }
        found
    }

    /// Adds to an error about a missing layer the place where the layer should be.
    pub(super) fn explain(&self, error: BlobError) -> BlobError {
        match (error, &self.refused) {
            (BlobError::NotFound { what, .. }, Some(place)) => BlobError::NotFound {
                what,
                hint: Some(format!(
                    "it is a foreign layer, said to be at {place}: allow its host with --foreign-layers-from HOST"
                )),
            },
            (error, _) => error,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::Digest;

    fn descriptor(media_type: &str, urls: &[&str]) -> Descriptor {
        Descriptor {
            media_type: media_type.to_owned(),
            digest: Digest::of(b""),
            size: 0,
            urls: urls.iter().map(|&url| url.to_owned()).collect(),
            annotations: Default::default(),
            data: None,
            artifact_type: None,
            platform: None,
        }
    }

    #[test]
    fn only_allowed_hosts_of_foreign_layers_are_asked() {
        let foreign = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";
        let allowed = ["Example.com".to_owned(), "other:8443".to_owned()];
        let urls = [
            "https://example.com/a",
            "https://example.com:444/b",
            "https://other:8443/c",
            "https://evil.example.com/d",
            "ftp://example.com/e",
            "https://user@example.com/f",
            "not a URL",
        ];
        let found = Elsewhere::of(&descriptor(foreign, &urls), &allowed);
        let asked: Vec<_> = found.urls.iter().map(Url::as_str).collect();
        assert_eq!(asked, ["https://example.com/a", "https://other:8443/c"]);
        assert_eq!(found.refused.as_deref(), Some("https://example.com:444/b"));
        let ordinary = descriptor("application/vnd.oci.image.layer.v1.tar", &urls);
        assert!(Elsewhere::of(&ordinary, &allowed).urls.is_empty());
    }
}
