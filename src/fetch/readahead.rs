//! Readahead: which spans of a layer to fetch before anybody asks.
//!
//! It hears of every span when a reader touches it for the first time. Tar neighbours are read together, so a touch that
//! follows none before begins a *stream* with the spans behind it; a touch in or right behind what a stream fetched moves that
//! stream on, and when half of its window is used up the next window is fetched, twice as large. Several streams exist side by
//! side: one for each file that is being read, or each program.
//!
//! It backs off by results: the share of what was fetched ahead that was then read is its *confidence*. When that is low first
//! windows shrink, soon to nothing, and a stream has to show itself by three neighbouring touches; so random reads cost what
//! they touch, and a little.
//!
//! It also knows when to stop guessing. Waiting for requests has a price, the bytes that could have come meanwhile; once
//! readers have paid as much as all of the layer costs, or would with the next request, the layer is fetched whole. So a small
//! layer comes at the first touch, and a large one costs at most twice what it would have cost to fetch it at once. Not if
//! confidence is low: who reads here and there in a large layer may never want the rest.

use std::collections::VecDeque;
use std::ops::Range;

use super::{Policy, Spans};

/// Streams followed at a time.
const STREAMS: usize = 8;
/// First windows shrink as the confidence falls from one to the other of these.
const CONFIDENT: f64 = 0.4;
const LOST: f64 = 0.2;
/// What confidence begins with: half of this many requests was of use.
const CREDIT: f64 = 4.0;
/// After this many requests the past counts half.
const MEMORY: f64 = 64.0;
/// A stream that jumps over more than this share of what it passes does not grow.
const DENSE: f64 = 0.5;

#[derive(Debug)]
struct Stream {
    /// First span it passed.
    start: u32,
    /// Behind the furthest span touched.
    next: u32,
    /// Behind the furthest span fetched ahead.
    end: u32,
    /// Compressed bytes to be ahead of the reader.
    window: u64,
    touches: u32,
}

/// The streams of one layer.
#[derive(Debug, Default)]
pub struct Readahead {
    /// Most recently used first.
    streams: VecDeque<Stream>,
    /// Compressed bytes fetched ahead, and those of them that were then read; both fade.
    spent: f64,
    useful: f64,
    /// The price of the requests that readers waited for, in bytes.
    paid: u64,
    /// The whole layer was asked for.
    whole: bool,
}

impl Readahead {
    /// A span was read for the first time. Returns the spans to fetch now, if any: those behind `span`, or all of the layer.
    /// Some of them may be there already.
    pub fn touched(&mut self, span: u32, spans: &impl Spans, policy: Policy) -> Option<Range<u32>> {
        if self.is_whole_worth_it(spans, policy) {
            self.whole = true;
            return Some(0..spans.count());
        }
        let found = self.streams.iter().position(|stream| stream.meets(span));
        let Some(mut stream) = found.and_then(|i| self.streams.remove(i)) else {
            return self.begin(span, spans, policy);
        };
        let ahead = stream.follow(span, spans, policy, self.confidence(policy));
        self.streams.push_front(stream);
        ahead
    }

    fn begin(&mut self, span: u32, spans: &impl Spans, policy: Policy) -> Option<Range<u32>> {
        let share = ((self.confidence(policy) - LOST) / (CONFIDENT - LOST)).clamp(0.0, 1.0);
        // The span itself is part of the first request.
        let room = policy.request().saturating_sub(spans.bytes(span..span + 1));
        let window = (room as f64 * share) as u64;
        let end = spans.reach(span + 1, window);
        self.streams.truncate(STREAMS - 1);
        self.streams.push_front(Stream {
            start: span,
            next: span + 1,
            end,
            window,
            touches: 1,
        });
        (end > span + 1).then_some(span + 1..end)
    }

    fn is_whole_worth_it(&self, spans: &impl Spans, policy: Policy) -> bool {
        let next = policy.request() + policy.product();
        !self.whole && self.paid + next >= spans.bytes(0..spans.count()) && self.confidence(policy) >= CONFIDENT
    }

    /// A request for `bytes` compressed bytes was made that a reader waits for.
    pub fn demanded(&mut self, bytes: u64, policy: Policy) {
        self.paid += bytes + policy.product();
    }

    /// `bytes` compressed bytes were fetched ahead.
    pub fn fetched(&mut self, bytes: u64, policy: Policy) {
        self.spent += bytes as f64;
        if self.spent > MEMORY * policy.request() as f64 {
            self.spent /= 2.0;
            self.useful /= 2.0;
        }
    }

    /// `bytes` of those were now read.
    pub fn used(&mut self, bytes: u64) {
        self.useful = (self.useful + bytes as f64).min(self.spent);
    }

    /// Share of what was fetched ahead that was of use.
    fn confidence(&self, policy: Policy) -> f64 {
        let credit = CREDIT * policy.request() as f64;
        (self.useful + credit / 2.0) / (self.spent + credit)
    }
}

impl Stream {
    /// Whether a touch belongs to this stream: within what it passed last or fetched, or right behind that.
    fn meets(&self, span: u32) -> bool {
        (self.next.saturating_sub(2)..=self.end).contains(&span)
    }

