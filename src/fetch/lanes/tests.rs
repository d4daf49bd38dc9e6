use futures::FutureExt as _;

use super::*;
use crate::blob::Link;

fn policy() -> Policy {
    Policy::of(Link {
        rtt: Some(Duration::from_millis(20)),
        bandwidth: Some(25e6),
        warm: 0,
        ..Link::LOCAL
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
    // While a reader waits, no request starts in place of one that ended, until few bytes are in flight.
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
    // `background` has got its pass, and goes away without having taken it.
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
        ..Link::LOCAL
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
        lanes.rest(Priority::Background, LinkId::LOCAL).await;
        let pass = enter(&lanes, Priority::Background, 100_000).await;
        let start = Instant::now();
        // The request takes this long.
        tokio::time::sleep(Duration::from_millis(50)).await;
        drop(pass);
        start
    };
    background().await;
    assert!(
        lanes.rest(Priority::Background, LinkId::LOCAL).now_or_never().is_some(),
        "nobody reads"
    );
    let reader = enter(&lanes, Priority::Demand, 1).await;
    let start = background().await;
    assert!(lanes.rest(Priority::Likely, LinkId::LOCAL).now_or_never().is_some());
    lanes.rest(Priority::Background, LinkId::LOCAL).await;
    assert!(start.elapsed() >= Duration::from_millis(250));
    drop(reader);
    background().await;
    assert!(
        lanes.rest(Priority::Background, LinkId::LOCAL).now_or_never().is_none(),
        "it may read on"
    );
    lanes.lane(LinkId::LOCAL).state().last_demand = Some(Instant::now() - policy().demand_is_over());
    assert!(lanes.rest(Priority::Background, LinkId::LOCAL).now_or_never().is_some());
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
    // The wait is bounded, however many bytes demand requests.
    let demands: Vec<_> = (0..DEMAND - 1)
        .map(|_| enter(&lanes, Priority::Demand, 10_000_000).now_or_never().unwrap())
        .collect();
    assert!(lanes.lane(LinkId::LOCAL).state().clear.unwrap() <= Instant::now() + LONGEST_WAY);
    drop(demands);
}

#[tokio::test]
async fn each_link_has_its_own_sizes_and_places() {
    let lanes: Arc<Lanes> = Arc::default();
    let slow = Policy::of(Link {
        id: LinkId(1),
        rtt: Some(Duration::from_millis(20)),
        bandwidth: Some(1e6),
        ..Link::LOCAL
    });
    // Demand takes all places of one link, and one more demand request waits there.
    let _stuck: Vec<_> = (0..DEMAND)
        .map(|_| lanes.enter(Priority::Demand, 1, slow).now_or_never().unwrap())
        .collect();
    assert!(lanes.enter(Priority::Demand, 1, slow).now_or_never().is_none());
    let _other = enter(&lanes, Priority::Demand, 1).now_or_never().expect("another link");
    // The fast link decides what fits on it, even if a request for another link lined up last.
    let far = Policy::of(Link {
        id: LinkId(2),
        rtt: Some(Duration::from_millis(80)),
        bandwidth: Some(25e6),
        ..Link::LOCAL
    });
    let _first = lanes.enter(Priority::Likely, 3_000_000, far).now_or_never().unwrap();
    let _waits = lanes.enter(Priority::Likely, 1, slow);
    let second = lanes.enter(Priority::Likely, 3_000_000, far).now_or_never();
    assert!(second.is_some(), "8 MB may be under way there");
    assert_eq!(lanes.load().demand, DEMAND + 1);
}

#[tokio::test]
async fn what_hangs_gives_its_place_to_others() {
    let lanes: Arc<Lanes> = Arc::default();
    let mut hanging = Vec::new();
    for i in 0..2 * PARKED {
        let Some(pass) = enter(&lanes, Priority::Demand, 1).now_or_never() else {
            assert_eq!(i, PARKED + DEMAND, "no more than that");
            break;
        };
        pass.park();
        pass.park();
        hanging.push(pass);
    }
    assert_eq!((lanes.load().parked, lanes.load().demand), (PARKED, DEMAND));
    hanging.clear();
    let likely = enter(&lanes, Priority::Likely, 2_000_000).await;
    likely.park();
    assert_eq!((lanes.load().others, lanes.load().bytes), (0, 0));
    drop(likely);
    assert_eq!(lanes.load(), Load::default());
}

#[test]
fn second_requests_are_few_and_end_when_they_are_of_no_use() {
    let lanes = Lanes::default();
    let link = LinkId(3);
    let mut hedges: Vec<_> = (0..HEDGES).map(|_| lanes.hedge(link).unwrap()).collect();
    assert!(lanes.hedge(link).is_none());
    assert!(lanes.hedge(LinkId(4)).is_some(), "another link has its own");
    hedges.pop().unwrap().ended(true);
    hedges.push(lanes.hedge(link).expect("one was of use"));
    hedges.pop().unwrap().ended(false);
    assert!(lanes.hedge(link).is_none());
    let quiet = |lanes: &Lanes| lanes.lane(link).state().quiet.unwrap() - Instant::now();
    assert!(quiet(&lanes) <= FIRST_QUIET);
    hedges.pop().unwrap().ended(false);
    assert!(quiet(&lanes) > FIRST_QUIET, "longer each time");
    for _ in 0..100 {
        lanes.lane(link).state().hedges += 1;
        let lane = lanes.lane(link).clone();
        Hedge { lane }.ended(false);
    }
    assert!(quiet(&lanes) <= LONGEST_QUIET);
    hedges.pop().unwrap().ended(true);
    assert!(lanes.hedge(link).is_some());
    drop(hedges);
    assert_eq!(lanes.load(), Load::default());
}
