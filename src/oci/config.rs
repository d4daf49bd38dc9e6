//! Image configs (image-spec config.md): the defaults for a container that runs from the image, and the layers'
//! diffIDs.

use std::collections::BTreeMap;

use serde::de::IgnoredAny;
use serde::{Deserialize, Deserializer, Serialize};

use super::descriptor::null_as_default;
use super::document::parse_json;
use super::{DiffId, DocumentError, Platform};

/// An image config. Parsing ignores fields that ocifs does not use, with any content.
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
    /// The diffIDs of the layers.
    #[serde(deserialize_with = "null_as_default")]
    pub rootfs: RootFs,
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
    /// The program that a container runs.
    #[serde(deserialize_with = "null_as_default", skip_serializing_if = "Vec::is_empty")]
    pub entrypoint: Vec<String>,
    /// Arguments to the entry point. Without an entry point, the program and its arguments.
    #[serde(deserialize_with = "null_as_default", skip_serializing_if = "Vec::is_empty")]
    pub cmd: Vec<String>,
    /// Directory in which the program runs.
    #[serde(deserialize_with = "null_as_default", skip_serializing_if = "String::is_empty")]
    pub working_dir: String,
    /// Directories in which the program keeps data, with an empty object each. None of them when the field is of
    /// another type.
    #[serde(
        deserialize_with = "other_type_as_default",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub volumes: BTreeMap<String, Empty>,
    /// What the maker of the image says of it. Nothing when the field is of another type.
    #[serde(
        deserialize_with = "other_type_as_default",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub labels: BTreeMap<String, String>,
    /// Signal that asks the program to end, by name or number. Absent when the field is of another type.
    #[serde(deserialize_with = "other_type_as_default", skip_serializing_if = "Option::is_none")]
    pub stop_signal: Option<String>,
}

/// Reads a field that only containers use. A value of another type than the image-spec's counts as absent, because
/// an image that is only mounted must not fail over it.
fn other_type_as_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum AnyType<T> {
        Right(T),
        Other(IgnoredAny),
    }
    Ok(match AnyType::deserialize(deserializer)? {
        AnyType::Right(value) => value,
        AnyType::Other(IgnoredAny) => T::default(),
    })
}

/// An object without content. What it has is not read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Empty {}

impl<'de> Deserialize<'de> for Empty {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        IgnoredAny::deserialize(deserializer).map(|_| Self {})
    }
}

/// The layers, by what they unpack to.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct RootFs {
    /// The diffIDs, lowest layer first.
    #[serde(deserialize_with = "null_as_default")]
    pub diff_ids: Vec<DiffId>,
}

impl ImageConfig {
    /// Parses an image config.
    pub fn parse(bytes: &[u8]) -> Result<Self, DocumentError> {
        parse_json(bytes)
    }

    /// Returns the platform that the image says it is for.
    pub fn platform(&self) -> Platform {
        Platform {
            architecture: self.architecture.clone(),
            os: self.os.clone(),
            variant: self.variant.clone(),
            ..Platform::default()
        }
    }
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
        assert!(config.config.cmd.is_empty());
        assert_eq!(config.config.working_dir, "/srv");
        assert_eq!(config.config.labels["a"], "b");
        assert_eq!(config.rootfs.diff_ids[0].to_string(), diff_id);
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
    fn fields_without_use_may_hold_anything() {
        for text in [
            r#"{"config":{"Labels":{"a":1},"ExposedPorts":["80"],"Volumes":"/x","StopSignal":9}}"#,
            r#"{"history":[{"created_by":[]},7]}"#,
        ] {
            assert_eq!(ImageConfig::parse(text.as_bytes()).unwrap(), ImageConfig::default());
        }
    }

    #[test]
    fn wrong_types_name_the_field() {
        for (text, field) in [
            (r#"{"config":{"Env":"A=b"}}"#, "`config.Env`"),
            (r#"{"rootfs":{"diff_ids":["sha256:x"]}}"#, "`rootfs.diff_ids[0]`"),
            (r#"{"os":1}"#, "`os`"),
        ] {
            let error = ImageConfig::parse(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(field), "{error}");
        }
    }
}
