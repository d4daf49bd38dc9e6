//! The image that requests are answered from, and how far its preparation is.
//!
//! ```text
//!            ┌── nothing useful comes ──▶ stalled ── it goes on ──┐
//! preparing ◀┴────────────────────────────────────────────────────┘
//!     ├── ready ──▶ the image
//!     └── given up ──▶ failed
//! ```
//! - While the preparation of the image makes progress, requests wait.
//! - While the preparation is stalled, requests fail.
//! - If the image cannot be prepared, all further requests fail.

use std::sync::{Arc, OnceLock};

use tokio::sync::watch;

use crate::fs::{FsError, ImageFs};

/// How far the preparation of the image is.
#[derive(Debug, Clone)]
pub enum Stage {
    /// The preparation makes progress. Requests wait.
    Preparing,
    /// The preparation is stalled, or the image cannot be prepared. Requests fail with this error.
    Failing(Arc<FsError>),
    /// The image is ready. Requests are answered from it.
    Ready(ImageFs),
}

/// The present [`Stage`], shared by the task that prepares the image and the threads that answer requests.
#[derive(Debug)]
pub struct Served {
    /// The image once it is ready. The field is set once, and every request looks at the field first.
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
    /// Sets the stage for the requests that follow and for those that wait. An image that was set stays for ever.
    pub fn set(&self, stage: Stage) {
        if let Stage::Ready(fs) = &stage {
            self.ready.get_or_init(|| fs.clone());
        }
        self.stage.send_replace(stage);
    }

    /// The image, if it is ready.
    pub(super) fn ready(&self) -> Option<&ImageFs> {
        self.ready.get()
    }

    /// Waits for the image while its preparation makes progress. Returns the error if it stalls or fails.
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
