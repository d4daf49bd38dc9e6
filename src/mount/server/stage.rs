//! The transition from an image that is being prepared to one that is served, or that failed.

use std::sync::Arc;
use std::time::Instant;

use super::Mount;
use crate::content::Content;
use crate::fs::{FsError, ImageFs};
use crate::fuse::Stage;
use crate::image::{Image, ImageError};
use crate::mount::error::MountError;

impl Mount {
    /// Checks whether the preparation of the image makes progress, and tells the waiting requests if that has
    /// changed. Returns whether the caller has to start the session, because requests have to fail and the kernel
    /// still holds them. Fails if the preparation stalls and the mount requires a ready image.
    pub(super) fn look(&mut self) -> Result<bool, MountError> {
        let was = self.stall.is_stalled();
        self.stall.look(self.preparation.activity(), Instant::now());
        let (is, Some(timeout)) = (self.stall.is_stalled(), self.config.timeout) else {
            return Ok(false);
        };
        if was == is {
            return Ok(false);
        }
        if !is {
            tracing::info!("the image is arriving again");
            self.served.set(Stage::Preparing);
            return Ok(false);
        }
        let error = FsError::Stalled { timeout };
        if self.config.require_ready {
            return Err(MountError::Stalled(error));
        }
        tracing::warn!(%error, "operations fail until data arrives");
        self.served.set(Stage::Failing(Arc::new(error)));
        Ok(!self.attachment.is_served())
    }

    /// Makes the image available to requests. If the preparation failed, requests get its error instead. Fails with
    /// that error if the mount requires a ready image.
    pub(super) fn prepared(&mut self, prepared: Result<Arc<Image>, ImageError>) -> Result<(), MountError> {
        let stage = match prepared {
            Ok(image) => {
                self.image = Some(image.clone());
                self.ready = Some(self.config.started.elapsed());
                if let Some(learning) = self.learning.take() {
                    self.side.start(&image, learning);
                }
                let content = Arc::new(Content::new(image, self.config.timeout));
                self.content = Some(content.clone());
                Stage::Ready(ImageFs::new(content))
            }
            Err(error) if self.config.require_ready => return Err(error.into()),
            Err(error) => {
                tracing::error!(%error, "the image cannot be prepared, every operation will fail");
                let error = Arc::new(FsError::Failed {
                    reason: error.to_string(),
                });
                self.failure = Some(error.clone());
                Stage::Failing(error)
            }
        };
        self.served.set(stage);
        Ok(())
    }
}
