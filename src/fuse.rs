//! FUSE front end: carries [`ImageFs`] to the kernel. The only module that knows fuser.
//!
//! What makes it fast is what the kernel is told never to ask again: names, attributes, absent names, links and pages of an
//! immutable tree stay valid for ever; OPEN and OPENDIR are answered ENOSYS once, after which the kernel sends no OPEN,
//! RELEASE, FLUSH at all and keeps pages and directories cached. Hits are answered on the thread that took the request; a
//! read that has to wait becomes a task that answers later, so waiting reads never hold up others.
//!
//! The session starts when the tree is ready, or when preparing it does not come on. Until then requests wait inside the
//! kernel, where a fatal signal ends the waiting process at once. Once a request was handed over, the module `watch` looks after that.

mod attr;
mod served;
mod watch;

use std::cell::RefCell;
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

pub use served::{Served, Stage};

use self::watch::Watch;
use crate::erofs::Nid;
use crate::fs::kernel::{NOT_NEEDED, VALID};
use crate::fs::{FsError, ImageFs, ToErrno as _};

/// A READ of the kernel is at most this long; one page array (fs.fuse.max_pages_limit) is 1 MiB.
const MAX_READ: u32 = 1 << 20;
/// Readahead requests in flight. Each may wait for the network, and what is beyond waits inside the kernel without a deadline:
/// so as many as there can be readers who wait.
const MAX_BACKGROUND: u16 = 512;
/// Threads taking requests. One is woken on the other CPU for each request, which costs more than serving it; several
/// find one still awake.
const THREADS: usize = 8;

/// Who may use the mount.
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
    /// The part that fuser decides.
    fn session(self) -> SessionACL {
        match self {
            Self::Everybody => SessionACL::All,
            Self::Owner | Self::OwnerWithoutCheck => SessionACL::Owner,
        }
    }

    /// What the kernel can decide of it besides modes and owners, for a tree that has access control lists or not.
    ///
    /// Either flag makes the kernel check permissions, which a mount without check must not have. Lists are looked up for each
    /// inode once, which costs a round trip, so they are asked for only where there are some.
    fn flags(self, has_acls: bool) -> InitFlags {
        let acl = if has_acls {
            InitFlags::FUSE_POSIX_ACL
        } else {
            InitFlags::empty()
        };
        match self {
            // Nobody but the owner's user id passes in a private mount, and an ID-mapped one has others.
            Self::Everybody => acl | InitFlags::FUSE_ALLOW_IDMAP,
            Self::Owner => acl,
            Self::OwnerWithoutCheck => InitFlags::empty(),
        }
    }
}

/// Serves requests from `fuse` (an open /dev/fuse that is mounted) until it is unmounted. Blocks.
/// `runtime` runs the reads that have to wait.
pub fn serve(fuse: OwnedFd, access: Access, served: Arc<Served>, runtime: Handle) -> io::Result<()> {
    let mut config = Config::default();
    config.n_threads = Some(THREADS);
    config.acl = access.session();
    let watch: Arc<Watch> = Arc::default();
    let watching = runtime.spawn(watch.clone().run());
    let adapter = Adapter {
        served,
        access,
        watch,
        runtime,
    };
    let result = Session::from_fd(adapter, fuse, config.acl, config).and_then(Session::run);
    watching.abort();
    result
}

#[derive(Debug)]
struct Adapter {
    served: Arc<Served>,
    access: Access,
    watch: Arc<Watch>,
    runtime: Handle,
}

/// A reply that can be an error: all of them.
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
    /// Answers from the image: at once if it is here, else when it is.
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
                // Who prepares the image has said why.
                Err(error) => reply.refuse(errno(&error)),
            }
        });
    }
}

fn nid(fs: &ImageFs, ino: INodeNo) -> Nid {
    fs.inode(ino.0)
}

/// See [`NOT_NEEDED`].
fn not_needed() -> Errno {
    Errno::from_i32(NOT_NEEDED as i32)
}

fn lookup_attr(fs: &ImageFs, parent: INodeNo, name: &OsStr) -> Result<Option<fuser::FileAttr>, Errno> {
    let found = fs.lookup(nid(fs, parent), name.as_bytes());
    Ok(found.map_err(report)?.map(|a| attr::to_fuse(fs, &a)))
}

fn attr_of(fs: &ImageFs, ino: INodeNo) -> Result<fuser::FileAttr, Errno> {
    let found = fs.attr(nid(fs, ino));
    Ok(attr::to_fuse(fs, &found.map_err(report)?))
}

/// Logs an error where it leaves the program, and turns it into fuser's errno.
fn report(error: FsError) -> Errno {
    tracing::error!(%error, "answering a request with an error");
    errno(&error)
}

fn errno(error: &FsError) -> Errno {
    Errno::from_i32(error.errno() as i32)
}

/// Answers getxattr or listxattr. Both ask for the size first, with an empty buffer.
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
        // What is not known yet may have some.
        let has_acls = self.served.ready().is_none_or(ImageFs::has_acls);
        let wanted = wanted | self.access.flags(has_acls);
        // Old kernels lack some: then something is slower, or an ID-mapped mount is refused.
        let offered = wanted & config.capabilities();
        if let Err(refused) = config.add_capabilities(offered) {
            tracing::warn!(?refused, "the kernel offers a capability and refuses it");
        }
        // The nearest value the kernel takes is as good.
        let _ = config.set_max_write(MAX_READ);
        let _ = config.set_max_background(MAX_BACKGROUND);
        let _ = config.set_congestion_threshold(MAX_BACKGROUND / 4 * 3);
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
            let Some(reply) = read_at_once(fs, nid, offset, size, reply) else {
                return;
            };
            let fs = fs.clone();
            runtime.spawn(async move {
                let mut watched = watch.add(thread);
                let read = tokio::select! {
                    biased;
                    read = fs.read(nid, offset, size) => read,
                    () = watched.interrupted() => Err(FsError::Interrupted),
                };
                match read {
                    Ok(bytes) => reply.data(&bytes),
                    Err(error) => reply.error(errno(&error)),
                }
            });
        });
    }

    fn readdir(&self, request: &Request, ino: INodeNo, _handle: FileHandle, offset: u64, reply: ReplyDirectory) {
        self.answer(request, reply, move |fs, mut reply| {
            let listed = fs.read_dir(nid(fs, ino), offset, |entry| {
                let ino = attr::fuse_ino(fs, entry.ino);
                !reply.add(
                    ino,
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
                    let attr = attr::to_fuse(fs, &found);
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
        // Always served, unlike getxattr: it is rare, and programs take "not supported" for an error here.
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
        // With default_permissions, which a mount that others may use has, the kernel does not ask: it decides by mode and
        // owner. In a private mount its owner may read all, but a program is one only if somebody may execute it.
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

/// Answers a read if that needs no waiting; else the reply comes back.
fn read_at_once(fs: &ImageFs, nid: Nid, offset: u64, size: usize, reply: ReplyData) -> Option<ReplyData> {
    READ_BUFFER.with_borrow_mut(|buffer| {
        // It only grows: clearing it again for every other read would cost as much as the copy.
        if buffer.len() < size {
            buffer.resize(size, 0);
        }
        match fs.read_local(nid, offset, &mut buffer[..size]) {
            Ok(Some(length)) => reply.data(&buffer[..length]),
            Ok(None) => return Some(reply),
            Err(error) => reply.error(report(error)),
        }
        None
    })
}

thread_local! {
    /// One buffer per dispatch thread: an allocation of a megabyte for each read would cost more than the copy.
    static READ_BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}
