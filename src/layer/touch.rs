//! Which spans were read, and which of them an earlier run had read.

use std::sync::atomic::{AtomicU8, Ordering};

/// A reader got bytes of the span.
const READ: u8 = 1;
/// A profile named it, or it belongs to a program that was begun.
const FORESEEN: u8 = 2;

/// Two flags for each span of a layer. Asked on every read, so it costs one load when there is nothing new.
#[derive(Debug)]
pub(super) struct Touches(Vec<AtomicU8>);

impl Touches {
    pub(super) fn new(spans: usize) -> Self {
        Self((0..spans).map(|_| AtomicU8::new(0)).collect())
    }

    /// A reader comes to the span. For the first one: whether a profile had named the span.
    pub(super) fn read(&self, span: u32) -> Option<bool> {
        let flags = &self.0[span as usize];
        if flags.load(Ordering::Relaxed) & READ != 0 {
            return None;
        }
        let before = flags.fetch_or(READ, Ordering::Relaxed);
        (before & READ == 0).then_some(before & FORESEEN != 0)
    }

    /// Nothing is foreseen any more.
    pub(super) fn forget(&self) {
        for flags in &self.0 {
            flags.fetch_and(!FORESEEN, Ordering::Relaxed);
        }
    }

    /// Somebody knows that the span will be read; whether that is news.
    pub(super) fn foresee(&self, span: u32) -> bool {
        self.0[span as usize].fetch_or(FORESEEN, Ordering::Relaxed) & FORESEEN == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reader_hears_whether_the_span_was_foreseen() {
        let touches = Touches::new(2);
        assert!(touches.foresee(1) && !touches.foresee(1));
        assert_eq!((touches.read(0), touches.read(0)), (Some(false), None));
        assert_eq!((touches.read(1), touches.read(1)), (Some(true), None));
        let touches = Touches::new(1);
        assert!(touches.foresee(0));
        touches.forget();
        assert_eq!(touches.read(0), Some(false));
    }
}
