//! Which spans were read, and which were fetched before anybody asked.

use std::sync::atomic::{AtomicU8, Ordering};

/// A reader got bytes of the span.
const READ: u8 = 1;
/// It was fetched ahead of readers, and none has come yet.
const AHEAD: u8 = 2;

/// Two flags for each span of a layer. Asked on every read, so it costs one load when there is nothing new.
#[derive(Debug)]
pub(super) struct Touches(Vec<AtomicU8>);

impl Touches {
    pub(super) fn new(spans: usize) -> Self {
        Self((0..spans).map(|_| AtomicU8::new(0)).collect())
    }

    /// A reader comes to the span. For the first one: whether the span had been fetched ahead of it.
    pub(super) fn read(&self, span: u32) -> Option<bool> {
        let flags = &self.0[span as usize];
        if flags.load(Ordering::Relaxed) & READ != 0 {
            return None;
        }
        let before = flags.swap(READ, Ordering::Relaxed);
        (before & READ == 0).then_some(before & AHEAD != 0)
    }

    /// The span was fetched ahead; false if a reader has been there before.
    pub(super) fn fetched_ahead(&self, span: u32) -> bool {
        let exchanged = self.0[span as usize].compare_exchange(0, AHEAD, Ordering::Relaxed, Ordering::Relaxed);
        exchanged.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reader_hears_whether_the_span_was_waiting_for_it() {
        let touches = Touches::new(2);
        assert!(touches.fetched_ahead(0) && !touches.fetched_ahead(0));
        assert_eq!((touches.read(0), touches.read(0)), (Some(true), None));
        assert_eq!(touches.read(1), Some(false));
        assert!(!touches.fetched_ahead(1));
    }
}
