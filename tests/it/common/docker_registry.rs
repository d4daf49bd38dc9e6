//! A real `docker-registry` process on an ephemeral port, in a temporary directory. Dropping it kills the process.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::ocifs::{Running, eventually};

/// Settings of the registry.
#[derive(Debug, Clone, Default)]
pub struct Setup {
    /// Certificate and key of the server, in PEM.
    pub tls: Option<(PathBuf, PathBuf)>,
    /// User and password for Basic authentication.
    pub login: Option<(String, String)>,
    /// Token authentication.
    pub token: Option<TokenSetup>,
    /// Authority that must have signed the certificates of clients, in PEM.
    pub clients_of: Option<PathBuf>,
    /// URL of the registry of which this one is a pull-through cache.
    pub cache_of: Option<String>,
}

/// The token server that a registry trusts.
#[derive(Debug, Clone)]
pub struct TokenSetup {
    pub realm: String,
    pub service: String,
    pub issuer: String,
    /// Certificate with whose key the tokens are signed, in PEM.
    pub certificate: PathBuf,
}

/// A running registry.
pub struct DockerRegistry {
    process: Running,
    port: u16,
    directory: tempfile::TempDir,
}

impl DockerRegistry {
    /// Starts the registry and waits until it listens.
    pub fn start(setup: &Setup) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let config = directory.path().join("config.yml");
        std::fs::write(&config, configuration(setup, directory.path())).unwrap();
        let log = std::fs::File::create(directory.path().join("log")).unwrap();
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap_or_else(|e| panic!("tests with a real registry need docker-registry (docker-registry): {e}"));
        let mut registry = Self {
            process: Running(child),
            port: 0,
            directory,
        };
        eventually("docker-registry listens", || {
            let ended = registry.process.0.try_wait().unwrap();
            assert!(ended.is_none(), "docker-registry ended: {}", registry.log());
            registry.port = listening_port(registry.process.0.id()).unwrap_or(0);
            registry.port != 0
        });
        registry
    }

    /// Returns the address, as `127.0.0.1:port`.
    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Returns the registry's log, with its requests.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("log")).unwrap()
    }
}

/// Returns the TCP port that a process listens on.
pub fn listening_port(pid: u32) -> Option<u16> {
    let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
    // Each link is `socket:[INODE]`.
    let sockets: Vec<String> = descriptors
        .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
        .filter_map(|target| {
            let inode = target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?;
            Some(inode.to_owned())
        })
        .collect();
    let table = std::fs::read_to_string(format!("/proc/{pid}/net/tcp")).ok()?;
    table.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let listens =
            fields.get(3) == Some(&"0A") && sockets.iter().any(|inode| fields.get(9) == Some(&inode.as_str()));
        let (_, port) = fields.get(1).filter(|_| listens)?.split_once(':')?;
        u16::from_str_radix(port, 16).ok()
    })
}

fn configuration(setup: &Setup, directory: &Path) -> String {
    let mut text = format!(
        "version: 0.1\nlog:\n  level: info\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: 127.0.0.1:0\n",
        directory.join("data").display()
    );
    if let Some((certificate, key)) = &setup.tls {
        text += &format!(
            "  tls:\n    certificate: {}\n    key: {}\n",
            certificate.display(),
            key.display()
        );
        if let Some(authority) = &setup.clients_of {
            text += &format!("    clientcas: ['{}']\n", authority.display());
        }
    }
    if let Some(url) = &setup.cache_of {
        text += &format!("proxy:\n  remoteurl: {url}\n");
    }
    if let Some((user, password)) = &setup.login {
        let file = directory.join("htpasswd");
        let made = Command::new("htpasswd")
            .args(["-Bbn", user, password])
            .output()
            .unwrap_or_else(|e| panic!("tests with a password need htpasswd (apache2-utils): {e}"));
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

/// Copies an image with skopeo, an independent client. `arguments` come before source and destination.
pub fn skopeo_copy(arguments: &[&str], from: &str, to: &str) {
    let output = Command::new("skopeo")
        .args(["--insecure-policy", "copy", "--quiet"])
        .args(arguments)
        .args([from, to])
        .output()
        .unwrap_or_else(|e| panic!("tests that copy images need skopeo (skopeo): {e}"));
    assert!(
        output.status.success(),
        "skopeo: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Makes a certificate and key for 127.0.0.1 and registry.test, signed by a new authority. Returns the paths of
/// authority, certificate and key.
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
