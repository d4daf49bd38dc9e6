//! What was learned about hosts and blobs while talking to them: counters, round-trip time and bandwidth.
//!
//! Bandwidth is measured per host over all its streams together, because parallel streams share the link and each alone
//! says nothing about it; and only over the time in which bytes were coming: a reader that asks for one piece after the other
//! leaves the link idle for a round trip each time, which says nothing about it either.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::blob::{Link, LinkId};

/// The round trip is the shortest seen in this time: longer ones contain handshakes, the server's work and the queue of our
/// own making, which would grow if it were believed.
const RTT_WINDOW: Duration = Duration::from_secs(10);
/// Weight of a new sample of the bandwidth. A higher one is believed sooner: the link can do that, and what makes it look
/// slower is mostly ourselves (slow start, small answers, a busy processor).
const WEIGHT_FASTER: f64 = 0.4;
const WEIGHT_SLOWER: f64 = 0.05;
/// A bandwidth sample covers at least this time of bytes coming in and this many bytes, else it measures buffers.
const WINDOW: Duration = Duration::from_millis(50);
const WINDOW_BYTES: u64 = 128 * 1024;
/// After a pause as long as the shortest retransmission timeout (RFC 6298 as Linux has it) a sender begins anew with the
/// first window (RFC 5681, section 4.1).
const PAUSE: Duration = Duration::from_millis(200);

/// A snapshot of what is known about a host.
#[derive(Debug, Clone, PartialEq)]
pub struct HostStats {
    /// Host and port.
    pub host: String,
    /// Requests sent.
    pub requests: u64,
    /// Body bytes received.
    pub bytes: u64,
    /// Shortest time lately from sending a request to the head of the answer.
    pub rtt: Option<Duration>,
    /// Smoothed bytes per second of all streams together, while any were coming.
    pub bandwidth: Option<f64>,
    /// Body bytes received since the last pause that was long enough for connections to forget their windows.
    pub warm: u64,
    /// Requests that were sent and whose answers have not come whole.
    pub streams: u32,
    /// Requests wait on purpose before they are sent again.
    pub resting: bool,
}

/// What was fetched of one blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BlobStats {
    /// Requests sent for it, redirects included.
    pub requests: u64,
    /// Body bytes received.
    pub bytes: u64,
}

/// Counters of one blob.
#[derive(Debug, Default)]
pub(super) struct BlobMeter {
    requests: AtomicU64,
    bytes: AtomicU64,
}

impl BlobMeter {
    pub(super) fn request(&self, hops: u64) {
        self.requests.fetch_add(hops, Ordering::Relaxed);
    }

    pub(super) fn bytes(&self, count: u64) {
        self.bytes.fetch_add(count, Ordering::Relaxed);
    }

    pub(super) fn snapshot(&self) -> BlobStats {
        BlobStats {
            requests: self.requests.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
        }
    }
}

/// Live measurements of one host.
#[derive(Debug)]
pub(super) struct HostMeter {
    host: String,
    id: LinkId,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    requests: u64,
    answers: u64,
    bytes: u64,
    /// The shortest round trip, and when it was seen.
    rtt: Option<(Duration, Instant)>,
    bandwidth: Option<f64>,
    /// Requests that were sent and whose answers have not come whole.
    streams: u32,
    /// Until when requests wait on purpose.
    rests: Option<Instant>,
    /// Streams that have begun to deliver and have not ended.
    delivering: u32,
    /// When the last bytes came, if a stream is delivering.
    last: Option<Instant>,
    /// Time in which bytes were coming, and how many, since the last sample.
    busy: Duration,
    came: u64,
    /// When the latest bytes came, and how many since the last pause.
    latest: Option<Instant>,
    warm: u64,
    /// Whether it answered from a public address the last time.
    is_public: bool,
}

