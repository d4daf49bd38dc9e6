//! Folds repeated warnings and errors: the first is logged at once, then one line a minute gives the count.
//!
//! Without folding, a program that keeps reading a broken file would fill the log with one message. So would a
//! registry that fails every request. Two messages are equal if they come from the same place in the code with the
//! same values. If one place logs more than [`VARIANTS`] different messages within a minute, the further ones count
//! as equal.

use std::collections::HashMap;
use std::fmt::{self, Write as _};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use tracing::callsite::Identifier;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

/// Time between two log lines of the same message. A shorter one fills the log; with a longer one, counts come late.
const WINDOW: Duration = Duration::from_secs(60);
/// Different messages of one place that are logged one by one. A larger number lets one place fill more of the log
/// and takes more memory. With a smaller number, messages that differ are folded together.
const VARIANTS: usize = 20;
/// Log target of the messages that give a count. They are never folded.
const REPEATED: &str = "ocifs::repeated";

/// A logging layer that lets the first of several equal messages pass.
#[derive(Debug, Default)]
pub(super) struct Fold(Arc<Shared>);

/// Logs the remaining counts when it is dropped.
#[derive(Debug)]
pub(crate) struct Folded(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    table: Mutex<Table>,
    /// Wakes the counting thread when a message was folded.
    wake: Condvar,
}

/// The messages of the last minute.
#[derive(Debug, Default)]
struct Table {
    said: HashMap<Key, Said>,
    /// Number of different messages in `said` for each place.
    variants: HashMap<Identifier, usize>,
    /// Whether the thread that logs the counts is running.
    thread: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    place: Identifier,
    /// The message; none for all messages of the place beyond [`VARIANTS`].
    text: Option<String>,
}

#[derive(Debug)]
struct Said {
    level: Level,
    text: String,
    since: Instant,
    /// How many messages were folded since `since`.
    count: u64,
}

/// A message that is logged with a count.
#[derive(Debug, PartialEq, Eq)]
struct Repeated {
    level: Level,
    text: String,
    count: u64,
}

impl Table {
    /// Returns whether to log the message. If not, counts it.
    fn admit(&mut self, place: Identifier, level: Level, text: String, now: Instant) -> bool {
        let mut key = Key {
            place: place.clone(),
            text: Some(text.clone()),
        };
        if !self.said.contains_key(&key) && self.variants.get(&place).is_some_and(|&n| n >= VARIANTS) {
            key.text = None;
        }
        if let Some(said) = self.said.get_mut(&key) {
            if said.count == 0 && now >= said.since + WINDOW {
                (said.since, said.text) = (now, text);
                return true;
            }
            said.count += 1;
            said.text = text;
            return false;
        }
        *self.variants.entry(place).or_default() += 1;
        let said = Said {
            level,
            text,
            since: now,
            count: 0,
        };
        self.said.insert(key, said);
        true
    }

    /// Returns the counts to log at `now`, and when to look again. Forgets messages that did not repeat for
    /// [`WINDOW`].
    fn due(&mut self, now: Instant) -> (Vec<Repeated>, Option<Instant>) {
        let (mut due, mut next) = (Vec::new(), None::<Instant>);
        let variants = &mut self.variants;
        self.said.retain(|key, said| {
            let end = said.since + WINDOW;
            match (said.count, end <= now) {
                (0, true) => {
                    if let Some(count) = variants.get_mut(&key.place) {
                        *count -= 1;
                    }
                    return false;
                }
                (0, false) => {}
                (count, true) => {
                    due.push(Repeated {
                        level: said.level,
                        text: said.text.clone(),
                        count,
                    });
                    (said.count, said.since) = (0, now);
                }
                (_, false) => next = Some(next.map_or(end, |next| next.min(end))),
            }
            true
        });
        variants.retain(|_, count| *count > 0);
        (due, next)
    }
}

