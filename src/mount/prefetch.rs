//! Background work of a mount: it replays the profile, fetches the rest of the image, and learns from reads.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;

use crate::image::{CompleteError, Image, Learning, Replay};
use crate::layer::LayerError;
use crate::profile::Profile;
use crate::task::joined;

/// Pause before the first retry to fetch the rest of an image. Each further retry doubles the pause, up to
/// [`LONGEST_PAUSE`]. A larger value delays the rest of the image after a short failure; a smaller one sends more
/// requests to a registry that fails.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// Longest pause between two retries. A larger value delays the rest of the image after a long failure; a smaller
/// one sends more requests to a registry that stays down.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// What a mount fetches although no reader asked for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Prefetch {
    /// Only readahead for present readers.
    None,
    /// The content that earlier starts of the program read.
    #[default]
    Profile,
    /// The content that earlier starts read, and then the rest of the image.
    All,
}

/// How far prefetching is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PrefetchState {
    /// Prefetching waits until the image is ready.
    Pending,
    /// Prefetching replays the profile.
    Profile,
    /// Prefetching fetches the rest of the image.
    Rest,
    /// The last attempt to fetch the rest failed, and a retry follows.
    Waiting,
    /// Prefetching is over.
    Done,
}

/// The status of prefetching in a mount.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PrefetchStatus {
    /// The content to fetch, as the user chose.
    pub mode: Prefetch,
    /// How far prefetching is.
    pub state: PrefetchState,
    /// Label of the profile.
    pub label: String,
    /// Number of starts from which the profile was learned. 0 if there is no profile, or only one of another
    /// version of the image.
    pub runs: u32,
    /// Bytes of the layers' content that the profile names.
    pub profile_bytes: u64,
    /// Why the last attempt failed, or why the store cannot keep all of the image.
    pub problem: Option<String>,
}

/// The background tasks of a mount.
#[derive(Debug)]
pub(super) struct Side {
    tasks: JoinSet<()>,
    /// A replay of the profile that began before the image was ready.
    replay: Option<Replay>,
    status: Arc<Mutex<PrefetchStatus>>,
}

impl Side {
    /// Starts no task. `replay` is a replay that has already begun, if there is one.
    pub(super) fn new(mode: Prefetch, learning: &Learning, replay: Option<Replay>) -> Self {
        let profile = learning.profile();
        let status = PrefetchStatus {
            mode,
            state: PrefetchState::Pending,
            label: profile.label.to_string(),
            runs: profile.runs,
            profile_bytes: profile.bytes(),
            problem: None,
        };
        Self {
            tasks: JoinSet::new(),
            replay,
            status: Arc::new(Mutex::new(status)),
        }
    }

    /// Starts to learn and to prefetch. The caller must call it before the first read of the image.
    pub(super) fn start(&mut self, image: &Arc<Image>, learning: Learning) {
        let mode = self.status().mode;
        if mode != Prefetch::None {
            image.be_eager();
        }
        let progress = ProgressReport(self.status.clone());
        let (image, profile) = (image.clone(), learning.profile().clone());
        let early = self.replay.take();
        let (heard, recorder) = (image.clone(), image.record());
        let looking = learning.clone();
        self.tasks.spawn(async move { learning.listen(&heard, recorder).await });
        self.tasks.spawn(async move {
            if mode != Prefetch::None {
                progress.set(PrefetchState::Profile, None);
                if let Err(error) = replay(&image, profile, early).await {
                    tracing::info!(%error, "cannot fetch all that the profile names");
                    progress.set(PrefetchState::Profile, Some(error.to_string()));
                }
                // The profile may have come from a location since the mount began.
                if let Ok(Some(profile)) = joined(tokio::task::spawn_blocking(move || looking.again())).await {
                    progress.replayed(&profile);
                }
            }
            if mode == Prefetch::All {
                complete(&image, &progress).await;
            }
            progress.set(PrefetchState::Done, progress.problem());
        });
    }

    pub(super) fn status(&self) -> PrefetchStatus {
        self.status.lock().expect("no panic while locked").clone()
    }

    /// Ends all tasks. The learning task keeps the profile that it has learned so far.
    pub(super) async fn stop(&mut self) {
        self.tasks.shutdown().await;
    }
}

/// Replays a profile, or waits for the end of the replay that began early. If the early one could not replay,
/// begins anew.
async fn replay(image: &Arc<Image>, profile: Profile, early: Option<Replay>) -> Result<(), LayerError> {
    let done = match early {
        Some(early) => early.end().await?,
        None => false,
    };
    if !done {
        Replay::begin(image, profile).end().await?;
    }
    Ok(())
}

/// The handle through which the prefetching task reports how far it is.
struct ProgressReport(Arc<Mutex<PrefetchStatus>>);

impl ProgressReport {
    fn set(&self, state: PrefetchState, problem: Option<String>) {
        let mut status = self.0.lock().expect("no panic while locked");
        (status.state, status.problem) = (state, problem);
    }

    /// Records the profile that was replayed, if none was known when the mount began.
    fn replayed(&self, profile: &Profile) {
        let mut status = self.0.lock().expect("no panic while locked");
        if status.profile_bytes == 0 {
            (status.runs, status.profile_bytes) = (profile.runs, profile.bytes());
        }
    }

    fn problem(&self) -> Option<String> {
        self.0.lock().expect("no panic while locked").problem.clone()
    }
}

/// Fetches the rest of the image. Retries until all spans are in the store, or the store cannot keep them all.
async fn complete(image: &Image, progress: &ProgressReport) {
    let mut pause = FIRST_PAUSE;
    loop {
        progress.set(PrefetchState::Rest, progress.problem());
        match image.complete().await {
            Ok(()) => return progress.set(PrefetchState::Rest, None),
            Err(error @ CompleteError::NotKept { .. }) => {
                tracing::warn!(%error, "not all of the image is here");
                return progress.set(PrefetchState::Rest, Some(error.to_string()));
            }
            Err(error) => {
                tracing::warn!(%error, pause_s = pause.as_secs(), "cannot fetch the rest of the image, trying again later");
                progress.set(PrefetchState::Waiting, Some(error.to_string()));
            }
        }
        tokio::time::sleep(pause).await;
        pause = (2 * pause).min(LONGEST_PAUSE);
    }
}
