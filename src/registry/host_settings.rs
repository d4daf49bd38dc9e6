//! What the files of this host say about one registry host: whom to trust there, and what to send.
//!
//! These settings are for one host. Another host that a request leads to never gets its headers or its client
//! certificates; see [`HostSettings::for_storage`] and [`HostSettings::for_tokens`].

use std::path::PathBuf;

use reqwest::header::HeaderMap;

/// The settings of one host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct HostSettings {
    pub(super) tls: HostTls,
    /// Headers to send with each request. Their values may be secrets, so they are marked as sensitive.
    pub(super) headers: HeaderMap,
    /// Whether the settings are those of a host that led to this one. Then this host gets no login: it may have proved
    /// only to that other host's authorities who it is.
    pub(super) is_borrowed: bool,
}

/// How a host proves who it is, and how this client does.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(super) struct HostTls {
    /// PEM files with certificates to trust besides those that are trusted everywhere.
    pub(super) authorities: Vec<PathBuf>,
    /// Certificates of this client. The server chooses.
    pub(super) clients: Vec<ClientFiles>,
    /// Whether any certificate of the server will do.
    pub(super) is_unverified: bool,
}

/// A certificate of this client.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct ClientFiles {
    pub(super) certificate: PathBuf,
    /// The file with the key, if it is not the one with the certificate.
    pub(super) key: Option<PathBuf>,
}

impl HostSettings {
    /// Returns the settings for a host that this one redirects to. A registry with a private authority often has
    /// storage with the same authority.
    pub(super) fn for_storage(&self) -> Self {
        Self {
            tls: HostTls {
                authorities: self.tls.authorities.clone(),
                ..HostTls::default()
            },
            is_borrowed: self.is_borrowed || !self.tls.authorities.is_empty(),
            headers: HeaderMap::new(),
        }
    }

    /// Returns the settings for the token server of this host. It gets the login for this host, so it may prove itself
    /// in the same way.
    pub(super) fn for_tokens(&self) -> Self {
        Self {
            tls: HostTls {
                clients: Vec::new(),
                ..self.tls.clone()
            },
            is_borrowed: self.is_borrowed,
            headers: HeaderMap::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_for_one_host_stays_there() {
        let mut headers = HeaderMap::new();
        headers.insert("x-key", "secret".parse().unwrap());
        let settings = HostSettings {
            tls: HostTls {
                authorities: vec!["ca".into()],
                clients: vec![ClientFiles {
                    certificate: "client".into(),
                    key: None,
                }],
                is_unverified: true,
            },
            headers,
            is_borrowed: false,
        };
        let storage = settings.for_storage();
        assert!(storage.is_borrowed && !storage.tls.is_unverified);
        assert_eq!(storage.tls.authorities, settings.tls.authorities);
        let tokens = settings.for_tokens();
        assert!(!tokens.is_borrowed && tokens.tls.is_unverified);
        for other in [storage, tokens] {
            assert!(other.tls.clients.is_empty() && other.headers.is_empty());
        }
        assert!(!HostSettings::default().for_storage().is_borrowed);
    }
}
