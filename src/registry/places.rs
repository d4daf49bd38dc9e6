//! The places of an image: its mirrors in order, and last the registry itself.
//!
//! ```text
//!   for each mirror that is not left alone: ask once, with little patience ──it has it──▶ done
//!        │ it refuses, lies, is silent or cannot be reached: leave it alone for a while
//!        ▼
//!   ask the registry ──▶ done
//!        │ it fails, and a retry can help: wait, then begin again; now no mirror is left alone, and all have time
//!        ▼
//! ```
//! The time for which a mirror is left alone grows with each failure. A mirror that then works for as long has a new start. So
//! a mirror whose answers begin well and then stop is asked less and less. What is left alone is as little as the failure is
//! about: one document or blob, one repository, or the whole mirror. When the time is over, one request tries the mirror
//! again, and the others go on without it until that request has an answer.
//!
//! Without mirrors, the registry is asked as if this module were not there.

use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use lru::LruCache;

use super::endpoint::Repository;
use super::hosts::ImagePlace;
use crate::blob::BlobError;
use crate::oci::{Digest, ReferenceSelector};

/// Time that a mirror has for the head of a response, and for each pause in a body, while another place can be asked
/// instead. A longer time makes readers wait longer for a mirror that hangs. A shorter one leaves slow mirrors alone that
/// are only fetching the content themselves.
pub(super) const MIRROR_WAIT: Duration = Duration::from_secs(3);
/// Time that a mirror has for all exchanges of one attempt, with the body of a document, while another place can be asked
/// instead. A longer time makes readers wait longer for a mirror that trickles. A shorter one leaves mirrors alone that have
/// to ask for a token first.
pub(super) const MIRROR_ATTEMPT: Duration = Duration::from_secs(6);
/// How long a mirror is left alone after the first failure. A longer time sends more requests to the registry after a
/// short outage. A shorter one makes readers wait for a dead mirror more often.
const FIRST_REST: Duration = Duration::from_secs(15);
/// Longest time that a mirror is left alone. Each failure soon after the last one makes it twice as long as before.
const LONGEST_REST: Duration = Duration::from_secs(300);
/// Most failures remembered. A larger value costs memory. With a smaller one, mirrors without the content are asked more
/// often.
const FAILURES: usize = 8192;

/// The places of one repository.
#[derive(Debug)]
pub(super) struct Places {
    /// Registry and repository, as in references.
    name: String,
    mirrors: Vec<Mirror>,
    origin: Arc<Repository>,
    failures: Arc<Failures>,
}

#[derive(Debug)]
struct Mirror {
    repository: Arc<Repository>,
    resolves: bool,
    pulls: bool,
}

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Sought {
    /// What a tag means. Only a mirror that resolves tags is asked.
    Tag(String),
    /// Content whose digest is known.
    Content(Digest),
}

impl Sought {
    pub(super) fn of(selector: &ReferenceSelector) -> Self {
        match selector {
            ReferenceSelector::Tag { tag, digest: None } => Self::Tag(tag.clone()),
            ReferenceSelector::Tag {
                digest: Some(digest), ..
            }
            | ReferenceSelector::Digest(digest) => Self::Content(digest.clone()),
        }
    }
}

/// The turn of a place to be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PlaceTurn {
    /// Position of the place; see [`Places::at`].
    pub(super) place: usize,
    /// Time that the place has for the head of a response.
    pub(super) wait: Duration,
    /// Time without a byte after which its body is given up, if that is less than usual.
    pub(super) stall: Option<Duration>,
}

impl Places {
    /// Makes the places of a repository. `places` are those that the files of this machine name, the registry last.
    pub(super) fn new(name: String, places: Vec<ImagePlace>, failures: Arc<Failures>) -> Option<Self> {
        let mut mirrors: Vec<Mirror> = places
            .into_iter()
            .map(|place| Mirror {
                repository: Arc::new(place.repository),
                resolves: place.resolves,
                pulls: place.pulls,
            })
            .collect();
        let origin = mirrors.pop()?.repository;
        Some(Self {
            name,
            mirrors,
            origin,
            failures,
        })
    }

    /// Makes the only place of a repository.
    pub(super) fn only(repository: Arc<Repository>) -> Self {
        Self {
            name: repository.to_string(),
            mirrors: Vec::new(),
            origin: repository,
            failures: Arc::default(),
        }
    }

    /// Returns registry and repository, as in references.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Returns the repository in the registry itself.
    pub(super) fn origin(&self) -> &Arc<Repository> {
        &self.origin
    }

    /// Returns the place at a position. The registry itself has the last one.
    pub(super) fn at(&self, place: usize) -> &Arc<Repository> {
        self.mirrors
            .get(place)
            .map_or(&self.origin, |mirror| &mirror.repository)
    }

    /// Returns all places, the registry last.
    pub(super) fn all(&self) -> impl Iterator<Item = &Arc<Repository>> {
        self.mirrors
            .iter()
            .map(|mirror| &mirror.repository)
            .chain([&self.origin])
    }

