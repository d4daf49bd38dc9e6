//! Real registries: plain, with TLS of their own authority, with passwords, with signed tokens. skopeo pushes the
//! image.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use ocifs::blob::{BlobError, ImageSource as _};
use ocifs::oci::{Descriptor, Digest, ReferenceSelector};
use ocifs::registry::{Credential, Fixed, PlainHttp, RegistryClient, RegistryConfig, RegistrySource, Secret};

use super::{config, read};
use crate::common::docker_registry::{DockerRegistry, Setup, TokenSetup, certificates, skopeo_copy};
use crate::common::registry::{MANIFEST, TestRegistry, image};

fn layer() -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(100_000);
    header.set_mode(0o644);
    header.set_cksum();
    let content: Vec<u8> = (0..100_000u32).map(|i| (i.wrapping_mul(i) >> 7) as u8).collect();
    tar.append_data(&mut header, "file", content.as_slice()).unwrap();
    tar.into_inner().unwrap()
}

/// Writes an OCI layout of one layer. Returns skopeo's name for it.
fn layout(directory: &Path) -> String {
    let documents = image(&[layer()]);
    let blobs = directory.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).unwrap();
    for bytes in [&layer(), &documents.config, &documents.manifest] {
        std::fs::write(blobs.join(Digest::of(bytes).hex()), bytes).unwrap();
    }
    std::fs::write(directory.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    let (digest, size) = (Digest::of(&documents.manifest), documents.manifest.len());
    let index =
        serde_json::json!({"schemaVersion": 2, "manifests": [{"mediaType": MANIFEST, "digest": digest, "size": size}]});
    std::fs::write(directory.join("index.json"), index.to_string()).unwrap();
    format!("oci:{}", directory.display())
}

fn push(registry: &DockerRegistry, arguments: &[&str]) {
    let directory = tempfile::tempdir().unwrap();
    let target = format!("docker://{}/org/app:latest", registry.host());
    skopeo_copy(arguments, &layout(directory.path()), &target);
}

fn latest(config: RegistryConfig, registry: &DockerRegistry) -> RegistrySource {
    let client = RegistryClient::new(config).unwrap();
    client
        .source(&registry.host(), "org/app", ReferenceSelector::tag("latest"))
        .unwrap()
}

/// Reads manifest, config and layer, whole and in parts, and compares them with what was pushed.
async fn check(image: &RegistrySource) {
    let root = image.root().await.unwrap();
    assert_eq!(root.media_type, MANIFEST);
    let manifest: serde_json::Value = serde_json::from_slice(&root.bytes).unwrap();
    let config: Descriptor = serde_json::from_value(manifest["config"].clone()).unwrap();
    image.config(&config).await.unwrap();
    let described: Descriptor = serde_json::from_value(manifest["layers"][0].clone()).unwrap();
    let blob = image.registry_blob(&described).unwrap();
    let size = described.size as u64;
    let whole = read(&blob, 0..size).await.unwrap();
    assert!(described.digest.matches(&whole));
    let parts = [
        read(&blob, 0..1000).await.unwrap(),
        read(&blob, 1000..size).await.unwrap(),
    ]
    .concat();
    assert!(parts == whole);
}

#[tokio::test]
async fn plain() {
    let registry = DockerRegistry::start(&Setup::default());
    push(&registry, &["--dest-tls-verify=false"]);
    let image = latest(config(), &registry);
    check(&image).await;
    let client = RegistryClient::new(config()).unwrap();
    let wrong = client
        .source(&registry.host(), "org/app", ReferenceSelector::tag("nope"))
        .unwrap();
    let error = wrong.root().await.unwrap_err().to_string();
    assert!(error.contains("there are the tags latest"), "{error}");
    let wrong = client
        .source(&registry.host(), "no/such", ReferenceSelector::tag("latest"))
        .unwrap();
    let error = wrong.root().await.unwrap_err().to_string();
    assert!(error.contains("does not exist or needs a login"), "{error}");
}