impl HostMeter {
    pub(super) fn new(host: String) -> Self {
        Self {
            host,
            id: LinkId::next(),
            state: Mutex::default(),
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        // Counters stay meaningful whatever a panicking holder left.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request is sent.
    pub(super) fn request(&self) {
        let mut state = self.state();
        state.requests += 1;
        state.streams += 1;
    }

    /// A request is over, whatever came of it.
    pub(super) fn closed(&self) {
        let mut state = self.state();
        state.streams = state.streams.saturating_sub(1);
    }

    /// The next attempt of a request waits for so long on purpose.
    pub(super) fn rest(&self, time: Duration) {
        let mut state = self.state();
        let until = Instant::now() + time;
        state.rests = Some(state.rests.map_or(until, |rests| rests.max(until)));
    }

    /// What is known of the way to this host.
    pub(super) fn link(&self) -> Link {
        let stats = self.snapshot();
        Link {
            id: self.id,
            rtt: stats.rtt,
            bandwidth: stats.bandwidth,
            warm: stats.warm,
            streams: stats.streams,
            resting: stats.resting,
        }
    }

    /// The head of an answer arrived `elapsed` after the request was sent, which takes `handshakes` round trips before it on a
    /// new connection. The first request to a host always has one.
    pub(super) fn answer(&self, elapsed: Duration, handshakes: u32) {
        let mut state = self.state();
        let trips = if state.answers == 0 { 1 + handshakes } else { 1 };
        state.answers += 1;
        state.round_trip(Instant::now(), elapsed / trips);
    }

    /// The host answered from an address that is public, or from one that is not.
    pub(super) fn is_at(&self, public: bool) {
        self.state().is_public = public;
    }

    /// Whether the host is known to have a public address.
    pub(super) fn is_public(&self) -> bool {
        self.state().is_public
    }

    /// Whether the host has ever answered.
    pub(super) fn reached(&self) -> bool {
        self.state().answers > 0
    }

    /// The first bytes of an answer's body. They say when the stream began; how long they were under way nobody knows.
    pub(super) fn began(&self, bytes: u64) {
        let mut state = self.state();
        state.bytes += bytes;
        state.flow(Instant::now(), bytes);
        state.delivering += 1;
    }

    /// More bytes of a stream that began.
    pub(super) fn came(&self, bytes: u64) {
        let mut state = self.state();
        state.bytes += bytes;
        state.flow(Instant::now(), bytes);
    }

    /// A stream that began is over.
    pub(super) fn ended(&self) {
        let mut state = self.state();
        state.delivering = state.delivering.saturating_sub(1);
        if state.delivering == 0 {
            state.last = None;
        }
    }

    pub(super) fn snapshot(&self) -> HostStats {
        let state = self.state();
        HostStats {
            host: self.host.clone(),
            warm: if state.is_cold(Instant::now()) { 0 } else { state.warm },
            requests: state.requests,
            bytes: state.bytes,
            rtt: state.rtt.map(|(rtt, _)| rtt),
            bandwidth: state.bandwidth,
            streams: state.streams,
            resting: state.rests.is_some_and(|rests| rests > Instant::now()),
        }
    }
}

impl State {
    fn round_trip(&mut self, now: Instant, sample: Duration) {
        let shortest = self
            .rtt
            .filter(|(rtt, seen)| *rtt < sample && now.saturating_duration_since(*seen) < RTT_WINDOW);
        self.rtt = Some(shortest.unwrap_or((sample, now)));
    }

    fn is_cold(&self, now: Instant) -> bool {
        self.latest
            .is_none_or(|latest| now.saturating_duration_since(latest) > PAUSE)
    }

    /// Bytes came in at `now`.
    fn flow(&mut self, now: Instant, bytes: u64) {
        if self.is_cold(now) {
            self.warm = 0;
        }
        self.warm += bytes;
        self.latest = Some(now);
        if let Some(last) = self.last {
            self.busy += now.saturating_duration_since(last);
            self.came += bytes;
        }
        self.last = Some(now);
        if self.busy < WINDOW || self.came < WINDOW_BYTES {
            return;
        }
        let sample = self.came as f64 / self.busy.as_secs_f64();
        self.bandwidth = Some(match self.bandwidth {
            None => sample,
            Some(old) if sample > old => old + (sample - old) * WEIGHT_FASTER,
            Some(old) => old + (sample - old) * WEIGHT_SLOWER,
        });
        (self.busy, self.came) = (Duration::ZERO, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_round_trip_is_the_shortest_for_a_while() {
        let meter = HostMeter::new("h".into());
        assert!(!meter.reached());
        meter.answer(Duration::from_millis(300), 2);
        assert_eq!(meter.snapshot().rtt.unwrap().as_millis(), 100);
        meter.answer(Duration::from_millis(20), 2);
        assert!(meter.reached());
        let mut state = State::default();
        let start = Instant::now();
        for (seconds, ms, shortest) in [(0, 20, 20), (1, 90, 20), (9, 60, 20), (11, 50, 50), (12, 30, 30)] {
            state.round_trip(start + Duration::from_secs(seconds), Duration::from_millis(ms));
            assert_eq!(state.rtt.unwrap().0.as_millis(), shortest);
        }
    }

    #[test]
    fn requests_under_way_are_counted_and_a_rest_ends() {
        let meter = HostMeter::new("h".into());
        meter.request();
        meter.request();
        meter.closed();
        assert_eq!((meter.link().streams, meter.link().resting), (1, false));
        assert_ne!(meter.link().id, HostMeter::new("h".into()).link().id);
        meter.rest(Duration::from_secs(60));
        meter.rest(Duration::ZERO);
        assert!(meter.link().resting, "the longest rest counts");
        let meter = HostMeter::new("h".into());
        meter.rest(Duration::ZERO);
        assert!(!meter.link().resting);
    }

    #[test]
    fn bandwidth_is_that_of_all_streams_while_they_deliver() {
        let mut state = State::default();
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        state.delivering = 1;
        state.flow(at(0), 1_000_000);
        assert_eq!(state.bandwidth, None, "nobody knows how long the first bytes took");
        state.flow(at(25), 500_000);
        state.flow(at(50), 750_000);
        assert_eq!(state.bandwidth, Some(25_000_000.0));
        // The stream ends, and the next one begins a second later.
        state.last = None;
        state.flow(at(1050), 100_000);
        state.flow(at(1100), 1_250_000);
        assert_eq!(state.bandwidth, Some(25_000_000.0), "a pause is no sample");
        state.flow(at(1200), 10_000_000);
        assert!(state.bandwidth.unwrap() > 50_000_000.0, "faster is believed soon");
        state.flow(at(1300), 250_000);
        assert!(state.bandwidth.unwrap() > 50_000_000.0, "slower is not");
        assert_eq!(state.warm, 11_600_000, "since the pause");
        assert!(!state.is_cold(at(1400)) && state.is_cold(at(1600)));
    }
}