    /// Returns the position of the registry itself.
    pub(super) fn last(&self) -> usize {
        self.mirrors.len()
    }

    /// Returns the positions of the mirrors to ask. With `all`, none of them is left alone.
    ///
    /// Claims the next attempt at a mirror whose rest is over: until it ends, other callers leave the mirror alone.
    pub(super) fn mirrors_to_ask(&self, wanted: &Sought, all: bool) -> impl Iterator<Item = usize> {
        let fit = self.mirrors.iter().enumerate().filter(|(_, mirror)| match wanted {
            Sought::Tag(_) => mirror.resolves,
            Sought::Content(_) => mirror.pulls,
        });
        fit.filter(move |(_, mirror)| {
            let scopes = FailureScope::all(&mirror.repository, wanted);
            all || self.failures.may_try(&scopes)
        })
        .map(|(position, _)| position)
    }

    /// Returns the position of the place that would be asked now. Claims nothing.
    pub(super) fn first_to_ask(&self, wanted: &Sought) -> usize {
        let now = Instant::now();
        let first = self.mirrors.iter().position(|mirror| {
            mirror.pulls && !self.failures.rests(&FailureScope::all(&mirror.repository, wanted), now)
        });
        first.unwrap_or(self.mirrors.len())
    }

    /// Records that a mirror failed. Says so in the log, unless it only does not have the content.
    pub(super) fn failed(&self, place: usize, wanted: &Sought, error: &BlobError) {
        let Some(mirror) = self.mirrors.get(place) else { return };
        let [whole, repository, content] = FailureScope::all(&mirror.repository, wanted);
        let at_least = match error {
            BlobError::RateLimited { after, .. } => after.unwrap_or_default(),
            _ => Duration::ZERO,
        };
        let scope = match error {
            BlobError::NotFound { .. }
            | BlobError::Corrupt { .. }
            | BlobError::RangeUnsupported { .. }
            | BlobError::Invalid { .. }
            | BlobError::Unsupported { .. }
            | BlobError::Protocol { transient: false, .. } => content,
            BlobError::Unauthorized { .. } | BlobError::Denied { .. } => repository,
            BlobError::RateLimited { .. }
            | BlobError::Timeout { .. }
            | BlobError::Unreachable { .. }
            | BlobError::Tls { .. }
            | BlobError::Protocol { .. }
            | BlobError::Io { .. } => whole,
        };
        let rest = self.failures.failed(scope, at_least);
        let (mirror, seconds) = (mirror.repository.to_string(), rest.as_secs());
        match error {
            BlobError::NotFound { .. } => tracing::debug!(mirror, %error, "asking the next place"),
            _ => {
                tracing::warn!(mirror, %error, seconds, "asking the next place, and leaving this mirror alone for a while")
            }
        }
    }

    /// Records that a mirror answers: it is no longer left alone.
    pub(super) fn answered(&self, place: usize, wanted: &Sought) {
        if let Some(mirror) = self.mirrors.get(place) {
            self.failures.answered(&FailureScope::all(&mirror.repository, wanted));
        }
    }
}

/// What a failure is about.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct FailureScope(String);

impl FailureScope {
    /// Returns the scopes of a request: the mirror, the repository there, and the content in that repository.
    fn all(repository: &Repository, wanted: &Sought) -> [Self; 3] {
        let id = repository.id();
        let content = match wanted {
            Sought::Tag(tag) => format!("{id} {tag}"),
            Sought::Content(digest) => format!("{id} {digest}"),
        };
        [
            Self(repository.endpoint.base().as_str().to_owned()),
            Self(id),
            Self(content),
        ]
    }
}

/// The failures of all mirrors of a client.
#[derive(Debug)]
pub(super) struct Failures(Mutex<LruCache<FailureScope, Rest>>);

/// The last time for which something was left alone.
#[derive(Debug, Clone, Copy)]
struct Rest {
    until: Instant,
    lasts: Duration,
    /// Whether a request has had an answer since.
    is_over: bool,
}

impl Default for Failures {
    fn default() -> Self {
        let capacity = NonZeroUsize::new(FAILURES).unwrap_or(NonZeroUsize::MIN);
        Self(Mutex::new(LruCache::new(capacity)))
    }
}

impl Failures {
    fn rests(&self, scopes: &[FailureScope], now: Instant) -> bool {
        let state = self.state();
        scopes
            .iter()
            .any(|scope| state.peek(scope).is_some_and(|rest| now < rest.until))
    }

    /// Whether a mirror may be asked. If its rest is just over, the caller is the one to try it.
    fn may_try(&self, scopes: &[FailureScope]) -> bool {
        let now = Instant::now();
        let mut state = self.state();
        if scopes
            .iter()
            .any(|scope| state.peek(scope).is_some_and(|rest| now < rest.until))
        {
            return false;
        }
        for scope in scopes {
            if let Some(rest) = state.get_mut(scope).filter(|rest| !rest.is_over) {
                rest.until = now + MIRROR_WAIT;
            }
        }
        true
    }

