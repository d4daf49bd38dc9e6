//! Replies to reads. If all bytes of a read are local, the thread that took the request replies at once. Otherwise a
//! task replies later.

use std::cell::RefCell;

use fuser::{Errno, ReplyData};

use super::watch::Watched;
use super::{MAX_READ, errno, report};
use crate::fs::FsError;

thread_local! {
    /// One buffer for each thread that takes requests. Allocating a megabyte for each read would cost more than the copy.
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; MAX_READ as usize]);
}

/// Replies to a read of `size` bytes, at most [`MAX_READ`], if that needs no wait. Otherwise returns the reply to the
/// caller. `read` fills a buffer of that size and returns the number of bytes. It returns `None` if it would have to
/// wait.
pub(super) fn reply_at_once(
    size: usize,
    reply: ReplyData,
    read: impl FnOnce(&mut [u8]) -> Result<Option<usize>, FsError>,
) -> Option<ReplyData> {
    BUFFER.with_borrow_mut(|buffer| {
        match read(&mut buffer[..size]) {
            Ok(Some(length)) => reply.data(&buffer[..length]),
            Ok(None) => return Some(reply),
            Err(error) => reply.error(report(error)),
        }
        None
    })
}

/// Replies to a read that has to wait, when `read` is done or a signal ends the wait.
pub(super) async fn reply_later(
    mut watched: Watched,
    reply: ReplyData,
    read: impl Future<Output = Result<Vec<u8>, Errno>>,
) {
    let read = tokio::select! {
        biased;
        read = read => read,
        () = watched.interrupted() => Err(errno(&FsError::Interrupted)),
    };
    match read {
        Ok(bytes) => reply.data(&bytes),
        Err(errno) => reply.error(errno),
    }
}
