//! Whether the preparation of an image still makes progress.
//!
//! A layer may trickle in, or a registry may deliver a few bytes after each pause. Every process that looks into
//! the mount would then wait for hours. So the mount has a budget of patience:
//! - The budget begins at the timeout of reads, and can never exceed it.
//! - Time uses it up.
//! - Bytes give time back if they arrive at a useful rate ([`crate::blob::Link::useful_rate`]) or faster for some
//!   seconds. They give back as many seconds as they would have taken at that rate.
//! - While this machine works (decodes or merges), the budget grows by the time that passes.
//! - When the budget is used up, the preparation is stalled. When the budget grows again, the stall is over.
//!
//! The module is pure: time and counts come from the caller.

use std::time::{Duration, Instant};

use crate::image::Activity;

/// Time over which a rate is judged, or half of the timeout where that is shorter: a trickle may have a good second.
const JUDGED: Duration = Duration::from_secs(3);
/// Seconds that count when another process shows that it gets on, which it does about once a second.
const BEAT: f64 = 2.0;
/// Time over which the rate that is shown is counted.
const SHOWN: Duration = Duration::from_secs(5);

/// The patience with an image that is being prepared.
#[derive(Debug)]
pub(super) struct Stall {
    most: Duration,
    left: Duration,
    looked: Instant,
    before: Activity,
    /// The time that is being judged: when it began, and what came in it, in seconds of the useful rate.
    judged: (Instant, f64),
    /// When something useful happened last.
    useful: Instant,
    /// The rate shown: since when, from how many bytes on, and the last one that was complete.
    shown: (Instant, u64),
    rate: f64,
}

impl Stall {
    /// Nothing has come at `now`.
    pub(super) fn new(patience: Duration, now: Instant) -> Self {
        Self {
            most: patience,
            left: patience,
            looked: now,
            before: Activity::default(),
            judged: (now, 0.0),
            useful: now,
            shown: (now, 0),
            rate: 0.0,
        }
    }

    /// What happened until `now`; to be told several times a second.
    pub(super) fn look(&mut self, activity: Activity, now: Instant) {
        let passed = now.saturating_duration_since(self.looked);
        self.looked = now;
        if activity.working {
            self.left = self.left.saturating_add(passed).min(self.most);
            self.useful = now;
        } else {
            self.left = self.left.saturating_sub(passed);
        }
        // What another process brings is seen as seconds in which it got on.
        let came = activity.bytes.saturating_sub(self.before.bytes) as f64 / activity.useful_rate.max(1.0);
        let beats = activity.beats.saturating_sub(self.before.beats) as f64 * BEAT;
        self.judged.1 += came + beats;
        self.before = activity;
        let window = JUDGED.min(self.most / 2);
        if self.judged.1 >= window.as_secs_f64() {
            let gained = Duration::try_from_secs_f64(self.judged.1).unwrap_or(self.most);
            self.left = self.left.saturating_add(gained).min(self.most);
            self.useful = now;
            self.judged = (now, 0.0);
        } else if now.saturating_duration_since(self.judged.0) >= window {
            self.judged = (now, 0.0);
        }
        let shown = now.saturating_duration_since(self.shown.0);
        if shown >= SHOWN {
            self.rate = activity.bytes.saturating_sub(self.shown.1) as f64 / shown.as_secs_f64();
            self.shown = (now, activity.bytes);
        }
    }

    /// Whether nothing useful comes.
    pub(super) fn is_stalled(&self) -> bool {
        self.left.is_zero()
    }

    /// How long nothing useful has come.
    pub(super) fn since(&self) -> Duration {
        self.looked.saturating_duration_since(self.useful)
    }

    /// Bytes per second lately.
    pub(super) fn rate(&self) -> f64 {
        self.rate
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(6);
    const TICK: Duration = Duration::from_millis(100);

    struct Scene {
        stall: Stall,
        now: Instant,
        start: Instant,
        activity: Activity,
    }

    impl Scene {
        fn new() -> Self {
            let now = Instant::now();
            Self {
                stall: Stall::new(PATIENCE, now),
                now,
                start: now,
                activity: Activity {
                    useful_rate: 10_000.0,
                    ..Activity::default()
                },
            }
        }

        /// So many bytes each tenth of a second, for so many seconds or until it stalls: how long that took.
        fn bring(&mut self, bytes: u64, seconds: u64) -> f64 {
            let start = self.now;
            while self.now - start < Duration::from_secs(seconds) {
                self.now += TICK;
                self.activity.bytes += bytes;
                self.stall.look(self.activity, self.now);
                if self.stall.is_stalled() {
                    break;
                }
            }
            (self.now - start).as_secs_f64()
        }
    }

    #[test]
    fn what_comes_at_a_useful_rate_never_stalls() {
        let mut scene = Scene::new();
        scene.bring(1_100, 3600);
        assert!(!scene.stall.is_stalled());
        assert!((scene.stall.rate() - 11_000.0).abs() < 200.0, "{}", scene.stall.rate());
        // What stops has all the patience that there was when something useful came last.
        let took = scene.bring(0, 100);
        assert!((3.0..6.2).contains(&took), "{took}");
        let mut scene = Scene::new();
        scene.bring(100_000, 60);
        let took = scene.bring(0, 100);
        assert!((5.9..6.2).contains(&took), "{took}");
        assert!(scene.stall.since() >= PATIENCE);
    }

    #[test]
    fn a_trickle_stalls_as_if_nothing_came() {
        for bytes in [0, 1, 200, 900] {
            let took = Scene::new().bring(bytes, 100);
            assert!((5.9..6.2).contains(&took), "{bytes}: {took}");
        }
    }

    #[test]
    fn gulps_count_for_as_long_as_they_would_have_taken() {
        // 100 kB every five seconds are more than the useful rate, every twenty are not.
        for (pause, lasts) in [(5, true), (20, false)] {
            let mut scene = Scene::new();
            for _ in 0..50 {
                scene.bring(100_000, 0);
                scene.activity.bytes += 100_000;
                scene.bring(0, pause);
            }
            assert_eq!(!scene.stall.is_stalled(), lasts, "{pause}");
        }
    }

    #[test]
    fn what_stalled_goes_on_with_the_next_useful_second() {
        let mut scene = Scene::new();
        scene.bring(0, 100);
        assert!(scene.stall.is_stalled());
        scene.activity.bytes += 200_000;
        scene.bring(0, 1);
        assert!(!scene.stall.is_stalled());
    }

    #[test]
    fn work_and_the_work_of_others_count() {
        let mut scene = Scene::new();
        scene.activity.working = true;
        scene.bring(0, 100);
        assert!(!scene.stall.is_stalled());
        scene.activity.working = false;
        for _ in 0..100 {
            scene.activity.beats += 1;
            scene.bring(0, 1);
        }
        assert!(!scene.stall.is_stalled() && scene.now - scene.start > Duration::from_secs(190));
        scene.bring(0, 100);
        assert!(scene.stall.is_stalled());
    }
}
