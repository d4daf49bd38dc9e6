//! Fetching what no reader has asked for yet: what an earlier start read, or all of the image. It takes the layers, and no tree.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures::{Stream, StreamExt as _, TryStreamExt as _};

use crate::blob::Link;
use crate::fetch::{Policy, Priority, Wanted, runs};
use crate::layer::{Layer, LayerError, flown};
use crate::profile::Profile;

/// Requests of a profile that wait for their turn at once, each for at most the link's share: more than ever get it.
const LINED_UP: usize = 32;
/// Requests under way at once: more than there ever are.
const UNDER_WAY: usize = 64;

/// The open layers of an image.
#[derive(Debug)]
pub(super) struct Layers {
    /// Base first.
    pub(super) all: Vec<Arc<Layer>>,
    /// Whether what the start reads is known from earlier ones.
    profiled: AtomicBool,
}

impl Layers {
    /// All layers, base first.
    pub(super) fn new(all: Vec<Arc<Layer>>) -> Self {
        Self {
            all,
            profiled: AtomicBool::new(false),
        }
    }

    /// Whether a profile is or was replayed.
    pub(super) fn are_profiled(&self) -> bool {
        self.profiled.load(Ordering::Relaxed)
    }

    /// Fetches what a profile says, in its order. Ends early at the first error: the profile is a hint, and from then on what
    /// it says is guessed at like anything else.
    pub(super) async fn replay(&self, profile: &Profile) -> Result<(), LayerError> {
        self.profiled.store(true, Ordering::Relaxed);
        let plan = futures::stream::iter(self.plan(&self.translated(profile)));
        let replayed = self.fetch(plan, Priority::Likely, LINED_UP).await;
        if replayed.is_err() {
            self.profiled.store(false, Ordering::Relaxed);
            for layer in &self.all {
                layer.forget_foreseen();
            }
        }
        replayed.map(drop)
    }

    /// A profile by device address.
    pub(super) fn translated(&self, profile: &Profile) -> Profile {
        profile.clone().in_devices(|position, tar| {
            let layer = self.all.get(position);
            layer.map(|layer| layer.spans().of_tar(tar)).unwrap_or_default()
        })
    }

    /// The requests that bring what a profile (by device address) names and is not here.
    fn plan(&self, profile: &Profile) -> Vec<(usize, Range<u32>)> {
        let mut seen = HashSet::new();
        let mut wanted = Vec::new();
        // What there is no disk for must not push out of memory what is being read.
        let mut room = self.all.iter().all(|layer| layer.keeps()).then_some(u64::MAX);
        let room = room.get_or_insert_with(|| self.all.first().map_or(0, |layer| layer.memory_budget() / 2));
        for (position, device) in profile.ranges() {
            let Some(layer) = self.all.get(position) else {
                continue;
            };
            let map = layer.spans();
            for span in map.spans(device).filter(|&span| map.has_content(span)) {
                let size = map.decoded_size(span);
                if seen.insert((position, span)) && size <= *room {
                    *room -= size;
                    layer.foresee(span);
                    wanted.push(Wanted { layer: position, span });
                }
            }
        }
        let absent = |wanted: Wanted| !self.all[wanted.layer].is_local(wanted.span);
        let maps: Vec<_> = self.all.iter().map(|layer| layer.spans()).collect();
        runs(&wanted, &maps, absent, self.policy())
    }

    /// Fetches every span that is not on the local devices, and returns how many are not there even so: none, unless the
    /// devices cannot be written or may not grow that large. Without any missing no registry is needed any more.
    pub(super) async fn complete(&self) -> Result<usize, LayerError> {
        // One by one, for each may have to rest first.
        let theirs = self.fetch(self.missing(), Priority::Background, 1).await?;
        // What others were fetching at that moment comes from them, or, if they gave up, from here.
        for (position, span) in theirs {
            self.all[position].await_span(span).await?;
        }
        Ok(self.all.iter().map(|layer| layer.absent()).sum())
    }

    /// The requests that bring what is not on the local devices. Their size is decided one by one as they are taken: by then
    /// the link is known better.
    fn missing(&self) -> impl Stream<Item = (usize, Range<u32>)> + Send {
        futures::stream::iter(self.all.iter().enumerate()).flat_map(move |(position, layer)| {
            futures::stream::unfold(0, move |from| async move {
                let run = layer.next_missing(from, self.policy().background_request())?;
                let end = run.end;
                Some(((position, run), end))
            })
        })
    }

    /// Fetches runs of spans in order, as many side by side as the link takes, of which so many line up at once. Returns the
    /// layers and spans that somebody else was fetching.
    async fn fetch(
        &self,
        runs: impl Stream<Item = (usize, Range<u32>)> + Send,
        priority: Priority,
        lined_up: usize,
    ) -> Result<Vec<(usize, u32)>, LayerError> {
        runs.map(|(position, run)| {
            let layer = self.all[position].clone();
            async move { (position, layer.prefetch(run, priority).await) }
        })
        .buffer_unordered(lined_up)
        .map(async |(position, begun)| {
            let mut theirs = begun.flying;
            for flight in begun.flights {
                theirs.extend(flown(flight).await?);
            }
            Ok(theirs.into_iter().map(move |span| (position, span)).collect::<Vec<_>>())
        })
        .buffer_unordered(UNDER_WAY)
        .try_concat()
        .await
    }

    /// The way to the largest layer, for most of the bytes come from where that one does.
    pub(super) fn link(&self) -> Option<Link> {
        let largest = self.all.iter().max_by_key(|layer| layer.stats().size);
        largest.map(|layer| layer.link())
    }

    fn policy(&self) -> Policy {
        Policy::of(self.link().unwrap_or(Link::LOCAL))
    }
}
