//! An image as a disk, with one or more doors: a file, NBD, vhost-user-blk.
//!
//! The doors open when the image is ready, because only then the size of the disk is known.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;

use super::listening::Listening;
use super::session::FuseSession;
use super::{Attachment, EndReason, ImageStage, abandoned, replaced};
use crate::content::Content;
use crate::disk::Disk;
use crate::fuse::{DiskFiles, Service};
use crate::mount::attached::Attached;
use crate::mount::doors::DiskDoors;
use crate::mount::error::MountError;
use crate::mount::kernel;
use crate::mount::mountpoint::MountPoint;
use crate::mount::options::FuseOptions;
use crate::mount::registration::AttachPhase;

/// A disk as other programs reach it.
pub(in crate::mount) struct DiskAttachment {
    /// The image as the user wrote it, for the mount table.
    source: String,
    doors: DiskDoors,
    /// The directory for the file, until it is mounted on.
    directory: Option<MountPoint>,
    options: FuseOptions,
    /// The image's config, to show beside the disk.
    config: Arc<[u8]>,
    /// The process that counts as a user of the disk, if there is one.
    parent: Option<u32>,
    file: Option<FuseSession>,
    sockets: Vec<Listening>,
    attached: Attached,
    abandoned: EndReason,
}

impl DiskAttachment {
    /// Plans the doors of a disk. `directory` is that of the file, if there is to be one.
    pub(in crate::mount) fn new(
        source: String,
        doors: DiskDoors,
        directory: Option<MountPoint>,
        config: Arc<[u8]>,
        parent: Option<u32>,
        attached: Attached,
    ) -> Self {
        Self {
            source,
            doors,
            directory,
            options: FuseOptions::defaults(nix::unistd::geteuid().is_root()),
            config,
            parent,
            file: None,
            sockets: Vec::new(),
            abandoned: abandoned(&attached, parent),
            attached,
        }
    }

    /// Opens all doors.
    async fn open(&mut self, content: Arc<Content>) -> Result<(), MountError> {
        let disk = Disk::new(content);
        if let Some(directory) = self.directory.take() {
            let fuse = kernel::mount(&self.source, &directory.handle(), directory.path(), &self.options)?;
            self.attached.record.standing = self.attached.add(&directory.place()?)?;
            if self.attached.record.standing.is_none() {
                return Err(replaced());
            }
            let files = DiskFiles {
                disk: disk.clone(),
                config: self.config.clone(),
                uncached: false,
            };
            let session = FuseSession::start(fuse, self.options.access(), Service::Disk(files)).await?;
            self.file = Some(session);
        }
        let failed = |address: String| move |source| MountError::Listen { address, source };
        if let Some(address) = &self.doors.nbd {
            let _turn = self.turn(&address.place())?;
            let socket = Listening::nbd(address, disk.clone());
            self.sockets.push(socket.map_err(failed(address.to_string()))?);
        }
        if let Some(path) = &self.doors.vhost_user_blk {
            let _turn = self.turn(path)?;
            let socket = Listening::vhost_user_blk(path, disk);
            self.sockets.push(socket.map_err(failed(path.display().to_string()))?);
        }
        self.attached.attach()?;
        self.abandoned = abandoned(&self.attached, self.parent);
        Ok(())
    }

    /// Takes the turn at a socket. Two processes that replace the same dead socket at once would take it from each other.
    fn turn(&self, place: &Path) -> Result<Option<File>, MountError> {
        Ok(self.attached.entry.beside(place).turn_at_last()?)
    }

    /// Number of clients that are connected to a socket.
    fn clients(&self) -> usize {
        self.sockets.iter().map(|socket| socket.connections.count()).sum()
    }

    /// Forgets the mount of the file if another program has unmounted it.
    fn forget_if_unmounted(&mut self) {
        if self.file.as_ref().is_some_and(|file| !file.is_mounted()) {
            self.attached.forget_mounts();
        }
    }
}

#[async_trait]
impl Attachment for DiskAttachment {
    fn attached(&self) -> &Attached {
        &self.attached
    }

    fn is_attached(&self) -> bool {
        self.attached.record.phase != AttachPhase::Pending
    }

    fn is_served(&self) -> bool {
        self.is_attached()
    }

    async fn enter(&mut self, stage: ImageStage) -> Result<(), MountError> {
        match stage {
            // Nobody can ask for anything yet.
            ImageStage::Preparing => Ok(()),
            ImageStage::Failing(error) => Err(MountError::Unusable(error)),
            ImageStage::Ready(content) => self.open(content).await,
        }
    }

    async fn ended(&mut self) {
        let Self {
            abandoned,
            file,
            sockets,
            attached,
            ..
        } = self;
        if let Some(session) = file {
            tokio::select! {
                // Processes outside the mount namespace can reach sockets.
                () = abandoned, if sockets.is_empty() => {
                    tracing::info!("the mount namespace has ended");
                    return;
                }
                ended = session.ended() => {
                    if let Err(error) = ended {
                        tracing::error!(%error, "the FUSE session ended");
                    }
                    if !session.is_mounted() {
                        attached.forget_mounts();
                    }
                    *file = None;
                }
            }
        }
        match attached.record.phase {
            // The doors are not open yet.
            AttachPhase::Pending => std::future::pending().await,
            // Only this process closes a socket.
            AttachPhase::Attached if !sockets.is_empty() => std::future::pending().await,
            AttachPhase::Attached | AttachPhase::Detached => {}
        }
        self.unused().await;
        tracing::info!("the disk has no users any more");
    }

    async fn unused(&mut self) {
        for socket in &self.sockets {
            socket.connections.none().await;
        }
    }

    fn detach(&mut self, lazy: bool) -> Result<(), MountError> {
        if let (clients @ 1.., false) = (self.clients(), lazy) {
            return Err(MountError::Connected { clients });
        }
        self.forget_if_unmounted();
        self.attached.detach(lazy)?;
        self.sockets.iter_mut().for_each(Listening::close);
        // Afterwards another process may use the places, and the registration moves.
        if self.attached.record.phase == AttachPhase::Attached {
            self.attached.record.phase = AttachPhase::Detached;
            self.attached.write()?;
        }
        Ok(())
    }

    fn take_down(mut self: Box<Self>) -> Result<(), MountError> {
        self.detach(true)?;
        self.sockets.clear();
        self.attached.unregister()
    }
}

impl Drop for DiskAttachment {
    fn drop(&mut self) {
        self.forget_if_unmounted();
    }
}
