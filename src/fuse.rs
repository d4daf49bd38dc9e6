//! FUSE: connects [`ImageFs`] and the disk of an image to the kernel. Only this module knows fuser.
//!
//! It is fast because the kernel caches almost everything. Names, attributes, absent names, links and
//! pages of an immutable tree stay valid for ever. OPEN and OPENDIR are answered with ENOSYS once. After that the
//! kernel sends no OPEN, RELEASE or FLUSH at all, and keeps pages and directories cached.
//!
//! The thread that took a request answers hits itself. A read that has to wait becomes a task that answers later, so
//! waiting reads never delay others.
//!
//! The session starts when the tree is ready, or when the preparation of the image stalls. Until then requests wait
//! inside the kernel, where a fatal signal ends the waiting process at once. Once the session has taken a request,
//! the module `watch` ends its wait after a signal.

mod attr;
mod disk_files;
mod read_reply;
mod served;
mod watch;

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::sync::Arc;

use fuser::{
    AccessFlags, Config, Errno, FileHandle, FileType, Filesystem, Generation, INodeNo, InitFlags, KernelConfig,
    LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyOpen,
    ReplyStatfs, ReplyXattr, Request, Session, SessionACL,
};
use tokio::runtime::Handle;

pub use disk_files::{DISK_FILE, DiskFiles};
pub use served::{Served, Stage};

use self::disk_files::DiskAdapter;
use self::read_reply::{reply_at_once, reply_later};
use self::watch::Watch;
use crate::erofs::Nid;
use crate::fs::kernel::{NOT_NEEDED, VALID};
use crate::fs::{FsError, ImageFs, ToErrno as _};

/// Largest READ of the kernel: one page array (fs.fuse.max_pages_limit) is 1 MiB.
const MAX_READ: u32 = 1 << 20;
/// Readahead requests in flight. Each may wait for the network. Further requests wait inside the kernel, which has no
/// deadline for them. So the limit is as large as the number of readers that may wait at once.
const MAX_BACKGROUND: u16 = 512;
/// Threads that take requests. The kernel would wake a single thread on another CPU for each request, which costs
/// more than serving it. With several threads, a request mostly finds one that is still awake.
const THREADS: usize = 8;

/// Users that may use the mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Everybody, as modes and owners allow.
    Everybody,
    /// Only the user who mounted, as modes and owners allow.
    Owner,
    /// Only the user who mounted, who may read everything.
    OwnerWithoutCheck,
}

impl Access {
    /// The part of the access check that fuser does.
    fn session(self) -> SessionACL {
        match self {
            Self::Everybody => SessionACL::All,
            Self::Owner | Self::OwnerWithoutCheck => SessionACL::Owner,
        }
    }

    /// Flags for the access checks that the kernel can do besides modes and owners. `has_acls` says whether the tree
    /// has access control lists.
    ///
    /// Either flag makes the kernel check permissions, which it must not do for [`Access::OwnerWithoutCheck`]. The
    /// kernel looks up the list of each inode once, which costs a round trip. So lists are requested only if there
    /// are some.
    fn flags(self, has_acls: bool) -> InitFlags {
        let acl = if has_acls {
            InitFlags::FUSE_POSIX_ACL
        } else {
            InitFlags::empty()
        };
        match self {
            // A private mount lets only the owner's user id in, but an ID-mapped mount has other user ids.
            Self::Everybody => acl | InitFlags::FUSE_ALLOW_IDMAP,
            Self::Owner => acl,
            Self::OwnerWithoutCheck => InitFlags::empty(),
        }
    }
}

/// What a session answers requests from.
#[derive(Debug, Clone)]
pub enum Service {
    /// The directory tree of an image.
    Tree(Arc<Served>),
    /// The disk of an image.
    Disk(DiskFiles),
}

/// Serves requests from `fuse` (an open /dev/fuse that is mounted) until the file system is unmounted. Blocks.
/// `runtime` runs the reads that have to wait. `agreed` is called when the kernel knows what the file system can do.
/// Before that, the kernel refuses ID-mapped mounts of it.
pub fn serve(
    fuse: OwnedFd,
    access: Access,
    service: Service,
    runtime: Handle,
    agreed: impl FnOnce(),
) -> io::Result<()> {
    let watch: Arc<Watch> = Arc::default();
    let watching = runtime.spawn(watch.clone().run());
    let result = match service {
        Service::Tree(served) => run(
            Adapter {
                served,
                access,
                watch,
                runtime,
            },
            fuse,
            access,
            agreed,
        ),
        Service::Disk(files) => run(DiskAdapter { files, watch, runtime }, fuse, access, agreed),
    };
    watching.abort();
    result
}

/// Runs a session until the file system is unmounted.
fn run(adapter: impl Filesystem, fuse: OwnedFd, access: Access, agreed: impl FnOnce()) -> io::Result<()> {
    let mut config = Config::default();
    config.n_threads = Some(THREADS);
    config.acl = access.session();
    // This answers the kernel's INIT request.
    let session = Session::from_fd(adapter, fuse, config.acl, config)?;
    agreed();
    session.run()
}

