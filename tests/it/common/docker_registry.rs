//! A real `docker-registry` process on an ephemeral port, in a temporary directory, killed when dropped.
#![allow(dead_code)]

use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How the registry is set up.
#[derive(Debug, Clone, Default)]
pub struct Setup {
    /// Certificate and key of the server, PEM.
    pub tls: Option<(PathBuf, PathBuf)>,
    /// User and password for Basic.
    pub login: Option<(String, String)>,
    /// Token authentication.
    pub token: Option<TokenSetup>,
}

/// The token server a registry trusts.
#[derive(Debug, Clone)]
pub struct TokenSetup {
    pub realm: String,
    pub service: String,
    pub issuer: String,
    /// Certificate the tokens are signed with, PEM.
    pub certificate: PathBuf,
}

/// A running registry.
pub struct DockerRegistry {
    child: Child,
    port: u16,
    directory: tempfile::TempDir,
}

impl DockerRegistry {
    /// Starts it and waits until it listens; `None`, said on stderr, if the program is not installed.
    pub fn start(setup: &Setup) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let config = directory.path().join("config.yml");
        std::fs::write(&config, configuration(setup, port, directory.path())).unwrap();
        let log = std::fs::File::create(directory.path().join("log")).unwrap();
        let started = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn();
        let child = match started {
            Ok(child) => child,
            Err(error) => {
                eprintln!("skipped: docker-registry: {error}");
                return None;
            }
        };
        let mut registry = Self { child, port, directory };
        registry.wait_until_ready();
        Some(registry)
    }

    /// `127.0.0.1:port`.
    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// What it has logged, requests included.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("log")).unwrap()
    }

    fn wait_until_ready(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none(), "docker-registry ended: {}", self.log());
            assert!(
                Instant::now() < deadline,
                "docker-registry does not listen: {}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for DockerRegistry {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

fn configuration(setup: &Setup, port: u16, directory: &Path) -> String {
    let mut text = format!(
        "version: 0.1\nlog:\n  level: info\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: 127.0.0.1:{port}\n",
        directory.join("data").display()
    );
    if let Some((certificate, key)) = &setup.tls {
        text += &format!(
            "  tls:\n    certificate: {}\n    key: {}\n",
            certificate.display(),
            key.display()
        );
    }
    if let Some((user, password)) = &setup.login {
        let file = directory.join("htpasswd");
        let made = Command::new("htpasswd")
            .args(["-Bbn", user, password])
            .output()
            .unwrap();
        std::fs::write(&file, made.stdout).unwrap();
        text += &format!("auth:\n  htpasswd:\n    realm: test\n    path: {}\n", file.display());
    }
    if let Some(token) = &setup.token {
        text += &format!(
            "auth:\n  token:\n    realm: {}\n    service: {}\n    issuer: {}\n    rootcertbundle: {}\n",
            token.realm,
            token.service,
            token.issuer,
            token.certificate.display()
        );
    }
    text
}

/// Copies an image with skopeo, an independent client; `arguments` come before source and destination.
pub fn skopeo_copy(arguments: &[&str], from: &str, to: &str) {
    let output = Command::new("skopeo")
        .args(["--insecure-policy", "copy", "--quiet"])
        .args(arguments)
        .args([from, to])
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "skopeo: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Certificate and key for 127.0.0.1 and registry.test, signed by an authority of its own: (authority, certificate, key).
pub fn certificates(directory: &Path) -> (PathBuf, PathBuf, PathBuf) {
    let mut parameters = rcgen::CertificateParams::new(Vec::new()).unwrap();
    parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let key = rcgen::KeyPair::generate().unwrap();
    let authority = parameters.self_signed(&key).unwrap();
    let issuer = rcgen::Issuer::new(parameters, key);
    let server_key = rcgen::KeyPair::generate().unwrap();
    let names = ["127.0.0.1", "localhost", "registry.test"].map(str::to_owned);
    let server = rcgen::CertificateParams::new(names.to_vec()).unwrap();
    let server = server.signed_by(&server_key, &issuer).unwrap();
    let write = |name: &str, text: String| {
        let path = directory.join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    (
        write("ca.crt", authority.pem()),
        write("server.pem", server.pem()),
        write("server-key.pem", server_key.serialize_pem()),
    )
}
