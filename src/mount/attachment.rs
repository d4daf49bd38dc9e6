//! The attachment of a mount to the kernel: the FUSE mount, the session that takes its requests, and the overlay of a
//! writable mount.
//!
//! The life of the mount (`server`) decides when to attach, when to take requests and when to end. This module carries
//! that out, and says when another program has ended the attachment. While no session takes requests, the kernel holds
//! them.

use std::io;
use std::os::fd::OwnedFd;
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;

use tokio::io::unix::AsyncFd;
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use super::attached::Attached;
use super::error::{MountError, system};
use super::mountpoint::MountPoint;
use super::options::FuseOptions;
use super::overlay::{self, Upper};
use super::{kernel, namespace};
use crate::fuse::{self, Served};
use crate::os::private;
use crate::task::{self, TaskError};

/// How the image is attached.
#[derive(Debug, Clone)]
pub(super) struct AttachOptions {
    /// The source that the mount table shows.
    pub(super) source: String,
    /// The `-o` options.
    pub(super) fuse: FuseOptions,
    /// The directories for changes, if the root is writable.
    pub(super) upper: Option<Upper>,
    /// The process that counts as a user of the mount, if there is one.
    pub(super) parent: Option<u32>,
}

/// The open /dev/fuse before a session takes its requests.
struct OpenFuse {
    fuse: OwnedFd,
    /// Watches for an unmount. It ends when the session starts: after that every request would wake it.
    watched: AsyncFd<OwnedFd>,
}

/// A mount as the kernel has it.
pub(super) struct Attachment {
    options: AttachOptions,
    attached: Attached,
    /// The mount point. `None` as soon as the process mounts on it.
    directory: Option<MountPoint>,
    /// The stage that decides what requests get.
    served: Arc<Served>,
    /// `None` once a session takes requests.
    waiting: Option<OpenFuse>,
    /// The connection to the kernel, to see whether the file system is still mounted.
    connection: OwnedFd,
    /// The end of the session. `None` before it starts.
    session: Option<oneshot::Receiver<io::Result<()>>>,
    /// Completes when no process can reach the mount any more.
    abandoned: Pin<Box<dyn Future<Output = ()>>>,
}

impl Attachment {
    /// Mounts the image on the mount point. The image of a writable mount is mounted in the run directory, which only
    /// this user can reach. `served` decides what requests will get.
    pub(super) fn attach(
        options: AttachOptions,
        mut attached: Attached,
        directory: MountPoint,
        served: Arc<Served>,
    ) -> Result<Self, MountError> {
        let lower = attached.record.lower.clone();
        let mount = |target: &Path| kernel::mount(&options.source, target, &lower, &options.fuse);
        let (fuse, directory) = if options.upper.is_some() {
            private::directory(&lower).map_err(system("create the directory below the overlay"))?;
            let fuse = mount(&lower)?;
            attached.add(&lower)?;
            (fuse, Some(directory))
        } else {
            let fuse = mount(&directory.handle())?;
            attached.add(&directory.place()?)?;
            if attached.record.standing.is_none() {
                return Err(replaced());
            }
            (fuse, None)
        };
        let watched = kernel::watch(&fuse).map_err(system("watch /dev/fuse"))?;
        let connection = fuse.try_clone().map_err(system("watch /dev/fuse"))?;
        attached.turn = None;
        Ok(Self {
            abandoned: abandoned(&options, &attached),
            options,
            attached,
            directory,
            served,
            waiting: Some(OpenFuse { fuse, watched }),
            connection,
            session: None,
        })
    }

    /// The mounts and the registration.
    pub(super) fn attached(&self) -> &Attached {
        &self.attached
    }

    /// Returns whether a session takes requests.
    pub(super) fn is_served(&self) -> bool {
        self.waiting.is_none()
    }

