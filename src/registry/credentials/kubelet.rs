//! Credential providers of a kubelet: programs that know the logins of a cloud's registries (Kubernetes KEP 2133).
//!
//! A kubelet has a file that lists the programs and the images that each knows (`--image-credential-provider-config`),
//! and a directory with the programs (`--image-credential-provider-bin-dir`). A program reads a request with the name of an
//! image, and answers with logins for patterns of images. The file is read again, and the program asked again, at every
//! lookup.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use serde::Deserialize;
use tokio::process::Command;

use super::exchange::{ExchangeError, ProgramAnswer, exchange};
use super::{Credential, CredentialSource, Lookup, read_capped};
use crate::os::program;
use crate::registry::secret::Secret;

/// Why a program gave no credential.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(super) enum ProviderError {
    /// The name has characters that could lead out of the directory.
    #[error("not the name of a program")]
    Name,
    /// The program gave no answer.
    #[error(transparent)]
    Exchange(#[from] ExchangeError),
    /// The program failed.
    #[error("{0}")]
    Failed(std::process::ExitStatus),
    /// The output is not the JSON of the protocol. The error does not show the output, which may hold the secret.
    #[error("the answer is no CredentialProviderResponse")]
    ProviderAnswer,
}

/// The file that lists the programs (`CredentialProviderConfig`).
#[derive(Debug, Deserialize)]
struct Providers {
    #[serde(default)]
    providers: Vec<Provider>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Provider {
    name: String,
    #[serde(default)]
    match_images: Vec<String>,
    #[serde(default = "first_version")]
    api_version: String,
    #[serde(default)]
    args: Option<Vec<String>>,
    #[serde(default)]
    env: Option<Vec<Variable>>,
}

#[derive(Debug, Deserialize)]
struct Variable {
    name: String,
    #[serde(default)]
    value: String,
}

fn first_version() -> String {
    "credentialprovider.kubelet.k8s.io/v1".to_owned()
}

/// What a program answers (`CredentialProviderResponse`).
#[derive(Deserialize)]
struct ProviderResponse {
    #[serde(default)]
    auth: Option<BTreeMap<String, Login>>,
}

#[derive(Deserialize)]
struct Login {
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
}

/// The credential providers that a kubelet is configured with.
#[derive(Debug, Clone)]
pub struct KubeletProviders {
    config: PathBuf,
    programs: PathBuf,
}

impl KubeletProviders {
    /// Reads the list from the file `config`, in YAML, and finds the programs in the directory `programs`.
    pub fn new(config: PathBuf, programs: PathBuf) -> Self {
        Self { config, programs }
    }
}

#[async_trait]
impl CredentialSource for KubeletProviders {
    async fn lookup(&self, registry: &str, repository: &str) -> Lookup {
        let mut lookup = Lookup::default();
        let shown = self.config.display();
        let providers = match read_providers(&self.config).await {
            Ok(providers) => providers.providers,
            Err(reason) => {
                lookup.tried.push(format!("{shown}: {reason}"));
                return lookup;
            }
        };
        let image = format!("{registry}/{repository}");
        for provider in providers {
            if !provider.match_images.iter().any(|pattern| matches(pattern, &image)) {
                continue;
            }
            let name = &provider.name;
            match ask(&self.programs, &provider, &image).await {
                Ok(Some(credential)) => {
                    lookup
                        .tried
                        .push(format!("credential provider {name} (from {shown}) has credentials"));
                    lookup.credential = Some(credential);
                    return lookup;
                }
                Ok(None) => lookup.tried.push(format!(
                    "credential provider {name} (from {shown}) knows nothing of {image}"
                )),
                Err(error) => lookup
                    .tried
                    .push(format!("credential provider {name} (from {shown}): {error}")),
            }
        }
        if lookup.tried.is_empty() {
            lookup
                .tried
                .push(format!("no credential provider of {shown} knows {image}"));
        }
        lookup
    }
}

async fn read_providers(path: &PathBuf) -> Result<Providers, String> {
    let text = read_capped(path).await.map_err(|error| error.to_string())?;
    let text = String::from_utf8(text).map_err(|_| "it is not UTF-8".to_owned())?;
    serde_saphyr::from_str(&text).map_err(|error| error.to_string())
}

/// Asks a program for the login of an image.
async fn ask(programs: &Path, provider: &Provider, image: &str) -> Result<Option<Credential>, ProviderError> {
    let is_name = !provider.name.is_empty() && provider.name != "." && provider.name != "..";
    if !is_name || provider.name.contains('/') {
        return Err(ProviderError::Name);
    }
    let mut command = Command::from(program(programs.join(&provider.name)));
    let variables = provider.env.iter().flatten();
    command
        .args(provider.args.iter().flatten())
        .envs(variables.map(|variable| (&variable.name, &variable.value)));
    let request = serde_json::json!({
        "kind": "CredentialProviderRequest", "apiVersion": provider.api_version, "image": image,
    });
    let ProgramAnswer { status, text } = exchange(command, request.to_string().as_bytes()).await?;
    if !status.success() {
        return Err(ProviderError::Failed(status));
    }
    let answer: ProviderResponse = serde_json::from_slice(&text).map_err(|_| ProviderError::ProviderAnswer)?;
    // As the kubelet does, the last pattern in the order of the alphabet counts, which is the most special of those that
    // begin alike.
    let mut logins = answer.auth.unwrap_or_default().into_iter().rev();
    let found = logins.find(|(pattern, _)| matches(pattern, image));
    Ok(found.map(|(_, login)| Credential::Basic {
        username: login.username,
        password: Secret::new(login.password),
    }))
}

/// Returns whether a pattern is for an image. A pattern has a host, whose parts may have stars that match within a part,
/// and perhaps a port and the beginning of a path.
fn matches(pattern: &str, image: &str) -> bool {
    let split = |text: &str| {
        let text = text
            .strip_prefix("https://")
            .or_else(|| text.strip_prefix("http://"))
            .unwrap_or(text);
        let (host, path) = text.split_once('/').unwrap_or((text, ""));
        let (host, port) = match host.split_once(':') {
            Some((host, port)) => (host, Some(port.to_owned())),
            None => (host, None),
        };
        (host.to_owned(), port, path.to_owned())
    };
    let ((host, port, path), (image_host, image_port, image_path)) = (split(pattern), split(image));
    let (parts, image_parts): (Vec<&str>, Vec<&str>) = (host.split('.').collect(), image_host.split('.').collect());
    let mut pairs = parts.iter().zip(&image_parts);
    parts.len() == image_parts.len()
        && pairs.all(|(pattern, part)| matches_part(pattern, part))
        && (port.is_none() || port == image_port)
        && image_path.starts_with(&path)
}

/// Returns whether one part of a host matches a pattern with stars.
fn matches_part(pattern: &str, part: &str) -> bool {
    let Some((start, rest)) = pattern.split_once('*') else {
        return pattern == part;
    };
    let Some(part) = part.strip_prefix(start) else {
        return false;
    };
    let ends = part.char_indices().map(|(at, _)| at).chain([part.len()]);
    ends.into_iter().any(|at| matches_part(rest, &part[at..]))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn patterns_match_as_in_a_kubelet() {
        for (pattern, image, expected) in [
            ("r.lan", "r.lan/app", true),
            ("r.lan", "r.lan:5000/app", true),
            ("r.lan:5000", "r.lan/app", false),
            ("r.lan:5000", "r.lan:5000/app", true),
            ("*.lan", "r.lan/app", true),
            ("*.lan", "a.r.lan/app", false),
            ("*.dkr.ecr.*.amazonaws.com", "1.dkr.ecr.eu-1.amazonaws.com/a", true),
            ("app*.k8s.io", "app-7.k8s.io/a", true),
            ("app*.k8s.io", "ap.k8s.io/a", false),
            ("r.lan/team", "r.lan/team/app", true),
            ("r.lan/team", "r.lan/other", false),
            ("https://r.lan", "r.lan/app", true),
            ("*a*b*", "xaxb/app", true),
        ] {
            assert_eq!(matches(pattern, image), expected, "{pattern} {image}");
        }
    }

    /// A kubelet's configuration with one program, a shell script.
    async fn lookup(script: &str, registry: &str) -> Lookup {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("cloud");
        std::fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        let config = directory.path().join("config.yaml");
        let text = "apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\nproviders:\n  - name: cloud\n    \
                    matchImages: [\"*.lan\"]\n    defaultCacheDuration: 12h\n    apiVersion: \
                    credentialprovider.kubelet.k8s.io/v1\n    args: [get]\n    env:\n      - name: REGION\n        value: north\n";
        std::fs::write(&config, text).unwrap();
        let source = KubeletProviders::new(config, directory.path().to_owned());
        source.lookup(registry, "team/app").await
    }

    #[tokio::test]
    async fn a_program_is_asked_for_the_images_that_it_knows() {
        let answer = r#"read request
case "$request" in *'"image":"r.lan/team/app"'*) ;; *) exit 3 ;; esac
printf '{"kind":"CredentialProviderResponse","cacheKeyType":"Registry","auth":{"*.lan":{"username":"all","password":"p"},'
printf '"r.lan/team":{"username":"%s-%s","password":"s"}}}' "$1" "$REGION""#;
        let found = lookup(answer, "r.lan").await.credential.unwrap();
        assert!(matches!(found, Credential::Basic { username, .. } if username == "get-north"));
        let other = lookup(answer, "r.org").await;
        assert!(
            other.credential.is_none() && other.tried[0].contains("no credential provider"),
            "{other:?}"
        );
        for (script, said) in [
            ("exit 3", "exit status: 3"),
            ("echo hello", "no CredentialProviderResponse"),
            ("echo '{}'", "knows nothing of r.lan/team/app"),
        ] {
            let lookup = lookup(script, "r.lan").await;
            assert!(
                lookup.credential.is_none() && lookup.tried[0].contains(said),
                "{lookup:?}"
            );
        }
    }

    #[tokio::test]
    async fn a_program_outside_the_directory_is_not_run() {
        for name in ["../cloud", "", ".."] {
            let provider = Provider {
                name: name.to_owned(),
                match_images: Vec::new(),
                api_version: first_version(),
                args: None,
                env: None,
            };
            let asked = ask(Path::new("/usr/bin"), &provider, "r.lan/app").await;
            assert!(matches!(asked, Err(ProviderError::Name)));
        }
    }
}
