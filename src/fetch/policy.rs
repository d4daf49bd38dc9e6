//! Sizes that follow from the link: how much to ask for at once, how many requests side by side, which gaps to fetch across.
//!
//! The measure of all of them is the *product* of round trip and bandwidth: the bytes that could have come while one waited
//! for an answer.

use std::time::Duration;

use super::Priority;
use crate::blob::{Link, LinkId};

/// What is assumed before anything was measured: a registry in the next region over a common uplink. Both are soon known.
const GUESSED_RTT: Duration = Duration::from_millis(20);
const GUESSED_BANDWIDTH: f64 = 25e6;
/// Best size of a demand request, in products.
/// Misses fall with the request size s as `s^-0.57` (measured in start-ups of six real programs). The time spent
/// waiting, `s^-0.57 * (RTT + s / B)`, is least at 0.57 / 0.43 products. Larger requests make readers wait for bytes
/// that they do not need. Smaller ones cost more misses, each with a round trip.
const REQUEST: f64 = 1.3;
const SMALLEST_REQUEST: f64 = 64.0 * 1024.0;
const LARGEST_REQUEST: f64 = 4.0 * 1024.0 * 1024.0;
/// Requests in flight at a time: not fewer than the first, not more than the second. With enough of them, one always
/// delivers while others wait for their responses or grow their congestion windows. Fewer would leave the link idle. More
/// would cost memory, since each request holds a decoder. More of the small requests may be in flight, up to the same
/// number of bytes.
const FEWEST_REQUESTS: f64 = 6.0;
const MOST_REQUESTS: f64 = 32.0;
const SMALL_REQUEST: f64 = 256.0 * 1024.0;
/// Bytes in flight that no reader waits for, in products: four fill any link. While readers wait it is less, which keeps the
/// link busy with a shorter queue for their requests to wait behind. Background requests get least.
const UNDER_WAY: f64 = 4.0;
const UNDER_WAY_BESIDE_DEMAND: f64 = 3.0;
const LEAST_UNDER_WAY: f64 = 1024.0 * 1024.0;
const MOST_UNDER_WAY: f64 = 24.0 * 1024.0 * 1024.0;

/// While readers wait, background requests go one at a time. Each takes the link for so many round trips, or for
/// [`LEAST_BACKGROUND_DELAY`] where these are short: a demand request waits no longer than that behind it.
const BACKGROUND_DELAY: f64 = 0.8;
const LEAST_BACKGROUND_DELAY: Duration = Duration::from_millis(4);
const SMALLEST_BACKGROUND: f64 = 128.0 * 1024.0;
const LARGEST_BACKGROUND: f64 = 4.0 * 1024.0 * 1024.0;
/// Background requests in flight while nobody reads: at least this many.
const BACKGROUND_REQUESTS: f64 = 4.0;
/// Background requests in flight before the link was measured. More would keep the first reader waiting if it turns out slow.
const FIRST_BACKGROUND_REQUESTS: f64 = 2.0;

/// After this long without demand, or after so many round trips where they are long, the reader is busy with itself, or gone.
const DEMAND_IS_OVER: Duration = Duration::from_millis(300);
const ROUND_TRIPS_OF_DEMAND: u32 = 10;

/// A response does not come at the full rate from its first byte on.
const TRANSFER: f64 = 1.5;

/// Bytes of a request that no reader waits for but one soon will: small enough to come in the order of need.
const SMALLEST_RUN: f64 = 256.0 * 1024.0;
/// What a new connection brings in its first round trip: ten segments (RFC 6928).
const FIRST_WINDOW: u64 = 14 * 1024;
/// First windows that each part of a request has, if a reader waits for it or is about to.
const URGENT_WINDOWS: u64 = 2;
/// First windows that each part of any other request has.
const OTHER_WINDOWS: u64 = 12;
/// A request is spread over at most this many connections.
const MOST_PARTS: u64 = 8;
/// A request is spread over several connections if the round trip is at least this long.
const FAR: Duration = Duration::from_millis(4);

/// Sizes for one link.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Policy {
    link: LinkId,
    rtt: Duration,
    /// Bytes per second.
    bandwidth: f64,
    /// Whether both were measured.
    known: bool,
    warm: u64,
}

