//! What is believed of the answers that bring one blob, as far as their headers do not settle it.
//!
//! An answer whose headers are odd is used all the same, and whoever reads checks the bytes. If they were wrong, that is
//! remembered here, and the next answer of the kind is read in another way or not at all.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a blob is believed to be served without ranges when that is new. Content delivery networks do so for objects they
/// have not cached yet, so it is soon tried again, and says nothing about other blobs of the host.
const NO_RANGES_AT_FIRST: Duration = Duration::from_secs(5);
/// How long it is believed at most. Each time that it is still so, it is believed for twice as long as before.
const NO_RANGES_AT_MOST: Duration = Duration::from_secs(300);

#[derive(Debug, Default)]
pub(super) struct Belief(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    no_ranges: Option<NoRanges>,
    /// A part came whose headers did not say that it is the one asked for.
    unproven_part: bool,
    /// How an answer that calls itself compressed and does not state its length was read the last time.
    decoded: Option<bool>,
    /// Read it in the other way from now on.
    other_way: bool,
}

#[derive(Debug, Clone, Copy)]
struct NoRanges {
    until: Instant,
    /// How long it is believed in all.
    lasts: Duration,
    /// The parts that come are wrong ones, so it is no use to ask for any.
    wrong: bool,
}

impl Belief {
    /// The server sent the whole blob when a part was asked for.
    pub(super) fn ranges_were_ignored(&self) {
        self.no_ranges(false);
    }

    /// The server sends parts that are not those asked for.
    pub(super) fn parts_are_wrong(&self) {
        self.no_ranges(true);
    }

    fn no_ranges(&self, wrong: bool) {
        let now = Instant::now();
        let mut state = self.state();
        let lasts = match &mut state.no_ranges {
            None => NO_RANGES_AT_FIRST,
            // The request was under way already, and says nothing new.
            Some(known) if now < known.until => {
                known.wrong |= wrong;
                return;
            }
            Some(known) => (known.lasts * 2).min(NO_RANGES_AT_MOST),
        };
        let until = now.checked_add(lasts);
        state.no_ranges = until.map(|until| NoRanges { until, lasts, wrong });
    }

    /// A part came; whether its headers prove that it is the one asked for.
    pub(super) fn part_came(&self, proven: bool) {
        let mut state = self.state();
        match proven {
            true => state.no_ranges = None,
            false => state.unproven_part = true,
        }
    }

    /// Whether a range that lies far inside the blob can be asked for.
    pub(super) fn has_ranges(&self) -> bool {
        self.known().is_none()
    }

    /// Whether any range is worth asking for.
    pub(super) fn may_ask_for_parts(&self) -> bool {
        !self.known().is_some_and(|known| known.wrong)
    }

    fn known(&self) -> Option<NoRanges> {
        self.state().no_ranges.filter(|known| Instant::now() < known.until)
    }

    /// How to read an answer that may or may not have been compressed on the way, of which `guess` is what its bytes suggest.
    pub(super) fn decode(&self, guess: bool) -> bool {
        let mut state = self.state();
        let decode = guess != state.other_way;
        state.decoded = Some(decode);
        decode
    }

    /// The bytes that came were not the blob's.
    pub(super) fn bytes_were_wrong(&self) {
        let unproven_part = {
            let mut state = self.state();
            if state.decoded.take().is_some() {
                state.other_way = !state.other_way;
            }
            std::mem::take(&mut state.unproven_part)
        };
        if unproven_part {
            self.parts_are_wrong();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every state is a good one.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ignored_ranges_are_remembered_until_a_proper_part_comes_or_time_is_over() {
        let belief = Belief::default();
        assert!(belief.has_ranges());
        belief.ranges_were_ignored();
        assert!(!belief.has_ranges() && belief.may_ask_for_parts());
        belief.part_came(false);
        assert!(!belief.has_ranges());
        belief.part_came(true);
        assert!(belief.has_ranges());
        belief.ranges_were_ignored();
        let over = Instant::now().checked_sub(Duration::from_secs(1)).unwrap();
        belief.state().no_ranges.as_mut().unwrap().until = over;
        assert!(belief.has_ranges());
    }

    #[test]
    fn what_stays_so_is_believed_longer_each_time() {
        let belief = Belief::default();
        let lasts = || belief.state().no_ranges.unwrap().lasts;
        belief.ranges_were_ignored();
        belief.ranges_were_ignored();
        assert_eq!(lasts(), NO_RANGES_AT_FIRST);
        for times in [2, 4, 8, 16, 32, 60, 60] {
            let over = Instant::now().checked_sub(Duration::from_secs(1)).unwrap();
            belief.state().no_ranges.as_mut().unwrap().until = over;
            belief.parts_are_wrong();
            belief.ranges_were_ignored();
            assert_eq!(lasts(), NO_RANGES_AT_FIRST * times);
            assert!(!belief.may_ask_for_parts());
        }
        belief.part_came(true);
        belief.ranges_were_ignored();
        assert_eq!(lasts(), NO_RANGES_AT_FIRST);
    }

    #[test]
    fn wrong_bytes_count_against_parts_that_were_not_proven() {
        let belief = Belief::default();
        belief.part_came(true);
        belief.bytes_were_wrong();
        assert!(belief.has_ranges());
        belief.part_came(false);
        assert!(belief.may_ask_for_parts());
        belief.bytes_were_wrong();
        assert!(!belief.may_ask_for_parts() && !belief.has_ranges());
    }

    #[test]
    fn wrong_bytes_change_how_a_compressed_answer_is_read() {
        let belief = Belief::default();
        assert!(!belief.decode(false));
        belief.bytes_were_wrong();
        assert!(belief.decode(false));
        belief.bytes_were_wrong();
        assert!(!belief.decode(false));
    }
}
