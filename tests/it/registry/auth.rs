//! Challenges, tokens and credentials.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use base64::Engine as _;
use futures::future::join_all;
use ocifs::blob::{BlobError, ImageSource as _};
use ocifs::registry::{
    ConfigFiles, Credential, CredentialSource, Fixed, Lookup, RegistryClient, RegistryConfig, Secret,
};

use super::{blob, client, client_with, config, read, source, until};
use crate::common::ocifs::PATIENCE;
use crate::common::registry::{Fault, Guard, MANIFEST, TestRegistry, Tokens};

fn guarded(guard: Guard) -> TestRegistry {
    let registry = TestRegistry::start();
    registry.add_manifest("org/app", Some("latest"), MANIFEST, b"{}".to_vec());
    registry.guard(guard);
    registry
}

fn login() -> (String, String) {
    ("me".to_owned(), "hunter2".to_owned())
}

fn fixed(registry: &TestRegistry, credential: Credential) -> Fixed {
    Fixed {
        registry: registry.host(),
        credential,
    }
}

fn password(text: &str) -> Credential {
    Credential::Basic {
        username: "me".to_owned(),
        password: Secret::new(text),
    }
}

#[tokio::test]
async fn basic_is_sent_at_once_after_the_first_challenge() {
    let registry = guarded(Guard::Basic(login().0, login().1));
    let client = client_with(fixed(&registry, password("hunter2")));
    for _ in 0..3 {
        source(&client, &registry, "latest").root().await.unwrap();
    }
    let statuses: Vec<u16> = registry.log().iter().map(|logged| logged.status).collect();
    assert_eq!(statuses, [401, 200, 200, 200]);
    assert!(!format!("{client:?}").contains("hunter2"));
}

#[tokio::test]
async fn refused_credentials_say_where_they_came_from() {
    let bearer = Tokens {
        login: Some(login()),
        ..Tokens::default()
    };
    for guard in [Guard::Basic(login().0, login().1), Guard::Bearer(bearer)] {
        let registry = guarded(guard);
        let client = client_with(fixed(&registry, password("wrong-secret")));
        let error = source(&client, &registry, "latest").root().await.unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, BlobError::Unauthorized { .. }), "{text}");
        assert!(text.contains("a fixed credential given for"), "{text}");
        assert!(
            text.contains("told by the test registry") || text.contains("incorrect username"),
            "{text}"
        );
        assert!(!text.contains("wrong-secret"), "{text}");
        assert!(
            registry.log().len() <= 3,
            "a wrong password is not tried again and again"
        );
    }
}

#[tokio::test]
async fn no_credentials_at_all_say_where_was_looked() {
    let registry = guarded(Guard::Basic(login().0, login().1));
    let client = client_with(ConfigFiles::new(vec!["/nonexistent/config.json".into()]));
    let error = source(&client, &registry, "latest")
        .root()
        .await
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("no credential file at /nonexistent/config.json"),
        "{error}"
    );
}

/// A credential source that never answers.
#[derive(Debug)]
struct Hanging;

#[async_trait]
impl CredentialSource for Hanging {
    async fn lookup(&self, _registry: &str, _repository: &str) -> Lookup {
        std::future::pending().await
    }
}