/// Asks the kernel for capabilities, and for the largest reads and the most of them.
fn configure(config: &mut KernelConfig, wanted: InitFlags) {
    // Old kernels lack some of these capabilities. Without them an operation is slower, or the kernel refuses ID-mapped
    // mounts.
    let offered = wanted & config.capabilities();
    if let Err(refused) = config.add_capabilities(offered) {
        tracing::warn!(?refused, "the kernel offers a capability and refuses it");
    }
    // If the kernel does not take a value, the nearest one that it takes is as good.
    let _ = config.set_max_write(MAX_READ);
    let _ = config.set_max_background(MAX_BACKGROUND);
    let _ = config.set_congestion_threshold(MAX_BACKGROUND / 4 * 3);
}

#[derive(Debug)]
struct Adapter {
    served: Arc<Served>,
    access: Access,
    watch: Arc<Watch>,
    runtime: Handle,
}

/// Replies that can be an error; all of them can.
trait Refuse: Send + 'static {
    fn refuse(self, errno: Errno);
}

macro_rules! refuse {
    ($($reply:ty),*) => {
        $(impl Refuse for $reply {
            fn refuse(self, errno: Errno) {
                self.error(errno);
            }
        })*
    };
}

refuse!(
    ReplyAttr,
    ReplyData,
    ReplyDirectory,
    ReplyDirectoryPlus,
    ReplyEmpty,
    ReplyEntry,
    ReplyStatfs,
    ReplyXattr
);

impl Adapter {
    /// Answers a request from the image: at once if the image is ready, otherwise when it becomes ready.
    fn answer<R: Refuse>(&self, request: &Request, reply: R, answer: impl FnOnce(&ImageFs, R) + Send + 'static) {
        if let Some(fs) = self.served.ready() {
            return answer(fs, reply);
        }
        let (served, mut watched) = (self.served.clone(), self.watch.add(request.pid()));
        self.runtime.spawn(async move {
            let image = tokio::select! {
                biased;
                image = served.image() => image,
                () = watched.interrupted() => Err(Arc::new(FsError::Interrupted)),
            };
            match image {
                Ok(fs) => answer(&fs, reply),
                // The task that prepares the image has logged the reason.
                Err(error) => reply.refuse(errno(&error)),
            }
        });
    }
}

fn nid(fs: &ImageFs, ino: INodeNo) -> Nid {
    fs.inode(ino.0)
}

/// The errno of [`NOT_NEEDED`] for fuser.
fn not_needed() -> Errno {
    Errno::from_i32(NOT_NEEDED as i32)
}

fn lookup_attr(fs: &ImageFs, parent: INodeNo, name: &OsStr) -> Result<Option<fuser::FileAttr>, Errno> {
    let found = fs.lookup(nid(fs, parent), name.as_bytes());
    Ok(found.map_err(report)?.map(|a| attr::to_fuse(&a)))
}

fn attr_of(fs: &ImageFs, ino: INodeNo) -> Result<fuser::FileAttr, Errno> {
    let found = fs.attr(nid(fs, ino));
    Ok(attr::to_fuse(&found.map_err(report)?))
}

/// Logs an error that a program will see, and returns fuser's errno for it.
fn report(error: FsError) -> Errno {
    tracing::error!(%error, "answering a request with an error");
    errno(&error)
}

fn errno(error: &FsError) -> Errno {
    Errno::from_i32(error.errno() as i32)
}

/// Answers getxattr or listxattr. A program first asks for the size, with an empty buffer.
fn reply_sized(reply: ReplyXattr, size: u32, data: &[u8]) {
    if size == 0 {
        reply.size(data.len() as u32);
    } else if data.len() > size as usize {
        reply.error(Errno::ERANGE);
    } else {
        reply.data(data);
    }
}

