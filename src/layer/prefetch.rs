//! Fetching of spans before a reader needs them: ahead of readers, by a plan, or the whole layer.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use super::{Flown, Landed, Layer, LayerError, flight};
use crate::fetch::{Priority, SpanTouch, Spans as _};

/// What a request for spans started.
#[derive(Debug, Default)]
pub struct Begun {
    /// The flights that were started.
    pub flights: Vec<Flown>,
    /// Spans that were in flight already.
    pub flying: Vec<u32>,
}

impl Layer {
    /// Allows fetching large files and surroundings ahead of readers that wait for parts of them. Does nothing if
    /// spans cannot be kept on disk: memory is for the spans that are being read.
    pub fn be_eager(&self) {
        if self.keeps() {
            self.readahead.lock().expect("no panic while locked").be_eager();
        }
    }

    /// Records that a profile names the span. Readahead then makes no guesses when the span is read.
    pub(crate) fn foresee(&self, span: u32) {
        self.touches.foresee(span);
    }

    /// Undoes [`Layer::foresee`] for all spans, so that readahead makes guesses again. To be called if the foreseen
    /// spans could not be fetched.
    pub(crate) fn forget_foreseen(&self) {
        self.touches.forget();
    }

    /// Records that a reader reads content in a range of the device. Returns the spans to fetch ahead of it.
    pub(super) fn touch(&self, content: &Range<u64>) -> Vec<(Range<u32>, Priority)> {
        let (map, mut ahead) = (self.spans(), Vec::new());
        for span in map.spans(content.clone()) {
            if !map.has_content(span) {
                continue;
            }
            let Some(foreseen) = self.touches.read(span) else {
                continue;
            };
            self.stats.used_more(map.bytes(span..span + 1));
            if foreseen {
                continue;
            }
            // The reader's position in the span.
            let at = content.start.max(map.heads()[span as usize]);
            let file = map.run_around(at);
            let touch = SpanTouch {
                span,
                begins: file.as_ref().is_some_and(|file| file.start >= content.start),
                file: file.map_or(span..span + 1, |file| map.spans(file)),
                waits: !self.is_local(span),
            };
            let absent = |span| !self.is_local(span);
            let mut readahead = self.readahead.lock().expect("no panic while locked");
            ahead.extend(readahead.touched(&touch, map, absent, self.policy()));
        }
        ahead
    }

    /// Starts a task that fetches these ranges ahead of a reader, one after the other.
    pub(super) fn read_ahead_of(self: &Arc<Self>, ranges: Vec<(Range<u32>, Priority)>) {
        if ranges.is_empty() {
            return;
        }
        let layer = self.clone();
        self.runtime.spawn(async move {
            for (spans, priority) in ranges {
                layer.read_ahead(spans, priority).await;
            }
        });
    }

    /// Fetches a range of spans ahead of a reader, in requests of the policy's size. Returns when all of them are in
    /// flight.
    async fn read_ahead(self: &Arc<Self>, mut rest: Range<u32>, priority: Priority) {
        while !rest.is_empty() {
            let end = self.spans().reach(rest.start, self.policy().run());
            let end = end.clamp(rest.start + 1, rest.end);
            self.prefetch(rest.start..end, priority).await;
            rest.start = end;
        }
    }

    /// Fetches the spans of a range of the device, which a reader will need soon. Returns when they are in flight.
    pub(crate) async fn fetch_ahead(self: &Arc<Self>, device: Range<u64>) {
        let Some(content) = self.spans().content(device) else {
            return;
        };
        for spans in self.spans_with_content(&content) {
            // Spans that were foreseen before are in flight already.
            let news = spans.clone().filter(|&span| self.touches.foresee(span)).count() > 0;
            if news {
                self.read_ahead(spans, Priority::Readahead).await;
            }
        }
    }

    /// Fetches the missing spans of `spans`. Waits until a request of this priority may start, and returns when the
    /// spans are in flight. Spans that another process is fetching are left to it.
    pub async fn prefetch(self: &Arc<Self>, spans: Range<u32>, priority: Priority) -> Begun {
        let missing = |&span: &u32| !self.is_local(span) && !self.data.is_in_memory(span);
        let bytes = spans.clone().filter(missing);
        let bytes = bytes.map(|span| self.spans().bytes(span..span + 1)).sum::<u64>();
        if bytes == 0 {
            return Begun::default();
        }
        self.data.context.lanes.rest(priority, self.link().id).await;
        let pass = Arc::new(self.data.context.lanes.enter(priority, bytes, self.policy()).await);
        let (runs, flying) = {
            let mut board = self.data.flights.board();
            let flying = spans.clone().filter(|&span| board.is_flying(span)).collect();
            (self.claim(&mut board, spans.clone(), spans.end, priority), flying)
        };
        let start = |run| flight::start(run, std::future::ready(pass.clone()));
        Begun {
            flights: runs.into_iter().map(start).collect(),
            flying,
        }
    }

    /// The next run of spans from `from` on that are not local. The run has at most `batch` compressed bytes, or is
    /// one span. `None` if there is no such span, or if spans cannot be kept on disk.
    pub(crate) fn next_missing(&self, from: u32, batch: u64) -> Option<Range<u32>> {
        let mut run = from..from;
        while self.keeps() && run.end < self.spans().span_count() {
            let span = run.end;
            let absent = !self.is_local(span);
            if !run.is_empty() && (!absent || self.spans().bytes(run.start..span + 1) > batch) {
                break;
            }
            run.end = span + 1;
            if !absent {
                run.start = run.end;
            }
        }
        (!run.is_empty()).then_some(run)
    }

    /// Number of spans that are not local.
    pub fn absent(&self) -> usize {
        self.data.present().into_iter().filter(|present| !present).count()
    }

    /// Waits until a span is local, whichever process fetches it. Without a disk that keeps it, waits until a flight
    /// has delivered it.
    pub(crate) async fn await_span(self: &Arc<Self>, span: u32) -> Result<(), LayerError> {
        let began = Instant::now();
        while let Some(mut flight) = self.want(span..span + 1) {
            // The flight first announces the bytes. The flight ends when the span is on the device, if the span can
            // be kept at all.
            while flight.changed().await.is_ok() {}
            let landing = flight.borrow().clone();
            match landing.map(|landing| self.landed(landing, began)).transpose()? {
                Some(Landed::Bytes(_)) => break,
                Some(Landed::LookAgain) | None => {}
            }
        }
        Ok(())
    }
}
