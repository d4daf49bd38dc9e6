//! Access to registries: authorities, logins and plain HTTP, and the sources of settings.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::Command;

use base64::Engine as _;
use nix::sched::CloneFlags;

use crate::common::docker_registry::{DockerRegistry, Setup, certificates, skopeo_copy};
use crate::common::layers::{Blob, Tar, noise, push};
use crate::common::namespace::with_hosts;
use crate::common::oci_layout;
use crate::common::ocifs::{Ocifs, bounded};
use crate::common::registry::TestRegistry;

const SIZE: usize = 200_000;

/// Runs `body` where `registry.test` is this machine. Under that name, ocifs does not treat a registry as one on
/// loopback.
fn elsewhere(body: impl FnOnce() + Send) {
    with_hosts("127.0.0.1 localhost registry.test\n", CloneFlags::empty(), body);
}

/// Returns the name under which [`elsewhere`] reaches a registry of this machine.
fn named(host: &str) -> String {
    host.replace("127.0.0.1", "registry.test")
}

fn layer() -> Blob {
    Blob::gzip(&Tar::new().file("f", noise(4, SIZE)).finish())
}

/// A registry with an image. It has a certificate of its own authority and requires the password of `me`.
struct Private {
    registry: DockerRegistry,
    directory: tempfile::TempDir,
    authority: PathBuf,
}

impl Private {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (authority, certificate, key) = certificates(directory.path());
        let setup = Setup {
            tls: Some((certificate, key)),
            login: Some(("me".to_owned(), "hunter2".to_owned())),
            ..Setup::default()
        };
        let registry = DockerRegistry::start(&setup);
        let trust = directory.path().join("trust");
        fs::create_dir(&trust).unwrap();
        fs::copy(&authority, trust.join("ca.crt")).unwrap();
        let image = oci_layout::write(&directory.path().join("layout"), &[layer()]);
        let trust = format!("--dest-cert-dir={}", trust.display());
        let target = format!("docker://{}/org/app:1", registry.host());
        skopeo_copy(&[&trust, "--dest-creds=me:hunter2"], &image, &target);
        Self {
            registry,
            directory,
            authority,
        }
    }

    fn host(&self) -> String {
        named(&self.registry.host())
    }

    fn image(&self) -> String {
        format!("{}/org/app:1", self.host())
    }

    /// Returns the program with the registry's authority trusted.
    fn ocifs(&self) -> Ocifs {
        Ocifs::with(&["--ca", self.authority.to_str().unwrap()])
    }

    /// Writes a file below the directory of this registry.
    fn file(&self, path: &str, content: &str) -> PathBuf {
        let path = self.directory.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        path
    }

    /// Returns a credential file that docker and podman both understand.
    fn auths(&self, login: &str) -> String {
        let encoded = base64::engine::general_purpose::STANDARD.encode(login);
        serde_json::json!({"auths": {self.host(): {"auth": encoded}}}).to_string()
    }

    /// Reads everything that needs the login: documents, the layer, and ranges of the layer.
    fn check(&self, ocifs: &Ocifs) {
        let mount = ocifs.mount(&self.image());
        ocifs.ok(["cache", "drop"]);
        assert!(mount.read("f") == noise(4, SIZE));
        assert!(mount.status()["fetched"].as_u64().unwrap() > layer().bytes.len() as u64);
    }
}

#[test]
fn logins_come_from_the_files_of_docker_and_podman() {
    elsewhere(|| {
        let private = Private::start();
        let docker = private.file("docker/config.json", &private.auths("me:hunter2"));
        private.check(&private.ocifs().env("DOCKER_CONFIG", docker.parent().unwrap()));
        let auth = private.file("podman/auth.json", &private.auths("me:hunter2"));
        private.check(&private.ocifs().env("REGISTRY_AUTH_FILE", &auth));
        let home = private.ocifs();
        fs::create_dir(home.home().join(".docker")).unwrap();
        fs::copy(&docker, home.home().join(".docker/config.json")).unwrap();
        private.check(&home);
    });
}

