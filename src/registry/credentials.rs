//! Credentials: a *source* that the client asks each time it needs a credential, not a value copied once.
//!
//! [`ConfigFiles`] reads the files that `docker login` and `podman login` write, and asks the helpers that these
//! files name. It reads the files again at every lookup. A new login, a rotated password or a 12-hour cloud token
//! therefore takes effect in a running mount.
//!
//! The variable `DOCKER_AUTH_CONFIG` of the environment may have the text of such a file. It comes before the files, as in
//! the tools that know it: those of Docker and of GitLab.
//!
//! A lookup also says where it looked. A user needs these places to resolve an "unauthorized" error.

mod config_file;
mod exchange;
mod helper;
#[cfg(feature = "snapshotter")]
mod kubelet;

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;

pub use config_file::{AuthFile, AuthFileError, FoundCredentials};
#[cfg(feature = "snapshotter")]
pub use kubelet::KubeletProviders;

use super::secret::Secret;

/// Most bytes read of a credential file. Real files have a few kilobytes.
const MAX_FILE: u64 = 4 << 20;
/// Variable with the text of a credential file.
const VARIABLE: &str = "DOCKER_AUTH_CONFIG";

/// A credential for a registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Credential {
    /// User name and password.
    Basic {
        /// User name.
        username: String,
        /// Password or personal token.
        password: Secret,
    },
    /// An OAuth2 refresh token. The token server exchanges it for a bearer token.
    IdentityToken(Secret),
    /// A bearer token that is sent to the registry unchanged.
    RegistryToken(Secret),
}

/// The result of [`CredentialSource::lookup`].
#[derive(Debug, Clone, Default)]
pub struct Lookup {
    /// The credential, if the source found one.
    pub credential: Option<Credential>,
    /// Where the source found the credential or looked for it, one line each, without secrets.
    pub tried: Vec<String>,
}

/// A source of credentials.
#[async_trait]
pub trait CredentialSource: Send + Sync + Debug {
    /// Looks up the credential for a repository. `registry` is the name in references, such as `docker.io` or
    /// `host:port`.
    async fn lookup(&self, registry: &str, repository: &str) -> Lookup;
}

/// A source without credentials.
#[derive(Debug, Clone, Copy, Default)]
pub struct Anonymous;

#[async_trait]
impl CredentialSource for Anonymous {
    async fn lookup(&self, _registry: &str, _repository: &str) -> Lookup {
        Lookup {
            credential: None,
            tried: vec!["credentials are switched off".to_owned()],
        }
    }
}

/// One credential for one registry, given by the calling program.
#[derive(Debug, Clone)]
pub struct Fixed {
    /// The registry that the credential is for. No other registry gets it.
    pub registry: String,
    /// The credential.
    pub credential: Credential,
}

#[async_trait]
impl CredentialSource for Fixed {
    async fn lookup(&self, registry: &str, _repository: &str) -> Lookup {
        let matches = self.registry == registry;
        let verdict = if matches { "given for" } else { "not for" };
        Lookup {
            credential: matches.then(|| self.credential.clone()),
            tried: vec![format!("a fixed credential {verdict} {registry}")],
        }
    }
}

/// Several sources. The first that gives a credential wins.
#[derive(Debug, Clone)]
pub struct Several(pub Vec<Arc<dyn CredentialSource>>);

#[async_trait]
impl CredentialSource for Several {
    async fn lookup(&self, registry: &str, repository: &str) -> Lookup {
        let mut all = Lookup::default();
        for source in &self.0 {
            let lookup = source.lookup(registry, repository).await;
            all.tried.extend(lookup.tried);
            if lookup.credential.is_some() {
                all.credential = lookup.credential;
                break;
            }
        }
        all
    }
}

/// The credential files of Docker and the containers tools. The first file that gives a credential wins. The text of a
/// file in the environment comes before all files.
#[derive(Debug, Clone)]
pub struct ConfigFiles {
    text: Option<Secret>,
    paths: Vec<PathBuf>,
}

impl ConfigFiles {
    /// Makes a source that reads these files, in this order.
    pub fn new(paths: Vec<PathBuf>) -> Self {
        Self { text: None, paths }
    }

