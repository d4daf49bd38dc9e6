//! Authorization per repository: remembers challenges, and obtains, caches and renews tokens.
//!
//! State is kept per repository and base URL of the registry. These two determine service, scope and credential. The
//! state is the last challenge, and a cell with the *grant* (an `Authorization` value) obtained for it. The URL
//! includes the scheme: a grant obtained from a host with TLS is not sent to the same host without TLS.
//!
//! ```text
//!   no challenge known ──401──▶ challenge, empty cell ──ticket()──▶ grant ──80 % of its life over──▶ renewed grant
//!                                     ▲                              │ its life over, or a 401 to it
//!                                     └──────── new empty cell ◀─────┘
//! ```
//!
//! Only one caller obtains a grant at a time (single flight):
//! - All callers that need a grant wait on the same cell.
//! - A caller replaces the cell under the lock, and only if the cell is still the one that the caller used. A caller
//!   also replaces it if the grant's life is over or the registry sends another challenge.
//! - If a caller is dropped while it obtains a grant, the next waiter takes over.
//! - One caller renews a grant while the others go on using it. If the renewal fails, that caller also goes on using
//!   the old grant.

use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use base64::Engine as _;
use lru::LruCache;
use reqwest::header::{HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use reqwest::{StatusCode, Url};
use tokio::sync::OnceCell;

use super::challenge::{self, Challenge};
use super::config::RegistryConfig;
use super::credentials::{Credential, Lookup};
use super::encoding::{self, Encoding};
use super::endpoint::{Repository, authority, is_loopback};
use super::failure::{self, Context};
use super::secret::Secret;
use super::token::{self, BearerChallenge, Exchange};
use super::transport::{Act, Ask, Transport};
use crate::blob::BlobError;

/// Most repositories whose challenge and token are remembered. A larger value costs memory. With a smaller one, more
/// repositories have to obtain their token again.
const REPOSITORIES: usize = 1024;
/// Largest token response, in bytes. Tokens with many scopes reach tens of kilobytes.
const MAX_TOKEN_ANSWER: usize = 1 << 20;
/// Part of a grant's life after which it is renewed. A larger part risks that the grant ends while a request is in
/// flight. A smaller part costs more token requests.
const RENEW_AT: f64 = 0.8;
/// Time between attempts to renew a grant that is still valid. A shorter time slows down more requests while the
/// token server is in trouble. A longer one leaves fewer attempts before the grant ends.
const RENEW_AGAIN: Duration = Duration::from_secs(10);
/// Why a host gets no login that another host led to with authorities of its own.
const BORROWED: &str = "no login is used where only another host's authorities are trusted";
/// Longest lookup of credentials. It limits operations that have a long timeout or none.
const LONGEST_LOOKUP: Duration = Duration::from_secs(60);

/// The authentication scheme that a registry asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Scheme {
    Basic,
    Bearer(BearerChallenge),
}

/// An `Authorization` value, its life, and where its credential came from.
#[derive(Debug)]
struct Grant {
    header: HeaderValue,
    obtained: Instant,
    /// `None` if the grant does not end.
    life: Option<Life>,
    tried: String,
}

#[derive(Debug, Clone, Copy)]
struct Life {
    renew_at: Instant,
    end: Instant,
}

type Cell = Arc<OnceCell<Grant>>;

#[derive(Debug, Default)]
struct RepositoryGrants {
    scheme: Option<Scheme>,
    cell: Cell,
    /// When the last attempt began to renew a grant that was still valid.
    renewing: Option<Instant>,
}

impl RepositoryGrants {
    /// Forgets a grant whose life is over. Returns the rest of the grant's life if the caller has to renew it.
    fn age(&mut self) -> Option<Duration> {
        let life = self.cell.get()?.life?;
        let now = Instant::now();
        if now >= life.end {
            self.cell = Cell::default();
            return None;
        }
        let busy = self
            .renewing
            .is_some_and(|began| now.duration_since(began) < RENEW_AGAIN);
        if now < life.renew_at || busy {
            return None;
        }
        self.renewing = Some(now);
        Some(life.end - now)
    }
}

/// A grant in use. If the registry refuses it, the caller passes the ticket to [`Auth::challenged`].
#[derive(Debug, Clone)]
pub(super) struct GrantTicket {
    cell: Cell,
    pub(super) header: HeaderValue,
    pub(super) obtained: Instant,
    /// How many refusals of a grant that was obtained for the current request lead to another attempt.
    ///
    /// A new token gets another attempt: it may not have reached every replica of a registry yet, or another reader's
    /// requests may have ended it. A password gets none, because a second attempt would send the same password.
    pub(super) second_chances: u32,
    /// Where the credentials came from, or where none were found.
    pub(super) tried: String,
}

