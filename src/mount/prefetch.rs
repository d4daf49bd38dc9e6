//! What a mount fetches and learns on the side while it serves.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;

use crate::image::{CompleteError, Image, Learning, Replay};
use crate::layer::LayerError;
use crate::profile::Profile;

/// Delays before another try to fetch the rest of an image, when the last one failed: it doubles from the first to the last.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// What is fetched although no reader asked for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Prefetch {
    /// Nothing but what lies ahead of readers.
    None,
    /// What earlier starts read.
    #[default]
    Profile,
    /// That, and then the rest of the image.
    All,
}

/// How far prefetching is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PrefetchState {
    /// It has not begun, because the image is not ready.
    Pending,
    /// The profile is being replayed.
    Profile,
    /// The rest of the image is being fetched.
    Rest,
    /// The last try failed; there will be another.
    Waiting,
    /// There is nothing more to do.
    Done,
}

/// What a mount says about prefetching.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PrefetchStatus {
    /// What was asked for.
    pub mode: Prefetch,
    /// How far it is.
    pub state: PrefetchState,
    /// Label of the profile.
    pub label: String,
    /// Starts that the profile was learned from; 0 if there was none, or one of another version of the image.
    pub runs: u32,
    /// Bytes of layers' content that the profile names.
    pub profile_bytes: u64,
    /// Why the last try failed, or why not all of the image can be kept.
    pub problem: Option<String>,
}

/// The tasks on the side of a mount.
#[derive(Debug)]
pub(super) struct Side {
    tasks: JoinSet<()>,
    /// The profile is being replayed already.
    replay: Option<Replay>,
    status: Arc<Mutex<PrefetchStatus>>,
}

impl Side {
    /// Nothing runs yet, but for a replay that began early.
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

    /// Begins to learn and to prefetch. Before anything reads.
    pub(super) fn start(&mut self, image: &Arc<Image>, learning: Learning) {
        let mode = self.status().mode;
        if mode != Prefetch::None {
            image.be_eager();
        }
        let progress = Progress(self.status.clone());
        let (image, profile) = (image.clone(), learning.profile().clone());
        let early = self.replay.take();
        let (heard, recorder) = (image.clone(), image.record());
        self.tasks.spawn(async move { learning.listen(&heard, recorder).await });
        self.tasks.spawn(async move {
            if mode != Prefetch::None {
                progress.set(PrefetchState::Profile, None);
                if let Err(error) = replay(&image, profile, early).await {
                    tracing::info!(%error, "cannot fetch all that the profile names");
                    progress.set(PrefetchState::Profile, Some(error.to_string()));
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

    /// Ends all of it; what was learned so far is kept.
    pub(super) async fn stop(&mut self) {
        self.tasks.shutdown().await;
    }
}

/// Replays a profile, unless that was done early.
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

/// Where the prefetching task says how far it is.
struct Progress(Arc<Mutex<PrefetchStatus>>);

impl Progress {
    fn set(&self, state: PrefetchState, problem: Option<String>) {
        let mut status = self.0.lock().expect("no panic while locked");
        (status.state, status.problem) = (state, problem);
    }

    fn problem(&self) -> Option<String> {
        self.0.lock().expect("no panic while locked").problem.clone()
    }
}

/// Fetches the rest of the image, however often that takes.
async fn complete(image: &Image, progress: &Progress) {
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
