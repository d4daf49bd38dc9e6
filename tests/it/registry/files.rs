//! Files that are published beside images.

use std::sync::atomic::{AtomicU64, Ordering};

use super::{client, ranges};
use crate::common::registry::TestRegistry;

/// A small file comes sooner over several connections. A long one gets one connection, because the connections that share
/// a link are slow for the reads that use them next.
#[tokio::test]
async fn only_small_files_come_in_parts() {
    let registry = TestRegistry::start();
    let files = client().files(&registry.host(), "indexes").unwrap();
    for (size, parts) in [(1000, 1), (300 << 10, 4), (2 << 20, 8), (5 << 20, 1)] {
        let bytes: Vec<u8> = (0..size).map(|n: usize| (n % 251) as u8).collect();
        let digest = registry.add_blob(bytes.clone());
        registry.clear_log();
        let came = AtomicU64::new(0);
        let got = files.blob(&digest, size as u64, 8 << 20, &came).await.unwrap();
        assert!(got == bytes);
        assert_eq!(came.load(Ordering::Relaxed), size as u64);
        assert_eq!(ranges(&registry).len(), parts, "{size}");
    }
}
