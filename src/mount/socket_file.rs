//! The files of listening Unix sockets. A file stays when its process is killed, and then it is dead.

use std::fs;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};

use crate::os::gone;

/// The file of a listening Unix socket. Dropping it removes the file, unless another socket has the name by then.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    id: FileId,
}

/// Identity of a file. The inode number alone is not enough: a file system may give it to the next file. The time of
/// modification tells the two apart: nothing modifies a socket after it was made.
type FileId = (u64, u64, i64, i64);

fn id(found: &fs::Metadata) -> FileId {
    (found.dev(), found.ino(), found.mtime(), found.mtime_nsec())
}

impl SocketFile {
    /// Listens at `path`. Replaces a dead socket. Fails if a process listens there, or if another file is there.
    pub fn bind(path: &Path) -> io::Result<(UnixListener, Self)> {
        match remove_dead(path)? {
            SocketPlace::Free => {}
            SocketPlace::Live => {
                return Err(io::Error::new(
                    io::ErrorKind::AddrInUse,
                    "another process listens there",
                ));
            }
            SocketPlace::OtherFile => {
                return Err(io::Error::new(
                    io::ErrorKind::AlreadyExists,
                    "there is a file that is not a socket",
                ));
            }
        }
        let listener = UnixListener::bind(path)?;
        let made = fs::symlink_metadata(path)?;
        let file = Self {
            path: path.to_owned(),
            id: id(&made),
        };
        Ok((listener, file))
    }
}

impl SocketFile {
    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let own = fs::symlink_metadata(&self.path).is_ok_and(|found| id(&found) == self.id);
        if own && let Err(error) = gone(fs::remove_file(&self.path)) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove a socket");
        }
    }
}

/// What is at a path, once a dead socket is removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SocketPlace {
    /// Nothing.
    Free,
    /// A socket at which a process listens.
    Live,
    /// A file that is not a socket.
    OtherFile,
}

/// Removes the Unix socket at `path` if no process listens there any more. Returns what is there now.
pub(super) fn remove_dead(path: &Path) -> io::Result<SocketPlace> {
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => return Ok(SocketPlace::OtherFile),
        Ok(_) => {}
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(SocketPlace::Free);
        }
        Err(error) => return Err(error),
    }
    // Without this flag, a listener that accepts nobody would hold this thread.
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let client = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    match connect(client.as_raw_fd(), &UnixAddr::new(path)?) {
        Ok(()) | Err(Errno::EAGAIN) => Ok(SocketPlace::Live),
        Err(Errno::ECONNREFUSED) => {
            gone(fs::remove_file(path))?;
            Ok(SocketPlace::Free)
        }
        Err(Errno::ENOENT) => Ok(SocketPlace::Free),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_socket_is_replaced_and_a_live_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        let (listener, file) = SocketFile::bind(&path).unwrap();
        let error = SocketFile::bind(&path).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        drop(listener);
        let (_other, other) = SocketFile::bind(&path).unwrap();
        drop(file);
        assert!(path.exists(), "it has the file of another socket");
        drop(other);
        assert!(!path.exists());
        fs::write(&path, "").unwrap();
        assert!(SocketFile::bind(&path).is_err());
        assert!(path.exists());
    }
}
