//! Which spans of a layer were read, and which of them were foreseen.

use std::sync::atomic::{AtomicU8, Ordering};

/// A reader has read bytes of the span.
const READ: u8 = 1;
/// A profile named the span, or the span belongs to a program that was started.
const FORESEEN: u8 = 2;

/// Two flags for each span of a layer. Every read checks them; a span that was read before costs one load.
#[derive(Debug)]
pub(super) struct Touches(Vec<AtomicU8>);

impl Touches {
    pub(super) fn new(spans: usize) -> Self {
        Self((0..spans).map(|_| AtomicU8::new(0)).collect())
    }

    /// Records a read of the span. The first read returns whether the span was foreseen; later reads return `None`.
    pub(super) fn read(&self, span: u32) -> Option<bool> {
        let flags = &self.0[span as usize];
        if flags.load(Ordering::Relaxed) & READ != 0 {
            return None;
        }
        let before = flags.fetch_or(READ, Ordering::Relaxed);
        (before & READ == 0).then_some(before & FORESEEN != 0)
    }

    /// Clears the [`FORESEEN`] flag of all spans.
    pub(super) fn forget(&self) {
        for flags in &self.0 {
            flags.fetch_and(!FORESEEN, Ordering::Relaxed);
        }
    }

    /// Records that the span will be read. Returns whether the span was not foreseen before.
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