    /// Starts the session. Does nothing if it was started before.
    pub(super) fn start_session(&mut self) -> Result<(), MountError> {
        let Some(OpenFuse { fuse, .. }) = self.waiting.take() else {
            return Ok(());
        };
        let (access, runtime, served) = (self.options.fuse.access(), Handle::current(), self.served.clone());
        let (ended, session) = oneshot::channel();
        let serve = move || {
            let serving = AssertUnwindSafe(|| fuse::serve(fuse, access, served, runtime));
            let result = std::panic::catch_unwind(serving);
            let result = result.unwrap_or_else(|payload| Err(io::Error::other(TaskError::panicked(&*payload))));
            // If the process is going down, the receiver is gone.
            let _ = ended.send(result);
        };
        let thread = std::thread::Builder::new().name("fuse".to_owned());
        thread.spawn(serve).map_err(system("start the FUSE session"))?;
        self.session = Some(session);
        Ok(())
    }

    /// Puts the overlay of a writable mount on the mount point, and unmounts the image's own mount. Does nothing for
    /// other mounts. The session must have been started, because the overlay reads the root.
    pub(super) async fn attach_overlay(&mut self) -> Result<(), MountError> {
        let Some(upper) = self.options.upper.clone() else {
            return Ok(());
        };
        let lower = self.attached.record.lower.clone();
        let directory = self.directory.take().ok_or_else(replaced)?;
        let options = self.options.fuse.clone();
        let mounting = task::blocking(move || {
            let target = directory.handle();
            let lock = overlay::mount(&lower, &upper, &target, directory.path(), &options)?;
            Ok::<_, MountError>((lock, directory.place()?))
        });
        let mounted = mounting.await.map_err(io::Error::other);
        let (lock, place) = mounted.map_err(system("mount the overlay"))??;
        self.attached.cover(place, lock)?;
        self.abandoned = abandoned(&self.options, &self.attached);
        Ok(())
    }

    /// Waits until the attachment ends without this process: by an unmount, or because no process can reach it any more.
    /// Must not be called again after it has returned.
    pub(super) async fn ended(&mut self) {
        tokio::select! {
            () = &mut self.abandoned => {
                tracing::info!("the mount namespace has ended, nobody can reach the mount any more");
                return;
            }
            // Another program unmounted it before a session started.
            () = kernel::gone(self.waiting.as_ref().map(|waiting| &waiting.watched)) => {}
            result = ended(self.session.as_mut()) => {
                if let Err(error) = result {
                    tracing::error!(%error, "the FUSE session ended");
                    return;
                }
                tracing::info!("unmounted");
            }
        }
        self.forget_if_unmounted();
    }

    /// Forgets mounts that another program has unmounted, as far as only their numbers identify them.
    fn forget_if_unmounted(&mut self) {
        if !kernel::is_mounted(&self.connection) {
            self.attached.forget_mounts();
        }
    }

    /// Unmounts everything. Without `lazy` it stops with an error at the first mount that is in use.
    pub(super) fn detach(&mut self, lazy: bool) -> Result<(), MountError> {
        self.forget_if_unmounted();
        self.attached.detach(lazy)
    }

    /// Takes everything down: mounts, registration, private upper directory.
    pub(super) fn take_down(mut self) -> Result<(), MountError> {
        self.detach(true)?;
        self.attached.unregister()?;
        self.attached.discard();
        Ok(())
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        // What is attached is taken down when it is dropped.
        self.forget_if_unmounted();
    }
}

/// Returns a future that completes when no process can reach the mount any more.
fn abandoned(options: &AttachOptions, attached: &Attached) -> Pin<Box<dyn Future<Output = ()>>> {
    let device = attached.record.standing.as_ref().map(|s| s.device.clone());
    Box::pin(namespace::abandoned(device, options.parent))
}

/// Waits for the end of a session. Waits for ever if there is none.
async fn ended(session: Option<&mut oneshot::Receiver<io::Result<()>>>) -> io::Result<()> {
    match session {
        // The thread sends its result even if it panics.
        Some(session) => session.await.unwrap_or(Ok(())),
        None => std::future::pending().await,
    }
}

/// Returns the error for a mount point that is gone or replaced by the time it is used.
fn replaced() -> MountError {
    system("find the mount point")(io::ErrorKind::NotFound.into())
}
