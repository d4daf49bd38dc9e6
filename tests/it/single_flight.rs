//! Single flight under many schedules. The test runs the real table of flights, with the locks of a model checker.
//!
//! Readers want overlapping spans, some give up, and some flights are lost half-way. For every order of events, four
//! things must hold. No two flights fetch a span at the same time. No flight fetches a span that is present. No
//! reader waits for ever. The table is empty at the end.

use std::collections::BTreeSet;
use std::ops::Range;

use shuttle::future;
use shuttle::rand::Rng as _;

use self::flights::{Claim, Flights};
use self::sync::{Arc, Mutex};

mod sync {
    pub(super) use shuttle::sync::{Arc, Mutex, MutexGuard};
}

#[path = "../../src/fetch/flights.rs"]
#[allow(dead_code)]
mod flights;

const SPANS: u32 = 4;

#[derive(Debug, Clone, Copy, PartialEq)]
enum Landed {
    Bytes,
    Lost,
}

/// The part of a layer that concerns flights.
#[derive(Default)]
struct Layer {
    flights: Arc<Flights<Landed>>,
    present: Mutex<BTreeSet<u32>>,
    fetching: Mutex<BTreeSet<u32>>,
}

impl Layer {
    fn is_present(&self, span: u32) -> bool {
        self.present.lock().unwrap().contains(&span)
    }

    /// Looks for the spans and claims the missing ones in one critical section. Then waits, and looks again if a
    /// flight was lost.
    async fn read(self: Arc<Self>, spans: Range<u32>) {
        for span in spans.clone() {
            loop {
                let (claim, flight) = {
                    let mut board = self.flights.board();
                    let mut claim = board.claim(Landed::Lost);
                    for span in spans.clone() {
                        if !board.is_flying(span) && !self.is_present(span) {
                            board.take(&mut claim, span);
                        }
                    }
                    (claim, board.flight(span))
                };
                if !claim.is_done() {
                    drop(future::spawn(self.clone().fly(claim)));
                }
                let Some(mut flight) = flight else {
                    assert!(self.is_present(span), "neither here nor under way");
                    break;
                };
                let landed = flight.wait_for(Option::is_some).await.map(|landed| *landed);
                if landed.expect("a flight answers") == Some(Landed::Bytes) {
                    break;
                }
            }
        }
    }

    /// Fetches the claimed spans, or ends somewhere on the way.
    async fn fly(self: Arc<Self>, mut claim: Claim<Landed>) {
        let spans: Vec<u32> = claim.spans().collect();
        for span in spans {
            let fetching = Fetching::start(self.clone(), span);
            future::yield_now().await;
            if shuttle::rand::thread_rng().gen_bool(0.1) {
                drop(fetching);
                // Dropping the claim lands the remaining spans.
                return;
            }
            claim.announce(span, Landed::Bytes);
            future::yield_now().await;
            self.present.lock().unwrap().insert(span);
            drop(fetching);
            claim.land(span, Landed::Bytes);
        }
    }
}

/// A span that a flight is fetching.
struct Fetching(Arc<Layer>, u32);

impl Fetching {
    fn start(layer: Arc<Layer>, span: u32) -> Self {
        assert!(!layer.is_present(span), "span {span} is there already");
        assert!(
            layer.fetching.lock().unwrap().insert(span),
            "span {span} is fetched twice"
        );
        Self(layer, span)
    }
}

impl Drop for Fetching {
    fn drop(&mut self) {
        self.0.fetching.lock().unwrap().remove(&self.1);
    }
}

fn scenario() {
    let layer: Arc<Layer> = Arc::default();
    let mut random = shuttle::rand::thread_rng();
    let mut readers = Vec::new();
    for _ in 0..4 {
        let start = random.gen_range(0..SPANS);
        let spans = start..random.gen_range(start..SPANS) + 1;
        let reader = future::spawn(layer.clone().read(spans));
        readers.push((reader, random.gen_bool(0.3)));
    }
    future::block_on(async {
        for (reader, gives_up) in readers {
            if gives_up {
                reader.abort();
            }
            // An aborted reader returns an error. Its flight fetches or lands the spans that it claimed.
            let read = reader.await;
            assert!(gives_up || read.is_ok());
        }
        // A last reader does not give up. It fetches what the last flight lost.
        layer.clone().read(0..SPANS).await;
        // Flights that have announced a span still have to land it.
        while (0..SPANS).any(|span| layer.flights.board().is_flying(span)) {
            future::yield_now().await;
        }
        assert!((0..SPANS).all(|span| layer.is_present(span)));
    });
}

#[test]
fn no_schedule_fetches_a_span_twice_or_leaves_a_reader_waiting() {
    shuttle::check_random(scenario, 3000);
    shuttle::check_pct(scenario, 3000, 3);
}
