//! Passes: who may send a request now.
//!
//! Each link has a lane of its own, with its own sizes: what fills a slow link is nothing on a fast one, and a link that hangs
//! must not hold up requests over another.
//!
//! Demand has places of its own and gets its pass at once unless all of those are taken. Everybody else shares what the link
//! has room for: a number of requests, and bytes under way, of which there are fewer while a reader waits for something, so
//! that its answer does not queue behind theirs. A request under way is not taken back: they are short, and a connection
//! thrown away costs more than the end of one. What nobody may ever want leaves link and processor alone most of the time
//! while somebody reads.
//!
//! Invariants: a pass is given to the highest priority that waits; one request is always let through, however large; a pass
//! that is dropped, or whose receiver went away before it arrived, makes room for the next; what waits for something else than
//! the link holds no pass; a request that hangs holds no place for long.
//!
//! A request that falls far behind may be sent once more over another connection. That takes a [`Hedge`], of which each lane
//! has a few. When the second request was of no use, the link itself is slow, and the lane gives no hedge for a while.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use super::{Policy, Priority};
use crate::blob::LinkId;

/// Demand requests under way at once. Each holds a decoder and a span, and more readers than this rarely wait for different
/// places.
const DEMAND: usize = 8;
/// While there is demand, what nobody may ever want comes one request at a time, and rests for so many times as long as that
/// took: it takes a fifth of the link and of the processor's time at most, if that is not too long a rest.
const REST: u32 = 4;
const LONGEST_REST: Duration = Duration::from_millis(300);
/// The longest that others give way to demand: there may be no end of it, and they have less under way beside it as it is.
const LONGEST_WAY: Duration = Duration::from_millis(100);

/// Lanes: more hosts than the layers of one image come from. If there are more, some share a lane.
const LANES: usize = 8;
/// Requests that hang beside those that do not: each still holds a decoder and a span.
const PARKED: usize = 24;
/// Second requests at once, over each link.
const HEDGES: usize = 4;
/// How long there are no more of them after one that was of no use: twice as long each time, up to the longest.
const FIRST_QUIET: Duration = Duration::from_secs(2);
const LONGEST_QUIET: Duration = Duration::from_secs(60);

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
    /// Second requests for what comes too slowly.
    #[serde(default)]
    pub hedges: usize,
    /// Requests that hang, and count among none of the others.
    #[serde(default)]
    pub parked: usize,
}

/// The gates that requests pass, one for each link.
#[derive(Debug, Default)]
pub struct Lanes([Arc<Lane>; LANES]);

/// The gate for requests over one link.
#[derive(Debug, Default)]
struct Lane {
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
    hedges: usize,
    /// Requests that hang, and have given their places to others.
    parked: usize,
    /// Second requests in a row that were of no use, and until when there are no more of them.
    useless: u32,
    quiet: Option<Instant>,
}

#[derive(Debug)]
struct Waiter {
    bytes: u64,
    pass: oneshot::Sender<Pass>,
}

/// The right to have one request under way; given back when dropped.
#[derive(Debug)]
pub struct Pass {
    lane: Arc<Lane>,
    priority: Priority,
    bytes: u64,
    before: u64,
    waited: Duration,
    since: Instant,
    parked: AtomicBool,
}

impl Pass {
    /// Its request hangs: the place on the link goes to another one, and this one goes on beside all others, if not too many
    /// do so.
    pub fn park(&self) {
        let mut state = self.lane.state();
        if state.parked >= PARKED || self.parked.swap(true, Ordering::Relaxed) {
            return;
        }
        state.parked += 1;
        state.leave(self);
        let admitted = self.lane.admit(&mut state);
        drop(state);
        deliver(admitted);
    }

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
        let mut state = self.lane.state();
        state.policy = Some(policy);
        let admitted = self.lane.admit(&mut state);
        drop(state);
        deliver(admitted);
    }
}

/// The right to send a second request for what comes too slowly; given back when dropped.
#[derive(Debug)]
pub struct Hedge {
    lane: Arc<Lane>,
}

impl Hedge {
    /// What came of it: whether the second request brought the bytes sooner than the first.
    pub fn ended(self, useful: bool) {
        let mut state = self.lane.state();
        if useful {
            (state.useless, state.quiet) = (0, None);
        } else {
            let quiet = FIRST_QUIET * (1 << state.useless.min(16));
            state.quiet = Some(Instant::now() + quiet.min(LONGEST_QUIET));
            state.useless += 1;
        }
    }
}

