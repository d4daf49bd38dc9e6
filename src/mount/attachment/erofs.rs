//! Mounts an EROFS file system by the kernel: from the file itself since Linux 6.12, otherwise from a loop device over
//! it.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::libc;
use nix::mount::MsFlags;

use crate::mount::kernel_call::KernelCall;

/// Attempts to get a loop device. Another program may take the device that was free a moment ago. A larger value only
/// delays the error if every attempt fails.
const LOOP_ATTEMPTS: u32 = 50;

/// Mounts the EROFS file system in the file `disk` on the directory `target`. This process may serve the file.
pub(super) fn mount(disk: PathBuf, target: PathBuf, flags: MsFlags) -> io::Result<()> {
    let mount = move || match attach(&disk, &target, flags) {
        // A kernel that mounts EROFS only from block devices.
        Err(Errno::ENOTBLK) => mount_by_loop(&disk, &target, flags),
        result => Ok(result?),
    };
    KernelCall::start(None, mount)?.join()?
}

fn attach(source: &Path, target: &Path, flags: MsFlags) -> nix::Result<()> {
    nix::mount::mount(Some(source), target, Some("erofs"), flags, None::<&str>)
}

/// Mounts through a loop device. The kernel frees the device at the unmount.
fn mount_by_loop(disk: &Path, target: &Path, flags: MsFlags) -> io::Result<()> {
    let (path, device) = loop_device(&File::open(disk)?)?;
    attach(&path, target, flags)?;
    // The file system has the device open by now. Without another user, the device frees itself when it is closed.
    drop(device);
    Ok(())
}

/// `LO_FLAGS_READ_ONLY` and `LO_FLAGS_AUTOCLEAR` of include/uapi/linux/loop.h.
const READ_ONLY: u32 = 1;
const AUTOCLEAR: u32 = 4;

/// `struct loop_info64` of include/uapi/linux/loop.h, as far as it is used.
#[repr(C)]
struct LoopInfo {
    unused: [u64; 5],
    /// `lo_number`, `lo_encrypt_type`, `lo_encrypt_key_size`.
    numbers: [u32; 3],
    flags: u32,
    /// `lo_file_name`, `lo_crypt_name`, `lo_encrypt_key`, `lo_init`.
    names: [u8; 64 + 64 + 32 + 16],
}

/// `struct loop_config` of include/uapi/linux/loop.h.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

const _: () = assert!(size_of::<LoopInfo>() == 232 && size_of::<LoopConfig>() == 304);

nix::ioctl_none_bad!(loop_get_free, 0x4c82);
nix::ioctl_write_ptr_bad!(loop_configure, 0x4c0a, LoopConfig);

/// Sets up a loop device over a file. The kernel frees the device when its last user closes it.
#[allow(unsafe_code)]
fn loop_device(file: &File) -> io::Result<(PathBuf, File)> {
    let control = File::options().read(true).write(true).open("/dev/loop-control")?;
    let config = LoopConfig {
        fd: file.as_raw_fd().cast_unsigned(),
        block_size: 4096,
        info: LoopInfo {
            unused: [0; 5],
            numbers: [0; 3],
            flags: READ_ONLY | AUTOCLEAR,
            names: [0; 176],
        },
        reserved: [0; 8],
    };
    for _ in 0..LOOP_ATTEMPTS {
        // SAFETY: this ioctl takes no argument.
        let number = unsafe { loop_get_free(control.as_raw_fd()) }?;
        let path = PathBuf::from(format!("/dev/loop{number}"));
        let device = File::open(&path)?;
        // SAFETY: the kernel reads a `loop_config`, which lives until the call returns. It takes its own reference to
        // the open file.
        match unsafe { loop_configure(device.as_raw_fd(), &raw const config) } {
            Ok(_) => return Ok((path, device)),
            Err(Errno::EBUSY) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Err(io::Error::from_raw_os_error(libc::EBUSY))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::process::Command;
    use std::time::Duration;

    use super::*;
    use crate::os::until_blocking;

    /// Mounts a small file system with `mount`, and reads a file of it.
    fn try_mount(mount: impl Fn(&Path, PathBuf) -> io::Result<()>) {
        let directory = tempfile::tempdir().unwrap();
        let (content, disk, target) = ["content", "disk", "target"]
            .map(|name| directory.path().join(name))
            .into();
        fs::create_dir(&content).unwrap();
        fs::create_dir(&target).unwrap();
        fs::write(content.join("file"), "text").unwrap();
        let made = Command::new("mkfs.erofs")
            .args(["--quiet"])
            .args([&disk, &content])
            .output();
        assert!(made.unwrap().status.success());
        mount(&disk, target.clone()).unwrap();
        assert_eq!(fs::read_to_string(target.join("file")).unwrap(), "text");
        nix::mount::umount2(&target, nix::mount::MntFlags::empty()).unwrap();
        let is_used = || {
            let devices = fs::read_dir("/sys/block").unwrap().flatten();
            let mut files = devices.filter_map(|device| fs::read(device.path().join("loop/backing_file")).ok());
            files.any(|file| file.trim_ascii_end() == disk.as_os_str().as_encoded_bytes())
        };
        let freed = until_blocking(Duration::from_millis(5), Duration::from_secs(20), || {
            Ok::<_, io::Error>((!is_used()).then_some(()))
        });
        assert_eq!(freed.unwrap(), Some(()), "the loop device is still set up");
    }

    #[test]
    fn a_file_is_mounted_directly_or_by_a_loop_device() {
        assert!(nix::unistd::geteuid().is_root(), "only root may mount EROFS");
        try_mount(|disk, target| mount(disk.to_owned(), target, MsFlags::MS_RDONLY));
        try_mount(|disk, target| mount_by_loop(disk, &target, MsFlags::MS_RDONLY));
    }
}
