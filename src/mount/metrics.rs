//! The figures of a mount for a monitoring system, in the text format of Prometheus.
//!
//! They are those of `ocifs status`, under the names in [`METRICS`]. A [`MetricsPlace`] says where they go. Either
//! an HTTP server answers with them, or they are in a file that is written again every few seconds. A place that cannot be used is an error before
//! anything is mounted.
//!
//! `src/docs/metrics.md` has the same table as [`METRICS`], and a test compares the two.

mod exporter;
mod http;
mod samples;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

pub(super) use exporter::Exporter;

/// Where the figures of a mount go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MetricsPlace {
    /// An HTTP server at this address answers with them.
    Tcp(SocketAddr),
    /// An HTTP server at this Unix socket answers with them.
    Unix(PathBuf),
    /// They are written to this file.
    File(PathBuf),
}

/// A text that names no place for figures.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text} is no place for metrics: HOST:PORT with a literal address, unix:SOCKET, or the path of a file with a slash"
)]
pub struct UnknownMetricsPlace {
    text: String,
}

impl MetricsPlace {
    /// Reads HOST:PORT, `unix:PATH`, or the path of a file, which has a slash. Paths are made absolute.
    pub fn parse(text: &str) -> Result<Self, UnknownMetricsPlace> {
        let unknown = || UnknownMetricsPlace { text: text.to_owned() };
        let absolute = |path: &str| std::path::absolute(Path::new(path)).map_err(|_| unknown());
        if let Some(path) = text.strip_prefix("unix:") {
            return Ok(Self::Unix(absolute(path)?));
        }
        if text.contains('/') {
            return Ok(Self::File(absolute(text)?));
        }
        // Only literal addresses and one name: no command waits for a name server.
        let literal = match text.strip_prefix("localhost:") {
            Some(port) => format!("127.0.0.1:{port}"),
            None => text.to_owned(),
        };
        literal.parse().map(Self::Tcp).map_err(|_| unknown())
    }
}

/// How a metric changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum MetricKind {
    /// It only grows.
    Counter,
    /// It goes up and down.
    Gauge,
}

impl MetricKind {
    fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
        }
    }
}

/// What a user can rely on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stability {
    /// Name, unit and meaning stay.
    Stable,
    /// It says how something works that may come to work in another way.
    Experimental,
}

/// What a metric is called, and what it means. Its unit is at the end of its name.
#[derive(Debug)]
struct Metric {
    name: &'static str,
    kind: MetricKind,
    stability: Stability,
    help: &'static str,
}

const fn metric(name: &'static str, kind: MetricKind, stability: Stability, help: &'static str) -> Metric {
    Metric {
        name,
        kind,
        stability,
        help,
    }
}

use MetricKind::{Counter, Gauge};
use Stability::{Experimental, Stable};

