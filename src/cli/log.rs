//! Log lines on standard error. Repeated messages are folded. The log file of a process in the background is bounded.

mod bounded;
mod fold;

use std::fs::File;
use std::io::{self, IsTerminal as _};
use std::os::fd::AsFd as _;
use std::sync::Mutex;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::writer::BoxMakeWriter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

use super::config::{Config, LogFormat};
use bounded::Bounded;
use fold::Fold;
pub(super) use fold::Folded;
use ocifs::mount::SERVE;

/// Starts logging. Lines are coloured on a terminal unless `NO_COLOR` is set (<https://no-color.org>). `OCIFS_LOG`
/// overrides the level, in the syntax of `RUST_LOG`. Dropping the returned value logs the counts of messages that are
/// still folded.
pub(super) fn init(config: &Config) -> Folded {
    let level = match config.verbose {
        _ if config.quiet => "ocifs=error",
        0 => "ocifs=warn",
        1 => "ocifs=debug",
        _ => "debug",
    };
    let filter = EnvFilter::try_from_env("OCIFS_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    let fold = Fold::default();
    let folded = fold.folded();
    let colours = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(writer())
        .with_ansi(colours);
    let registry = tracing_subscriber::registry().with(filter).with(fold);
    match config.log_format {
        LogFormat::Text => registry.with(lines.compact()).init(),
        LogFormat::Json => registry.with(lines.json()).init(),
    }
    folded
}

/// Returns the writer of log lines: standard error. In the process behind a background mount, standard error is a log
/// file. Nothing else bounds that file, so its writer does.
fn writer() -> BoxMakeWriter {
    let ours = std::env::var_os(SERVE).is_some();
    match ours.then(|| io::stderr().as_fd().try_clone_to_owned()) {
        Some(Ok(file)) => BoxMakeWriter::new(Mutex::new(Bounded::new(File::from(file)))),
        _ => BoxMakeWriter::new(io::stderr),
    }
}