#[test]
fn logins_come_from_credential_helpers() {
    elsewhere(|| {
        let private = Private::start();
        let host = private.host();
        let script = format!(
            "#!/bin/sh\n[ \"$1\" = get ] && read key && [ \"$key\" = {host} ] || exit 1\n\
         echo '{{\"ServerURL\":\"{host}\",\"Username\":\"me\",\"Secret\":\"hunter2\"}}'\n"
        );
        let helper = private.file("bin/docker-credential-x", &script);
        fs::set_permissions(&helper, fs::Permissions::from_mode(0o755)).unwrap();
        let mut path = std::ffi::OsString::from(helper.parent().unwrap());
        path.push(":");
        path.push(std::env::var_os("PATH").unwrap());
        for (name, config) in [
            ("all", serde_json::json!({"credsStore": "x"})),
            ("one", serde_json::json!({"credHelpers": {host.clone(): "x"}})),
        ] {
            let file = private.file(&format!("{name}/config.json"), &config.to_string());
            let ocifs = private.ocifs().env("DOCKER_CONFIG", file.parent().unwrap());
            private.check(&ocifs.env("PATH", &path));
        }
    });
}

#[test]
fn logins_come_from_the_environment_before_the_files() {
    elsewhere(|| {
        let private = Private::start();
        let wrong = private.file("wrong/config.json", &private.auths("me:wrong-secret"));
        let variable = |text: &str| {
            let ocifs = private.ocifs().env("DOCKER_CONFIG", wrong.parent().unwrap());
            ocifs.env("DOCKER_AUTH_CONFIG", text)
        };
        private.check(&variable(&private.auths("me:hunter2")));
        // The files count for a registry that the variable does not name.
        let other = private.auths("me:hunter2").replace(&private.host(), "elsewhere.test");
        let error = variable(&other).mount_fails(&private.image(), &[]);
        assert!(error.contains("DOCKER_AUTH_CONFIG has no entry"), "{error}");
        assert!(error.contains(wrong.to_str().unwrap()), "{error}");
        let error = variable("wrong-secret").mount_fails(&private.image(), &[]);
        assert!(error.contains("DOCKER_AUTH_CONFIG: not a credential file"), "{error}");
        assert!(!error.contains("wrong-secret"), "{error}");
    });
}

#[test]
fn a_missing_login_says_where_it_was_looked_for() {
    elsewhere(|| {
        let private = Private::start();
        let image = private.image();
        let ocifs = private.ocifs();
        let error = ocifs.mount_fails(&image, &[]);
        let home = ocifs.home().join(".docker/config.json");
        assert!(
            error.contains(home.to_str().unwrap()) && error.contains("auth.json"),
            "{error}"
        );
        // A file without an entry for the registry, and a file with a wrong password.
        let other = private.file(
            "other/config.json",
            r#"{"auths": {"elsewhere.test": {"auth": "bWU6aHVudGVyMg=="}}}"#,
        );
        let error = private
            .ocifs()
            .env("DOCKER_CONFIG", other.parent().unwrap())
            .mount_fails(&image, &[]);
        assert!(error.contains(other.to_str().unwrap()), "{error}");
        assert!(error.contains("no entry") && !error.contains("bWU6"), "{error}");
        let wrong = private.file("wrong/config.json", &private.auths("me:wrong-secret"));
        let error = private
            .ocifs()
            .env("DOCKER_CONFIG", wrong.parent().unwrap())
            .mount_fails(&image, &[]);
        assert!(error.contains(wrong.to_str().unwrap()), "{error}");
        assert!(!error.contains("wrong-secret"), "{error}");
    });
}

#[test]
fn an_authority_has_to_be_trusted() {
    elsewhere(|| {
        let private = Private::start();
        let login = private.file("docker/config.json", &private.auths("me:hunter2"));
        let ocifs = Ocifs::new().env("DOCKER_CONFIG", login.parent().unwrap());
        let error = ocifs.mount_fails(&private.image(), &[]);
        assert!(error.contains("UnknownIssuer"), "{error}");
        let settings = private.file("ocifs.toml", &format!("ca = [\"{}\"]\n", private.authority.display()));
        let ocifs = Ocifs::with(&["--config", settings.to_str().unwrap()]);
        private.check(&ocifs.env("DOCKER_CONFIG", login.parent().unwrap()));
    });
}

