//! Certificates as users make them, and registries on this machine with and without TLS.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use base64::Engine as _;

use crate::common::docker_registry::{DockerRegistry, Setup, listening_port, skopeo_copy};
use crate::common::layers::{Blob, Tar, noise, push};
use crate::common::oci_layout;
use crate::common::ocifs::{Ocifs, Running, Said, eventually, tool};
use crate::common::registry::TestRegistry;

const SIZE: usize = 200_000;
const NAMES: &str = "subjectAltName=DNS:localhost,IP:127.0.0.1";

fn layer() -> Blob {
    Blob::gzip(&Tar::new().file("f", noise(4, SIZE)).finish())
}

/// The certificate and key of a server, and the file by which a client trusts it.
struct Certificate {
    certificate: PathBuf,
    key: PathBuf,
    authority: PathBuf,
}

impl Certificate {
    /// Makes a self-signed certificate, as the documentation of registries does.
    fn self_signed(directory: &Path, key: &[&str], more: &[&str]) -> Self {
        let at = |name: &str| directory.join(name);
        let mut arguments = vec!["req", "-x509", "-nodes", "-subj", "/CN=localhost", "-newkey"];
        arguments.extend(key);
        if !more.contains(&"-days") && !more.contains(&"-not_after") {
            arguments.extend(["-days", "30"]);
        }
        arguments.extend(more);
        let (certificate, key) = (at("server.pem"), at("server-key.pem"));
        arguments.extend(["-out", certificate.to_str().unwrap(), "-keyout", key.to_str().unwrap()]);
        tool("openssl", arguments);
        Self {
            authority: certificate.clone(),
            certificate,
            key,
        }
    }

    /// Makes a certificate signed by an authority. `sign` are options of the signature.
    fn signed(directory: &Path, authority_key: &[&str], key: &[&str], sign: &[&str]) -> Self {
        let path = |name: &str| directory.join(name).to_str().unwrap().to_owned();
        let (authority, authority_key_file) = (path("ca.pem"), path("ca-key.pem"));
        let mut arguments = vec![
            "req",
            "-x509",
            "-nodes",
            "-subj",
            "/CN=authority",
            "-days",
            "30",
            "-newkey",
        ];
        arguments.extend(authority_key);
        arguments.extend(["-out", &authority, "-keyout", &authority_key_file]);
        arguments.extend(sign);
        tool("openssl", &arguments);
        let (request, key_file, certificate) = (path("request"), path("server-key.pem"), path("server.pem"));
        let mut arguments = vec!["req", "-nodes", "-subj", "/CN=localhost", "-newkey"];
        arguments.extend(key);
        arguments.extend(["-out", &request, "-keyout", &key_file]);
        tool("openssl", &arguments);
        let extensions = path("extensions");
        fs::write(&extensions, NAMES).unwrap();
        let mut arguments = vec![
            "x509",
            "-req",
            "-in",
            &request,
            "-CA",
            &authority,
            "-CAkey",
            &authority_key_file,
        ];
        arguments.extend([
            "-CAcreateserial",
            "-days",
            "30",
            "-extfile",
            &extensions,
            "-out",
            &certificate,
        ]);
        arguments.extend(sign);
        tool("openssl", &arguments);
        Self {
            certificate: certificate.into(),
            key: key_file.into(),
            authority: authority.into(),
        }
    }

    /// Starts a registry with this certificate and reads the file `f` of an image in it.
    fn read(&self) -> Said {
        let setup = Setup {
            tls: Some((self.certificate.clone(), self.key.clone())),
            ..Setup::default()
        };
        let registry = DockerRegistry::start(&setup);
        let directory = tempfile::tempdir().unwrap();
        let image = oci_layout::write(directory.path(), &[layer()]);
        let target = format!("docker://{}/app:1", registry.host());
        skopeo_copy(&["--dest-tls-verify=false"], &image, &target);
        let ocifs = Ocifs::with(&["--ca", self.authority.to_str().unwrap()]);
        ocifs.run(["cat", &format!("{}/app:1", registry.host()), "f"])
    }
}

