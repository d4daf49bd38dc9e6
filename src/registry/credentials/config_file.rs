//! Docker's `config.json` and the containers tools' `auth.json`: pure parsing and matching.
//!
//! A key is a host (`quay.io`, `localhost:5000`), a URL (`https://index.docker.io/v1/`) or, in `auth.json`, a
//! namespace (`quay.io/org/repo`). The longest matching namespace wins. The lookup order is: the host's entry in
//! `credHelpers`, then `credsStore`, then `auths`.

use base64::Engine as _;
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny};

use super::{Credential, Keyed, Secret, aliases, helper_key};

/// Why a credential file cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AuthFileError {
    /// The file is not the expected JSON. The error gives the position but not the text, which may hold secrets.
    #[error("not a credential file (line {line}, column {column})")]
    Malformed {
        /// Line of the first error.
        line: usize,
        /// Column of the first error.
        column: usize,
    },
    /// An entry has a field of a wrong type.
    #[error("the entry for {key} is not one of a credential file")]
    AuthEntry {
        /// Key of the entry.
        key: String,
    },
    /// An `auth` value is not base64 of `user:password`.
    #[error("the entry for {key} is not base64 of `user:password`")]
    Auth {
        /// Key of the entry.
        key: String,
    },
}

/// What a credential file holds for a repository.
#[derive(Debug, PartialEq, Eq)]
pub enum FoundCredentials {
    /// The file holds the credential itself.
    Credential(Credential),
    /// The file names a helper program that has to be asked.
    Helper {
        /// Name of the helper: `ecr-login` for `docker-credential-ecr-login`.
        name: String,
        /// Server key to ask the helper for.
        key: String,
        /// The credential in the file itself, used if the helper gives none.
        otherwise: Option<Credential>,
    },
    /// The file has no entry.
    Nothing,
}

/// A parsed credential file.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AuthFile {
    #[serde(default, deserialize_with = "null_as_default")]
    auths: Keyed<KeyValue<AuthEntry>>,
    #[serde(default)]
    creds_store: Option<String>,
    #[serde(default, deserialize_with = "null_as_default")]
    cred_helpers: Keyed<KeyValue<String>>,
}

/// The value of a key. A value of a wrong type leaves the other entries of the file valid.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum KeyValue<T> {
    Null,
    Value(T),
    Odd(IgnoredAny),
}

/// Reads JSON `null` as the default, because Go writes `null` for empty maps.
fn null_as_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

#[derive(Debug, Default, Deserialize)]
struct AuthEntry {
    #[serde(default)]
    auth: Option<SecretText>,
    #[serde(default)]
    username: Option<String>,
    #[serde(default)]
    password: Option<SecretText>,
    #[serde(default)]
    identitytoken: Option<SecretText>,
    #[serde(default)]
    registrytoken: Option<SecretText>,
}

/// A secret during parsing. `Debug` does not print it.
#[derive(Deserialize)]
#[serde(transparent)]
struct SecretText(String);

