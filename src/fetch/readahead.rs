//! Readahead: which spans of a layer to fetch before a reader needs them.
//!
//! The caller reports every span that a reader touches for the first time. Readahead then makes guesses of several
//! kinds:
//!
//! - *The rest of the file.* Each wait for a request has a price: the bytes of the span, and the bytes that the link
//!   could have delivered during the round trip. A small file is fetched whole at the first wait, because one price
//!   covers it.
//! - *Neighbours.* The spans behind a touched one in the tar are often read next. A touch that follows no earlier one
//!   begins a *stream* with the spans behind it. A touch in or right behind the spans that a stream fetched advances
//!   that stream. When half of its window is used up, the stream fetches the next window, twice as large. Several
//!   streams exist side by side.
//! - *A small layer.* It is fetched whole at the first wait.
//!
//! Readahead backs off by results. Its *confidence* in a kind of guess is the share of the guessed bytes that readers
//! then read. While confidence is low, first windows shrink, soon to nothing, and a stream must first show three
//! neighbouring touches. Random reads therefore cost the spans that they touch, and few more.
//!
//! If the caller allows readahead to be *eager*, it also fetches what readers have paid for, beside demand. The link
//! idles anyway while readers wait for round trips. Eager readahead adds up the prices of the waits in a file. It
//! fetches a large file whole once they cover the file. It also fetches the *surroundings* of waits that lie close
//! together, in whatever order files are read there. A program reads the modules of a package in that way. Only waits
//! for beginnings of files count: a reader somewhere in the middle of a file does not load what lies around.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;

use super::{Policy, Priority, Spans};

/// Streams followed at a time. With fewer, sequential readers side by side would end each other's streams. More would
/// cost memory and time for each touch.
const STREAMS: usize = 8;
/// Files whose price is remembered. With fewer, a file that is read among many others would lose what its readers
/// paid. More would cost memory and time for each wait.
const FILES: usize = 64;
/// Waits that are remembered. With fewer, waits of other readers would hide those that lie close together. More would
/// cost time for each wait.
const WAITS: usize = 12;
/// Waits that must lie close together before readahead fetches their surroundings. With fewer, readahead would fetch
/// more bytes that no reader needs. With more, readers would wait more often before the surroundings come.
const CLOSE_WAITS: usize = 3;
/// Share of the price of their surroundings that close waits must have paid. A smaller share would fetch more bytes
/// that no reader needs; a larger one would make readers wait more often. Less than the whole is enough, because the
/// bytes come over a link that idles, for readers that wait.
const SURROUNDINGS_SHARE: f64 = 0.75;
/// Least confidence at which readahead fetches surroundings. A lower one would fetch more bytes that no reader needs;
/// a higher one would make readers wait more often. It is below [`CONFIDENT`], because the bytes come over a link
/// that idles.
const SURROUNDINGS_CONFIDENT: f64 = 0.25;
/// Confidence from which on first windows are full, and files are fetched whole. Below it first windows shrink, down
/// to none at [`LOST`]. A higher value makes readers wait more often; a lower one fetches more bytes that no reader
/// needs.
const CONFIDENT: f64 = 0.4;
/// Confidence at which first windows are empty. A higher value gives up sooner, so that readers wait more often. A
/// lower one fetches more bytes that random reads do not need.
const LOST: f64 = 0.3;
/// Requests that every confidence begins with, as if half of them had been of use. A larger credit reacts later to
/// wrong guesses. A smaller one lets the first few guesses decide.
const CREDIT: f64 = 4.0;
/// Requests after which the past counts half. With more, the confidence follows a change of the readers later. With
/// fewer, it wavers.
const MEMORY: f64 = 64.0;
/// Share of the spans it passed that a stream must have touched to grow. A larger share stops streams that skip some
/// spans, so that readers wait more often. A smaller one fetches more spans that the reader jumps over.
const DENSE: f64 = 0.5;

/// The first time that a reader comes to a span.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpanTouch {
    /// The span.
    pub span: u32,
    /// The spans of the file that the reader reads.
    pub file: Range<u32>,
    /// Whether the reader reads the file's first byte.
    pub begins: bool,
    /// Whether the reader has to wait for the span.
    pub waits: bool,
}

/// The kinds of guesses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum GuessKind {
    File,
    Neighbours,
    Surroundings,
}

/// The results of guesses of one kind, in compressed bytes. Both numbers fade.
#[derive(Debug, Default)]
struct GuessRecord {
    guessed: f64,
    read: f64,
}

