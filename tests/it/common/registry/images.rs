//! Documents of small images.

use ocifs::oci::Digest;

/// Media type of image manifests.
pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// Media type of image indexes.
pub const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// The documents of an image.
pub struct ImageDocuments {
    pub config: Vec<u8>,
    pub manifest: Vec<u8>,
}

/// Returns the documents of an image with these uncompressed layers.
pub fn image(layers: &[Vec<u8>]) -> ImageDocuments {
    let diff_ids: Vec<String> = layers.iter().map(|layer| Digest::of(layer).to_string()).collect();
    let config = serde_json::json!({
        "architecture": architecture(), "os": "linux", "config": {},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    let config = serde_json::to_vec(&config).unwrap();
    let descriptor = |media_type: &str, bytes: &[u8]| serde_json::json!({"mediaType": media_type, "digest": Digest::of(bytes), "size": bytes.len()});
    let layer = "application/vnd.oci.image.layer.v1.tar";
    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": MANIFEST,
        "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
        "layers": layers.iter().map(|bytes| descriptor(layer, bytes)).collect::<Vec<_>>(),
    });
    ImageDocuments {
        config,
        manifest: serde_json::to_vec(&manifest).unwrap(),
    }
}

/// Returns this machine's processor as image documents name it.
pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}
