//! Where blobs were last redirected to, so that further ranges go there directly.

use std::num::NonZeroUsize;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime};

use lru::LruCache;
use reqwest::Url;

use super::expiry::url_lifetime;
use crate::oci::Digest;

/// Redirects remembered; one per blob.
const CAPACITY: usize = 4096;

/// A blob in a repository. The same blob elsewhere may need other credentials, so it is another key.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct BlobKey {
    pub(super) repository: String,
    pub(super) digest: Digest,
}

/// Final URLs and until when they are good. They carry signatures: there is no way to print them.
pub(super) struct Redirects {
    known: Mutex<LruCache<BlobKey, Redirect>>,
}

struct Redirect {
    url: Url,
    until: Instant,
}

impl std::fmt::Debug for Redirects {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Redirects(..)")
    }
}

impl Redirects {
    pub(super) fn new() -> Self {
        let capacity = NonZeroUsize::new(CAPACITY).unwrap_or(NonZeroUsize::MIN);
        Self {
            known: Mutex::new(LruCache::new(capacity)),
        }
    }

    /// Where a blob was last redirected to, while that is worth a try.
    pub(super) fn get(&self, key: &BlobKey) -> Option<Url> {
        let mut known = self.known();
        let redirect = known.get(key)?;
        if redirect.until > Instant::now() {
            return Some(redirect.url.clone());
        }
        known.pop(key);
        None
    }

    /// Remembers a URL for as long as it says it is good.
    pub(super) fn remember(&self, key: &BlobKey, url: Url) {
        let lifetime = url_lifetime(&url, SystemTime::now());
        if lifetime.is_zero() {
            return;
        }
        let until = Instant::now() + lifetime;
        self.known().put(key.clone(), Redirect { url, until });
    }

    /// Forgets a URL that failed, unless another reader has put a newer one in its place.
    pub(super) fn forget(&self, key: &BlobKey, url: &Url) {
        let mut known = self.known();
        if known.peek(key).is_some_and(|redirect| redirect.url == *url) {
            known.pop(key);
        }
    }

    fn known(&self) -> MutexGuard<'_, LruCache<BlobKey, Redirect>> {
        // Every state of the cache is a good one.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