    /// Makes a source that reads the standard files for the environment and user of this process, and the variable
    /// `DOCKER_AUTH_CONFIG`.
    pub fn from_environment() -> Self {
        let uid = nix::unistd::getuid().as_raw();
        let home = std::env::var_os("HOME").map(PathBuf::from);
        let variable = |name: &str| std::env::var_os(name).map(PathBuf::from);
        let text = std::env::var(VARIABLE).ok().filter(|text| !text.trim().is_empty());
        Self {
            text: text.map(Secret::new),
            ..Self::new(standard_paths(&variable, home, uid))
        }
    }

    async fn ask(
        &self,
        path: &PathBuf,
        registry: &str,
        repository: &str,
        tried: &mut Vec<String>,
    ) -> Option<Credential> {
        let shown = path.display().to_string();
        match read_capped(path).await {
            Ok(text) => Self::ask_text(&shown, &text, registry, repository, tried).await,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => {
                tried.push(format!("{shown}: {error}"));
                None
            }
        }
    }

    /// Looks a repository up in the text of a credential file. `shown` is what the text is called.
    async fn ask_text(
        shown: &str,
        text: &[u8],
        registry: &str,
        repository: &str,
        tried: &mut Vec<String>,
    ) -> Option<Credential> {
        let file = match AuthFile::parse(text) {
            Ok(file) => file,
            Err(error) => {
                tried.push(format!("{shown}: {error}"));
                return None;
            }
        };
        match file.find(registry, repository) {
            Ok(FoundCredentials::Credential(credential)) => {
                tried.push(format!("{shown} has credentials"));
                Some(credential)
            }
            Ok(FoundCredentials::Helper { name, key, otherwise }) => {
                let answer = helper::ask(&name, &key).await;
                match answer {
                    Ok(Some(credential)) => {
                        tried.push(format!("docker-credential-{name} (from {shown}) has credentials"));
                        return Some(credential);
                    }
                    Ok(None) => tried.push(format!(
                        "docker-credential-{name} (from {shown}) knows nothing of {key}"
                    )),
                    Err(error) => tried.push(format!("docker-credential-{name} (from {shown}): {error}")),
                }
                otherwise
            }
            Ok(FoundCredentials::Nothing) => {
                tried.push(format!("{shown} has no entry for {registry}"));
                None
            }
            Err(error) => {
                tried.push(format!("{shown}: {error}"));
                None
            }
        }
    }
}

#[async_trait]
impl CredentialSource for ConfigFiles {
    async fn lookup(&self, registry: &str, repository: &str) -> Lookup {
        let mut lookup = Lookup::default();
        if let Some(text) = &self.text {
            let text = text.expose().as_bytes();
            lookup.credential = Self::ask_text(VARIABLE, text, registry, repository, &mut lookup.tried).await;
            if lookup.credential.is_some() {
                return lookup;
            }
        }
        for path in &self.paths {
            if let Some(credential) = self.ask(path, registry, repository, &mut lookup.tried).await {
                lookup.credential = Some(credential);
                break;
            }
        }
        if lookup.tried.is_empty() {
            let paths: Vec<String> = self.paths.iter().map(|path| path.display().to_string()).collect();
            lookup
                .tried
                .push(format!("there is no credential file at {}", paths.join(" or ")));
        }
        lookup
    }
}

async fn read_capped(path: &PathBuf) -> std::io::Result<Vec<u8>> {
    use tokio::io::AsyncReadExt as _;
    let mut text = Vec::new();
    let file = tokio::fs::File::open(path).await?;
    file.take(MAX_FILE).read_to_end(&mut text).await?;
    Ok(text)
}

/// Returns the files to read, without repeats. Files named explicitly come first, then files of a login session, then
/// files in the home directory.
fn standard_paths(environment: &dyn Fn(&str) -> Option<PathBuf>, home: Option<PathBuf>, uid: u32) -> Vec<PathBuf> {
    let set = |name: &str| environment(name).filter(|path| !path.as_os_str().is_empty());
    let under_home = |tail: &str| home.as_ref().map(|home| home.join(tail));
    let docker = set("DOCKER_CONFIG").map(|dir| dir.join("config.json"));
    let candidates = [
        set("REGISTRY_AUTH_FILE"),
        docker,
        set("XDG_RUNTIME_DIR").map(|dir| dir.join("containers/auth.json")),
        Some(PathBuf::from(format!("/run/containers/{uid}/auth.json"))),
        set("XDG_CONFIG_HOME")
            .or_else(|| under_home(".config"))
            .map(|dir| dir.join("containers/auth.json")),
        under_home(".docker/config.json"),
        under_home(".dockercfg"),
    ];
    let mut paths: Vec<PathBuf> = Vec::new();
    for path in candidates.into_iter().flatten() {
        if !paths.contains(&path) {
            paths.push(path);
        }
    }
    paths
}

