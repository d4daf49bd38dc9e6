//! Registries with a private authority that want a certificate of the client, and hosts whose certificate is not checked.

use std::fs;
use std::path::{Path, PathBuf};

use crate::common::docker_registry::{DockerRegistry, Setup, skopeo_copy};
use crate::common::oci_layout;

use super::{Machine, good, layer, registry};

/// An authority, and certificates that it signed.
struct Authority {
    directory: tempfile::TempDir,
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
}

impl Authority {
    fn new(name: &str) -> Self {
        let mut parameters = rcgen::CertificateParams::new(Vec::new()).unwrap();
        parameters.distinguished_name.push(rcgen::DnType::CommonName, name);
        parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = rcgen::KeyPair::generate().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let certificate = parameters.self_signed(&key).unwrap();
        fs::write(directory.path().join("ca.crt"), certificate.pem()).unwrap();
        Self {
            issuer: rcgen::Issuer::new(parameters, key),
            directory,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Signs a certificate. Returns the paths of certificate and key.
    fn sign(&self, name: &str) -> (PathBuf, PathBuf) {
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned(), "localhost".to_owned()]).unwrap();
        let certificate = certificate.signed_by(&key, &self.issuer).unwrap();
        let (at, key_at) = (self.path(&format!("{name}.cert")), self.path(&format!("{name}.key")));
        fs::write(&at, certificate.pem()).unwrap();
        fs::write(&key_at, key.serialize_pem()).unwrap();
        (at, key_at)
    }
}

/// A registry with an image, which only clients with a certificate of its authority reach.
fn guarded(authority: &Authority) -> DockerRegistry {
    let registry = DockerRegistry::start(&Setup {
        tls: Some(authority.sign("server")),
        clients_of: Some(authority.path("ca.crt")),
        ..Setup::default()
    });
    let (certificate, key) = authority.sign("client");
    let trust = authority.path("trust");
    fs::create_dir(&trust).unwrap();
    fs::copy(authority.path("ca.crt"), trust.join("ca.crt")).unwrap();
    fs::copy(certificate, trust.join("client.cert")).unwrap();
    fs::copy(key, trust.join("client.key")).unwrap();
    let layout = tempfile::tempdir().unwrap();
    let image = oci_layout::write(layout.path(), &[layer()]);
    let trust = format!("--dest-cert-dir={}", trust.display());
    skopeo_copy(&[&trust], &image, &format!("docker://{}/app:1", registry.host()));
    registry
}

fn copy(machine: &Machine, from: &Path, to: &str) {
    let text = fs::read_to_string(from).unwrap();
    machine.write(to, &text);
}

#[test]
fn certificates_come_from_the_directories_of_docker_and_podman() {
    let authority = Authority::new("authority");
    let registry = guarded(&authority);
    let host = registry.host();
    for tool in ["docker", "containers", "containerd"] {
        let machine = Machine::new();
        let said = machine.cat(&host);
        assert_eq!(said.code, Some(1), "{said:?}");
        copy(&machine, &authority.path("ca.crt"), &format!("{tool}/{host}/ca.crt"));
        let said = machine.cat(&host);
        assert_eq!(said.code, Some(1), "a certificate of the client is missing: {said:?}");
        copy(
            &machine,
            &authority.path("client.cert"),
            &format!("{tool}/{host}/client.cert"),
        );
        copy(
            &machine,
            &authority.path("client.key"),
            &format!("{tool}/{host}/client.key"),
        );
        good(&machine.cat(&host));
        // Of several certificates, the one that the server accepts is shown.
        let stranger = Authority::new("stranger");
        let (certificate, key) = stranger.sign("client");
        copy(&machine, &certificate, &format!("{tool}/{host}/a.cert"));
        copy(&machine, &key, &format!("{tool}/{host}/a.key"));
        good(&machine.cat(&host));
        let said = machine
            .ocifs()
            .options(&["--hosts-from", "none"])
            .run(["cat", &format!("{host}/app:1"), "f"]);
        assert_eq!(said.code, Some(1), "{said:?}");
    }
}

#[test]
fn certificates_of_a_mirror_stand_in_the_file_of_the_registry() {
    let authority = Authority::new("authority");
    let mirror = guarded(&authority);
    let origin = registry();
    let machine = Machine::new();
    let pem = |name: &str| fs::read_to_string(authority.path(name)).unwrap();
    machine.write("both.pem", &(pem("client.cert") + &pem("client.key")));
    let both = machine.directory.path().join("both.pem");
    let file = |name: &str| authority.path(name).display().to_string();
    for client in [
        format!("[[\"{}\", \"{}\"]]", file("client.cert"), file("client.key")),
        format!("[\"{}\"]", both.display()),
        format!("\"{}\"", both.display()),
    ] {
        machine.hosts(
            &origin.host(),
            &format!(
                "[host.\"https://{}\"]\nca = \"{}\"\nclient = {client}\n",
                mirror.host(),
                file("ca.crt")
            ),
        );
        good(&machine.cat(&origin.host()));
        assert!(origin.log().is_empty(), "{client}");
    }
    // A mirror that cannot be trusted is left.
    machine.hosts(&origin.host(), &format!("[host.\"https://{}\"]\n", mirror.host()));
    good(&machine.cat(&origin.host()));
    assert!(!origin.log().is_empty());
    // So is one whose files are missing or no certificates. The log says which.
    for (text, word) in [
        ("ca = \"gone.crt\"", "gone.crt"),
        ("client = \"hosts.toml\"", "no PEM certificate"),
    ] {
        origin.clear_log();
        machine.hosts(
            &origin.host(),
            &format!("[host.\"https://{}\"]\n{text}\n", mirror.host()),
        );
        let said = machine.cat(&origin.host());
        good(&said);
        assert!(said.stderr.contains(word), "{text}: {}", said.stderr);
        assert!(!origin.log().is_empty());
    }
}

#[test]
fn a_host_need_not_be_verified_if_its_file_says_so() {
    let authority = Authority::new("authority");
    let secure = DockerRegistry::start(&Setup {
        tls: Some(authority.sign("server")),
        ..Setup::default()
    });
    let layout = tempfile::tempdir().unwrap();
    let image = oci_layout::write(layout.path(), &[layer()]);
    let host = secure.host();
    skopeo_copy(&["--dest-tls-verify=false"], &image, &format!("docker://{host}/app:1"));
    let plain = registry();
    let machine = Machine::new();
    assert_eq!(machine.cat(&host).code, Some(1));
    machine.hosts(&host, &format!("server = \"https://{host}\"\nskip_verify = true\n"));
    good(&machine.cat(&host));
    let machine = Machine::new();
    machine.write(
        "registries.conf",
        &format!("[[registry]]\nlocation = \"r.test\"\ninsecure = true\n[[registry.mirror]]\nlocation = \"{host}\"\ninsecure = true\n"),
    );
    good(&machine.cat("r.test"));
    // Without TLS, insecure means plain HTTP.
    machine.write(
        "registries.conf",
        &format!(
            "[[registry]]\nlocation = \"r.test\"\n[[registry.mirror]]\nlocation = \"{}\"\ninsecure = true\n",
            plain.host()
        ),
    );
    good(&machine.cat("r.test"));
    assert!(!plain.log().is_empty());
}