impl Policy {
    /// The sizes for a link; what was not measured yet is guessed.
    pub fn of(link: Link) -> Self {
        Self {
            link: link.id,
            rtt: link.rtt.unwrap_or(GUESSED_RTT),
            bandwidth: link.bandwidth.unwrap_or(GUESSED_BANDWIDTH).max(1.0),
            known: link.rtt.is_some() && link.bandwidth.is_some(),
            warm: link.warm,
        }
    }

    /// The link that this is about.
    pub fn link(&self) -> LinkId {
        self.link
    }

    /// Bytes that could have come during a round trip.
    pub fn product(&self) -> u64 {
        self.exact_product() as u64
    }

    fn exact_product(&self) -> f64 {
        self.rtt.as_secs_f64() * self.bandwidth
    }

    /// How long the link is taken by the response to a request for so many bytes.
    pub fn transfer(&self, bytes: u64) -> Duration {
        Duration::try_from_secs_f64(TRANSFER * bytes as f64 / self.bandwidth).unwrap_or(Duration::MAX)
    }

    /// Compressed bytes to ask for at once when a reader waits.
    pub fn request(&self) -> u64 {
        (self.exact_product() * REQUEST).clamp(SMALLEST_REQUEST, LARGEST_REQUEST) as u64
    }

    /// Compressed bytes of a background request. While readers wait, one of them is in flight at a time. While none does there
    /// are several, so that the link never idles between two.
    pub fn background_request(&self) -> u64 {
        let delay = self.rtt.mul_f64(BACKGROUND_DELAY).max(LEAST_BACKGROUND_DELAY);
        (delay.as_secs_f64() * self.bandwidth).clamp(SMALLEST_BACKGROUND, LARGEST_BACKGROUND) as u64
    }

    /// Compressed bytes of a request for what a reader will want soon.
    pub fn run(&self) -> u64 {
        self.exact_product().clamp(SMALLEST_RUN, LARGEST_REQUEST) as u64
    }

    /// Into how many parts to cut a request for `bytes`, to be asked for side by side.
    ///
    /// A connection brings little in its first round trips, and twice as much in each as in the one before. So while all are
    /// cold, many bring the bytes in fewer round trips than one. The bytes that came lately say how much each can bring in the
    /// next. A request that no reader waits for has fewer parts, so that connections are left to others. The exception is the
    /// beginning of what is fetched ahead, with few bytes in flight `before` it: a reader will want that first.
    pub fn parts(&self, bytes: u64, priority: Priority, before: u64) -> u64 {
        if self.rtt < FAR {
            return 1;
        }
        let first = match priority {
            Priority::Demand => URGENT_WINDOWS,
            _ if before < self.product() / 4 => URGENT_WINDOWS,
            _ => OTHER_WINDOWS,
        };
        let window = first * FIRST_WINDOW + self.warm / MOST_PARTS;
        bytes.div_ceil(window).clamp(1, MOST_PARTS)
    }

    /// The most requests side by side, those of demand apart.
    pub fn requests(&self) -> usize {
        (UNDER_WAY * self.exact_product() / SMALL_REQUEST).clamp(FEWEST_REQUESTS, MOST_REQUESTS) as usize
    }

    /// Unwanted compressed bytes between two wanted ranges that cost less than another request beside the fewest there are.
    pub fn gap(&self) -> u64 {
        (self.exact_product() / FEWEST_REQUESTS).min(SMALL_REQUEST) as u64
    }

    /// Compressed bytes that may be under way for one of the priorities below demand.
    pub fn under_way(&self, priority: Priority, beside_demand: bool) -> u64 {
        let products = if beside_demand {
            UNDER_WAY_BESIDE_DEMAND
        } else {
            UNDER_WAY
        };
        let some = (self.exact_product() * products).max(LEAST_UNDER_WAY);
        let bytes = match priority {
            Priority::Background if beside_demand => self.background_request() as f64,
            Priority::Background if !self.known => FIRST_BACKGROUND_REQUESTS * self.background_request() as f64,
            Priority::Background => some.max(BACKGROUND_REQUESTS * self.background_request() as f64),
            _ => some,
        };
        bytes.min(MOST_UNDER_WAY) as u64
    }

