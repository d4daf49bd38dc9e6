//! Fetches the table that a layer carries, in a bounded time.
//!
//! A layer can be streamed without its table, so nobody waits long for a table. The fetch begins with some seconds. Time uses
//! them up, and bytes that arrive give time back: as much as they take at the least useful rate of the link. So a table that
//! comes steadily over a slow link is fetched whole, however large it is. A source that refuses, stalls or trickles is given
//! up after these seconds. The source makes a few attempts in them.
//!
//! Other requests may share the link. The more there are, the less each has to bring.
//!
//! Invariants:
//! - The wait for bytes counts as waiting, not as work of this machine ([`super::super::LayerStats::is_working`]). So the
//!   timeout of reads counts while a table is fetched.
//! - The seconds are at most half of that timeout. So there is time left to stream the layer.

use std::ops::Range;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use futures::StreamExt as _;

use super::super::data::LayerContext;
use super::super::opening::{OpenError, ToOpen};
use super::super::race::Origin;
use super::super::stats::FetchPurpose;
use super::NoTable;
use crate::blob::{BlobError, Link};
use crate::memory::Charge;
use crate::task::joined;
use crate::toc::carried::{CarriedError, CarriedTables, TableRef};

/// Time without bytes that a table may take in addition to the time after which a second request is sent
/// ([`Link::pace`]): the second request must have a chance. With less time, layers are streamed although their tables would
/// have come. With more time, readers wait longer before a layer is streamed.
const PATIENCE: Duration = Duration::from_secs(2);

/// Why [`fetch`] brings no table.
pub(super) enum Unfetched {
    /// The layer can still be streamed.
    Table(NoTable),
    /// This process cannot go on.
    Open(OpenError),
}

impl<E: Into<NoTable>> From<E> for Unfetched {
    fn from(error: E) -> Self {
        Self::Table(error.into())
    }
}

/// Fetches and reads the table.
pub(super) async fn fetch(
    context: &LayerContext,
    wanted: &ToOpen,
    table: &TableRef,
) -> Result<CarriedTables, Unfetched> {
    let origin = Origin {
        blob: wanted.blob.clone(),
        lanes: context.lanes.clone(),
        stats: wanted.stats.clone(),
        patient: false,
    };
    // The compressed table is in memory until it is read.
    let mut charge = context.tables.charge();
    let mut time = TableTime::new(origin.blob.link(), context.timeout);
    let first = table.first_range();
    let mut bytes = read(&origin, first.clone(), &mut charge, &mut time).await?;
    let place = table.table_range(&bytes)?;
    let mut start = first.start;
    if place.start < start {
        let mut before = read(&origin, place.start..start, &mut charge, &mut time).await?;
        before.unsplit(bytes);
        (bytes, start) = (before, place.start);
    }
    let charges = [context.tables.charge(), context.tables.charge()];
    let table = table.clone();
    let reading = tokio::task::spawn_blocking(move || {
        let _charge = charge;
        // The table is within the bytes that were read.
        let within = (place.start - start) as usize..(place.end - start) as usize;
        table.read_charged(place, &bytes[within], charges)
    });
    let read = joined(reading).await.map_err(|error| Unfetched::Open(error.into()))?;
    Ok(read?)
}

/// Reads exactly these bytes of the blob, and charges for them in addition to what is charged.
async fn read(
    origin: &Origin,
    range: Range<u64>,
    charge: &mut Charge,
    time: &mut TableTime,
) -> Result<BytesMut, Unfetched> {
    let len = range.end - range.start;
    let cut_short = |range: &Range<u64>| BlobError::Protocol {
        host: "the source".to_owned(),
        what: format!("blob {}", origin.blob.digest()),
        detail: format!("the bytes {}..{} are not all there", range.start, range.end),
        transient: true,
    };
    charge.grow(len).map_err(CarriedError::from)?;
    let mut stream = time.wait(origin, origin.read(range.clone())).await??;
    let mut bytes = BytesMut::new();
    while let Some(more) = time.wait(origin, stream.next()).await?.transpose()? {
        origin.stats.fetched_more(more.len(), FetchPurpose::Table);
        time.came(more.len(), origin.blob.link());
        bytes.extend_from_slice(&more);
        if bytes.len() as u64 > len {
            return Err(cut_short(&range).into());
        }
    }
    if bytes.len() as u64 != len {
        return Err(cut_short(&range).into());
    }
    Ok(bytes)
}

