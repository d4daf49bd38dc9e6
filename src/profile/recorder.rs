//! Records which blocks are read while a program starts.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::{BLOCK, Block, MOST_BLOCKS};

/// Time without a new block after which a start is over. A longer time records what the program does after its start.
/// A shorter one ends at a pause of the start.
const QUIET: Duration = Duration::from_secs(5);
/// Time after the first read after which a start is over, even if new blocks are read. A longer time records what the
/// program does after its start. A shorter one cuts slow starts.
const LONGEST: Duration = Duration::from_secs(60);

/// Collects which blocks are read, in order, until the start is over. All readers share one recorder.
#[derive(Debug)]
pub struct Recorder {
    ready: Instant,
    over: AtomicBool,
    /// Wakes the task that waits for the end of the start, at the first read.
    begun: Notify,
    heard: Mutex<Heard>,
}

#[derive(Debug, Default)]
struct Heard {
    seen: HashSet<Block>,
    run: Vec<(Block, u32)>,
    first: Option<Instant>,
    last: Option<Instant>,
}

impl Default for Recorder {
    /// Begins to listen.
    fn default() -> Self {
        Self {
            ready: Instant::now(),
            over: AtomicBool::new(false),
            begun: Notify::new(),
            heard: Mutex::default(),
        }
    }
}

impl Recorder {
    /// Notes that a range of the data device of the layer at this position was read.
    pub fn read(&self, layer: u32, device: Range<u64>) {
        if self.over.load(Ordering::Relaxed) || device.is_empty() {
            return;
        }
        let now = Instant::now();
        let at = u32::try_from(now.duration_since(self.ready).as_millis()).unwrap_or(u32::MAX);
        let mut heard = self.heard.lock().expect("no panic while locked");
        let heard = &mut *heard;
        for number in device.start / BLOCK..device.end.div_ceil(BLOCK) {
            let block = Block { layer, number };
            if heard.run.len() >= MOST_BLOCKS {
                self.over.store(true, Ordering::Relaxed);
                return;
            }
            if heard.seen.insert(block) {
                heard.run.push((block, at));
                if heard.first.is_none() {
                    heard.first = Some(now);
                    self.begun.notify_one();
                }
                heard.last = Some(now);
            }
        }
    }

    /// Completes when the start is over. Before the first read, it waits without waking up. One task may wait.
    pub async fn over(&self) {
        self.begun.notified().await;
        while let Some(end) = self.end(Instant::now()) {
            tokio::time::sleep_until(end.into()).await;
        }
    }

    /// Returns the earliest time at which the start can be over, or `None` if it is over at `now`. From then on, no
    /// further reads are noted. A start without reads does not end.
    fn end(&self, now: Instant) -> Option<Instant> {
        if self.over.load(Ordering::Relaxed) {
            return None;
        }
        let heard = self.heard.lock().expect("no panic while locked");
        let (Some(first), Some(last)) = (heard.first, heard.last) else {
            return Some(now + QUIET);
        };
        let end = (last + QUIET).min(first + LONGEST);
        let over = end <= now;
        self.over.store(over, Ordering::Relaxed);
        (!over).then_some(end)
    }

    /// Ends listening. Returns the blocks that were read, in order and each once, with the milliseconds after which
    /// each was read.
    pub fn finish(&self) -> Vec<(Block, u32)> {
        self.over.store(true, Ordering::Relaxed);
        let mut heard = self.heard.lock().expect("no panic while locked");
        std::mem::take(&mut *heard).run
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_block_is_heard_once_in_order_until_it_is_quiet() {
        let recorder = Recorder::default();
        assert!(recorder.end(Instant::now() + LONGEST).is_some(), "it has not begun");
        recorder.read(1, 2 * BLOCK..3 * BLOCK);
        recorder.read(0, BLOCK - 1..BLOCK + 1);
        recorder.read(0, 0..BLOCK);
        recorder.read(0, 0..0);
        assert!(recorder.end(Instant::now()).is_some());
        assert!(recorder.end(Instant::now() + QUIET).is_none());
        recorder.read(0, 9 * BLOCK..10 * BLOCK);
        let run = recorder.finish();
        let blocks: Vec<_> = run.iter().map(|(block, _)| (block.layer, block.number)).collect();
        assert_eq!(blocks, [(1, 2), (0, 0), (0, 1)]);
    }

    #[tokio::test]
    async fn an_end_is_waited_for_from_the_first_read_on() {
        let recorder = Recorder::default();
        let over = recorder.over();
        let mut over = std::pin::pin!(over);
        assert!(futures::poll!(&mut over).is_pending());
        recorder.read(0, 0..BLOCK * (MOST_BLOCKS as u64 + 5));
        over.await;
    }

    #[test]
    fn it_stops_at_the_largest_profile() {
        let recorder = Recorder::default();
        recorder.read(0, 0..BLOCK * (MOST_BLOCKS as u64 + 5));
        assert!(recorder.end(Instant::now()).is_none());
        assert_eq!(recorder.finish().len(), MOST_BLOCKS);
    }
}
