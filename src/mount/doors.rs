//! The places where a disk can be reached.

use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::path_bytes;

/// A socket address that cannot be used for a disk.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DoorAddressError {
    /// The host is no address, or the port is no number from 1 to 65535.
    #[error(
        "{text} is not an address: 127.0.0.1:PORT, [::1]:PORT or localhost:PORT is expected, or a path with a slash"
    )]
    Unknown {
        /// The address as the user wrote it.
        text: String,
    },
    /// An address that other machines can reach.
    #[error(
        "{text} is not a loopback address. NBD has no passwords and no encryption, so ocifs serves it only to this machine"
    )]
    NotLoopback {
        /// The address as the user wrote it.
        text: String,
    },
}

/// The address of a listening socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DoorAddress {
    /// A Unix socket at an absolute path.
    Unix(#[serde(with = "path_bytes::required")] PathBuf),
    /// A TCP port on a loopback address.
    Tcp(SocketAddr),
}

impl DoorAddress {
    /// Reads HOST:PORT. Returns `None` if the text is a path: it has a slash, or no colon.
    pub fn parse_tcp(text: &str) -> Option<Result<SocketAddr, DoorAddressError>> {
        if text.contains('/') || !text.contains(':') {
            return None;
        }
        // Only literal addresses and one name: no command waits for a name server.
        let literal = match text.strip_prefix("localhost:") {
            Some(port) => format!("{}:{port}", Ipv4Addr::LOCALHOST),
            None => text.to_owned(),
        };
        Some(match literal.parse::<SocketAddr>() {
            Ok(address) if !address.ip().is_loopback() => Err(DoorAddressError::NotLoopback { text: text.to_owned() }),
            Ok(address) if address.port() != 0 => Ok(address),
            _ => Err(DoorAddressError::Unknown { text: text.to_owned() }),
        })
    }

    /// The name under which the disk is registered.
    pub(super) fn place(&self) -> PathBuf {
        match self {
            Self::Unix(path) => path.clone(),
            Self::Tcp(address) => PathBuf::from(address.to_string()),
        }
    }
}

impl fmt::Display for DoorAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.place().display().fmt(f)
    }
}

/// The doors of one disk. All paths are absolute.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskDoors {
    /// The directory that has the disk as a file.
    #[serde(default, with = "path_bytes::optional")]
    pub file: Option<PathBuf>,
    /// The socket that speaks NBD.
    #[serde(default)]
    pub nbd: Option<DoorAddress>,
    /// The socket that speaks vhost-user, for a virtio block device.
    #[serde(default, with = "path_bytes::optional")]
    pub vhost_user_blk: Option<PathBuf>,
}

impl DiskDoors {
    /// The names of all doors, by which other commands find the disk. The first one names its registration.
    pub fn places(&self) -> Vec<PathBuf> {
        let nbd = self.nbd.as_ref().map(DoorAddress::place);
        let sockets = [nbd, self.vhost_user_blk.clone()];
        self.file.iter().cloned().chain(sockets.into_iter().flatten()).collect()
    }

    /// The Unix sockets.
    pub(super) fn socket_files(&self) -> impl Iterator<Item = &Path> {
        let nbd = match &self.nbd {
            Some(DoorAddress::Unix(path)) => Some(path.as_path()),
            _ => None,
        };
        nbd.into_iter().chain(self.vhost_user_blk.as_deref())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_loopback_or_paths() {
        assert_eq!(DoorAddress::parse_tcp("/run/a:1"), None);
        assert_eq!(DoorAddress::parse_tcp("socket"), None);
        let loopback = DoorAddress::parse_tcp("127.0.0.1:10809").unwrap().unwrap();
        assert_eq!(loopback.to_string(), "127.0.0.1:10809");
        assert!(DoorAddress::parse_tcp("[::1]:10809").unwrap().is_ok());
        assert_eq!(DoorAddress::parse_tcp("localhost:10809").unwrap().unwrap(), loopback);
        let refused = [
            "192.0.2.1:10809",
            "0.0.0.0:10809",
            "127.0.0.1:many",
            "127.0.0.1:0",
            "127.0.0.1:70000",
            "example.invalid:10809",
        ];
        for text in refused {
            assert!(DoorAddress::parse_tcp(text).unwrap().is_err(), "{text}");
        }
    }

    #[test]
    fn doors_are_written_and_read() {
        let doors = DiskDoors {
            file: Some("/vm".into()),
            nbd: Some(DoorAddress::Tcp("127.0.0.1:10809".parse().unwrap())),
            vhost_user_blk: None,
        };
        let json = serde_json::to_string(&doors).unwrap();
        assert_eq!(serde_json::from_str::<DiskDoors>(&json).unwrap(), doors);
        assert_eq!(doors.places(), [PathBuf::from("/vm"), "127.0.0.1:10809".into()]);
    }
}
