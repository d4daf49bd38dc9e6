//! Docker's `config.json` and the containers tools' `auth.json`: pure parsing and matching.
//!
//! Keys are hosts (`quay.io`, `localhost:5000`), URLs (`https://index.docker.io/v1/`) or, in `auth.json`, namespaces
//! (`quay.io/org/repo`); the longest namespace wins. Order: `credHelpers` of the host, `credsStore`, `auths`.

use base64::Engine as _;
use serde::Deserialize;

use super::{Credential, Keyed, Secret, aliases, helper_key};

/// Why a credential file is of no use.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AuthFileError {
    /// Not the JSON expected. Says where, not what: the text may hold secrets.
    #[error("not a credential file (line {line}, column {column})")]
    Malformed {
        /// Line of the first error.
        line: usize,
        /// Column of the first error.
        column: usize,
    },
    /// An `auth` value that is not base64 of `user:password`.
    #[error("the entry for {key} is not base64 of `user:password`")]
    Auth {
        /// Key of the entry.
        key: String,
    },
}

/// What a file says about a repository.
#[derive(Debug, PartialEq, Eq)]
pub enum Found {
    /// The credential itself.
    Credential(Credential),
    /// A helper program knows.
    Helper {
        /// `ecr-login` for `docker-credential-ecr-login`.
        name: String,
        /// What to ask it for.
        key: String,
        /// What the file itself holds, should the helper not know.
        otherwise: Option<Credential>,
    },
    /// No entry.
    Nothing,
}

/// A parsed credential file.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AuthFile {
    #[serde(default)]
    auths: Keyed<Entry>,
    #[serde(default)]
    creds_store: Option<String>,
    #[serde(default)]
    cred_helpers: Keyed<String>,
}

#[derive(Debug, Default, Deserialize)]
struct Entry {
    #[serde(default)]
    auth: Option<Text>,
    #[serde(default)]
    username: Option<String>,
    #[serde(default)]
    password: Option<Text>,
    #[serde(default)]
    identitytoken: Option<Text>,
    #[serde(default)]
    registrytoken: Option<Text>,
}

/// A secret while it is parsed.
#[derive(Deserialize)]
#[serde(transparent)]
struct Text(String);

impl std::fmt::Debug for Text {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Text(..)")
    }
}

impl AuthFile {
    /// Parses `config.json`, `auth.json` or the older `.dockercfg`, which is the bare `auths` map.
    pub fn parse(text: &[u8]) -> Result<Self, AuthFileError> {
        let malformed = |error: serde_json::Error| AuthFileError::Malformed {
            line: error.line(),
            column: error.column(),
        };
        let value: serde_json::Value = serde_json::from_slice(text).map_err(malformed)?;
        let modern = ["auths", "credsStore", "credHelpers"];
        let is_modern = value
            .as_object()
            .is_some_and(|map| map.is_empty() || modern.iter().any(|key| map.contains_key(*key)));
        if is_modern {
            return serde_json::from_value(value).map_err(malformed);
        }
        // A config.json without credentials holds other settings only, which make no entries either.
        Ok(Self {
            auths: serde_json::from_value(value).unwrap_or_default(),
            ..Self::default()
        })
    }

    /// Looks up a repository of a registry.
    pub fn find(&self, registry: &str, repository: &str) -> Result<Found, AuthFileError> {
        let own = self.entry(registry, repository);
        let helper = self
            .cred_helpers
            .iter()
            .find(|(key, _)| aliases(registry).contains(&host_of(key)))
            .map(|(_, name)| name)
            .or(self.creds_store.as_ref())
            .filter(|name| !name.is_empty());
        if let Some(name) = helper {
            return Ok(Found::Helper {
                name: name.clone(),
                key: helper_key(registry).to_owned(),
                otherwise: own.ok().flatten(),
            });
        }
        Ok(own?.map_or(Found::Nothing, Found::Credential))
    }