impl Filesystem for Adapter {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let wanted = InitFlags::FUSE_ASYNC_READ
            | InitFlags::FUSE_PARALLEL_DIROPS
            | InitFlags::FUSE_DO_READDIRPLUS
            | InitFlags::FUSE_READDIRPLUS_AUTO
            | InitFlags::FUSE_CACHE_SYMLINKS
            | InitFlags::FUSE_NO_OPEN_SUPPORT
            | InitFlags::FUSE_NO_OPENDIR_SUPPORT;
        // An image that is not ready may have access control lists.
        let has_acls = self.served.ready().is_none_or(ImageFs::has_acls);
        let wanted = wanted | self.access.flags(has_acls);
        configure(config, wanted);
        Ok(())
    }

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let name = name.to_owned();
        self.answer(request, reply, move |fs, reply| match lookup_attr(fs, parent, &name) {
            Ok(Some(attr)) => reply.entry(&VALID, &attr, Generation(0)),
            Ok(None) => reply.entry(&VALID, &attr::absent(), Generation(0)),
            Err(errno) => reply.error(errno),
        });
    }

    fn getattr(&self, request: &Request, ino: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        self.answer(request, reply, move |fs, reply| match attr_of(fs, ino) {
            Ok(attr) => reply.attr(&VALID, &attr),
            Err(errno) => reply.error(errno),
        });
    }

    fn readlink(&self, request: &Request, ino: INodeNo, reply: ReplyData) {
        self.answer(request, reply, move |fs, reply| {
            match fs.read_link(nid(fs, ino)).map_err(report) {
                Ok(target) => reply.data(&target),
                Err(errno) => reply.error(errno),
            }
        });
    }

    fn open(&self, _request: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply.error(not_needed());
    }

    fn opendir(&self, _request: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply.error(not_needed());
    }

    fn flush(&self, _request: &Request, _ino: INodeNo, _handle: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
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
        let (watch, runtime, thread) = (self.watch.clone(), self.runtime.clone(), request.pid());
        self.answer(request, reply, move |fs, reply| {
            let nid = nid(fs, ino);
            let size = size.min(MAX_READ) as usize;
            let here = reply_at_once(size, reply, |buffer| fs.read_local(nid, offset, buffer));
            let Some(reply) = here else { return };
            let fs = fs.clone();
            runtime.spawn(async move {
                let read = async { fs.read(nid, offset, size).await.map_err(|error| errno(&error)) };
                reply_later(watch.add(thread), reply, read).await;
            });
        });
    }

    fn readdir(&self, request: &Request, ino: INodeNo, _handle: FileHandle, offset: u64, reply: ReplyDirectory) {
        self.answer(request, reply, move |fs, mut reply| {
            let listed = fs.read_dir(nid(fs, ino), offset, |entry| {
                !reply.add(
                    INodeNo(entry.ino.0),
                    entry.next,
                    attr::fuse_type(entry.file_type),
                    OsStr::from_bytes(entry.name),
                )
            });
            match listed.map_err(report) {
                Ok(()) => reply.ok(),
                Err(errno) => reply.error(errno),
            }
        });
    }

    fn readdirplus(
        &self,
        request: &Request,
        ino: INodeNo,
        _handle: FileHandle,
        offset: u64,
        reply: ReplyDirectoryPlus,
    ) {
        self.answer(request, reply, move |fs, mut reply| {
            let mut failed = None;
            let listed = fs.read_dir(nid(fs, ino), offset, |entry| match fs.attr(entry.ino) {
                Ok(found) => {
                    let attr = attr::to_fuse(&found);
                    let name = OsStr::from_bytes(entry.name);
                    !reply.add(attr.ino, entry.next, name, &VALID, &attr, Generation(0))
                }
                Err(error) => {
                    failed = Some(error);
                    false
                }
            });
            match listed.and(failed.map_or(Ok(()), Err)).map_err(report) {
                Ok(()) => reply.ok(),
                Err(errno) => reply.error(errno),
            }
        });
    }

    fn statfs(&self, request: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        self.answer(request, reply, |fs, reply| {
            let stat = fs.stat();
            reply.statfs(stat.blocks, 0, 0, stat.inodes, 0, attr::BLOCK, 255, attr::BLOCK);
        });
    }

    fn getxattr(&self, request: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let name = name.to_owned();
        self.answer(request, reply, move |fs, reply| {
            if !fs.has_xattrs() {
                // The kernel stops asking, which saves a round trip on every permission check and copy-up.
                return reply.error(not_needed());
            }
            match fs.xattr(nid(fs, ino), name.as_bytes()).map_err(report) {
                Ok(Some(value)) => reply_sized(reply, size, &value),
                Ok(None) => reply.error(Errno::NO_XATTR),
                Err(errno) => reply.error(errno),
            }
        });
    }

    fn listxattr(&self, request: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        // Unlike getxattr, listxattr is always served: it is rare, and programs treat "not supported" as an error
        // here.
        self.answer(request, reply, move |fs, reply| {
            match fs.xattr_names(nid(fs, ino)).map_err(report) {
                Ok(names) => {
                    let list: Vec<u8> = names.into_iter().flat_map(|n| [n, vec![0]].concat()).collect();
                    reply_sized(reply, size, &list);
                }
                Err(errno) => reply.error(errno),
            }
        });
    }

    fn access(&self, request: &Request, ino: INodeNo, mask: AccessFlags, reply: ReplyEmpty) {
        // With default_permissions, the kernel does not send ACCESS but decides by mode and owner. A mount that
        // others may use has this option. In a private mount the owner may read everything, but may execute a file
        // only if it has an execute bit.
        self.answer(request, reply, move |fs, reply| match attr_of(fs, ino) {
            Err(errno) => reply.error(errno),
            Ok(_) if mask.contains(AccessFlags::W_OK) => reply.error(Errno::EROFS),
            Ok(attr)
                if mask.contains(AccessFlags::X_OK) && attr.kind == FileType::RegularFile && attr.perm & 0o111 == 0 =>
            {
                reply.error(Errno::EACCES);
            }
            Ok(_) => reply.ok(),
        });
    }
}
