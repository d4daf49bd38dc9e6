//! What a fresh host fetches of an image whose layers all carry tables.

use crate::common::carried::{CarriedBlob, Dialect, Writer, push};
use crate::common::layers::{Tar, noise};
use crate::common::ocifs::{Ocifs, tool};
use crate::common::registry::TestRegistry;

const FILES: u64 = 200;
const FILE: usize = 60_000;
const SMALL: usize = 900;
const MIB: usize = 1 << 20;

/// A layer of many files, and a small one among them.
fn layer(number: u64, dialect: Dialect) -> CarriedBlob {
    let mut tar = Tar::new().dir(&format!("d{number}/"));
    for i in 0..FILES {
        tar = tar.file(format!("d{number}/{i}"), noise(1000 * number + i, FILE));
        if i == FILES / 2 {
            tar = tar.file(format!("d{number}/small"), noise(number, SMALL));
        }
    }
    Writer::new(dialect).write(&tar.finish())
}

#[test]
fn names_cost_the_tables_and_a_small_file_costs_little_more() {
    let registry = TestRegistry::start();
    let layers: Vec<CarriedBlob> = (0..)
        .zip(Dialect::ALL)
        .map(|(number, dialect)| layer(number, dialect))
        .collect();
    push(&registry, "app", "1", &layers);
    let size: usize = layers.iter().map(|layer| layer.blob.bytes.len()).sum();
    let sent = || registry.take_log().iter().map(|logged| logged.sent).sum::<usize>();

    // Its store stays as long as the mount.
    let host = Ocifs::new();
    let mount = host.mount_with(&format!("{}/app:1", registry.host()), &[]);
    let found = tool("find", [mount.path().as_os_str(), "-type".as_ref(), "f".as_ref()]);
    let lines = String::from_utf8(found).unwrap().lines().count();
    assert_eq!(lines, layers.len() * (FILES as usize + 1));
    let names = sent();
    assert!(names * 50 <= size, "{names} of {size} bytes for the names");

    for number in 0..layers.len() as u64 {
        assert!(
            mount.read(&format!("d{number}/small")) == noise(number, SMALL),
            "{number}"
        );
        let bytes = sent();
        assert!(bytes <= MIB, "{bytes} bytes for the small file of layer {number}");
    }
}