    fn entry(&self, registry: &str, repository: &str) -> Result<Option<Credential>, AuthFileError> {
        let mut namespace = Some(repository);
        while let Some(path) = namespace {
            for alias in aliases(registry) {
                let wanted = format!("{alias}/{path}");
                let namespaced = self.auths.get_key_value(&wanted).filter(|_| !path.is_empty());
                let plain = || {
                    self.auths
                        .iter()
                        .find(|(key, _)| path.is_empty() && host_of(key) == alias)
                };
                if let Some((key, entry)) = namespaced.or_else(plain)
                    && let Some(credential) = entry.credential(key)?
                {
                    return Ok(Some(credential));
                }
            }
            namespace = match path.rsplit_once('/') {
                Some((parent, _)) => Some(parent),
                None if path.is_empty() => None,
                None => Some(""),
            };
        }
        Ok(None)
    }
}

impl Entry {
    /// `None` for an empty entry, which only marks that a store knows the host.
    fn credential(&self, key: &str) -> Result<Option<Credential>, AuthFileError> {
        let some = |text: &Option<Text>| text.as_ref().map(|t| t.0.clone()).filter(|t| !t.is_empty());
        if let Some(token) = some(&self.registrytoken) {
            return Ok(Some(Credential::RegistryToken(Secret::new(token))));
        }
        if let Some(token) = some(&self.identitytoken) {
            return Ok(Some(Credential::IdentityToken(Secret::new(token))));
        }
        if let Some(auth) = some(&self.auth) {
            let bad = || AuthFileError::Auth { key: key.to_owned() };
            let lenient = base64::engine::GeneralPurpose::new(
                &base64::alphabet::STANDARD,
                base64::engine::GeneralPurposeConfig::new()
                    .with_decode_padding_mode(base64::engine::DecodePaddingMode::Indifferent),
            );
            let decoded = lenient.decode(auth.trim()).map_err(|_| bad())?;
            let text = String::from_utf8(decoded).map_err(|_| bad())?;
            let (username, password) = text.split_once(':').ok_or_else(bad)?;
            return Ok(Some(login(username, password.trim_end_matches('\0'))));
        }
        let username = self.username.as_deref().filter(|name| !name.is_empty());
        Ok(username.map(|username| login(username, &some(&self.password).unwrap_or_default())))
    }
}

/// The user name `<token>` says that the password is a refresh token.
pub(super) fn login(username: &str, password: &str) -> Credential {
    if username == "<token>" {
        return Credential::IdentityToken(Secret::new(password));
    }
    Credential::Basic {
        username: username.to_owned(),
        password: Secret::new(password),
    }
}

