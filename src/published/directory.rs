//! Published files in a directory.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;

use bytes::Bytes;

use super::trusted::TrustedDirectory;
use super::{FileName, PublishedError, Trust};
use crate::os::{gone, read_regular};

/// Reads a file of a directory, and its signature if the trust wants one. None if there is no such file. With
/// [`Trust::Location`], refuses a file or directory that another user can change. Blocks.
pub(super) fn read(
    directory: &Path,
    name: &FileName,
    cap: usize,
    longest_signature: usize,
    trust: &Trust,
) -> Result<Option<(Bytes, Option<Bytes>)>, PublishedError> {
    if !trust.wants_signature() {
        let trusted = TrustedDirectory::open(directory)?;
        let bytes = trusted.read(&name.to_string(), cap)?;
        return Ok(bytes.map(|bytes| (bytes.into(), None)));
    }
    let read = |name: &str, cap: usize| match read_regular(&directory.join(name), cap as u64) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        bytes => bytes
            .map(|bytes| Some(Bytes::from(bytes)))
            .map_err(|error| PublishedError::file(&directory.join(name), &error)),
    };
    let Some(bytes) = read(&name.to_string(), cap)? else {
        return match fs::exists(directory) {
            Ok(false) => Err(PublishedError::NoDirectory {
                path: directory.to_owned(),
            }),
            _ => Ok(None),
        };
    };
    Ok(Some((bytes, read(&name.signature(), longest_signature)?)))
}

/// Writes the file `name` of a directory under another name, and renames it when it is complete. Makes the directory if
/// it is missing. Blocks.
pub(super) fn write(directory: &Path, name: &str, bytes: &[u8]) -> Result<(), PublishedError> {
    let target = directory.join(name);
    // Others who can write to the directory would make it one that is not trusted.
    let made = DirBuilder::new().recursive(true).mode(0o755).create(directory);
    made.map_err(|error| PublishedError::file(directory, &error))?;
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
        PublishedError::file(&target, &error)
    })
}

/// Removes the file `name` of a directory, if there is one. Blocks.
pub(super) fn remove(directory: &Path, name: &str) -> Result<(), PublishedError> {
    let path = directory.join(name);
    gone(fs::remove_file(&path)).map_err(|error| PublishedError::file(&path, &error))
}

/// Whether there is anything called `name`. Blocks.
pub(super) fn is_there(directory: &Path, name: &str) -> bool {
    fs::symlink_metadata(directory.join(name)).is_ok()
}

/// Whether there is a file `name`, and its bytes are these. Blocks.
pub(super) fn has(directory: &Path, name: &str, bytes: &[u8]) -> bool {
    read_regular(&directory.join(name), bytes.len() as u64).is_ok_and(|there| there == bytes)
}