/// A trusted server certificate that is not an authority vouches for no other certificate, as in OpenSSL and Go.
#[test]
fn a_trusted_certificate_that_is_no_authority_vouches_for_nobody() {
    let rsa = ["rsa:2048"];
    for (constraint, is_authority) in [("CA:FALSE", false), ("CA:TRUE", true)] {
        let directory = tempfile::tempdir().unwrap();
        let constraint = format!("basicConstraints=critical,{constraint}");
        let made = Certificate::signed(directory.path(), &["rsa:2048", "-addext", &constraint], &rsa, &[]);
        let said = made.read();
        match is_authority {
            true => accepted(&constraint, &said),
            false => {
                assert_eq!(said.code, Some(1), "{constraint}: {said:?}");
                assert!(said.stderr.contains("--ca"), "{constraint}: {said:?}");
            }
        }
    }
    let directory = tempfile::tempdir().unwrap();
    let client = ["-addext", NAMES, "-addext", "extendedKeyUsage=clientAuth"];
    let said = Certificate::self_signed(directory.path(), &rsa, &client).read();
    assert_eq!(said.code, Some(1), "it is for clients only: {said:?}");
}

#[track_caller]
fn accepted(what: &str, said: &Said) {
    assert!(
        said.code == Some(0) && said.stdout == noise(4, SIZE),
        "{what}: {}",
        said.stderr
    );
}