impl GuessRecord {
    fn guessed(&mut self, bytes: u64, policy: Policy) {
        self.guessed += bytes as f64;
        if self.guessed > MEMORY * policy.request() as f64 {
            self.guessed /= 2.0;
            self.read /= 2.0;
        }
    }

    fn read(&mut self, bytes: u64) {
        self.read = (self.read + bytes as f64).min(self.guessed);
    }

    /// Returns the share of the guessed bytes that readers read.
    fn confidence(&self, policy: Policy) -> f64 {
        let credit = CREDIT * policy.request() as f64;
        (self.read + credit / 2.0) / (self.guessed + credit)
    }
}

/// What the readers of a file have paid so far, in bytes.
#[derive(Debug)]
struct Paid {
    file: Range<u32>,
    price: u64,
}

#[derive(Debug)]
struct ReadStream {
    /// First span that the stream passed.
    start: u32,
    /// The span behind the furthest one that a reader touched.
    next: u32,
    /// The span behind the furthest one that the stream fetched.
    end: u32,
    /// Compressed bytes that the stream keeps fetched ahead of the reader.
    window: u64,
    touches: u32,
}

/// A touch that had to wait for the beginning of a file.
#[derive(Debug, Clone, Copy)]
struct BeginningWait {
    span: u32,
    price: u64,
}

/// The guesses about one layer.
#[derive(Debug, Default)]
pub struct Readahead {
    /// The streams, most recently used first.
    streams: VecDeque<ReadStream>,
    files: GuessRecord,
    neighbours: GuessRecord,
    surroundings: GuessRecord,
    /// Spans that were guessed and that no reader has read yet.
    open: HashMap<u32, GuessKind>,
    /// What readers paid for files, most recently read first. A file whose price is paid leaves the list.
    paid_files: VecDeque<Paid>,
    /// The waits for beginnings of files, most recent first.
    waits: VecDeque<BeginningWait>,
    eager: bool,
}

impl Readahead {
    /// Allows readahead to fetch large files and surroundings that readers have paid for.
    pub fn be_eager(&mut self) {
        self.eager = true;
    }

    /// Notes that a reader came to a span for the first time. Returns the ranges to fetch, most urgent first, each
    /// with its priority. They contain no span that is there.
    pub fn touched(
        &mut self,
        touch: &SpanTouch,
        spans: &(impl Spans + ?Sized),
        absent: impl Fn(u32) -> bool,
        policy: Policy,
    ) -> Vec<(Range<u32>, Priority)> {
        let span = touch.span;
        let bytes = spans.bytes(span..span + 1);
        if let Some(kind) = self.open.remove(&span) {
            self.record(kind).read(bytes);
        }
        let mut guesses = Vec::new();
        if touch.waits {
            let price = bytes + policy.product();
            if self.is_file_paid(touch, price, spans) && self.files.confidence(policy) >= CONFIDENT {
                guesses.push((GuessKind::File, Priority::Readahead, span + 1..touch.file.end));
                guesses.push((GuessKind::File, Priority::Readahead, touch.file.start..span));
            }
        }
        let ahead = self.follow(span, spans, policy);
        guesses.extend(ahead.map(|ahead| (GuessKind::Neighbours, Priority::Readahead, ahead)));
        if touch.waits
            && let Some(around) = self.around(touch, bytes + policy.product(), spans, policy)
        {
            guesses.push((GuessKind::Surroundings, Priority::Likely, span + 1..around.end));
            guesses.push((GuessKind::Surroundings, Priority::Likely, around.start..span));
        }
        let mut ahead = Vec::new();
        for (kind, priority, range) in guesses {
            let runs = self.guess(kind, range, spans, &absent, policy);
            ahead.extend(runs.into_iter().map(|run| (run, priority)));
        }
        ahead
    }

    /// Notes a guess. Returns those runs of it that are absent and were not guessed before.
    fn guess(
        &mut self,
        kind: GuessKind,
        range: Range<u32>,
        spans: &(impl Spans + ?Sized),
        absent: &impl Fn(u32) -> bool,
        policy: Policy,
    ) -> Vec<Range<u32>> {
        let mut ahead = Vec::new();
        let mut run = range.start..range.start;
        for span in range {
            if self.open.contains_key(&span) || !absent(span) {
                continue;
            }
            self.open.insert(span, kind);
            self.record(kind).guessed(spans.bytes(span..span + 1), policy);
            if run.end != span {
                ahead.extend((!run.is_empty()).then_some(run));
                run = span..span;
            }
            run.end = span + 1;
        }
        ahead.extend((!run.is_empty()).then_some(run));
        ahead
    }

