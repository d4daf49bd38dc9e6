//! `ocifs images` and `ocifs cache rm`: what the store knows, and the removal of single images.

use std::path::Path;

use serde_json::Value;

use crate::common::layers::{Blob, Tar, noise, push};
use crate::common::ocifs::{Ocifs, bounded};
use crate::common::registry::TestRegistry;

const FILE: usize = 400 << 10;

/// Two images that share their base, and a host that has pulled both.
struct Scene {
    registry: TestRegistry,
    host: Ocifs,
    layers: [Blob; 3],
}

impl Scene {
    fn new() -> Self {
        let registry = TestRegistry::start();
        // Text, so that unpacked data takes more than the compressed layer.
        let layer = |name: &str, seed| {
            let text: String = noise(seed, FILE / 4).iter().map(|byte| format!("{byte:03} ")).collect();
            Blob::gzip(&Tar::new().file(name, text).finish())
        };
        let layers = [layer("base", 1), layer("one", 2), layer("two", 3)];
        let [base, one, two] = &layers;
        push(&registry, "app", "one", &[base.clone(), one.clone()]);
        push(&registry, "app", "two", &[base.clone(), two.clone()]);
        let scene = Self {
            registry,
            host: Ocifs::new(),
            layers,
        };
        for tag in ["one", "two"] {
            scene.host.ok(["pull", &scene.image(tag)]);
        }
        scene
    }

    fn image(&self, tag: &str) -> String {
        format!("{}/app:{tag}", self.registry.host())
    }

    fn images(&self) -> Vec<Value> {
        self.host.ok(["images", "--json"]).json().as_array().unwrap().clone()
    }

    /// Returns the row of the image with this tag.
    fn row(&self, tag: &str) -> Option<Value> {
        let name = Value::from(self.image(tag));
        self.images()
            .into_iter()
            .find(|row| row["names"].as_array().unwrap().contains(&name))
    }

    /// Whether the store has a directory for a layer.
    fn has(&self, layer: usize) -> bool {
        let name = self.layers[layer].digest().to_string().replacen(':', "-", 1);
        self.host.store().join("layers").join(name).exists()
    }

    fn rm(&self, image: &str) -> Value {
        self.host.ok(["cache", "rm", "--json", image]).json()
    }
}

/// Bytes on disk of a directory.
fn du(path: &Path) -> u64 {
    let said = bounded(
        std::process::Command::new("du")
            .args(["-s", "--block-size=512"])
            .arg(path),
    );
    said.text().split('\t').next().unwrap().parse::<u64>().unwrap() * 512
}

fn number(row: &Value, field: &str) -> u64 {
    row[field].as_u64().unwrap_or_else(|| panic!("{field}: {row}"))
}

#[test]
fn images_say_how_much_of_them_is_there() {
    let scene = Scene::new();
    let row = scene.row("one").unwrap();
    let size: usize = scene.layers[..2].iter().map(|layer| layer.bytes.len()).sum();
    assert_eq!(
        (number(&row, "size"), number(&row, "local")),
        (size as u64, size as u64)
    );
    assert_eq!((number(&row, "layers"), number(&row, "indexed_layers")), (2, 2));
    assert!(row["platform"].as_str().unwrap().starts_with("linux/"), "{row}");
    // The base is the other image's too.
    assert!(
        number(&row, "own_bytes") > 0 && number(&row, "own_bytes") < number(&row, "disk_bytes"),
        "{row}"
    );
    assert!(number(&row, "disk_bytes") > size as u64, "{row}");
    assert!(row["last_used"].as_str().unwrap().ends_with('Z'), "{row}");
    assert_eq!(row["mounts"], serde_json::json!([]));

    scene.host.ok(["cache", "drop"]);
    let row = scene.row("one").unwrap();
    assert_eq!((number(&row, "local"), number(&row, "indexed_layers")), (0, 2));
    let image = scene.image("one");
    let mount = scene
        .host
        .mount_with(&image, &["--wait", "ready", "--prefetch", "none"]);
    let before = number(&scene.row("one").unwrap(), "local");
    mount.read("one");
    let row = scene.row("one").unwrap();
    assert!(number(&row, "local") > before, "{row}");
    assert_eq!(row["mounts"][0], mount.path().to_str().unwrap());
    let text = scene.host.ok(["images"]);
    assert!(text.text().contains(&image) && text.text().contains("2/2"), "{text:?}");
    assert!(
        text.text().contains(&format!("mounted on {}", mount.path().display())),
        "{text:?}"
    );
    // The one that was used last comes first.
    assert!(scene.images()[0]["names"][0] == *image);

    // Another meaning of the tag leaves the image without a name.
    drop(mount);
    push(&scene.registry, "app", "one", &scene.layers[2..]);
    scene.host.ok(["inspect", &image]);
    let digest = row["digest"].clone();
    let nameless: Vec<Value> = scene
        .images()
        .into_iter()
        .filter(|row| row["digest"] == digest)
        .collect();
    assert_eq!(nameless[0]["names"], serde_json::json!([]));
    assert!(scene.host.ok(["images"]).text().contains("<none>"));
}