impl Repeated {
    fn say(&self) {
        let Self { level, text, count } = self;
        if *level == Level::ERROR {
            tracing::error!(target: REPEATED, times = count, "repeated: {text}");
        } else {
            tracing::warn!(target: REPEATED, times = count, "repeated: {text}");
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().expect("no panic while locked")
    }

    /// Logs the counts, each at the end of its window. Returns only if the lock is poisoned.
    fn run(&self) {
        let mut table = self.lock();
        loop {
            let (due, next) = table.due(Instant::now());
            if !due.is_empty() {
                drop(table);
                due.iter().for_each(Repeated::say);
                table = self.lock();
                continue;
            }
            let waited = match next {
                Some(next) => {
                    let left = next.saturating_duration_since(Instant::now());
                    self.wake.wait_timeout(table, left).map(|(table, _)| table).ok()
                }
                None => self.wake.wait(table).ok(),
            };
            match waited {
                Some(waited) => table = waited,
                None => return,
            }
        }
    }
}

impl Fold {
    pub(super) fn folded(&self) -> Folded {
        Folded(self.0.clone())
    }
}

impl Drop for Folded {
    fn drop(&mut self) {
        let (due, _) = self.0.lock().due(Instant::now() + WINDOW);
        due.iter().for_each(Repeated::say);
    }
}

impl<S: Subscriber> Layer<S> for Fold {
    fn event_enabled(&self, event: &Event<'_>, _context: Context<'_, S>) -> bool {
        let metadata = event.metadata();
        if *metadata.level() > Level::WARN || metadata.target() == REPEATED {
            return true;
        }
        let mut text = Text(String::new());
        event.record(&mut text);
        let mut table = self.0.lock();
        let admitted = table.admit(metadata.callsite(), *metadata.level(), text.0, Instant::now());
        if !admitted && !table.thread {
            let shared = self.0.clone();
            let thread = std::thread::Builder::new().name("log".to_owned());
            // If the thread cannot start, the counts are logged when [`Folded`] is dropped.
            table.thread = thread.spawn(move || shared.run()).is_ok();
        }
        drop(table);
        if !admitted {
            self.0.wake.notify_one();
        }
        admitted
    }
}

/// A message with its values.
struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing into a string does not fail.
        let _ = match field.name() {
            "message" => write!(self.0, "{value:?}"),
            name => write!(self.0, " {name}={value:?}"),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tracing::Metadata;
    use tracing::callsite::Callsite;
    use tracing::subscriber::Interest;

    struct Place;

    impl Callsite for Place {
        fn set_interest(&self, _: Interest) {}
        fn metadata(&self) -> &Metadata<'_> {
            unimplemented!("only its identity counts")
        }
    }

    static PLACE: Place = Place;

    fn place() -> Identifier {
        Identifier(&PLACE)
    }

    #[test]
    fn the_first_is_said_and_the_rest_counted() {
        let mut table = Table::default();
        let start = Instant::now();
        let admit = |table: &mut Table, text: &str, second| {
            table.admit(
                place(),
                Level::WARN,
                text.to_owned(),
                start + Duration::from_secs(second),
            )
        };
        assert!(admit(&mut table, "a", 0));
        assert!(admit(&mut table, "b", 1));
        for second in 2..50 {
            assert!(!admit(&mut table, "a", second));
        }
        let (due, next) = table.due(start + Duration::from_secs(50));
        assert_eq!((due, next), (vec![], Some(start + WINDOW)));
        let repeated = Repeated {
            level: Level::WARN,
            text: "a".to_owned(),
            count: 48,
        };
        let (due, next) = table.due(start + WINDOW);
        assert_eq!((due, next), (vec![repeated], None));
        // While the message repeats, one line a minute is logged.
        assert!(!admit(&mut table, "a", 70));
        assert_eq!(table.due(start + 2 * WINDOW).0[0].count, 1);
        // After a minute without the message, its next occurrence is logged at once.
        assert_eq!(table.due(start + 4 * WINDOW).0, []);
        assert!(table.said.is_empty() && table.variants.is_empty());
        assert!(admit(&mut table, "a", 300));
    }

    #[test]
    fn a_place_that_always_says_something_else_is_folded_too() {
        let mut table = Table::default();
        let start = Instant::now();
        let said = (0..10_000).filter(|i| table.admit(place(), Level::ERROR, format!("span {i}"), start));
        assert_eq!(said.count(), VARIANTS + 1);
        assert!(table.said.len() <= VARIANTS + 1);
        let (due, _) = table.due(start + WINDOW);
        assert_eq!(due.iter().map(|r| r.count).sum::<u64>(), 10_000 - VARIANTS as u64 - 1);
    }
}