/// Challenges and grants of all repositories.
#[derive(Debug)]
pub(super) struct Auth {
    spaces: Mutex<LruCache<String, RepositoryGrants>>,
}

impl Auth {
    pub(super) fn new() -> Self {
        let capacity = NonZeroUsize::new(REPOSITORIES).unwrap_or(NonZeroUsize::MIN);
        Self {
            spaces: Mutex::new(LruCache::new(capacity)),
        }
    }

    fn with_space<T>(&self, repository: &Repository, body: impl FnOnce(&mut RepositoryGrants) -> T) -> T {
        let mut spaces = self.spaces.lock().expect("no panic while locked");
        body(spaces.get_or_insert_mut(repository.id(), RepositoryGrants::default))
    }

    /// Returns the grant to send with a request. Obtains or renews it if necessary. Returns `None` while the registry
    /// has not sent a challenge.
    pub(super) async fn ticket(
        &self,
        transport: &Transport,
        repository: &Repository,
        wait: Duration,
    ) -> Result<Option<GrantTicket>, BlobError> {
        let known = self.with_space(repository, |space| {
            let left = space.age();
            Some((space.scheme.clone()?, Arc::clone(&space.cell), left))
        });
        let Some((scheme, mut cell, left)) = known else {
            return Ok(None);
        };
        if let Some(left) = left {
            match tokio::time::timeout(left, obtain(transport, repository, &scheme, wait)).await {
                Ok(Ok(grant)) => cell = self.renewed(repository, &cell, grant),
                Ok(Err(error)) => tracing::debug!(%repository, %error, "the token could not be renewed yet"),
                Err(_) => tracing::debug!(%repository, "the token could not be renewed in time"),
            }
        }
        let grant = cell
            .get_or_try_init(|| obtain(transport, repository, &scheme, wait))
            .await?;
        Ok(Some(GrantTicket {
            header: grant.header.clone(),
            obtained: grant.obtained,
            second_chances: u32::from(matches!(scheme, Scheme::Bearer(_))),
            tried: grant.tried.clone(),
            cell: Arc::clone(&cell),
        }))
    }

    /// Puts a new grant in the place of `old`, unless another caller has replaced `old` meanwhile. Returns the new
    /// grant's cell.
    fn renewed(&self, repository: &Repository, old: &Cell, grant: Grant) -> Cell {
        let cell = Arc::new(OnceCell::from(grant));
        self.with_space(repository, |space| {
            if Arc::ptr_eq(old, &space.cell) {
                space.cell = Arc::clone(&cell);
                space.renewing = None;
            }
        });
        cell
    }

    /// Forgets a grant that the registry refused without a challenge.
    pub(super) fn refused(&self, repository: &Repository, refused: &GrantTicket) {
        self.with_space(repository, |space| {
            if Arc::ptr_eq(&refused.cell, &space.cell) {
                space.cell = Cell::default();
            }
        });
    }

    /// Records the scheme that a 401 asks for, and forgets the grant that the 401 refused.
    pub(super) fn challenged(&self, repository: &Repository, scheme: Scheme, refused: Option<&GrantTicket>) {
        self.with_space(repository, |space| {
            let current_refused = refused.is_some_and(|ticket| Arc::ptr_eq(&ticket.cell, &space.cell));
            let changed = space.scheme.as_ref() != Some(&scheme);
            if current_refused || changed {
                space.cell = Cell::default();
            }
            space.scheme = Some(scheme);
        });
    }
}

/// Returns the best scheme that a 401 offers for a repository: Bearer before Basic.
pub(super) fn choose(headers: &HeaderMap, base: &Url, repository: &Repository) -> Option<Scheme> {
    let values = headers.get_all(WWW_AUTHENTICATE).iter();
    let challenges: Vec<Challenge> = values
        .filter_map(|value| value.to_str().ok())
        .flat_map(challenge::parse)
        .collect();
    let bearer = challenges.iter().filter(|c| c.scheme == "bearer").find_map(|c| {
        let realm = base.join(c.get("realm")?).ok()?;
        let http = matches!(realm.scheme(), "http" | "https") && realm.host_str().is_some();
        http.then(|| BearerChallenge {
            realm,
            service: c.get("service").map(str::to_owned),
            scope: match c.get("scope") {
                Some(scope) => scope.to_owned(),
                None => format!("repository:{}:pull", repository.name),
            },
        })
    });
    match bearer {
        Some(bearer) => Some(Scheme::Bearer(bearer)),
        None => challenges.iter().any(|c| c.scheme == "basic").then_some(Scheme::Basic),
    }
}

