//! An image as a directory tree. FUSE serves it, or the kernel's own EROFS from a lazy disk.
//!
//! With FUSE, the directory is mounted at once. While no session takes requests, the kernel holds them.
//!
//! With EROFS, nothing is mounted until the image is ready. Then the disk of the image becomes a FUSE file in the run
//! directory, and the kernel mounts the EROFS file system in that file. The FUSE mount is detached at once, so only the
//! EROFS file system still holds it. Any unmount of the EROFS file system therefore ends the FUSE session, unless it is held
//! up by reads ([`unwanted`](super::unwanted)).
//!
//! In the same way, the overlay of a writable mount holds the file system below it.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::io::unix::AsyncFd;

use super::session::FuseSession;
use super::unwanted::unwanted;
use super::{Attachment, EndReason, ImageStage, abandoned, erofs, replaced};
use crate::content::Content;
use crate::disk::Disk;
use crate::fs::ImageFs;
use crate::fuse::{self, Access, DISK_FILE, DiskFiles, Served, Service};
use crate::mount::attached::Attached;
use crate::mount::error::{MountError, system};
use crate::mount::kernel;
use crate::mount::mountpoint::MountPoint;
use crate::mount::options::{FuseOptions, Via};
use crate::mount::overlay::{self, Upper};
use crate::mount::registration::{AttachPhase, Carrier, MountRecord};
use crate::os::{private, until_blocking};
use crate::task;

/// How long the end of the process waits until the kernel has flushed changes to an upper directory. A larger value delays
/// the end if the disk hangs; a smaller one frees the directories while changes are still written to them.
const FLUSH: Duration = Duration::from_secs(20);
/// Pause between two looks at that. A larger value delays the end; a smaller one uses more processor time.
const FLUSH_LOOK: Duration = Duration::from_millis(10);

/// Longest wait for the end of a mount that is not at its mount point. With a larger value, the error about a replaced mount
/// point comes later; with a smaller one, an unmount by another program that takes a while is reported as that error.
const UNMOUNTING: Duration = Duration::from_secs(2);

/// How the image is attached.
#[derive(Debug, Clone)]
pub(in crate::mount) struct AttachOptions {
    /// The source that the mount table shows.
    pub(in crate::mount) source: String,
    /// The `-o` options.
    pub(in crate::mount) fuse: FuseOptions,
    /// The directories for changes, if the root is writable.
    pub(in crate::mount) upper: Option<Upper>,
    /// The process that counts as a user of the mount, if there is one.
    pub(in crate::mount) parent: Option<u32>,
    /// What serves the tree.
    pub(in crate::mount) via: Via,
}

/// The open /dev/fuse before a session takes its requests.
struct OpenFuse {
    fuse: OwnedFd,
    /// Watches for an unmount. It ends when the session starts: after that every request would wake it.
    watched: AsyncFd<OwnedFd>,
}

/// How far the attachment is.
enum DirectoryState {
    /// Nothing is mounted yet.
    Planned,
    /// FUSE is mounted, and no session takes requests.
    Waiting(OpenFuse),
    /// A session takes requests.
    Served(FuseSession),
}

/// A directory as the kernel has it.
pub(in crate::mount) struct DirectoryAttachment {
    options: AttachOptions,
    attached: Attached,
    /// The mount point. `None` as soon as the process mounts on it.
    directory: Option<MountPoint>,
    /// The stage that decides what requests get.
    served: Arc<Served>,
    state: DirectoryState,
    /// What the kernel's EROFS reads from, if it serves the tree.
    erofs: Option<Arc<Content>>,
    /// Completes when no process can reach the mount any more.
    abandoned: EndReason,
    /// Completes when only reads are left that hold up an unmount.
    unwanted: EndReason,
}

impl DirectoryAttachment {
    /// Plans the attachment to a directory. Nothing is mounted before a stage is entered.
    pub(in crate::mount) fn new(options: AttachOptions, attached: Attached, directory: MountPoint) -> Self {
        Self {
            abandoned: abandoned(&attached, options.parent),
            unwanted: Box::pin(std::future::pending()),
            erofs: None,
            options,
            attached,
            directory: Some(directory),
            served: Arc::default(),
            state: DirectoryState::Planned,
        }
    }