/// Returns the names under which credential files may list a registry. Docker Hub has several.
pub(super) fn aliases(registry: &str) -> Vec<&str> {
    match registry {
        "docker.io" => vec!["docker.io", "index.docker.io", "registry-1.docker.io"],
        other => vec![other],
    }
}

/// Returns the server key to ask a helper for.
pub(super) fn helper_key(registry: &str) -> &str {
    match registry {
        "docker.io" => "https://index.docker.io/v1/",
        other => other,
    }
}

/// A map of a credential file. It is ordered by key, so that equal files give equal results.
type Keyed<T> = BTreeMap<String, T>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn standard_places_in_order() {
        let environment = |name: &str| match name {
            "DOCKER_CONFIG" => Some(PathBuf::from("/d")),
            "XDG_RUNTIME_DIR" => Some(PathBuf::from("/run/user/7")),
            "XDG_CONFIG_HOME" => Some(PathBuf::new()),
            _ => None,
        };
        let paths = standard_paths(&environment, Some("/home/u".into()), 7);
        let want = [
            "/d/config.json",
            "/run/user/7/containers/auth.json",
            "/run/containers/7/auth.json",
            "/home/u/.config/containers/auth.json",
            "/home/u/.docker/config.json",
            "/home/u/.dockercfg",
        ];
        assert_eq!(paths, want.map(PathBuf::from));
    }

    #[tokio::test]
    async fn a_fixed_credential_is_for_one_registry() {
        let fixed = Fixed {
            registry: "a:1".into(),
            credential: Credential::RegistryToken(Secret::new("t")),
        };
        assert!(fixed.lookup("a:1", "x").await.credential.is_some());
        assert!(fixed.lookup("b:1", "x").await.credential.is_none());
    }

    #[tokio::test]
    async fn the_text_in_the_environment_comes_before_the_files() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.json");
        let login = |user: &str| format!(r#"{{"auths":{{"{user}.lan":{{"username":"{user}","password":"p"}}}}}}"#);
        std::fs::write(&path, login("file").replace("file.lan", "r.lan")).unwrap();
        let with = |text: &str| ConfigFiles {
            text: Some(Secret::new(text)),
            ..ConfigFiles::new(vec![path.clone()])
        };
        let user = |lookup: Lookup| match lookup.credential {
            Some(Credential::Basic { username, .. }) => username,
            other => panic!("{other:?}"),
        };
        let both = login("variable").replace("variable.lan", "r.lan");
        assert_eq!(user(with(&both).lookup("r.lan", "a").await), "variable");
        let other = with(&login("other"));
        assert_eq!(user(other.lookup("r.lan", "a").await), "file");
        let lookup = with("hunter2").lookup("r.lan", "a").await;
        assert!(lookup.tried[0].starts_with("DOCKER_AUTH_CONFIG: not a credential file"));
        assert_eq!(user(lookup), "file");
        assert!(!format!("{:?}", with("hunter2")).contains("hunter2"));
    }

    #[tokio::test]
    async fn files_are_read_anew_and_the_answer_says_where_it_looked() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.json");
        let files = ConfigFiles::new(vec![path.clone()]);
        let lookup = files.lookup("r.lan", "a").await;
        assert!(lookup.credential.is_none());
        assert!(lookup.tried[0].contains("no credential file at"));
        std::fs::write(&path, r#"{"auths":{"r.lan":{"username":"u","password":"p"}}}"#).unwrap();
        assert!(files.lookup("r.lan", "a").await.credential.is_some());
        std::fs::write(&path, "{").unwrap();
        let lookup = files.lookup("r.lan", "a").await;
        assert!(lookup.tried[0].contains("config.json"), "{:?}", lookup.tried);
    }
}
