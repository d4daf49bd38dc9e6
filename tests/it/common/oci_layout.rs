//! Writes images as OCI layouts: a source that needs no registry.

use std::fs;
use std::path::Path;

use ocifs::oci::Digest;

use super::layers::{Blob, config, descriptor, manifest};
use super::registry::MANIFEST;

/// Writes an image of these layers as the layout `directory`. Returns the name of the image for ocifs.
pub fn write(directory: &Path, layers: &[Blob]) -> String {
    let blobs = directory.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let put = |bytes: &[u8]| fs::write(blobs.join(Digest::of(bytes).hex()), bytes).unwrap();
    let config = config(layers).to_string().into_bytes();
    let manifest = manifest(&config, layers).to_string().into_bytes();
    let index = serde_json::json!({"schemaVersion": 2, "manifests": [descriptor(MANIFEST, &manifest)]});
    for bytes in layers.iter().map(|layer| &layer.bytes).chain([&config, &manifest]) {
        put(bytes);
    }
    fs::write(directory.join("index.json"), index.to_string()).unwrap();
    fs::write(directory.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    format!("oci:{}", directory.display())
}
