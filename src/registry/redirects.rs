//! The URLs that blobs were last redirected to, so that later requests for ranges go there directly.

use std::num::NonZeroUsize;
use std::sync::{Mutex, MutexGuard};
use std::time::{Instant, SystemTime};

use lru::LruCache;
use reqwest::Url;

use super::expiry::url_lifetime;
use crate::oci::Digest;

/// Most redirects kept, one per blob. A larger value costs memory. A smaller one costs one more round trip to the
/// registry for each evicted blob.
const CAPACITY: usize = 4096;

/// A blob in a repository. The repository is part of the key, because the same blob in another repository may need
/// other credentials.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct BlobKey {
    pub(super) repository: String,
    pub(super) digest: Digest,
}

/// The final URL of each blob, and the time until which it is valid. URLs carry signatures, so `Debug` prints none of
/// them.
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

    /// Returns the URL that a blob was last redirected to, unless its lifetime is over.
    pub(super) fn get(&self, key: &BlobKey) -> Option<Url> {
        let mut known = self.known();
        let redirect = known.get(key)?;
        if redirect.until > Instant::now() {
            return Some(redirect.url.clone());
        }
        known.pop(key);
        None
    }

    /// Keeps a URL for its lifetime, as [`url_lifetime`] finds it. Does not keep a URL whose lifetime is over.
    pub(super) fn remember(&self, key: &BlobKey, url: Url) {
        let lifetime = url_lifetime(&url, SystemTime::now());
        if lifetime.is_zero() {
            return;
        }
        let until = Instant::now() + lifetime;
        self.known().put(key.clone(), Redirect { url, until });
    }

    /// Forgets a URL that failed, unless another reader has replaced it with a newer one.
    pub(super) fn forget(&self, key: &BlobKey, url: &Url) {
        let mut known = self.known();
        if known.peek(key).is_some_and(|redirect| redirect.url == *url) {
            known.pop(key);
        }
    }

    fn known(&self) -> MutexGuard<'_, LruCache<BlobKey, Redirect>> {
        self.known.lock().expect("no panic while locked")
    }
}
