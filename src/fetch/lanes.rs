//! Passes: which requests may be sent at a time.
//!
//! Each link has a lane of its own, with its own sizes. The bytes that fill a slow link are few on a fast one. A link
//! that hangs must not hold up requests over another link.
//!
//! Demand has places of its own. A demand request gets its pass at once, unless other demand requests have all these
//! places. The other priorities share the room of the link: a number of requests, and a number of bytes in flight.
//! While a reader waits, that number of bytes is smaller, so that the reader's response does not queue behind theirs.
//! The lane never cancels a request in flight. Requests are short, and opening a new connection costs more than the
//! rest of a request. While a reader reads, background requests leave the link and the processor idle most of the
//! time.
//!
//! A request that falls far behind may be sent once more over another connection. That takes a [`Hedge`], of which
//! each lane has a few. If the second request was of no use, the link itself is slow, and the lane gives no hedge for
//! a while.
//!
//! Invariants:
//! - A lane gives a pass to the highest priority that waits.
//! - A lane admits a request below demand if no other such request is in flight, however large it is.
//! - A pass that is dropped makes room for the next request. So does a pass whose receiver went away before it
//!   arrived.
//! - A request that waits for something other than the link holds no pass.
//! - A request that hangs does not hold a place for long.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use super::{Policy, Priority};
use crate::blob::LinkId;

/// Demand requests in flight at a time, over each link. More would cost memory, since each holds a decoder and a
/// span. Fewer would make readers wait for each other. More readers than this rarely wait for different places.
const DEMAND: usize = 8;
/// Pause between background requests while there is demand, as a multiple of the time the last one took. With 4,
/// background fetching uses at most a fifth of the link and of the processor, unless [`LONGEST_REST`] cuts the pause
/// short. A smaller pause would slow readers down; a larger one would leave the link idle.
const REST: u32 = 4;
/// Longest pause between background requests. A larger bound would leave the link idle after one slow request. A
/// smaller one would let background requests slow readers down on a slow link.
const LONGEST_REST: Duration = Duration::from_millis(300);
/// Longest time for which other requests give way to demand. Demand may go on without end, and beside it the others
/// have fewer bytes in flight anyway. A larger bound would starve them; a smaller one would make them share the link
/// with demand.
const LONGEST_WAY: Duration = Duration::from_millis(100);

/// Number of lanes. The layers of one image come from fewer hosts. With more links than lanes, some links share a
/// lane, and one that hangs holds up another. More lanes would cost only memory.
const LANES: usize = 8;
/// Requests of a lane that may hang beside those that do not. More would cost memory, since each still holds a
/// decoder and a span. With fewer, requests that hang keep their places on the link from others.
const PARKED: usize = 24;
/// Second requests in flight at a time, over each link. More would fetch more bytes twice when the link itself is
/// slow. Fewer would leave readers waiting for slow connections.
const HEDGES: usize = 4;
/// Time without second requests after the first one that was of no use. Each further one doubles the time, up to
/// [`LONGEST_QUIET`]. A longer time leaves readers waiting for slow connections. A shorter one fetches more bytes
/// twice over a slow link.
const FIRST_QUIET: Duration = Duration::from_secs(2);
/// Longest time without second requests, however many in a row were of no use. A longer time leaves readers waiting
/// for slow connections after the link has recovered. A shorter one fetches more bytes twice over a slow link.
const LONGEST_QUIET: Duration = Duration::from_secs(60);

/// The requests and bytes in flight, by kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Load {
    /// Demand requests in flight.
    pub demand: usize,
    /// All other requests in flight.
    pub others: usize,
    /// Compressed bytes for which the other requests were admitted.
    pub bytes: u64,
    /// Requests that wait for a pass.
    pub waiting: usize,
    /// Second requests in flight for bytes that come too slowly.
    #[serde(default)]
    pub hedges: usize,
    /// Requests that hang. `demand` and `others` do not count them.
    #[serde(default)]
    pub parked: usize,
}

/// The gates that requests pass. Links have separate gates.
#[derive(Debug, Default)]
pub struct Lanes([Arc<Lane>; LANES]);

/// The gate for requests over one link.
#[derive(Debug, Default)]
struct Lane {
    state: Mutex<LaneState>,
}

