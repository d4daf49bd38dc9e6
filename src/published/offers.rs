//! What the places have of one file, offered one after the other.
//!
//! ```text
//! place 1 ━━━━━━━━━━━━━━━━━━━━━━━━╸· · ·    the first in the list, and slow
//! place 2 ━━━━━━━╸                           has the file
//!                 ┗━━ a moment ━━▶ offered
//! ```
//! All places are asked at once. Those that come first in the list are preferred: a later place has to wait for them, but
//! only for a moment. If the one who asked cannot use what was offered, the next place's is offered.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::StreamExt as _;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout_at};

use super::asked::AskedPlace;

/// How long the answer of a place waits for those of earlier places. With a longer time, an earlier place that hangs costs
/// more; with a shorter one, a later place is used more often.
const MOMENT: Duration = Duration::from_secs(2);

/// The places that have not answered, by their position in the list.
type SilentPlaces = Arc<Mutex<BTreeMap<usize, Arc<AskedPlace>>>>;

/// The answers of all places to a question. The question ends when this is dropped.
#[derive(Debug)]
pub(super) struct Offers<T> {
    offers: mpsc::Receiver<T>,
    open: SilentPlaces,
    asking: JoinHandle<()>,
}

impl<T> Drop for Offers<T> {
    fn drop(&mut self) {
        self.asking.abort();
    }
}

impl<T: Send + 'static> Offers<T> {
    /// Asks all places, the preferred one first. `late` is told of each place that has not answered in time, by its position
    /// in the list. Must be called on the runtime.
    pub(super) fn ask(
        questions: Vec<(Arc<AskedPlace>, BoxFuture<'static, Option<T>>)>,
        late: impl Fn(usize, &AskedPlace) + Send + 'static,
    ) -> Self {
        let (places, questions): (Vec<_>, Vec<_>) = questions.into_iter().unzip();
        let open: SilentPlaces = Arc::new(Mutex::new(places.into_iter().enumerate().collect()));
        let (offered, offers) = mpsc::channel(1);
        let asking = tokio::spawn(offer(questions, open.clone(), offered, late));
        Self { offers, open, asking }
    }

    /// Returns the next offer. None if there is no other. Cancel safe.
    pub(super) async fn next(&mut self) -> Option<T> {
        self.offers.recv().await
    }

    /// Returns the places that have not answered, and their positions in the list.
    pub(super) fn silent(&self) -> Vec<(usize, Arc<AskedPlace>)> {
        before(&self.open, usize::MAX)
    }
}

/// Passes the answers on, in the order of preference.
async fn offer<T>(
    questions: Vec<BoxFuture<'static, Option<T>>>,
    open: SilentPlaces,
    offered: mpsc::Sender<T>,
    late: impl Fn(usize, &AskedPlace),
) {
    let ranked = questions.into_iter().enumerate();
    let mut answers: FuturesUnordered<_> = ranked
        .map(|(rank, answer)| async move { (rank, answer.await) })
        .collect();
    let mut held: BTreeMap<usize, T> = BTreeMap::new();
    let mut until = None;
    loop {
        let first_open = || open.lock().expect("no panic while locked").keys().next().copied();
        while let Some(entry) = held.first_entry()
            && first_open().is_none_or(|rank| *entry.key() < rank)
        {
            if offered.send(entry.remove()).await.is_err() {
                return;
            }
        }
        let next = match held.is_empty() {
            true => {
                until = None;
                answers.next().await
            }
            false => match timeout_at(*until.get_or_insert_with(|| Instant::now() + MOMENT), answers.next()).await {
                Ok(next) => next,
                Err(_) => {
                    let Some((rank, held)) = held.pop_first() else { continue };
                    for (rank, asked) in before(&open, rank) {
                        late(rank, &asked);
                    }
                    if offered.send(held).await.is_err() {
                        return;
                    }
                    continue;
                }
            },
        };
        let Some((rank, answer)) = next else { return };
        open.lock().expect("no panic while locked").remove(&rank);
        held.extend(answer.map(|answer| (rank, answer)));
    }
}

/// Returns the places before `rank` that have not answered.
fn before(open: &SilentPlaces, rank: usize) -> Vec<(usize, Arc<AskedPlace>)> {
    let open = open.lock().expect("no panic while locked");
    open.range(..rank).map(|(&rank, asked)| (rank, asked.clone())).collect()
}
