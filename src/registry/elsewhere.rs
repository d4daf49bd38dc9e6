//! Foreign layers: their descriptors name other places than the registry, where they are looked for if it does not have them.
//!
//! An image decides these URLs, so only hosts that the user has named are asked, without credentials. What they send is checked
//! against the layer's digest like everything else.

use reqwest::Url;

use super::transport::authority;
use crate::blob::BlobError;
use crate::oci::{Descriptor, shown};

/// Places that are tried for one layer.
const MAX_PLACES: usize = 8;

/// Where else a layer may be.
#[derive(Debug, Default)]
pub(super) struct Elsewhere {
    /// Places that may be asked.
    pub(super) urls: Vec<Url>,
    /// The first place that may not.
    refused: Option<String>,
}

impl Elsewhere {
    /// What the descriptor says, if it is one of a foreign layer. `allowed` are hosts, with port unless it is the usual one.
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

    /// Says in an error about a missing layer where it should be.
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
