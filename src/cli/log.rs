//! Log lines on standard error.

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;

use super::config::{Config, LogFormat};

/// Starts logging. `OCIFS_LOG` overrides the level, in the syntax of `RUST_LOG`.
pub(super) fn init(config: &Config) {
    let level = match config.verbose {
        0 => "ocifs=warn",
        1 => "ocifs=debug",
        _ => "debug",
    };
    let filter = EnvFilter::try_from_env("OCIFS_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    match config.log_format {
        LogFormat::Text => builder.compact().init(),
        LogFormat::Json => builder.json().init(),
    }
}