    fn record(&mut self, kind: GuessKind) -> &mut GuessRecord {
        match kind {
            GuessKind::File => &mut self.files,
            GuessKind::Neighbours => &mut self.neighbours,
            GuessKind::Surroundings => &mut self.surroundings,
        }
    }

    /// Returns whether the readers of a file have paid for all of it, with `price` for this touch. Unless readahead
    /// is eager, this touch must have paid for all of it.
    fn is_file_paid(&mut self, touch: &SpanTouch, price: u64, spans: &(impl Spans + ?Sized)) -> bool {
        let found = self.paid_files.iter().position(|paid| paid.file == touch.file);
        let mut paid = found.and_then(|i| self.paid_files.remove(i)).unwrap_or(Paid {
            file: touch.file.clone(),
            price: 0,
        });
        let small = price >= spans.bytes(touch.file.clone());
        paid.price += price;
        let enough = paid.price >= spans.bytes(touch.file.clone()) && (self.eager || small);
        if !enough {
            self.paid_files.truncate(FILES - 1);
            self.paid_files.push_front(paid);
        }
        enough
    }

    /// Returns what to fetch around a wait: all of a small layer, or the surroundings of recent waits.
    fn around(
        &mut self,
        touch: &SpanTouch,
        price: u64,
        spans: &(impl Spans + ?Sized),
        policy: Policy,
    ) -> Option<Range<u32>> {
        let all = 0..spans.count();
        if spans.bytes(all.clone()) <= policy.product() + policy.request() {
            return Some(all);
        }
        if !touch.begins {
            return None;
        }
        let span = touch.span;
        self.waits.truncate(WAITS - 1);
        self.waits.push_front(BeginningWait { span, price });
        let may = self.eager && self.surroundings.confidence(policy) >= SURROUNDINGS_CONFIDENT;
        may.then(|| self.surroundings_of(span, spans)).flatten()
    }

    /// Returns the largest neighbourhood of `span` that the waits in it have paid for.
    fn surroundings_of(&self, span: u32, spans: &(impl Spans + ?Sized)) -> Option<Range<u32>> {
        let mut nearest: Vec<BeginningWait> = self.waits.iter().copied().collect();
        nearest.sort_by_key(|wait| wait.span.abs_diff(span));
        let (mut passed, mut paid) = (span..span + 1, 0);
        let mut found = None;
        for (wait, count) in nearest.iter().zip(1u32..) {
            passed = passed.start.min(wait.span)..passed.end.max(wait.span + 1);
            paid += wait.price;
            if (count as usize) < CLOSE_WAITS {
                continue;
            }
            // Expect the ends as far beyond the outermost waits as the waits are from each other.
            let beyond = (passed.end - passed.start) / (count - 1);
            let around = passed.start.saturating_sub(beyond)..spans.count().min(passed.end + beyond);
            if paid as f64 >= SURROUNDINGS_SHARE * spans.bytes(around.clone()) as f64 {
                found = Some(around);
            }
        }
        found
    }

    /// Advances the stream that the span belongs to, or begins one. Returns the spans to fetch ahead.
    fn follow(&mut self, span: u32, spans: &(impl Spans + ?Sized), policy: Policy) -> Option<Range<u32>> {
        let found = self.streams.iter().position(|stream| stream.meets(span));
        let confidence = self.neighbours.confidence(policy);
        let Some(mut stream) = found.and_then(|i| self.streams.remove(i)) else {
            return self.begin(span, spans, policy, confidence);
        };
        let ahead = stream.follow(span, spans, policy, confidence);
        self.streams.push_front(stream);
        ahead
    }

    fn begin(
        &mut self,
        span: u32,
        spans: &(impl Spans + ?Sized),
        policy: Policy,
        confidence: f64,
    ) -> Option<Range<u32>> {
        let share = ((confidence - LOST) / (CONFIDENT - LOST)).clamp(0.0, 1.0);
        // The span itself takes part of the request.
        let room = policy.request().saturating_sub(spans.bytes(span..span + 1));
        let window = (room as f64 * share) as u64;
        let end = spans.reach(span + 1, window);
        self.streams.truncate(STREAMS - 1);
        self.streams.push_front(ReadStream {
            start: span,
            next: span + 1,
            end,
            window,
            touches: 1,
        });
        (end > span + 1).then_some(span + 1..end)
    }
}

