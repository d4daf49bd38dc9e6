//! Memory for the windows of zstd decoders. All decoders that run at the same time share it.
//!
//! A window is charged to the allowance of the image's tables. If there is no room, a decoder waits until others are
//! done. A decoder is refused only if no other decoder has any memory. Decoders never wait in a circle:
//!
//! - A decoder with an ordinary window, of up to [`ORDINARY`] bytes, asks once for all that it may need. While it
//!   waits, it has no memory. Only a decoder that runs alone may start with less and wait for more later.
//! - Decoders with larger windows take turns before they have any memory, so only one of them grows at a time.
//! - If a large window follows ordinary ones, a decoder may have memory while it waits for its turn. The decoder
//!   whose turn it is does not wait for that memory.

use std::sync::{Arc, Mutex};

use tokio::runtime::Handle;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use super::LayerStats;
use crate::index::Room;
use crate::memory::{Allowance, Charge, OverLimit};

/// Size limit of an ordinary window, with all other memory of the decoder. Usual encoders have windows of up to 8 MiB. A
/// first pass needs several times as much, because it also finds restarts. With a smaller limit, the passes over the layers
/// of an image wait for each other; with a larger one, fewer of them fit in memory.
const ORDINARY: u64 = 64 << 20;

/// The window memory of all decoders of a process.
#[derive(Debug, Clone)]
pub(super) struct Windows {
    tables: Arc<Allowance>,
    large: Arc<Semaphore>,
    holders: Arc<Holders>,
}

/// Number of decoders that have memory and will give it back.
#[derive(Debug, Default)]
struct Holders {
    count: Mutex<usize>,
    /// Notified when there is one decoder less.
    changed: Notify,
}

impl Holders {
    /// Counts a decoder that holds memory and waits for no other decoder.
    fn more(&self) {
        *self.count.lock().expect("no panic while locked") += 1;
    }

    /// Uncounts a decoder that gives back its memory with `giving`, or that begins to wait for others.
    fn less(&self, giving: impl FnOnce()) {
        let mut count = self.count.lock().expect("no panic while locked");
        *count -= 1;
        // Count and memory change under one lock, so other decoders see both changes or none.
        giving();
        drop(count);
        self.changed.notify_waiters();
    }
}

/// The memory of one decoder.
#[derive(Debug)]
struct Window {
    windows: Windows,
    charge: Charge,
    /// The turn of a decoder with a large window.
    turn: Option<OwnedSemaphorePermit>,
    holds: bool,
}

impl Windows {
    pub(super) fn new(tables: Arc<Allowance>) -> Self {
        Self {
            tables,
            large: Arc::new(Semaphore::new(1)),
            holders: Arc::default(),
        }
    }

    /// Room for one decoder. A request for room may block its thread, so the thread must allow blocking. `opening`
    /// counts that wait: the opening of its layer then depends on other layers.
    pub(super) fn room(&self, opening: Option<Arc<LayerStats>>) -> Room {
        let runtime = Handle::current();
        let mut window = Window {
            windows: self.clone(),
            charge: self.tables.charge(),
            turn: None,
            holds: false,
        };
        Box::new(move |bytes, reserved| {
            if window.charge.covers(bytes) {
                return Ok(());
            }
            let covering = window.cover(bytes, reserved);
            let covering = async {
                match &opening {
                    Some(stats) => stats.waiting(covering).await,
                    None => covering.await,
                }
            };
            tokio::task::block_in_place(|| runtime.block_on(covering))
        })
    }
}

impl Window {
    async fn cover(&mut self, bytes: u64, reserved: u64) -> Result<(), OverLimit> {
        if reserved > ORDINARY && self.turn.is_none() {
            self.take_turn().await;
        }
        let wanted = bytes.max(reserved.min(ORDINARY));
        let holders = self.windows.holders.clone();
        loop {
            let changed = holders.changed.notified();
            let mut changed = std::pin::pin!(changed);
            changed.as_mut().enable();
            {
                let mut count = holders.count.lock().expect("no panic while locked");
                let is_alone = *count == usize::from(self.holds);
                let mut covered = self.charge.cover(wanted);
                if covered.is_err() && is_alone {
                    // No other decoder has memory to give back, so this one starts with less. A decoder that comes later gets
                    // all that it needs, or waits.
                    covered = self.charge.cover(bytes);
                }
                match covered {
                    Ok(()) => {
                        *count += usize::from(!self.holds);
                        self.holds = true;
                        return Ok(());
                    }
                    Err(error) if is_alone => return Err(error),
                    Err(_) => {}
                }
            }
            changed.await;
        }
    }

