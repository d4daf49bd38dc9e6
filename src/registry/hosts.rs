//! The files in which this machine says how to reach registries: those of containerd, of the containers tools (podman,
//! skopeo, CRI-O) and of Docker.
//!
//! | file | what it says |
//! |---|---|
//! | `certs.d/HOST/hosts.toml` of containerd ([`containerd`]) | mirrors, the server, certificates, headers |
//! | `registries.conf` ([`containers`]) | mirrors, another location, insecure and blocked registries |
//! | `certs.d/HOST/*.crt`, `*.cert`, `*.key` ([`certificates`]) | certificates |
//!
//! The places of an image come from one of the first two: containerd's file if there is one for the registry, or else
//! `registries.conf` if it has an entry for the image, or else containerd's file for all registries. The certificates of
//! a host come from all of them.
//!
//! The files are read when an image is opened. `docs::registries` describes them for users.

mod certificates;
mod containerd;
mod containers;

use std::path::{Path, PathBuf};

use self::containerd::ContainerdHost;
use super::endpoint::{Endpoint, PlainHttp, Repository};
use super::host_settings::{HostSettings, HostTls};
use crate::blob::BlobError;
use crate::oci::shown;

/// Largest file read. Real files have a few kilobytes.
const MAX_FILE: u64 = 4 << 20;

/// Whose files say where images are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HostsFrom {
    /// Containerd's for the registries that they name, `registries.conf` for the others.
    #[default]
    All,
    /// Only containerd's.
    Containerd,
    /// Only `registries.conf`.
    Containers,
    /// Nobody's. No file is read, not even for certificates.
    Nobody,
}

/// The files about registries.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HostFiles {
    /// Which of the files count.
    pub from: HostsFrom,
    /// Directories with a directory for each registry, as containerd's `certs.d`. The first that has one counts.
    pub containerd: Vec<PathBuf>,
    /// Files like `registries.conf`. The first that exists counts.
    pub containers: Vec<PathBuf>,
    /// Directories with further files like `registries.conf`. An entry replaces one of the same prefix in an earlier
    /// file.
    pub containers_more: Vec<PathBuf>,
    /// Directories with a directory of certificates for each registry, as Docker's `certs.d`. All of them count.
    pub certificates: Vec<PathBuf>,
}

impl HostFiles {
    /// Returns the standard files for the environment of this process.
    pub fn from_environment() -> Self {
        let variable = |name: &str| {
            std::env::var_os(name)
                .filter(|value| !value.is_empty())
                .map(PathBuf::from)
        };
        Self::standard(&variable)
    }

    /// Returns an instance that reads no file.
    pub fn none() -> Self {
        Self {
            from: HostsFrom::Nobody,
            ..Self::default()
        }
    }

    fn standard(variable: &dyn Fn(&str) -> Option<PathBuf>) -> Self {
        let home = variable("XDG_CONFIG_HOME").or_else(|| variable("HOME").map(|home| home.join(".config")));
        let of_user = home.map(|home| home.join("containers"));
        let system = Path::new("/etc/containers");
        let under = |name: &str| {
            let user = of_user.as_ref().map(|dir| dir.join(name));
            (system.join(name), user)
        };
        let (file, user_file) = under("registries.conf");
        let (more, user_more) = under("registries.conf.d");
        let (certificates, user_certificates) = under("certs.d");
        Self {
            from: HostsFrom::All,
            containerd: vec!["/etc/containerd/certs.d".into()],
            containers: variable("CONTAINERS_REGISTRIES_CONF")
                .into_iter()
                .chain(user_file)
                .chain([file])
                .collect(),
            containers_more: [more].into_iter().chain(user_more).collect(),
            certificates: ["/etc/docker/certs.d".into(), certificates]
                .into_iter()
                .chain(user_certificates)
                .collect(),
        }
    }

    /// Returns the places of a repository in the order in which to ask them. The last one is the registry itself, which
    /// `known` is without any file. `by_digest` is whether the image is named by its digest.
    pub(super) fn places(
        &self,
        known: &Repository,
        by_digest: bool,
        plain: &PlainHttp,
    ) -> Result<Vec<ImagePlace>, BlobError> {
        if let Some(hosts) = self.containerd(known.endpoint.name(), false) {
            return self.of_containerd(hosts, known, plain);
        }
        let configured = match self.from {
            HostsFrom::All | HostsFrom::Containers => {
                containers::find(&self.containers, &self.containers_more, &known.to_string())?
            }
            HostsFrom::Containerd | HostsFrom::Nobody => None,
        };
        if let Some(configured) = configured {
            return self.of_containers(&configured, by_digest, plain);
        }
        if let Some(hosts) = self.containerd("_default", true) {
            return self.of_containerd(hosts, known, plain);
        }
        let tls = self.tls(&known.endpoint, HostTls::default());
        Ok(vec![ImagePlace::everything(known.clone(), tls)])
    }

    /// Reads containerd's file in the directory `name`. A file that cannot be read is reported and not used, as in
    /// containerd.
    fn containerd(&self, name: &str, is_default: bool) -> Option<Vec<ContainerdHost>> {
        if !matches!(self.from, HostsFrom::All | HostsFrom::Containerd) {
            return None;
        }
        let names = if is_default {
            vec![name.to_owned()]
        } else {
            containerd::directories(name)
        };
        let mut directories = self
            .containerd
            .iter()
            .flat_map(|root| names.iter().map(move |name| root.join(name)));
        let directory = directories.find(|directory| directory.is_dir())?;
        match containerd::read_hosts(&directory) {
            Ok(hosts) => hosts,
            Err(error) => {
                tracing::warn!(%error, "this file about a registry is not used");
                None
            }
        }
    }