impl ReadStream {
    /// Returns whether a touch belongs to this stream: it lies in what the stream passed last or fetched, or right
    /// behind.
    fn meets(&self, span: u32) -> bool {
        (self.next.saturating_sub(2)..=self.end).contains(&span)
    }

    fn follow(
        &mut self,
        span: u32,
        spans: &(impl Spans + ?Sized),
        policy: Policy,
        confidence: f64,
    ) -> Option<Range<u32>> {
        self.touches += 1;
        self.next = self.next.max(span + 1);
        self.end = self.end.max(self.next);
        let passed = f64::from(self.next - self.start);
        let proven = confidence >= CONFIDENT || self.touches > 2;
        if f64::from(self.touches) < DENSE * passed || !proven {
            return None;
        }
        let ahead = spans.bytes(self.next..self.end);
        if 2 * ahead > self.window {
            return None;
        }
        self.window = (2 * self.window).clamp(policy.request(), policy.longest_window());
        let from = self.end;
        // The stream may have fetched more when the link was faster.
        self.end = spans.reach(from, self.window.saturating_sub(ahead));
        (self.end > from).then_some(from..self.end)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::blob::Link;

    /// Spans of 100,000 compressed bytes.
    struct Even(u32);

    impl Spans for Even {
        fn count(&self) -> u32 {
            self.0
        }

        fn bytes(&self, spans: Range<u32>) -> u64 {
            100_000 * u64::from(spans.end - spans.start)
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

    /// Reads `touches` in order, each in a file of its own. The layer has only the spans that a touch or readahead
    /// fetched. Returns the bytes fetched, and how many touches had to wait.
    fn replay(touches: impl IntoIterator<Item = u32>, count: u32) -> (u64, u32) {
        replay_files(touches.into_iter().map(|span| (span, span..span + 1)), count)
    }

    fn replay_files(touches: impl IntoIterator<Item = (u32, Range<u32>)>, count: u32) -> (u64, u32) {
        replay_with(Readahead::default(), touches, count)
    }

    fn replay_eagerly(touches: impl IntoIterator<Item = (u32, Range<u32>)>, count: u32) -> (u64, u32) {
        let mut readahead = Readahead::default();
        readahead.be_eager();
        replay_with(readahead, touches, count)
    }

    fn replay_with(
        mut readahead: Readahead,
        touches: impl IntoIterator<Item = (u32, Range<u32>)>,
        count: u32,
    ) -> (u64, u32) {
        let (spans, policy) = (Even(count), policy());
        let mut there = vec![false; count as usize];
        let mut touched = vec![false; count as usize];
        let (mut bytes, mut waits) = (0, 0);
        for (span, file) in touches {
            if std::mem::replace(&mut touched[span as usize], true) {
                continue;
            }
            let waits_for_it = !std::mem::replace(&mut there[span as usize], true);
            if waits_for_it {
                (bytes, waits) = (bytes + 100_000, waits + 1);
            }
            let touch = SpanTouch {
                span,
                file,
                begins: true,
                waits: waits_for_it,
            };
            let absent = |span: u32| !there[span as usize];
            let ahead = readahead.touched(&touch, &spans, absent, policy);
            for ahead in ahead.into_iter().flat_map(|(run, _)| run) {
                assert!(!std::mem::replace(&mut there[ahead as usize], true), "fetched twice");
                bytes += 100_000;
            }
        }
        (bytes, waits)
    }

    #[test]
    fn a_sequential_reader_waits_once() {
        assert_eq!(replay(0..1000, 1000), (100_000_000, 1));
    }

    #[test]
    fn a_stream_goes_on_when_the_link_becomes_slower() {
        let (fast, spans) = (policy(), Even(1000));
        let slow = Policy::of(Link {
            rtt: Some(Duration::from_millis(1)),
            bandwidth: Some(1e6),
            warm: 0,
            ..Link::LOCAL
        });
        for change in 0..60 {
            let (mut readahead, mut end) = (Readahead::default(), 0);
            for span in 0..200 {
                let touch = SpanTouch {
                    span,
                    file: span..span + 1,
                    begins: true,
                    waits: span >= end,
                };
                end = end.max(span + 1);
                let policy = if span < change { fast } else { slow };
                for (run, _) in readahead.touched(&touch, &spans, |span| span >= end, policy) {
                    end = end.max(run.end);
                }
                let ahead = spans.bytes(span..end);
                assert!(ahead <= fast.longest_window() + 100_000, "{change}, {span}: {ahead}");
            }
        }
    }

    #[test]
    fn two_sequential_readers_side_by_side_wait_once_each() {
        let both = (0..400).flat_map(|i| [i, 500 + i]);
        let (bytes, waits) = replay(both, 1000);
        assert_eq!(waits, 2);
        assert!(bytes < 80_000_000 + 2 * 2 * policy().longest_window(), "{bytes}");
    }

    #[test]
    fn random_reads_cost_what_they_touch_and_little_more() {
        let mut random = fastrand::Rng::with_seed(7);
        let touches: Vec<u32> = (0..400).map(|_| random.u32(..4000)).collect();
        let mut distinct = touches.clone();
        distinct.sort_unstable();
        distinct.dedup();
        let used = 100_000 * distinct.len() as u64;
        let (bytes, _) = replay(touches, 4000);
        assert!(bytes as f64 <= 1.3 * used as f64, "{bytes} for {used}");
    }

    #[test]
    fn random_reads_of_a_good_part_of_the_layer_do_not_fetch_all_of_it() {
        let mut random = fastrand::Rng::with_seed(7);
        let touches: Vec<u32> = (0..1200).map(|_| random.u32(..4000)).collect();
        let used = 100_000 * touches.iter().collect::<std::collections::HashSet<_>>().len() as u64;
        let (bytes, _) = replay(touches, 4000);
        assert!(bytes as f64 <= 1.4 * used as f64, "{bytes} for {used}");
    }

    #[test]
    fn confidence_comes_back_with_a_reader_that_is_sequential() {
        let mut random = fastrand::Rng::with_seed(7);
        let lost: Vec<u32> = (0..400).map(|_| random.u32(..4000)).collect();
        let (_, waits) = replay(lost.iter().copied(), 6000);
        let (_, more) = replay(lost.into_iter().chain(5000..6000), 6000);
        assert!(more - waits <= 4, "{}", more - waits);
    }

    #[test]
    fn the_end_of_the_layer_is_the_end() {
        assert_eq!(replay([399, 398], 400).0, 200_000);
    }

    #[test]
    fn a_small_layer_comes_at_the_first_touch() {
        assert_eq!(replay([7, 3, 9, 0], 10), (1_000_000, 1));
    }

    /// Every third span of a part of the layer, in a random order. A program reads the modules of a package like
    /// this.
    fn package() -> impl Iterator<Item = (u32, Range<u32>)> {
        let mut touches: Vec<u32> = (1000..1120).step_by(3).collect();
        fastrand::Rng::with_seed(7).shuffle(&mut touches);
        touches.into_iter().map(|span| (span, span..span + 1))
    }

    #[test]
    fn surroundings_of_waits_come_in_whatever_order_they_are_read() {
        let (bytes, waits) = replay_eagerly(package(), 4000);
        let (_, many) = replay(package().map(|(span, _)| span), 4000);
        assert!(3 * waits <= 2 * many, "{waits} instead of {many}");
        assert!(bytes <= 16_000_000, "{bytes} for 12,000,000");
    }

    #[test]
    fn surroundings_of_random_waits_are_soon_left_alone() {
        let mut random = fastrand::Rng::with_seed(7);
        let touches: Vec<u32> = (0..200).map(|_| random.u32(..4000)).collect();
        let (bytes, _) = replay(touches.iter().copied(), 4000);
        let (eagerly, _) = replay_eagerly(touches.into_iter().map(|span| (span, span..span + 1)), 4000);
        assert!(eagerly as f64 <= 1.1 * bytes as f64, "{eagerly}, {bytes}");
    }

    #[test]
    fn a_file_that_is_read_here_and_there_comes_whole_when_it_is_paid_for() {
        let file = 100..130;
        let touches = [115, 103, 129, 121, 108, 111, 118, 126, 100, 105].map(|span| (span, file.clone()));
        let (bytes, waits) = replay_eagerly(touches, 4000);
        assert!((3_000_000..5_000_000).contains(&bytes), "{bytes}");
        assert!(waits <= 6, "{waits}");
    }

    #[test]
    fn a_small_file_comes_at_the_first_touch_even_what_is_before_it() {
        assert_eq!(replay_files([(104, 100..105), (100, 100..105)], 4000).1, 1);
    }
}
