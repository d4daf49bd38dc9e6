//! The file system without a kernel: names, attributes and bytes of an image.
//!
//! Metadata comes straight from the mapped tree and never waits. A read either is answered at once or turns into a future
//! that fetches. Nothing here knows FUSE; errno is chosen in [`error`] and nowhere else.
//!
//! Inode numbers are the EROFS nids of the tree. An inode has one number on every host and after every remount, and
//! no lookup count is needed.

mod asked;
pub mod error;
mod latency;

use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

pub use error::{Errno, FsError, ToErrno};
pub use latency::{ReadStatus, Reads};

use self::asked::Asked;

use crate::erofs::{FileType, Inode, Mapping, Nid};
use crate::image::Image;
use crate::toc::DEVICE_BLOCK;

/// What stat(2) shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attr {
    /// Inode number.
    pub ino: Nid,
    /// The inode as stored.
    pub inode: Inode,
}

/// A directory entry.
#[derive(Debug, Clone, Copy)]
pub struct DirEntry<'a> {
    /// Inode number.
    pub ino: Nid,
    /// Where to continue after this entry.
    pub next: u64,
    /// Type.
    pub file_type: FileType,
    /// Name; `.` and `..` are entries like others.
    pub name: &'a [u8],
}

/// Size of the file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FsStat {
    /// Blocks of [`crate::toc::DEVICE_BLOCK`] bytes, metadata and data.
    pub blocks: u64,
    /// Inodes.
    pub inodes: u64,
}

/// An image as a file system.
#[derive(Debug, Clone)]
pub struct ImageFs {
    image: Arc<Image>,
    timeout: Option<Duration>,
    asked: Arc<Asked>,
    reads: Arc<Reads>,
}

impl ImageFs {
    /// Serves `image`. A read that waits longer than `timeout` fails (never, if there is none), and so do others of the same
    /// bytes right after it: the kernel repeats what failed.
    pub fn new(image: Arc<Image>, timeout: Option<Duration>) -> Self {
        Self {
            image,
            timeout,
            asked: Arc::default(),
            reads: Arc::default(),
        }
    }

    /// The root directory.
    pub fn root(&self) -> Nid {
        self.image.tree().root()
    }

    /// The image behind it.
    pub fn image(&self) -> &Arc<Image> {
        &self.image
    }

    /// How long reads take.
    pub fn reads(&self) -> &Arc<Reads> {
        &self.reads
    }

    /// Attributes of an inode.
    pub fn attr(&self, ino: Nid) -> Result<Attr, FsError> {
        let inode = self.image.tree().inode(ino)?;
        Ok(Attr { ino, inode })
    }

    /// The entry `name` of a directory, if there is one.
    pub fn lookup(&self, parent: Nid, name: &[u8]) -> Result<Option<Attr>, FsError> {
        match self.image.tree().lookup(parent, name)? {
            Some((ino, _)) => self.attr(ino).map(Some),
            None => Ok(None),
        }
    }

