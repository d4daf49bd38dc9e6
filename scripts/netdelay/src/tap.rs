//! TAP devices: Ethernet interfaces whose cable is a file descriptor (`linux/if_tun.h`).

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;

use anyhow::{Context, Result, ensure};

/// `IFF_TAP | IFF_NO_PI`: whole Ethernet frames, without a packet information header before each.
const TAP_WITHOUT_HEADER: u16 = 0x0002 | 0x1000;

/// `IFNAMSIZ`: the longest interface name with its NUL.
const NAME_SIZE: usize = 16;

/// The part of `struct ifreq` that `TUNSETIFF` reads, padded to its size of 40 bytes.
#[repr(C)]
#[derive(Debug)]
struct InterfaceRequest {
    name: [u8; NAME_SIZE],
    flags: u16,
    padding: [u8; 22],
}

// The header declares the request number with the size of an int, although the argument is a struct ifreq.
nix::ioctl_write_ptr_bad!(
    set_interface,
    nix::request_code_write!(b'T', 202, size_of::<i32>()),
    InterfaceRequest
);

/// Makes a TAP device. It exists until the file is closed.
pub fn create(name: &str) -> Result<File> {
    ensure!(
        !name.is_empty() && name.len() < NAME_SIZE,
        "`{name}` is not an interface name"
    );
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .context("cannot open /dev/net/tun (is the tun module there, and are you root?)")?;
    let mut request = InterfaceRequest {
        name: [0; NAME_SIZE],
        flags: TAP_WITHOUT_HEADER,
        padding: [0; 22],
    };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: the descriptor is open and the request is a complete struct ifreq that outlives the call.
    #[allow(unsafe_code)]
    unsafe { set_interface(file.as_raw_fd(), &request) }
        .with_context(|| format!("cannot make the TAP device {name} (does it exist already?)"))?;
    Ok(file)
}
