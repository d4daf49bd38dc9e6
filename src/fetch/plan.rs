//! Turns an ordered list of wanted spans into runs of neighbouring spans, each worth one request.
//!
//! The plan keeps the order of need where it matters. It fetches neighbours together if they stand near each other in
//! the list. For that it cuts the list into pieces of a few requests each. Within a piece, spans that follow each
//! other in a layer, or nearly so, make one run. Runs come out in the order in which their first spans are needed.

use std::collections::HashSet;
use std::ops::Range;

use super::{Policy, Spans};

/// Compressed bytes looked at together, in requests.
const PIECE: u64 = 8;

/// A span that is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Wanted {
    /// Position of its layer.
    pub layer: usize,
    /// The span.
    pub span: u32,
}

/// Runs for those of `wanted` that are `absent`. Gaps of absent spans that cost less than another request are fetched across;
/// a span that is there is never part of a run, and no span is part of two.
pub fn runs<S: Spans>(
    wanted: &[Wanted],
    layers: &[S],
    absent: impl Fn(Wanted) -> bool,
    policy: Policy,
) -> Vec<(usize, Range<u32>)> {
    let mut planned: HashSet<Wanted> = HashSet::new();
    let mut runs = Vec::new();
    let mut rest = wanted;
    while !rest.is_empty() {
        let mut bytes = 0;
        let length = rest.iter().take_while(|w| {
            let within = bytes < PIECE * policy.run();
            bytes += layers[w.layer].bytes(w.span..w.span + 1);
            within
        });
        let (piece, later) = rest.split_at(length.count().max(1));
        rest = later;
        runs_of_piece(piece, layers, &absent, policy, &mut planned, &mut runs);
    }
    runs
}

fn runs_of_piece<S: Spans>(
    piece: &[Wanted],
    layers: &[S],
    absent: &impl Fn(Wanted) -> bool,
    policy: Policy,
    planned: &mut HashSet<Wanted>,
    runs: &mut Vec<(usize, Range<u32>)>,
) {
    let open = |planned: &HashSet<Wanted>, w: Wanted| !planned.contains(&w) && absent(w);
    let mut sorted: Vec<(Wanted, usize)> = piece.iter().copied().zip(0..).collect();
    sorted.sort_unstable();
    // Each with the place in the order of the first span it is needed for.
    let mut found: Vec<(usize, usize, Range<u32>)> = Vec::new();
    for (wanted, place) in sorted {
        if !open(planned, wanted) {
            continue;
        }
        let Wanted { layer, span } = wanted;
        let joined = found.last_mut().filter(|(_, in_layer, run)| {
            let spans = &layers[layer];
            *in_layer == layer
                && spans.bytes(run.end..span) <= policy.gap()
                && spans.bytes(run.start..span + 1) <= policy.run()
                && (run.end..span).all(|span| open(planned, Wanted { layer, span }))
        });
        let from = match joined {
            Some((first, _, run)) => {
                let from = run.end;
                (*first, run.end) = ((*first).min(place), span + 1);
                from
            }
            None => {
                found.push((place, layer, span..span + 1));
                span
            }
        };
        planned.extend((from..span + 1).map(|span| Wanted { layer, span }));
    }
    found.sort_unstable_by_key(|(place, ..)| *place);
    runs.extend(found.into_iter().map(|(_, layer, run)| (layer, run)));
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::blob::Link;

    #[derive(Debug, Clone)]
    struct Sizes(Vec<u64>);

    impl Spans for Sizes {
        fn count(&self) -> u32 {
            self.0.len() as u32
        }

        fn bytes(&self, spans: Range<u32>) -> u64 {
            self.0[spans.start as usize..spans.end as usize].iter().sum()
        }
    }

    fn policy() -> Policy {
        Policy::of(Link {
            rtt: Some(Duration::from_millis(20)),
            bandwidth: Some(25e6),
            warm: 0,
            ..Link::LOCAL
        })
    }

    fn wanted(spans: &[u32]) -> Vec<Wanted> {
        spans.iter().map(|&span| Wanted { layer: 0, span }).collect()
    }

    #[test]
    fn neighbours_share_a_request_and_the_first_needed_goes_first() {
        let layer = [Sizes(vec![80_000; 40])];
        let all = runs(&wanted(&[30, 3, 31, 4, 1, 12, 2]), &layer, |_| true, policy());
        assert_eq!(all, [(0, 30..32), (0, 1..5), (0, 12..13)]);
        // The gap of one span is worth fetching, unless it is there.
        assert_eq!(runs(&wanted(&[5, 7]), &layer, |_| true, policy()), [(0, 5..8)]);
        let some = runs(&wanted(&[5, 7]), &layer, |w| w.span != 6, policy());
        assert_eq!(some, [(0, 5..6), (0, 7..8)]);
    }

    proptest! {
        #[test]
        fn every_absent_span_is_fetched_once_and_none_that_is_there(
            sizes in prop::collection::vec(prop::collection::vec(1u64..600_000, 1..60), 1..4),
            picks in prop::collection::vec((0usize..4, 0u32..60), 0..200),
            there in prop::collection::hash_set((0usize..4, 0u32..60), 0..80),
        ) {
            let layers: Vec<Sizes> = sizes.into_iter().map(Sizes).collect();
            let wanted: Vec<Wanted> = picks
                .into_iter()
                .map(|(layer, span)| (layer % layers.len(), span))
                .map(|(layer, span)| Wanted { layer, span: span % layers[layer].count() })
                .collect();
            let absent = |w: Wanted| !there.contains(&(w.layer, w.span));
            let mut fetched = HashSet::new();
            for (layer, run) in runs(&wanted, &layers, absent, policy()) {
                prop_assert!(!run.is_empty() && run.end <= layers[layer].count());
                let bytes = layers[layer].bytes(run.clone());
                prop_assert!(run.len() == 1 || bytes <= policy().run());
                let in_run = |span| wanted.contains(&Wanted { layer, span });
                prop_assert!(in_run(run.start) && in_run(run.end - 1), "a run ends where something is wanted");
                let mut gap = 0;
                for span in run {
                    gap = if in_run(span) { 0 } else { gap + layers[layer].bytes(span..span + 1) };
                    prop_assert!(gap <= policy().gap());
                    prop_assert!(absent(Wanted { layer, span }), "it is there");
                    prop_assert!(fetched.insert((layer, span)), "twice");
                }
            }
            for w in wanted.into_iter().filter(|&w| absent(w)) {
                prop_assert!(fetched.contains(&(w.layer, w.span)));
            }
        }
    }
}