    fn follow(&mut self, span: u32, spans: &impl Spans, policy: Policy, confidence: f64) -> Option<Range<u32>> {
        self.touches += 1;
        self.next = self.next.max(span + 1);
        self.end = self.end.max(self.next);
        let passed = f64::from(self.next - self.start);
        let proven = confidence >= CONFIDENT || self.touches > 2;
        if f64::from(self.touches) < DENSE * passed || !proven {
            return None;
        }
        let ahead = spans.bytes(self.next..self.end);
        if 2 * ahead > self.window {
            return None;
        }
        self.window = (2 * self.window).clamp(policy.request(), policy.longest_window());
        let from = self.end;
        self.end = spans.reach(from, self.window - ahead);
        (self.end > from).then_some(from..self.end)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::blob::Link;

    /// Spans of 100,000 compressed bytes.
    struct Even(u32);

    impl Spans for Even {
        fn count(&self) -> u32 {
            self.0
        }

        fn bytes(&self, spans: Range<u32>) -> u64 {
            100_000 * u64::from(spans.end - spans.start)
        }
    }

    fn policy() -> Policy {
        Policy::of(Link {
            rtt: Some(Duration::from_millis(20)),
            bandwidth: Some(25e6),
        })
    }

    /// Reads `touches` in order from a layer of which only what readahead asked for is there; bytes fetched and touches that
    /// had to wait.
    fn replay(touches: impl IntoIterator<Item = u32>, count: u32) -> (u64, u32) {
        let (spans, policy) = (Even(count), policy());
        let mut readahead = Readahead::default();
        let mut there = vec![false; count as usize];
        let mut touched = vec![false; count as usize];
        let (mut bytes, mut waits) = (0, 0);
        for span in touches {
            if std::mem::replace(&mut touched[span as usize], true) {
                continue;
            }
            if there[span as usize] {
                readahead.used(100_000);
            } else {
                there[span as usize] = true;
                readahead.demanded(100_000, policy);
                (bytes, waits) = (bytes + 100_000, waits + 1);
            }
            for ahead in readahead.touched(span, &spans, policy).into_iter().flatten() {
                if !std::mem::replace(&mut there[ahead as usize], true) {
                    bytes += 100_000;
                    readahead.fetched(100_000, policy);
                }
            }
        }
        (bytes, waits)
    }

    #[test]
    fn a_sequential_reader_waits_once() {
        assert_eq!(replay(0..1000, 1000), (100_000_000, 1));
    }

    #[test]
    fn two_sequential_readers_side_by_side_wait_once_each() {
        let both = (0..400).flat_map(|i| [i, 500 + i]);
        let (bytes, waits) = replay(both, 1000);
        assert_eq!(waits, 2);
        assert!(bytes < 80_000_000 + 2 * 2 * policy().longest_window(), "{bytes}");
    }

    #[test]
    fn random_reads_cost_what_they_touch_and_little_more() {
        let mut random = fastrand::Rng::with_seed(7);
        let touches: Vec<u32> = (0..400).map(|_| random.u32(..4000)).collect();
        let mut distinct = touches.clone();
        distinct.sort_unstable();
        distinct.dedup();
        let used = 100_000 * distinct.len() as u64;
        let (bytes, _) = replay(touches, 4000);
        assert!(bytes as f64 <= 1.3 * used as f64, "{bytes} for {used}");
    }

    #[test]
    fn random_reads_of_a_good_part_of_the_layer_do_not_fetch_all_of_it() {
        let mut random = fastrand::Rng::with_seed(7);
        let touches: Vec<u32> = (0..1200).map(|_| random.u32(..4000)).collect();
        let used = 100_000 * touches.iter().collect::<std::collections::HashSet<_>>().len() as u64;
        let (bytes, _) = replay(touches, 4000);
        assert!(bytes as f64 <= 1.4 * used as f64, "{bytes} for {used}");
    }

    #[test]
    fn confidence_comes_back_with_a_reader_that_is_sequential() {
        let mut random = fastrand::Rng::with_seed(7);
        let lost: Vec<u32> = (0..400).map(|_| random.u32(..4000)).collect();
        let (_, waits) = replay(lost.iter().copied(), 6000);
        let (_, more) = replay(lost.into_iter().chain(5000..6000), 6000);
        assert!(more - waits <= 4, "{}", more - waits);
    }

    #[test]
    fn the_end_of_the_layer_is_the_end() {
        assert_eq!(replay([99, 98], 100).0, 200_000);
    }

    #[test]
    fn a_small_layer_comes_at_the_first_touch() {
        assert_eq!(replay([7, 3, 9, 0], 10), (1_000_000, 1));
    }

    #[test]
    fn a_layer_that_is_read_in_clusters_all_over_comes_whole_before_it_has_cost_twice_as_much() {
        // Clusters of five in a random order.
        let mut clusters: Vec<u32> = (0..100).collect();
        fastrand::Rng::with_seed(7).shuffle(&mut clusters);
        let (bytes, waits) = replay(clusters.into_iter().flat_map(|c| c * 5..c * 5 + 5), 500);
        let price = u64::from(waits) * (100_000 + policy().product());
        assert_eq!(bytes, 50_000_000);
        assert!(price <= 50_000_000 && waits > 10, "{waits}");
    }
}
