//! Sockets and their clients, as the kernel shows them in /proc/net (proc(5)).

use std::fs;
use std::path::Path;

use super::doors::{DiskDoors, DoorAddress};

/// State of a connected Unix socket (kernel: `SS_CONNECTED` of include/uapi/linux/net.h).
const UNIX_CONNECTED: &[u8] = b"03";
/// Least number of references to a Unix socket whose other end is open. The other end holds one of them until it is closed.
const UNIX_REFERENCES: u32 = 3;
/// State of an established TCP connection (kernel: `TCP_ESTABLISHED` of include/net/tcp_states.h).
const TCP_ESTABLISHED: &str = "01";

/// Counts the clients of a disk without asking its process. An accepted Unix socket has the path of the socket that
/// listens.
pub(super) fn count(doors: &DiskDoors) -> usize {
    let unix = fs::read("/proc/net/unix").unwrap_or_default();
    let connected = unix.split(|&b| b == b'\n').filter(|line| {
        let is_ours = |path: &[u8]| {
            doors
                .socket_files()
                .any(|file| file.as_os_str().as_encoded_bytes() == path)
        };
        let is_connected =
            |socket: &UnixSocket<'_>| socket.state == UNIX_CONNECTED && socket.references >= UNIX_REFERENCES;
        unix_socket(line).is_some_and(|socket| is_connected(&socket) && is_ours(socket.path))
    });
    let tcp = match &doors.nbd {
        Some(DoorAddress::Tcp(address)) => tcp_connections(address.port()),
        _ => 0,
    };
    connected.count() + tcp
}

/// Whether a process listens at a Unix socket, in this network namespace. Does not touch the socket itself.
pub(super) fn is_bound(path: &Path) -> bool {
    let unix = fs::read("/proc/net/unix").unwrap_or_default();
    let mut sockets = unix.split(|&b| b == b'\n').filter_map(unix_socket);
    sockets.any(|socket| socket.path == path.as_os_str().as_encoded_bytes())
}

/// A line of /proc/net/unix.
struct UnixSocket<'a> {
    references: u32,
    state: &'a [u8],
    path: &'a [u8],
}

/// Reads a line of /proc/net/unix. Returns `None` for a socket without a path. A path may have spaces in it.
fn unix_socket(line: &[u8]) -> Option<UnixSocket<'_>> {
    let mut fields = line.splitn(7, |&b| b == b' ');
    let references = std::str::from_utf8(fields.nth(1)?).ok()?;
    let state = fields.nth(3)?;
    // The inode number is aligned with spaces.
    let rest = fields.next()?.trim_ascii_start();
    let end = rest.iter().position(|&b| b == b' ')?;
    Some(UnixSocket {
        references: u32::from_str_radix(references, 16).ok()?,
        state,
        path: &rest[end + 1..],
    })
}

/// Counts the connections to a local TCP port.
fn tcp_connections(port: u16) -> usize {
    let port = format!(":{port:04X}");
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"].map(|table| fs::read_to_string(table).unwrap_or_default());
    let lines = tables.iter().flat_map(|table| table.lines());
    lines
        .filter(|line| {
            let mut fields = line.split_ascii_whitespace().skip(1);
            fields.next().is_some_and(|local| local.ends_with(&port)) && fields.nth(1) == Some(TCP_ESTABLISHED)
        })
        .count()
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    #[test]
    fn connections_are_counted_while_they_are_open() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a socket");
        let unix = UnixListener::bind(&path).unwrap();
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = tcp.local_addr().unwrap();
        let doors = DiskDoors {
            file: None,
            nbd: Some(DoorAddress::Tcp(address)),
            vhost_user_blk: Some(path.clone()),
        };
        assert_eq!(count(&doors), 0);
        assert!(is_bound(&path));
        let clients = (UnixStream::connect(&path).unwrap(), UnixStream::connect(&path).unwrap());
        let accepted = (unix.accept().unwrap(), unix.accept().unwrap());
        assert_eq!(count(&doors), 2);
        let client = TcpStream::connect(address).unwrap();
        let other = tcp.accept().unwrap();
        assert_eq!(count(&doors), 3);
        drop(clients);
        assert_eq!(count(&doors), 1, "the other end is closed");
        drop((accepted, client, other));
        assert_eq!(count(&doors), 0);
    }
}