    /// Mounts the image by FUSE on the mount point. The image of a writable mount is mounted in the run directory, which
    /// only this user can reach. Does nothing if a mount was made before.
    async fn attach_fuse(&mut self) -> Result<(), MountError> {
        if !matches!(self.state, DirectoryState::Planned) {
            return Ok(());
        }
        let lower = self.attached.record.lower.clone();
        let options = &self.options;
        let mount = |target: &Path| kernel::mount(&options.source, target, &lower, &options.fuse);
        let fuse = if options.upper.is_some() {
            private::directory(&lower).map_err(system("create the directory below the overlay"))?;
            let fuse = mount(&lower)?;
            self.attached.add(&lower)?;
            fuse
        } else {
            let directory = self.directory.take().ok_or_else(replaced)?;
            let fuse = mount(&directory.handle())?;
            self.attached.show(&directory.place()?)?;
            check_place(&self.attached.record, &fuse).await?;
            fuse
        };
        let watched = kernel::watch(&fuse).map_err(system("watch /dev/fuse"))?;
        self.state = DirectoryState::Waiting(OpenFuse { fuse, watched });
        self.abandoned = abandoned(&self.attached, self.options.parent);
        Ok(())
    }

    /// Starts the session. Does nothing if it was started before.
    async fn start_session(&mut self) -> Result<(), MountError> {
        match std::mem::replace(&mut self.state, DirectoryState::Planned) {
            DirectoryState::Waiting(OpenFuse { fuse, .. }) => {
                let service = Service::Tree(self.served.clone());
                let session = FuseSession::start(fuse, self.options.fuse.access(), service).await?;
                self.state = DirectoryState::Served(session);
            }
            state => self.state = state,
        }
        Ok(())
    }

    /// Lets the kernel's EROFS serve the image: mounts it where FUSE would be mounted.
    async fn attach_erofs(&mut self, content: &Arc<Content>) -> Result<(), MountError> {
        let directory = self.attached.entry.disk();
        private::directory(&directory).map_err(system("create the directory of the disk"))?;
        self.attached.record.disk_mount = Some(directory.clone());
        self.attached.record.carrier = Carrier::Erofs;
        self.attached.write()?;
        let fuse = kernel::mount(
            &self.options.source,
            &directory,
            &directory,
            &FuseOptions::defaults(false),
        )?;
        self.attached.add(&directory)?;
        let files = DiskFiles {
            disk: Disk::new(content.clone()),
            config: Arc::default(),
            uncached: true,
        };
        let session = FuseSession::start(fuse, Access::OwnerWithoutCheck, Service::Disk(files)).await?;
        let disk = directory.join(DISK_FILE);
        let flags = self.options.fuse.flags();
        let mount = |target| {
            let disk = disk.clone();
            async move {
                let mounted = task::blocking(move || erofs::mount(disk, target, flags)).await;
                mounted.map_err(std::io::Error::other).and_then(|mounted| mounted)
            }
        };
        let failed = system("let the kernel's EROFS serve the image");
        if self.options.upper.is_some() {
            let lower = self.attached.record.lower.clone();
            private::directory(&lower).map_err(system("create the directory below the overlay"))?;
            mount(lower.clone()).await.map_err(failed)?;
            self.attached.add(&lower)?;
        } else {
            let directory = self.directory.as_ref().ok_or_else(replaced)?;
            mount(directory.handle()).await.map_err(failed)?;
            let place = directory.place()?;
            self.attached.cover(&place, None)?;
            check_place(&self.attached.record, session.connection()).await?;
            self.directory = None;
        }
        self.state = DirectoryState::Served(session);
        self.erofs = Some(content.clone());
        self.abandoned = abandoned(&self.attached, self.options.parent);
        Ok(())
    }

    /// Attaches the image by EROFS if that is planned. Returns whether that was done.
    async fn try_erofs(&mut self, content: &Arc<Content>) -> Result<bool, MountError> {
        let planned = matches!(self.state, DirectoryState::Planned) && self.options.via != Via::Fuse;
        if !planned {
            return Ok(false);
        }
        let Err(error) = self.attach_erofs(content).await else {
            return Ok(true);
        };
        self.attached.detach(true)?;
        if self.options.via == Via::Erofs {
            return Err(error);
        }
        tracing::info!(%error, "FUSE serves the image");
        let record = &mut self.attached.record;
        (record.carrier, record.standing, record.phase) = (Carrier::Fuse, None, AttachPhase::Pending);
        self.attached.write()?;
        Ok(false)
    }

    /// Puts the overlay of a writable mount on the mount point, and unmounts the image's own mount. Does nothing for
    /// other mounts. The session must have been started, because the overlay reads the root.
    async fn attach_overlay(&mut self) -> Result<(), MountError> {
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
        let mounted = mounting.await.map_err(std::io::Error::other);
        let (lock, place) = mounted.map_err(system("mount the overlay"))??;
        self.attached.cover(&place, Some(lock))?;
        self.abandoned = abandoned(&self.attached, self.options.parent);
        Ok(())
    }

