//! Keeps the store's data devices near `--cache-size` while they are being filled.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::evict_to;
use crate::store::Store;

/// Looking at the whole store costs a few milliseconds, so it happens only every so many bytes written.
const STEPS: u64 = 16;

/// The limit and how much was written since it was last looked at.
#[derive(Debug)]
pub struct CacheBudget {
    store: Store,
    limit: u64,
    written: AtomicU64,
    running: AtomicBool,
}

impl CacheBudget {
    /// Keeps the data devices of `store` at about `limit` bytes. Each process looks after a sixteenth of the limit that it wrote
    /// itself, and a first pass publishes a layer whole, so for a moment they may take more.
    pub fn new(store: Store, limit: u64) -> Arc<Self> {
        Arc::new(Self {
            store,
            limit,
            written: AtomicU64::new(0),
            running: AtomicBool::new(false),
        })
    }

    /// The limit in bytes.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Takes note of `bytes` written to a device; starts an eviction when enough came together. Call it from within the
    /// runtime.
    pub fn wrote(self: &Arc<Self>, bytes: u64) {
        let written = self.written.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if written < self.limit / STEPS || self.running.swap(true, Ordering::SeqCst) {
            return;
        }
        self.written.store(0, Ordering::Relaxed);
        let running = Running(self.clone());
        tokio::task::spawn_blocking(move || match evict_to(&running.0.store, running.0.limit) {
            Ok(evicted) if evicted.spans > 0 => tracing::info!(?evicted, "cache was over its limit"),
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "cannot keep the cache below its limit"),
        });
    }
}

/// An eviction under way, until it is dropped.
struct Running(Arc<CacheBudget>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.running.store(false, Ordering::SeqCst);
    }
}
