//! The signals that ask a process to end.

use std::io;

use futures::future::select_all;
use nix::libc;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// A receiver for SIGINT, SIGTERM and SIGHUP.
#[derive(Debug)]
pub struct Signals(Vec<(i32, Signal)>);

impl Signals {
    /// Catches the signals, so that they do not kill this process. A signal of `ignorable` stays ignored if the
    /// process was started to ignore it, as nohup(1) and shells ask for. The caller must be within a runtime.
    pub fn catch(ignorable: &[i32]) -> io::Result<Self> {
        let signals = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP].into_iter();
        let wanted = signals.filter(|number| !ignorable.contains(number) || !is_ignored(*number));
        let caught = wanted.map(|number| Ok((number, signal(SignalKind::from_raw(number))?)));
        caught.collect::<io::Result<_>>().map(Self)
    }

    /// Waits for the next signal and returns its number. Waits for ever if all signals stay ignored.
    pub async fn next(&mut self) -> i32 {
        if self.0.is_empty() {
            return std::future::pending().await;
        }
        let all = self.0.iter_mut().map(|(number, signal)| {
            Box::pin(async move {
                signal.recv().await;
                *number
            })
        });
        select_all(all).await.0
    }
}

/// Whether this process ignores a signal (proc(5): SigIgn).
pub fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.unwrap_or(0) >> (signal - 1) & 1 == 1
}
