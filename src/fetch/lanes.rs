//! Passes: who may send a request now.
//!
//! Demand has places of its own and gets its pass at once unless all of those are taken. Everybody else shares what the link
//! has room for: a number of requests, and bytes under way, of which there are fewer while a reader waits for something, so
//! that its answer does not queue behind theirs. A request under way is not taken back: they are short, and a connection
//! thrown away costs more than the end of one. What nobody may ever want leaves link and processor alone most of the time
//! while somebody reads.
//!
//! Invariants: a pass is given to the highest priority that waits; one request is always let through, however large; a pass
//! that is dropped, or whose receiver went away before it arrived, makes room for the next.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use super::{Policy, Priority};

/// Demand requests under way at once. Each holds a decoder and a span, and more readers than this rarely wait for different
/// places.
const DEMAND: usize = 8;
/// While there is demand, what nobody may ever want comes one request at a time, and rests for so many times as long as that
/// took: it takes a fifth of the link and of the processor's time at most, if that is not too long a rest.
const REST: u32 = 4;
const LONGEST_REST: Duration = Duration::from_millis(300);
/// The longest that others give way to demand: there may be no end of it, and they have less under way beside it as it is.
const LONGEST_WAY: Duration = Duration::from_millis(100);

/// How many requests are under way, by kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Load {
    /// Demand requests.
    pub demand: usize,
    /// All others.
    pub others: usize,
    /// Compressed bytes the others were let through for.
    pub bytes: u64,
    /// Requests that wait for a pass.
    pub waiting: usize,
}

/// The gate that every request passes.
#[derive(Debug, Default)]
pub struct Lanes {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    demand: usize,
    others: usize,
    /// Bytes the others were let through for.
    bytes: u64,
    last_demand: Option<Instant>,
    /// When the link will have sent what demand has asked for, had it begun at once.
    clear: Option<Instant>,
    /// Until when what nobody may ever want rests if there is demand.
    rested: Option<Instant>,
    policy: Option<Policy>,
    waiting: [VecDeque<Waiter>; 4],
}

#[derive(Debug)]
struct Waiter {
    bytes: u64,
    pass: oneshot::Sender<Pass>,
}

/// The right to have one request under way; given back when dropped.
#[derive(Debug)]
pub struct Pass {
    lanes: Arc<Lanes>,
    priority: Priority,
    bytes: u64,
    before: u64,
    waited: Duration,
    since: Instant,
}

impl Pass {
    /// What it was given for.
    pub fn priority(&self) -> Priority {
        self.priority
    }

    /// How long it was waited for.
    pub fn waited(&self) -> Duration {
        self.waited
    }

    /// Bytes that were under way when it was given, those of demand apart: they share the link with what it lets through.
    pub fn before(&self) -> u64 {
        self.before
    }

    /// Its request has shown more of the link: there may be room for others.
    pub fn learned(&self, policy: Policy) {
        let mut state = self.lanes.state.lock().expect("no panic while locked");
        state.policy = Some(policy);
        let admitted = self.lanes.admit(&mut state);
        drop(state);
        deliver(admitted);
    }
}

impl Lanes {
    /// Lines up for a pass for a request of about `bytes` compressed bytes, at once, and waits for it when polled. Whoever is
    /// not of demand also waits until its bytes will come behind those that demand has just asked for. Cancel safe.
    pub fn enter(
        self: &Arc<Self>,
        priority: Priority,
        bytes: u64,
        policy: Policy,
    ) -> impl Future<Output = Pass> + Send + use<> {
        let start = Instant::now();
        let (pass, arrival) = oneshot::channel();
        let mut state = self.state.lock().expect("no panic while locked");
        state.policy = Some(policy);
        if priority == Priority::Demand {
            state.demanded(bytes, policy);
        }
        state.waiting[priority as usize].push_back(Waiter { bytes, pass });
        let admitted = self.admit(&mut state);
        drop(state);
        deliver(admitted);
        let lanes = self.clone();
        async move {
            let mut pass = arrival.await.expect("a waiter is dropped only with its pass sent");
            if priority != Priority::Demand {
                lanes.give_way().await;
            }
            pass.waited = start.elapsed();
            pass.since = Instant::now();
            pass
        }
    }

    /// Waits until a request of this priority may line up: at once, but for what nobody may ever want, which rests between
    /// two requests while there is demand.
    pub async fn rest(&self, priority: Priority) {
        let rested = || self.state.lock().expect("no panic while locked").rested();
        while priority == Priority::Background
            && let Some(rested) = rested()
        {
            tokio::time::sleep_until(rested.into()).await;
        }
    }

    /// Waits until a request sent now will not share the link with what demand has asked for.
    async fn give_way(&self) {
        let clear = self.state.lock().expect("no panic while locked").clear;
        if let Some(clear) = clear {
            tokio::time::sleep_until(clear.into()).await;
        }
    }

