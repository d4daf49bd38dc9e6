//! The link to a blob, as far as it was measured, and which streams over it are too slow.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// A link has stalled if its bandwidth is more than this many times its present rate. A larger value waits longer for
/// a link that only trickles. A smaller one gives up a link that is busy with other streams.
const STALLED_SHARE: f64 = 64.0;
/// Least rate that can be useful, in bytes per second. A modem of 64 kbit/s brings twice as much. A larger bound
/// gives up slow links that are steady; a smaller one waits longer for a link that trickles.
const LEAST_USEFUL: f64 = 3.0 * 1024.0;
/// Rate in bytes per second from which on a link is useful, whatever it showed before. Servers may slow down large
/// downloads on purpose. A larger bound gives up such downloads; a smaller one waits longer for a link that trickles.
const MOST_USEFUL: f64 = 32.0 * 1024.0;

/// A stream is behind if it brings less than its share of the link, divided by this. A larger value leaves readers
/// waiting for slow connections. A smaller one sends more second requests that are of no use.
const BEHIND: f64 = 16.0;
/// Least time over which the bytes of a stream are counted. A longer time leaves readers waiting for slow
/// connections; a shorter one takes a short pause for a slow connection.
const LEAST_WINDOW: Duration = Duration::from_secs(1);
/// Least round trips over which the bytes of a stream are counted, since a request may take some of them. More leave
/// readers waiting for slow connections. Fewer take a far server for a slow connection.
const ROUND_TRIPS: u32 = 16;
/// Least bytes that should have come in the time over which a stream is counted: fewer say nothing. More leave
/// readers waiting for slow connections over a slow link.
const EXPECTED: f64 = 64.0 * 1024.0;
/// Rate in bytes per second at which a stream is never behind, however fast the link is. A larger value sends more
/// second requests; a smaller one leaves readers waiting for slow connections over a fast link.
const FAST_ENOUGH: f64 = 256.0 * 1024.0;
/// Longest time over which the bytes of a stream are counted, however slow the link is. A longer time leaves readers
/// waiting for slow connections; a shorter one judges a stream by too few bytes.
const LONGEST_WINDOW: Duration = Duration::from_secs(20);
/// Bandwidth assumed of a link that was not measured, in bytes per second. A larger guess sends second requests over
/// slow links; a smaller one leaves readers waiting for slow connections.
const UNMEASURED: f64 = 64.0 * 1024.0;
/// Least time over which the bytes of a stream are counted while the link is not measured. A longer time leaves
/// readers waiting for slow connections; a shorter one counts the first round trips as slow.
const UNMEASURED_WINDOW: Duration = Duration::from_secs(3);

/// Number of a link. This process has one link to each host that it talks to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LinkId(pub u32);

impl LinkId {
    /// The local disks.
    pub const LOCAL: Self = Self(0);

    /// Returns a number that no other link has.
    pub fn next() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// The link to a blob, as far as it was measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Link {
    /// Number of the link.
    pub id: LinkId,
    /// Time from a request to the first byte of the response.
    pub rtt: Option<Duration>,
    /// Bytes per second of all streams together.
    pub bandwidth: Option<f64>,
    /// Bytes that came lately, without a pause. They have made the congestion windows of the connections grow.
    pub warm: u64,
    /// Requests in flight. They share the link.
    pub streams: u32,
    /// Whether a request failed and its retry waits on purpose: the server is busy or refuses for a while.
    pub resting: bool,
}

/// How many bytes must come in which time for a stream not to be behind.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pace {
    /// Time over which bytes are counted.
    pub window: Duration,
    /// Least bytes in `window`.
    pub least: u64,
}

impl Link {
    /// A local disk: hardly any round trip, and about the bandwidth with which one stream is read and decoded.
    pub const LOCAL: Self = Self {
        id: LinkId::LOCAL,
        rtt: Some(Duration::from_micros(100)),
        bandwidth: Some(1e9),
        warm: 0,
        streams: 0,
        resting: false,
    };

    /// Returns the bytes per second of all streams together below which the link counts as stalled. A slow but steady
    /// link was measured as slow, and does not count as stalled.
    pub(crate) fn useful_rate(&self) -> f64 {
        let share = self.bandwidth.unwrap_or(0.0) / STALLED_SHARE;
        share.clamp(LEAST_USEFUL, MOST_USEFUL)
    }

    /// Returns what one stream must bring. A stream that brings less is far behind the others, and behind what the
    /// link has shown.
    pub fn pace(&self) -> Pace {
        let streams = f64::from(self.streams.max(1));
        let share = self.bandwidth.unwrap_or(UNMEASURED).max(1.0) / streams;
        let least = match self.bandwidth {
            Some(_) => LEAST_WINDOW.max(self.rtt.unwrap_or_default() * ROUND_TRIPS),
            None => UNMEASURED_WINDOW,
        };
        let window = Duration::try_from_secs_f64(EXPECTED / share).unwrap_or(LONGEST_WINDOW);
        let window = window.max(least).min(LONGEST_WINDOW);
        let rate = (share / BEHIND).min(FAST_ENOUGH);
        Pace {
            window,
            least: (rate * window.as_secs_f64()) as u64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(bandwidth: f64, streams: u32) -> Link {
        Link {
            id: LinkId::next(),
            rtt: Some(Duration::from_millis(20)),
            bandwidth: Some(bandwidth),
            warm: 0,
            streams,
            resting: false,
        }
    }

    #[test]
    fn a_slow_steady_link_is_useful_and_a_trickle_over_any_link_is_not() {
        for (bandwidth, rate, useful) in [
            (8e3, 7e3, true),
            (2e3, 2e3, false),
            (1e6, 20e3, true),
            (25e6, 20e3, false),
            (25e6, 40e3, true),
            (0.0, 2e3, false),
        ] {
            assert_eq!(rate >= link(bandwidth, 1).useful_rate(), useful, "{bandwidth} {rate}");
        }
        assert!(
            Link {
                bandwidth: None,
                ..link(0.0, 1)
            }
            .useful_rate()
                > 2e3
        );
    }

    #[test]
    fn a_stream_is_behind_at_a_small_part_of_its_share() {
        let rate = |pace: Pace| pace.least as f64 / pace.window.as_secs_f64();
        let one = link(25e6, 1).pace();
        assert_eq!(one.window, LEAST_WINDOW);
        assert_eq!(rate(one), FAST_ENOUGH);
        assert_eq!(rate(link(1.6e6, 1).pace()), 100e3);
        // Many streams share a fast link, so each has less to bring.
        assert!(rate(link(1.6e6, 100).pace()) < 1.1e3);
        // Over a slow link, it takes long until a stream can be judged.
        let modem = link(8e3, 2).pace();
        assert!(
            modem.window >= Duration::from_secs(16) && rate(modem) < 300.0,
            "{modem:?}"
        );
        let far = Link {
            rtt: Some(Duration::from_millis(500)),
            ..link(25e6, 1)
        };
        assert_eq!(far.pace().window, Duration::from_secs(8));
        let unmeasured = Link {
            bandwidth: None,
            ..link(0.0, 1)
        };
        assert_eq!(unmeasured.pace().window, UNMEASURED_WINDOW);
        assert!(
            link(0.0, 0).pace().window <= LONGEST_WINDOW,
            "nothing is divided by zero"
        );
    }
}
