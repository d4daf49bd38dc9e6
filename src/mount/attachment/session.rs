//! A FUSE session in a thread of its own.

use std::io;
use std::os::fd::OwnedFd;
use std::panic::AssertUnwindSafe;

use tokio::runtime::Handle;
use tokio::sync::oneshot;

use crate::fuse::{self, Access, Service};
use crate::mount::error::{MountError, system};
use crate::mount::kernel;
use crate::task::TaskError;

/// A session that takes the requests of a mounted /dev/fuse. It ends when the file system is unmounted and unused.
#[derive(Debug)]
pub(super) struct FuseSession {
    /// The connection to the kernel, to see whether the file system is still mounted.
    connection: OwnedFd,
    ended: oneshot::Receiver<io::Result<()>>,
}

impl FuseSession {
    /// Starts the session, and waits until the kernel knows what the file system can do. The current runtime runs the
    /// reads that wait.
    pub(super) async fn start(fuse: OwnedFd, access: Access, service: Service) -> Result<Self, MountError> {
        let connection = fuse.try_clone().map_err(system("watch /dev/fuse"))?;
        let runtime = Handle::current();
        let (sender, ended) = oneshot::channel();
        let (agreed, agreement) = oneshot::channel();
        let agreed = move || {
            // If the mount was given up meanwhile, the receiver is gone.
            let _ = agreed.send(());
        };
        let serve = move || {
            let serving = AssertUnwindSafe(|| fuse::serve(fuse, access, service, runtime, agreed));
            let result = std::panic::catch_unwind(serving);
            let result = result.unwrap_or_else(|payload| Err(io::Error::other(TaskError::panicked(&*payload))));
            // If the process is going down, the receiver is gone.
            let _ = sender.send(result);
        };
        let thread = std::thread::Builder::new().name("fuse".to_owned());
        thread.spawn(serve).map_err(system("start the FUSE session"))?;
        // If the session ends before, `ended` says why.
        let _ = agreement.await;
        Ok(Self { connection, ended })
    }

    /// Waits for the end of the session. Must not be called again after it has returned.
    pub(super) async fn ended(&mut self) -> io::Result<()> {
        // The thread sends its result even if it panics.
        (&mut self.ended).await.unwrap_or(Ok(()))
    }

    /// Returns the connection to the kernel.
    pub(super) fn connection(&self) -> &OwnedFd {
        &self.connection
    }

    /// Whether the file system is still mounted somewhere, or has files open.
    pub(super) fn is_mounted(&self) -> bool {
        kernel::is_mounted(&self.connection)
    }
}