    /// Takes those who may go now out of their queues.
    fn admit(self: &Arc<Self>, state: &mut State) -> Vec<(oneshot::Sender<Pass>, Pass)> {
        let mut admitted = Vec::new();
        for priority in [
            Priority::Demand,
            Priority::Readahead,
            Priority::Likely,
            Priority::Background,
        ] {
            while let Some(next) = state.waiting[priority as usize].front() {
                let gone = next.pass.is_closed();
                if !gone && !state.has_room(priority, next.bytes) {
                    return admitted;
                }
                let Some(Waiter { bytes, pass }) = state.waiting[priority as usize].pop_front() else {
                    break;
                };
                if !gone {
                    let before = state.bytes;
                    state.enter(priority, bytes);
                    let lanes = self.clone();
                    let given = Pass {
                        lanes,
                        priority,
                        bytes,
                        before,
                        waited: Duration::ZERO,
                        since: Instant::now(),
                    };
                    admitted.push((pass, given));
                }
            }
        }
        admitted
    }

    fn leave(self: &Arc<Self>, pass: &Pass) {
        let mut state = self.state.lock().expect("no panic while locked");
        match pass.priority {
            Priority::Demand => {
                state.demand -= 1;
                state.last_demand = Some(Instant::now());
            }
            _ => {
                state.others -= 1;
                state.bytes -= pass.bytes;
                if pass.priority == Priority::Background {
                    let rest = (pass.since.elapsed() * REST).min(LONGEST_REST);
                    state.rested = Some(Instant::now() + rest);
                }
            }
        }
        let admitted = self.admit(&mut state);
        drop(state);
        deliver(admitted);
    }

    /// What is under way and what waits.
    pub fn load(&self) -> Load {
        let state = self.state.lock().expect("no panic while locked");
        Load {
            demand: state.demand,
            others: state.others,
            bytes: state.bytes,
            waiting: state.waiting.iter().map(VecDeque::len).sum(),
        }
    }
}

/// Without the lock: a pass whose receiver is gone is dropped here, and comes back through [`Lanes::leave`].
fn deliver(admitted: Vec<(oneshot::Sender<Pass>, Pass)>) {
    for (sender, pass) in admitted {
        drop(sender.send(pass));
    }
}

impl State {
    /// Demand asks for so many bytes.
    fn demanded(&mut self, bytes: u64, policy: Policy) {
        let now = Instant::now();
        self.last_demand = Some(now);
        let free = self.clear.map_or(now, |clear| clear.max(now));
        self.clear = Some((free + policy.transfer(bytes).min(LONGEST_WAY)).min(now + LONGEST_WAY));
    }

    fn has_room(&self, priority: Priority, bytes: u64) -> bool {
        if priority == Priority::Demand {
            return self.demand < DEMAND;
        }
        let Some(policy) = self.policy.filter(|_| self.others > 0) else {
            return true;
        };
        let beside_demand = self.demand_until().is_some_and(|until| until > Instant::now());
        let room = policy.under_way(priority, beside_demand);
        self.others < policy.requests() && self.bytes + bytes <= room
    }

    /// Until when there is demand, as far as one knows: for a while longer after the last that there was.
    fn demand_until(&self) -> Option<Instant> {
        let last = if self.demand > 0 {
            Instant::now()
        } else {
            self.last_demand?
        };
        Some(last + self.policy?.demand_is_over())
    }

    /// When the next request for what nobody may ever want may line up, if not now.
    fn rested(&self) -> Option<Instant> {
        let rested = self.rested?.min(self.demand_until()?);
        (rested > Instant::now()).then_some(rested)
    }

