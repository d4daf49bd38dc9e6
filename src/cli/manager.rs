//! What the process in the foreground tells the service manager that started it, by the protocol of sd_notify(3): that it is
//! ready, what it does, and that it ends.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use ocifs::os::MANAGER;

/// The service manager that listens to this process, or none.
#[derive(Debug)]
pub(super) struct ServiceManager(Option<(UnixDatagram, SocketAddr)>);

impl ServiceManager {
    /// The manager that the environment names. A manager that cannot be reached counts as none, with a warning: the image is
    /// served without it.
    pub(super) fn of_environment() -> Self {
        let Some(name) = std::env::var_os(MANAGER).filter(|name| !name.is_empty()) else {
            return Self::none();
        };
        let open = || {
            let socket = UnixDatagram::unbound()?;
            // A manager that is stuck must not stop this process.
            socket.set_nonblocking(true)?;
            Ok::<_, io::Error>((socket, address(&name)?))
        };
        Self(
            open()
                .inspect_err(|error| tracing::warn!(%error, "cannot talk to the service manager at {MANAGER}"))
                .ok(),
        )
    }

    /// No manager.
    pub(super) fn none() -> Self {
        Self(None)
    }

    /// Says what the process does, and that it is ready if `ready`.
    pub(super) fn status(&self, ready: bool, status: &str) {
        // A message is one assignment a line.
        let status = status.replace('\n', " ");
        self.send(&format!("{}STATUS={status}\n", if ready { "READY=1\n" } else { "" }));
    }

    /// Says that the process is about to end, and what it does until then.
    pub(super) fn stopping(&self, status: &str) {
        self.send(&format!("STOPPING=1\nSTATUS={status}\n"));
    }

    fn send(&self, message: &str) {
        if let Some((socket, address)) = &self.0
            && let Err(error) = socket.send_to_addr(message.as_bytes(), address)
        {
            tracing::warn!(%error, "the service manager at {MANAGER} was not told: {}", message.trim_end());
        }
    }
}

/// Returns the address that a service manager names: a path, or `@` and an abstract name.
fn address(name: &OsStr) -> io::Result<SocketAddr> {
    match name.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
        [b'/', ..] => SocketAddr::from_pathname(name),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{} is neither a path nor @NAME", name.display()),
        )),
    }
}
