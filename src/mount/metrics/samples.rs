//! The text format of Prometheus, and the values of the metrics
//! (<https://prometheus.io/docs/instrumenting/exposition_formats/>).

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::{SystemTime, UNIX_EPOCH};

use super::{METRICS, Stability};
use crate::mount::registration::Carrier;
use crate::mount::status::{MountState, MountStatus};

/// Whether the mount is over. Its last figures stay in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum MountLife {
    /// It goes on.
    Lasting,
    /// It is over.
    Ended,
}

/// A value and its own label, if it has one.
type Sample = (Vec<(&'static str, String)>, f64);

/// The samples by the name of their metric.
#[derive(Debug, Default)]
struct Samples(BTreeMap<&'static str, Vec<Sample>>);

impl Samples {
    fn put(&mut self, name: &'static str, value: f64) {
        self.0.entry(name).or_default().push((Vec::new(), value));
    }

    /// Puts the values of a metric with one label.
    fn by(&mut self, name: &'static str, label: &'static str, values: &[(&str, Option<f64>)]) {
        let known = values.iter().filter_map(|(text, value)| Some((*text, (*value)?)));
        let samples = known.map(|(text, value)| (vec![(label, text.to_owned())], value));
        self.0.entry(name).or_default().extend(samples);
    }
}

/// Returns the figures of a mount as text.
pub(super) fn text(status: &MountStatus, life: MountLife) -> String {
    let mut samples = samples(status, life);
    let common = [("mountpoint", &status.mountpoint), ("image", &status.image)];
    let common: Vec<String> = common.iter().map(|(name, value)| label(name, value)).collect();
    let common = common.join(",");
    let mut text = String::new();
    // Writing to a string cannot fail.
    for metric in METRICS {
        let values = samples.0.remove(metric.name).unwrap_or_default();
        if values.is_empty() {
            continue;
        }
        let (name, kind) = (metric.name, metric.kind.name());
        let note = match metric.stability {
            Stability::Stable => "",
            Stability::Experimental => " (experimental)",
        };
        let _ = write!(text, "# HELP {name} {}{note}\n# TYPE {name} {kind}\n", metric.help);
        for (labels, value) in values {
            let own: String = labels
                .iter()
                .map(|(name, value)| format!(",{}", label(name, value)))
                .collect();
            let _ = writeln!(text, "{name}{{{common}{own}}} {value}");
        }
    }
    text
}

/// Returns a label. Its value is escaped as the format asks for.
fn label(name: &str, value: &str) -> String {
    let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    format!("{name}=\"{value}\"")
}

fn samples(status: &MountStatus, life: MountLife) -> Samples {
    let mut samples = Samples::default();
    let count = |value: u64| value as f64;
    let number = |value: u64| Some(value as f64);
    samples.0.insert(
        "ocifs_info",
        vec![(
            vec![
                ("manifest", status.digest.clone()),
                ("via", via(status).to_owned()),
                ("version", env!("CARGO_PKG_VERSION").to_owned()),
            ],
            1.0,
        )],
    );
    let state = match (life, status.state) {
        (MountLife::Ended, _) => "ended",
        (MountLife::Lasting, MountState::Preparing) => "preparing",
        (MountLife::Lasting, MountState::Stalled) => "stalled",
        (MountLife::Lasting, MountState::Ready) => "ready",
        // The others are states of processes that give no figures.
        (
            MountLife::Lasting,
            MountState::Failed | MountState::Dead | MountState::Unresponsive | MountState::Detached,
        ) => "failed",
    };
    let states = ["preparing", "stalled", "ready", "failed", "ended"];
    samples.by(
        "ocifs_state",
        "state",
        &states.map(|name| (name, number(u64::from(name == state)))),
    );
    samples.put("ocifs_problem", count(u64::from(status.problem.is_some())));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    samples.put("ocifs_start_time_seconds", now.as_secs_f64() - status.uptime);
    samples.put("ocifs_mount_seconds", status.mount_seconds);
    for (name, value) in [
        ("ocifs_ready_seconds", status.ready_seconds),
        ("ocifs_resident_memory_bytes", status.resident.map(count)),
        ("ocifs_round_trip_seconds", status.link.and_then(|link| link.rtt)),
        (
            "ocifs_bandwidth_bytes_per_second",
            status.link.and_then(|link| link.bandwidth),
        ),
    ] {
        value.into_iter().for_each(|value| samples.put(name, value));
    }
    samples.put("ocifs_stalled_seconds", status.stalled_seconds.unwrap_or(0.0));
    let of_layers = |of: fn(&crate::layer::LayerStatus) -> u64| count(status.layers.iter().map(of).sum());
    for (name, value) in [
        ("ocifs_image_bytes", count(status.size)),
        ("ocifs_local_bytes", count(status.local)),
        ("ocifs_used_bytes_total", count(status.used)),
        ("ocifs_served_bytes_total", of_layers(|layer| layer.served)),
        ("ocifs_requests_total", count(status.requests)),
        ("ocifs_second_requests_total", of_layers(|layer| layer.hedges)),
        ("ocifs_requests_waiting", status.in_flight.waiting as f64),
        ("ocifs_requests_hanging", status.in_flight.parked as f64),
        ("ocifs_reads_waiting", status.reads.waiting as f64),
        ("ocifs_healed_spans_total", of_layers(|layer| layer.healed)),
        ("ocifs_evicted_spans_total", count(status.evicted.spans)),
        ("ocifs_evicted_trees_total", count(status.evicted.trees)),
        ("ocifs_evicted_bytes_total", count(status.evicted.bytes)),
        ("ocifs_decoded_memory_bytes", count(status.memory)),
    ] {
        samples.put(name, value);
    }
    let (fetched, retries, reads) = (status.fetched_for, status.retries, &status.reads);
    samples.by(
        "ocifs_fetched_bytes_total",
        "reason",
        &[
            ("demand", number(fetched.demand)),
            ("readahead", number(fetched.readahead)),
            ("likely", number(fetched.likely)),
            ("background", number(fetched.background)),
            ("pass", number(fetched.pass)),
            ("table", number(fetched.table)),
        ],
    );
    samples.by(
        "ocifs_retries_total",
        "cause",
        &[
            ("rate_limited", number(retries.rate_limited)),
            ("timed_out", number(retries.timed_out)),
            ("unreachable", number(retries.unreachable)),
            ("server_error", number(retries.server_error)),
        ],
    );
    let in_flight = [
        ("demand", Some(status.in_flight.demand as f64)),
        ("ahead", Some(status.in_flight.others as f64)),
    ];
    samples.by("ocifs_requests_in_flight", "reason", &in_flight);
    let outcomes = [("at_once", number(reads.at_once)), ("waited", number(reads.waited))];
    samples.by("ocifs_reads_total", "outcome", &outcomes);
    samples.by(
        "ocifs_read_seconds",
        "quantile",
        &[("0.5", reads.p50), ("0.99", reads.p99)],
    );
    let waits = [("0.5", reads.waited_p50), ("0.99", reads.waited_p99)];
    samples.by("ocifs_wait_seconds", "quantile", &waits);
    samples
}

/// What serves the image.
fn via(status: &MountStatus) -> &'static str {
    match (&status.disk, status.via) {
        (Some(_), _) => "disk",
        (None, Carrier::Fuse) => "fuse",
        (None, Carrier::Erofs) => "erofs",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_escaped() {
        assert_eq!(label("a", "x\"y\\z\n"), "a=\"x\\\"y\\\\z\\n\"");
    }
}
