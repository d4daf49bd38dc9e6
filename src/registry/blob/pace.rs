//! How fast a mirror sends, so that one that sends hardly anything can be left for another place.
//!
//! All that the host sends counts, not only one response: many responses share a slow link. Only the time in which the
//! reader waits counts, because a reader with much to do takes its bytes slowly.

use std::sync::Arc;
use std::time::Duration;

use crate::blob::BlobError;
use crate::registry::places::MIRROR_WAIT;
use crate::registry::stats::{HostMeter, HostStats};

/// Fewest bytes that a host has to send in [`MIRROR_WAIT`]. With more, mirrors are left alone although only this machine's
/// link is slow, and the registry is no faster. With fewer, readers wait longer for a mirror that trickles.
const LEAST: u64 = 64 << 10;

/// The bytes that a host sends while a reader waits for them.
#[derive(Debug)]
pub(super) struct HostPace {
    host: Arc<HostMeter>,
    /// What the host had sent when the present period began.
    sent: u64,
    /// Time in which the reader has waited in the present period.
    waited: Duration,
}

impl HostPace {
    pub(super) fn new(host: Arc<HostMeter>) -> Self {
        Self {
            sent: host.snapshot().bytes,
            waited: Duration::ZERO,
            host,
        }
    }

    /// Counts a wait of the reader, at whose end bytes came. Fails if the host is too slow.
    pub(super) fn waited(&mut self, time: Duration, what: impl FnOnce() -> String) -> Result<(), BlobError> {
        self.waited += time;
        if self.waited < MIRROR_WAIT {
            return Ok(());
        }
        let HostStats { host, bytes, .. } = self.host.snapshot();
        let came = bytes.saturating_sub(self.sent);
        let seconds = self.waited.as_secs();
        (self.sent, self.waited) = (bytes, Duration::ZERO);
        if came >= LEAST {
            return Ok(());
        }
        Err(BlobError::Protocol {
            host,
            what: what(),
            detail: format!("only {came} bytes came in {seconds} s"),
            transient: true,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_slow_if_little_comes_while_somebody_waits() {
        let host = Arc::new(HostMeter::new("m.lan".to_owned()));
        let mut pace = HostPace::new(Arc::clone(&host));
        let second = Duration::from_secs(1);
        let mut wait = |bytes: u64, time: Duration| {
            host.came(bytes);
            pace.waited(time, || "blob".to_owned())
        };
        // A reader that does not wait gets little as well.
        for _ in 0..1000 {
            wait(1, Duration::from_millis(1)).unwrap();
        }
        wait(LEAST, 2 * second).unwrap();
        // Other responses of the host count, and each period by itself.
        wait(LEAST, 3 * second).unwrap();
        wait(100, second).unwrap();
        wait(100, second).unwrap();
        let error = wait(100, second).unwrap_err().to_string();
        assert!(
            error.contains("m.lan") && error.contains("300 bytes came in 3 s"),
            "{error}"
        );
    }
}
