//! What the client believes about the responses that serve one blob, where their headers do not settle it.
//!
//! The client uses a response with odd headers, and the reader checks the bytes. If the bytes were wrong, this module
//! remembers it. The client then reads the next response of that kind in another way, or requests none.

use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// How long the client believes at first that a blob is served without ranges. Content delivery networks ignore
/// ranges of objects that they have not cached yet. The client therefore soon tries again, and concludes nothing
/// about other blobs of the host.
const NO_RANGES_AT_FIRST: Duration = Duration::from_secs(5);
/// Longest time that the client believes that a blob is served without ranges. Each confirmation makes the belief
/// last twice as long as before.
const NO_RANGES_AT_MOST: Duration = Duration::from_secs(300);

#[derive(Debug, Default)]
pub(super) struct Belief(Mutex<BeliefState>);

#[derive(Debug, Default)]
struct BeliefState {
    no_ranges: Option<NoRanges>,
    /// A part arrived whose headers did not prove that it is the requested one.
    unproven_part: bool,
    /// Whether the client decoded the last response that calls itself compressed and does not state its length.
    decoded: Option<bool>,
    /// Whether the client reads a compressed response without a stated length in the way opposite to what its bytes
    /// suggest.
    other_way: bool,
}

#[derive(Debug, Clone, Copy)]
struct NoRanges {
    until: Instant,
    /// How long the belief lasts in all, up to `until`.
    lasts: Duration,
    /// The parts that arrive are wrong ones, so the client requests none.
    wrong: bool,
}

impl Belief {
    /// Records that the server sent the whole blob in response to a request for a part.
    pub(super) fn ranges_were_ignored(&self) {
        self.no_ranges(false);
    }

    /// Records that the server sends other parts than the requested ones.
    pub(super) fn parts_are_wrong(&self) {
        self.no_ranges(true);
    }

    fn no_ranges(&self, wrong: bool) {
        let now = Instant::now();
        let mut state = self.state();
        let lasts = match &mut state.no_ranges {
            None => NO_RANGES_AT_FIRST,
            // The request may have been in flight when the belief began, so its response does not prolong it.
            Some(known) if now < known.until => {
                known.wrong |= wrong;
                return;
            }
            Some(known) => (known.lasts * 2).min(NO_RANGES_AT_MOST),
        };
        let until = now.checked_add(lasts);
        state.no_ranges = until.map(|until| NoRanges { until, lasts, wrong });
    }

    /// Records that a part arrived. `proven` is whether its headers prove that it is the requested one.
    pub(super) fn part_came(&self, proven: bool) {
        let mut state = self.state();
        match proven {
            true => state.no_ranges = None,
            false => state.unproven_part = true,
        }
    }

    /// Whether a request for a range far inside the blob is worth sending.
    pub(super) fn has_ranges(&self) -> bool {
        self.known().is_none()
    }

    /// Whether a request for any range is worth sending.
    pub(super) fn may_ask_for_parts(&self) -> bool {
        !self.known().is_some_and(|known| known.wrong)
    }

    fn known(&self) -> Option<NoRanges> {
        self.state().no_ranges.filter(|known| Instant::now() < known.until)
    }

    /// Decides whether to decode a response that may have been compressed for the transfer. `guess` is what its bytes
    /// suggest.
    pub(super) fn decode(&self, guess: bool) -> bool {
        let mut state = self.state();
        let decode = guess != state.other_way;
        state.decoded = Some(decode);
        decode
    }

    /// Records that the received bytes were not the blob's.
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

    fn state(&self) -> MutexGuard<'_, BeliefState> {
        self.0.lock().expect("no panic while locked")
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