#[derive(Debug, Default)]
struct LaneState {
    demand: usize,
    others: usize,
    /// Compressed bytes for which the other requests were admitted.
    bytes: u64,
    last_demand: Option<Instant>,
    /// When the link will have delivered the bytes that demand requested, had it begun at once.
    clear: Option<Instant>,
    /// Until when background requests pause if there is demand.
    rested: Option<Instant>,
    policy: Option<Policy>,
    waiting: [VecDeque<Waiter>; 4],
    hedges: usize,
    /// Requests that hang and have given their places to others.
    parked: usize,
    /// Second requests in a row that were of no use.
    useless: u32,
    /// Until when the lane gives no hedge.
    quiet: Option<Instant>,
}

#[derive(Debug)]
struct Waiter {
    bytes: u64,
    pass: oneshot::Sender<Pass>,
}

/// The right to have one request in flight. Dropping the pass gives the right back.
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
    /// Parks the pass, because its request hangs: another request gets the place on the link, and this one continues
    /// beside all others. Does nothing if too many requests are parked already.
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

    /// Returns the priority of the request.
    pub fn priority(&self) -> Priority {
        self.priority
    }

    /// Returns how long the request waited for the pass.
    pub fn waited(&self) -> Duration {
        self.waited
    }

    /// Returns the bytes that were in flight when the lane gave the pass, not counting demand. They share the link
    /// with the request.
    pub fn before(&self) -> u64 {
        self.before
    }

    /// Tells the lane the sizes that follow from what the request has shown of the link. There may be room for other
    /// requests then.
    pub fn learned(&self, policy: Policy) {
        let mut state = self.lane.state();
        state.policy = Some(policy);
        let admitted = self.lane.admit(&mut state);
        drop(state);
        deliver(admitted);
    }
}

/// The right to send a second request for bytes that come too slowly. Dropping the hedge gives the right back.
#[derive(Debug)]
pub struct Hedge {
    lane: Arc<Lane>,
}

impl Hedge {
    /// Gives the hedge back. `useful` says whether the second request brought the bytes sooner than the first.
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

    /// Lines up at once for a pass for a request of about `bytes` compressed bytes. The returned future waits for the
    /// pass. Below demand, it also waits until the response will come behind the bytes that demand has just
    /// requested. Cancel safe.
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

    /// Waits until a request of this priority may line up. Background requests pause between two requests while there
    /// is demand. All others may line up at once.
    pub async fn rest(&self, priority: Priority, link: LinkId) {
        let rested = || self.lane(link).state().rested();
        while priority == Priority::Background
            && let Some(rested) = rested()
        {
            tokio::time::sleep_until(rested.into()).await;
        }
    }

    /// Returns the right to send a second request over a link. Returns none if the lane has none left, or gives none
    /// for a while.
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

    /// Returns what is in flight and what waits, over all links.
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
    fn state(&self) -> MutexGuard<'_, LaneState> {
        self.state.lock().expect("no panic while locked")
    }

    /// Waits until the link has delivered the bytes that demand requested. A request sent then does not share the
    /// link with them.
    async fn give_way(&self) {
        let clear = self.state().clear;
        if let Some(clear) = clear {
            tokio::time::sleep_until(clear.into()).await;
        }
    }

    /// Admits requests: takes from the queues those that may go.
    fn admit(self: &Arc<Self>, state: &mut LaneState) -> Vec<(oneshot::Sender<Pass>, Pass)> {
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

/// Sends passes to the requests that wait for them. The caller must not hold the lock: a pass whose receiver is gone
/// is dropped here, and comes back through [`Lane::leave`].
fn deliver(admitted: Vec<(oneshot::Sender<Pass>, Pass)>) {
    for (sender, pass) in admitted {
        drop(sender.send(pass));
    }
}

impl LaneState {
    /// Notes that demand requests `bytes` compressed bytes.
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

    /// Returns until when there is demand or further demand is expected. None if there was no demand yet.
    fn demand_until(&self) -> Option<Instant> {
        let last = if self.demand > 0 {
            Instant::now()
        } else {
            self.last_demand?
        };
        Some(last + self.policy?.demand_is_over())
    }

    /// Returns when the next background request may line up, if it may not at once.
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
