//! Places where published files are.

use std::fmt;
use std::path::PathBuf;

use crate::registry::Url;

use super::{PublishedError, Trust};

/// A place with published files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IndexPlace {
    /// A directory, perhaps one that is mounted from elsewhere or may only be read.
    Directory(PathBuf),
    /// A directory of a web server. The URL ends with `/`.
    Web(Url),
    /// A repository of a registry.
    Repository {
        /// The registry's host, as in references.
        registry: String,
        /// The repository.
        repository: String,
    },
}

impl IndexPlace {
    /// Reads a place: a path, `https://HOST/PATH` or `oci://HOST/REPOSITORY`.
    pub fn parse(text: &str) -> Result<Self, PublishedError> {
        let wrong = |reason: &str| PublishedError::Location {
            location: text.to_owned(),
            reason: reason.to_owned(),
        };
        if let Some(name) = text.strip_prefix("oci://") {
            let (registry, repository) = name
                .split_once('/')
                .ok_or_else(|| wrong("want oci://HOST/REPOSITORY"))?;
            if registry.is_empty() || repository.is_empty() || repository.contains([':', '@']) {
                return Err(wrong("want oci://HOST/REPOSITORY, without a tag"));
            }
            return Ok(Self::Repository {
                registry: registry.to_owned(),
                repository: repository.trim_end_matches('/').to_owned(),
            });
        }
        if text.starts_with("https://") || text.starts_with("http://") {
            let mut url = Url::parse(text).map_err(|error| wrong(&error.to_string()))?;
            if url.query().is_some() || url.fragment().is_some() || !url.username().is_empty() {
                return Err(wrong("want a URL without login, query and fragment"));
            }
            if !url.path().ends_with('/') {
                url.set_path(&format!("{}/", url.path()));
            }
            return Ok(Self::Web(url));
        }
        if text.contains("://") {
            return Err(wrong("want a directory, https://HOST/PATH or oci://HOST/REPOSITORY"));
        }
        if text.is_empty() {
            return Err(wrong("it is empty"));
        }
        let path = std::path::absolute(text).map_err(|error| wrong(&error.to_string()))?;
        Ok(Self::Directory(path))
    }
}

impl fmt::Display for IndexPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(path) => write!(f, "{}", path.display()),
            Self::Web(url) => write!(f, "{url}"),
            Self::Repository { registry, repository } => write!(f, "oci://{registry}/{repository}"),
        }
    }
}

/// A place that is asked for indexes, and who vouches for what is there.
#[derive(Debug, Clone)]
pub struct IndexLocation {
    /// The place.
    pub place: IndexPlace,
    /// Who vouches for its files.
    pub trust: Trust,
}

impl IndexLocation {
    /// Combines a place and its trust. Fails if the place cannot be trusted in this way: anybody on the path can change
    /// what comes over HTTP without TLS.
    pub fn new(place: IndexPlace, trust: Trust) -> Result<Self, PublishedError> {
        if let (IndexPlace::Web(url), Trust::Location) = (&place, &trust)
            && url.scheme() != "https"
        {
            return Err(PublishedError::Location {
                location: place.to_string(),
                reason: "a location without TLS is not trusted: use https, or name the key that signs its files"
                    .to_owned(),
            });
        }
        Ok(Self { place, trust })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_read_and_shown() {
        for (text, shown) in [
            ("/srv/indexes", "/srv/indexes"),
            ("https://example.com/a", "https://example.com/a/"),
            ("https://example.com/a/", "https://example.com/a/"),
            (
                "oci://example.com:5000/team/indexes",
                "oci://example.com:5000/team/indexes",
            ),
        ] {
            assert_eq!(IndexPlace::parse(text).unwrap().to_string(), shown);
        }
        for wrong in [
            "",
            "oci://example.com",
            "oci:///x",
            "oci://h/x:tag",
            "s3://bucket",
            "https://u:p@h/",
            "https://h/?a=b",
        ] {
            assert!(IndexPlace::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_place_without_tls_is_trusted_only_through_a_key() {
        let place = IndexPlace::parse("http://127.0.0.1/x").unwrap();
        assert!(IndexLocation::new(place, Trust::Location).is_err());
    }
}