    /// How long after the last demand request one has to reckon with the next.
    pub fn demand_is_over(&self) -> Duration {
        DEMAND_IS_OVER.max(self.rtt * ROUND_TRIPS_OF_DEMAND)
    }

    /// The furthest that a sequential reader is read ahead of, in compressed bytes.
    pub fn longest_window(&self) -> u64 {
        self.under_way(Priority::Readahead, false).max(4 * self.request())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(ms: u64, mbit: f64) -> Policy {
        Policy::of(Link {
            rtt: Some(Duration::from_millis(ms)),
            bandwidth: Some(mbit * 1e6 / 8.0),
            warm: 0,
            ..Link::LOCAL
        })
    }

    #[test]
    fn cold_connections_share_a_request() {
        let cold = Link {
            rtt: Some(Duration::from_millis(20)),
            bandwidth: None,
            warm: 0,
            ..Link::LOCAL
        };
        let parts = |warm, bytes| Policy::of(Link { warm, ..cold }).parts(bytes, Priority::Demand, 1_000_000);
        assert_eq!((parts(0, 10_000), parts(0, 50_000), parts(0, 1_000_000)), (1, 2, 8));
        assert_eq!((parts(1_000_000, 250_000), parts(8_000_000, 250_000)), (2, 1));
        assert_eq!(Policy::of(cold).parts(250_000, Priority::Likely, 1_000_000), 2);
        assert_eq!(Policy::of(cold).parts(250_000, Priority::Likely, 100_000), 8);
        assert_eq!(
            policy(1, 1000.0).parts(1_000_000, Priority::Demand, 0),
            1,
            "round trips cost nothing there"
        );
    }

    #[test]
    fn sizes_follow_the_link() {
        assert_eq!(policy(20, 100.0).request(), 325_000);
        assert_eq!(policy(80, 100.0).request(), 1_300_000);
        assert_eq!(policy(1, 100.0).request(), 64 << 10);
        assert_eq!(policy(80, 1000.0).request(), 4 << 20);
        let requests = |ms, mbit| policy(ms, mbit).requests();
        assert_eq!(
            (requests(1, 100.0), requests(20, 200.0), requests(80, 1000.0)),
            (6, 7, 32)
        );
        assert_eq!((policy(20, 200.0).gap(), policy(80, 1000.0).gap()), (83_333, 256 << 10));
        assert_eq!(policy(20, 200.0).under_way(Priority::Background, true), 400_000);
        assert_eq!(policy(20, 200.0).under_way(Priority::Likely, true), 1_500_000);
        assert_eq!(policy(20, 200.0).under_way(Priority::Background, false), 2_000_000);
        assert!(policy(500, 10_000.0).under_way(Priority::Likely, false) <= 24 << 20);
        let over = |ms| policy(ms, 100.0).demand_is_over().as_millis();
        assert_eq!((over(1), over(20), over(80)), (300, 300, 800));
    }

    #[test]
    fn several_background_requests_fill_a_link_that_nobody_reads_over() {
        for (ms, mbit) in [
            (1, 100.0),
            (1, 1000.0),
            (20, 200.0),
            (80, 100.0),
            (80, 1000.0),
            (300, 10_000.0),
        ] {
            let policy = policy(ms, mbit);
            assert!(2 * policy.background_request() <= policy.under_way(Priority::Background, false));
            assert!(policy.background_request() <= policy.under_way(Priority::Background, true));
        }
    }

    #[test]
    fn unmeasured_links_are_guessed_and_dead_ones_do_not_divide_by_zero() {
        let unknown = Policy::of(Link {
            rtt: None,
            bandwidth: None,
            warm: 0,
            ..Link::LOCAL
        });
        let known = policy(20, 200.0);
        assert_eq!(
            (unknown.request(), unknown.parts(1 << 20, Priority::Likely, 0)),
            (known.request(), 8)
        );
        assert_eq!(
            unknown.under_way(Priority::Likely, false),
            known.under_way(Priority::Likely, false)
        );
        assert_eq!(
            unknown.under_way(Priority::Background, false),
            800_000,
            "it may be slower than that"
        );
        let dead = Policy::of(Link {
            rtt: Some(Duration::ZERO),
            bandwidth: Some(0.0),
            warm: 0,
            ..Link::LOCAL
        });
        assert_eq!((dead.request(), dead.gap()), (64 << 10, 0));
    }
}
