//! Sizes that follow from the link: the size of requests, how many run side by side, and which gaps to fetch across.
//!
//! All sizes are measured in *products* of round trip and bandwidth. A product is the bytes that the link can deliver
//! during one round trip.

use std::time::Duration;

use super::Priority;
use crate::blob::{Link, LinkId};

/// Round trip assumed until it is measured: that of a registry in the next region. A larger guess makes the first
/// requests too large for a near registry; a smaller one makes them too small for a far one. The first measurement
/// replaces it.
const GUESSED_RTT: Duration = Duration::from_millis(20);
/// Bandwidth assumed until it is measured, in bytes per second: that of a common uplink. A larger guess puts too many
/// bytes in flight on a slow link; a smaller one leaves a fast link idle. The first measurement replaces it.
const GUESSED_BANDWIDTH: f64 = 25e6;
/// Best size of a demand request, in products.
/// Misses fall with the request size s as `s^-0.57` (measured in start-ups of six real programs). The time spent
/// waiting, `s^-0.57 * (RTT + s / B)`, is least at 0.57 / 0.43 products. Larger requests make readers wait for bytes
/// that they do not need. Smaller ones cost more misses, each with a round trip.
const REQUEST: f64 = 1.3;
/// Smallest demand request, in compressed bytes. A larger bound makes readers wait longer on a slow link. A smaller
/// one costs more misses on a near link.
const SMALLEST_REQUEST: f64 = 64.0 * 1024.0;
/// Largest request of demand and readahead, in compressed bytes. A larger bound fetches more bytes that no reader
/// needs. A smaller one costs more round trips on a fast, far link.
const LARGEST_REQUEST: f64 = 4.0 * 1024.0 * 1024.0;
/// Fewest requests that may be in flight at a time, not counting demand. With enough of them, one always delivers
/// while others wait for their responses or grow their congestion windows. Fewer would leave the link idle. More
/// would cost memory, since each request holds a decoder.
const FEWEST_REQUESTS: f64 = 6.0;
/// Most requests that may be in flight at a time, not counting demand. More would cost memory, since each request
/// holds a decoder. Fewer would leave a fast, far link idle.
const MOST_REQUESTS: f64 = 32.0;
/// Size of a small request, in compressed bytes: so many of them may be in flight that they fill the link together. A
/// larger value admits fewer requests, so that small ones leave the link idle. A smaller value admits more requests,
/// and each holds a decoder. The value also bounds the gaps that a request fetches across.
const SMALL_REQUEST: f64 = 256.0 * 1024.0;
/// Bytes in flight that no reader waits for, in products. Four products fill any link. More would lengthen the queue
/// that the next demand request waits behind; fewer would leave the link idle.
const UNDER_WAY: f64 = 4.0;
/// Bytes in flight that no reader waits for, in products, while readers wait for other bytes. Three products keep the
/// link busy with a shorter queue. More would delay demand; fewer would leave the link idle. Background requests get
/// less than this: one at a time.
const UNDER_WAY_BESIDE_DEMAND: f64 = 3.0;
/// Least bytes that may be in flight, however small the product is. More would delay demand on a slow link. Fewer
/// would leave a near link idle between two requests.
const LEAST_UNDER_WAY: f64 = 1024.0 * 1024.0;
/// Most bytes that may be in flight, however large the product is. More would lengthen the queue in front of demand.
/// Fewer would leave a fast, far link idle.
const MOST_UNDER_WAY: f64 = 24.0 * 1024.0 * 1024.0;

/// Time for which one background request occupies the link, in round trips. While readers wait, background requests
/// go one at a time, and a demand request waits at most this long behind one. Only [`SMALLEST_BACKGROUND`] bytes on a
/// slow link take longer. A larger value delays demand; a smaller one costs more requests.
const BACKGROUND_DELAY: f64 = 0.8;
/// Least time for which one background request occupies the link, where round trips are short. A larger value delays
/// demand; a smaller one costs more requests.
const LEAST_BACKGROUND_DELAY: Duration = Duration::from_millis(4);
/// Smallest background request, in compressed bytes. A larger bound delays demand on a slow link; a smaller one costs
/// more requests there.
const SMALLEST_BACKGROUND: f64 = 128.0 * 1024.0;
/// Largest background request, in compressed bytes. A larger bound would let fewer requests side by side fit into
/// [`MOST_UNDER_WAY`]. A smaller one costs more requests on a fast, far link.
const LARGEST_BACKGROUND: f64 = 4.0 * 1024.0 * 1024.0;
/// Least background requests in flight while there is no demand. More would cost memory, since each holds a decoder.
/// Fewer would leave the link idle between two requests.
const BACKGROUND_REQUESTS: f64 = 4.0;
/// Background requests in flight before the link was measured. More would keep the first reader waiting if the link
/// turns out slow. Fewer would leave the link idle.
const FIRST_BACKGROUND_REQUESTS: f64 = 2.0;

/// Time without demand after which no further demand is expected: the reader computes, or is gone. A larger value
/// leaves the link idle for longer. A smaller one lets background requests delay a reader that only paused.
const DEMAND_IS_OVER: Duration = Duration::from_millis(300);
/// Round trips without demand after which no further demand is expected, where these take longer than
/// [`DEMAND_IS_OVER`]. A larger value leaves a far link idle for longer. A smaller one lets background requests delay
/// a reader that only paused.
const ROUND_TRIPS_OF_DEMAND: u32 = 10;

