//! Sizes that follow from the link: how much to ask for at once, how many requests side by side, which gaps to fetch across.
//!
//! The measure of all of them is the *product* of round trip and bandwidth: the bytes that could have come while one waited
//! for an answer.

use std::time::Duration;

use crate::blob::Link;

/// What is assumed before anything was measured: a registry in the next region over a common uplink. Both are soon known.
const GUESSED_RTT: Duration = Duration::from_millis(20);
const GUESSED_BANDWIDTH: f64 = 25e6;
/// The best size of a demand request, in products. Misses fall with the request size s as s^-0.57 (start-ups of six real
/// programs), and s^-0.57 * (RTT + s / B) is least at 0.57 / 0.43 products.
const REQUEST: f64 = 1.3;
const SMALLEST_REQUEST: f64 = 64.0 * 1024.0;
const LARGEST_REQUEST: f64 = 4.0 * 1024.0 * 1024.0;
/// Requests side by side: enough that one always delivers while others wait for their answers or grow their windows. Each
/// holds a decoder.
const FEWEST_REQUESTS: f64 = 6.0;
const MOST_REQUESTS: f64 = 16.0;
const REQUEST_SHARE: f64 = 256.0 * 1024.0;
/// What may be under way for nobody in particular, in products: four fill any link, one and a half keep it busy without
/// a queue that a demand request would have to wait behind.
const UNDER_WAY: f64 = 4.0;
const UNDER_WAY_BESIDE_DEMAND: f64 = 1.5;
const LEAST_UNDER_WAY: f64 = 1024.0 * 1024.0;
const LEAST_UNDER_WAY_BESIDE_DEMAND: f64 = 384.0 * 1024.0;
const MOST_UNDER_WAY: f64 = 48.0 * 1024.0 * 1024.0;

/// Sizes for one link.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Policy {
    product: f64,
}

impl Policy {
    /// The sizes for a link; what was not measured yet is guessed.
    pub fn of(link: Link) -> Self {
        let rtt = link.rtt.unwrap_or(GUESSED_RTT).as_secs_f64();
        Self {
            product: rtt * link.bandwidth.unwrap_or(GUESSED_BANDWIDTH).max(1.0),
        }
    }

    /// Bytes that could have come during a round trip.
    pub fn product(&self) -> u64 {
        self.product as u64
    }

    /// Compressed bytes to ask for at once when a reader waits.
    pub fn request(&self) -> u64 {
        (self.product * REQUEST).clamp(SMALLEST_REQUEST, LARGEST_REQUEST) as u64
    }

    /// Compressed bytes of a request when no reader waits: longer, since none waits for the end of it.
    pub fn long_request(&self) -> u64 {
        (2 * self.request()).max(1 << 20)
    }

    /// The most requests side by side, those of demand apart.
    pub fn requests(&self) -> usize {
        (self.product / REQUEST_SHARE).clamp(FEWEST_REQUESTS, MOST_REQUESTS) as usize
    }

    /// Unwanted compressed bytes between two wanted ranges that cost less than another request.
    pub fn gap(&self) -> u64 {
        let requests = (self.product / REQUEST_SHARE).clamp(4.0, MOST_REQUESTS);
        (self.product / requests) as u64
    }

    /// Compressed bytes that may be under way without anybody waiting for them.
    pub fn under_way(&self, beside_demand: bool) -> u64 {
        let (products, least) = match beside_demand {
            true => (UNDER_WAY_BESIDE_DEMAND, LEAST_UNDER_WAY_BESIDE_DEMAND),
            false => (UNDER_WAY, LEAST_UNDER_WAY),
        };
        (self.product * products).clamp(least, MOST_UNDER_WAY) as u64
    }

    /// The furthest that a sequential reader is read ahead of, in compressed bytes.
    pub fn longest_window(&self) -> u64 {
        self.under_way(false).max(4 * self.request())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(ms: u64, mbit: f64) -> Policy {
        Policy::of(Link {
            rtt: Some(Duration::from_millis(ms)),
            bandwidth: Some(mbit * 1e6 / 8.0),
        })
    }

    #[test]
    fn sizes_follow_the_link() {
        assert_eq!(policy(20, 100.0).request(), 325_000);
        assert_eq!(policy(80, 100.0).request(), 1_300_000);
        assert_eq!(policy(1, 100.0).request(), 64 << 10);
        assert_eq!(policy(80, 1000.0).request(), 4 << 20);
        assert_eq!((policy(20, 200.0).requests(), policy(80, 1000.0).requests()), (6, 16));
        assert_eq!(policy(20, 200.0).gap(), 125_000);
        assert_eq!(policy(20, 200.0).under_way(true), 750_000);
        assert_eq!(policy(20, 200.0).under_way(false), 2_000_000);
        assert!(policy(500, 10_000.0).under_way(false) <= 48 << 20);
    }

    #[test]
    fn unmeasured_links_are_guessed_and_dead_ones_do_not_divide_by_zero() {
        let unknown = Policy::of(Link {
            rtt: None,
            bandwidth: None,
        });
        assert_eq!(unknown, policy(20, 200.0));
        let dead = Policy::of(Link {
            rtt: Some(Duration::ZERO),
            bandwidth: Some(0.0),
        });
        assert_eq!((dead.request(), dead.gap()), (64 << 10, 0));
    }
}
