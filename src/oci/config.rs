//! Image configs (image-spec config.md): what a container run from the image starts with, and the layers' diffIDs.

use std::collections::{BTreeMap, BTreeSet};

use serde::de::IgnoredAny;
use serde::{Deserialize, Deserializer, Serialize};

use super::descriptor::null_as_default;
use super::document::parse_json;
use super::{DiffId, DocumentError, Platform};

/// An image config; fields ocifs has no use for are ignored.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ImageConfig {
    /// Processor, as GOARCH.
    #[serde(deserialize_with = "null_as_default")]
    pub architecture: String,
    /// Operating system, as GOOS.
    #[serde(deserialize_with = "null_as_default")]
    pub os: String,
    /// Processor variant.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
    /// Defaults for running a container.
    #[serde(deserialize_with = "null_as_default")]
    pub config: RunConfig,
    /// The layers.
    #[serde(deserialize_with = "null_as_default")]
    pub rootfs: RootFs,
    /// How the image was built. Often incomplete: says nothing about the layers.
    #[serde(deserialize_with = "null_as_default")]
    pub history: Vec<History>,
}

/// Defaults for running a container.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct RunConfig {
    /// User and group, by name or number: `user[:group]`.
    #[serde(deserialize_with = "null_as_default", skip_serializing_if = "String::is_empty")]
    pub user: String,
    /// Environment, as `NAME=value`.
    #[serde(deserialize_with = "null_as_default", skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<String>,
    /// What is run.
    #[serde(deserialize_with = "null_as_default", skip_serializing_if = "Vec::is_empty")]
    pub entrypoint: Vec<String>,
    /// Arguments to the entry point, or what is run when there is none.
    #[serde(deserialize_with = "null_as_default", skip_serializing_if = "Vec::is_empty")]
    pub cmd: Vec<String>,
    /// Directory it is run in.
    #[serde(deserialize_with = "null_as_default", skip_serializing_if = "String::is_empty")]
    pub working_dir: String,
    /// Labels.
    #[serde(deserialize_with = "null_as_default", skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Ports, as `80/tcp`.
    #[serde(
        deserialize_with = "keys",
        serialize_with = "as_keys",
        skip_serializing_if = "BTreeSet::is_empty"
    )]
    pub exposed_ports: BTreeSet<String>,
    /// Directories meant to be volumes.
    #[serde(
        deserialize_with = "keys",
        serialize_with = "as_keys",
        skip_serializing_if = "BTreeSet::is_empty"
    )]
    pub volumes: BTreeSet<String>,
    /// Signal that asks it to stop.
    #[serde(deserialize_with = "null_as_default", skip_serializing_if = "String::is_empty")]
    pub stop_signal: String,
}

/// The layers, by what they unpack to.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct RootFs {
    /// diffIDs, lowest layer first.
    #[serde(deserialize_with = "null_as_default")]
    pub diff_ids: Vec<DiffId>,
}

/// One step of the build.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct History {
    /// When, as RFC 3339.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub created: Option<String>,
    /// The command.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub created_by: Option<String>,
    /// Who.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub author: Option<String>,
    /// Free text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub comment: Option<String>,
    /// Whether the step made no layer.
    #[serde(deserialize_with = "null_as_default")]
    pub empty_layer: bool,
}

impl ImageConfig {
    /// Parses an image config.
    pub fn parse(bytes: &[u8]) -> Result<Self, DocumentError> {
        parse_json(bytes)
    }

    /// The platform the image says it is for.
    pub fn platform(&self) -> Platform {
        Platform {
            architecture: self.architecture.clone(),
            os: self.os.clone(),
            variant: self.variant.clone(),
            ..Platform::default()
        }
    }
}

/// The keys of a Go `map[string]struct{}`.
fn keys<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeSet<String>, D::Error> {
    let map = Option::<BTreeMap<String, IgnoredAny>>::deserialize(deserializer)?;
    Ok(map.unwrap_or_default().into_keys().collect())
}

fn as_keys<S: serde::Serializer>(keys: &BTreeSet<String>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(keys.iter().map(|key| (key, BTreeMap::<(), ()>::new())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_config_as_docker_writes_it_parses() {
        let diff_id = format!("sha256:{}", "5".repeat(64));
        let text = format!(
            r#"{{"architecture":"arm64","os":"linux","variant":"v8","author":"x","container_config":{{"Env":1}},
            "config":{{"Hostname":"","User":"1000:1000","Env":["PATH=/bin","A=b=c"],"Cmd":null,"Entrypoint":["/init"],
              "WorkingDir":"/srv","Labels":{{"a":"b"}},"ExposedPorts":{{"80/tcp":{{}},"53/udp":{{}}}},"Volumes":null,
              "StopSignal":"SIGQUIT","OnBuild":[]}},
            "rootfs":{{"type":"layers","diff_ids":["{diff_id}"]}},
            "history":[{{"created":"2024-01-01T00:00:00Z","created_by":"ADD x","empty_layer":true}},{{}}]}}"#
        );
        let config = ImageConfig::parse(text.as_bytes()).unwrap();
        assert_eq!(config.platform().to_string(), "linux/arm64/v8");
        assert_eq!(config.config.user, "1000:1000");
        assert_eq!(config.config.env, ["PATH=/bin", "A=b=c"]);
        assert_eq!(config.config.entrypoint, ["/init"]);
        assert!(config.config.cmd.is_empty() && config.config.volumes.is_empty());
        assert_eq!(config.config.working_dir, "/srv");
        assert_eq!(config.config.labels["a"], "b");
        assert!(config.config.exposed_ports.contains("53/udp") && config.config.exposed_ports.len() == 2);
        assert_eq!(config.config.stop_signal, "SIGQUIT");
        assert_eq!(config.rootfs.diff_ids[0].to_string(), diff_id);
        assert!(config.history[0].empty_layer && !config.history[1].empty_layer);
        let again = ImageConfig::parse(&serde_json::to_vec(&config).unwrap()).unwrap();
        assert_eq!(again, config);
    }

    #[test]
    fn absent_and_null_parts_are_empty() {
        for text in [
            "{}",
            r#"{"config":null,"rootfs":null,"history":null,"architecture":null}"#,
        ] {
            assert_eq!(ImageConfig::parse(text.as_bytes()).unwrap(), ImageConfig::default());
        }
    }

    #[test]
    fn wrong_types_name_the_field() {
        for (text, field) in [
            (r#"{"config":{"Env":"A=b"}}"#, "`config.Env`"),
            (r#"{"config":{"Labels":{"a":1}}}"#, "`config.Labels.a`"),
            (r#"{"rootfs":{"diff_ids":["sha256:x"]}}"#, "`rootfs.diff_ids[0]`"),
            (r#"{"history":[{},{"created_by":[]}]}"#, "`history[1].created_by`"),
            (r#"{"os":1}"#, "`os`"),
        ] {
            let error = ImageConfig::parse(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(field), "{error}");
        }
    }
}
