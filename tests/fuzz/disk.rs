//! The disk of a small image, whose content is all in the store. A target makes it once.

use std::fs;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use ocifs::content::Content;
use ocifs::disk::Disk;
use ocifs::image::{Confirm, NamedImage};
use ocifs::layer::LayerContext;
use ocifs::oci::Digest;
use ocifs::registry::RegistryConfig;
use ocifs::source;
use ocifs::store::Store;
use serde_json::json;
use tempfile::TempDir;
use tokio::runtime::Runtime;

/// A disk, with what it needs.
pub struct Served {
    pub disk: Disk,
    pub runtime: Runtime,
    _directory: TempDir,
}

/// Returns the disk.
pub fn served() -> &'static Served {
    static SERVED: OnceLock<Served> = OnceLock::new();
    SERVED.get_or_init(|| {
        let directory = tempfile::tempdir().expect("a directory");
        write_layout(&directory.path().join("layout"));
        let runtime = Runtime::new().expect("a runtime");
        let disk = runtime.block_on(open(directory.path()));
        Served {
            disk,
            runtime,
            _directory: directory,
        }
    })
}

async fn open(directory: &Path) -> Disk {
    let store = Store::open(&directory.join("store")).expect("a store");
    let context = LayerContext::new(store.clone(), 1 << 20, 1 << 30);
    let image = format!("oci:{}", directory.join("layout").display());
    let image = image.parse().expect("a name");
    let named = source::open(&image, RegistryConfig::default()).await.expect("a layout");
    let named = NamedImage::new(named, None, store, Confirm::default());
    let opening = named.open(&context, None).await.expect("an image");
    let image = opening.preparation.finish(&context).await.expect("an image");
    Disk::new(Arc::new(Content::new(image, None)))
}

/// Writes an OCI layout with one uncompressed layer.
fn write_layout(directory: &Path) {
    let mut tar = tar::Builder::new(Vec::new());
    for number in 0u8..4 {
        let content = vec![number; 5000 * usize::from(number)];
        let mut header = tar::Header::new_ustar();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, number.to_string(), &content[..])
            .expect("a tar");
    }
    let tar = tar.into_inner().expect("a tar");
    let blobs = directory.join("blobs/sha256");
    fs::create_dir_all(&blobs).expect("a directory");
    let put = |kind: &str, bytes: &[u8]| {
        let digest = Digest::of(bytes);
        fs::write(blobs.join(digest.hex()), bytes).expect("a file");
        let media_type = format!("application/vnd.oci.image.{kind}");
        json!({"mediaType": media_type, "digest": digest.to_string(), "size": bytes.len()})
    };
    let layer = put("layer.v1.tar", &tar);
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": {},
        "rootfs": {"type": "layers", "diff_ids": [Digest::of(&tar).to_string()]},
    });
    let config = put("config.v1+json", config.to_string().as_bytes());
    let manifest = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config, "layers": [layer],
    });
    let manifest = put("manifest.v1+json", manifest.to_string().as_bytes());
    let index = json!({"schemaVersion": 2, "manifests": [manifest]});
    fs::write(directory.join("index.json"), index.to_string()).expect("a file");
    fs::write(directory.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).expect("a file");
}
