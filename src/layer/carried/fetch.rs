//! Fetches the table that a layer carries, in a bounded time.
//!
//! A layer can be streamed without its table, so nobody waits long for a table. The fetch begins with some seconds. Time uses
//! them up, and bytes that arrive give time back: as much as they take at the least useful rate of the link. So a table that
//! comes steadily over a slow link is fetched whole, however large it is. A source that refuses, stalls or trickles is given
//! up after these seconds. The source makes a few attempts in them.
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
use super::NoTable;
use crate::blob::{BlobError, Link};
use crate::memory::Charge;
use crate::task::joined;
use crate::toc::carried::{CarriedError, CarriedTables, TableRef};

/// The time that a table may take without bytes. A link over which little has come sends a second request after three
/// seconds, which must have a chance. With less time, layers are streamed although their tables would have come. With
/// more time, readers wait longer before a layer is streamed.
const PATIENCE: Duration = Duration::from_secs(4);
/// Round trips that are added to [`PATIENCE`]: those of a new connection, a redirect and a second attempt.
const ROUND_TRIPS: u32 = 8;

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
        origin.stats.fetched_more(more.len());
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
    most: Duration,
    left: Duration,
}

impl TableTime {
    /// All of the time over this link. `timeout` is that of reads.
    fn new(link: Link, timeout: Option<Duration>) -> Self {
        let most = PATIENCE + ROUND_TRIPS * link.rtt.unwrap_or_default();
        let most = timeout.map_or(most, |timeout| most.min(timeout / 2));
        Self { most, left: most }
    }

    /// Waits for the source as long as there is time left.
    async fn wait<T>(&mut self, origin: &Origin, source: impl Future<Output = T>) -> Result<T, BlobError> {
        let began = Instant::now();
        let waited = origin.stats.waiting(tokio::time::timeout(self.left, source)).await;
        self.left = self.left.saturating_sub(began.elapsed());
        waited.map_err(|_| BlobError::Timeout {
            what: format!("the source of blob {}", origin.blob.digest()),
            seconds: self.most.as_secs().max(1),
        })
    }

    /// Gives back the time that these bytes take at the least useful rate of the link.
    fn came(&mut self, bytes: usize, link: Link) {
        let gained = Duration::try_from_secs_f64(bytes as f64 / link.useful_rate()).unwrap_or(self.most);
        self.left = self.left.saturating_add(gained).min(self.most);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(rtt: Option<Duration>) -> Link {
        Link { rtt, ..Link::LOCAL }
    }

    #[test]
    fn there_is_time_left_to_stream_the_layer() {
        let far = Some(Duration::from_millis(500));
        for (rtt, timeout, most) in [
            (None, None, 4.0),
            (far, None, 8.0),
            (far, Some(60), 8.0),
            (None, Some(60), 4.0),
            (far, Some(6), 3.0),
            (None, Some(2), 1.0),
        ] {
            let time = TableTime::new(link(rtt), timeout.map(Duration::from_secs));
            assert_eq!(time.left.as_secs_f64(), most, "{rtt:?} {timeout:?}");
        }
    }

    #[test]
    fn useful_bytes_give_time_back_and_a_trickle_does_not() {
        let slow = Link {
            bandwidth: Some(8e3),
            ..link(None)
        };
        // Seconds that a table lasts that brings so many bytes a second.
        let lasts = |rate: usize| {
            let mut time = TableTime::new(slow, None);
            for second in 0..1000 {
                if time.left.is_zero() {
                    return second;
                }
                time.left = time.left.saturating_sub(Duration::from_secs(1));
                time.came(rate, slow);
            }
            1000
        };
        assert_eq!(lasts(8_000), 1000);
        assert!((4..6).contains(&lasts(10)), "{}", lasts(10));
        assert!((4..6).contains(&lasts(0)), "{}", lasts(0));
    }
}
