//! Files that are published beside images.

use std::sync::atomic::{AtomicU64, Ordering};

use super::{client, ranges};
use crate::common::registry::TestRegistry;

/// A file comes sooner over several connections. But one connection brings nearly all of a long file, because connections
/// that have shared a link are slow for the reads that use them next.
#[tokio::test]
async fn one_connection_brings_most_of_a_long_file() {
    let registry = TestRegistry::start();
    let files = client().files(&registry.host(), "indexes").unwrap();
    for (size, parts, longest) in [
        (1000, 1, 1000),
        (300 << 10, 4, 75 << 10),
        (2 << 20, 8, 256 << 10),
        (5 << 20, 8, (5 << 20) - 7 * (96 << 10)),
    ] {
        let bytes: Vec<u8> = (0..size).map(|n: usize| (n % 251) as u8).collect();
        let digest = registry.add_blob(bytes.clone());
        registry.clear_log();
        let came = AtomicU64::new(0);
        let got = files.blob(&digest, size as u64, 8 << 20, &came).await.unwrap();
        assert!(got == bytes);
        assert_eq!(came.load(Ordering::Relaxed), size as u64);
        let asked: Vec<usize> = ranges(&registry).iter().map(|range| length(range, size)).collect();
        assert_eq!((asked.len(), asked.iter().max()), (parts, Some(&longest)), "{size}");
    }
}

/// Returns the length of a range of a file of `size` bytes.
fn length(range: &str, size: usize) -> usize {
    let Some(range) = range.strip_prefix("bytes=") else {
        return size;
    };
    let (first, last) = range.split_once('-').unwrap();
    last.parse::<usize>().unwrap() + 1 - first.parse::<usize>().unwrap()
}
