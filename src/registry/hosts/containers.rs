//! `registries.conf` of the containers tools, version 2: other locations and mirrors for names that begin with a prefix.
//!
//! ```toml
//! [[registry]]
//! prefix = "docker.io/library"
//! location = "docker.io/library"
//!
//! [[registry.mirror]]
//! location = "mirror.lan:5000/hub"
//! pull-from-mirror = "digest-only"
//! ```
//! Of all prefixes, the longest that fits counts. A location takes the place of the prefix: the mirror above has
//! `docker.io/library/alpine` as `mirror.lan:5000/hub/alpine`. Short names are not looked up: without a registry, a name
//! means `docker.io`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::{malformed, read};
use crate::blob::BlobError;
use crate::oci::shown;

/// A registry of the files, with the locations of one image.
#[derive(Debug)]
pub(super) struct ConfiguredRegistry {
    /// The file that has the entry.
    pub(super) file: PathBuf,
    /// The mirrors, and last the location of the registry itself.
    pub(super) locations: Vec<Location>,
}

/// A location of an image.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Location {
    /// Host and repository.
    pub(super) name: String,
    /// Whether any certificate will do, or none.
    pub(super) is_insecure: bool,
    pub(super) pulls: PullFrom,
}

/// What a mirror is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum PullFrom {
    #[default]
    All,
    DigestOnly,
    TagOnly,
}

#[derive(Deserialize)]
struct ConfFile {
    #[serde(default)]
    registry: Vec<ConfRegistry>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct ConfRegistry {
    #[serde(default)]
    prefix: String,
    #[serde(default)]
    location: String,
    #[serde(default)]
    insecure: bool,
    #[serde(default)]
    blocked: bool,
    #[serde(default)]
    mirror: Vec<ConfMirror>,
    #[serde(default)]
    mirror_by_digest_only: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct ConfMirror {
    location: String,
    #[serde(default)]
    insecure: bool,
    pull_from_mirror: Option<PullFrom>,
}

/// Finds the entry for an image, `name` being its host and repository. Reads the first file of `files` that exists, and
/// those in the directories `more`.
///
/// Fails if a file is malformed or if the registry is blocked.
pub(super) fn find(files: &[PathBuf], more: &[PathBuf], name: &str) -> Result<Option<ConfiguredRegistry>, BlobError> {
    let mut entries: BTreeMap<String, (PathBuf, ConfRegistry)> = BTreeMap::new();
    let main = files.iter().find(|file| file.exists()).cloned();
    for path in main
        .into_iter()
        .chain(more.iter().flat_map(|directory| drop_ins(directory)))
    {
        for (prefix, entry) in entries_of(&path)? {
            entries.insert(prefix, (path.clone(), entry));
        }
    }
    let fitting = entries
        .iter()
        .filter_map(|(prefix, entry)| Some((prefix, rest(name, prefix)?, entry)));
    let Some((prefix, rest, (file, entry))) = fitting.max_by_key(|(prefix, ..)| prefix.len()) else {
        return Ok(None);
    };
    if entry.blocked {
        return Err(BlobError::Invalid {
            what: name.to_owned(),
            reason: format!("{} blocks {}", file.display(), shown(prefix)),
        });
    }
    let located = |location: &str| match trimmed(location) {
        // Only a wildcard may leave out the location. It then changes nothing.
        "" => name.to_owned(),
        location => format!("{location}{rest}"),
    };
    let mut locations = Vec::new();
    for mirror in &entry.mirror {
        let stated = mirror.pull_from_mirror.unwrap_or_default();
        locations.push(Location {
            name: located(&mirror.location),
            is_insecure: mirror.insecure,
            pulls: if entry.mirror_by_digest_only {
                PullFrom::DigestOnly
            } else {
                stated
            },
        });
    }
    locations.push(Location {
        name: located(&entry.location),
        is_insecure: entry.insecure,
        pulls: PullFrom::All,
    });
    Ok(Some(ConfiguredRegistry {
        file: file.clone(),
        locations,
    }))
}

/// Returns the files `*.conf` of a directory in the order of their names. A directory that is not there has none.
fn drop_ins(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).into_iter().flatten();
    let mut files: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "conf") && path.is_file())
        .collect();
    files.sort();
    files
}

/// Reads the entries of a file with their prefixes.
fn entries_of(path: &Path) -> Result<Vec<(String, ConfRegistry)>, BlobError> {
    let Some(text) = read(path)? else { return Ok(Vec::new()) };
    let file: ConfFile = toml::from_str(&text).map_err(|error| malformed(path, &text, &error))?;
    let invalid = |reason: String| BlobError::Invalid {
        what: path.display().to_string(),
        reason,
    };
    let mut entries = Vec::new();
    for entry in file.registry {
        let locations = entry
            .mirror
            .iter()
            .map(|mirror| &mirror.location)
            .chain([&entry.location]);
        for location in locations {
            if location.contains("://") {
                return Err(invalid(format!(
                    "the location `{}` must not have a scheme",
                    shown(location)
                )));
            }
        }
        let prefix = match trimmed(&entry.prefix) {
            "" => trimmed(&entry.location),
            prefix => prefix,
        };
        let is_wildcard = prefix.starts_with("*.");
        if prefix.is_empty() || trimmed(&entry.location).is_empty() && !is_wildcard {
            return Err(invalid("a [[registry]] has no location".to_owned()));
        }
        if entry.mirror.iter().any(|mirror| trimmed(&mirror.location).is_empty()) {
            return Err(invalid(format!("a mirror of `{}` has no location", shown(prefix))));
        }
        entries.push((prefix.to_owned(), entry));
    }
    Ok(entries)
}

fn trimmed(location: &str) -> &str {
    location.trim_end_matches('/')
}

/// Returns what follows a prefix in a name, or none if the name does not begin with the prefix. `*.example.com` stands for
/// all hosts below `example.com`.
fn rest<'a>(name: &'a str, prefix: &str) -> Option<&'a str> {
    let rest = match prefix.strip_prefix('*') {
        None => name.strip_prefix(prefix)?,
        Some(suffix) => {
            let (host, _) = name.split_once('/').unwrap_or((name, ""));
            let (below, path) = suffix
                .split_once('/')
                .map_or((suffix, None), |(below, path)| (below, Some(path)));
            let host_name = host.strip_suffix(below).filter(|start| !start.is_empty());
            host_name?;
            let after = &name[host.len()..];
            match path {
                None => after,
                Some(path) => after.strip_prefix('/')?.strip_prefix(path)?,
            }
        }
    };
    (rest.is_empty() || rest.starts_with('/')).then_some(rest)
}
