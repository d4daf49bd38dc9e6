//! The transition from an image that is being prepared to one that is served, or that failed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Event, Mount};
use crate::content::Content;
use crate::fs::FsError;
use crate::image::{Image, ImageError};
use crate::mount::attachment::ImageStage;
use crate::mount::error::MountError;

/// How long a mount waits for an image that should be ready at once. After that the directory is mounted, and its
/// operations wait. A larger value delays the mount of an image whose stored tables are damaged; with a smaller one, a
/// busy machine uses FUSE where it could use EROFS.
const AT_ONCE: Duration = Duration::from_secs(1);

impl Mount {
    /// Checks whether the preparation of the image makes progress, and lets requests wait or fail accordingly. Fails if
    /// the preparation stalls and the mount requires a ready image.
    pub(super) async fn look(&mut self) -> Result<(), MountError> {
        let waits = !self.attachment.is_attached() && !self.attachment.is_served();
        if waits && !self.config.require_ready && self.began.elapsed() > AT_ONCE {
            self.attachment.enter(ImageStage::Preparing).await?;
        }
        let was = self.stall.is_stalled();
        self.stall.look(self.preparation.activity(), Instant::now());
        let (is, Some(timeout)) = (self.stall.is_stalled(), self.config.timeout) else {
            return Ok(());
        };
        if was == is {
            return Ok(());
        }
        if !is {
            tracing::info!("the image is arriving again");
            return self.attachment.enter(ImageStage::Preparing).await;
        }
        let error = FsError::Stalled { timeout };
        if self.config.require_ready {
            return Err(MountError::Stalled(error));
        }
        tracing::warn!(%error, "operations fail until data arrives");
        self.attachment.enter(ImageStage::Failing(Arc::new(error))).await
    }

    /// Makes the image available to requests. If the preparation failed, requests get its error instead. Fails with
    /// that error if the mount requires a ready image. Returns the event to report.
    pub(super) async fn prepared(&mut self, prepared: Result<Arc<Image>, ImageError>) -> Result<Event, MountError> {
        match prepared {
            Ok(image) => {
                self.image = Some(image.clone());
                if let Some(learning) = self.learning.take() {
                    self.side.start(&image, learning);
                }
                let mut content = Content::new(image.clone(), self.config.timeout);
                if self.config.shape.is_read_by_the_kernel_alone() {
                    content = content.kept_by_readers();
                }
                let content = Arc::new(content);
                self.content = Some(content.clone());
                self.attachment.enter(ImageStage::Ready(content)).await?;
                self.ready = Some(self.config.started.elapsed());
                Ok(Event::Ready(image))
            }
            Err(error) if self.config.require_ready => Err(error.into()),
            Err(error) => {
                tracing::error!(%error, "the image cannot be prepared, every operation will fail");
                let error = Arc::new(FsError::Failed {
                    reason: error.to_string(),
                });
                self.failure = Some(error.clone());
                self.attachment.enter(ImageStage::Failing(error.clone())).await?;
                Ok(Event::Failed(error.to_string()))
            }
        }
    }
}