    /// Whether the kernel's EROFS waits for bytes.
    fn has_waiting_reads(&self) -> bool {
        self.erofs.as_ref().is_some_and(|content| content.has_waiting_reads())
    }

    /// Forgets mounts that another program has unmounted, as far as only their numbers identify them.
    fn forget_if_unmounted(&mut self) {
        let is_mounted = match &self.state {
            DirectoryState::Planned => true,
            DirectoryState::Waiting(waiting) => kernel::is_mounted(&waiting.fuse),
            DirectoryState::Served(session) => session.is_mounted(),
        };
        if !is_mounted {
            self.attached.forget_mounts();
        }
    }
}

/// Fails if the mount that was just made is somewhere else than at its mount point. `fuse` is its connection.
///
/// A mount that another program has unmounted is no failure. That can happen before this process has registered the mount,
/// and the attachment then ends as it does with any unmount.
async fn check_place(record: &MountRecord, fuse: &OwnedFd) -> Result<(), MountError> {
    if record.standing.is_some() {
        return Ok(());
    }
    let watched = kernel::watch(fuse).map_err(system("watch /dev/fuse"))?;
    let gone = tokio::time::timeout(UNMOUNTING, kernel::gone(&watched)).await;
    gone.map_err(|_| replaced())
}

#[async_trait]
impl Attachment for DirectoryAttachment {
    fn attached(&self) -> &Attached {
        &self.attached
    }

    fn is_attached(&self) -> bool {
        self.directory.is_none()
    }

    fn is_served(&self) -> bool {
        matches!(self.state, DirectoryState::Served(_))
    }

    async fn enter(&mut self, stage: ImageStage) -> Result<(), MountError> {
        match stage {
            // EROFS can serve only an image that is ready.
            ImageStage::Preparing if self.options.via == Via::Erofs => Ok(()),
            ImageStage::Failing(error) if self.options.via == Via::Erofs => Err(MountError::Unusable(error)),
            ImageStage::Preparing => {
                self.served.set(fuse::Stage::Preparing);
                self.attach_fuse().await
            }
            ImageStage::Failing(error) => {
                self.served.set(fuse::Stage::Failing(error));
                self.attach_fuse().await?;
                self.start_session().await
            }
            ImageStage::Ready(content) => {
                if !self.try_erofs(&content).await? {
                    self.served.set(fuse::Stage::Ready(ImageFs::new(content)));
                    self.attach_fuse().await?;
                    self.start_session().await?;
                }
                self.attach_overlay().await
            }
        }
    }

    async fn ended(&mut self) {
        let over = async {
            match &mut self.state {
                DirectoryState::Planned => std::future::pending().await,
                // Another program unmounted it before a session started.
                DirectoryState::Waiting(waiting) => {
                    kernel::gone(&waiting.watched).await;
                    Ok(())
                }
                DirectoryState::Served(session) => session.ended().await,
            }
        };
        tokio::select! {
            () = &mut self.abandoned => {
                tracing::info!("the mount namespace has ended, nobody can reach the mount any more");
                return;
            }
            () = &mut self.unwanted => {
                tracing::info!("unmounted, and nobody waits for the reads under way");
                self.attached.forget_mounts();
                return;
            }
            result = over => {
                if let Err(error) = result {
                    tracing::error!(%error, "the FUSE session ended");
                    return;
                }
                tracing::info!("unmounted");
            }
        }
        self.forget_if_unmounted();
    }

    fn detach(&mut self, lazy: bool) -> Result<(), MountError> {
        self.forget_if_unmounted();
        self.attached.detach(lazy)?;
        if let Some(content) = self.erofs.as_ref().filter(|_| self.attached.unfinished().any()) {
            self.unwanted = Box::pin(unwanted(content.clone(), &self.attached));
        }
        Ok(())
    }

    fn take_down(mut self: Box<Self>) -> Result<(), MountError> {
        self.detach(true)?;
        // Changes are flushed before the directories for them count as free. Reads end with this process.
        let flushed = until_blocking(FLUSH_LOOK, FLUSH, || {
            let goes_on = self.attached.unfinished().any() && !self.has_waiting_reads();
            Ok::<_, MountError>((!goes_on).then_some(()))
        })?;
        if flushed.is_none() {
            tracing::warn!("the kernel still writes changes to the upper directory");
        }
        self.attached.unregister()?;
        self.attached.discard();
        Ok(())
    }
}

impl Drop for DirectoryAttachment {
    fn drop(&mut self) {
        // What is attached is taken down when it is dropped.
        self.forget_if_unmounted();
    }
}
