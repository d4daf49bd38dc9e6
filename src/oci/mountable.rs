//! Which documents make an image that can be mounted.

use super::{Descriptor, DocumentError, ImageConfig, Manifest, Refusal, media_type};

/// Layer annotation of the layer that holds nydus metadata.
const NYDUS_BOOTSTRAP: &str = "containerd.io/snapshot/nydus-bootstrap";
/// Layer annotation of a nydus data blob.
const NYDUS_BLOB: &str = "containerd.io/snapshot/nydus-blob";
/// Layer annotation of a nydus blob that describes an ordinary layer.
const NYDUS_REF: &str = "containerd.io/snapshot/nydus-ref";
/// Annotation with which BuildKit marks attestation manifests.
const REFERENCE_TYPE: &str = "vnd.docker.reference.type";

impl Manifest {
    /// Returns why the manifest is no mountable image, as far as the manifest alone tells. Leaves a config of an
    /// unknown type to [`ImageConfig::check`].
    pub fn refusal(&self) -> Option<Refusal> {
        let config = media_type::essence(&self.config.media_type);
        let artifact_type = self.artifact_type.as_deref().unwrap_or_default();
        if config == media_type::DOCKER_PLUGIN {
            return Some(Refusal::DockerPlugin);
        }
        if artifact_type == media_type::NYDUS_ARTIFACT || self.layers.iter().any(is_nydus_layer) {
            return Some(Refusal::Nydus);
        }
        for named in [artifact_type, config] {
            if media_type::artifact_name(named).is_some() {
                // An artifact with an empty config says what it is in its artifact type.
                let better = if artifact_type.is_empty() { named } else { artifact_type };
                return Some(Refusal::artifact(better));
            }
        }
        self.layers.iter().find_map(layer_refusal)
    }

    /// Returns what the manifest is if its config turns out not to be an image's: an artifact, unless the config is
    /// declared as an image's.
    pub(crate) fn refusal_without_config(&self) -> Option<Refusal> {
        let config = &self.config.media_type;
        let declared = config.is_empty() || media_type::is_image_config(config);
        (!declared).then(|| Refusal::artifact(self.artifact_type.as_deref().unwrap_or(config)))
    }
}

impl ImageConfig {
    /// Checks that the config makes the manifest an image that can be mounted: Linux, with one diffID for each layer.
    pub fn check(&self, manifest: &Manifest) -> Result<(), DocumentError> {
        if self.rootfs.diff_ids.is_empty()
            && let Some(refusal) = manifest.refusal_without_config()
        {
            return Err(refusal.into());
        }
        if self.os.eq_ignore_ascii_case("windows") {
            return Err(Refusal::Windows.into());
        }
        if self.rootfs.diff_ids.len() != manifest.layers.len() {
            return Err(DocumentError::LayerCount {
                layers: manifest.layers.len(),
                diff_ids: self.rootfs.diff_ids.len(),
            });
        }
        Ok(())
    }
}

fn layer_refusal(layer: &Descriptor) -> Option<Refusal> {
    let media_type = media_type::essence(&layer.media_type);
    let digest = layer.digest.clone();
    if media_type.ends_with("+encrypted") {
        return Some(Refusal::Encrypted {
            digest,
            media_type: media_type.to_owned(),
        });
    }
    if media_type::artifact_name(media_type).is_some() {
        return Some(Refusal::artifact(media_type));
    }
    media_type::is_document(media_type).then(|| Refusal::NotALayer {
        digest,
        media_type: media_type.to_owned(),
    })
}

fn is_nydus_layer(layer: &Descriptor) -> bool {
    let annotated = |key| layer.annotations.get(key).is_some_and(|value| value == "true");
    media_type::essence(&layer.media_type) == media_type::NYDUS_BLOB
        || annotated(NYDUS_BOOTSTRAP)
        || annotated(NYDUS_BLOB)
        || layer.annotations.contains_key(NYDUS_REF)
}