#[tokio::test]
async fn a_lookup_without_end_is_told_as_such() {
    let open = Tokens::default();
    let closed = Tokens {
        login: Some(login()),
        ..Tokens::default()
    };
    let hanging = || {
        RegistryClient::new(RegistryConfig {
            credentials: Arc::new(Hanging),
            timeout: Duration::from_secs(2),
            ..config()
        })
        .unwrap()
    };
    for guard in [Guard::Basic(login().0, login().1), Guard::Bearer(closed)] {
        let registry = guarded(guard);
        let error = source(&hanging(), &registry, "latest").root().await.unwrap_err();
        assert!(matches!(error, BlobError::Unauthorized { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains("looking for credentials took longer than 1s"), "{text}");
    }
    let registry = guarded(Guard::Bearer(open));
    source(&hanging(), &registry, "latest").root().await.unwrap();
}

#[tokio::test]
async fn credentials_are_read_again_when_refused() {
    let registry = guarded(Guard::Basic("me".to_owned(), "old".to_owned()));
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("config.json");
    let write = |password: &str| {
        let entry = serde_json::json!({"auths": {registry.host(): {"username": "me", "password": password}}});
        std::fs::write(&path, entry.to_string()).unwrap();
    };
    write("old");
    let client = client_with(ConfigFiles::new(vec![path.clone()]));
    let (bytes, blob) = blob(&client, &registry, 1000);
    assert_eq!(read(&blob, 0..10).await.unwrap(), bytes[..10]);
    registry.guard(Guard::Basic("me".to_owned(), "new".to_owned()));
    write("new");
    assert_eq!(read(&blob, 10..20).await.unwrap(), bytes[10..20]);
}

#[tokio::test]
async fn tokens_by_password_refresh_token_or_as_they_are() {
    let login_only = Tokens {
        login: Some(login()),
        ..Tokens::default()
    };
    let identity = Tokens {
        identity: Some("r3fresh".to_owned()),
        login: Some(login()),
        ..Tokens::default()
    };
    for (tokens, credential) in [
        (login_only, password("hunter2")),
        (identity, Credential::IdentityToken(Secret::new("r3fresh"))),
    ] {
        let registry = guarded(Guard::Bearer(tokens));
        let client = client_with(fixed(&registry, credential));
        source(&client, &registry, "latest").root().await.unwrap();
        let log = registry.log();
        let exchange = log.iter().find(|logged| logged.target.starts_with("/token")).unwrap();
        assert!(!exchange.target.contains("hunter2") && !exchange.target.contains("r3fresh"));
        assert!(exchange.target.contains("scope=repository%3Aorg%2Fapp%3Apull") || exchange.method == "POST");
    }
    let registry = guarded(Guard::Bearer(Tokens::default()));
    let anonymous = client();
    source(&anonymous, &registry, "latest").root().await.unwrap();
    let ready = Credential::RegistryToken(Secret::new("token-1"));
    registry.clear_log();
    source(&client_with(fixed(&registry, ready)), &registry, "latest")
        .root()
        .await
        .unwrap();
    assert_eq!(registry.count("/token"), 0);
}

#[tokio::test]
async fn challenges_may_hide_at_the_base_of_the_api() {
    let registry = guarded(Guard::Bearer(Tokens {
        challenge_at_base_only: true,
        ..Tokens::default()
    }));
    source(&client(), &registry, "latest").root().await.unwrap();
    let targets: Vec<String> = registry.log().iter().map(|logged| logged.target.clone()).collect();
    assert_eq!(targets[1], "/v2/");
    assert!(
        targets[2].contains("scope=repository%3Aorg%2Fapp%3Apull"),
        "{targets:?}"
    );
}

#[tokio::test]
async fn a_token_that_ends_is_replaced_in_the_middle_of_reading() {
    let registry = guarded(Guard::Bearer(Tokens {
        uses: 3,
        ..Tokens::default()
    }));
    let client = client();
    let (bytes, blob) = blob(&client, &registry, 10_000);
    for at in 0..10 {
        let range = at * 1000..(at + 1) * 1000;
        assert_eq!(
            read(&blob, range.start as u64..range.end as u64).await.unwrap(),
            bytes[range]
        );
    }
    assert_eq!(registry.count("/token"), 4, "10 reads of 3 per token");
    assert_eq!(registry.log().iter().filter(|logged| logged.status == 401).count(), 4);
}

#[tokio::test]
async fn many_readers_fetch_one_token() {
    let registry = guarded(Guard::Bearer(Tokens::default()));
    let client = client();
    let (bytes, blob) = blob(&client, &registry, 16_000);
    registry.latency(Duration::from_millis(20));
    for round in 1..=2 {
        let reads = (0..16).map(|at| read(&blob, at * 1000..(at + 1) * 1000));
        let parts: Vec<Vec<u8>> = join_all(reads).await.into_iter().map(Result::unwrap).collect();
        assert_eq!(parts.concat(), bytes);
        assert_eq!(registry.count("/token"), round);
        registry.revoke_tokens();
    }
}

#[tokio::test]
async fn a_reader_that_leaves_does_not_strand_the_others() {
    let registry = guarded(Guard::Bearer(Tokens::default()));
    registry.hold("/token");
    let client = client();
    let (bytes, blob) = blob(&client, &registry, 100);
    let mut leaving = Box::pin(read(&blob, 0..10));
    tokio::select! {
        biased;
        _ = &mut leaving => panic!("it was to leave in the middle of the exchange"),
        () = until("a token is asked for", || registry.count("/token") > 0) => {}
    }
    // The second reader knows the challenge already, so it waits for the same token exchange.
    let mut staying = Box::pin(read(&blob, 0..100));
    assert!(futures::poll!(&mut staying).is_pending());
    assert_eq!(registry.log().len(), 2, "the challenge and the exchange");
    drop(leaving);
    registry.release();
    assert_eq!(staying.await.unwrap(), bytes);
}

#[tokio::test]
async fn tokens_are_renewed_before_they_end() {
    let registry = guarded(Guard::Bearer(Tokens {
        expires_in: 1,
        ..Tokens::default()
    }));
    let client = client();
    let image = source(&client, &registry, "latest");
    image.root().await.unwrap();
    // The registry accepts the first token for ever, so only the client's clock can request a second one.
    let deadline = Instant::now() + PATIENCE;
    while registry.count("/token") < 2 {
        assert!(Instant::now() < deadline, "the token is never renewed");
        image.root().await.unwrap();
    }
    assert_eq!(registry.count("/token"), 2);
    let refused = registry.log().iter().filter(|logged| logged.status == 401).count();
    assert_eq!(refused, 1, "only the first challenge");
}

#[tokio::test]
async fn a_new_token_gets_a_second_chance_but_no_third() {
    let registry = guarded(Guard::Bearer(Tokens::default()));
    let challenge = format!("Bearer realm=\"http://{}/token\",service=\"test\"", registry.host());
    let refusal = Fault::Status {
        code: 401,
        headers: vec![("WWW-Authenticate".to_owned(), challenge)],
        body: String::new(),
    };
    // Both the anonymous request and the request with the first token fail.
    registry.fault("/manifests/", 2, refusal);
    source(&client(), &registry, "latest").root().await.unwrap();
    assert_eq!(registry.count("/token"), 2);
    let stubborn = guarded(Guard::Bearer(Tokens {
        uses: 0,
        ..Tokens::default()
    }));
    let error = source(&client(), &stubborn, "latest").root().await.unwrap_err();
    assert!(matches!(error, BlobError::Unauthorized { .. }), "{error}");
    assert_eq!((stubborn.count("/token"), stubborn.count("/manifests/")), (2, 3));
}

/// A credential source whose password changes.
#[derive(Debug)]
struct Changing(Arc<Mutex<(&'static str, usize)>>);

#[async_trait]
impl CredentialSource for Changing {
    async fn lookup(&self, _registry: &str, _repository: &str) -> Lookup {
        let mut state = self.0.lock().unwrap();
        state.1 += 1;
        Lookup {
            credential: Some(password(state.0)),
            tried: vec!["a password that changes".to_owned()],
        }
    }
}

#[tokio::test]
async fn a_login_that_ended_is_looked_up_again_however_that_is_said() {
    for code in [400, 401, 403] {
        let registry = TestRegistry::start();
        let guard = |password: &str| registry.guard(Guard::Basic("me".to_owned(), password.to_owned()));
        guard("first");
        registry.refuse_with(code);
        let current = Arc::new(Mutex::new(("first", 0)));
        let client = client_with(Changing(current.clone()));
        let (bytes, blob) = blob(&client, &registry, 1000);
        assert_eq!(read(&blob, 0..10).await.unwrap(), bytes[..10]);
        guard("second");
        // The source has no new password yet. The client asks it once and passes on the registry's message.
        let lookups = || current.lock().unwrap().1;
        let before = lookups();
        let error = read(&blob, 10..20).await.unwrap_err().to_string();
        assert!(error.contains("Reauthenticate"), "{code}: {error}");
        assert!(error.contains("a password that changes"), "{code}: {error}");
        assert_eq!(lookups(), before + 1, "{code}");
        current.lock().unwrap().0 = "second";
        assert_eq!(read(&blob, 10..20).await.unwrap(), bytes[10..20], "{code}");
        let (before, sent) = (lookups(), registry.log().len());
        assert_eq!(read(&blob, 20..30).await.unwrap(), bytes[20..30], "{code}");
        assert_eq!((lookups(), registry.log().len()), (before, sent + 1), "{code}");
    }
}

#[tokio::test]
async fn a_token_that_ended_is_replaced_however_that_is_said() {
    for code in [400, 401, 403] {
        let registry = TestRegistry::start();
        registry.guard(Guard::Bearer(Tokens::default()));
        registry.refuse_with(code);
        let (bytes, blob) = blob(&client(), &registry, 1000);
        read(&blob, 0..10).await.unwrap();
        registry.revoke_tokens();
        registry.clear_log();
        assert_eq!(read(&blob, 10..20).await.unwrap(), bytes[10..20], "{code}");
        // After a 401 without a challenge, the client asks the base of the API for one.
        let asked = 3 + usize::from(code == 401);
        assert_eq!(registry.log().len(), asked, "{code}: refusal, token, blob");
    }
}

#[tokio::test]
async fn what_is_denied_to_a_fresh_login_is_denied_once() {
    let registry = TestRegistry::start();
    registry.guard(Guard::Bearer(Tokens::default()));
    let (_, blob) = blob(&client(), &registry, 1000);
    registry.fault("/blobs/", usize::MAX, Fault::status(403));
    let error = read(&blob, 0..10).await.unwrap_err();
    assert!(matches!(error, BlobError::Denied { .. }), "{error}");
    assert_eq!(
        registry.count("/blobs/"),
        1,
        "no login was used, so none can have ended"
    );
    registry.clear_faults();
    read(&blob, 0..10).await.unwrap();
    registry.clear_log();
    registry.fault("/blobs/", usize::MAX, Fault::status(403));
    let error = read(&blob, 0..10).await.unwrap_err();
    assert!(matches!(error, BlobError::Denied { .. }), "{error}");
    assert_eq!(registry.count("/blobs/"), 2);
}

/// A credential source with a login for each host.
#[derive(Debug)]
struct Logins(Vec<(String, &'static str)>);

#[async_trait]
impl CredentialSource for Logins {
    async fn lookup(&self, registry: &str, _repository: &str) -> Lookup {
        let found = self.0.iter().find(|(host, _)| host == registry);
        Lookup {
            credential: found.map(|(_, text)| password(text)),
            tried: vec![format!("logins for {registry}")],
        }
    }
}

#[tokio::test]
async fn a_host_that_a_redirect_leads_to_gets_a_token_of_its_own() {
    let own = |password: &str| Tokens {
        login: Some(("me".to_owned(), password.to_owned())),
        ..Tokens::default()
    };
    for (storage_tokens, storage_login) in [(Tokens::default(), None), (own("at-storage"), Some("at-storage"))] {
        let (registry, storage) = (TestRegistry::start(), TestRegistry::start());
        registry.guard(Guard::Bearer(own("at-registry")));
        storage.guard(Guard::Bearer(storage_tokens));
        registry.redirect_blobs(&storage, usize::MAX, "", 1);
        let mut logins = vec![(registry.host(), "at-registry")];
        logins.extend(storage_login.map(|login| (storage.host(), login)));
        let client = client_with(Logins(logins));
        let (bytes, blob) = blob(&client, &registry, 1000);
        assert_eq!(read(&blob, 0..10).await.unwrap(), bytes[..10]);
        assert_eq!(storage.count("/token"), 1);
        let sent = (registry.log().len(), storage.log().len());
        assert_eq!(read(&blob, 10..20).await.unwrap(), bytes[10..20]);
        assert_eq!(
            (registry.log().len(), storage.log().len()),
            (sent.0, sent.1 + 1),
            "all is remembered"
        );
        storage.revoke_tokens();
        assert_eq!(read(&blob, 20..30).await.unwrap(), bytes[20..30]);

        // No host got the login of another host.
        let shown = |host: &TestRegistry| {
            let log = host.log();
            let shown: Vec<String> = log
                .iter()
                .filter_map(|l| l.headers.get("authorization").cloned())
                .collect();
            shown
        };
        let encoded = |password: &str| base64::engine::general_purpose::STANDARD.encode(format!("me:{password}"));
        let basic = |host: &TestRegistry| -> Vec<String> {
            shown(host)
                .into_iter()
                .filter(|header| header.starts_with("Basic"))
                .collect()
        };
        assert_eq!(basic(&registry), [format!("Basic {}", encoded("at-registry"))]);
        let want: Vec<String> = storage_login
            .map(|login| format!("Basic {}", encoded(login)))
            .into_iter()
            .collect();
        let mut seen = basic(&storage);
        seen.dedup();
        assert_eq!(seen, want);
    }
}

#[tokio::test]
async fn a_guarded_host_without_a_login_for_it_is_refused_by_name() {
    let (registry, storage) = (TestRegistry::start(), TestRegistry::start());
    registry.guard(Guard::Basic("me".to_owned(), "at-registry".to_owned()));
    storage.guard(Guard::Basic("me".to_owned(), "at-storage".to_owned()));
    registry.redirect_blobs(&storage, usize::MAX, "", 1);
    let client = client_with(Logins(vec![(registry.host(), "at-registry")]));
    let (_, blob) = blob(&client, &registry, 1000);
    let error = read(&blob, 0..10).await.unwrap_err().to_string();
    assert!(error.contains(&format!("logins for {}", storage.host())), "{error}");
    assert!(
        storage
            .log()
            .iter()
            .all(|logged| !logged.headers.contains_key("authorization"))
    );
}