async fn obtain(
    transport: &Transport,
    repository: &Repository,
    scheme: &Scheme,
    wait: Duration,
) -> Result<Grant, BlobError> {
    let config: &RegistryConfig = transport.config();
    // The lookup is not limited by `wait`, which is for servers: a helper program may take longer. A quarter of the
    // timeout is left for reporting the failure.
    let patience = (config.timeout - config.timeout / 4).min(LONGEST_LOOKUP);
    let looking = async {
        match repository.endpoint.settings().is_borrowed {
            false => {
                config
                    .credentials
                    .lookup(repository.endpoint.name(), &repository.name)
                    .await
            }
            true => Lookup {
                credential: None,
                tried: vec![BORROWED.to_owned()],
            },
        }
    };
    let looked = tokio::time::timeout(patience, looking).await;
    let Lookup { credential, tried } = looked.unwrap_or_else(|_| Lookup {
        credential: None,
        tried: vec![format!(
            "looking for credentials took longer than {}s",
            patience.as_secs().max(1)
        )],
    });
    let tried = match (tried.is_empty(), &credential) {
        (true, None) => "no credentials".to_owned(),
        (true, Some(_)) => "with credentials".to_owned(),
        (false, _) => tried.join(", "),
    };
    // Without TLS, an attacker who reads the traffic could also forge the challenge and name another token server.
    let is_exposed = !may_see_secrets(repository.endpoint.base(), transport.is_plain(&repository.endpoint));
    if credential.is_some() && is_exposed {
        let said = "it has no TLS, so it is not shown the credentials";
        return Err(unauthorized(repository, &tried, said));
    }
    let (value, lifetime) = match (scheme, credential) {
        (Scheme::Basic, Some(Credential::Basic { username, password })) => (basic(&username, &password), None),
        (Scheme::Basic, None) => return Err(unauthorized(repository, &tried, "")),
        (Scheme::Basic, Some(_)) => {
            let said = "it takes user and password only, no token";
            return Err(unauthorized(repository, &tried, said));
        }
        (Scheme::Bearer(challenge), credential) => {
            let fetching = fetch_token(transport, repository, challenge, credential, &tried, wait);
            let fetched = tokio::time::timeout(wait, fetching).await;
            let (token, lifetime) = fetched.map_err(|_| BlobError::Timeout {
                what: format!("the token server of {}", repository.endpoint.name()),
                seconds: wait.as_secs().max(1),
            })??;
            (Secret::new(format!("Bearer {}", token.expose())), lifetime)
        }
    };
    let header = value.header().ok_or_else(|| BlobError::Invalid {
        what: format!("the credential for {}", repository.endpoint.name()),
        reason: "it holds characters that cannot be sent".to_owned(),
    })?;
    let obtained = Instant::now();
    Ok(Grant {
        header,
        obtained,
        life: lifetime.and_then(|lifetime: Duration| {
            Some(Life {
                renew_at: renewal(obtained, lifetime)?,
                end: obtained.checked_add(lifetime)?,
            })
        }),
        tried,
    })
}

/// Returns when to renew a grant with this lifetime, or `None` if the clock cannot represent that time.
fn renewal(obtained: Instant, lifetime: Duration) -> Option<Instant> {
    obtained.checked_add(lifetime.mul_f64(RENEW_AT))
}

