//! Published files in a directory.

use std::fs::{self, File, Metadata};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use bytes::Bytes;

use super::{PublishedError, Trust};
use crate::os::read_regular;

/// Reads the file `name` of a directory. None if there is no such file. With [`Trust::Location`], refuses a file or
/// directory that another user can change. Blocks.
pub(super) fn read(directory: &Path, name: &str, cap: usize, trust: &Trust) -> Result<Option<Bytes>, PublishedError> {
    let path = directory.join(name);
    let metadata = match fs::symlink_metadata(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        metadata => metadata.map_err(|error| failed(&path, &error))?,
    };
    if matches!(trust, Trust::Location) {
        check_path(directory)?;
        check_owner(&path, &metadata)?;
    }
    match read_regular(&path, cap as u64) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        bytes => bytes
            .map(|bytes| Some(bytes.into()))
            .map_err(|error| failed(&path, &error)),
    }
}

/// Writes the file `name` of a directory under another name, and renames it when it is complete. Blocks.
pub(super) fn write(directory: &Path, name: &str, bytes: &[u8]) -> Result<(), PublishedError> {
    let target = directory.join(name);
    fs::create_dir_all(directory).map_err(|error| failed(directory, &error))?;
    let draft = directory.join(format!(".{name}.{}.{:08x}", std::process::id(), fastrand::u32(..)));
    let written = (|| {
        let mut file = File::options().write(true).create_new(true).mode(0o644).open(&draft)?;
        file.write_all(bytes)?;
        file.sync_data()?;
        fs::rename(&draft, &target)
    })();
    written.map_err(|error| {
        // The directory may be full. What was written of the draft is of no use.
        let _ = fs::remove_file(&draft);
        failed(&target, &error)
    })
}

/// Whether there is a file `name`, and its bytes are these.
pub(super) fn has(directory: &Path, name: &str, bytes: &[u8]) -> bool {
    read_regular(&directory.join(name), bytes.len() as u64).is_ok_and(|there| there == bytes)
}

fn failed(path: &Path, reason: &dyn std::fmt::Display) -> PublishedError {
    PublishedError::File {
        path: path.to_owned(),
        reason: reason.to_string(),
    }
}

/// Checks that no other user can put files into a directory or replace a directory above it.
fn check_path(directory: &Path) -> Result<(), PublishedError> {
    let real: PathBuf = directory.canonicalize().map_err(|error| failed(directory, &error))?;
    for ancestor in real.ancestors() {
        let metadata = fs::symlink_metadata(ancestor).map_err(|error| failed(ancestor, &error))?;
        // In a directory with the sticky bit, others cannot replace what is not theirs.
        let is_sticky = ancestor != real && metadata.permissions().mode() & 0o1000 != 0;
        if !is_sticky {
            check_owner(ancestor, &metadata)?;
        }
    }
    Ok(())
}

/// Checks that only root and this user can change a file or directory.
fn check_owner(path: &Path, metadata: &Metadata) -> Result<(), PublishedError> {
    let own = nix::unistd::geteuid().as_raw();
    if ![0, own].contains(&metadata.uid()) {
        let reason = format!("it belongs to user {}, so the location is not trusted", metadata.uid());
        return Err(failed(path, &reason));
    }
    if metadata.permissions().mode() & 0o022 != 0 && !metadata.is_symlink() {
        return Err(failed(path, &"others can write to it, so the location is not trusted"));
    }
    Ok(())
}
