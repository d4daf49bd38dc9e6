//! The disk of an image as a file: a directory with the disk and the image's config.
//!
//! ```text
//! rootfs.erofs   the disk
//! config.json    the config of the image, as it is in the registry
//! ```
//! The files are for virtual machine monitors and other programs, which may map them into memory. The kernel caches
//! their pages for ever.
//!
//! The process mounts a second such directory, in the run directory, for the kernel's own EROFS. EROFS caches the pages
//! of the image's files. So that they are not cached twice, reads of that disk file bypass the page cache.

use std::ffi::OsStr;
use std::io;
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags, KernelConfig,
    LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyEntry, ReplyOpen, ReplyStatfs, Request,
};
use tokio::runtime::Handle;

use super::attr::BLOCK;
use super::read_reply::{reply_at_once, reply_later};
use super::watch::Watch;
use super::{configure, not_needed};
use crate::disk::Disk;
use crate::fs::kernel::{ROOT, VALID};

/// Name of the disk in its directory.
pub const DISK_FILE: &str = "rootfs.erofs";
/// Name of the image's config beside the disk.
const CONFIG_FILE: &str = "config.json";

const DISK: INodeNo = INodeNo(2);
const CONFIG: INodeNo = INodeNo(3);

/// A directory with the disk of an image.
#[derive(Debug, Clone)]
pub struct DiskFiles {
    /// The disk.
    pub disk: Disk,
    /// The image's config.
    pub config: Arc<[u8]>,
    /// Whether the kernel keeps no pages of the disk.
    pub uncached: bool,
}

/// Answers requests for the files.
#[derive(Debug)]
pub(super) struct DiskAdapter {
    pub(super) files: DiskFiles,
    pub(super) watch: Arc<Watch>,
    pub(super) runtime: Handle,
}

impl DiskAdapter {
    fn attr(&self, ino: INodeNo) -> Result<FileAttr, Errno> {
        let (kind, size) = match ino {
            INodeNo(ROOT) => (FileType::Directory, 0),
            DISK => (FileType::RegularFile, self.files.disk.size()),
            CONFIG => (FileType::RegularFile, self.files.config.len() as u64),
            _ => return Err(Errno::ENOENT),
        };
        let is_directory = kind == FileType::Directory;
        Ok(FileAttr {
            ino,
            size,
            blocks: size.div_ceil(512),
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm: if is_directory { 0o555 } else { 0o444 },
            nlink: if is_directory { 2 } else { 1 },
            uid: nix::unistd::geteuid().as_raw(),
            gid: nix::unistd::getegid().as_raw(),
            rdev: 0,
            blksize: BLOCK,
            flags: 0,
        })
    }

    /// Answers a read of the disk: at once if its bytes are local, otherwise from a task.
    fn read_disk(&self, request: &Request, offset: u64, size: usize, reply: ReplyData) {
        let disk = &self.files.disk;
        let here = reply_at_once(size, reply, |buffer| Ok(disk.read_local(offset, buffer)));
        let Some(reply) = here else { return };
        let (disk, watch, thread) = (disk.clone(), self.watch.clone(), request.pid());
        // EROFS turns every error into EIO.
        let is_erofs = self.files.uncached;
        self.runtime.spawn(async move {
            let watched = match is_erofs {
                true => watch.add_until_end(thread),
                false => watch.add(thread),
            };
            // A disk has no other errors. The content has logged the cause.
            let read = async { disk.read(offset, size).await.map_err(|_| Errno::EIO) };
            reply_later(watched, reply, read).await;
        });
    }
}

impl Filesystem for DiskAdapter {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let mut wanted = InitFlags::FUSE_ASYNC_READ | InitFlags::FUSE_ASYNC_DIO | InitFlags::FUSE_NO_OPENDIR_SUPPORT;
        // The answer to OPEN says that there are no cached pages.
        wanted.set(InitFlags::FUSE_NO_OPEN_SUPPORT, !self.files.uncached);
        configure(config, wanted);
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let ino = match name.to_str() {
            Some(DISK_FILE) if parent.0 == ROOT => DISK,
            Some(CONFIG_FILE) if parent.0 == ROOT => CONFIG,
            _ => return reply.error(Errno::ENOENT),
        };
        match self.attr(ino) {
            Ok(attr) => reply.entry(&VALID, &attr, Generation(0)),
            Err(errno) => reply.error(errno),
        }
    }

    fn getattr(&self, _request: &Request, ino: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        match self.attr(ino) {
            Ok(attr) => reply.attr(&VALID, &attr),
            Err(errno) => reply.error(errno),
        }
    }

    fn open(&self, _request: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        match self.files.uncached {
            true => reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO),
            false => reply.error(not_needed()),
        }
    }

    fn opendir(&self, _request: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply.error(not_needed());
    }

    fn read(
        &self,
        request: &Request,
        ino: INodeNo,
        _handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let size = size.min(super::MAX_READ) as usize;
        match ino {
            DISK => self.read_disk(request, offset, size, reply),
            CONFIG => {
                let config = &self.files.config;
                let start = usize::try_from(offset).map_or(config.len(), |offset| offset.min(config.len()));
                reply.data(&config[start..start.saturating_add(size).min(config.len())]);
            }
            _ => reply.error(Errno::EISDIR),
        }
    }

    fn readdir(&self, _request: &Request, _ino: INodeNo, _handle: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let entries = [
            (INodeNo(ROOT), FileType::Directory, "."),
            (INodeNo(ROOT), FileType::Directory, ".."),
            (DISK, FileType::RegularFile, DISK_FILE),
            (CONFIG, FileType::RegularFile, CONFIG_FILE),
        ];
        for ((ino, kind, name), next) in entries.into_iter().zip(1..).skip(offset as usize) {
            if reply.add(ino, next, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _request: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        let blocks = self.files.disk.size() / u64::from(BLOCK);
        reply.statfs(blocks, 0, 0, 3, 0, BLOCK, 255, BLOCK);
    }
}
