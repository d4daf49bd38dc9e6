//! Opens files at the program's own paths, where other programs may have put anything.
//!
//! Only regular files are read and written. A directory, a socket or a device at a file's place counts as damage.
//! Opening a FIFO could wait for ever, so files are opened without waiting.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use nix::libc;

use super::gone;

/// Opens a regular file without waiting.
pub(crate) fn open_regular(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    let file = options.custom_flags(libc::O_NONBLOCK).open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(no_regular_file()),
    }
}

fn no_regular_file() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "it is no regular file")
}

/// Returns all bytes of a regular file that has at most `most` bytes.
pub(crate) fn read_regular(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    read_open(open_regular(File::options().read(true), path)?, most)
}

/// Returns all bytes of an open file, if it is a regular file of at most `most` bytes.
pub(crate) fn read_open(file: File, most: u64) -> io::Result<Vec<u8>> {
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(no_regular_file());
    }
    let too_long = || io::Error::new(io::ErrorKind::InvalidData, format!("it is longer than {most} bytes"));
    let length = metadata.len();
    if length > most {
        return Err(too_long());
    }
    let mut bytes = Vec::with_capacity(length as usize);
    file.take(most + 1).read_to_end(&mut bytes)?;
    match bytes.len() as u64 > most {
        true => Err(too_long()),
        false => Ok(bytes),
    }
}

/// Returns whether an error of [`open_regular`] or [`read_regular`] means that the program did not make what lies
/// there.
pub fn is_foreign(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::InvalidData | io::ErrorKind::IsADirectory | io::ErrorKind::NotADirectory
    ) || matches!(error.raw_os_error(), Some(libc::ENXIO | libc::ELOOP | libc::ENODEV))
}

/// Removes anything that lies at a path, of any type.
pub(crate) fn clear_way(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => fs::remove_dir_all(path),
        Ok(_) => gone(fs::remove_file(path)),
        Err(error) => gone(Err(error)),
    }
}

/// Returns whether a symbolic link lies at a path.
pub fn is_symlink(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|found| found.is_symlink())
}

/// Opens a regular file. Anything else at the path is removed first. `options` say whether a missing file is created.
pub(crate) fn open_or_replace(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    match open_regular(options, path) {
        // A symbolic link that leads nowhere is also in the way of a new file.
        Err(error) if is_foreign(&error) || is_symlink(path) => {
            clear_way(path)?;
            open_regular(options, path)
        }
        opened => opened,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn only_regular_files_are_opened_and_nothing_waits() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        nix::unistd::mkfifo(&at("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let _socket = UnixListener::bind(at("socket")).unwrap();
        fs::create_dir_all(at("directory/below")).unwrap();
        std::os::unix::fs::symlink("/dev/zero", at("device")).unwrap();
        std::os::unix::fs::symlink("loop", at("loop")).unwrap();
        std::os::unix::fs::symlink("nowhere/x", at("dangling")).unwrap();
        for name in ["fifo", "socket", "directory", "device", "loop"] {
            let read = read_regular(&at(name), 100).unwrap_err();
            let written = open_regular(File::options().write(true), &at(name)).unwrap_err();
            assert!(is_foreign(&read) && is_foreign(&written), "{name}: {read} {written}");
        }
        for name in ["fifo", "socket", "directory", "device", "loop", "dangling", "new"] {
            open_or_replace(File::options().write(true).create(true), &at(name)).unwrap();
            assert_eq!(read_regular(&at(name), 100).unwrap(), b"", "{name}");
        }
        fs::write(at("new"), [7; 101]).unwrap();
        assert!(is_foreign(&read_regular(&at("new"), 100).unwrap_err()));
        assert_eq!(read_regular(&at("new"), 101).unwrap(), [7; 101]);
    }
}
