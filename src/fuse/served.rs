//! What requests get: before there is an image, and then the image.
//!
//! ```text
//!            ┌── nothing useful comes ──▶ stalled ── it goes on ──┐
//! preparing ◀┴────────────────────────────────────────────────────┘
//!     ├── ready ──▶ the image
//!     └── given up ──▶ failed
//! ```
//! A request waits while the image is being prepared and comes on. It fails while nothing useful comes, and for good when
//! the image cannot be prepared.

use std::sync::{Arc, OnceLock};

use tokio::sync::watch;

use crate::fs::{FsError, ImageFs};

/// How far the image is.
#[derive(Debug, Clone)]
pub enum Stage {
    /// It comes: requests wait.
    Preparing,
    /// It does not come on, or cannot be prepared: requests fail with this.
    Failing(Arc<FsError>),
    /// It is here.
    Ready(ImageFs),
}

/// What requests get, as it changes; shared by who prepares and who serves.
#[derive(Debug)]
pub struct Served {
    /// Set once: what every request looks at first.
    ready: OnceLock<ImageFs>,
    stage: watch::Sender<Stage>,
}

impl Default for Served {
    fn default() -> Self {
        Self {
            ready: OnceLock::new(),
            stage: watch::Sender::new(Stage::Preparing),
        }
    }
}

impl Served {
    /// From now on requests get this. The image stays.
    pub fn set(&self, stage: Stage) {
        if let Stage::Ready(fs) = &stage {
            self.ready.get_or_init(|| fs.clone());
        }
        self.stage.send_replace(stage);
    }

    /// The image, if it is here.
    pub(super) fn ready(&self) -> Option<&ImageFs> {
        self.ready.get()
    }

    /// Waits for the image as long as it comes on.
    pub(super) async fn image(&self) -> Result<ImageFs, Arc<FsError>> {
        let mut stages = self.stage.subscribe();
        let decided = stages.wait_for(|stage| !matches!(stage, Stage::Preparing)).await;
        match decided.as_deref() {
            Ok(Stage::Ready(fs)) => Ok(fs.clone()),
            Ok(Stage::Failing(error)) => Err(error.clone()),
            Ok(Stage::Preparing) | Err(_) => Err(Arc::new(FsError::Interrupted)),
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    #[test]
    fn requests_wait_fail_and_wait_again() {
        let served = Served::default();
        let mut waiting = Box::pin(served.image());
        assert!((&mut waiting).now_or_never().is_none());
        let stalled = Arc::new(FsError::Failed {
            reason: "stalled".into(),
        });
        served.set(Stage::Failing(stalled));
        assert!(waiting.now_or_never().unwrap().is_err());
        assert!(served.image().now_or_never().unwrap().is_err());
        served.set(Stage::Preparing);
        assert!(served.image().now_or_never().is_none());
    }
}