#[test]
fn the_list_of_layers_says_whose_they_are_and_why_data_takes_more() {
    let scene = Scene::new();
    let rows = scene.host.ok(["cache", "list", "--json"]).json();
    let row = |layer: usize| {
        let digest = scene.layers[layer].digest().to_string();
        rows.as_array()
            .unwrap()
            .iter()
            .find(|row| row["layer"] == *digest)
            .unwrap()
    };
    let (one, two) = (scene.image("one"), scene.image("two"));
    assert_eq!(row(0)["images"], serde_json::json!([one, two]));
    assert_eq!(row(1)["images"], serde_json::json!([one]));
    assert!(row(1)["last_used"].is_string());
    for (layer, blob) in scene.layers.iter().enumerate() {
        assert_eq!(number(row(layer), "compressed_bytes"), blob.bytes.len() as u64);
        assert!(number(row(layer), "data_bytes") > blob.bytes.len() as u64);
    }
    let text = scene.host.ok(["cache", "list"]);
    assert!(text.text().contains(&format!("  {one}  last used ")), "{text:?}");
    let help = scene.host.ok(["cache", "list", "--help"]);
    assert!(help.text().contains("unpacked"), "{help:?}");
}

#[test]
fn an_image_goes_alone() {
    let scene = Scene::new();
    let before = du(scene.host.store());
    let removed = scene.rm(&scene.image("one"));
    assert_eq!(
        (number(&removed, "layers"), number(&removed, "shared_layers")),
        (1, 1),
        "{removed}"
    );
    let freed = number(&removed, "freed_bytes");
    assert!(freed > scene.layers[1].bytes.len() as u64, "{removed}");
    let less = before - du(scene.host.store());
    // Directories take bytes too.
    assert!(less >= freed && less <= freed + (64 << 10), "{less} {freed}");
    assert!(scene.has(0) && !scene.has(1) && scene.has(2));
    assert_eq!(scene.row("one"), None);
    assert_eq!(scene.images().len(), 1);

    // The other image needs nothing from its registry, and the removed one can be had again.
    scene.registry.clear_log();
    let mount = scene.host.mount(&scene.image("two"));
    mount.read("base");
    mount.read("two");
    let of_layers =
        |log: Vec<crate::common::registry::Logged>| log.into_iter().filter(|r| r.target.contains("/blobs/")).count();
    assert_eq!(of_layers(scene.registry.log()), 0);
    drop(mount);
    let mount = scene.host.mount(&scene.image("one"));
    mount.read("one");
    assert!(scene.registry.count(&scene.layers[1].path()) > 0);
    assert_eq!(scene.registry.count(&scene.layers[0].path()), 0);
    drop(mount);

    for tag in ["one", "two"] {
        scene.rm(&scene.image(tag));
    }
    assert!(!scene.has(0) && scene.images().is_empty());
    let trees = std::fs::read_dir(scene.host.store().join("trees")).unwrap().count();
    assert_eq!(trees, 0);
    let verified = scene.host.ok(["cache", "verify", "--json"]).json();
    assert_eq!(
        (number(&verified, "documents"), number(&verified, "layers")),
        (0, 0),
        "{verified}"
    );
}

#[test]
fn of_two_names_only_one_goes() {
    let scene = Scene::new();
    let [base, one, _] = &scene.layers;
    push(&scene.registry, "app", "alias", &[base.clone(), one.clone()]);
    scene.host.ok(["pull", &scene.image("alias")]);
    let row = scene.row("alias").unwrap();
    assert_eq!(row["names"].as_array().unwrap().len(), 2, "{row}");
    // Nothing is lost, so the image may be mounted.
    let mount = scene.host.mount(&scene.image("one"));
    let removed = scene.rm(&scene.image("one"));
    assert_eq!(
        (&removed["digests"], number(&removed, "freed_bytes")),
        (&serde_json::json!([]), 0)
    );
    assert_eq!(scene.row("one"), None);
    assert_eq!(scene.row("alias").unwrap()["local"], row["local"]);
    drop(mount);
    // A digest means the image, whatever its names are.
    let removed = scene.rm(row["digest"].as_str().unwrap());
    assert_eq!(removed["names"], serde_json::json!([scene.image("alias")]));
    assert!(!scene.has(1));
}

#[test]
fn what_is_mounted_stays() {
    let scene = Scene::new();
    let (one, two) = (scene.image("one"), scene.image("two"));
    let mount = scene.host.mount_with(&one, &["--wait", "ready", "--prefetch", "none"]);
    let error = scene.host.fails(["cache", "rm", &one]);
    assert!(
        error.contains("is mounted on") && error.contains(mount.path().to_str().unwrap()),
        "{error}"
    );
    assert!(scene.has(1) && scene.row("one").is_some());
    // The base stays, because the mounted image has it.
    scene.rm(&two);
    assert!(scene.has(0) && !scene.has(2));
    // With force, the mount goes on and fetches what it reads.
    scene.host.ok(["cache", "rm", "--force", &one]);
    assert!(!scene.has(1));
    mount.forget("one");
    assert!(mount.read("one").len() > FILE / 4);
    let error = scene.host.fails(["cache", "rm", &one]);
    assert!(error.contains("does not know the image"), "{error}");
}

#[test]
fn a_layer_that_is_being_fetched_stays() {
    let scene = Scene::new();
    let one = scene.image("one");
    let name = scene.layers[1].digest().to_string().replacen(':', "-", 1);
    let lock = std::fs::File::open(scene.host.store().join("layers").join(name).join("lock")).unwrap();
    lock.lock().unwrap();
    let error = scene.host.run(["cache", "rm", &one]);
    assert!(
        error.code == Some(1) && error.stderr.contains("being fetched"),
        "{error:?}"
    );
    assert!(scene.has(1));
}
