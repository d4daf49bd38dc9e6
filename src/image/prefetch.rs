//! Prefetching for an image: the bytes that an earlier start read, or the whole image. Prefetching needs the layers,
//! but no tree.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures::{Stream, StreamExt as _, TryStreamExt as _};

use crate::blob::Link;
use crate::fetch::{Policy, Priority, Wanted, runs};
use crate::layer::{Layer, LayerError, flown};
use crate::profile::Profile;
use crate::store::Authority;

/// Number of a profile's requests that queue for a pass at once: more than the link ever has room for.
const LINED_UP: usize = 32;
/// Number of requests in flight at once: more than there ever are.
const UNDER_WAY: usize = 64;

/// The open layers of an image.
#[derive(Debug)]
pub(super) struct Layers {
    /// The layers, base first.
    pub(super) all: Vec<Arc<Layer>>,
    /// Whether earlier starts tell what this start will read.
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

    /// Whether a profile is being replayed, or was replayed without an error.
    pub(super) fn are_profiled(&self) -> bool {
        self.profiled.load(Ordering::Relaxed)
    }

    /// Fetches the content that a profile names, in its order. Returns at the first error. The profile is only a
    /// hint: after an error, readahead guesses about its spans like about all others.
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

    /// Translates the tar offsets of a profile to device addresses.
    pub(super) fn translated(&self, profile: &Profile) -> Profile {
        profile.clone().in_devices(|position, tar| {
            let layer = self.all.get(position);
            layer.map(|layer| layer.spans().of_tar(tar)).unwrap_or_default()
        })
    }

    /// The requests for those spans that a profile (by device address) names and that are not local.
    fn plan(&self, profile: &Profile) -> Vec<(usize, Range<u32>)> {
        let mut seen = HashSet::new();
        let mut wanted = Vec::new();
        // Without a disk, the profile must not evict the spans that are being read from memory.
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

    /// Fetches every span that is not on the local devices. Returns how many are still missing afterwards. Some are
    /// missing only if the devices cannot be written, or may not grow that large. If none is missing, the image needs
    /// no registry.
    ///
    /// If bytes of a layer are not what its index says, fetches what a pass over the layer says in place of that.
    pub(super) async fn complete(&self) -> Result<usize, LayerError> {
        let mut layers = self.all.clone();
        loop {
            match Self::new(layers.clone()).complete_indexed().await {
                Err(error @ LayerError::Corrupt { .. }) => replace_wrong(&mut layers, error).await?,
                result => return result,
            }
        }
    }

    async fn complete_indexed(&self) -> Result<usize, LayerError> {
        // One by one, because each request may have to pause first.
        let theirs = self.fetch(self.missing(), Priority::Background, 1).await?;
        // Other flights or processes were fetching these spans. If they gave up, the spans are fetched here.
        for (position, span) in theirs {
            self.all[position].await_span(span).await?;
        }
        Ok(self.all.iter().map(|layer| layer.absent()).sum())
    }

    /// The requests for all spans that are not on the local devices. The size of each is decided when it is taken,
    /// because by then the link is known better.
    fn missing(&self) -> impl Stream<Item = (usize, Range<u32>)> + Send {
        futures::stream::iter(self.all.iter().enumerate()).flat_map(move |(position, layer)| {
            futures::stream::unfold(0, move |from| async move {
                let run = layer.next_missing(from, self.policy().background_request())?;
                let end = run.end;
                Some(((position, run), end))
            })
        })
    }

    /// Fetches runs of spans in order, as many side by side as the link takes. At most `lined_up` of them queue at
    /// once. Returns the layers and spans that another flight or process was fetching.
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

    /// The link to the largest layer: most bytes come over it.
    pub(super) fn link(&self) -> Option<Link> {
        let largest = self.all.iter().max_by_key(|layer| layer.stats().size);
        largest.map(|layer| layer.link())
    }

    fn policy(&self) -> Policy {
        Policy::of(self.link().unwrap_or(Link::LOCAL))
    }
}

/// Replaces the layer whose bytes failed with `error` by the layer that a pass opens. Fails with `error` if there is no such
/// layer, or if the failed one was opened by a pass itself. So each layer is replaced at most once.
async fn replace_wrong(layers: &mut [Arc<Layer>], error: LayerError) -> Result<(), LayerError> {
    let LayerError::Corrupt { layer: wrong, .. } = &error else {
        return Err(error);
    };
    let is_wrong = |layer: &&mut Arc<Layer>| layer.digest() == wrong && *layer.authority() != Authority::Pass;
    let mut replaced = false;
    for layer in layers.iter_mut().filter(is_wrong) {
        *layer = layer.by_pass(error.clone()).await?;
        replaced = true;
    }
    match replaced {
        true => Ok(()),
        false => Err(error),
    }
}