    fn of_containerd(
        &self,
        hosts: Vec<ContainerdHost>,
        known: &Repository,
        plain: &PlainHttp,
    ) -> Result<Vec<ImagePlace>, BlobError> {
        let registry = known.endpoint.name();
        let last = hosts.len().saturating_sub(1);
        let mut places = Vec::new();
        for (position, host) in hosts.into_iter().enumerate() {
            let mut endpoint = match host.base {
                Some(base) if base.scheme() == "http" && *plain == PlainHttp::Nowhere => {
                    if position != last {
                        tracing::warn!(mirror = %base, "it has no TLS, which an option forbids: it is not used");
                        continue;
                    }
                    known.endpoint.clone()
                }
                Some(base) => Endpoint::of_api(base),
                None => known.endpoint.clone(),
            };
            // What containerd does, because the port does not say whether there is TLS.
            if endpoint.is_plain() && host.tls != HostTls::default() && *plain != PlainHttp::Everywhere {
                endpoint = endpoint.left_open();
            }
            if endpoint.name() != registry {
                endpoint = endpoint.for_upstream(registry);
            }
            let tls = self.tls(&endpoint, host.tls);
            let endpoint = endpoint.with_settings(HostSettings {
                tls,
                headers: host.headers,
                is_borrowed: false,
            });
            places.push(ImagePlace {
                repository: Repository {
                    endpoint,
                    name: known.name.clone(),
                },
                resolves: host.resolves,
                pulls: host.pulls,
            });
        }
        Ok(places)
    }

    fn of_containers(
        &self,
        configured: &containers::ConfiguredRegistry,
        by_digest: bool,
        plain: &PlainHttp,
    ) -> Result<Vec<ImagePlace>, BlobError> {
        let mut places = Vec::new();
        for location in &configured.locations {
            let Some((host, name)) = location.name.split_once('/') else {
                return Err(BlobError::Invalid {
                    what: configured.file.display().to_string(),
                    reason: format!("it leads to `{}`, which names no repository", shown(&location.name)),
                });
            };
            let mut endpoint = Endpoint::new(host, plain)?;
            let mut tls = HostTls::default();
            if location.is_insecure {
                tls.is_unverified = true;
                if !endpoint.is_plain() && *plain != PlainHttp::Nowhere {
                    endpoint = endpoint.left_open();
                }
            }
            let tls = self.tls(&endpoint, tls);
            let repository = Repository::new(endpoint, name)?;
            let mut place = ImagePlace::everything(repository, tls);
            match location.pulls {
                containers::PullFrom::All => {}
                containers::PullFrom::DigestOnly => place.resolves = false,
                containers::PullFrom::TagOnly => place.pulls = !by_digest,
            }
            places.push(place);
        }
        Ok(places)
    }

    /// Adds to `tls` the certificates that the directories have for the host.
    fn tls(&self, endpoint: &Endpoint, mut tls: HostTls) -> HostTls {
        if self.from == HostsFrom::Nobody {
            return tls;
        }
        let mut names = vec![endpoint.name()];
        if endpoint.name() == "docker.io" {
            names.push("registry-1.docker.io");
        }
        for name in names {
            for root in &self.certificates {
                certificates::add(&root.join(name), &mut tls);
            }
            for root in &self.containerd {
                for directory in containerd::directories(name) {
                    certificates::add(&root.join(directory), &mut tls);
                }
            }
        }
        tls
    }
}

/// A place that has an image: a mirror, or the registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ImagePlace {
    pub(super) repository: Repository,
    /// Whether it may be asked what a tag means.
    pub(super) resolves: bool,
    /// Whether it may be asked for content of a known digest.
    pub(super) pulls: bool,
}

impl ImagePlace {
    /// Makes a place that may be asked for everything.
    fn everything(mut repository: Repository, tls: HostTls) -> Self {
        if tls != HostTls::default() {
            repository.endpoint = repository.endpoint.with_settings(HostSettings {
                tls,
                ..HostSettings::default()
            });
        }
        Self {
            repository,
            resolves: true,
            pulls: true,
        }
    }
}

/// Reads a file of settings. Returns none if there is no such file.
fn read(path: &Path) -> Result<Option<String>, BlobError> {
    use std::io::Read as _;
    let mut text = String::new();
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(BlobError::io(path, error)),
    };
    let read = file.take(MAX_FILE).read_to_string(&mut text);
    read.map_err(|error| BlobError::io(path, error))?;
    Ok(Some(text))
}

/// Makes the error for a file that is not as its tool wants it. Does not quote the file, because headers are secrets.
fn malformed(path: &Path, text: &str, error: &toml::de::Error) -> BlobError {
    let line = error.span().map(|span| {
        let before = text.get(..span.start).unwrap_or_default();
        1 + before.matches('\n').count()
    });
    let place = line.map(|line| format!("line {line}: ")).unwrap_or_default();
    BlobError::Invalid {
        what: path.display().to_string(),
        reason: format!("{place}{}", shown(error.message())),
    }
}

#[cfg(test)]
mod tests;
