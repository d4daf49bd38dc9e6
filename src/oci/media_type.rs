//! Media types found in images (image-spec media-types.md, distribution's manifest v2 schema 2, and additions of
//! other tools).
//!
//! A media type is a hint. Registries and tools get it wrong, so [`super::classify`] looks at the document as well.

/// OCI image index.
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// OCI image manifest; artifacts use it too.
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// OCI image config.
pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// Uncompressed OCI layer.
pub const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
/// Gzip OCI layer.
pub const OCI_LAYER_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
/// Zstandard OCI layer.
pub const OCI_LAYER_ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
/// Docker's image index.
pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
/// Docker's manifest.
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
/// Docker's image config.
pub const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";

pub(super) const DOCKER_PLUGIN: &str = "application/vnd.docker.plugin.v1+json";
pub(super) const SCHEMA1: &str = "application/vnd.docker.distribution.manifest.v1+json";
pub(super) const SCHEMA1_SIGNED: &str = "application/vnd.docker.distribution.manifest.v1+prettyjws";
pub(super) const PRE_OCI_LIST: &str = "application/vnd.oci.image.manifest.list.v1+json";
pub(super) const OCI_ARTIFACT: &str = "application/vnd.oci.artifact.manifest.v1+json";
pub(super) const NYDUS_BLOB: &str = "application/vnd.oci.image.layer.nydus.blob.v1";
pub(super) const NYDUS_ARTIFACT: &str = "application/vnd.nydus.image.manifest.v1+json";
const OCI_FOREIGN: &str = "application/vnd.oci.image.layer.nondistributable.v1.tar";
const DOCKER_FOREIGN: &str = "application/vnd.docker.image.rootfs.foreign.diff.tar";

/// Returns the media type without parameters such as `; charset=utf-8`.
pub fn essence(media_type: &str) -> &str {
    media_type.split(';').next().unwrap_or_default().trim()
}

/// Returns whether a config of this type is declared to be an image's.
pub(super) fn is_image_config(media_type: &str) -> bool {
    matches!(essence(media_type), OCI_CONFIG | DOCKER_CONFIG)
}

/// Returns whether a layer of this type may be kept outside the registry.
pub(super) fn is_foreign_layer(media_type: &str) -> bool {
    let media_type = essence(media_type);
    media_type.starts_with(OCI_FOREIGN) || media_type.starts_with(DOCKER_FOREIGN)
}

/// Returns whether blobs of this type are documents, which are never layers.
pub(super) fn is_document(media_type: &str) -> bool {
    let media_type = essence(media_type);
    media_type.ends_with("+json") || media_type == "application/json" || media_type.starts_with("text/")
}

/// Returns a name, for people, of artifacts with this media type or artifact type.
pub(super) fn artifact_name(media_type: &str) -> Option<&'static str> {
    /// First parts of media types. Vendors put versions behind them.
    const ARTIFACTS: &[(&str, &str)] = &[
        ("application/vnd.cncf.helm.", "a Helm chart"),
        ("application/vnd.dev.cosign.", "a cosign signature or attestation"),
        ("application/vnd.dev.sigstore.", "a sigstore bundle"),
        ("application/vnd.cncf.notary.", "a Notation signature"),
        ("application/vnd.in-toto", "a build attestation"),
        ("application/vnd.docker.attestation.", "a build attestation"),
        ("application/vnd.dsse.", "a signed attestation"),
        ("application/vnd.amazon.soci.", "a SOCI index"),
        ("application/vnd.wasm.", "a WebAssembly module"),
        ("application/wasm", "a WebAssembly module"),
        ("application/vnd.cncf.flux.", "a Flux artifact"),
        ("application/vnd.cncf.openpolicyagent.", "a policy bundle"),
        ("application/vnd.cncf.model.", "a model artifact"),
        ("application/vnd.ollama.", "a model artifact"),
        ("application/vnd.docker.ai.", "a model artifact"),
        ("application/vnd.buildkit.cacheconfig.", "a BuildKit build cache"),
        ("application/spdx", "a software bill of materials"),
        ("text/spdx", "a software bill of materials"),
        ("application/vnd.cyclonedx", "a software bill of materials"),
        ("application/vnd.syft", "a software bill of materials"),
        ("application/vnd.oci.empty.", "an OCI artifact"),
        ("application/vnd.unknown.", "an OCI artifact"),
    ];
    let found = ARTIFACTS.iter().find(|(start, _)| media_type.starts_with(start));
    found.map(|(_, name)| *name)
}
