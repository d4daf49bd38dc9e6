//! What was learned about hosts and blobs while talking to them: counters, round-trip time and bandwidth.
//!
//! Bandwidth is measured per host over all its streams together, in windows during which at least one is open, because
//! parallel streams share the link and each alone says nothing about it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Weight of a new sample. An eighth, as TCP smooths its round-trip time (RFC 6298).
const WEIGHT: f64 = 0.125;
/// A lower round trip is believed sooner: higher ones contain handshakes and server work.
const WEIGHT_LOWER: f64 = 0.5;
/// A bandwidth sample covers at least this time and this many bytes, else it measures buffers.
const WINDOW: Duration = Duration::from_millis(100);
const WINDOW_BYTES: u64 = 128 * 1024;

/// A snapshot of what is known about a host.
#[derive(Debug, Clone, PartialEq)]
pub struct HostStats {
    /// Host and port.
    pub host: String,
    /// Requests sent.
    pub requests: u64,
    /// Body bytes received.
    pub bytes: u64,
    /// Smoothed time from sending a request to the head of the answer.
    pub rtt: Option<Duration>,
    /// Smoothed bytes per second of all streams together. What a slow consumer does not take is not measured: it then looks
    /// like a slow link.
    pub bandwidth: Option<f64>,
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
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    requests: u64,
    answers: u64,
    bytes: u64,
    rtt: Option<f64>,
    bandwidth: Option<f64>,
    streams: u32,
    window: Option<(Instant, u64)>,
}

impl HostMeter {
    pub(super) fn new(host: String) -> Self {
        Self {
            host,
            state: Mutex::default(),
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        // Counters stay meaningful whatever a panicking holder left.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn request(&self) {
        self.state().requests += 1;
    }

    /// The head of an answer arrived `elapsed` after the request was sent.
    pub(super) fn answer(&self, elapsed: Duration) {
        let mut state = self.state();
        state.answers += 1;
        let sample = elapsed.as_secs_f64();
        let smoothed = match state.rtt {
            None => sample,
            Some(old) if sample < old => old + (sample - old) * WEIGHT_LOWER,
            Some(old) => old + (sample - old) * WEIGHT,
        };
        state.rtt = Some(smoothed);
    }

    /// Whether the host has ever answered.
    pub(super) fn reached(&self) -> bool {
        self.state().answers > 0
    }

    pub(super) fn stream_opened(&self) {
        let mut state = self.state();
        state.streams += 1;
        if state.streams == 1 {
            state.window = Some((Instant::now(), 0));
        }
    }

    pub(super) fn stream_closed(&self) {
        let mut state = self.state();
        state.streams = state.streams.saturating_sub(1);
        if state.streams == 0 {
            state.sample(Instant::now(), WINDOW / 10);
            state.window = None;
        }
    }

    pub(super) fn bytes(&self, count: u64) {
        let mut state = self.state();
        state.bytes += count;
        if let Some((_, bytes)) = &mut state.window {
            *bytes += count;
        }
        state.sample(Instant::now(), WINDOW);
    }

    pub(super) fn snapshot(&self) -> HostStats {
        let state = self.state();
        HostStats {
            host: self.host.clone(),
            requests: state.requests,
            bytes: state.bytes,
            rtt: state.rtt.map(Duration::from_secs_f64),
            bandwidth: state.bandwidth,
        }
    }
}

impl State {
    fn sample(&mut self, now: Instant, shortest: Duration) {
        let Some((start, bytes)) = self.window else { return };
        let elapsed = now.saturating_duration_since(start);
        if elapsed < shortest || bytes < WINDOW_BYTES || elapsed.is_zero() {
            return;
        }
        let sample = bytes as f64 / elapsed.as_secs_f64();
        self.bandwidth = Some(match self.bandwidth {
            None => sample,
            Some(old) => old + (sample - old) * WEIGHT,
        });
        self.window = Some((now, 0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trips_fall_fast_and_rise_slowly() {
        let meter = HostMeter::new("h".into());
        assert!(!meter.reached());
        meter.answer(Duration::from_millis(100));
        meter.answer(Duration::from_millis(20));
        assert_eq!(meter.snapshot().rtt.unwrap().as_millis(), 60);
        meter.answer(Duration::from_millis(140));
        assert_eq!(meter.snapshot().rtt.unwrap().as_millis(), 70);
        assert!(meter.reached());
    }

    #[test]
    fn bandwidth_counts_all_streams_of_a_window() {
        let mut state = State::default();
        let start = Instant::now();
        state.window = Some((start, 10_000_000));
        state.sample(start + Duration::from_millis(50), WINDOW);
        assert_eq!(state.bandwidth, None);
        state.sample(start + Duration::from_secs(1), WINDOW);
        assert_eq!(state.bandwidth, Some(10_000_000.0));
        state.sample(start + Duration::from_secs(2), WINDOW);
        assert_eq!(state.bandwidth, Some(10_000_000.0), "an idle window is no sample");
    }
}
