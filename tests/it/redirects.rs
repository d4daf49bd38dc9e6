//! Where registries may redirect to, depending on their own address.

use std::fs;

use nix::sched::CloneFlags;

use crate::common::layers::{Blob, Tar, noise, push};
use crate::common::namespace::with_hosts;
use crate::common::ocifs::{Ocifs, tool};
use crate::common::registry::{Guard, TestRegistry, Tokens};

const SIZE: usize = 100_000;
const PUBLIC: &str = "8.8.8.8:0";

/// Runs `body` where this machine has only these addresses, with names for some of them.
fn in_a_network_of_its_own(body: impl FnOnce() + Send) {
    let hosts = "169.254.169.254 metadata.test\n10.0.0.7 private.test\n8.8.4.4 public.test\n";
    with_hosts(hosts, CloneFlags::CLONE_NEWNET, || {
        tool("ip", ["link", "set", "lo", "up"]);
        for address in ["8.8.8.8", "8.8.4.4", "10.0.0.7", "10.0.0.8", "169.254.169.254"] {
            tool("ip", ["address", "add", &format!("{address}/32"), "dev", "lo"]);
        }
        body();
    });
}

fn serve(address: &str) -> TestRegistry {
    let registry = TestRegistry::start_at(address);
    let layer = Blob::gzip(&Tar::new().file("f", noise(4, SIZE)).finish());
    push(&registry, "app", "1", &[layer]);
    registry
}

fn cat(registry: &TestRegistry, options: &[&str]) -> Result<(), String> {
    let ocifs = Ocifs::with(&["--plain-http"]).options(options);
    let said = ocifs.run(["cat", &format!("{}/app:1", registry.host()), "f"]);
    match said.code {
        Some(0) => {
            assert!(said.stdout == noise(4, SIZE));
            Ok(())
        }
        _ => Err(said.stderr),
    }
}

#[test]
fn a_public_registry_leads_to_public_addresses_only() {
    in_a_network_of_its_own(|| {
        let settings = tempfile::NamedTempFile::new().unwrap();
        fs::write(settings.path(), "allow-private-redirects = true\n").unwrap();
        let permitted: [&[&str]; 2] = [
            &["--allow-private-redirects"],
            &["--config", settings.path().to_str().unwrap()],
        ];
        let registry = serve(PUBLIC);
        for (address, name) in [
            ("127.0.0.1", None),
            ("10.0.0.7", None),
            ("10.0.0.7", Some("private.test")),
            ("169.254.169.254", None),
            ("169.254.169.254", Some("metadata.test")),
        ] {
            let storage = TestRegistry::start_at(&format!("{address}:0"));
            registry.redirect_blobs_as(&storage, name);
            let error = cat(&registry, &[]).unwrap_err();
            let why = format!("{address} is not a public address");
            assert!(
                error.contains(&why) && error.contains("--allow-private-redirects"),
                "{error}"
            );
            assert_eq!(storage.log().len(), 0, "{address} {name:?}: nothing was sent there");
            for options in permitted {
                assert_eq!(cat(&registry, options), Ok(()), "{address} {name:?}");
            }
        }
        for name in [None, Some("public.test")] {
            let storage = TestRegistry::start_at("8.8.4.4:0");
            registry.redirect_blobs_as(&storage, name);
            assert_eq!(cat(&registry, &[]), Ok(()), "{name:?}");
        }
    });
}

#[test]
fn a_private_registry_leads_anywhere() {
    in_a_network_of_its_own(|| {
        for address in ["127.0.0.1:0", "10.0.0.7:0"] {
            let registry = serve(address);
            for address in ["10.0.0.8:0", "8.8.4.4:0"] {
                let storage = TestRegistry::start_at(address);
                registry.redirect_blobs_as(&storage, None);
                assert_eq!(cat(&registry, &[]), Ok(()), "{address}");
            }
        }
    });
}

#[test]
fn a_public_registry_names_no_private_token_server() {
    in_a_network_of_its_own(|| {
        let registry = serve(PUBLIC);
        let tokens = TestRegistry::start_at("10.0.0.7:0");
        let realm = format!("http://{}/token", tokens.host());
        registry.guard(Guard::Bearer(Tokens {
            realm: Some(realm),
            ..Tokens::default()
        }));
        let error = cat(&registry, &[]).unwrap_err();
        assert!(error.contains("10.0.0.7 is not a public address"), "{error}");
        assert_eq!(tokens.log().len(), 0);
    });
}

/// The user has a login for the host of a redirect, in each form that configuration files have.
#[test]
fn a_host_without_tls_is_shown_no_login_whatever_it_asks_for() {
    use base64::Engine as _;
    in_a_network_of_its_own(|| {
        let encoded = base64::engine::general_purpose::STANDARD.encode("me:secret");
        for login in [
            serde_json::json!({"auth": encoded}),
            serde_json::json!({"auth": encoded, "identitytoken": "secret"}),
            serde_json::json!({"registrytoken": "secret"}),
        ] {
            for guard in [
                Guard::Basic("me".to_owned(), "secret".to_owned()),
                Guard::Bearer(Tokens {
                    login: Some(("me".to_owned(), "secret".to_owned())),
                    identity: Some("secret".to_owned()),
                    ..Tokens::default()
                }),
            ] {
                let registry = serve("127.0.0.1:0");
                let storage = TestRegistry::start_at("10.0.0.8:0");
                storage.guard(guard.clone());
                registry.redirect_blobs_as(&storage, None);
                let home = tempfile::tempdir().unwrap();
                let file = serde_json::json!({"auths": {storage.host(): login}});
                fs::write(home.path().join("config.json"), file.to_string()).unwrap();
                let ocifs = Ocifs::new().env("DOCKER_CONFIG", home.path());
                let error = ocifs.fails(["cat", &format!("{}/app:1", registry.host()), "f"]);
                assert!(error.contains("it has no TLS"), "{login} {guard:?}: {error}");
                assert_ne!(storage.log().len(), 0);
                for logged in storage.log() {
                    assert_eq!(
                        logged.headers.get("authorization"),
                        None,
                        "{login} {guard:?}: {logged:?}"
                    );
                    assert!(!logged.target.contains("/token"), "{login} {guard:?}: {logged:?}");
                }
            }
        }
    });
}