#[test]
fn a_certificate_that_signs_itself_is_trusted_when_it_is_given() {
    for (what, key) in [
        ("RSA", &["rsa:2048"][..]),
        ("P-256", &["ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]),
        ("Ed25519", &["ed25519"]),
    ] {
        for more in [
            &["-addext", NAMES][..],
            &["-addext", NAMES, "-addext", "basicConstraints=critical,CA:FALSE"],
        ] {
            let directory = tempfile::tempdir().unwrap();
            let said = Certificate::self_signed(directory.path(), key, more).read();
            accepted(what, &said);
        }
    }
}

#[test]
fn a_certificate_that_signs_itself_needs_good_dates_names_and_trust() {
    let directory = tempfile::tempdir().unwrap();
    // `openssl req` cannot make an expired certificate, so `openssl ca` makes it below.
    let refused = |what: &str, certificate: &Certificate, why: &str| {
        let said = certificate.read();
        assert_eq!(said.code, Some(1), "{what}: {said:?}");
        assert!(said.stderr.contains(why), "{what}: {}", said.stderr);
    };
    let wrong = Certificate::self_signed(
        directory.path(),
        &["rsa:2048"],
        &["-addext", "subjectAltName=DNS:elsewhere.test"],
    );
    refused("another name", &wrong, "not valid for");
    let mut good = Certificate::self_signed(directory.path(), &["rsa:2048"], &["-addext", NAMES]);
    let other = tempfile::tempdir().unwrap();
    good.authority = Certificate::self_signed(other.path(), &["rsa:2048"], &["-addext", NAMES]).authority;
    let said = good.read();
    assert_eq!(said.code, Some(1), "{said:?}");
    assert!(said.stderr.contains("TLS with"), "{said:?}");
    // The certificate ended yesterday.
    let old = directory.path().join("old.pem");
    let clock = ["-1 day", "-2 days"].map(|ago| tool("date", ["-u", "+%Y%m%d%H%M%SZ", "-d", ago]));
    let [end, start] = clock.map(|date| String::from_utf8(date).unwrap().trim().to_owned());
    let authority = directory.path().join("database");
    fs::create_dir(&authority).unwrap();
    fs::write(authority.join("index"), "").unwrap();
    let settings = format!(
        "[ca]\ndefault_ca=a\n[a]\ndatabase={0}/index\nnew_certs_dir={0}\nrand_serial=yes\ndefault_md=sha256\npolicy=p\n\
         x509_extensions=e\n[p]\ncommonName=supplied\n[e]\nbasicConstraints=CA:TRUE\n{NAMES}\n",
        authority.display()
    );
    let settings_file = authority.join("settings");
    fs::write(&settings_file, settings).unwrap();
    let request = authority.join("request");
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    tool(
        "openssl",
        [
            "req",
            "-new",
            "-subj",
            "/CN=localhost",
            "-key",
            &text(&good.key),
            "-out",
            &text(&request),
        ],
    );
    tool(
        "openssl",
        [
            "ca",
            "-batch",
            "-notext",
            "-selfsign",
            "-config",
            &text(&settings_file),
            "-keyfile",
            &text(&good.key),
            "-in",
            &text(&request),
            "-out",
            &text(&old),
            "-startdate",
            &start,
            "-enddate",
            &end,
        ],
    );
    let expired = Certificate {
        certificate: old.clone(),
        authority: old,
        key: good.key.clone(),
    };
    refused("expired", &expired, "expired");
}

#[test]
fn curves_and_signatures_that_others_accept_are_accepted() {
    const RSA: &[&str] = &["rsa:2048"];
    const P256: &[&str] = &["ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"];
    const P384: &[&str] = &["ec", "-pkeyopt", "ec_paramgen_curve:secp384r1"];
    const P521: &[&str] = &["ec", "-pkeyopt", "ec_paramgen_curve:secp521r1"];
    let pss = [
        "-sha256",
        "-sigopt",
        "rsa_padding_mode:pss",
        "-sigopt",
        "rsa_pss_saltlen:32",
    ];
    for (what, authority, key, sign) in [
        ("P-256 with SHA-512", P256, RSA, &["-sha512"][..]),
        ("P-384 with SHA-512", P384, RSA, &["-sha512"]),
        ("P-384 with SHA-256", P384, P384, &["-sha256"]),
        ("P-521", P521, P521, &["-sha512"]),
        ("P-521 with SHA-256", P521, P256, &["-sha256"]),
        ("Ed25519", &["ed25519"], &["ed25519"], &[]),
        ("RSA of 4096 bits", &["rsa:4096"], &["rsa:4096"], &["-sha384"]),
        ("RSA-PSS", RSA, RSA, &pss),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let said = Certificate::signed(directory.path(), authority, key, sign).read();
        accepted(what, &said);
    }
}

/// Writes the documents and blobs of an image for a server of static files. Returns the directory.
fn site(directory: &Path) -> PathBuf {
    let image = directory.join("image");
    oci_layout::write(&image, &[layer()]);
    let index: serde_json::Value = serde_json::from_slice(&fs::read(image.join("index.json")).unwrap()).unwrap();
    let manifest = index["manifests"][0]["digest"].as_str().unwrap();
    let app = directory.join("site/v2/app");
    let write = |path: PathBuf, bytes: &[u8]| {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    };
    for blob in fs::read_dir(image.join("blobs/sha256")).unwrap() {
        let blob = blob.unwrap();
        let digest = format!("sha256:{}", blob.file_name().to_str().unwrap());
        let bytes = fs::read(blob.path()).unwrap();
        if digest == manifest {
            write(app.join("manifests/1"), &bytes);
        }
        write(app.join("blobs").join(digest), &bytes);
    }
    directory.join("site")
}

/// Starts a server on a port of its choice. Returns it and its address.
fn serve(command: &mut Command) -> (Running, String) {
    let quiet = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let server = Running(quiet.spawn().unwrap());
    let mut port = None;
    eventually("the server listens", || {
        port = listening_port(server.0.id());
        port.is_some()
    });
    (server, format!("127.0.0.1:{}", port.unwrap()))
}

#[test]
fn keys_are_exchanged_over_every_curve_that_others_know() {
    let directory = tempfile::tempdir().unwrap();
    let certificate = Certificate::self_signed(directory.path(), &["rsa:2048"], &["-addext", NAMES]);
    let site = site(directory.path());
    // This server does not send files with a colon in their name, so the manifest embeds the config.
    let app = site.join("v2/app");
    let mut manifest: serde_json::Value = serde_json::from_slice(&fs::read(app.join("manifests/1")).unwrap()).unwrap();
    let config = fs::read(app.join("blobs").join(manifest["config"]["digest"].as_str().unwrap())).unwrap();
    manifest["config"]["data"] = base64::engine::general_purpose::STANDARD.encode(config).into();
    fs::write(app.join("manifests/1"), manifest.to_string()).unwrap();
    for version in ["-tls1_2", "-tls1_3"] {
        for group in ["X25519", "P-256", "P-384", "P-521"] {
            let mut command = Command::new("openssl");
            command
                .args([
                    "s_server",
                    "-accept",
                    "127.0.0.1:0",
                    "-WWW",
                    version,
                    "-groups",
                    group,
                    "-cert",
                ])
                .arg(&certificate.certificate)
                .arg("-key")
                .arg(&certificate.key)
                .current_dir(&site);
            let (_server, host) = serve(&mut command);
            let ocifs = Ocifs::with(&["--ca", certificate.authority.to_str().unwrap()]);
            let said = ocifs.run(["inspect", &format!("{host}/app:1")]);
            assert_eq!(said.code, Some(0), "{version} {group}: {said:?}");
        }
    }
}

/// Starts a server on loopback that accepts connections and never answers. Returns its address and the number of
/// connections.
fn silent_server() -> (String, Arc<AtomicUsize>) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let host = listener.local_addr().unwrap().to_string();
    let count = Arc::new(AtomicUsize::new(0));
    let counter = count.clone();
    std::thread::spawn(move || {
        let mut kept = Vec::new();
        for stream in listener.incoming() {
            kept.push(stream.unwrap());
            counter.fetch_add(1, Ordering::Relaxed);
        }
    });
    (host, count)
}

#[test]
fn loopback_is_tried_with_tls_first_and_can_be_forced() {
    let registry = TestRegistry::start();
    push(&registry, "app", "1", &[layer()]);
    let image = format!("{}/app:1", registry.host());
    let cat = |options: &[&str]| Ocifs::with(options).run(["cat", &image, "f"]);
    accepted("plain", &cat(&[]));
    accepted("forced to plain", &cat(&["--plain-http"]));
    registry.clear_log();
    let said = cat(&["--no-plain-http"]);
    assert_eq!(said.code, Some(1), "{said:?}");
    assert!(said.stderr.contains("TLS with"), "{said:?}");
    assert_eq!(registry.log().len(), 0, "nothing went there in the clear");

    // A server with TLS never gets plain HTTP, whatever is wrong with its certificate.
    let directory = tempfile::tempdir().unwrap();
    let certificate = Certificate::self_signed(directory.path(), &["rsa:2048"], &["-addext", NAMES]);
    let registry = DockerRegistry::start(&Setup {
        tls: Some((certificate.certificate.clone(), certificate.key)),
        ..Setup::default()
    });
    let image = format!("{}/app:1", registry.host());
    let said = Ocifs::new().run(["cat", &image, "f"]);
    assert!(said.code == Some(1) && said.stderr.contains("TLS with"), "{said:?}");
    let said = Ocifs::with(&["--plain-http"]).run(["cat", &image, "f"]);
    assert!(said.code == Some(1) && said.stderr.contains("400"), "{said:?}");
}

#[test]
fn a_slow_server_on_loopback_is_waited_for_and_not_spoken_to_without_tls() {
    let (host, connections) = silent_server();
    let ocifs = Ocifs::with(&["--timeout", "2s"]);
    let error = ocifs.fails(["inspect", &format!("{host}/app:1")]);
    assert!(error.contains("did not answer"), "{error}");
    assert!(connections.load(Ordering::Relaxed) >= 1);
}

#[test]
fn servers_that_read_lines_are_found_to_be_plain() {
    let directory = tempfile::tempdir().unwrap();
    let mut command = Command::new("python3");
    command
        .args(["-m", "http.server", "--bind", "127.0.0.1", "0"])
        .current_dir(site(directory.path()));
    let (_server, host) = serve(&mut command);
    // The timeout is well below the time after which a connection is given up.
    let ocifs = Ocifs::with(&["--timeout", "3s"]);
    accepted("python's server", &ocifs.run(["cat", &format!("{host}/app:1"), "f"]));
}

#[test]
fn servers_that_close_on_tls_are_found_to_be_plain() {
    let registry = TestRegistry::start();
    push(&registry, "app", "1", &[layer()]);
    registry.hang_up_on_tls();
    accepted(
        "one that closes",
        &Ocifs::new().run(["cat", &format!("{}/app:1", registry.host()), "f"]),
    );
}