    async fn take_turn(&mut self) {
        if self.holds {
            self.windows.holders.less(|| ());
        }
        // The semaphore is never closed.
        self.turn = self.windows.large.clone().acquire_owned().await.ok();
        if self.holds {
            self.windows.holders.more();
        }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        if self.holds {
            let charge = &mut self.charge;
            self.windows.holders.less(|| charge.clear());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::time::Duration;

    use super::*;
    use crate::index::{Compression, LayerDecoder, SPACING, SpanIndexBuilder};

    const MIB: u64 = 1 << 20;

    fn windows(limit: u64) -> (Windows, Arc<Allowance>) {
        let tables = Allowance::new(limit);
        (Windows::new(tables.clone()), tables)
    }

    /// Asks for `bytes` on a separate thread. Returns the room and the answer.
    fn ask(mut room: Room, bytes: u64) -> tokio::task::JoinHandle<(Room, Result<(), OverLimit>)> {
        tokio::task::spawn_blocking(move || {
            let got = room(bytes, bytes.max(16 * MIB));
            (room, got)
        })
    }

    /// Lets `decoders` ask for memory at the same time. In each step, a decoder asks for the first number of MiB, and says
    /// with the second one how many it may need in all. Returns how each decoder ended.
    async fn grow(windows: &Windows, decoders: usize, steps: &[(u64, u64)]) -> Vec<Result<(), OverLimit>> {
        let growing = (0..decoders).map(|_| {
            let (mut room, steps) = (windows.room(None), steps.to_vec());
            tokio::task::spawn_blocking(move || {
                steps
                    .into_iter()
                    .try_for_each(|(mib, reserved)| room(mib * MIB, reserved * MIB))
            })
        });
        let ended = futures::future::join_all(growing).await;
        ended.into_iter().map(Result::unwrap).collect()
    }

    /// The pass over a layer with a window of 8 MiB needs no more memory than an ordinary window.
    #[test]
    fn usual_windows_are_ordinary() {
        let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
        encoder.window_log(23).unwrap();
        let mut rng = fastrand::Rng::with_seed(2);
        for _ in 0..40 {
            let part: Vec<u8> = std::iter::repeat_with(|| rng.u8(..8)).take(512 << 10).collect();
            encoder.write_all(&part).unwrap();
        }
        let blob = encoder.finish().unwrap();
        let most = Arc::new(Mutex::new(0));
        let seen = most.clone();
        let room = Box::new(move |_, reserved: u64| {
            let mut most = seen.lock().unwrap();
            *most = reserved.max(*most);
            Ok(())
        });
        let mut decoder = LayerDecoder::with_room(Compression::Zstd, SPACING, room).unwrap();
        let mut index = SpanIndexBuilder::new(Compression::Zstd).unwrap();
        decoder.push(&blob, &mut index).unwrap();
        decoder.finish(&mut index).unwrap();
        let most = *most.lock().unwrap();
        assert!((ORDINARY / 2..=ORDINARY).contains(&most), "{most}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn decoders_wait_for_each_other_and_not_for_ever() {
        let (windows, tables) = windows(50 * MIB);
        let (first, got) = ask(windows.room(None), 4 * MIB).await.unwrap();
        got.unwrap();
        let (second, got) = ask(windows.room(None), 9 * MIB).await.unwrap();
        got.unwrap();
        assert!(tables.used() >= 32 * MIB);
        // The third decoder has to wait. So does one that needs more than is left beside the others.
        let mut third = ask(windows.room(None), 20 * MIB);
        let large = ask(windows.room(None), 45 * MIB);
        let waits = tokio::time::timeout(Duration::from_millis(50), &mut third)
            .await
            .is_err();
        assert!(waits && !large.is_finished());
        drop(first);
        let (third, got) = third.await.unwrap();
        got.unwrap();
        drop((second, third));
        let (large, got) = large.await.unwrap();
        got.unwrap();
        // No other decoder has any memory.
        let (large, got) = ask(large, 51 * MIB).await.unwrap();
        assert_eq!(got, Err(OverLimit { limit: 50 * MIB }));
        drop(large);
        assert_eq!(tables.used(), 0);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn many_that_grow_past_the_ordinary_all_get_done() {
        let (windows, tables) = windows(96 * MIB);
        let steps: Vec<_> = (4..=88).step_by(4).map(|mib| (mib, 88)).collect();
        for done in grow(&windows, 12, &steps).await {
            done.unwrap();
        }
        assert_eq!(tables.used(), 0);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn those_that_fit_only_in_part_do_not_wait_for_each_other() {
        let (windows, tables) = windows(24 * MIB);
        let mut of_tables = tables.charge();
        of_tables.exactly(12 * MIB).unwrap();
        for done in grow(&windows, 6, &[(4, 16), (8, 16), (12, 16), (16, 16)]).await {
            // 16 MiB are more than there are.
            assert_eq!(done, Err(OverLimit { limit: 24 * MIB }));
        }
        assert_eq!(tables.used(), 12 * MIB);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn large_windows_after_ordinary_ones_end_one_way_or_another() {
        let (windows, tables) = windows(96 * MIB);
        let done = grow(&windows, 12, &[(8, 9), (88, 88)]).await;
        // The last decoder has all the memory.
        assert!(done.into_iter().any(|done| done.is_ok()));
        assert_eq!(tables.used(), 0);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_fits_beside_the_tables_alone_is_used() {
        let (windows, tables) = windows(24 * MIB);
        let mut of_tables = tables.charge();
        of_tables.exactly(16 * MIB).unwrap();
        let (_window, got) = ask(windows.room(None), 6 * MIB).await.unwrap();
        got.unwrap();
    }
}
