//! The token exchange of the distribution token authentication specification: makes requests and parses responses;
//! pure.

use std::time::{Duration, SystemTime};

use reqwest::Url;
use serde::Deserialize;
use serde_json::Value;

use super::credentials::Credential;
use super::secret::Secret;
use super::transport::Form;

/// Lifetime of a token whose server states none (distribution, "token" specification).
const DEFAULT_LIFETIME: Duration = Duration::from_secs(60);
/// Longest believed lifetime, so that a nonsensical number does not overflow a clock.
const LONGEST_LIFETIME: Duration = Duration::from_secs(30 * 24 * 3600);
/// Name of this program in requests to token servers.
const CLIENT_ID: &str = "ocifs";

/// The parameters of a registry's Bearer challenge.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct BearerChallenge {
    pub(super) realm: Url,
    pub(super) service: Option<String>,
    pub(super) scope: String,
}

/// How to obtain a token.
#[derive(Debug)]
pub(super) enum Exchange {
    /// A GET, with user and password as Basic authorization if there are any.
    Get { url: Url, login: Option<(String, Secret)> },
    /// A POST of an OAuth2 form.
    Post { url: Url, form: Form },
    /// No request: the credential is the token.
    Ready(Secret),
}

impl BearerChallenge {
    /// Returns the exchange that fits a credential.
    pub(super) fn exchange(&self, credential: Option<Credential>) -> Exchange {
        match credential {
            Some(Credential::RegistryToken(token)) => Exchange::Ready(token),
            Some(Credential::IdentityToken(token)) => {
                let mut form = vec![
                    ("grant_type", Secret::new("refresh_token")),
                    ("client_id", Secret::new(CLIENT_ID)),
                    ("scope", Secret::new(self.scope.as_str())),
                    ("refresh_token", token),
                ];
                form.extend(self.service.as_deref().map(|service| ("service", Secret::new(service))));
                Exchange::Post {
                    url: self.realm.clone(),
                    form,
                }
            }
            Some(Credential::Basic { username, password }) => Exchange::Get {
                url: self.get_url(Some(&username)),
                login: Some((username, password)),
            },
            None => Exchange::Get {
                url: self.get_url(None),
                login: None,
            },
        }
    }

    fn get_url(&self, account: Option<&str>) -> Url {
        let mut url = self.realm.clone();
        {
            let mut query = url.query_pairs_mut();
            if let Some(service) = &self.service {
                query.append_pair("service", service);
            }
            for scope in self.scope.split(' ').filter(|scope| !scope.is_empty()) {
                query.append_pair("scope", scope);
            }
            if let Some(account) = account {
                query.append_pair("account", account);
            }
            query.append_pair("client_id", CLIENT_ID);
        }
        url
    }
}

/// A token and its lifetime from now.
#[derive(Debug)]
pub struct Token {
    /// The token.
    pub token: Secret,
    /// Remaining lifetime.
    pub lifetime: Duration,
}

/// A token server's response. Only the token has to be of the right type. Other fields of a wrong type count as not
/// stated.
#[derive(Deserialize)]
struct TokenAnswer {
    #[serde(default)]
    token: Value,
    #[serde(default)]
    access_token: Value,
    #[serde(default)]
    expires_in: Value,
    #[serde(default)]
    issued_at: Value,
}

/// Reads a number, which may be in quotes.
fn number(value: &Value) -> Option<f64> {
    match value {
        Value::Number(number) => number.as_f64(),
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    }
}