    /// Entries of a directory from `position` on (0, or a [`DirEntry::next`]), until `visit` says false.
    pub fn read_dir(
        &self,
        ino: Nid,
        position: u64,
        mut visit: impl FnMut(DirEntry<'_>) -> bool,
    ) -> Result<(), FsError> {
        for entry in self.image.tree().entries(ino, position)? {
            let entry = entry?;
            let more = visit(DirEntry {
                ino: entry.nid,
                next: entry.next,
                file_type: entry.file_type,
                name: entry.name,
            });
            if !more {
                break;
            }
        }
        Ok(())
    }

    /// Target of a symbolic link.
    pub fn read_link(&self, ino: Nid) -> Result<Vec<u8>, FsError> {
        Ok(self.image.tree().symlink(ino)?.to_vec())
    }

    /// Value of an extended attribute.
    pub fn xattr(&self, ino: Nid, name: &[u8]) -> Result<Option<Vec<u8>>, FsError> {
        Ok(self.image.tree().xattr(ino, name)?.map(<[u8]>::to_vec))
    }

    /// Names of the extended attributes.
    pub fn xattr_names(&self, ino: Nid) -> Result<Vec<Vec<u8>>, FsError> {
        let mut names = Vec::new();
        for xattr in self.image.tree().xattrs(ino)? {
            names.push(xattr?.name());
        }
        Ok(names)
    }

    /// Whether any inode has extended attributes; if not, nobody needs to ask.
    pub fn has_xattrs(&self) -> bool {
        self.image.tree().has_any_xattr()
    }

    /// Whether any inode has an access control list; if not, modes and owners decide everything.
    pub fn has_acls(&self) -> bool {
        self.image.tree().has_any_acl()
    }

    /// Size of the file system.
    pub fn stat(&self) -> FsStat {
        let tree = self.image.tree();
        FsStat {
            blocks: tree.disk_size() / DEVICE_BLOCK,
            inodes: tree.inodes(),
        }
    }

    /// Fills `buf` from `offset` of a regular file if that needs no waiting. Returns the bytes read (short at the end of the
    /// file), or nothing if it has to wait.
    pub fn read_local(&self, ino: Nid, offset: u64, buf: &mut [u8]) -> Result<Option<usize>, FsError> {
        let start = Instant::now();
        let length = self.readable(ino, offset, buf.len())?;
        let mut done = 0;
        while done < length {
            let Some(mapping) = self.image.tree().map(ino, offset + done as u64)? else {
                break;
            };
            let part = (length - done).min(clamp(mapping.bytes()));
            let target = &mut buf[done..done + part];
            match mapping {
                Mapping::Hole { .. } => target.fill(0),
                Mapping::Device { layer, offset, .. } => {
                    if !self.image.layer(layer).read_local(offset, target) {
                        return Ok(None);
                    }
                }
            }
            done += part;
        }
        self.reads.at_once(start);
        self.image.health().read_worked(ino.0);
        if offset == 0 {
            self.image.started(ino);
        }
        Ok(Some(length))
    }

    /// Like [`ImageFs::read_local`], but waits for what is missing, at most for the timeout.
    pub async fn read(&self, ino: Nid, offset: u64, size: usize) -> Result<Vec<u8>, FsError> {
        let Some(timeout) = self.timeout else {
            return self.read_until(None, ino, offset, size).await;
        };
        let bytes = offset..offset.saturating_add(size as u64);
        let wait = self.asked.wait(ino, bytes, timeout, Instant::now());
        if wait.is_over() {
            return Err(FsError::Timeout { timeout });
        }
        let result = self.read_until(Some(wait.deadline), ino, offset, size).await;
        if result.is_err() {
            self.asked.failed(wait, Instant::now());
        }
        result
    }

    async fn read_until(
        &self,
        deadline: Option<Instant>,
        ino: Nid,
        offset: u64,
        size: usize,
    ) -> Result<Vec<u8>, FsError> {
        let waiting = self.reads.wait();
        let mut reading = std::pin::pin!(self.read_waiting(ino, offset, size));
        // What the reader waits for is asked for first, then what may be loaded with it.
        if let Poll::Ready(result) = futures::poll!(&mut reading) {
            return result;
        }
        if offset == 0 {
            self.image.started(ino);
        }
        let late = FsError::Timeout {
            timeout: self.timeout.unwrap_or_default(),
        };
        let result = match deadline {
            None => reading.await,
            Some(deadline) => tokio::time::timeout_at(deadline.into(), reading)
                .await
                .unwrap_or(Err(late)),
        };
        tracing::debug!(
            ino = ino.0,
            offset,
            size,
            took_ms = waiting.elapsed().as_secs_f64() * 1e3,
            "read waited"
        );
        match &result {
            Ok(_) => self.image.health().read_worked(ino.0),
            Err(error) => self.image.health().read_failed(ino.0, error.is_of_content(), error),
        }
        result
    }

    async fn read_waiting(&self, ino: Nid, offset: u64, size: usize) -> Result<Vec<u8>, FsError> {
        let length = self.readable(ino, offset, size)?;
        let mut buf = vec![0; length];
        let mut done = 0;
        while done < length {
            let Some(mapping) = self.image.tree().map(ino, offset + done as u64)? else {
                break;
            };
            let part = (length - done).min(clamp(mapping.bytes()));
            if let Mapping::Device { layer, offset, .. } = mapping {
                self.image
                    .layer(layer)
                    .read(offset, &mut buf[done..done + part])
                    .await?;
            }
            done += part;
        }
        Ok(buf)
    }

    /// How many of `size` bytes at `offset` lie within the file.
    fn readable(&self, ino: Nid, offset: u64, size: usize) -> Result<usize, FsError> {
        let inode = self.image.tree().inode(ino)?;
        match inode.file_type {
            FileType::Regular => Ok(size.min(clamp(inode.size.saturating_sub(offset)))),
            FileType::Directory => Err(FsError::IsDirectory),
            _ => Err(FsError::NotAFile),
        }
    }
}

/// Modification time as the standard library has it. Times before the epoch count down to the second and then up by the
/// nanoseconds.
pub fn mtime(inode: &Inode) -> SystemTime {
    let nanoseconds = Duration::from_nanos(inode.mtime_nsec.into());
    let seconds = Duration::from_secs(inode.mtime.unsigned_abs());
    let whole = match inode.mtime {
        0.. => UNIX_EPOCH.checked_add(seconds),
        _ => UNIX_EPOCH.checked_sub(seconds),
    };
    whole.and_then(|t| t.checked_add(nanoseconds)).unwrap_or(UNIX_EPOCH)
}

fn clamp(len: u64) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}