/// The time that a table may still take.
#[derive(Debug)]
struct TableTime {
    /// The timeout of reads.
    timeout: Option<Duration>,
    most: Duration,
    left: Duration,
}

impl TableTime {
    /// All of the time over this link. `timeout` is that of reads.
    fn new(link: Link, timeout: Option<Duration>) -> Self {
        let most = most(link, timeout);
        Self {
            timeout,
            most,
            left: most,
        }
    }

    /// Waits for the source as long as there is time left.
    async fn wait<T>(&mut self, origin: &Origin, source: impl Future<Output = T>) -> Result<T, BlobError> {
        let mut source = std::pin::pin!(source);
        while !self.left.is_zero() {
            let began = Instant::now();
            let waited = origin.stats.waiting(tokio::time::timeout(self.left, &mut source)).await;
            self.left = self.left.saturating_sub(began.elapsed());
            match waited {
                Ok(came) => return Ok(came),
                Err(_) => self.adjust(origin.blob.link()),
            }
        }
        Err(BlobError::Timeout {
            what: format!("the source of blob {}", origin.blob.digest()),
            seconds: self.most.as_secs().max(1),
        })
    }

    /// Adds the time that the link takes longer than it seemed to. Other requests may have come to share it.
    fn adjust(&mut self, link: Link) {
        let most = most(link, self.timeout).max(self.most);
        self.left += most - self.most;
        self.most = most;
    }

    /// Gives back the time that these bytes take at the least useful rate of the link.
    fn came(&mut self, bytes: usize, link: Link) {
        let rate = link.useful_rate() / f64::from(link.streams.max(1));
        let gained = Duration::try_from_secs_f64(bytes as f64 / rate).unwrap_or(self.most);
        self.left = self.left.saturating_add(gained).min(self.most);
    }
}

/// Returns how long a table may take over this link without bytes.
fn most(link: Link, timeout: Option<Duration>) -> Duration {
    let most = PATIENCE + link.pace().window;
    timeout.map_or(most, |timeout| most.min(timeout / 2))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(rtt: u64, bandwidth: Option<f64>, streams: u32) -> Link {
        Link {
            rtt: Some(Duration::from_millis(rtt)),
            bandwidth,
            streams,
            ..Link::LOCAL
        }
    }

    #[test]
    fn there_is_time_left_to_stream_the_layer() {
        let seconds = |link, timeout: Option<u64>| most(link, timeout.map(Duration::from_secs)).as_secs_f64();
        let (near, new, far) = (link(1, Some(25e6), 1), link(1, None, 1), link(500, Some(25e6), 1));
        assert_eq!([near, new, far].map(|link| seconds(link, None)), [3.0, 5.0, 10.0]);
        assert_eq!([near, new, far].map(|link| seconds(link, Some(60))), [3.0, 5.0, 10.0]);
        assert_eq!([near, new, far].map(|link| seconds(link, Some(4))), [2.0, 2.0, 2.0]);
    }

    #[test]
    fn useful_bytes_give_time_back_and_a_trickle_does_not() {
        // Seconds for which a table is awaited that brings so many bytes a second.
        let lasts = |link: Link, rate: usize| {
            let mut time = TableTime::new(link, None);
            for second in 0..1000 {
                let Some(left) = time.left.checked_sub(Duration::from_secs(1)) else {
                    return second;
                };
                time.left = left;
                time.came(rate, link);
            }
            1000
        };
        let (slow, shared, fast) = (link(50, Some(8e3), 1), link(50, Some(8e3), 20), link(50, Some(25e6), 1));
        assert_eq!((lasts(slow, 8_000), lasts(shared, 400)), (1000, 1000));
        assert!(lasts(slow, 400) < 20 && lasts(fast, 400) < 5);
        assert!(lasts(slow, 0) < 15 && lasts(fast, 0) < 5);
    }

    #[test]
    fn a_link_that_others_share_gets_more_time() {
        let mut time = TableTime::new(link(50, Some(100e3), 1), Some(Duration::from_secs(60)));
        let before = time.most;
        time.left = Duration::ZERO;
        time.adjust(link(50, Some(100e3), 10));
        assert!(time.left > Duration::from_secs(3) && time.most == before + time.left);
        time.left = Duration::ZERO;
        time.adjust(link(50, Some(100e3), 2));
        assert!(time.left.is_zero());
    }
}