impl std::fmt::Debug for SecretText {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SecretText(..)")
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
            // Parses the text again, because errors of `value` would have no lines and columns.
            return serde_json::from_slice(text).map_err(malformed);
        }
        // A config.json without credentials also gets here. Its other settings give no credential.
        Ok(Self {
            auths: serde_json::from_value(value).unwrap_or_default(),
            ..Self::default()
        })
    }

    /// Looks up a repository of a registry.
    pub fn find(&self, registry: &str, repository: &str) -> Result<FoundCredentials, AuthFileError> {
        let own = self.entry(registry, repository);
        let aliases = aliases(registry);
        let of_host = aliases.iter().flat_map(|alias| of_host(&self.cred_helpers, alias));
        let helper = of_host
            .filter_map(|(_, slot)| match slot {
                KeyValue::Value(name) => Some(name),
                KeyValue::Null | KeyValue::Odd(_) => None,
            })
            .next()
            .or(self.creds_store.as_ref())
            .filter(|name| !name.is_empty());
        if let Some(name) = helper {
            return Ok(FoundCredentials::Helper {
                name: name.clone(),
                key: helper_key(registry).to_owned(),
                otherwise: own.ok().flatten(),
            });
        }
        Ok(own?.map_or(FoundCredentials::Nothing, FoundCredentials::Credential))
    }

    fn entry(&self, registry: &str, repository: &str) -> Result<Option<Credential>, AuthFileError> {
        let mut namespace = Some(repository);
        while let Some(path) = namespace {
            for alias in aliases(registry) {
                let found = match path {
                    "" => first_credential(of_host(&self.auths, alias)),
                    _ => first_credential(self.auths.get_key_value(&format!("{alias}/{path}")).into_iter()),
                };
                if let Some(credential) = found? {
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

/// Returns the entries of a host. The entry under its bare name comes first. Entries under URLs and API versions
/// follow, in the order of their keys.
fn of_host<'a, T>(keyed: &'a Keyed<T>, host: &'a str) -> impl Iterator<Item = (&'a String, &'a T)> {
    let others = keyed
        .iter()
        .filter(move |(key, _)| *key != host && host_of(key) == Some(host));
    keyed.get_key_value(host).into_iter().chain(others)
}

/// Returns the first credential of some entries that mean the same. Skips entries without a credential. Returns the
/// error of the first broken entry only if no entry has a credential.
fn first_credential<'a>(
    entries: impl Iterator<Item = (&'a String, &'a KeyValue<AuthEntry>)>,
) -> Result<Option<Credential>, AuthFileError> {
    let mut broken = None;
    for (key, slot) in entries {
        let credential = match slot {
            KeyValue::Null => Ok(None),
            KeyValue::Value(entry) => entry.credential(key),
            KeyValue::Odd(_) => Err(AuthFileError::AuthEntry { key: key.clone() }),
        };
        match credential {
            Ok(Some(credential)) => return Ok(Some(credential)),
            Ok(None) => {}
            Err(error) => broken = broken.or(Some(error)),
        }
    }
    broken.map_or(Ok(None), Err)
}

impl AuthEntry {
    /// Returns `None` for an empty entry. An empty entry only marks that a credential store has a login for the host.
    fn credential(&self, key: &str) -> Result<Option<Credential>, AuthFileError> {
        let some = |text: &Option<SecretText>| text.as_ref().map(|t| t.0.clone()).filter(|t| !t.is_empty());
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

/// Makes a credential of a user name and a password. With the user name `<token>`, the password is a refresh token.
pub(super) fn login(username: &str, password: &str) -> Credential {
    if username == "<token>" {
        return Credential::IdentityToken(Secret::new(password));
    }
    Credential::Basic {
        username: username.to_owned(),
        password: Secret::new(password),
    }
}

/// Returns the host that a key stands for, without scheme and API version. Returns `None` for namespaces, and for
/// URLs below a host, such as the tokens that `docker login` stores beside the login.
fn host_of(key: &str) -> Option<&str> {
    let place = key.split_once("://").map_or(key, |(_, rest)| rest);
    let (host, path) = place.split_once('/').unwrap_or((place, ""));
    matches!(path, "" | "v1" | "v1/" | "v2" | "v2/").then_some(host)
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
            FoundCredentials::Credential(Credential::Basic { username, .. }) => Some(username),
            FoundCredentials::Nothing => None,
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
    fn of_several_keys_of_a_host_the_login_is_taken() {
        // Entries that `docker login` writes after a login in a browser.
        let web = r#"{"auths":{
            "https://index.docker.io/v1/access-token":{"username":"access","password":"x"},
            "https://index.docker.io/v1/":{"username":"login","password":"x"},
            "https://index.docker.io/v1/refresh-token":{"username":"refresh","password":"x"}}}"#;
        // Repeated, because a map with a random order would pass some of the time.
        for _ in 0..20 {
            assert_eq!(user_of(web, "docker.io", "a/b").as_deref(), Some("login"));
        }
        let tokens_only =
            r#"{"auths":{"https://index.docker.io/v1/access-token":{"username":"access","password":"x"}}}"#;
        assert_eq!(user_of(tokens_only, "docker.io", "a/b"), None);
        let exact = r#"{"auths":{
            "https://r.lan":{"username":"url","password":"x"},
            "r.lan/v2/":{"username":"version","password":"x"},
            "r.lan":{"username":"exact","password":"x"}}}"#;
        let empty = exact.replace(r#"{"username":"exact","password":"x"}"#, "{}");
        for _ in 0..20 {
            assert_eq!(user_of(exact, "r.lan", "a").as_deref(), Some("exact"));
            assert_eq!(user_of(&empty, "r.lan", "a").as_deref(), Some("url"));
        }
        for (key, host) in [
            ("r.lan", Some("r.lan")),
            ("r.lan/", Some("r.lan")),
            ("r.lan:5000/v1", Some("r.lan:5000")),
            ("https://r.lan", Some("r.lan")),
            ("http://r.lan/v2/", Some("r.lan")),
            ("https://r.lan/v1/x", None),
            ("https://r.lan/v3/", None),
            ("r.lan/org", None),
        ] {
            assert_eq!(host_of(key), host, "{key}");
        }
    }

    #[test]
    fn odd_parts_of_a_file_leave_the_others_alone() {
        for nothing in ["null", "{}", r#"{"other":null}"#] {
            let json = format!(r#"{{"auths":{nothing},"credHelpers":{nothing},"credsStore":null}}"#);
            let file = AuthFile::parse(json.as_bytes()).unwrap();
            assert_eq!(file.find("r.lan", "a").unwrap(), FoundCredentials::Nothing);
        }
        let json = r#"{"auths":{
            "r.lan":{"username":"u","password":"p"},
            "odd.lan":{"auth":5},
            "list.lan":["x"],
            "null.lan":null,
            "broken.lan":{"auth":"%"},
            "https://broken.lan":{"username":"second","password":"p"}},
            "credHelpers":{"odd.lan":7}}"#;
        assert_eq!(user_of(json, "r.lan", "a").as_deref(), Some("u"));
        assert_eq!(user_of(json, "null.lan", "a"), None);
        assert_eq!(user_of(json, "broken.lan", "a").as_deref(), Some("second"));
        let odd = AuthFile::parse(json.as_bytes())
            .unwrap()
            .find("odd.lan", "a")
            .unwrap_err();
        assert_eq!(odd.to_string(), "the entry for odd.lan is not one of a credential file");
        let error = AuthFile::parse(b"{\"credsStore\":\"x\",\n \"auths\": 1}").unwrap_err();
        assert_eq!(error.to_string(), "not a credential file (line 2, column 11)");
    }

    #[test]
    fn auth_values_in_all_their_forms() {
        let find = |entry: &str| {
            let json = format!(r#"{{"auths":{{"h":{entry}}}}}"#);
            AuthFile::parse(json.as_bytes()).unwrap().find("h", "r")
        };
        let encode = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
        let basic = |user: &str, password: &str| {
            FoundCredentials::Credential(Credential::Basic {
                username: user.into(),
                password: Secret::new(password),
            })
        };
        let auth = |text: &str| find(&format!(r#"{{"auth":"{}"}}"#, encode(text)));
        assert_eq!(auth("u:p:with:colons").unwrap(), basic("u", "p:with:colons"));
        assert_eq!(auth("u:p\0\0").unwrap(), basic("u", "p"));
        let unpadded = encode("u:pw").trim_end_matches('=').to_owned();
        assert_eq!(find(&format!(r#"{{"auth":"{unpadded}"}}"#)).unwrap(), basic("u", "pw"));
        let identity = FoundCredentials::Credential(Credential::IdentityToken(Secret::new("t")));
        assert_eq!(auth("<token>:t").unwrap(), identity);
        assert_eq!(find(r#"{"auth":"eDp5","identitytoken":"t"}"#).unwrap(), identity);
        let registry = FoundCredentials::Credential(Credential::RegistryToken(Secret::new("r")));
        assert_eq!(find(r#"{"registrytoken":"r"}"#).unwrap(), registry);
        assert!(matches!(auth("no colon"), Err(AuthFileError::Auth { .. })));
        assert!(find(r#"{"auth":"%%%"}"#).is_err());
    }

    #[test]
    fn helpers_come_first_and_per_host_before_the_store() {
        let json = r#"{"auths":{"b":{"username":"u","password":"p"}},"credsStore":"store","credHelpers":{"a":"ecr-login","docker.io":"hub"}}"#;
        let file = AuthFile::parse(json.as_bytes()).unwrap();
        let helper = |registry: &str| match file.find(registry, "x").unwrap() {
            FoundCredentials::Helper { name, key, otherwise } => (name, key, otherwise.is_some()),
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
        assert_eq!(other.find("HttpHeaders", "a").unwrap(), FoundCredentials::Nothing);
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
