//! What of a layer is fetched before anybody asks: ahead of readers, by plan, or all of it.

use std::ops::Range;
use std::sync::Arc;

use super::{Flown, Landed, Layer, LayerError, flight};
use crate::fetch::{Priority, Spans as _, Touch};

/// What came of asking for spans.
#[derive(Debug, Default)]
pub struct Begun {
    /// What was started.
    pub flights: Vec<Flown>,
    /// Spans that were under way already.
    pub flying: Vec<u32>,
}

impl Layer {
    /// From now on large files and surroundings may be fetched ahead of readers who wait for parts of them; if there is a disk
    /// for that, for memory is for what is being read.
    pub fn be_eager(&self) {
        if self.keeps() {
            self.readahead.lock().expect("no panic while locked").be_eager();
        }
    }

    /// A profile names these spans: they come without any guessing.
    pub fn foresee(&self, span: u32) {
        self.touches.foresee(span);
    }

    /// Nothing comes without guessing any more: what was foreseen could not be fetched.
    pub fn forget_foreseen(&self) {
        self.touches.forget();
    }

    /// A reader comes to content in a range of the device: what to fetch ahead of it.
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
            // Where the reader is in the span.
            let at = content.start.max(map.heads()[span as usize]);
            let file = map.run_around(at);
            let touch = Touch {
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

    /// Fetches ahead of a reader, one range after the other, in the background.
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

    /// Fetches ahead of a reader. Returns when it is under way.
    async fn read_ahead(self: &Arc<Self>, mut rest: Range<u32>, priority: Priority) {
        while !rest.is_empty() {
            let end = self.spans().reach(rest.start, self.policy().run());
            let end = end.clamp(rest.start + 1, rest.end);
            self.prefetch(rest.start..end, priority).await;
            rest.start = end;
        }
    }

    /// Fetches what fills a range of the device, for a reader who will be there soon. Returns when it is under way.
    pub async fn fetch_ahead(self: &Arc<Self>, device: Range<u64>) {
        let Some(content) = self.spans().content(device) else {
            return;
        };
        for spans in self.spans_with_content(&content) {
            // What was foreseen before is under way.
            let news = spans.clone().filter(|&span| self.touches.foresee(span)).count() > 0;
            if news {
                self.read_ahead(spans, Priority::Readahead).await;
            }
        }
    }

    /// Fetches those of `spans` that are missing, when it is their turn. Returns as soon as they are under way. Spans that
    /// another process fetches at the moment are left to it.
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
            (self.claim(&mut board, spans, priority), flying)
        };
        let start = |run| flight::start(run, std::future::ready(pass.clone()));
        Begun {
            flights: runs.into_iter().map(start).collect(),
            flying,
        }
    }

    /// The next run of spans from `from` on that are not local, of at most `batch` compressed bytes (or one span); none if
    /// they could not be kept.
    pub fn next_missing(&self, from: u32, batch: u64) -> Option<Range<u32>> {
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

    /// How many spans are not local.
    pub fn absent(&self) -> usize {
        self.data.present().into_iter().filter(|present| !present).count()
    }

    /// Waits until a span is here, whoever fetches it.
    pub async fn await_span(self: &Arc<Self>, span: u32) -> Result<(), LayerError> {
        while let Some(mut flight) = self.want(span..span + 1) {
            // The bytes come first; the flight ends when they are on the device, if they can be kept at all.
            while flight.changed().await.is_ok() {}
            match &*flight.borrow() {
                Some(Ok(Landed::Bytes(_))) => break,
                Some(Err(error)) => return Err(error.clone()),
                Some(Ok(Landed::LookAgain)) | None => {}
            }
        }
        Ok(())
    }
}