impl Drop for Hedge {
    fn drop(&mut self) {
        self.lane.state().hedges -= 1;
    }
}

impl Lanes {
    fn lane(&self, link: LinkId) -> &Arc<Lane> {
        &self.0[link.0 as usize % LANES]
    }

    /// Lines up for a pass for a request of about `bytes` compressed bytes, at once, and waits for it when polled. A request of
    /// another priority than demand also waits until its bytes will come behind those that demand has just asked for. Cancel
    /// safe.
    pub fn enter(&self, priority: Priority, bytes: u64, policy: Policy) -> impl Future<Output = Pass> + Send + use<> {
        let start = Instant::now();
        let (pass, arrival) = oneshot::channel();
        let lane = self.lane(policy.link()).clone();
        let mut state = lane.state();
        state.policy = Some(policy);
        if priority == Priority::Demand {
            state.demanded(bytes, policy);
        }
        state.waiting[priority as usize].push_back(Waiter { bytes, pass });
        let admitted = lane.admit(&mut state);
        drop(state);
        deliver(admitted);
        async move {
            let mut pass = arrival.await.expect("a waiter is dropped only with its pass sent");
            if priority != Priority::Demand {
                lane.give_way().await;
            }
            pass.waited = start.elapsed();
            pass.since = Instant::now();
            pass
        }
    }

    /// Waits until a request of this priority may line up: at once, but for what nobody may ever want, which rests between
    /// two requests while there is demand.
    pub async fn rest(&self, priority: Priority, link: LinkId) {
        let rested = || self.lane(link).state().rested();
        while priority == Priority::Background
            && let Some(rested) = rested()
        {
            tokio::time::sleep_until(rested.into()).await;
        }
    }

    /// The right to a second request for what comes too slowly over a link, if there is a place now.
    pub fn hedge(&self, link: LinkId) -> Option<Hedge> {
        let lane = self.lane(link);
        let mut state = lane.state();
        let quiet = state.quiet.is_some_and(|quiet| quiet > Instant::now());
        if quiet || state.hedges >= HEDGES {
            return None;
        }
        state.hedges += 1;
        Some(Hedge { lane: lane.clone() })
    }

    /// What is under way and what waits.
    pub fn load(&self) -> Load {
        let mut load = Load::default();
        for lane in &self.0 {
            let state = lane.state();
            load.demand += state.demand;
            load.others += state.others;
            load.bytes += state.bytes;
            load.waiting += state.waiting.iter().map(VecDeque::len).sum::<usize>();
            load.hedges += state.hedges;
            load.parked += state.parked;
        }
        load
    }
}

impl Lane {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while locked")
    }

    /// Waits until a request sent now will not share the link with what demand has asked for.
    async fn give_way(&self) {
        let clear = self.state().clear;
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
                    let given = Pass {
                        lane: self.clone(),
                        priority,
                        bytes,
                        before,
                        waited: Duration::ZERO,
                        since: Instant::now(),
                        parked: AtomicBool::new(false),
                    };
                    admitted.push((pass, given));
                }
            }
        }
        admitted
    }

    fn leave(self: &Arc<Self>, pass: &Pass) {
        let mut state = self.state();
        if pass.parked.load(Ordering::Relaxed) {
            state.parked -= 1;
            return;
        }
        state.leave(pass);
        let admitted = self.admit(&mut state);
        drop(state);
        deliver(admitted);
    }
}

/// Without the lock: a pass whose receiver is gone is dropped here, and comes back through [`Lane::leave`].
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

    fn leave(&mut self, pass: &Pass) {
        match pass.priority {
            Priority::Demand => {
                self.demand -= 1;
                self.last_demand = Some(Instant::now());
            }
            _ => {
                self.others -= 1;
                self.bytes -= pass.bytes;
                if pass.priority == Priority::Background {
                    let rest = (pass.since.elapsed() * REST).min(LONGEST_REST);
                    self.rested = Some(Instant::now() + rest);
                }
            }
        }
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
        self.lane.clone().leave(self);
    }
}

#[cfg(test)]
mod tests;