/// Obtains a token. Returns it with its lifetime, or with `None` if the credential itself is the token.
async fn fetch_token(
    transport: &Transport,
    repository: &Repository,
    challenge: &BearerChallenge,
    credential: Option<Credential>,
    tried: &str,
    wait: Duration,
) -> Result<(Secret, Option<Duration>), BlobError> {
    let has_secret = credential.is_some();
    let mut ask = match challenge.exchange(credential) {
        Exchange::Ready(token) => return Ok((token, None)),
        Exchange::Get { url, login } => {
            let mut ask = Ask::get(url);
            ask.authorization = login.and_then(|(username, password)| basic(&username, &password).header());
            ask
        }
        Exchange::Post { url, form } => Ask::new(Act::PostForm(form), url),
    };
    let realm = &challenge.realm;
    let host = authority(realm);
    let what = format!("a token for {repository}");
    if has_secret && !may_see_secrets(realm, transport.is_plain(&repository.endpoint)) {
        return Err(BlobError::Protocol {
            host,
            what,
            detail: "the token server has no TLS, so it is not shown the credentials".to_owned(),
            transient: false,
        });
    }
    ask.headers
        .insert(reqwest::header::ACCEPT, HeaderValue::from_static("application/json"));
    ask.guarded = transport.leads_to_public_only(repository.endpoint.base());
    let settings = repository.endpoint.settings();
    ask.settings = match realm.origin() == repository.endpoint.base().origin() {
        true => Arc::clone(settings),
        false => Arc::new(settings.for_tokens()),
    };
    let mut reply = transport.send(&ask, wait).await?;
    let status = reply.status();
    if !status.is_success() {
        let body = reply.error_body().await;
        let context = Context {
            host: &host,
            what: &what,
            tried,
        };
        // Token servers respond to wrong credentials with 400 (OAuth2), 401 or 403.
        return Err(match status {
            StatusCode::BAD_REQUEST if has_secret => unauthorized(repository, tried, &failure::message(&body)),
            _ => failure::status(context, status, reply.headers(), &body),
        });
    }
    let encoding = Encoding::of(reply.headers());
    let body = reply.whole(MAX_TOKEN_ANSWER).await?;
    let body = body.map(|body| encoding::plain(body, encoding, None, MAX_TOKEN_ANSWER));
    let token = body.and_then(|body| token::parse(&body, SystemTime::now()));
    let token = token.ok_or_else(|| BlobError::Protocol {
        host,
        what,
        detail: "no token in the answer".to_owned(),
        transient: false,
    })?;
    Ok((token.token, Some(token.lifetime)))
}

/// Whether secrets may be sent to `realm`. It must use TLS or be on this machine, or the registry itself is used
/// without TLS.
fn may_see_secrets(realm: &Url, is_plain_registry: bool) -> bool {
    realm.scheme() == "https" || is_plain_registry || realm.host_str().is_some_and(is_loopback)
}

fn basic(username: &str, password: &Secret) -> Secret {
    let login = format!("{username}:{}", password.expose());
    let encoded = base64::engine::general_purpose::STANDARD.encode(login);
    Secret::new(format!("Basic {encoded}"))
}

