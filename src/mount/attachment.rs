//! The attachment of an image to the outside: a directory ([`directory`]) or a disk ([`disk`]).
//!
//! The life of the mount (`server`) decides how far the image is. An attachment mounts, serves or fails requests
//! accordingly. It also reports when another program has ended it.

mod connections;
pub(super) mod directory;
pub(super) mod disk;
mod erofs;
mod listening;
mod session;
mod unwanted;

use std::pin::Pin;
use std::sync::Arc;

use async_trait::async_trait;

use super::attached::Attached;
use super::error::{MountError, system};
use super::namespace;
use crate::content::Content;
use crate::fs::FsError;

/// How far the image is.
#[derive(Debug, Clone)]
pub(super) enum ImageStage {
    /// The preparation makes progress. Requests wait.
    Preparing,
    /// The preparation is stalled, or the image cannot be prepared. Requests fail with this error.
    Failing(Arc<FsError>),
    /// The image is ready. Requests are answered from it.
    Ready(Arc<Content>),
}

/// An image as other programs reach it. Dropping an attachment takes it down.
#[async_trait]
pub(super) trait Attachment: Send {
    /// The mounts and the registration.
    fn attached(&self) -> &Attached;

    /// Whether other programs can reach the image, or at least wait for it.
    fn is_attached(&self) -> bool;

    /// Whether requests are taken. From then on, the attachment ends by itself when its last user is gone.
    fn is_served(&self) -> bool;

    /// Brings the attachment to a stage of the image: mounts, opens doors, or sets what requests get.
    async fn enter(&mut self, stage: ImageStage) -> Result<(), MountError>;

    /// Waits until the attachment ends without this process: by an unmount, with its last user, or because no process
    /// can reach it any more. Must not be called again after it has returned.
    async fn ended(&mut self);

    /// Waits until no client is connected that this process knows of.
    async fn unused(&mut self) {}

    /// Unmounts it and closes its doors, so that no new users come. Without `lazy`, stops with an error at the first part
    /// that is in use.
    fn detach(&mut self, lazy: bool) -> Result<(), MountError>;

    /// Takes everything down, also the registration.
    fn take_down(self: Box<Self>) -> Result<(), MountError>;
}

/// Completes when there is a reason to end the mount.
type EndReason = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Returns a future that completes when no process can reach the mount any more. `parent` counts as a user, if given.
fn abandoned(attached: &Attached, parent: Option<u32>) -> EndReason {
    let device = attached.record.standing.as_ref().map(|s| s.device.clone());
    Box::pin(namespace::abandoned(device, parent))
}

/// Returns the error for a mount point that is gone or replaced by the time it is used.
fn replaced() -> MountError {
    system("find the mount point")(std::io::ErrorKind::NotFound.into())
}
