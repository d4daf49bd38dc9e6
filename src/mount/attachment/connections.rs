//! The open connections of a door.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::sys::socket::{Shutdown, shutdown};
use tokio::sync::watch;

/// Most connections of a door. Each takes up to three threads and a few descriptors. A larger value lets clients take those
/// that the fetches need; a smaller one serves fewer virtual machines.
const MOST_CONNECTIONS: usize = 512;

/// The connections that a door has open.
#[derive(Debug, Clone, Default)]
pub(super) struct Connections(Arc<OpenConnections>);

#[derive(Debug, Default)]
struct OpenConnections {
    open: watch::Sender<HashMap<u64, OwnedFd>>,
    next: AtomicU64,
}

impl Connections {
    /// Counts a connection until the result is dropped. Fails if there are [`MOST_CONNECTIONS`].
    pub(super) fn add(&self, socket: &impl AsFd) -> io::Result<Connection> {
        if self.count() >= MOST_CONNECTIONS {
            return Err(io::Error::other(format!(
                "{MOST_CONNECTIONS} clients are connected already"
            )));
        }
        let id = self.0.next.fetch_add(1, Ordering::Relaxed);
        let socket = socket.as_fd().try_clone_to_owned()?;
        self.0.open.send_modify(|open| drop(open.insert(id, socket)));
        Ok(Connection { of: self.clone(), id })
    }

    /// Number of connections.
    pub(super) fn count(&self) -> usize {
        self.0.open.borrow().len()
    }

    /// Waits until there is no connection.
    pub(super) async fn none(&self) {
        // The sender lives as long as `self`.
        let _ = self.0.open.subscribe().wait_for(HashMap::is_empty).await;
    }

    /// Breaks all connections.
    pub(super) fn shut_down(&self) {
        for socket in self.0.open.borrow().values() {
            // A connection that the client has closed meanwhile is as good.
            let _ = shutdown(socket.as_raw_fd(), Shutdown::Both);
        }
    }
}

/// An open connection, for as long as it is served.
#[derive(Debug)]
pub(super) struct Connection {
    of: Connections,
    id: u64,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.of.0.open.send_modify(|open| drop(open.remove(&self.id)));
    }
}
