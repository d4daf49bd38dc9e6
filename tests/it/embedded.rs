//! A program that embeds the library and serves several images from one process.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ocifs::content::Content;
use ocifs::fs::{FsError, ImageFs};
use ocifs::image::{Confirm, NamedImage};
use ocifs::layer::LayerContext;
use ocifs::registry::RegistryConfig;
use ocifs::source;
use ocifs::store::Store;
use ocifs::tree::LayerIdx;

use crate::common::layers::{Blob, Tar, noise, push};
use crate::common::ocifs::{Ocifs, PATIENCE};
use crate::common::registry::{Fault, TestRegistry};

const SIZE: usize = 3 << 20;

/// Opens an image as an embedding program does.
async fn open(registry: &TestRegistry, name: &str, context: &LayerContext) -> (ImageFs, Arc<Content>) {
    let image = format!("{}/{name}:1", registry.host()).parse().unwrap();
    let named = source::open(&image, RegistryConfig::default()).await.unwrap();
    let named = NamedImage::new(named, None, context.store.clone(), Confirm::Always);
    let opening = named.open(context, None).await.unwrap();
    let image = opening.preparation.finish(context).await.unwrap();
    let content = Arc::new(Content::new(image, Some(Duration::from_secs(30))));
    (ImageFs::new(content.clone()), content)
}

async fn try_read(fs: &ImageFs, name: &str) -> Result<Vec<u8>, FsError> {
    let attr = fs.lookup(fs.root(), name.as_bytes()).unwrap().unwrap();
    fs.read(attr.ino, 0, SIZE).await
}

async fn read(fs: &ImageFs, name: &str) -> Vec<u8> {
    try_read(fs, name).await.unwrap()
}