/// Makes the error for a registry that refuses access.
pub(super) fn unauthorized(repository: &Repository, tried: &str, said: &str) -> BlobError {
    BlobError::Unauthorized {
        host: repository.endpoint.name().to_owned(),
        what: format!("repository {}, which may not exist", repository.name),
        tried: failure::unauthorized_text(tried, said),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::endpoint::{Endpoint, PlainHttp};

    fn repository(registry: &str) -> Repository {
        Repository::new(Endpoint::new(registry, &PlainHttp::Loopback).unwrap(), "a/b").unwrap()
    }

    fn chosen(headers: &[&str]) -> Option<Scheme> {
        let mut map = HeaderMap::new();
        for header in headers {
            map.append(WWW_AUTHENTICATE, header.parse().unwrap());
        }
        choose(&map, &Url::parse("https://r.lan/v2/").unwrap(), &repository("r.lan"))
    }

    #[test]
    fn bearer_is_preferred_wherever_it_stands() {
        let bearer = r#"Bearer realm="https://a.lan/t",service="s""#;
        for headers in [
            vec![r#"Basic realm="x""#, bearer],
            vec![r#"Basic realm="x", Bearer realm="https://a.lan/t",service="s""#],
        ] {
            let Some(Scheme::Bearer(challenge)) = chosen(&headers) else {
                panic!("no bearer");
            };
            assert_eq!(challenge.realm.as_str(), "https://a.lan/t");
            assert_eq!(challenge.scope, "repository:a/b:pull", "guessed when not stated");
        }
        assert_eq!(chosen(&["Basic"]), Some(Scheme::Basic));
        assert_eq!(chosen(&["Negotiate"]), None);
        assert_eq!(chosen(&[r#"Bearer realm="ftp://x/y""#]), None);
        assert_eq!(chosen(&[]), None);
    }

    #[test]
    fn grants_are_renewed_before_they_end_but_not_long_before() {
        let now = Instant::now();
        for seconds in [1, 60, 300, 86_400] {
            let lifetime = Duration::from_secs(seconds);
            let at = renewal(now, lifetime).unwrap();
            assert!(
                (now + lifetime / 2..now + lifetime * 9 / 10).contains(&at),
                "{seconds}: {:?}",
                at - now
            );
        }
        assert_eq!(renewal(now, Duration::MAX), None);
    }

    #[test]
    fn secrets_want_tls_unless_the_registry_has_none() {
        let plain = Url::parse("http://auth.lan/token").unwrap();
        let tls = Url::parse("https://auth.lan/token").unwrap();
        let loopback = Url::parse("http://127.0.0.1:5001/token").unwrap();
        assert!(!may_see_secrets(&plain, false));
        assert!(may_see_secrets(&tls, false));
        assert!(may_see_secrets(&loopback, false));
        assert!(may_see_secrets(&plain, true));
    }

    /// A grant with a life of one hour, obtained `age` ago.
    fn grant(age: Duration) -> Grant {
        let obtained = Instant::now().checked_sub(age).unwrap();
        let hour = Duration::from_secs(3600);
        Grant {
            header: HeaderValue::from_static("old"),
            obtained,
            life: Some(Life {
                renew_at: obtained + hour.mul_f64(RENEW_AT),
                end: obtained + hour,
            }),
            tried: String::new(),
        }
    }

    #[tokio::test]
    async fn a_grant_is_good_until_its_end_when_it_cannot_be_renewed() {
        let transport = Transport::new(RegistryConfig {
            credentials: Arc::new(crate::registry::Anonymous),
            ..RegistryConfig::default()
        })
        .unwrap();
        // No server listens at the port of a listener that was dropped.
        let nobody = std::net::TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        let scheme = Scheme::Bearer(BearerChallenge {
            realm: Url::parse(&format!("http://{nobody}/token")).unwrap(),
            service: None,
            scope: String::new(),
        });
        let auth = Auth::new();
        let repository = repository("r.lan");
        let put = |age| {
            auth.with_space(&repository, |space| {
                space.scheme = Some(scheme.clone());
                space.cell = Arc::new(OnceCell::from(grant(age)));
                space.renewing = None;
            });
        };
        let minutes = |minutes: u64| Duration::from_secs(minutes * 60);
        let attempts = || transport.stats().iter().map(|host| host.requests).sum::<u64>();
        for (age, asked) in [(minutes(47), 0), (minutes(49), 1)] {
            put(age);
            for _ in 0..3 {
                let ticket = auth.ticket(&transport, &repository, minutes(1)).await.unwrap().unwrap();
                assert_eq!(ticket.header, "old");
            }
            assert_eq!(attempts(), asked, "one attempt for a while");
        }
        put(minutes(60));
        let error = auth.ticket(&transport, &repository, minutes(1)).await.unwrap_err();
        assert!(matches!(error, BlobError::Unreachable { .. }), "{error}");

        // A renewed grant replaces only the grant that it renews.
        put(minutes(50));
        let old = auth.with_space(&repository, |space| Arc::clone(&space.cell));
        let renewed = auth.renewed(&repository, &old, grant(minutes(0)));
        let current = auth.with_space(&repository, |space| Arc::clone(&space.cell));
        assert!(Arc::ptr_eq(&renewed, &current));
        auth.renewed(&repository, &old, grant(minutes(0)));
        let current = auth.with_space(&repository, |space| Arc::clone(&space.cell));
        assert!(Arc::ptr_eq(&renewed, &current));
    }

    #[test]
    fn only_the_grant_in_use_is_forgotten() {
        let auth = Auth::new();
        let repository = repository("r.lan");
        auth.challenged(&repository, Scheme::Basic, None);
        let cell = || auth.with_space(&repository, |space| Arc::clone(&space.cell));
        let first = cell();
        let ticket = GrantTicket {
            cell: Arc::clone(&first),
            header: HeaderValue::from_static("x"),
            obtained: Instant::now(),
            second_chances: 0,
            tried: String::new(),
        };
        auth.challenged(&repository, Scheme::Basic, None);
        assert!(Arc::ptr_eq(&first, &cell()), "an anonymous 401 leaves a grant alone");
        auth.challenged(&repository, Scheme::Basic, Some(&ticket));
        let second = cell();
        assert!(!Arc::ptr_eq(&first, &second));
        auth.challenged(&repository, Scheme::Basic, Some(&ticket));
        assert!(
            Arc::ptr_eq(&second, &cell()),
            "a late 401 to the old grant leaves the new one alone"
        );
    }
}