    fn enter(&mut self, priority: Priority, bytes: u64) {
        match priority {
            Priority::Demand => self.demand += 1,
            _ => {
                self.others += 1;
                self.bytes += bytes;
            }
        }
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.lanes.clone().leave(self);
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;
    use crate::blob::Link;

    fn policy() -> Policy {
        Policy::of(Link {
            rtt: Some(Duration::from_millis(20)),
            bandwidth: Some(25e6),
            warm: 0,
        })
    }

    fn enter(lanes: &Arc<Lanes>, priority: Priority, bytes: u64) -> impl Future<Output = Pass> + use<> {
        lanes.enter(priority, bytes, policy())
    }

    #[tokio::test]
    async fn demand_goes_at_once_however_much_else_is_under_way() {
        let lanes: Arc<Lanes> = Arc::default();
        let mut under_way = Vec::new();
        let mut queued = Vec::new();
        for _ in 0..20 {
            let mut entering = Box::pin(enter(&lanes, Priority::Background, 500_000));
            match (&mut entering).now_or_never() {
                Some(pass) => under_way.push(pass),
                None => queued.push(entering),
            }
        }
        assert_eq!((under_way.len(), queued.len()), (4, 16), "two megabytes fill this link");
        let demand = enter(&lanes, Priority::Demand, 500_000).now_or_never();
        assert!(demand.is_some());
        // Now a reader waits: what ends is not replaced until little is left.
        under_way.pop();
        under_way.pop();
        assert_eq!(lanes.load().others, 2);
        under_way.clear();
        assert_eq!(lanes.load().others, 1, "one goes on beside demand");
    }

    #[tokio::test]
    async fn higher_priorities_overtake_and_nothing_is_lost_with_who_gives_up() {
        let lanes: Arc<Lanes> = Arc::default();
        let first = enter(&lanes, Priority::Background, 2_000_000).now_or_never().unwrap();
        let mut background = Box::pin(enter(&lanes, Priority::Background, 2_000_000));
        let mut given_up = Box::pin(enter(&lanes, Priority::Readahead, 2_000_000));
        let mut profile = Box::pin(enter(&lanes, Priority::Likely, 2_000_000));
        for waiting in [&mut background, &mut given_up, &mut profile] {
            assert!(waiting.now_or_never().is_none());
        }
        drop(given_up);
        drop(first);
        assert!((&mut background).now_or_never().is_none());
        let pass = profile.now_or_never().expect("it was next");
        drop(pass);
        // It has its pass, and goes away without having taken it.
        assert_eq!(lanes.load().others, 1);
        drop(background);
        assert_eq!(lanes.load(), Load::default());
    }

    #[tokio::test]
    async fn more_go_as_soon_as_the_link_shows_that_it_can_do_more() {
        let lanes: Arc<Lanes> = Arc::default();
        let first = enter(&lanes, Priority::Likely, 2_000_000).now_or_never().unwrap();
        let mut waiting = Box::pin(enter(&lanes, Priority::Likely, 2_000_000));
        assert!((&mut waiting).now_or_never().is_none());
        first.learned(policy());
        assert!((&mut waiting).now_or_never().is_none(), "nothing new");
        let far = Link {
            rtt: Some(Duration::from_millis(80)),
            bandwidth: Some(25e6),
            warm: 0,
        };
        first.learned(Policy::of(far));
        assert!(waiting.now_or_never().is_some());
    }

    #[tokio::test]
    async fn demand_beyond_its_places_waits_for_demand_alone() {
        let lanes: Arc<Lanes> = Arc::default();
        let mut passes: Vec<_> = (0..DEMAND)
            .map(|_| enter(&lanes, Priority::Demand, 1).now_or_never().unwrap())
            .collect();
        let mut next = Box::pin(enter(&lanes, Priority::Demand, 1));
        let mut other = Box::pin(enter(&lanes, Priority::Background, 1));
        assert!((&mut next).now_or_never().is_none() && (&mut other).now_or_never().is_none());
        passes.pop();
        assert!(next.now_or_never().is_some());
        other.await;
    }

    #[tokio::test]
    async fn what_nobody_may_ever_want_rests_beside_demand() {
        let lanes: Arc<Lanes> = Arc::default();
        let background = async || {
            lanes.rest(Priority::Background).await;
            let pass = enter(&lanes, Priority::Background, 100_000).await;
            let start = Instant::now();
            // So long the request takes.
            tokio::time::sleep(Duration::from_millis(50)).await;
            drop(pass);
            start
        };
        background().await;
        assert!(
            lanes.rest(Priority::Background).now_or_never().is_some(),
            "nobody reads"
        );
        let reader = enter(&lanes, Priority::Demand, 1).await;
        let start = background().await;
        assert!(lanes.rest(Priority::Likely).now_or_never().is_some());
        lanes.rest(Priority::Background).await;
        assert!(start.elapsed() >= Duration::from_millis(250));
        drop(reader);
        background().await;
        assert!(
            lanes.rest(Priority::Background).now_or_never().is_none(),
            "it may read on"
        );
        lanes.state.lock().unwrap().last_demand = Some(Instant::now() - policy().demand_is_over());
        assert!(lanes.rest(Priority::Background).now_or_never().is_some());
    }

    #[tokio::test]
    async fn others_send_when_their_bytes_will_come_behind_those_of_demand() {
        let lanes: Arc<Lanes> = Arc::default();
        let start = Instant::now();
        let demand = enter(&lanes, Priority::Demand, 100_000).now_or_never();
        let mut ahead = Box::pin(enter(&lanes, Priority::Readahead, 100_000));
        assert!(demand.is_some() && (&mut ahead).now_or_never().is_none());
        assert_eq!(lanes.load().others, 1, "its place is kept meanwhile");
        ahead.await;
        assert!(start.elapsed() >= policy().transfer(100_000));
        // However much demand asks for.
        let demands: Vec<_> = (0..DEMAND - 1)
            .map(|_| enter(&lanes, Priority::Demand, 10_000_000).now_or_never().unwrap())
            .collect();
        assert!(lanes.state.lock().unwrap().clear.unwrap() <= Instant::now() + LONGEST_WAY);
        drop(demands);
    }
}