/// Time that a response takes, as a multiple of its time at the full rate. A response does not come at the full rate
/// from its first byte on. A larger factor holds other requests back for longer; a smaller one makes them share the
/// link with demand.
const TRANSFER: f64 = 1.5;

/// Smallest request for bytes that a reader will soon need, in compressed bytes. A larger bound delivers spans out of
/// the order of need. A smaller one costs more requests.
const SMALLEST_RUN: f64 = 256.0 * 1024.0;
/// Bytes that a new connection delivers in its first round trip: ten segments (RFC 6928). A larger value cuts
/// requests into fewer parts, which costs round trips on cold connections. A smaller one takes more connections than
/// it saves time.
const FIRST_WINDOW: u64 = 14 * 1024;
/// Size of each part of an urgent request on cold connections, in first windows. A request is urgent if a reader
/// waits for it or soon will. A larger value costs round trips; a smaller one takes connections from other requests.
const URGENT_WINDOWS: u64 = 2;
/// Size of each part of any other request on cold connections, in first windows. A larger value costs round trips. A
/// smaller one takes connections from urgent requests.
const OTHER_WINDOWS: u64 = 12;
/// Most connections that one request is spread over. More would take connections from other requests. Fewer would
/// cost round trips while connections are cold.
const MOST_PARTS: u64 = 8;
/// Shortest round trip at which a request is spread over several connections. A larger value costs round trips on the
/// links below it. A smaller one costs requests where round trips take hardly any time.
const FAR: Duration = Duration::from_millis(4);

/// Sizes for one link.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Policy {
    link: LinkId,
    rtt: Duration,
    /// Bandwidth in bytes per second.
    bandwidth: f64,
    /// Whether round trip and bandwidth were both measured.
    known: bool,
    /// Bytes that came lately without a pause, see [`Link::warm`].
    warm: u64,
}

impl Policy {
    /// Returns the sizes for a link. Guesses what was not measured yet.
    pub fn of(link: Link) -> Self {
        Self {
            link: link.id,
            rtt: link.rtt.unwrap_or(GUESSED_RTT),
            bandwidth: link.bandwidth.unwrap_or(GUESSED_BANDWIDTH).max(1.0),
            known: link.rtt.is_some() && link.bandwidth.is_some(),
            warm: link.warm,
        }
    }

    /// Returns the link that the sizes are for.
    pub fn link(&self) -> LinkId {
        self.link
    }

    /// Returns the bytes that the link can deliver during a round trip.
    pub fn product(&self) -> u64 {
        self.exact_product() as u64
    }

    fn exact_product(&self) -> f64 {
        self.rtt.as_secs_f64() * self.bandwidth
    }

    /// Returns how long the response to a request for `bytes` occupies the link.
    pub fn transfer(&self, bytes: u64) -> Duration {
        Duration::try_from_secs_f64(TRANSFER * bytes as f64 / self.bandwidth).unwrap_or(Duration::MAX)
    }

    /// Returns the compressed bytes of a demand request.
    pub fn request(&self) -> u64 {
        (self.exact_product() * REQUEST).clamp(SMALLEST_REQUEST, LARGEST_REQUEST) as u64
    }

    /// Returns the compressed bytes of a background request. While readers wait, one background request is in flight
    /// at a time. While no reader waits, several are in flight, so that the link never idles between two.
    pub fn background_request(&self) -> u64 {
        let delay = self.rtt.mul_f64(BACKGROUND_DELAY).max(LEAST_BACKGROUND_DELAY);
        (delay.as_secs_f64() * self.bandwidth).clamp(SMALLEST_BACKGROUND, LARGEST_BACKGROUND) as u64
    }

    /// Returns the compressed bytes of a request for bytes that a reader will soon need.
    pub fn run(&self) -> u64 {
        self.exact_product().clamp(SMALLEST_RUN, LARGEST_REQUEST) as u64
    }

    /// Returns the number of parts into which to cut a request for `bytes`. The parts are requested side by side.
    ///
    /// A connection delivers little in its first round trips, and twice as much in each as in the one before. While
    /// all connections are cold, many of them therefore deliver the bytes in fewer round trips than one. The bytes
    /// that came lately ([`Link::warm`]) say how much each connection can deliver in its next round trip.
    ///
    /// A request that no reader waits for has fewer parts, which leaves connections to others. The exception is the
    /// beginning of what is fetched ahead, with few bytes in flight `before` it: a reader will need these bytes
    /// first.
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

    /// Returns the most requests that may be in flight side by side, not counting demand.
    pub fn requests(&self) -> usize {
        (UNDER_WAY * self.exact_product() / SMALL_REQUEST).clamp(FEWEST_REQUESTS, MOST_REQUESTS) as usize
    }

    /// Returns the longest gap between two wanted ranges that is worth fetching across, in compressed bytes. The
    /// unwanted bytes of such a gap cost less than one more request beside the fewest that are in flight.
    pub fn gap(&self) -> u64 {
        (self.exact_product() / FEWEST_REQUESTS).min(SMALL_REQUEST) as u64
    }

    /// Returns the compressed bytes that may be in flight for a priority below demand. `beside_demand` says whether
    /// there is demand.
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

    /// Returns how long after the last demand request further demand must be expected.
    pub fn demand_is_over(&self) -> Duration {
        DEMAND_IS_OVER.max(self.rtt * ROUND_TRIPS_OF_DEMAND)
    }

    /// Returns the furthest that readahead may be ahead of a sequential reader, in compressed bytes.
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