/// Returns how many open files of this process have this path.
fn opened(path: &Path) -> usize {
    let links = std::fs::read_dir("/proc/self/fd").unwrap();
    let links = links.filter_map(|link| std::fs::read_link(link.unwrap().path()).ok());
    links.filter(|target| target == path).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn images_of_one_process_share_a_layer_and_have_their_own_statistics() {
    let registry = TestRegistry::start();
    let layer = |name: &str, seed| Blob::gzip(&Tar::new().file(name, noise(seed, SIZE)).finish());
    let base = layer("shared", 1);
    let own = [("one", layer("own", 2)), ("two", layer("own", 3))];
    let ocifs = Ocifs::new();
    for (name, layer) in &own {
        push(&registry, name, "1", &[base.clone(), layer.clone()]);
        drop(ocifs.mount(&format!("{}/{name}:1", registry.host())));
    }
    // The store knows the layers and has none of their data.
    ocifs.ok(["cache", "drop"]);
    registry.clear_log();
    let context = LayerContext::new(Store::open(ocifs.store()).unwrap(), 64 << 20, 1 << 30);
    let (one, content_of_one) = open(&registry, "one", &context).await;
    let (two, content_of_two) = open(&registry, "two", &context).await;
    let layers = |position| [&one, &two].map(|fs| fs.image().layer(LayerIdx(position)).clone());

    // Both images have one index of the base layer, and one each of their own layers.
    let [a, b] = layers(0);
    assert!(std::ptr::addr_eq(a.spans(), b.spans()));
    let [c, d] = layers(1);
    assert!(!std::ptr::addr_eq(c.spans(), d.spans()));

    // Readers of both images wait for the same flights: each byte is fetched once.
    registry.latency(Duration::from_millis(20));
    let (from_one, from_two) = tokio::join!(read(&one, "shared"), read(&two, "shared"));
    assert!(from_one == noise(1, SIZE) && from_two == noise(1, SIZE));
    let fetched = a.status().fetched + b.status().fetched;
    let size = base.bytes.len() as u64;
    assert!(fetched <= size + 64, "{fetched} of {size}");
    assert_eq!(
        registry.count(&base.path()) as u64,
        a.status().requests + b.status().requests
    );
    // They share the data device, so the process has it open once.
    let device = ocifs
        .store()
        .join("layers")
        .join(base.digest().to_string().replace(':', "-"));
    assert_eq!(opened(&device.canonicalize().unwrap().join("data")), 1);
    assert_eq!(a.status().local_spans, b.status().local_spans);

    // Each image counts its own reads and requests.
    for status in [a.status(), b.status()] {
        assert_eq!((status.misses, status.served), (1, SIZE as u64), "{status:?}");
    }
    assert!(read(&one, "own").await == noise(2, SIZE));
    assert_eq!((c.status().misses, d.status().misses), (1, 0));
    assert_eq!((c.status().requests > 0, d.status().requests), (true, 0));
    assert_eq!((content_of_one.reads().waited, content_of_two.reads().waited), (2, 1));

    // The data lives as long as one of the images is open.
    drop((a, b, c, d));
    drop((one, content_of_one));
    assert!(read(&two, "shared").await == noise(1, SIZE));
    drop((two, content_of_two));
    assert_eq!(opened(&device.canonicalize().unwrap().join("data")), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn trouble_with_the_registry_of_one_image_does_not_disturb_another_image() {
    let (sick, well) = (TestRegistry::start(), TestRegistry::start());
    let base = Blob::gzip(&Tar::new().file("shared", noise(1, SIZE)).finish());
    let ocifs = Ocifs::new();
    for registry in [&sick, &well] {
        push(registry, "app", "1", std::slice::from_ref(&base));
        drop(ocifs.mount(&format!("{}/app:1", registry.host())));
    }
    ocifs.ok(["cache", "drop"]);
    let context = LayerContext::new(Store::open(ocifs.store()).unwrap(), 64 << 20, 1 << 30);
    let (one, _content) = open(&sick, "app", &context).await;
    let (two, _content) = open(&well, "app", &context).await;
    sick.latency(Duration::from_millis(50));
    sick.fault(&base.path(), usize::MAX, Fault::status(404));
    // The reader of the second image waits for the flights that the reader of the first one has started.
    let (from_one, from_two) = tokio::join!(try_read(&one, "shared"), try_read(&two, "shared"));
    assert!(from_one.is_err());
    assert!(from_two.unwrap() == noise(1, SIZE));
}

/// A failure answers only reads that began before their request did.
#[tokio::test(flavor = "multi_thread")]
async fn a_read_that_joins_an_earlier_request_does_not_share_its_failure() {
    let registry = TestRegistry::start();
    // Both files are in one span, so one request brings both.
    let layer = Blob::gzip(&Tar::new().file("a", noise(1, 4096)).file("b", noise(2, 4096)).finish());
    let ocifs = Ocifs::new();
    push(&registry, "app", "1", std::slice::from_ref(&layer));
    drop(ocifs.mount(&format!("{}/app:1", registry.host())));
    ocifs.ok(["cache", "drop"]);
    let context = LayerContext::new(Store::open(ocifs.store()).unwrap(), 64 << 20, 1 << 30);
    let (fs, content) = open(&registry, "app", &context).await;
    registry.clear_log();
    registry.hold(&layer.path());
    registry.fault(&layer.path(), usize::MAX, Fault::status(404));
    let (first, second) = {
        let joining = async {
            // A request gets the answer of its time of arrival.
            reach(|| registry.count(&layer.path()) > 0).await;
            let second = try_read(&fs, "b");
            let releasing = async {
                reach(|| content.reads().waiting == 2).await;
                registry.clear_faults();
                registry.release();
            };
            tokio::join!(second, releasing).0
        };
        tokio::join!(try_read(&fs, "a"), joining)
    };
    assert!(first.is_err());
    assert!(second.unwrap() == noise(2, 4096));
}

/// Waits until `done` returns true, at most for [`PATIENCE`].
async fn reach(done: impl Fn() -> bool) {
    let reaching = async {
        while !done() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(PATIENCE, reaching).await.unwrap();
}
