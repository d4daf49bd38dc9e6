//! The way to a blob, as far as it was measured, and what follows from that about a stream that is slow.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// A link that showed more than this many times the present rate has stalled.
const STALLED_SHARE: f64 = 64.0;
/// A useful rate is at least this many bytes per second: a modem of 64 kbit/s brings twice as much.
const LEAST_USEFUL: f64 = 3.0 * 1024.0;
/// A rate above this is useful whatever the link showed: servers may slow down large downloads on purpose.
const MOST_USEFUL: f64 = 32.0 * 1024.0;

/// A stream is behind if it brings less than this part of what would be its share of the link.
const BEHIND: f64 = 16.0;
/// The share of a stream is counted over at least this time.
const LEAST_WINDOW: Duration = Duration::from_secs(1);
/// The share of a stream is counted over at least this many round trips, since a request may take some of them.
const ROUND_TRIPS: u32 = 16;
/// The share of a stream is counted over at least the time in which this many bytes should have come: fewer say nothing.
const EXPECTED: f64 = 64.0 * 1024.0;
/// A stream that brings this many bytes per second is never behind, however fast the link is.
const FAST_ENOUGH: f64 = 256.0 * 1024.0;
/// The share of a stream is counted over no longer than this, however slow the link is.
const LONGEST_WINDOW: Duration = Duration::from_secs(20);
/// What a link can do that was not measured, in bytes per second, and how long it is given at least.
const UNMEASURED: f64 = 64.0 * 1024.0;
const UNMEASURED_WINDOW: Duration = Duration::from_secs(3);

/// Number of a link: one for each host that this process talks to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LinkId(pub u32);

impl LinkId {
    /// The local disks.
    pub const LOCAL: Self = Self(0);

    /// A number that no other link has.
    pub fn next() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// The way to a blob, as far as it was measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Link {
    /// Which link.
    pub id: LinkId,
    /// Time from asking to the first byte of the answer.
    pub rtt: Option<Duration>,
    /// Bytes per second of all streams together.
    pub bandwidth: Option<f64>,
    /// Bytes that came lately, without a pause: with them the windows of the connections have grown.
    pub warm: u64,
    /// Requests under way: they share the link.
    pub streams: u32,
    /// A request failed, and the next attempt waits on purpose: the server is busy or refuses for a while.
    pub resting: bool,
}

/// How much has to come in which time for a stream not to be behind.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pace {
    /// Time over which is counted.
    pub window: Duration,
    /// Bytes in that time.
    pub least: u64,
}

impl Link {
    /// A local disk: no trip to speak of, and about what reading and decoding one stream gives.
    pub const LOCAL: Self = Self {
        id: LinkId::LOCAL,
        rtt: Some(Duration::from_micros(100)),
        bandwidth: Some(1e9),
        warm: 0,
        streams: 0,
        resting: false,
    };

    /// Bytes per second of all streams together below which the link counts as stalled. A slow link that is steady was
    /// measured as slow, and is not stalled.
    pub fn useful_rate(&self) -> f64 {
        let share = self.bandwidth.unwrap_or(0.0) / STALLED_SHARE;
        share.clamp(LEAST_USEFUL, MOST_USEFUL)
    }

    /// What one stream has to bring not to be far behind the others and behind what the link has shown.
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
        // Many share a fast link: each has so much less to bring.
        assert!(rate(link(1.6e6, 100).pace()) < 1.1e3);
        // Over a slow link it takes long until anything can be said.
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
