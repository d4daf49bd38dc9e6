//! Measurements of hosts and blobs, made while the client talks to them: counters, round-trip time and bandwidth.
//!
//! Bandwidth is measured per host, over all its streams together. Parallel streams share the link, so the rate of one
//! stream does not show the bandwidth of the link.
//!
//! Only time in which bytes arrive counts. A reader that requests one piece after the other leaves the link idle for
//! a round trip each time. That idle time says nothing about the bandwidth either.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::blob::{Link, LinkId, Retries, RetryCounter};

/// How long the shortest round-trip time stays valid. Longer samples contain handshakes, the server's work and the
/// client's own queue. If the client believed them, its queue would grow. A longer window notices a slower route
/// later. A shorter one lets the queue into the measurement.
const RTT_WINDOW: Duration = Duration::from_secs(10);
/// Weight of a bandwidth sample that is higher than the current estimate. It is larger than [`WEIGHT_SLOWER`],
/// because a higher sample proves what the link can do.
const WEIGHT_FASTER: f64 = 0.4;
/// Weight of a bandwidth sample that is lower than the current estimate. It is small, because a lower sample mostly
/// shows effects of the client itself: slow start, small responses, a busy processor.
const WEIGHT_SLOWER: f64 = 0.05;
/// Shortest time of arriving bytes that a bandwidth sample covers. Over a shorter time, a sample would measure
/// buffers.
const WINDOW: Duration = Duration::from_millis(50);
/// Fewest bytes that a bandwidth sample covers. With fewer, a sample would measure buffers.
const WINDOW_BYTES: u64 = 128 * 1024;
/// Pause after which a connection counts as cold: the shortest retransmission timeout (RFC 6298, as Linux implements
/// it). After such a pause a sender starts again with its initial window (RFC 5681, section 4.1).
const PAUSE: Duration = Duration::from_millis(200);

/// A snapshot of the measurements of one host.
#[derive(Debug, Clone, PartialEq)]
pub struct HostStats {
    /// Host, with its port unless it is the default one.
    pub host: String,
    /// Requests sent.
    pub requests: u64,
    /// Body bytes received.
    pub bytes: u64,
    /// Shortest recent time from sending a request to receiving the head of its response.
    pub rtt: Option<Duration>,
    /// Smoothed bandwidth of all streams together while bytes were arriving, in bytes per second.
    pub bandwidth: Option<f64>,
    /// Body bytes received since the last pause that was long enough for connections to reset their congestion
    /// windows.
    pub warm: u64,
    /// Requests in flight: sent, with a response that has not fully arrived.
    pub streams: u32,
    /// Whether a request backs off before its next attempt.
    pub resting: bool,
}

/// What was fetched of one blob, through one handle and its clones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BlobStats {
    /// Requests sent for the blob, redirects included.
    pub requests: u64,
    /// Bytes of the blob that streams delivered to readers.
    pub bytes: u64,
}

/// Counters of one blob.
#[derive(Debug, Default)]
pub(super) struct BlobMeter {
    requests: AtomicU64,
    bytes: AtomicU64,
    retries: Arc<RetryCounter>,
}

impl BlobMeter {
    pub(super) fn request(&self, hops: u64) {
        self.requests.fetch_add(hops, Ordering::Relaxed);
    }

    pub(super) fn bytes(&self, count: u64) {
        self.bytes.fetch_add(count, Ordering::Relaxed);
    }

    /// The counter of repeated requests.
    pub(super) fn retry_counter(&self) -> Arc<RetryCounter> {
        self.retries.clone()
    }

    /// How often requests were repeated.
    pub(super) fn retries(&self) -> Retries {
        self.retries.snapshot()
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
    state: Mutex<MeterState>,
}

#[derive(Debug, Default)]
struct MeterState {
    requests: u64,
    answers: u64,
    bytes: u64,
    /// The shortest round-trip time, and when it was measured.
    rtt: Option<(Duration, Instant)>,
    bandwidth: Option<f64>,
    /// Requests in flight: sent, with a response that has not fully arrived.
    streams: u32,
    /// Time until which requests back off: the latest one if there are several.
    rests: Option<Instant>,
    /// Streams that have delivered their first bytes and have not ended.
    delivering: u32,
    /// When the last bytes arrived, if a stream is delivering.
    last: Option<Instant>,
    /// Time in which bytes were arriving, since the last sample.
    busy: Duration,
    /// Bytes that arrived in the time that `busy` counts.
    came: u64,
    /// When the latest bytes arrived, whether or not a stream is still delivering.
    latest: Option<Instant>,
    /// Bytes that arrived since the last pause longer than [`PAUSE`].
    warm: u64,
    /// Whether the host's last response came from a public address.
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

    fn state(&self) -> std::sync::MutexGuard<'_, MeterState> {
        self.state.lock().expect("no panic while locked")
    }

    /// Counts a request that is about to be sent.
    pub(super) fn request(&self) {
        let mut state = self.state();
        state.requests += 1;
        state.streams += 1;
    }

    /// Counts a request as ended, whether it succeeded or not.
    pub(super) fn closed(&self) {
        let mut state = self.state();
        state.streams = state.streams.saturating_sub(1);
    }

    /// Records that a request backs off for `time` before its next attempt.
    pub(super) fn rest(&self, time: Duration) {
        let mut state = self.state();
        let until = Instant::now() + time;
        state.rests = Some(state.rests.map_or(until, |rests| rests.max(until)));
    }

    /// Returns what is known about the link to this host.
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

    /// Records that the head of a response arrived `elapsed` after the request was sent.
    ///
    /// A new connection takes `handshakes` more round trips before the request. The first request to a host always
    /// opens a connection, so its time covers `1 + handshakes` round trips. Later requests count as one round trip.
    pub(super) fn answer(&self, elapsed: Duration, handshakes: u32) {
        let mut state = self.state();
        let trips = if state.answers == 0 { 1 + handshakes } else { 1 };
        state.answers += 1;
        state.round_trip(Instant::now(), elapsed / trips);
    }

    /// Records whether the host responded from a public address.
    pub(super) fn is_at(&self, public: bool) {
        self.state().is_public = public;
    }

    /// Whether the host's last response came from a public address.
    pub(super) fn is_public(&self) -> bool {
        self.state().is_public
    }

    /// Whether the host has ever responded.
    pub(super) fn reached(&self) -> bool {
        self.state().answers > 0
    }

    /// Counts the first bytes of a response's body, and marks the stream as delivering.
    ///
    /// If no other stream delivers, these bytes are no part of a bandwidth sample: the time they took is unknown.
    pub(super) fn began(&self, bytes: u64) {
        let mut state = self.state();
        state.bytes += bytes;
        state.flow(Instant::now(), bytes);
        state.delivering += 1;
    }

    /// Counts further bytes of a stream that [`HostMeter::began`] has counted.
    pub(super) fn came(&self, bytes: u64) {
        let mut state = self.state();
        state.bytes += bytes;
        state.flow(Instant::now(), bytes);
    }

    /// Counts the end of a stream that [`HostMeter::began`] has counted.
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

impl MeterState {
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

    /// Counts bytes that arrived at `now`. Updates the bandwidth when a sample is complete.
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
        let mut state = MeterState::default();
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
        let mut state = MeterState::default();
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