/// All metrics, in the order in which they are shown.
#[rustfmt::skip]
const METRICS: &[Metric] = &[
    metric("ocifs_info", Gauge, Stable, "Always 1; the labels say what is served, by what"),
    metric("ocifs_state", Gauge, Stable, "1 for the state of the mount (preparing, stalled, ready, failed, ended), 0 for the others"),
    metric("ocifs_problem", Gauge, Stable, "1 if something does not work at the moment; ocifs status says what"),
    metric("ocifs_start_time_seconds", Gauge, Stable, "When the process started, since 1970"),
    metric("ocifs_mount_seconds", Gauge, Stable, "Time from the start of the process until the image was mounted"),
    metric("ocifs_ready_seconds", Gauge, Stable, "Time from the start of the process until the tree was ready"),
    metric("ocifs_stalled_seconds", Gauge, Stable, "Time without useful bytes while the preparation stalls, otherwise 0"),
    metric("ocifs_image_bytes", Gauge, Stable, "Compressed size of the layers"),
    metric("ocifs_local_bytes", Gauge, Stable, "Compressed bytes that need no fetch"),
    metric("ocifs_fetched_bytes_total", Counter, Stable, "Compressed bytes fetched, by what for: demand, readahead, likely, background, pass, table"),
    metric("ocifs_used_bytes_total", Counter, Stable, "Compressed bytes of what was read"),
    metric("ocifs_served_bytes_total", Counter, Stable, "Bytes given to readers"),
    metric("ocifs_requests_total", Counter, Stable, "Requests for layers"),
    metric("ocifs_second_requests_total", Counter, Experimental, "Requests that were sent because an earlier one was far too slow"),
    metric("ocifs_retries_total", Counter, Stable, "Requests that were repeated, by what went wrong: rate_limited, timed_out, unreachable, server_error"),
    metric("ocifs_requests_in_flight", Gauge, Experimental, "Requests in flight: demand for readers, ahead for all others"),
    metric("ocifs_requests_waiting", Gauge, Experimental, "Requests that wait until the link has room"),
    metric("ocifs_requests_hanging", Gauge, Experimental, "Requests that bring no bytes at the moment"),
    metric("ocifs_reads_total", Counter, Stable, "Reads that reached the process: at_once without waiting, or waited"),
    metric("ocifs_reads_waiting", Gauge, Stable, "Reads that wait"),
    metric("ocifs_read_seconds", Gauge, Stable, "Times of all reads since the start"),
    metric("ocifs_wait_seconds", Gauge, Stable, "Times of the reads that had to wait, since the start"),
    metric("ocifs_healed_spans_total", Counter, Stable, "Pieces of data that were damaged on disk and fetched again"),
    metric("ocifs_evicted_spans_total", Counter, Stable, "Pieces of data that the process deleted to make room in the store"),
    metric("ocifs_evicted_trees_total", Counter, Stable, "Trees that the process deleted to make room in the store"),
    metric("ocifs_evicted_bytes_total", Counter, Stable, "Bytes on disk that came free by that"),
    metric("ocifs_decoded_memory_bytes", Gauge, Experimental, "Decoded data in memory"),
    metric("ocifs_resident_memory_bytes", Gauge, Stable, "Memory that the process takes"),
    metric("ocifs_round_trip_seconds", Gauge, Experimental, "Time from a request to the first byte of its response"),
    metric("ocifs_bandwidth_bytes_per_second", Gauge, Experimental, "Rate at which all requests together bring bytes"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_told_apart() {
        let tcp = |text: &str| MetricsPlace::Tcp(text.parse().unwrap());
        for (text, place) in [
            ("127.0.0.1:9100", tcp("127.0.0.1:9100")),
            ("localhost:0", tcp("127.0.0.1:0")),
            ("[::]:9100", tcp("[::]:9100")),
            ("unix:/run/a:1", MetricsPlace::Unix("/run/a:1".into())),
            ("/var/a:1.prom", MetricsPlace::File("/var/a:1.prom".into())),
            ("./a", MetricsPlace::File(std::env::current_dir().unwrap().join("a"))),
        ] {
            assert_eq!(MetricsPlace::parse(text), Ok(place), "{text}");
        }
        for text in ["", "9100", "name:9100", "127.0.0.1", "127.0.0.1:99999", "file", "unix:"] {
            assert!(MetricsPlace::parse(text).is_err(), "{text}");
        }
    }

    /// The unit that is at the end of a name; `-` for a number of things.
    fn unit(name: &str) -> &'static str {
        let name = name.strip_suffix("_total").unwrap_or(name);
        let units = [
            ("_bytes_per_second", "bytes per second"),
            ("_seconds", "seconds"),
            ("_bytes", "bytes"),
        ];
        let unit = units.into_iter().find(|(end, _)| name.ends_with(end));
        unit.map_or("-", |(_, unit)| unit)
    }

    #[test]
    fn the_documentation_has_the_same_table() {
        let text = include_str!("../docs/metrics.md");
        let rows = text.lines().filter_map(|line| line.strip_prefix("| `ocifs_"));
        let cells = rows.map(|row| row.trim_end_matches(" |").split(" | ").collect::<Vec<_>>());
        // The labels are compared with those of a mount, in the integration tests.
        let rows: Vec<String> = cells
            .map(|cells| [&cells[..3], &cells[4..]].concat().join(" | "))
            .collect();
        let expected = METRICS.iter().map(|metric| {
            let name = metric.name.strip_prefix("ocifs_").unwrap();
            let (kind, unit) = (metric.kind.name(), unit(name));
            let stability = format!("{:?}", metric.stability).to_lowercase();
            format!("{name}` | {kind} | {unit} | {stability} | {}", metric.help)
        });
        assert_eq!(rows, expected.collect::<Vec<_>>());
    }
}