#[tokio::test]
async fn tls_with_an_own_authority_and_a_password() {
    let directory = tempfile::tempdir().unwrap();
    let (authority, certificate, key) = certificates(directory.path());
    let setup = Setup {
        tls: Some((certificate, key)),
        login: Some(("me".to_owned(), "hunter2".to_owned())),
        ..Setup::default()
    };
    let registry = DockerRegistry::start(&setup);
    let trust = tempfile::tempdir().unwrap();
    std::fs::copy(&authority, trust.path().join("ca.crt")).unwrap();
    let trust = format!("--dest-cert-dir={}", trust.path().display());
    push(&registry, &[&trust, "--dest-creds=me:hunter2"]);
    let secure = |ca_files: Vec<PathBuf>, password: &str| RegistryConfig {
        plain_http: PlainHttp::Nowhere,
        ca_files,
        credentials: std::sync::Arc::new(Fixed {
            registry: registry.host(),
            credential: Credential::Basic {
                username: "me".to_owned(),
                password: Secret::new(password),
            },
        }),
        ..config()
    };
    check(&latest(secure(vec![authority.clone()], "hunter2"), &registry)).await;
    assert!(registry.log().contains("HTTP/2.0"), "HTTP/2 is negotiated");
    let error = latest(secure(vec![authority], "wrong"), &registry)
        .root()
        .await
        .unwrap_err();
    assert!(matches!(error, BlobError::Unauthorized { .. }), "{error}");
    let error = latest(secure(Vec::new(), "hunter2"), &registry)
        .root()
        .await
        .unwrap_err();
    assert!(matches!(error, BlobError::Tls { .. }), "{error}");
    assert!(error.to_string().contains("UnknownIssuer"), "{error}");
    let bad = directory.path().join("bad.pem");
    std::fs::write(&bad, "nothing").unwrap();
    assert!(RegistryClient::new(secure(vec![bad], "hunter2")).is_err());
}

fn openssl(arguments: &[&str], input: &[u8]) -> Vec<u8> {
    use std::io::Write as _;
    let mut child = Command::new("openssl")
        .args(arguments)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "openssl {arguments:?}");
    output.stdout
}

/// Returns a token as the specification of distribution has it: a JWT signed with RS256 that carries its certificate.
fn token(directory: &Path, scope: &str) -> String {
    let encode = |bytes: &[u8]| base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(bytes);
    let key = directory.join("token.key");
    let der = openssl(
        &[
            "x509",
            "-in",
            directory.join("token.crt").to_str().unwrap(),
            "-outform",
            "DER",
        ],
        b"",
    );
    let certificate = base64::engine::general_purpose::STANDARD.encode(der);
    let header = serde_json::json!({"typ": "JWT", "alg": "RS256", "x5c": [certificate]});
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let mut parts = scope.splitn(3, ':');
    let access = match (parts.next(), parts.next(), parts.next()) {
        (Some(kind), Some(name), Some(actions)) => serde_json::json!([
            {"type": kind, "name": name, "actions": actions.split(',').collect::<Vec<_>>()}
        ]),
        _ => serde_json::json!([]),
    };
    let claims = serde_json::json!({
        "iss": "test-issuer", "sub": "", "aud": "test-service", "exp": now + 300, "nbf": now - 10, "iat": now,
        "jti": "1", "access": access,
    });
    let signed = format!(
        "{}.{}",
        encode(header.to_string().as_bytes()),
        encode(claims.to_string().as_bytes())
    );
    let signature = openssl(&["dgst", "-sha256", "-sign", key.to_str().unwrap()], signed.as_bytes());
    format!("{signed}.{}", encode(&signature))
}

#[tokio::test(flavor = "multi_thread")]
async fn signed_tokens() {
    let directory = tempfile::tempdir().unwrap();
    let (key, certificate) = (directory.path().join("token.key"), directory.path().join("token.crt"));
    let (key_path, certificate_path) = (key.to_str().unwrap(), certificate.to_str().unwrap());
    openssl(
        &[
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/CN=t",
            "-keyout",
            key_path,
            "-out",
            certificate_path,
        ],
        b"",
    );
    let tokens = TestRegistry::start();
    let signing = directory.path().to_owned();
    tokens.issue_with(Box::new(move |scope| token(&signing, scope)));
    let setup = Setup {
        token: Some(TokenSetup {
            realm: format!("http://{}/token", tokens.host()),
            service: "test-service".to_owned(),
            issuer: "test-issuer".to_owned(),
            certificate,
        }),
        ..Setup::default()
    };
    let registry = DockerRegistry::start(&setup);
    push(&registry, &["--dest-tls-verify=false"]);
    tokens.clear_log();
    check(&latest(config(), &registry)).await;
    assert_eq!(tokens.count("/token"), 1, "one token for manifest, config and layer");
}
