//! Listens to the first seconds of a mount.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

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
                heard.first.get_or_insert(now);
                heard.last = Some(now);
            }
        }
    }

    /// Returns whether the start is over at `now`. From then on, no further reads are noted.
    pub fn is_over(&self, now: Instant) -> bool {
        if !self.over.load(Ordering::Relaxed) {
            let heard = self.heard.lock().expect("no panic while locked");
            let since = |then: Option<Instant>| then.map_or(Duration::ZERO, |then| now.saturating_duration_since(then));
            let over = since(heard.last) >= QUIET || since(heard.first) >= LONGEST;
            self.over.store(over, Ordering::Relaxed);
        }
        self.over.load(Ordering::Relaxed)
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
        assert!(!recorder.is_over(Instant::now() + LONGEST), "it has not begun");
        recorder.read(1, 2 * BLOCK..3 * BLOCK);
        recorder.read(0, BLOCK - 1..BLOCK + 1);
        recorder.read(0, 0..BLOCK);
        recorder.read(0, 0..0);
        assert!(!recorder.is_over(Instant::now()));
        assert!(recorder.is_over(Instant::now() + QUIET));
        recorder.read(0, 9 * BLOCK..10 * BLOCK);
        let run = recorder.finish();
        let blocks: Vec<_> = run.iter().map(|(block, _)| (block.layer, block.number)).collect();
        assert_eq!(blocks, [(1, 2), (0, 0), (0, 1)]);
    }

    #[test]
    fn it_stops_at_the_largest_profile() {
        let recorder = Recorder::default();
        recorder.read(0, 0..BLOCK * (MOST_BLOCKS as u64 + 5));
        assert!(recorder.is_over(Instant::now()));
        assert_eq!(recorder.finish().len(), MOST_BLOCKS);
    }
}
