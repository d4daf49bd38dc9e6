//! Decoded spans in memory: a cache beside the data device, bounded in bytes.
//!
//! The cache holds spans that the device cannot take, because there is no store, or the store is full or broken. One
//! instance serves all layers of a process.

use std::sync::{Arc, Mutex};

use lru::LruCache;

use crate::store::IndexName;

/// The most recently used spans, at most `budget` bytes of them.
#[derive(Debug)]
pub struct SpanMemory {
    inner: Mutex<MemoryState>,
    budget: usize,
}

#[derive(Debug)]
struct MemoryState {
    spans: LruCache<(IndexName, u32), Arc<[u8]>>,
    bytes: usize,
}

impl SpanMemory {
    /// An empty cache of at most `budget` bytes. A single span larger than `budget` is not kept.
    pub fn new(budget: usize) -> Self {
        Self {
            inner: Mutex::new(MemoryState {
                spans: LruCache::unbounded(),
                bytes: 0,
            }),
            budget,
        }
    }

    /// Returns the span's bytes, and marks the span as used.
    pub fn get(&self, index: &IndexName, span: u32) -> Option<Arc<[u8]>> {
        let mut inner = self.inner.lock().expect("no panic while locked");
        inner.spans.get(&(index.clone(), span)).cloned()
    }

    /// Whether the cache has the span.
    pub fn contains(&self, index: &IndexName, span: u32) -> bool {
        let inner = self.inner.lock().expect("no panic while locked");
        inner.spans.contains(&(index.clone(), span))
    }

    /// Adds a span, and evicts the least recently used spans until all fit into the budget.
    pub fn insert(&self, index: &IndexName, span: u32, bytes: Arc<[u8]>) {
        if bytes.len() > self.budget {
            return;
        }
        let mut inner = self.inner.lock().expect("no panic while locked");
        inner.bytes += bytes.len();
        if let Some(old) = inner.spans.put((index.clone(), span), bytes) {
            inner.bytes -= old.len();
        }
        while inner.bytes > self.budget {
            let Some((_, old)) = inner.spans.pop_lru() else { break };
            inner.bytes -= old.len();
        }
    }

    /// The largest number of bytes that the cache holds.
    pub fn budget(&self) -> usize {
        self.budget
    }

    /// The number of bytes that the cache holds at present.
    pub fn bytes(&self) -> usize {
        self.inner.lock().expect("no panic while locked").bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::Digest;
    use crate::store::Authority;

    #[test]
    fn stays_within_its_budget_and_keeps_what_was_used_last() {
        let layer = IndexName::new(&Digest::of(b"layer"), &Authority::Pass);
        let memory = SpanMemory::new(100);
        for span in 0..3 {
            memory.insert(&layer, span, vec![0; 40].into());
            memory.get(&layer, 0);
        }
        assert!(memory.contains(&layer, 0) && !memory.contains(&layer, 1) && memory.contains(&layer, 2));
        assert_eq!(memory.bytes(), 80);
        memory.insert(&layer, 9, vec![0; 101].into());
        assert!(!memory.contains(&layer, 9));
        memory.insert(&layer, 2, vec![0; 10].into());
        assert_eq!(memory.bytes(), 50);
    }
}
