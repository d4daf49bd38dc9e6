//! Taking turns: one process at a time streams a layer, and the others wait for the files that it writes.
//!
//! A turn is the lock on the layer's lock file. While the layer comes in, the process with the turn sets the file's
//! modification time about once a second. Waiting processes look at that time. If a process was stopped or hangs, the
//! others soon continue without a turn, and download the layer a second time. A second download does no other harm,
//! because finished files are published by rename.

use std::fs::File;
use std::time::{Duration, Instant, SystemTime};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::LayerStats;
use crate::store::{LayerDir, StoreError};

/// How often a waiting process looks. Looking takes a few microseconds, which is negligible beside streaming a layer.
const LOOK: Duration = Duration::from_millis(10);
/// How often the streaming process shows its progress.
const BEAT: Duration = Duration::from_secs(1);
/// How long a waiting process waits without progress of the streaming process. A smaller value downloads layers twice
/// over slow links; a larger one delays the mount after a process has hung.
const PATIENCE: Duration = Duration::from_secs(20);

/// The right to stream a layer, until it is dropped. If the process dies, the kernel releases the lock.
#[derive(Debug)]
pub(super) struct Turn {
    lock: Flock<File>,
}

impl Turn {
    /// Waits until no other process streams the layer. Returns `None` if another process streams it and makes no
    /// progress.
    pub(super) async fn wait(dir: &LayerDir, stats: &LayerStats) -> Result<Option<Self>, StoreError> {
        stats.waiting(Self::wait_patiently(dir, stats, PATIENCE)).await
    }

    async fn wait_patiently(
        dir: &LayerDir,
        stats: &LayerStats,
        patience: Duration,
    ) -> Result<Option<Self>, StoreError> {
        let mut file = dir.lock_file()?;
        let mut seen = (modified(&file), Instant::now());
        loop {
            file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                // While this process waited, the file may have been deleted together with the layer. Then the lock is
                // useless.
                Ok(lock) if dir.is_lock_file(&lock) => return Ok(Some(Self { lock })),
                Ok(_) => dir.lock_file()?,
                Err((file, Errno::EWOULDBLOCK)) => file,
                Err((_, error)) => return Err(StoreError::io("lock", dir.path(), error.into())),
            };
            let now = modified(&file);
            if now != seen.0 {
                seen = (now, Instant::now());
                stats.beat();
            } else if seen.1.elapsed() > patience {
                let dir = dir.path().display();
                tracing::warn!(%dir, "another process streams this layer and does not get on, streaming it here too");
                return Ok(None);
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Does `work` and shows other processes that it makes progress. Progress means that `work` has not sent a
    /// request yet, works on local bytes, or receives at least `useful_rate` bytes per second.
    pub(super) async fn take<T>(
        self,
        stats: &LayerStats,
        useful_rate: impl Fn() -> f64,
        work: impl Future<Output = T>,
    ) -> T {
        let mut work = std::pin::pin!(work);
        let mut beat = tokio::time::interval(BEAT);
        let (start, mut before) = (stats.requests(), stats.fetched());
        loop {
            tokio::select! {
                result = &mut work => return result,
                _ = beat.tick() => {
                    let fetched = stats.fetched();
                    let came = (fetched - before) as f64;
                    let useful = came >= useful_rate() * BEAT.as_secs_f64() || stats.is_working();
                    if (useful || stats.requests() == start)
                        && let Err(error) = self.lock.set_modified(SystemTime::now())
                    {
                        tracing::debug!(%error, "cannot show progress to other processes");
                    }
                    before = fetched;
                }
            }
        }
    }
}

fn modified(file: &File) -> Option<SystemTime> {
    file.metadata().and_then(|m| m.modified()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::Digest;
    use crate::store::Store;

    #[tokio::test]
    async fn turns_are_taken_one_after_the_other() {
        let dir = tempfile::tempdir().unwrap();
        let layer = Store::open(dir.path()).unwrap().layer(&Digest::of(b"x")).unwrap();
        let first = Turn::wait(&layer, &LayerStats::new(1)).await.unwrap().unwrap();
        let stats = LayerStats::new(1);
        let order = std::sync::Mutex::new(Vec::new());
        let working = first.take(&stats, || 1.0, async {
            tokio::time::sleep(5 * LOOK).await;
            order.lock().unwrap().push("first");
        });
        let waiting = async {
            assert!(Turn::wait(&layer, &LayerStats::new(1)).await.unwrap().is_some());
            order.lock().unwrap().push("second");
        };
        tokio::join!(working, waiting);
        assert_eq!(*order.lock().unwrap(), ["first", "second"]);
    }

    #[tokio::test]
    async fn a_process_that_shows_nothing_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let layer = Store::open(dir.path()).unwrap().layer(&Digest::of(b"x")).unwrap();
        let _hanging = Turn::wait(&layer, &LayerStats::new(1)).await.unwrap().unwrap();
        let waited = Turn::wait_patiently(&layer, &LayerStats::new(1), 3 * LOOK)
            .await
            .unwrap();
        assert!(waited.is_none());
    }

    #[tokio::test]
    async fn a_deleted_lock_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let layer = Store::open(dir.path()).unwrap().layer(&Digest::of(b"x")).unwrap();
        let old = Turn::wait(&layer, &LayerStats::new(1)).await.unwrap().unwrap();
        let waiting = async {
            let turn = Turn::wait(&layer, &LayerStats::new(1)).await.unwrap().unwrap();
            assert!(layer.is_lock_file(&turn.lock));
        };
        let deleting = async {
            tokio::time::sleep(2 * LOOK).await;
            std::fs::remove_dir_all(layer.path()).unwrap();
            drop(old);
        };
        tokio::join!(waiting, deleting);
    }
}
