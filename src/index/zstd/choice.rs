//! Chooses which candidates of a region become restarts.
//!
//! A read decodes from the restart before it to the end of its span. So a restart makes reads behind it cheaper, up to
//! the next restart. It also takes bytes of the index, and how many depends on the restart before it. The choice
//! weighs both against each other (`price`), and is the best one for the region: all ways to choose are compared, by
//! dynamic programming.

/// A place where decoding begins, can begin, or ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RestartPlace {
    /// Offset in the blob.
    pub(super) offset: u64,
    /// Position in the frame's output.
    pub(super) position: u64,
}

/// Bytes of the index that a candidate takes, by the number of the restart before it. `None` where that is impossible.
pub(super) type CandidateCosts = Vec<Option<u64>>;

/// Chooses restarts that take at most `allowed` bytes of the index together. Each byte of the index must save a byte of
/// the blob for each read of `price` bytes of tar.
///
/// `places` are the last restart before the region, the candidates of the region, and its end. `costs` are those of the
/// candidates, the first of which is place 1: entry 0 if place 0 is the restart before it, and so on. Returns the places
/// of the new restarts, in order.
pub(super) fn choose(places: &[RestartPlace], costs: &[CandidateCosts], price: u64, allowed: u64) -> Vec<usize> {
    let affordable = |costs: &CandidateCosts| costs.iter().flatten().any(|&cost| cost <= allowed);
    if !costs.iter().any(affordable) {
        return Vec::new();
    }
    let mut price = u128::from(price);
    loop {
        let chosen = choose_at(places, costs, price);
        if total(&chosen, costs) <= u128::from(allowed) {
            return chosen;
        }
        // At some price, no restart is worth it.
        price += price / 4 + 1;
    }
}

/// Returns what the restarts take together.
fn total(chosen: &[usize], costs: &[CandidateCosts]) -> u128 {
    let mut before = 0;
    let mut total = 0;
    for &place in chosen {
        total += u128::from(costs[place - 1][before].unwrap_or(u64::MAX));
        before = place;
    }
    total
}

/// The best way to come to a place as a restart.
#[derive(Debug, Clone, Copy)]
struct Way {
    /// Bytes of blob times bytes of tar that reads before the place take, and the price of the restarts.
    worth: u128,
    before: usize,
}

fn choose_at(places: &[RestartPlace], costs: &[CandidateCosts], price: u128) -> Vec<usize> {
    let Some(end) = places.len().checked_sub(1).filter(|&end| end > 0) else {
        return Vec::new();
    };
    // Reads between one place and the next, if decoding began at the start of the blob, in sums from the first candidate
    // on.
    let mut from_start = vec![0u128; places.len()];
    for n in 1..end {
        let len = places[n + 1].position - places[n].position;
        from_start[n + 1] = from_start[n] + u128::from(len) * u128::from(places[n + 1].offset);
    }
    let reads = |restart: usize, next: usize| {
        // Reads before the region are not counted.
        let first = restart.max(1);
        let len = places[next].position - places[first].position;
        from_start[next] - from_start[first] - u128::from(len) * u128::from(places[restart].offset)
    };
    let mut ways: Vec<Option<Way>> = vec![Some(Way { worth: 0, before: 0 })];
    for place in 1..=end {
        let way = |before: usize| {
            let cost = match place == end {
                true => 0,
                false => costs[place - 1][before]?,
            };
            let worth = ways[before]?.worth + reads(before, place) + price * u128::from(cost);
            Some(Way { worth, before })
        };
        let best = (0..place).filter_map(way).min_by_key(|way| way.worth);
        ways.push(best);
    }
    let mut chosen = Vec::new();
    let mut place = end;
    while let Some(way) = ways[place]
        && way.before > 0
    {
        place = way.before;
        chosen.push(place);
    }
    chosen.reverse();
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What [`choose_at`] makes small, counted read by read.
    fn worth(places: &[RestartPlace], costs: &[CandidateCosts], price: u128, chosen: &[usize]) -> Option<u128> {
        let (mut worth, mut restart) = (0, 0);
        for place in 1..places.len() - 1 {
            if chosen.contains(&place) {
                worth += price * u128::from(costs[place - 1][restart]?);
                restart = place;
            }
            let len = places[place + 1].position - places[place].position;
            worth += u128::from(len) * u128::from(places[place + 1].offset - places[restart].offset);
        }
        Some(worth)
    }

    #[test]
    fn no_other_choice_is_better() {
        let mut rng = fastrand::Rng::with_seed(7);
        for _ in 0..60 {
            let count = rng.usize(0..9);
            let mut place = RestartPlace {
                offset: rng.u64(0..50),
                position: rng.u64(0..50),
            };
            let mut places = vec![place];
            for _ in 0..=count {
                place.offset += rng.u64(1..100);
                place.position += rng.u64(1..300);
                places.push(place);
            }
            let costs: Vec<CandidateCosts> = (0..count)
                .map(|n| (0..=n).map(|_| (rng.u8(0..4) > 0).then(|| rng.u64(1..50))).collect())
                .collect();
            let price = u128::from(rng.u64(0..2000));
            let chosen = choose_at(&places, &costs, price);
            let found = worth(&places, &costs, price, &chosen).unwrap();
            let every = (0u32..1 << count).filter_map(|set| {
                let other: Vec<usize> = (1..=count).filter(|place| set >> (place - 1) & 1 > 0).collect();
                worth(&places, &costs, price, &other)
            });
            assert_eq!(Some(found), every.min());
        }
    }

    #[test]
    fn choices_take_no_more_than_is_allowed() {
        let places: Vec<RestartPlace> = (0..20u64)
            .map(|n| RestartPlace {
                offset: n << 20,
                position: n << 23,
            })
            .collect();
        let costs: Vec<CandidateCosts> = (0..18).map(|n| vec![Some(1000); n + 1]).collect();
        let counts: Vec<usize> = [0, 999, 1000, 5500, 18_000]
            .into_iter()
            .map(|allowed| choose(&places, &costs, 1 << 20, allowed).len())
            .collect();
        assert_eq!(counts[..3], [0, 0, 1]);
        assert!((2..=5).contains(&counts[3]));
        assert!(counts[4] > counts[3]);
        // The only restart lies where it helps most.
        assert!((7..=12).contains(&choose(&places, &costs, 1 << 20, 1000)[0]));
    }
}