#[test]
fn plain_http_is_spoken_to_others_than_loopback_only_when_told() {
    elsewhere(|| {
        let registry = TestRegistry::start();
        push(&registry, "app", "1", &[layer()]);
        let host = named(&registry.host());
        let image = format!("{host}/app:1");
        let directory = tempfile::tempdir().unwrap();
        let settings = directory.path().join("ocifs.toml");
        fs::write(&settings, format!("plain-http = [\"{host}\"]\n")).unwrap();
        let cat = |options: &[&str]| {
            let ocifs = Ocifs::with(options);
            ocifs.run(["cat", &image, "f"])
        };
        let said = cat(&[]);
        assert_eq!(said.code, Some(1), "{said:?}");
        assert!(said.stderr.contains("plain HTTP"), "{said:?}");
        assert_eq!(registry.log().len(), 0, "nothing went there in the clear");
        assert!(cat(&["--plain-http"]).stdout == noise(4, SIZE));
        assert!(cat(&["--config", settings.to_str().unwrap()]).stdout == noise(4, SIZE));
    });
}

#[test]
fn settings_come_from_arguments_before_environment_before_file() {
    let registry = TestRegistry::start();
    push(&registry, "app", "1", &[layer()]);
    let image = format!("{}/app:1", registry.host());
    let directory = tempfile::tempdir().unwrap();
    let store = |name: &str| directory.path().join(name);
    let settings = store("ocifs.toml");
    fs::write(
        &settings,
        format!("store = \"{}\"\ntimeout = \"20s\"\n", store("file").display()),
    )
    .unwrap();
    // Pulls, and returns which of the three stores exists then. The data in it must serve a read without a request.
    let pull = |arguments: &[&str], environment: bool| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ocifs"));
        command.env("HOME", directory.path()).env_remove("OCIFS_STORE");
        if environment {
            command.env("OCIFS_STORE", store("environment"));
        }
        let said = bounded(command.args(arguments).args(["pull", &image]));
        assert_eq!(said.code, Some(0), "{said:?}");
        let made = |name: &&str| store(name).join("layers").exists();
        let made: Vec<&str> = ["argument", "environment", "file"].into_iter().filter(made).collect();
        for name in &made {
            registry.clear_log();
            assert!(Ocifs::at(&store(name)).ok(["cat", &image, "f"]).stdout == noise(4, SIZE));
            assert_eq!(registry.count(&layer().path()), 0, "{name}");
            fs::remove_dir_all(store(name)).unwrap();
        }
        made
    };
    let (settings, argument) = (settings.to_str().unwrap(), store("argument"));
    let argument = argument.to_str().unwrap();
    assert_eq!(pull(&["--config", settings], false), ["file"]);
    assert_eq!(pull(&["--config", settings], true), ["environment"]);
    assert_eq!(pull(&["--config", settings, "--store", argument], true), ["argument"]);
    fs::write(store("wrong.toml"), "stor = \"x\"\n").unwrap();
    let said = Ocifs::new().run(["--config", store("wrong.toml").to_str().unwrap(), "pull", &image]);
    assert_eq!(said.code, Some(1), "{said:?}");
    assert!(
        said.stderr.contains("wrong.toml") && said.stderr.contains("`stor`"),
        "{said:?}"
    );
}

#[cfg(feature = "snapshotter")]
#[test]
fn logins_come_from_the_credential_providers_of_a_kubelet() {
    elsewhere(|| {
        let private = Private::start();
        let program = private.file(
            "bin/cloud",
            &format!(
                "#!/bin/sh\necho '{{\"kind\":\"CredentialProviderResponse\",\"auth\":{{\"{}\":{{\"username\":\"me\",\"password\":\"hunter2\"}}}}}}'\n",
                private.host()
            ),
        );
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let providers = private.file(
            "providers.yaml",
            "kind: CredentialProviderConfig\nproviders:\n- name: cloud\n  matchImages:\n  - \"*.test\"\n",
        );
        let text = format!(
            "[kubelet-credentials]\nconfig = {providers:?}\nbin-dir = {:?}\n",
            program.parent().unwrap()
        );
        let config = private.file("ocifs.toml", &text);
        private.check(&private.ocifs().options(&["--config", config.to_str().unwrap()]));
        fs::write(&program, "#!/bin/sh\nexit 1\n").unwrap();
        let host = private.ocifs().options(&["--config", config.to_str().unwrap()]);
        let error = host.fails(["inspect", &private.image()]);
        assert!(error.contains("credential provider cloud"), "{error}");
    });
}
