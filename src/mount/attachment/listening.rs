//! The sockets at which a disk is served, with a thread for each connection.

use std::io::{self, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use super::connections::Connections;
use crate::disk::Disk;
use crate::mount::doors::DoorAddress;
use crate::mount::socket_file::SocketFile;
use crate::{nbd, vhost_blk};

/// Pause after a failed attempt to accept a connection. A smaller value uses processor time while descriptors are
/// short; a larger one delays clients.
const PAUSE: Duration = Duration::from_millis(100);
/// Seconds between two messages of an NBD client that has not chosen the export yet. A larger value lets clients hold
/// connections for nothing; a smaller one refuses slow clients.
const NEGOTIATION: TimeVal = TimeVal::new(30, 0);
/// The value of a socket's timeout that means none (socket(7)).
const NO_TIMEOUT: TimeVal = TimeVal::new(0, 0);
/// Bytes of NBD requests that are read at once. A request has 28 bytes.
const READ_AHEAD: usize = 4096;

/// A socket that takes clients, and their connections. Dropping it breaks the connections.
#[derive(Debug)]
pub(super) struct Listening {
    accepting: JoinHandle<()>,
    file: Option<SocketFile>,
    pub(super) connections: Connections,
}

impl Listening {
    /// Serves a disk by NBD at an address. Must be called within a runtime.
    pub(super) fn nbd(address: &DoorAddress, disk: Disk) -> io::Result<Self> {
        match address {
            DoorAddress::Unix(path) => Self::unix(path, "nbd", move |stream, runtime| {
                serve_nbd(&disk, runtime, stream.try_clone()?, stream)
            }),
            DoorAddress::Tcp(address) => {
                let listener = TcpListener::bind(address)?;
                listener.set_nonblocking(true)?;
                let listener = tokio::net::TcpListener::from_std(listener)?;
                let accept = move |cx: &mut Context<'_>| listener.poll_accept(cx).map(|client| client?.0.into_std());
                let listening = Self::start(None, accept, "nbd", move |stream: TcpStream, runtime| {
                    // Without it, small answers wait for the client's acknowledgement of earlier ones.
                    stream.set_nodelay(true)?;
                    serve_nbd(&disk, runtime, stream.try_clone()?, stream)
                });
                Ok(listening)
            }
        }
    }

    /// Serves a disk by vhost-user-blk at a Unix socket. Must be called within a runtime.
    pub(super) fn vhost_user_blk(path: &Path, disk: Disk) -> io::Result<Self> {
        Self::unix(path, "vhost-user", move |stream, runtime| {
            vhost_blk::serve(&disk, runtime, stream).map_err(io::Error::other)
        })
    }

    fn unix(
        path: &Path,
        name: &'static str,
        serve: impl Fn(UnixStream, &Handle) -> io::Result<()> + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let (listener, file) = SocketFile::bind(path)?;
        listener.set_nonblocking(true)?;
        let listener = tokio::net::UnixListener::from_std(listener)?;
        let accept = move |cx: &mut Context<'_>| listener.poll_accept(cx).map(|client| client?.0.into_std());
        Ok(Self::start(Some(file), accept, name, serve))
    }

    /// Takes clients. `accept` waits for the next one, like `poll_accept` of tokio's listeners.
    fn start<S: AsFd + Send + 'static>(
        file: Option<SocketFile>,
        mut accept: impl FnMut(&mut Context<'_>) -> Poll<io::Result<S>> + Send + 'static,
        name: &'static str,
        serve: impl Fn(S, &Handle) -> io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        let connections = Connections::default();
        let clients = Clients {
            name,
            connections: connections.clone(),
            serve: Arc::new(serve),
            runtime: Handle::current(),
        };
        let accepting = tokio::spawn(async move {
            loop {
                let stream = std::future::poll_fn(&mut accept).await;
                clients.start(stream).await;
            }
        });
        Self {
            accepting,
            file,
            connections,
        }
    }

    /// Accepts no more connections.
    pub(super) fn close(&mut self) {
        self.accepting.abort();
        self.file = None;
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.close();
        self.connections.shut_down();
    }
}

/// Serves one NBD client. `input` and `output` are the same socket.
fn serve_nbd(disk: &Disk, runtime: &Handle, input: impl Read + AsFd, output: impl Write + Send) -> io::Result<()> {
    let socket = input.as_fd().try_clone_to_owned()?;
    let set_timeout = |timeout| setsockopt(&socket, sockopt::ReceiveTimeout, &timeout).map_err(io::Error::from);
    set_timeout(NEGOTIATION)?;
    let input = BufReader::with_capacity(READ_AHEAD, input);
    let chosen = || set_timeout(NO_TIMEOUT);
    nbd::serve(disk, runtime, input, output, chosen).map_err(io::Error::other)
}

/// Serves the clients of one socket.
struct Clients<F> {
    name: &'static str,
    connections: Connections,
    /// Serves one client until it disconnects.
    serve: Arc<F>,
    runtime: Handle,
}

impl<F> Clients<F> {
    /// Starts to serve a client that was accepted, in a thread of its own.
    async fn start<S>(&self, stream: io::Result<S>)
    where
        S: AsFd + Send + 'static,
        F: Fn(S, &Handle) -> io::Result<()> + Send + Sync + 'static,
    {
        let started = stream.and_then(|stream| {
            // Its thread waits in the kernel.
            rustix::io::ioctl_fionbio(&stream, false)?;
            let connection = self.connections.add(&stream)?;
            let (name, serve, runtime) = (self.name, self.serve.clone(), self.runtime.clone());
            let work = move || {
                match serve(stream, &runtime) {
                    Ok(()) => tracing::debug!(name, "a client disconnected"),
                    Err(error) => tracing::warn!(name, %error, "a connection ended"),
                }
                drop(connection);
            };
            std::thread::Builder::new().name(name.to_owned()).spawn(work)
        });
        if let Err(error) = started {
            // The process may have no free descriptor for a moment.
            tracing::warn!(name = self.name, %error, "cannot serve a client");
            tokio::time::sleep(PAUSE).await;
        }
    }
}