/// Returns whether an image index entry accompanies the images and is none itself. Such entries are attestations,
/// nydus alternatives, and indexes such as SOCI v2. An index of SOCI v2 has the platform and media type of its image.
pub(crate) fn is_companion(entry: &Descriptor) -> bool {
    let artifact = entry.artifact_type.as_deref().unwrap_or_default();
    let unknown = entry
        .platform
        .as_ref()
        .is_some_and(|p| p.os == "unknown" && p.architecture == "unknown");
    unknown
        || entry.annotations.contains_key(REFERENCE_TYPE)
        || (!artifact.is_empty() && !media_type::is_image_config(artifact))
        || entry
            .platform
            .as_ref()
            .is_some_and(|p| p.os_features.iter().any(|f| f.starts_with("nydus.")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::Digest;
    use crate::oci::media_type::{DOCKER_CONFIG, OCI_CONFIG, OCI_LAYER_GZIP};

    const IMAGE_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";

    fn digest(of: u8) -> String {
        Digest::of(&[of]).to_string()
    }

    fn manifest(config: &str, layers: &[&str], more: &str) -> Manifest {
        let layer = |(i, media_type): (usize, &&str)| {
            format!(
                r#"{{"mediaType":"{media_type}","digest":"{}","size":1}}"#,
                digest(i as u8)
            )
        };
        let layers: Vec<String> = layers.iter().enumerate().map(layer).collect();
        let text = format!(
            r#"{{"schemaVersion":2,"mediaType":"{IMAGE_TYPE}",{more}"config":{{"mediaType":"{config}","digest":"{}","size":-1}},"layers":[{}]}}"#,
            digest(99),
            layers.join(",")
        );
        Manifest::parse(text.as_bytes()).unwrap()
    }

    fn config(text: &str) -> ImageConfig {
        ImageConfig::parse(text.as_bytes()).unwrap()
    }

    #[test]
    fn images_pass() {
        for config in [OCI_CONFIG, DOCKER_CONFIG, "", "application/octet-stream", "text/html"] {
            for layer in [
                OCI_LAYER_GZIP,
                "application/vnd.oci.image.layer.v1.tar",
                "application/vnd.oci.image.layer.v1.tar.gz",
                "application/vnd.oci.image.layer.v1.tar+zstd",
                "application/vnd.docker.image.rootfs.diff.tar",
                "application/vnd.docker.image.rootfs.diff.tar.gzip",
                "application/octet-stream",
                "application/vnd.erofs.layer.v1",
                "",
            ] {
                assert_eq!(
                    manifest(config, &[layer, OCI_LAYER_GZIP], "").refusal(),
                    None,
                    "{config} {layer}"
                );
            }
        }
        assert_eq!(manifest(OCI_CONFIG, &[], "").refusal(), None);
    }

    #[test]
    fn everything_else_is_refused_by_name() {
        let helm_layer = "application/vnd.cncf.helm.chart.content.v1.tar+gzip";
        let empty = "application/vnd.oci.empty.v1+json";
        for (config, layers, more, words) in [
            (
                OCI_CONFIG,
                &["application/vnd.oci.image.layer.v1.tar+gzip+encrypted"][..],
                "",
                "is encrypted",
            ),
            (
                DOCKER_CONFIG,
                &["application/vnd.docker.image.rootfs.diff.tar.gzip+encrypted"],
                "",
                "is encrypted",
            ),
            (
                "application/vnd.docker.plugin.v1+json",
                &[OCI_LAYER_GZIP],
                "",
                "docker plugin install",
            ),
            (
                "application/vnd.cncf.helm.config.v1+json",
                &[helm_layer],
                "",
                "a Helm chart",
            ),
            (
                OCI_CONFIG,
                &["application/vnd.dev.cosign.simplesigning.v1+json"],
                "",
                "a cosign signature",
            ),
            (OCI_CONFIG, &["application/vnd.in-toto+json"], "", "a build attestation"),
            (
                "application/vnd.wasm.config.v0+json",
                &["application/wasm"],
                "",
                "a WebAssembly module",
            ),
            (
                empty,
                &["application/x-thing"],
                r#""artifactType":"application/x-thing","#,
                "application/x-thing",
            ),
            (
                empty,
                &[empty],
                r#""artifactType":"application/spdx+json","#,
                "a software bill of materials",
            ),
            (
                "application/vnd.amazon.soci.index.v1+json",
                &["application/octet-stream"],
                "",
                "a SOCI index",
            ),
            (
                OCI_CONFIG,
                &[OCI_LAYER_GZIP],
                r#""artifactType":"application/vnd.amazon.soci.index.v2+json","#,
                "a SOCI index",
            ),
            (
                OCI_CONFIG,
                &["application/vnd.oci.image.layer.nydus.blob.v1", OCI_LAYER_GZIP],
                "",
                "nydus",
            ),
            (
                OCI_CONFIG,
                &[],
                r#""artifactType":"application/vnd.nydus.image.manifest.v1+json","#,
                "nydus",
            ),
            (OCI_CONFIG, &["application/json"], "", "is no file system layer"),
            (
                OCI_CONFIG,
                &["text/plain; charset=utf-8"],
                "",
                "is no file system layer",
            ),
        ] {
            let refusal = manifest(config, layers, more)
                .refusal()
                .unwrap_or_else(|| panic!("{config} {layers:?}"));
            assert!(refusal.to_string().contains(words), "{refusal} / {words}");
        }
        let mut bootstrap = manifest(OCI_CONFIG, &[OCI_LAYER_GZIP], "");
        bootstrap.layers[0]
            .annotations
            .insert(NYDUS_BOOTSTRAP.into(), "true".into());
        assert_eq!(bootstrap.refusal(), Some(Refusal::Nydus));
        // A foreign layer may be missing. That shows when it is read.
        for foreign in [
            "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
            "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd",
        ] {
            let manifest = manifest(OCI_CONFIG, &[foreign], "");
            assert_eq!(manifest.refusal(), None);
            assert!(manifest.layers[0].is_foreign());
        }
    }

    #[test]
    fn the_config_has_the_last_word() {
        let one = manifest(OCI_CONFIG, &[OCI_LAYER_GZIP], "");
        let rootfs = format!(r#""rootfs":{{"type":"layers","diff_ids":["{}"]}}"#, digest(1));
        assert_eq!(config(&format!(r#"{{"os":"linux",{rootfs}}}"#)).check(&one), Ok(()));
        assert_eq!(
            config(&format!(r#"{{"os":"Windows",{rootfs}}}"#)).check(&one),
            Err(Refusal::Windows.into())
        );
        assert_eq!(
            config("{}").check(&one),
            Err(DocumentError::LayerCount { layers: 1, diff_ids: 0 })
        );
        assert_eq!(
            config(&format!("{{{rootfs}}}")).check(&manifest(OCI_CONFIG, &[], "")),
            Err(DocumentError::LayerCount { layers: 0, diff_ids: 1 })
        );
        let odd = manifest("application/x-odd", &[OCI_LAYER_GZIP], "");
        assert_eq!(config(&format!("{{{rootfs}}}")).check(&odd), Ok(()));
        let error = config("{}").check(&odd).unwrap_err().to_string();
        assert!(error.contains("an OCI artifact (`application/x-odd`)"), "{error}");
        assert_eq!(config("{}").check(&manifest(OCI_CONFIG, &[], "")), Ok(()));
    }
}