/// Parses a token server's response. Returns `None` if it holds no token.
pub fn parse(body: &[u8], now: SystemTime) -> Option<Token> {
    // Some servers put a byte order mark first.
    let body = body.strip_prefix(b"\xef\xbb\xbf").unwrap_or(body);
    let answer: TokenAnswer = serde_json::from_slice(body).ok()?;
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let non_empty = |token: &Value| text(token).filter(|token| !token.is_empty());
    let token = non_empty(&answer.token).or_else(|| non_empty(&answer.access_token))?;
    let stated = number(&answer.expires_in)
        .filter(|seconds| *seconds > 0.0)
        .map(|seconds| Duration::try_from_secs_f64(seconds).unwrap_or(LONGEST_LIFETIME));
    let lifetime = stated.unwrap_or(DEFAULT_LIFETIME).min(LONGEST_LIFETIME);
    // A server may return a token that it issued some time ago. If that age reaches the lifetime, a clock is wrong
    // and the age is ignored.
    let age = text(&answer.issued_at)
        .and_then(|date| humantime::parse_rfc3339(&date).ok())
        .and_then(|issued| now.duration_since(issued).ok())
        .filter(|age| *age < lifetime)
        .unwrap_or_default();
    Some(Token {
        token: Secret::new(token),
        lifetime: lifetime - age,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn challenge() -> BearerChallenge {
        BearerChallenge {
            realm: Url::parse("https://auth.lan/token?tenant=1").unwrap(),
            service: Some("registry lan".into()),
            scope: "repository:a/b:pull repository:c:pull".into(),
        }
    }

    #[test]
    fn anonymous_and_password_exchanges_are_gets() {
        let Exchange::Get { url, login: None } = challenge().exchange(None) else {
            panic!("not an anonymous GET");
        };
        assert_eq!(
            url.as_str(),
            "https://auth.lan/token?tenant=1&service=registry+lan&scope=repository%3Aa%2Fb%3Apull&scope=repository%3Ac%3Apull&client_id=ocifs"
        );
        let login = Credential::Basic {
            username: "me".into(),
            password: Secret::new("pw"),
        };
        let Exchange::Get { url, login: Some(_) } = challenge().exchange(Some(login)) else {
            panic!("not a GET with login");
        };
        assert!(url.as_str().contains("account=me") && !url.as_str().contains("pw"));
    }

    #[test]
    fn identity_tokens_are_posted_and_registry_tokens_used_as_they_are() {
        let identity = challenge().exchange(Some(Credential::IdentityToken(Secret::new("r"))));
        let Exchange::Post { url, form } = identity else {
            panic!("not a POST");
        };
        assert_eq!(url, challenge().realm);
        assert!(
            form.contains(&("grant_type", Secret::new("refresh_token")))
                && form.contains(&("refresh_token", Secret::new("r")))
        );
        let ready = challenge().exchange(Some(Credential::RegistryToken(Secret::new("t"))));
        assert!(matches!(ready, Exchange::Ready(token) if token == Secret::new("t")));
    }

    #[test]
    fn answers() {
        let now = humantime::parse_rfc3339("2026-01-01T00:10:00Z").unwrap();
        let get = |json: &str| parse(json.as_bytes(), now).map(|t| (t.token, t.lifetime.as_secs()));
        let token = |text: &str, seconds: u64| Some((Secret::new(text), seconds));
        assert_eq!(get(r#"{"token":"a"}"#), token("a", 60));
        assert_eq!(
            get(r#"{"token":"","access_token":"b","expires_in":300}"#),
            token("b", 300)
        );
        let issued = |date: &str| get(&format!(r#"{{"token":"a","expires_in":300,"issued_at":"{date}"}}"#));
        assert_eq!(issued("2026-01-01T00:08:00Z"), token("a", 180));
        assert_eq!(issued("2026-01-01T00:00:00Z"), token("a", 300));
        assert_eq!(issued("2027-01-01T00:00:00Z"), token("a", 300));
        assert_eq!(issued("yesterday"), token("a", 300));
        assert_eq!(get(r#"{"token":"a","expires_in":-1}"#), token("a", 60));
        assert_eq!(
            get(r#"{"token":"a","expires_in":1e300}"#),
            token("a", LONGEST_LIFETIME.as_secs())
        );
        assert_eq!(
            get(r#"{"token":"a","expires_in":"300","issued_at":1767225900}"#),
            token("a", 300)
        );
        assert_eq!(get("\u{feff}{\"token\":\"a\"}"), token("a", 60));
        assert_eq!(get(r#"{"token":7}"#), None);
        assert_eq!(get("{}"), None);
        assert_eq!(get("<html>"), None);
    }

    proptest! {
        #[test]
        fn never_panics(body in proptest::collection::vec(any::<u8>(), 0..200), seconds in any::<f64>(), date in ".{0,30}") {
            let _ = parse(&body, SystemTime::now());
            let json = serde_json::json!({"token": "t", "expires_in": seconds, "issued_at": date}).to_string();
            let _ = parse(json.as_bytes(), SystemTime::now());
        }
    }
}
