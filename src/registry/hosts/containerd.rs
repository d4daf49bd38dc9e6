//! Containerd's `hosts.toml`: the hosts to ask for the images of a registry, in the order of the file, and last the
//! server.
//!
//! ```toml
//! server = "https://registry-1.docker.io"
//!
//! [host."https://mirror.lan:5000"]
//!   capabilities = ["pull", "resolve"]
//!   ca = "mirror.crt"
//! ```
//! `/v2` is added to the path of a URL unless the path ends with it, or unless `override_path` says that the URL is that of
//! the API. Paths of files are relative to the directory of the file. Without capabilities, a host has all of them.

use std::collections::HashMap;
use std::path::Path;

use reqwest::Url;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use serde::Deserialize;
use toml::Spanned;

use super::{malformed, read};
use crate::blob::BlobError;
use crate::oci::shown;
use crate::registry::host_settings::{ClientFiles, HostTls};

const FILE: &str = "hosts.toml";

/// A host of a file, or its server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ContainerdHost {
    /// Base URL of the API. None for a server that the file does not name: the registry itself.
    pub(super) base: Option<Url>,
    pub(super) resolves: bool,
    pub(super) pulls: bool,
    pub(super) tls: HostTls,
    pub(super) headers: HeaderMap,
}

#[derive(Deserialize)]
struct HostsFile {
    server: Option<String>,
    #[serde(flatten)]
    own: HostTable,
    #[serde(default)]
    host: HashMap<Spanned<String>, HostTable>,
}

#[derive(Default, Deserialize)]
struct HostTable {
    #[serde(default)]
    capabilities: Vec<String>,
    ca: Option<Texts>,
    client: Option<ClientValue>,
    #[serde(default)]
    skip_verify: bool,
    #[serde(default)]
    override_path: bool,
    #[serde(default)]
    header: HashMap<String, Texts>,
}

/// A text or a list of texts.
#[derive(Deserialize)]
#[serde(untagged)]
enum Texts {
    One(String),
    Many(Vec<String>),
}

impl Texts {
    fn into_vec(self) -> Vec<String> {
        match self {
            Self::One(text) => vec![text],
            Self::Many(texts) => texts,
        }
    }
}

/// One file, or a list of files and of pairs of files.
#[derive(Deserialize)]
#[serde(untagged)]
enum ClientValue {
    File(String),
    List(Vec<ClientEntry>),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum ClientEntry {
    File(String),
    Pair([String; 2]),
}

/// Returns the names that the directory of a host may have, in the order of precedence. A port is written with
/// underscores where a colon is not allowed in names.
pub(super) fn directories(host: &str) -> Vec<String> {
    match host.rsplit_once(':') {
        Some((name, port)) if !port.ends_with(']') => vec![format!("{name}_{port}_"), host.to_owned()],
        _ => vec![host.to_owned()],
    }
}

/// Reads the file in the directory of a host. The last host is the server. Returns none if there is no file.
pub(super) fn read_hosts(directory: &Path) -> Result<Option<Vec<ContainerdHost>>, BlobError> {
    let path = directory.join(FILE);
    let Some(text) = read(&path)? else { return Ok(None) };
    if text.trim().is_empty() {
        return Ok(None);
    }
    let file: HostsFile = toml::from_str(&text).map_err(|error| malformed(&path, &text, &error))?;
    let invalid = |reason: String| BlobError::Invalid {
        what: path.display().to_string(),
        reason,
    };
    let mut listed: Vec<_> = file.host.into_iter().collect();
    listed.sort_by_key(|(url, _)| url.span().start);
    let mut hosts = Vec::new();
    for (url, table) in listed {
        let base = api(url.get_ref(), table.override_path).map_err(invalid)?;
        hosts.push(host(Some(base), table, directory).map_err(invalid)?);
    }
    let server = match file.server.filter(|server| !server.is_empty()) {
        Some(server) => Some(api(&server, file.own.override_path).map_err(invalid)?),
        None => None,
    };
    hosts.push(host(server, file.own, directory).map_err(invalid)?);
    Ok(Some(hosts))
}

/// Returns the base URL of the API of a host.
fn api(text: &str, is_api: bool) -> Result<Url, String> {
    let complete = match text.contains("://") {
        true => text.to_owned(),
        false => format!("https://{text}"),
    };
    let unusable = || format!("`{}` is not the URL of a host", shown(text));
    let given = Url::parse(&complete).map_err(|_| unusable())?;
    if !matches!(given.scheme(), "http" | "https") || given.host_str().is_none() {
        return Err(unusable());
    }
    let path: Vec<&str> = given.path().split('/').filter(|part| !part.is_empty()).collect();
    let mut path = path.join("/");
    if !is_api && path != "v2" && !path.ends_with("/v2") {
        path = format!("{path}/v2");
    }
    let mut base = given.clone();
    base.set_query(None);
    base.set_fragment(None);
    // Logins come from the files of logins. Errors would show one that is in a URL.
    base.set_username("")
        .and(base.set_password(None))
        .map_err(|()| unusable())?;
    base.set_path(&match path.trim_matches('/') {
        "" => "/".to_owned(),
        path => format!("/{path}/"),
    });
    Ok(base)
}

fn host(base: Option<Url>, table: HostTable, directory: &Path) -> Result<ContainerdHost, String> {
    let mut headers = HeaderMap::new();
    for (name, values) in table.header {
        let name: HeaderName = name.parse().map_err(|_| format!("`{}` is no header", shown(&name)))?;
        for value in values.into_vec() {
            let mut value =
                HeaderValue::try_from(value).map_err(|_| format!("the value of the header `{name}` cannot be sent"))?;
            value.set_sensitive(true);
            headers.append(name.clone(), value);
        }
    }
    let known = ["pull", "resolve", "push"];
    if let Some(other) = table
        .capabilities
        .iter()
        .find(|other| !known.iter().any(|known| known.eq_ignore_ascii_case(other)))
    {
        return Err(format!("`{}` is no capability", shown(other)));
    }
    let can = |name: &str| {
        table.capabilities.is_empty() || table.capabilities.iter().any(|given| given.eq_ignore_ascii_case(name))
    };
    let single = |file: String| ClientFiles {
        certificate: directory.join(file),
        key: None,
    };
    let clients = match table.client {
        None => Vec::new(),
        Some(ClientValue::File(file)) => vec![single(file)],
        Some(ClientValue::List(entries)) => {
            let files = entries.into_iter().map(|entry| match entry {
                ClientEntry::File(file) => single(file),
                // An empty name means that the key is in the file of the certificate.
                ClientEntry::Pair([certificate, key]) => ClientFiles {
                    certificate: directory.join(certificate),
                    key: (!key.is_empty()).then(|| directory.join(key)),
                },
            });
            files.collect()
        }
    };
    let authorities = table.ca.map(Texts::into_vec).unwrap_or_default();
    Ok(ContainerdHost {
        base,
        resolves: can("resolve"),
        pulls: can("pull"),
        tls: HostTls {
            authorities: authorities.into_iter().map(|file| directory.join(file)).collect(),
            clients,
            is_unverified: table.skip_verify,
        },
        headers,
    })
}