    /// Returns how long the scope is left alone.
    fn failed(&self, scope: FailureScope, at_least: Duration) -> Duration {
        let now = Instant::now();
        let mut state = self.state();
        let lasts = match state.peek(&scope) {
            None => FIRST_REST,
            // Requests that were in flight together fail together: that is one failure.
            Some(rest) if now < rest.until && rest.until - now > MIRROR_WAIT => rest.lasts,
            Some(rest) if now.saturating_duration_since(rest.until) < rest.lasts => (rest.lasts * 2).min(LONGEST_REST),
            Some(_) => FIRST_REST,
        };
        let lasts = lasts.max(at_least);
        state.put(
            scope,
            Rest {
                until: now + lasts,
                lasts,
                is_over: false,
            },
        );
        lasts
    }

    fn answered(&self, scopes: &[FailureScope]) {
        let now = Instant::now();
        let mut state = self.state();
        for scope in scopes {
            if let Some(rest) = state.peek_mut(scope) {
                rest.until = rest.until.min(now);
                rest.is_over = true;
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, LruCache<FailureScope, Rest>> {
        self.0.lock().expect("no panic while locked")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::endpoint::{Endpoint, PlainHttp};

    fn places() -> Places {
        let place = |host: &str, resolves| ImagePlace {
            repository: Repository::new(Endpoint::new(host, &PlainHttp::Loopback).unwrap(), "a/b").unwrap(),
            resolves,
            pulls: true,
        };
        let all = vec![place("m1.lan", false), place("m2.lan", true), place("r.lan", true)];
        Places::new("r.lan/a/b".to_owned(), all, Arc::default()).unwrap()
    }

    fn to_ask(places: &Places, wanted: &Sought) -> Vec<usize> {
        places.mirrors_to_ask(wanted, false).collect()
    }

    fn content(text: &str) -> Sought {
        Sought::Content(Digest::of(text.as_bytes()))
    }

    #[test]
    fn a_failure_counts_for_what_it_is_about() {
        let host = || "m".to_owned();
        let missing = BlobError::NotFound {
            what: host(),
            hint: None,
        };
        let denied = BlobError::Denied {
            host: host(),
            what: host(),
            message: host(),
        };
        let refused = BlobError::Unreachable {
            host: host(),
            reason: host(),
        };
        let places = places();
        assert_eq!(
            to_ask(&places, &Sought::Tag("1".to_owned())),
            [1],
            "one does not resolve"
        );
        places.failed(0, &content("x"), &missing);
        assert_eq!(to_ask(&places, &content("x")), [1]);
        assert_eq!(places.first_to_ask(&content("x")), 1);
        assert_eq!(to_ask(&places, &content("y")), [0, 1]);
        places.failed(0, &content("x"), &denied);
        assert_eq!(to_ask(&places, &content("y")), [1]);
        places.failed(1, &content("x"), &refused);
        assert!(to_ask(&places, &content("z")).is_empty());
        assert_eq!(places.first_to_ask(&content("z")), 2);
        let all: Vec<usize> = places.mirrors_to_ask(&content("z"), true).collect();
        assert_eq!(all, [0, 1], "nothing is left alone when nothing else works");
        places.answered(1, &content("z"));
        assert_eq!(to_ask(&places, &content("z")), [1]);
    }

    #[test]
    fn one_request_tries_again_and_the_rest_grows() {
        let failures = Failures::default();
        let scope = || FailureScope("m".to_owned());
        let end_rest = || failures.state().get_mut(&scope()).unwrap().until = Instant::now();
        assert!(failures.may_try(&[scope()]) && failures.may_try(&[scope()]));
        assert_eq!(failures.failed(scope(), Duration::ZERO), FIRST_REST);
        assert_eq!(failures.failed(scope(), Duration::ZERO), FIRST_REST, "failed together");
        assert!(!failures.may_try(&[scope()]));
        for times in [2, 4, 8, 16, 20, 20] {
            end_rest();
            assert!(failures.may_try(&[scope()]));
            assert!(!failures.may_try(&[scope()]), "another request is trying");
            assert_eq!(failures.failed(scope(), Duration::ZERO), FIRST_REST * times);
        }
        // It answers, and fails soon.
        failures.answered(&[scope()]);
        assert!(failures.may_try(&[scope()]) && failures.may_try(&[scope()]));
        assert_eq!(failures.failed(scope(), Duration::ZERO), LONGEST_REST);
        // It has worked for as long as it was left alone.
        failures.answered(&[scope()]);
        failures.state().get_mut(&scope()).unwrap().lasts = Duration::ZERO;
        assert_eq!(failures.failed(scope(), Duration::ZERO), FIRST_REST);
        failures.answered(&[scope()]);
        let asked_for = Duration::from_secs(60);
        assert_eq!(failures.failed(scope(), asked_for), asked_for);
    }
}