/// The host of a key: without scheme, and without the path of a URL or an API version; namespaces stay.
fn host_of(key: &str) -> &str {
    if let Some((_, rest)) = key.split_once("://") {
        return rest.split('/').next().unwrap_or(rest);
    }
    match key.trim_end_matches('/').rsplit_once('/') {
        Some((host, "v1" | "v2")) if !host.contains('/') => host,
        _ => key.trim_end_matches('/'),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn user_of(json: &str, registry: &str, repository: &str) -> Option<String> {
        match AuthFile::parse(json.as_bytes())
            .unwrap()
            .find(registry, repository)
            .unwrap()
        {
            Found::Credential(Credential::Basic { username, .. }) => Some(username),
            Found::Nothing => None,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn keys_match_hosts_urls_and_the_longest_namespace() {
        let json = r#"{"auths":{
            "https://index.docker.io/v1/":{"username":"hub","password":"x"},
            "quay.io":{"username":"host","password":"x"},
            "quay.io/org":{"username":"org","password":"x"},
            "quay.io/org/repo":{"username":"repo","password":"x"},
            "https://r.lan:5000/v2/":{"username":"lan","password":"x"},
            "old.lan/v1/":{"username":"old","password":"x"},
            "empty.lan":{}}}"#;
        for (registry, repository, want) in [
            ("docker.io", "library/alpine", Some("hub")),
            ("quay.io", "org/repo", Some("repo")),
            ("quay.io", "org/repo/sub", Some("repo")),
            ("quay.io", "org/other", Some("org")),
            ("quay.io", "organisation/x", Some("host")),
            ("r.lan:5000", "a", Some("lan")),
            ("r.lan", "a", None),
            ("old.lan", "a", Some("old")),
            ("empty.lan", "a", None),
            ("evil-quay.io", "org/repo", None),
        ] {
            assert_eq!(
                user_of(json, registry, repository).as_deref(),
                want,
                "{registry}/{repository}"
            );
        }
        let hub = r#"{"auths":{"docker.io":{"username":"short","password":"x"}}}"#;
        assert_eq!(user_of(hub, "docker.io", "a/b").as_deref(), Some("short"));
        let legacy = r#"{"r.lan":{"username":"legacy","password":"x"}}"#;
        assert_eq!(user_of(legacy, "r.lan", "a").as_deref(), Some("legacy"));
    }

    #[test]
    fn auth_values_in_all_their_forms() {
        let find = |entry: &str| {
            let json = format!(r#"{{"auths":{{"h":{entry}}}}}"#);
            AuthFile::parse(json.as_bytes()).unwrap().find("h", "r")
        };
        let encode = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
        let basic = |user: &str, password: &str| {
            Found::Credential(Credential::Basic {
                username: user.into(),
                password: Secret::new(password),
            })
        };
        let auth = |text: &str| find(&format!(r#"{{"auth":"{}"}}"#, encode(text)));
        assert_eq!(auth("u:p:with:colons").unwrap(), basic("u", "p:with:colons"));
        assert_eq!(auth("u:p\0\0").unwrap(), basic("u", "p"));
        let unpadded = encode("u:pw").trim_end_matches('=').to_owned();
        assert_eq!(find(&format!(r#"{{"auth":"{unpadded}"}}"#)).unwrap(), basic("u", "pw"));
        let identity = Found::Credential(Credential::IdentityToken(Secret::new("t")));
        assert_eq!(auth("<token>:t").unwrap(), identity);
        assert_eq!(find(r#"{"auth":"eDp5","identitytoken":"t"}"#).unwrap(), identity);
        let registry = Found::Credential(Credential::RegistryToken(Secret::new("r")));
        assert_eq!(find(r#"{"registrytoken":"r"}"#).unwrap(), registry);
        assert!(matches!(auth("no colon"), Err(AuthFileError::Auth { .. })));
        assert!(find(r#"{"auth":"%%%"}"#).is_err());
    }

    #[test]
    fn helpers_come_first_and_per_host_before_the_store() {
        let json = r#"{"auths":{"b":{"username":"u","password":"p"}},"credsStore":"store","credHelpers":{"a":"ecr-login","docker.io":"hub"}}"#;
        let file = AuthFile::parse(json.as_bytes()).unwrap();
        let helper = |registry: &str| match file.find(registry, "x").unwrap() {
            Found::Helper { name, key, otherwise } => (name, key, otherwise.is_some()),
            other => panic!("{other:?}"),
        };
        assert_eq!(helper("a"), ("ecr-login".into(), "a".into(), false));
        assert_eq!(helper("b"), ("store".into(), "b".into(), true));
        assert_eq!(
            helper("docker.io"),
            ("hub".into(), "https://index.docker.io/v1/".into(), false)
        );
    }

    #[test]
    fn errors_and_debug_do_not_quote_the_file() {
        let error = AuthFile::parse(br#"{"auths":{"h":{"password":hunter2}}}"#).unwrap_err();
        assert!(!format!("{error} {error:?}").contains("hunter2"));
        let file =
            AuthFile::parse(br#"{"auths":{"h":{"username":"u","password":"hunter2","auth":"hunter2"}}}"#).unwrap();
        assert!(!format!("{file:?}").contains("hunter2"));
        let other = AuthFile::parse(br#"{"HttpHeaders":{"X":"y"},"psFormat":"z"}"#).unwrap();
        assert_eq!(other.find("HttpHeaders", "a").unwrap(), Found::Nothing);
    }

    proptest! {
        #[test]
        fn never_panics(text in ".{0,200}", key in "[a-z:/.]{0,20}") {
            if let Ok(file) = AuthFile::parse(text.as_bytes()) {
                let _ = file.find("h", "r");
            }
            let json = serde_json::json!({"auths": {key.clone(): {"auth": text}}}).to_string();
            if let Ok(file) = AuthFile::parse(json.as_bytes()) {
                let _ = file.find(&key, "a/b");
            }
        }
    }
}
